"""`load_dataset`: choices, the cache and its repair, and what a user's mistake says."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import data
from data import load_dataset
from data.bpe import BpeTokenizer
from data.cache import cache_root, write_atomic
from data.errors import DataError
from data.rows import HeldoutRows
from data.shards import ShardTokens
from data.tokenizers import ByteTokenizer


@pytest.fixture
def book(tmp_path, documents) -> str:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\n".join(document.text for document in documents) * 3)
    return str(path)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_text_comes_back_from_its_tokens(config, book, cache) -> None:
    for tokenizer in ("byte", "bpe-300"):
        dataset = load_dataset(config(input_file=book, tokenizer=tokenizer), cache_dir=cache)
        sides = (dataset.train, dataset.heldout)
        text = b"".join(store.text(index) for store in sides for index in range(store.n_docs))
        assert text == Path(book).read_bytes()
        assert sum(store.total_bytes for store in sides) == len(text)
        assert dataset.tokenizer.name == tokenizer and dataset.name == "book.txt"
        assert dataset.entropy_bits_per_byte is None


def test_another_tokenizer_under_the_same_path_makes_its_own_tokens(
    config, book, cache, bpe, tmp_path
) -> None:
    path = tmp_path / "tokenizer.json"
    cfg, found = config(input_file=book, tokenizer=str(path)), []
    for ranks in (bpe.ranks, [*bpe.ranks[:-2], bpe.ranks[-1], bpe.ranks[-2]]):
        BpeTokenizer(ranks).save(path)
        found.append(load_dataset(cfg, cache_dir=cache))
    first, second = found
    assert first.fingerprint == second.fingerprint and first.cache_path != second.cache_path
    assert not np.array_equal(first.train.tokens, second.train.tokens)


def test_bytes_are_those_of_the_same_documents_as_tokens(config, tmp_path, documents, cache) -> None:
    """In the same order, and what is scored are the same bytes, all or a part of them."""
    path = tmp_path / "many.txt"
    path.write_bytes(b"\n---\n".join(document.text for document in (documents * 4)[::-1]))
    cfg = config(input_file=str(path), tokenizer="bpe-300", document_separator="---")
    tokens = load_dataset(cfg, cache_dir=cache)
    cfg.tokenizer = "auto"
    bytes_ = load_dataset(cfg, unit="byte", cache_dir=cache)
    assert (tokens.tokenizer.vocab_size, bytes_.tokenizer.vocab_size, bytes_.tokenizer.eot) == (300, 257, 256)
    assert bytes_.heldout.n_docs > 2
    assert [n for n in bytes_.notes if n.startswith("tokenizer")] == [
        "tokenizer auto: byte, as this architecture reads bytes"
    ]
    assert bytes_.identity() == tokens.identity()
    for side in ("train", "heldout"):
        mine, theirs = getattr(bytes_, side), getattr(tokens, side)
        assert [mine.text(i) for i in range(mine.n_docs)] == [theirs.text(i) for i in range(theirs.n_docs)]

    def scored(dataset, **limit) -> tuple[list[bytes], int]:
        rows = HeldoutRows(dataset.heldout, dataset.tokenizer.eot, 64, **limit)
        batch = rows.batch(np.arange(rows.n_rows))
        pieces: dict[int, dict[int, bytes]] = {}
        for row, (targets, weights) in enumerate(zip(batch.tokens[:, 1:], batch.weights, strict=True)):
            text = dataset.tokenizer.decode(targets[weights > 0])
            pieces.setdefault(int(rows.document_of[row]), {})[rows.targets_of(row).start] = text
        texts = [b"".join(of[start] for start in sorted(of)) for _, of in sorted(pieces.items())]
        return texts, batch.bytes

    for limit in ({}, {"max_bytes": bytes_.heldout.total_bytes // 2}):
        assert scored(bytes_, **limit) == scored(tokens, **limit)


def test_second_load_maps_the_cache_and_trains_nothing(config, book, cache, monkeypatch) -> None:
    cfg = config(input_file=book, tokenizer="bpe-300")
    first = load_dataset(cfg, cache_dir=cache)
    monkeypatch.setattr("data.bpe.BpeTokenizer.train", lambda *_: pytest.fail("trained twice"))
    monkeypatch.setattr("data.store.write_stores", lambda *_: pytest.fail("encoded twice"))
    second = load_dataset(cfg, cache_dir=cache)
    assert isinstance(second.train.tokens, ShardTokens)  # read from the file when they are asked for
    assert (second.train.tokens[:] == first.train.tokens[:]).all()
    assert (second.heldout.doc_bytes == first.heldout.doc_bytes).all()
    assert second.tokenizer.digest == first.tokenizer.digest and second.fingerprint == first.fingerprint


def test_changed_text_is_not_served_from_the_cache(config, book, cache) -> None:
    cfg = config(input_file=book)
    first = load_dataset(cfg, cache_dir=cache)
    Path(book).write_bytes(Path(book).read_bytes().replace(b"cat", b"cow"))
    second = load_dataset(cfg, cache_dir=cache)
    assert second.fingerprint != first.fingerprint
    assert b"cow" in second.train.text(0) and b"cat" not in second.train.text(0)


def test_every_damaged_cache_file_is_noticed_and_rebuilt(config, book, cache) -> None:
    cfg = config(input_file=book, tokenizer="bpe-300")
    first = load_dataset(cfg, cache_dir=cache)
    files = sorted(path for path in cache.rglob("*") if path.suffix in {".npy", ".json"})
    rebuilt = [path for path in files if path != first.cache_path / "tokenizer.json"]  # the yardsticks' copy
    assert len(rebuilt) == 9
    tokens = first.train.tokens[:]
    for path in rebuilt:
        good = path.read_bytes()
        for bad in (good[: len(good) // 2], good[:-3] + bytes([good[-3] ^ 1]) + good[-2:], b""):
            path.write_bytes(bad)
            again = load_dataset(cfg, cache_dir=cache)
            assert (again.train.tokens[:] == tokens).all()
            assert (again.heldout.offsets == first.heldout.offsets).all()
            assert again.tokenizer.digest == first.tokenizer.digest
            assert any("rebuilt" in note for note in again.notes), path
            assert path.read_bytes() == good


def test_missing_cache_file_is_rebuilt(config, book, cache) -> None:
    first = load_dataset(config(input_file=book), cache_dir=cache)
    (first.cache_path / "train.offsets.npy").unlink()
    again = load_dataset(config(input_file=book), cache_dir=cache)
    assert (again.train.offsets == first.train.offsets).all()
    assert (first.cache_path / "train.offsets.npy").exists()


def test_a_cache_that_cannot_be_written_costs_a_note_only(config, book, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    dataset = load_dataset(config(input_file=book, tokenizer="bpe-300"), cache_dir=tmp_path / "file")
    assert dataset.cache_path is None and dataset.train.n_docs
    assert sum("could not be cached" in note for note in dataset.notes) == 3


@pytest.mark.slow
def test_processes_at_once_end_with_one_sound_cache(config, book, cache) -> None:
    code = (
        "import sys; from types import SimpleNamespace; from data import load_dataset\n"
        "cfg = SimpleNamespace(data='text', input_file=sys.argv[1], data_root=None, near_copies=None)\n"
        "cfg.tokenizer, cfg.train_seq_len, cfg.val_files, cfg.document_separator = 'bpe-300', 32, None, None\n"
        "cfg.training_mode, cfg.packing = 'pretraining', True\n"
        "print(load_dataset(cfg, cache_dir=sys.argv[2]).tokenizer.digest)\n"
    )
    project = Path(data.__file__).resolve().parent.parent
    command = [sys.executable, "-c", code, book, str(cache)]
    children = [subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE) for _ in range(3)]
    digests = {child.communicate(timeout=120)[0] for child in children}
    assert len(digests) == 1 and all(child.returncode == 0 for child in children)
    dataset = load_dataset(config(input_file=book, tokenizer="bpe-300"), cache_dir=cache)
    assert isinstance(dataset.train.tokens, ShardTokens)
    assert not any("rebuilt" in note for note in dataset.notes)
    assert not list(cache.rglob(".*"))  # no temporary files left


def test_auto_tokenizer(config, book, cache) -> None:
    synthetic = load_dataset(config(data="synthetic", tokenizer="auto"), cache_dir=cache)
    assert synthetic.tokenizer.name == "byte" and any(
        "tokenizer auto: byte" in note for note in synthetic.notes
    )
    assert synthetic.entropy_bits_per_byte == synthetic.truth.entropy_bits_per_byte
    small = load_dataset(config(input_file=book, tokenizer="auto"), cache_dir=cache)
    assert small.tokenizer.name == "byte" and any("the text is small" in note for note in small.notes)


def test_auto_is_bpe_1024_where_the_text_supports_it(config, tmp_path, cache) -> None:
    source = Path(data.__file__).parent
    cfg = config(input_file=str(source), tokenizer="auto", val_files="text.py")
    dataset = load_dataset(cfg, cache_dir=cache)
    assert dataset.tokenizer.name == "bpe-1024" and dataset.tokenizer.vocab_size == 1024


def test_tokenizer_from_a_path_and_from_a_checkpoint(config, book, cache, tmp_path, bpe) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    by_path = load_dataset(
        config(input_file=book, tokenizer=str(tmp_path / "tokenizer.json")), cache_dir=cache
    )
    assert by_path.tokenizer.digest == bpe.digest
    given = load_dataset(
        config(input_file=book, tokenizer="auto"), cache_dir=cache, tokenizer=ByteTokenizer()
    )
    assert given.tokenizer.name == "byte"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "embeded"}, "Did you mean 'embedded'"),
        ({"tokenizer": "bpe1024"}, "Did you mean 'bpe-1024'"),
        ({"tokenizer": "bytes"}, "Did you mean 'byte'"),
        ({"tokenizer": "bpe-256"}, "Nearest: bpe-257"),
        ({"tokenizer": "bpe-9999999"}, "Nearest: bpe-131072"),
        ({"tokenizer": "bpe-5000"}, "needs more text"),
        ({"tokenizer": "some/tokenizer.json"}, "there is no such file"),
        ({"train_seq_len": 10**6}, r"too short for one row: .*largest train_seq_len for it is \d+"),
    ],
)
def test_mistakes(config, book, cache, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(config(input_file=book, **changes), cache_dir=cache)


def test_cache_root_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("MYTRAINER_CACHE")
    assert cache_root() == tmp_path / "xdg" / "mytrainer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "mytrainer"


def test_without_a_home_no_folder_is_called_tilde(monkeypatch) -> None:
    for name in ("MYTRAINER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody knows this user
    place = cache_root()
    assert place.parent == Path(tempfile.gettempdir()) and "~" not in str(place)
    monkeypatch.setenv("MYTRAINER_CACHE", "~/own")
    with pytest.raises(ValueError, match="there is no home folder for '~' here"):
        cache_root()


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path) -> None:
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.slow
def test_a_write_removes_what_dead_ones_of_its_file_have_left(tmp_path) -> None:
    path, now = tmp_path / "a[1].npy", time.time()
    for name, age in ((".a[1].npy.dead0000", 4000), (".a[1].npy.alive000", 10), (".b.npy.dead0000", 4000)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    write_atomic(path, lambda file: file.write(b"whole"))
    assert {p.name for p in tmp_path.iterdir()} == {"a[1].npy", ".a[1].npy.alive000", ".b.npy.dead0000"}


def test_the_package_imports_no_torch() -> None:
    code = (
        "import sys, data, data.tokenizers, data.yardsticks, data.synthetic, data.text, data.embedded\n"
        "heavy = {'torch', 'hydra', 'trainer', 'models', 'adapters', 'configs'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    project = Path(data.__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=project).returncode == 0
