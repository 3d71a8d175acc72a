"""`data=bin`: which documents token shards hold, whoever wrote them, and what bad ones say."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import normalizers

from data import load_corpus, load_dataset, source_of
from data.corpus import Document
from data.cuts import SECTION_BYTES, sections
from data.errors import DataError
from data.huggingface.tokenizer import HuggingFaceTokenizer
from data.named import KINDS
from data.rows import HeldoutRows, TrainingRows
from data.shards import ShardFiles, ShardTokens, document_starts, open_shard
from data.store import TokenStore, load_stores
from data.tokenizers import ByteTokenizer
from data.yardsticks import compute
from tests.data import ranks
from tests.data.conftest import prose
from tests.data.foreign import byte_level
from tests.data.shard_files import headerless, llm_c, megatron, megatron_index
from tests.data.strange import pickled

TEXTS = [prose(f"shard {number}", 5 + 9 * (number % 13)) for number in range(150)]


@pytest.fixture
def ids(bpe) -> list[np.ndarray]:
    return [bpe.encode(text) for text in TEXTS]


@pytest.fixture
def fields(bpe, tmp_path) -> dict[str, str]:
    """Of runs on shards of `bpe`."""
    bpe.save(tmp_path / "bpe.json")
    return {"data": "bin", "data_root": str(tmp_path), "tokenizer": str(tmp_path / "bpe.json")}


@pytest.fixture
def load(config, fields, tmp_path):
    """The data set of shards, below the test's folder."""

    def load(cache="cache", **changes):
        return load_dataset(config(**{**fields, **changes}), cache_dir=tmp_path / cache)

    return load


def before(documents: Sequence[np.ndarray], eot: int) -> np.ndarray:
    """With a separator in front of each."""
    return np.concatenate([np.concatenate([[eot], document]) for document in documents])


def behind(documents: Sequence[np.ndarray], eot: int) -> np.ndarray:
    return np.concatenate([np.concatenate([document, [eot]]) for document in documents])


def old(path: Path) -> Path:
    """Changed long enough ago to be trusted."""
    os.utime(path, (1e9, 1e9))
    return path


def texts(store: TokenStore) -> list[bytes]:
    return [store.text(index) for index in range(store.n_docs)]


def both(dataset) -> list[list[bytes]]:
    return [texts(store) for store in (dataset.train, dataset.heldout)]


def test_a_pickle_beside_shards_is_not_read(load, bpe, ids, tmp_path) -> None:
    """meta.pkl, in which nanoGPT keeps its characters."""
    headerless(tmp_path / "train.bin", behind(ids, bpe.eot))
    alone = load(train_files="train.bin", shards_tokenizer=str(tmp_path / "bpe.json"))
    mark = pickled(tmp_path / "meta.pkl")
    beside = load("another", train_files="train.bin", shards_tokenizer=str(tmp_path / "bpe.json"))
    assert not mark.exists() and both(beside) == both(alone)
    pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert mark.exists(), "loading it would have"


# -- documents -----------------------------------------------------------------------------------------------------


def test_whoever_wrote_the_shards_the_documents_are_those_of_the_text(
    load, config, bpe, ids, tmp_path
) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text.decode()}) + "\n" for text in TEXTS)
    )
    root = {"data_root": str(tmp_path), "tokenizer": str(tmp_path / "bpe.json")}
    text = load_dataset(config(data="jsonl", train_files="text.jsonl", **root), cache_dir=tmp_path / "cache")
    front, back = before(ids, bpe.eot), behind(ids, bpe.eot)
    llm_c(tmp_path / "front.bin", front)
    llm_c(tmp_path / "back.bin", back)
    llm_c(tmp_path / "wide.bin", front, 20240801)
    headerless(tmp_path / "bare.bin", back)
    megatron(tmp_path / "m/megatron.bin", ids)
    megatron(tmp_path / "m/ended.bin", [np.append(document, bpe.eot) for document in ids], "<i4", sequences=3)
    for number, start in enumerate(range(0, len(front), 1000), start=8):
        llm_c(tmp_path / f"cut/x_{number:06}.bin", front[start : start + 1000])
    for name in (
        *("front.bin", "back.bin", "wide.bin", "bare.bin", "m/megatron.bin", "m/ended.bin"),
        "cut/x_*.bin",
    ):
        shards = load(train_files=name, shards_tokenizer=str(tmp_path / "bpe.json"))
        assert both(shards) == both(text), name
        assert shards.fingerprint == text.fingerprint and shards.content == text.content
        for ours, theirs in ((shards.train, text.train), (shards.heldout, text.heldout)):
            assert isinstance(ours.tokens, ShardTokens) and ours.tokens.dtype == theirs.tokens.dtype
            assert np.array_equal(ours.tokens[:], theirs.tokens) and np.array_equal(
                ours.offsets, theirs.offsets
            )
            assert np.array_equal(ours.doc_bytes, theirs.doc_bytes)
    assert text.train.n_docs + text.heldout.n_docs == len(TEXTS) and text.heldout.n_docs > 2


