"""The order of documents at size: two levels, a function of (seed, epoch), and any block of it by itself."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import order
from data.order import DocumentOrder, first_documents

WORD = (1 << 64) - 1


def mixed(value: int) -> int:
    """SplitMix64's finaliser, with Python's integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def hashed(number: int, *words: int) -> int:
    key = 0
    for word in words:
        key = mixed((key ^ word & WORD) + 0x9E3779B97F4A7C15 & WORD)
    return mixed(mixed((number + 1) * 0x9E3779B97F4A7C15 & WORD) ^ key)


def plainly(n_docs: int, block: int, seed: int, epoch: int) -> list[int]:
    """All documents sorted by the hash of their block, then by their own."""

    def place(document: int) -> tuple[int, int]:
        return hashed(document // block, seed, epoch, 1), hashed(document, seed, epoch)

    return sorted(range(n_docs), key=place)


@given(
    n_docs=st.integers(0, 90), block=st.integers(1, 13), seed=st.integers(-3, 2**64), epoch=st.integers(0, 9)
)
def test_many_documents_are_sorted_by_block_and_then_by_document(n_docs, block, seed, epoch) -> None:
    with patch.multiple(order, BLOCK=block, ONE_LEVEL=0):
        found = DocumentOrder(n_docs, seed)
        assert found.permutation(epoch).tolist() == plainly(n_docs, block, seed, epoch)
        assert found.n_blocks == -(-n_docs // block)
        for number in range(found.n_blocks):
            here = found.block(epoch, number).tolist()
            assert sorted(here) == list(range(number * block, min((number + 1) * block, n_docs)))


@given(n_docs=st.integers(0, 90), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_few_documents_are_one_block(n_docs, seed, epoch) -> None:
    """The order that runs on small texts always had."""
    found = DocumentOrder(n_docs, seed).permutation(epoch)
    assert found.tolist() == sorted(range(n_docs), key=lambda document: hashed(document, seed, epoch))


def test_the_level_changes_beyond_a_number_that_no_test_corpus_has() -> None:
    assert (order.BLOCK, order.ONE_LEVEL) == (65_536, 1 << 20)
    assert DocumentOrder(order.ONE_LEVEL, 0).n_blocks == 1
    assert DocumentOrder(order.ONE_LEVEL + 1, 0).n_blocks == 17
    assert (
        DocumentOrder(10_000_000, 0).blocks(0).tolist()
        == np.argsort([hashed(block, 0, 0, 1) for block in range(153)]).tolist()
    )


def test_blocks_and_documents_are_put_in_order_independently_and_anew_each_epoch() -> None:
    with patch.multiple(order, BLOCK=100, ONE_LEVEL=0):
        found = DocumentOrder(1000, 1)
        assert found.blocks(0).tolist() != found.blocks(1).tolist()
        within = [(found.block(epoch, 3) - 300).tolist() for epoch in (0, 1)]
        assert within[0] != within[1] != (found.block(1, 4) - 400).tolist()


@given(sizes=st.lists(st.integers(0, 20), max_size=60), limit=st.integers(0, 700), block=st.integers(1, 9))
def test_the_first_documents_are_those_of_one_sort(sizes, limit, block) -> None:
    every = sorted(range(len(sizes)), key=lambda document: hashed(document, 5, 0))
    total = fitting = 0
    while fitting < len(every) and (total := total + sizes[every[fitting]]) <= limit:
        fitting += 1
    with patch.object(order, "BLOCK", block):
        assert first_documents(np.array(sizes, dtype=np.int64), 5, limit).tolist() == every[: max(1, fitting)]


@pytest.mark.parametrize("limit", [10_000, 10**9])
def test_the_first_documents_are_spread_over_the_text(limit) -> None:
    with patch.multiple(order, BLOCK=1000, ONE_LEVEL=0):
        chosen = first_documents(np.full(50_000, 100), 0, limit)
    assert len(chosen) == min(limit // 100, 50_000)
    counts = np.bincount(chosen // 5000, minlength=10)
    expected = len(chosen) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 33.7  # chi-square, 9 degrees of freedom: p = 1e-4
