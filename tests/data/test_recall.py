"""Recall: documents are what they say, an oracle that reads them answers all, and marks find the answers in tokens."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from data import load_dataset, synthetic
from data.errors import DataError
from data.recall import FILLER, RecallSource
from data.rows import HeldoutRows

SETTINGS = {"data": "synthetic", "synthetic": "recall"}


def answers(text: bytes) -> list[tuple[int, int]]:
    """(place of a value, place where it stands next behind the same key), found by reading alone."""
    last: dict[int, int] = {}
    found = []
    for place, byte in enumerate(text[:-1]):
        if byte == FILLER or byte in b"0123456789":
            continue
        if byte in last:
            found.append((last[byte] + 1, place + 1))
        last[byte] = place
    return found


def test_documents_ask_for_each_pair_at_the_distances_asked_for() -> None:
    source = RecallSource(8, 5, 26, 10, 32, 61)
    distances = []
    for text in source.sample(300, 0):
        found = answers(text)
        assert len(text) == 251 and len(found) == 40
        assert all(text[told] == text[asked] for told, asked in found)  # an oracle is right always
        assert np.flatnonzero(source.answers(text)).tolist() == [asked for _, asked in found]
        distances += [asked - told for told, asked in found]
    assert (min(distances), max(distances)) == (32, 61)


def test_values_say_nothing_of_each_other() -> None:
    """Without the pair, no rule is right more often than one of so many values."""
    source = RecallSource(8, 1, 26, 10, 64, 253)
    told = np.array([[text[asked] for _, asked in answers(text)] for text in source.sample(400, 1)])
    for guess in (np.full_like(told, ord("0")), np.roll(told, 1, axis=1)):
        assert abs((guess == told).mean() - source.chance_accuracy) < 4 * math.sqrt(0.09 / told.size)


def test_the_law_sums_to_one_and_its_entropy_is_exact() -> None:
    """All texts of the document's length over its alphabet; equally likely ones, so the count is the entropy."""
    source = RecallSource(2, 1, 2, 2, 2, 7)
    a, b = source.keys
    alphabet = [a, b, *source.values, FILLER]
    pairs = ((x, v, y, w) for x, y in ((a, b), (b, a)) for v in source.values for w in source.values)
    rest_of_all = list(itertools.product(alphabet, repeat=source.document_bytes - 4))
    texts = (bytes([*told, *rest]) for told in pairs for rest in rest_of_all)
    lawful = [text for text in texts if math.isfinite(source.nats(text))]
    twice = bytes([a, source.values[0]] * source.document_bytes)[: source.document_bytes]
    assert source.nats(twice) == math.inf  # a key that is told twice: not among those
    assert math.isclose(sum(math.exp(-source.nats(text)) for text in lawful), 1, rel_tol=1e-9)
    assert math.isclose(source.entropy_bits_per_byte, math.log2(len(lawful)) / source.document_bytes)
    assert set(source.sample(400, 0)) == set(lawful)


def test_the_entropy_of_several_rounds_is_that_of_all_that_they_may_be() -> None:
    """Two orders and two lengths of filler in each of three rounds, four values of two keys in two orders."""
    source = RecallSource(2, 3, 2, 2, 2, 7)
    texts = set(source.sample(8000, 0))
    assert len(texts) == 8 * 4**3 == round(2**source.bits_per_document)
    assert all(math.isfinite(source.nats(text)) for text in texts)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1, 1, 5, 10, 2, 20), 1.0),  # the only value
        ((2, 1, 5, 2, 2, 20), 0.875),  # alike in half of the documents; else a guess, and what is left
        ((2, 3, 5, 2, 2, 20), 0.875),
    ],
)
def test_knowing_the_values_alone(settings: tuple[int, ...], expected: float) -> None:
    assert abs(RecallSource(*settings).values_accuracy - expected) < 0.03