def test_rows_are_those_of_the_text(load, config, bpe, ids, tmp_path) -> None:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text.decode()}) + "\n" for text in TEXTS)
    )
    root = {"data_root": str(tmp_path), "tokenizer": str(tmp_path / "bpe.json")}
    text = load_dataset(config(data="jsonl", train_files="text.jsonl", **root), cache_dir=tmp_path / "cache")
    stream = before(ids, bpe.eot)
    for number, start in enumerate(range(0, len(stream), 700)):
        headerless(tmp_path / f"x{number:03}.bin", stream[start : start + 700])
    shards = load(train_files="x*.bin")
    ours, theirs = (TrainingRows(d.train, bpe.eot, 32, lookahead=3, seed=5) for d in (shards, text))
    chosen = np.arange(theirs.rows_per_epoch - 9, theirs.rows_per_epoch + 40)  # into the second epoch
    for one, other in ((ours.batch(chosen), theirs.batch(chosen)),):
        assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.doc_ids, other.doc_ids)
        assert one.bytes == other.bytes
    held = [HeldoutRows(d.heldout, bpe.eot, 32) for d in (shards, text)]
    one, other = (rows.batch(np.arange(rows.n_rows)) for rows in held)
    assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.sizes, other.sizes)
    assert compute(shards.train, shards.heldout) == compute(text.train, text.heldout)


def test_a_shard_goes_on_with_the_one_before_it(load, bpe, ids, tmp_path) -> None:
    a, b, c, d = ids[:4]
    headerless(
        tmp_path / "t/x_1.bin", np.concatenate([a, [bpe.eot], b[:5]])
    )  # the first begins with a document
    headerless(tmp_path / "t/x_2.bin", b[5:9])
    headerless(tmp_path / "t/x_3.bin", np.concatenate([b[9:], [bpe.eot], c]))
    headerless(tmp_path / "v.bin", np.concatenate([d, [bpe.eot], ids[4]]))
    headerless(tmp_path / "w.bin", np.concatenate([ids[5], [bpe.eot]]))
    found = load(train_files="t/*.bin", val_files=["v.bin", "w.bin"])
    assert both(found) == [TEXTS[:3], TEXTS[3:6]]
    headerless(tmp_path / "t/x_3.bin", np.concatenate([[bpe.eot], c, [bpe.eot, bpe.eot]]))
    assert texts(load(train_files="t/*.bin", val_files="v.bin").train)[1:] == [bpe.decode(b[:9]), TEXTS[2]]


@pytest.mark.parametrize("named", ["t/x_*.bin", "t"])
def test_shards_are_in_the_order_of_their_numbers(load, bpe, ids, tmp_path, named) -> None:
    """A document goes over from the ninth to the tenth."""
    stream = before(ids[:40], bpe.eot)
    cuts = np.linspace(0, len(stream), 5, dtype=int)
    for number, (start, stop) in enumerate(itertools.pairwise(cuts), start=8):
        headerless(tmp_path / f"t/x_{number}.bin", stream[start:stop])
    headerless(tmp_path / "v.bin", behind(ids[40:42], bpe.eot))
    found = load(
        **{"input_file" if named == "t" else "train_files": named}, val_files=str(tmp_path / "v.bin")
    )
    assert both(found) == [TEXTS[:40], TEXTS[40:42]]


