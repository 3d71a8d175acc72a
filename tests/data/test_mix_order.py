"""The order of a mixture's documents against a slow, exact reference, and what it promises of the shares."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data import mix_order
from data import order as document_order
from data.mix_order import ROUNDING, MixedOrder
from data.mix_texts import Mixture
from data.order import DocumentOrder

SHARES = ((0.7, 0.0, 0.3), (0.2, 0.5, 0.3))
TRAIN = (7, 3, 12)


def mixture(shares=SHARES, train=TRAIN) -> Mixture:
    return Mixture(tuple(f"source {n}" for n in range(len(train))), shares, train, train)


def sizes(train=TRAIN, seed: int = 0, most: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, most, sum(train))


def reference(doc_bytes, mixed: Mixture, seed: int, ends, count: int) -> list[int]:
    """The first `count` documents, in exact fractions."""
    firsts = np.cumsum([0, *mixed.train])

    def document(source: int, nth: int) -> int:
        epoch, within = divmod(nth, mixed.train[source])
        order = DocumentOrder(mixed.train[source], seed).permutation(epoch)
        return int(firsts[source] + order[within])

    found: list[int] = []
    taken = [0] * len(mixed.train)
    given, total, stage = [0] * len(mixed.train), 0, 0
    while len(found) < count:
        while stage < len(ends) and total >= ends[stage]:
            stage, given = stage + 1, [0] * len(given)
        candidates = []
        for source, share in enumerate(mixed.shares[stage]):
            if share == 0 or given[source] - Fraction(share) * sum(given) >= Fraction(ROUNDING):
                continue
            size = int(doc_bytes[document(source, taken[source])])
            candidates.append((Fraction(given[source] + size) / Fraction(share), source))
        _, source = min(candidates)
        found.append(document(source, taken[source]))
        size = int(doc_bytes[found[-1]])
        taken[source], given[source], total = taken[source] + 1, given[source] + size, total + size
    return found


def stream(order: MixedOrder, rounds: int) -> np.ndarray:
    return np.concatenate([order.documents(number) for number in range(rounds)])


@pytest.mark.parametrize("ends", [(0,), (1,), (900,), (20_000,)])
def test_against_the_reference(ends) -> None:
    """Over several passes of each source, and into the second stage or not."""
    doc_bytes = sizes()
    order = MixedOrder(doc_bytes, mixture(), 5)
    order.set_ends(ends)
    found = stream(order, 6)
    assert len(found) > 2 * sum(TRAIN)
    assert found.tolist() == reference(doc_bytes, mixture(), 5, ends, len(found))


def test_sources_of_two_levels_are_read_block_by_block(monkeypatch) -> None:
    """The last block of a source is a short one, wherever it comes in an epoch."""
    monkeypatch.setattr(document_order, "BLOCK", 5)
    monkeypatch.setattr(document_order, "ONE_LEVEL", 6)
    doc_bytes = sizes()
    order = MixedOrder(doc_bytes, mixture(), 5)
    order.set_ends((900,))
    assert [one.n_blocks for one in order._orders] == [2, 1, 3]
    found = stream(order, 6)
    assert found.tolist() == reference(doc_bytes, mixture(), 5, (900,), len(found))


def test_a_source_of_one_document_gives_it_every_time() -> None:
    mixed, doc_bytes = mixture(((0.5, 0.5),), (1, 4)), sizes((1, 4))
    found = stream(MixedOrder(doc_bytes, mixed, 5), 6)
    assert found.tolist() == reference(doc_bytes, mixed, 5, (), len(found))


def test_any_round_is_the_same_asked_for_alone_or_again() -> None:
    order, rounds = MixedOrder(sizes(), mixture(), 5), range(8)
    order.set_ends((2000,))
    forth = [order.documents(number).tolist() for number in rounds]
    assert [order.documents(number).tolist() for number in reversed(rounds)] == forth[::-1]
    alone = MixedOrder(sizes(), mixture(), 5)
    alone.set_ends((2000,))
    assert alone.documents(6).tolist() == forth[6]
    other = MixedOrder(sizes(), mixture(), 6)
    other.set_ends((2000,))
    assert other.documents(6).tolist() != forth[6]


def test_a_source_is_read_in_its_own_order_and_begins_anew() -> None:
    order = MixedOrder(sizes(), mixture(), 5)
    order.set_ends((0,))
    found = stream(order, 9)
    for source, (first, count) in enumerate(zip(np.cumsum([0, *TRAIN]), TRAIN, strict=False)):
        mine = found[(found >= first) & (found < first + count)] - first
        passes = [DocumentOrder(count, 5).permutation(epoch) for epoch in range(-(-len(mine) // count))]
        assert len(passes) > 2, f"source {source} is exhausted twice"
        assert mine.tolist() == np.concatenate(passes)[: len(mine)].tolist()


@pytest.mark.parametrize("seed", range(12))
def test_every_source_is_within_a_document_of_its_share_at_every_point(seed) -> None:
    """Of few sources and many, of even weights and skewed ones; counted from the start of each stage."""
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 11))
    train = tuple(int(n) for n in random.integers(1, 30, count))
    shares = tuple(tuple(random.dirichlet(np.full(count, 0.3))) for _ in range(2))
    doc_bytes = sizes(train, seed, 1000)
    order = MixedOrder(doc_bytes, mixture(shares, train), seed)
    order.set_ends((30_000.0,))
    found = stream(order, 30)
    source = np.repeat(np.arange(count), train)
    total = np.cumsum(doc_bytes[found])
    second = int(np.searchsorted(total, 30_000)) + 1
    for stage, documents in enumerate((found[:second], found[second:])):
        assert len(documents) > 30
        given = np.zeros((len(documents), count))
        given[np.arange(len(documents)), source[documents]] = doc_bytes[documents]
        away = np.cumsum(given, axis=0) - np.outer(np.cumsum(doc_bytes[documents]), shares[stage])
        assert np.abs(away).max() <= doc_bytes.max() + ROUNDING


def test_a_source_of_no_weight_gives_nothing_in_its_stage() -> None:
    order = MixedOrder(sizes(), mixture(), 5)
    order.set_ends((5000,))
    found = stream(order, 12)
    second = int(np.searchsorted(np.cumsum(sizes()[found]), 5000)) + 1
    of_the_second = (found >= TRAIN[0]) & (found < TRAIN[0] + TRAIN[1])
    assert not of_the_second[:second].any() and of_the_second[second : second + 6].any()


def test_rounds_end_with_the_text_and_with_a_stage(monkeypatch) -> None:
    doc_bytes = sizes()
    order = MixedOrder(doc_bytes, mixture(), 5)
    order.set_ends((1.5 * doc_bytes.sum(),))
    rounds = [int(doc_bytes[order.documents(number)].sum()) for number in range(3)]
    assert [order.is_cut_short(number) for number in range(3)] == [False, True, False]
    assert rounds[0] + rounds[1] >= 1.5 * doc_bytes.sum() > rounds[0] + rounds[1] - doc_bytes.max()
    assert all(0 <= size - doc_bytes.sum() < doc_bytes.max() for size in (rounds[0], rounds[2]))
    monkeypatch.setattr(mix_order, "LARGEST", 700)
    small = MixedOrder(doc_bytes, mixture(), 5)
    assert 0 <= int(doc_bytes[small.documents(0)].sum()) - 700 < doc_bytes.max()


def test_one_source_that_ties_with_another_comes_first() -> None:
    order = MixedOrder(np.full(4, 10), mixture(((0.5, 0.5),), (2, 2)), 1)
    source = stream(order, 2) // 2
    assert source.tolist() == [0, 1] * 4