def test_other_text_is_impossible_and_has_no_answers() -> None:
    source = RecallSource(3, 2, 5, 4, 6, 20)
    text = source.sample(1, 0)[0]
    another = next(value for value in source.values.tolist() if value != text[1])
    contradicted = text[:1] + bytes([another]) + text[2:]  # the first pair is asked for with its old value
    for other in (text[1:], b"a" * len(text), b"." * len(text), text + b".", contradicted):
        assert source.nats(other) == math.inf and not source.answers(other).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((8, 8, 7, 10, 64, 253), "Nearest: synthetic_keys=8"),
        ((8, 8, 26, 1, 64, 253), "at least 2"),
        ((8, 8, 80, 20, 64, 253), "there are 93"),
        ((8, 8, 26, 10, 1, 253), "at least 2"),
        ((8, 8, 26, 10, 64, 91), "Nearest: synthetic_max_distance=92"),
    ],
)
def test_contradictions_are_refused_with_the_nearest(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        RecallSource(*settings)
    assert RecallSource(8, 1, 26, 10, 64, 92).document_bytes == 94


def test_a_document_that_no_row_holds_is_refused(config) -> None:
    with pytest.raises(DataError, match=r"documents of 22 bytes .* Set train_seq_len=23, or fewer rounds"):
        synthetic.load(config(**SETTINGS, train_seq_len=22))
    synthetic.load(config(**SETTINGS, train_seq_len=23))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe-264"])
def test_rows_mark_the_answers_whatever_the_tokens(config, tmp_path, tokenizer: str) -> None:
    cfg = config(**SETTINGS, tokenizer=tokenizer, synthetic_values=10, train_seq_len=23)
    dataset = load_dataset(cfg, cache_dir=tmp_path)
    again = load_dataset(cfg, cache_dir=tmp_path)  # from the cache
    assert dataset.fingerprint == again.fingerprint and list(again.heldout.marks) == ["recall"]
    rows = HeldoutRows(again.heldout, again.tokenizer.eot, 23)
    batch = rows.batch(np.array([0, 1, 2, -1]))
    marked = batch.marked["recall"]
    assert marked.shape == batch.weights.shape and not marked[3].any()
    for row in range(3):
        text = again.heldout.text(int(rows.documents[rows.document_of[row]]))
        expected = [text[asked] for _, asked in answers(text)]
        found = again.tokenizer.decode(batch.tokens[row, 1:][marked[row]])
        # Digits stand apart from other symbols in BPE, so every answer is a token of its own.
        assert list(found) == expected


def test_windows_mark_their_own_targets(config, tmp_path) -> None:
    """A document longer than the window of a score: its answers are marked once, in whichever window they stand."""
    store = load_dataset(config(**SETTINGS, synthetic_rounds=1), cache_dir=tmp_path).heldout
    for seq_len in (32, 7):
        rows = HeldoutRows(store, 256, seq_len)
        batch = rows.batch(np.arange(rows.n_rows))
        assert batch.marked["recall"].sum() == 3 * store.n_docs
        assert batch.weights[batch.marked["recall"]].all()


def test_other_text_marks_nothing(config, tmp_path) -> None:
    dataset = load_dataset(config(data="synthetic"), cache_dir=tmp_path)
    assert HeldoutRows(dataset.heldout, 256, 32).batch(np.array([0])).marked == {}


# Two mixers, or two layers of attention to 4 tokens, which see 2 (w - 1) = 6 bytes back; no value is as near.
MAMBA = ("model=mamba",)
WINDOWED = ("model=vanilla", "model_cfg.n_heads=2", "model_cfg.sliding_window=4")
# No first block is always selected: pairs are told there. The own one begins 3 tokens back at most, as the window does.
SPARSE = (
    "model=nsa",
    "model_cfg.n_heads=2",
    "model_cfg.n_kv_heads=1",
    "model_cfg.sliding_window=4",
    "model_cfg.compress_block_size=4",
    "model_cfg.compress_stride=2",
    "model_cfg.selection_block_size=4",
    "model_cfg.num_selected_blocks=4",
    "model_cfg.num_init_blocks=0",
    "model_cfg.num_local_blocks=1",
)
# The same with the gates of summaries at 0, and no block selected but the own one.
WINDOW_ALONE = (*SPARSE, "model_cfg.num_selected_blocks=1", "model_cfg.gate_bias_init=[-40,0,0]")
RECALLS, CHANCE = (0.95, 1.0), (0.0, 0.2)  # 1 in 8; about 0.78 with the values alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "steps", "expected"),
    [(MAMBA, 500, RECALLS), (SPARSE, 200, RECALLS), (WINDOW_ALONE, 200, CHANCE), (WINDOWED, 500, CHANCE)],
    ids=["mamba", "nsa", "nsa of its window alone", "windowed vanilla"],
)
def test_recall_of_what_a_window_does_not_reach(
    command, tmp_path: Path, model: tuple[str, ...], steps: int, expected: tuple[float, float]
) -> None:
    load = ("pairs=2", "rounds=6", "keys=8", "values=8", "min_distance=8", "max_distance=12", "bytes=1000000")
    size = ("preset=nano", "model_cfg.n_layers=2", "model_cfg.d_model=64", "train_seq_len=65", "device=cpu")
    length = (f"num_iterations={steps}", "cooldown_frac=0.2", "val_loss_every=0", "val_bytes=20000")
    unwritten = ("sample_tokens=0", "save_checkpoint=false")
    text = ("data=synthetic", "synthetic=recall", *(f"synthetic_{field}" for field in load))
    command(*model, *size, *length, *unwritten, *text, f"output_dir={tmp_path}")
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    least, most = expected
    assert least <= json.loads(last)["val_recall_accuracy"] <= most