def test_numbers_order_shards_and_no_other_files() -> None:
    names = ["b/x_2.bin", "b/x_10.bin", "b/x_010.bin", "a10/x.bin", "a9/x.bin", "x.bin", "x².bin", "7.bin"]
    assert [str(path) for path in KINDS["bin"].in_order(map(Path, names))] == [
        *("7.bin", "a9/x.bin", "a10/x.bin", "b/x_2.bin", "b/x_010.bin", "b/x_10.bin", "x.bin", "x².bin")
    ]
    assert [str(path) for path in KINDS["jsonl"].in_order(map(Path, names))] == sorted(names)


def test_a_shard_that_is_not_the_next_begins_its_own_document(load, bpe, ids, tmp_path) -> None:
    a, b = ids[:2]
    headerless(tmp_path / "t/x_1.bin", np.concatenate([[bpe.eot], a]))
    headerless(tmp_path / "t/x_3.bin", np.concatenate([b, [bpe.eot]]))
    headerless(tmp_path / "v.bin", ids[2])
    assert texts(load(train_files="t/*.bin", val_files="v.bin").train) == TEXTS[:2]
    os.rename(tmp_path / "t/x_3.bin", tmp_path / "t/x_2.bin")
    assert texts(load(train_files="t/*.bin", val_files="v.bin").train) == [TEXTS[0] + TEXTS[1]]


def test_a_document_longer_than_a_block_is_one(load, bpe, ids, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data.shards.BLOCK", 7)
    headerless(tmp_path / "t.bin", before(ids[:20], bpe.eot))
    headerless(tmp_path / "v.bin", behind(ids[20:22], bpe.eot))
    assert both(load(train_files="t.bin", val_files="v.bin")) == [TEXTS[:20], TEXTS[20:22]]


@pytest.mark.parametrize("lines", [True, False])
def test_shards_without_separators_are_read_in_sections(load, bpe, tmp_path, lines) -> None:
    text = prose("long", 60_000).replace(b"\n", b"\n" if lines else b"\xc3\xa9")
    headerless(tmp_path / "t.bin", bpe.encode(text))
    headerless(tmp_path / "v.bin", bpe.encode(TEXTS[0]))
    found = texts(load(train_files="t.bin", val_files="v.bin").train)
    assert b"".join(found) == text and len(found) > 5
    assert all(len(section) <= SECTION_BYTES for section in found)
    expected = [d.text for d in sections("t", text, 0, len(text))]
    if lines:  # tokens end where lines do, and seldom where 64 KiB do
        assert found == expected
    else:
        assert len(found) == len(expected)
        assert all(section.decode() for section in found)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_megatron_s_lengths_are_added_up_in_64_bits(tmp_path) -> None:
    path = tmp_path / "big.bin"
    lengths = [1 << 29, 1 << 29, 5]
    with open(path, "wb") as file:
        file.truncate(4 * sum(lengths))
        file.seek(4 * (1 << 30))
        file.write(np.arange(1, 6, dtype="<i4").tobytes())
    megatron_index(path, lengths, range(4), "<i4")
    starts = document_starts(path)
    assert (4 * starts).tolist() == [0, 2147483648, 4294967296]
    files = ShardFiles([open_shard(path, np.dtype(np.uint16))], np.uint16)
    assert files.read(int(starts[2]), len(files)).tolist() == [1, 2, 3, 4, 5]


def test_documents_of_megatron_begin_beyond_what_32_bits_count(tmp_path) -> None:
    """Their starts in ids, as their bytes above, of which half as many ids are enough."""
    megatron_index(tmp_path / "big.bin", [1 << 30] * 3, range(4), "<u2")
    assert document_starts(tmp_path / "big.bin").tolist() == [0, 1 << 30, 1 << 31]


def test_rows_end_inside_documents_without_a_separator(load, bpe, tmp_path) -> None:
    """A document of three and a half rows has one start token; what comes next sees its own start alone."""
    first, second = (bpe.encode(prose(name, 900))[:112] for name in ("one", "two"))
    headerless(tmp_path / "t.bin", before([first, second], bpe.eot))
    headerless(tmp_path / "v.bin", before([bpe.encode(TEXTS[0])], bpe.eot))
    rows = TrainingRows(load(train_files="t.bin", val_files="v.bin").train, bpe.eot, 32)
    batch = rows.batch(np.arange(rows.rows_per_epoch))
    assert rows.rows_per_epoch == 7 and len(first) == 3.5 * 32
    inputs, targets = batch.tokens[:, :32], batch.tokens[:, 1:33]
    text = targets != bpe.eot
    assert (~text).sum() == 1, "one between two documents: the first is context alone"
    assert (batch.doc_ids[:, :32] == batch.doc_ids[:, 1:33])[text].all()
    begins = inputs == bpe.eot
    assert begins.sum() == 2 and sorted(targets[begins]) == sorted([first[0], second[0]])
    alone = batch.doc_ids[:, :32][begins]
    seen = [
        (batch.doc_ids[row, : column + 1] == document).sum()
        for (row, column), document in zip(np.argwhere(begins), alone, strict=True)
    ]
    assert seen == [1, 1], "of its own document nothing but the start"


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_other_tokenizers_read_the_same_documents(load, bpe, ids, tmp_path) -> None:
    headerless(tmp_path / "t.bin", before(ids, bpe.eot))
    own = load(train_files="t.bin")
    for tokenizer in ("byte", "bpe-270"):
        other = load(train_files="t.bin", tokenizer=tokenizer, shards_tokenizer=str(tmp_path / "bpe.json"))
        assert both(other) == both(own) and other.fingerprint == own.fingerprint
        assert other.train.tokens.nbytes and other.train.tokenizer.name == tokenizer  # ids of its own
        assert np.array_equal(
            other.train.tokens[: other.train.offsets[1]], other.train.tokenizer.encode(texts(own.train)[0])
        )


def test_auto_is_the_tokenizer_of_the_shards(load, config, bpe, ids, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks.seed(tmp_path / "ranks")))
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "own"))
    gpt2 = load(train_files=_gpt2_shard(tmp_path, load), tokenizer="auto")
    assert gpt2.tokenizer.name == "gpt2" and both(gpt2)[0][0] == TEXTS[0]
    assert "tokenizer auto: gpt2, as the shards have it" in gpt2.notes
    llm_c(tmp_path / "own.bin", before(ids, bpe.eot))
    own = load(train_files="own.bin", tokenizer="auto", shards_tokenizer=str(tmp_path / "bpe.json"))
    assert own.tokenizer.digest == bpe.digest and isinstance(own.train.tokens, ShardTokens)
    bytes_ = load_dataset(
        config(data="bin", train_files=str(tmp_path / "gpt2.bin"), tokenizer="auto"),
        unit="byte",
        cache_dir=tmp_path / "cache",
    )
    assert bytes_.tokenizer.name == "byte" and both(bytes_) == both(gpt2)


