"""Yardsticks against slow restatements; the child process ends with its parent and leaves a cached result."""

from __future__ import annotations

import bz2
import json
import lzma
import math
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Dataset, load_dataset, yardsticks
from data.ngrams import Texts, witten_bell
from data.rows import select_heldout
from data.store import save_stores

PROJECT = Path(yardsticks.__file__).resolve().parent.parent
small_texts = st.lists(st.text("abc", max_size=25).map(str.encode), max_size=6)


def plain_witten_bell(train: list[bytes], heldout: list[bytes], order: int) -> list[float]:
    """The recursion as the formula says it, with dictionaries."""
    seen: dict[bytes, Counter[int]] = defaultdict(Counter)
    for text in train:
        for place, byte in enumerate(text):
            for n in range(min(order, place + 1)):
                seen[text[place - n : place]][byte] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        counts = seen.get(context)
        return (counts[byte] + len(counts) * lower) / (counts.total() + len(counts)) if counts else lower

    return [
        probability(text[max(0, place - order + 1) : place], byte)
        for text in heldout
        for place, byte in enumerate(text)
    ]


@given(train=small_texts, heldout=small_texts)
@settings(deadline=None)
def test_witten_bell_restated(train: list[bytes], heldout: list[bytes]) -> None:
    orders = (1, 2, 3, 6, 8)
    found = witten_bell(Texts(train), Texts(heldout), orders)
    for order in orders:
        assert np.allclose(found[order], plain_witten_bell(train, heldout, order), rtol=1e-12)


def test_text_in_blocks_scores_as_text_in_one(config, tmp_path, monkeypatch) -> None:
    dataset = load_dataset(config(data="synthetic", tokenizer="byte"), cache_dir=tmp_path)
    for max_bytes in (None, 1500):
        whole = yardsticks.compute(dataset.train, dataset.heldout, max_bytes)
        with monkeypatch.context() as patch:
            patch.setattr(yardsticks, "BLOCK", 700)
            patch.setattr("data.store.BLOCK", 999)
            blocks = yardsticks.compute(dataset.train, dataset.heldout, max_bytes)
        assert blocks.keys() == whole.keys()
        for name, bits in whole.items():
            assert math.isclose(blocks[name], bits, rel_tol=1e-12), name
            assert name in ("3-gram", "6-gram") or blocks[name] == bits


def test_compressors_see_one_text_however_it_comes(documents) -> None:
    pieces = [document.text for document in documents]
    whole = b"".join(pieces)
    found = {name: measure(iter(pieces), len(whole)) for name, measure in yardsticks.compressors().items()}
    extreme = 9 | lzma.PRESET_EXTREME
    assert found == {"xz": len(lzma.compress(whole, preset=extreme)), "bz2": len(bz2.compress(whole, 9))}


def test_xz_sees_a_long_text_in_bounded_memory(monkeypatch) -> None:
    far = np.random.default_rng(0).bytes(20_000)
    xz = yardsticks.compressors()["xz"]
    assert xz([far, far], 40_000) < 21_000
    monkeypatch.setattr(yardsticks, "XZ_REACH", 16_384)
    assert xz([far, far], 40_000) > 39_000


def test_xz_takes_no_more_memory_than_its_text_needs() -> None:
    """Sizes below the reach are told to the compressor, which sets aside 65 MB otherwise: the result is the same."""
    for size in (1, 5000, 70_000):
        text = np.random.default_rng(0).choice(np.frombuffer(b"abcdef ", dtype=np.uint8), size).tobytes()
        assert yardsticks.compressors()["xz"]([text], size) == len(
            lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
        )


def test_n_grams_are_counted_a_part_at_a_time() -> None:
    """Whole tables of a text take 60 bytes for each of its own."""
    raw = np.random.default_rng(0).integers(97, 123, 300_000, dtype=np.uint8).tobytes()
    train, heldout = Texts([raw]), Texts([raw[:1000]])
    tracemalloc.start()
    try:
        witten_bell(train, heldout, (3, 6))
        assert tracemalloc.get_traced_memory()[1] < 25 * len(raw)
    finally:
        tracemalloc.stop()


def test_counts_are_those_of_all_tokens(bpe_store, bpe, monkeypatch) -> None:
    monkeypatch.setattr("data.store.BLOCK", 97)
    expected = np.bincount(bpe_store.tokens, minlength=bpe.vocab_size + 5)
    assert np.array_equal(bpe_store.counts(bpe.vocab_size + 5), expected) and expected.sum() == len(
        bpe_store.tokens
    )