def _gpt2_shard(tmp_path, load) -> str:
    from data.tokenizer_choice import tokenizer_of

    gpt2 = tokenizer_of("gpt2", tmp_path / "cache")
    llm_c(tmp_path / "gpt2.bin", before([gpt2.encode(text) for text in TEXTS], 50256))
    return "gpt2.bin"


def test_without_the_ranks_of_gpt2_both_ways_out_are_named(load, tmp_path, monkeypatch) -> None:
    for name in ("TIKTOKEN_CACHE_DIR", "MYTRAINER_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setattr("data.published.tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("data.published._download", _no_network)
    llm_c(tmp_path / "t.bin", [50256, 1, 2, 3, 50256, 4, 5])
    with pytest.raises(
        DataError, match=r"shards_tokenizer=gpt2.*set shards_tokenizer=<that file>.*TIKTOKEN_CACHE_DIR"
    ):
        load(train_files="t.bin", tokenizer="auto")


def _no_network(url: str) -> bytes:
    raise OSError("no network")


@pytest.mark.parametrize("tokenizer", ["auto", "byte", "bpe-300"])
def test_shards_that_do_not_say_their_tokenizer_must_be_told(load, ids, tmp_path, tokenizer) -> None:
    headerless(tmp_path / "t.bin", ids[0])
    with pytest.raises(DataError, match=r"nothing in the shards \(no header\) says .*shards_tokenizer=<gpt2"):
        load(train_files="t.bin", tokenizer=tokenizer)


def test_a_tokenizer_that_is_trained_is_no_answer(load, ids, tmp_path) -> None:
    headerless(tmp_path / "t.bin", ids[0])
    with pytest.raises(DataError, match="shards_tokenizer: 'bpe-300' is trained on a text. Name the file"):
        load(train_files="t.bin", shards_tokenizer="bpe-300")


def test_a_tokenizer_that_changes_text_is_refused(load, ids, tmp_path) -> None:
    foreign = byte_level()
    for normalizer, refused in ((normalizers.NFC(), True), (normalizers.Replace("NFC", "NFC"), False)):
        foreign.normalizer = normalizers.Sequence([normalizer])
        tokenizer = HuggingFaceTokenizer(json.loads(foreign.to_str()), 0, [0], {})
        tokenizer.save(tmp_path / "foreign.json")
        headerless(tmp_path / "t.bin", before([tokenizer.encode(text) for text in TEXTS], 0))
        if refused:
            with pytest.raises(DataError, match=r"changes text before it becomes ids \(NFC\).*data=jsonl"):
                load(train_files="t.bin", tokenizer=str(tmp_path / "foreign.json"))
        else:
            assert load(train_files="t.bin", tokenizer=str(tmp_path / "foreign.json")).train.n_docs


# -- the split -----------------------------------------------------------------------------------------------------


def test_training_text_that_is_held_out_is_left_out_by_place(load, bpe, ids, tmp_path) -> None:
    headerless(tmp_path / "t.bin", before(ids[:30], bpe.eot))
    headerless(tmp_path / "v.bin", before([ids[2], ids[40]], bpe.eot))
    found = load(train_files="t.bin", val_files="v.bin")
    assert both(found) == [[text for text in TEXTS[:30] if text != TEXTS[2]], [TEXTS[2], TEXTS[40]]]
    place = 1 + sum(len(document) + 1 for document in ids[:2]) + 1
    assert f"left out of training, as the same text is held out: t.bin:{place}" in found.notes


def test_files_called_as_held_out_text_must_be_named(load, bpe, ids, tmp_path) -> None:
    for name in ("train", "val"):
        headerless(tmp_path / f"x/{name}.bin", before(ids[:30], bpe.eot))
    with pytest.raises(DataError, match=r"val.bin: called as held-out text usually is.*val_files=val.bin"):
        load(input_file="x")


def test_near_copies_are_dropped(load, bpe, ids, tmp_path) -> None:
    near = bpe.encode(TEXTS[9] + b" and one more")
    headerless(tmp_path / "t.bin", before(ids[:30], bpe.eot))
    headerless(tmp_path / "v.bin", before([near, ids[40]], bpe.eot))
    found = load(train_files="t.bin", val_files="v.bin", near_copies="drop")
    assert texts(found.heldout) == [TEXTS[40]] and found.overlap is not None and found.overlap.dropped == 1
    assert (
        isinstance(found.heldout.tokens, ShardTokens) and found.heldout.tokens[:].tolist() == ids[40].tolist()
    )


# -- the cache and changes -----------------------------------------------------------------------------------------


def test_bytes_are_counted_once_and_ids_never_copied(load, bpe, ids, tmp_path, monkeypatch) -> None:
    old(headerless(tmp_path / "t.bin", before(ids * 20, bpe.eot)))
    first = load(train_files="t.bin")
    assert "tokens are read from their shards" in first.notes
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert not [path for path in kept if path.suffix == ".text" or path.name.endswith("tokens.npy")]
    monkeypatch.setattr("data.bin.ShardPart.rows", None)
    again = load(train_files="t.bin")
    assert both(again) == both(first)
    stores = load_stores(first.cache_path, ["train", "heldout"], bpe)
    assert [texts(stores[side]) for side in ("train", "heldout")] == both(first)


def test_the_same_documents_of_other_files_are_of_these_files(load, bpe, ids, tmp_path) -> None:
    for name in ("a", "b"):
        old(headerless(tmp_path / f"{name}/t.bin", before(ids, bpe.eot)))
    first = load(train_files="a/t.bin")
    shutil.rmtree(tmp_path / "a")
    second = load(train_files="b/t.bin")
    assert both(second)[0] and second.fingerprint == first.fingerprint


@pytest.mark.parametrize("how", ["cut off", "touched", "gone"])
def test_a_shard_that_changes_under_a_run_is_named(load, bpe, ids, tmp_path, how) -> None:
    path = old(headerless(tmp_path / "t.bin", before(ids, bpe.eot)))
    found = load(train_files="t.bin")
    rows = TrainingRows(found.train, bpe.eot, 32)
    rows.batch(np.arange(1))
    if how == "gone":
        path.unlink()
        assert rows.batch(np.arange(rows.rows_per_epoch)).bytes  # a file that is open stays whole
        return
    if how == "cut off":
        os.truncate(path, 600)
    else:
        os.utime(path, (2e9, 2e9))
    with pytest.raises(DataError, match=r"t.bin' has changed since it was first read"):
        rows.batch(np.arange(rows.rows_per_epoch))


def test_more_shards_than_may_be_open_are_read(load, bpe, ids, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data.shards.OPEN", 2)
    for number in range(30):
        headerless(tmp_path / f"x{number:02}.bin", before([ids[number]], bpe.eot))
    found = load(train_files="x*.bin", val_files=[])
    assert sorted([*both(found)[0], *both(found)[1]]) == sorted(TEXTS[:30])
    assert len(found.train.tokens.files._files) <= 2


def test_ids_by_place_are_those_of_an_array(load, bpe, ids, tmp_path) -> None:
    for number in range(5):
        headerless(tmp_path / f"x{number}.bin", before(ids[number::5], bpe.eot))
    tokens = load(train_files="x*.bin").train.tokens
    array = np.array(tokens)
    assert len(array) == len(tokens) and array.dtype == tokens.dtype
    places = np.random.default_rng(1).integers(0, len(array), (7, 50))
    assert np.array_equal(tokens[places], array[places])
    for cut in (slice(None), slice(3, 3), slice(5, 1000), slice(len(array) - 9, None), slice(0, 1)):
        assert np.array_equal(tokens[cut], array[cut])
    assert tokens[np.zeros(0, dtype=int)].shape == (0,)
    for wrong in (-1, len(array)):
        with pytest.raises(IndexError):
            tokens[np.array([wrong])]


# -- bad shards ----------------------------------------------------------------------------------------------------


def _cut_off(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: _cut_off(llm_c(path, range(90)), 20), "says 90 tokens, and 80 are there: it is cut off"),
        (lambda path: _cut_off(llm_c(path, range(90)), 1), "says 90 tokens, and 89 are there: it is cut off"),
        (lambda path: llm_c(path, range(90), tokens=70), "says 70 tokens, and 90 are there: it was appended to"),
        (lambda path: _cut_off(llm_c(path, []), 24), "is cut off inside its header"),
        (lambda path: llm_c(path, []), "holds no tokens"),
        (lambda path: path.write_bytes(b""), "holds no tokens"),
        (lambda path: llm_c(path, range(9), version=3), "header 20240520 of version 3, and the known one is 1"),
        (lambda path: llm_c(path, range(9), 20240801, version=1), "20240801 of version 1, and the known one is 7"),
        (lambda path: path.write_bytes(np.array([20240522, 1], "<i4").tobytes()), "20240522, which is no header of"),
        (lambda path: path.write_bytes(b"abc"), "its 3 bytes are no whole number of uint16 ids"),
        (lambda path: headerless(path, [1, 2, 299, 70, 300]), "token 5 is 300, and ids of bpe-300 are 0 to 299"),
        (lambda path: _cut_off(megatron(path, [np.arange(50)]), 10), "has 90 bytes, and .*x.idx beside it says 100"),
        (lambda path: _cut_off(megatron(path, [np.arange(50)]).with_suffix(".idx"), 3), " is damaged or cut off"),
        (lambda path: megatron(path, [np.arange(9)]).with_suffix(".idx").write_bytes(b"x"), "is no index of Megatron"),
    ],
)  # fmt: skip
def test_a_bad_shard_is_named(load, bpe, tmp_path, make, said) -> None:
    make(tmp_path / "x.bin")
    with pytest.raises(DataError, match=rf"x\.\w+'.*{said}") as caught:
        load(train_files="x.bin", shards_tokenizer=str(tmp_path / "bpe.json"))
    assert str(tmp_path) in str(caught.value)


def test_shards_of_two_kinds_are_refused(load, ids, tmp_path) -> None:
    llm_c(tmp_path / "x/a.bin", ids[0])
    headerless(tmp_path / "x/b.bin", ids[1])
    with pytest.raises(
        DataError,
        match=r"a.bin' is 20240520, uint16, and .*b.bin' is no header, uint16. Name those of one kind",
    ):
        load(train_files="x/*.bin")


def test_negative_ids_are_beyond_the_vocabulary(load, tmp_path) -> None:
    megatron(tmp_path / "x.bin", [np.array([5, -1, 7])], "<i4")
    with pytest.raises(DataError, match=r"x.bin', token 2 is -1, and ids of bpe-300 are 0 to 299"):
        load(train_files="x.bin")


def test_uint32_ids_that_wrap_are_beyond_the_vocabulary(load, tmp_path) -> None:
    llm_c(tmp_path / "x.bin", [5, 65536 + 7], 20240801)
    with pytest.raises(DataError, match=r"token 2 is 65,543, and ids"):
        load(train_files="x.bin")


def test_a_relative_file_of_a_tokenizer_is_found_from_any_folder(
    config, fields, ids, tmp_path, monkeypatch
) -> None:
    from data.bin import absolute

    headerless(tmp_path / "t.bin", ids[0])
    monkeypatch.chdir(tmp_path)
    cfg = config(**{**fields, "train_files": "t.bin", "shards_tokenizer": "bpe.json"})
    both = {"train_files": [str(tmp_path / "t.bin")], "shards_tokenizer": str(tmp_path / "bpe.json")}
    assert absolute(cfg) == both
    cfg.shards_tokenizer = "gpt2"
    assert absolute(cfg) == {"train_files": both["train_files"]}