def test_a_python_without_a_compressor(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lzma", None)
    assert list(yardsticks.compressors()) == ["bz2"]
    without = {name: 1.0 for name in yardsticks.NAMES if name != "xz"}
    yardsticks._write_result(tmp_path, None, without)
    assert yardsticks._read_result(tmp_path, None) == without
    monkeypatch.undo()
    assert yardsticks._read_result(tmp_path, None) is None, "this Python can say more"


@pytest.mark.parametrize("context", [b"", b"t", b"the c", b"the cat sat on the mat", b"zzzzzzz"])
def test_witten_bell_probabilities_sum_to_one(context: bytes) -> None:
    train = Texts([b"the cat sat on the mat", b"that cat", b"the dog"])
    continuations = Texts([context + bytes([byte]) for byte in range(256)])
    for probability in witten_bell(train, continuations, (3, 6)).values():
        assert math.isclose(probability[len(context) :: len(context) + 1].sum(), 1, rel_tol=1e-12)


@pytest.fixture
def dataset(byte_store, bpe_store, tmp_path) -> Dataset:
    """BPE tokens of the small documents in a cache folder, trained and scored on the same text."""
    stores = {"train": bpe_store, "heldout": bpe_store}
    save_stores(tmp_path / "cache", stores)
    bpe_store.tokenizer.save(tmp_path / "cache" / "tokenizer.json")
    return Dataset(
        bpe_store.tokenizer, bpe_store, bpe_store, "f", "c", "small", cache_path=tmp_path / "cache"
    )


@pytest.mark.parametrize("max_bytes", [None, 3000])
def test_yardsticks_on_the_scored_text(dataset: Dataset, max_bytes: int | None) -> None:
    store = dataset.heldout
    chosen = select_heldout(store, max_bytes)
    documents = [store.text(index) for index in chosen]
    text = b"".join(documents)
    result = yardsticks.yardsticks(dataset, max_bytes)
    assert list(result) == list(yardsticks.NAMES)
    assert result["uniform"] == 8.0
    assert result["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert result["bz2"] == 8 * len(bz2.compress(text)) / len(text)
    every = [store.text(index) for index in range(store.n_docs)]
    for name, order in (("3-gram", 3), ("6-gram", 6)):
        slow = plain_witten_bell(every, documents, order)
        assert math.isclose(result[name], -np.log2(slow).mean(), rel_tol=1e-9)
    counts = Counter(store.tokens.tolist())
    total = len(store.tokens) + store.tokenizer.vocab_size - 1
    tokens = store.tokenizer.encode(b"").tolist()
    for index in chosen:
        tokens += store.tokens[store.offsets[index] : store.offsets[index + 1]].tolist()
    bits = -sum(math.log2((counts[token] + 1) / total) for token in tokens)
    assert math.isclose(result["unigram"], bits / len(text), rel_tol=1e-9)


def test_large_training_text_is_sampled_and_said(dataset: Dataset, monkeypatch) -> None:
    monkeypatch.setattr(yardsticks, "NGRAM_TRAINING_BYTES", 4000)
    result = yardsticks.compute(dataset.train, dataset.heldout)
    assert 0 < result["ngram_training_bytes"] <= 4000


def test_result_is_cached_and_a_broken_cache_is_not_believed(dataset: Dataset, monkeypatch) -> None:
    first = yardsticks.yardsticks(dataset)
    monkeypatch.setattr(yardsticks, "compute", lambda *_: pytest.fail("computed twice"))
    assert yardsticks.yardsticks(dataset) == first
    monkeypatch.undo()
    (cached,) = dataset.cache_path.glob("yardsticks-*.json")
    for broken in (b"", b"{", b"[]", b'{"uniform": 8.0}'):
        cached.write_bytes(broken)
        assert yardsticks.yardsticks(dataset) == first


def test_background_gives_the_same_and_starts_nothing_when_cached(dataset: Dataset) -> None:
    with yardsticks.start_background(dataset, 3000) as background:
        assert background.process is not None
        result = background.result(timeout=60)
    assert result == yardsticks.compute(dataset.train, dataset.heldout, 3000)
    with yardsticks.start_background(dataset, 3000) as background:
        assert background.process is None and background.done()
        assert background.result() == result


@pytest.mark.parametrize("named", [False, True])
def test_background_without_a_cache_cleans_up(dataset: Dataset, tmp_path, named: bool) -> None:
    workspace = tmp_path / "workspace" if named else None
    with yardsticks.start_background(replace(dataset, cache_path=None), workspace=workspace) as background:
        assert background.result(timeout=60)["uniform"] == 8.0
        assert background.folder.exists() and workspace in (None, background.folder)
    assert not background.folder.exists()


def test_background_failure_is_told(dataset: Dataset) -> None:
    (dataset.cache_path / "train.tokens.npy").write_bytes(b"damaged")
    with (
        yardsticks.start_background(dataset) as background,
        pytest.raises(RuntimeError, match="train.tokens.npy"),
    ):
        background.result(timeout=60)


def test_closing_ends_the_child(dataset: Dataset) -> None:
    background = yardsticks.start_background(dataset)
    background.close()
    assert background.process.returncode is not None


@pytest.mark.slow
def test_child_leaves_when_its_parent_is_killed(dataset: Dataset, tmp_path) -> None:
    """A parent that dies without a word (kill -9), holding a child that would otherwise wait for ever."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, threading, time\n"
        "from data import yardsticks\n"
        "yardsticks.compute = lambda *a: (print('computing', flush=True), time.sleep(300))\n"
        f"sys.exit(yardsticks.main([{str(dataset.cache_path)!r}, '--background']))\n"
    )
    parent_code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, {str(slow)!r}], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    parent = subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, env=environment)
    child = int(parent.stdout.readline())
    assert parent.stdout.readline() == b"computing\n"  # the child's, through the inherited pipe
    assert _running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _running(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # an orphan that nobody has reaped yet is dead, too
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_command_prints_json(dataset: Dataset, capsys, tmp_path) -> None:
    assert yardsticks.main([str(dataset.cache_path), "--max-bytes", "3000"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == yardsticks.yardsticks(dataset, 3000)
    assert yardsticks.main([str(tmp_path / "nowhere")]) == 2
    assert "cannot be read" in capsys.readouterr().err