def test_a_name_alone_means_the_source() -> None:
    assert source_of("train_files", "x/*.bin") == source_of("input_file", "a.bin") == "bin"


def test_a_corpus_of_shards_scores_whole(config, fields, bpe, ids, tmp_path, monkeypatch) -> None:
    from data.scored import text_to_score

    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    headerless(tmp_path / "t.bin", before(ids, bpe.eot))
    headerless(tmp_path / "other.bin", before(ids[:3], bpe.eot))
    run = config(**{**fields, "train_files": "t.bin"})
    given = config(**{**fields, "train_files": None, "input_file": "other.bin"})
    for tokenizer in (bpe, ByteTokenizer()):
        found = text_to_score(run, given, tokenizer, None)
        assert found.whole and texts(found.store) == TEXTS[:3]


def test_documents_are_read_when_they_are_asked_for(config, fields, bpe, ids, tmp_path) -> None:
    headerless(tmp_path / "t.bin", before(ids, bpe.eot))
    corpus, _ = load_corpus(config(**{**fields, "train_files": "t.bin"}), tmp_path / "cache")
    listed = list(corpus.train)
    assert listed[3] == corpus.train[3] == corpus.train.select(np.array([3]))[0]
    assert isinstance(listed[0], Document) and listed[0].name == "t.bin:2"
    assert corpus.train.sizes.tolist() == [len(document.text) for document in listed]


# -- the public ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "start"), [("fineweb10B", "fineweb"), ("finewebedu10B", "finewebedu")])
def test_public_shards_are_found_by_name(config, bpe, ids, tmp_path, monkeypatch, data, start) -> None:
    from data.bin import absolute_public

    bpe.save(tmp_path / "bpe.json")
    monkeypatch.chdir(tmp_path)
    stream = before(ids, bpe.eot)
    folder = tmp_path / "data" / data
    llm_c(folder / f"{start}_train_000001.bin", stream[:400])
    llm_c(folder / f"{start}_train_000002.bin", stream[400:])
    fields = {"data": data, "tokenizer": "auto", "shards_tokenizer": "bpe.json"}
    with pytest.raises(
        DataError, match=rf"no {start}_val_\*.bin in .*hf download kjj0/{data}-gpt2.*data=bin"
    ):
        load_dataset(config(**fields), cache_dir=tmp_path / "cache")
    llm_c(folder / f"{start}_val_000000.bin", before([bpe.encode(b"held out")], bpe.eot))
    for root in (None, "data", str(folder)):
        cfg = config(**fields, data_root=root)
        assert absolute_public(cfg) == {
            "data_root": str(folder),
            "shards_tokenizer": str(tmp_path / "bpe.json"),
        }
        assert both(load_dataset(cfg, cache_dir=tmp_path / "cache")) == [TEXTS, [b"held out"]]
    with pytest.raises(DataError, match=rf"no {start}_train_\*.bin and {start}_val_\*.bin in '.*cache'"):
        load_dataset(config(**fields, data_root="cache"), cache_dir=tmp_path / "cache")
