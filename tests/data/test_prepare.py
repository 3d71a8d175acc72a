"""What `prepare` writes is the very text that it read, however it was written and whatever stopped it meanwhile."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

import data.encoder
import data.prepare
import data.tokenizers
from data import load_corpus, load_dataset
from data.bin import absolute
from data.corpus import Document, fingerprint, in_hash_order
from data.encoder import Encoders, _encode
from data.errors import DataError
from data.prepare import Wanted, _first_of_each, prepare
from data.prepared import MANIFEST, manifest_digest, prepared_tokenizer, require_unchanged
from data.rows import HeldoutRows, TrainingRows
from data.scored import text_to_score
from data.store import TokenStore
from data.tokenizers import ByteTokenizer
from data.yardsticks import compute, start_background
from tests.data import ranks
from tests.data.conftest import prose
from tests.data.foreign import byte_level, saved, word_piece
from tests.data.shard_files import llm_c

TEXTS = [prose(f"prepare {number}", 5 + 9 * (number % 13)) for number in range(150)]
SHARD = 2000  # tokens: several shards


def jsonl(path: Path, texts) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in texts))
    os.utime(path, (1e9, 1e9))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fields(bpe, tmp_path) -> dict[str, str]:
    bpe.save(tmp_path / "bpe.json")
    jsonl(tmp_path / "text.jsonl", TEXTS)
    return {
        "data": "jsonl",
        "train_files": str(tmp_path / "text.jsonl"),
        "tokenizer": str(tmp_path / "bpe.json"),
    }


@pytest.fixture
def written(config, fields, tmp_path, cache):
    """A function that prepares the text into a folder of the test."""

    def written(name="out", processes=1, **changes):
        options = {key: changes.pop(key) for key in ("text", "drop_copies") if key in changes}
        size = changes.pop("shard_tokens", SHARD)
        wanted = Wanted(tmp_path / name, processes, shard_tokens=size, **options)
        return prepare(config(**{**fields, **changes}), wanted, cache)

    return written


@pytest.fixture
def opened(config, tmp_path):
    def opened(name="out", **changes):
        chosen = {"data": "bin", "input_file": str(tmp_path / name), "tokenizer": "auto", **changes}
        return load_dataset(config(**chosen))

    return opened


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def texts(store: TokenStore) -> list[bytes]:
    return [store.text(index) for index in range(store.n_docs)]


def require_equal(one, other) -> None:
    """Two data sets are the same to a run."""
    assert one.fingerprint == other.fingerprint and one.content == other.content
    for ours, theirs in ((one.train, other.train), (one.heldout, other.heldout)):
        assert np.array_equal(ours.tokens[:], theirs.tokens[:]) and ours.tokens.dtype == theirs.tokens.dtype
        assert np.array_equal(ours.offsets, theirs.offsets)
        assert np.array_equal(ours.doc_bytes, theirs.doc_bytes)
        assert texts(ours) == texts(theirs)
        assert np.array_equal(ours.lossy_documents, theirs.lossy_documents)
    eot = one.tokenizer.eot
    rows = [TrainingRows(dataset.train, eot, 32, seed=5) for dataset in (one, other)]
    chosen = np.arange(rows[0].rows_per_epoch - 9, rows[0].rows_per_epoch + 9)  # into the second epoch
    for ours, theirs in [[side.batch(chosen) for side in rows]]:
        assert np.array_equal(ours.tokens, theirs.tokens) and ours.bytes == theirs.bytes
    held = [HeldoutRows(dataset.heldout, eot, 32) for dataset in (one, other)]
    ours, theirs = (side.batch(np.arange(side.n_rows)) for side in held)
    assert np.array_equal(ours.tokens, theirs.tokens) and np.array_equal(ours.sizes, theirs.sizes)
    assert compute(one.train, one.heldout) == compute(other.train, other.heldout)


# -- the same text -------------------------------------------------------------------------------------------------


def test_a_prepared_folder_is_the_text(written, opened, config, fields) -> None:
    found = written()
    manifest = found.manifest
    assert (
        found.kept == 0 and len(manifest["train"]["shards"]) > 3 and len(manifest["heldout"]["shards"]) == 1
    )
    text = load_dataset(config(**fields))
    require_equal(opened(), text)
    assert manifest["fingerprint"] == text.fingerprint
    for side, store in (("train", text.train), ("heldout", text.heldout)):
        told = manifest[side]
        assert told["documents"] == store.n_docs and told["bytes"] == store.total_bytes
        assert told["tokens"] == len(store.tokens) + store.n_docs
    assert manifest["notes"] == [
        f"held out: {text.heldout.n_docs} of 150 documents by a hash of their text, "
        f"{text.heldout.total_bytes:,} bytes"
    ]
    read = dict(tokenizer="byte")
    require_equal(opened(**read), load_dataset(config(**{**fields, **read})))


def test_every_file_stands_in_the_manifest_with_its_digest(written, tmp_path) -> None:
    manifest = written(text=True).manifest
    there = files(tmp_path / "out")
    assert there.keys() == {*manifest["files"], MANIFEST}
    for name, file in manifest["files"].items():
        assert len(there[name]) == file["bytes"] and hashlib.sha256(there[name]).hexdigest() == file["sha256"]
    assert manifest["digest"] == manifest_digest(manifest) == json.loads(there[MANIFEST])["digest"]


def test_shards_are_those_of_llm_c(written, opened, bpe, config, fields, tmp_path) -> None:
    written()
    text = load_dataset(config(**fields))
    for side, store in (("train", text.train), ("val", text.heldout)):
        first, number, expected = 0, 0, []
        ids = [
            np.append([bpe.eot], store.tokens[a:b])
            for a, b in zip(store.offsets, store.offsets[1:], strict=False)
        ]
        while first < len(ids):  # as many whole documents as fit
            behind = first + 1
            while behind < len(ids) and sum(map(len, ids[first : behind + 1])) <= SHARD:
                behind += 1
            expected.append(llm_c(tmp_path / "theirs.bin", np.concatenate(ids[first:behind])).read_bytes())
            first, number = behind, number + 1
        ours = [path.read_bytes() for path in sorted((tmp_path / "out").glob(f"{side}_*.bin"))]
        assert ours == expected
    plain = opened(
        input_file=None,
        train_files=f"{tmp_path}/out/train_*.bin",
        val_files=f"{tmp_path}/out/val_*.bin",
        shards_tokenizer=fields["tokenizer"],
    )
    assert texts(plain.train) == texts(text.train) and texts(plain.heldout) == texts(text.heldout)


def test_ids_take_four_bytes_where_the_largest_needs_them(written, opened, config, fields, tmp_path) -> None:
    many = "".join(
        chr(code) for code in [*range(0x4E00, 0x9FFF), *range(0xAC00, 0xD7A0), *range(0x20000, 0x2A6DF)]
    )
    documents = [
        f"{many[start : start + 400]} {number}".encode()
        for number, start in enumerate(range(0, len(many), 400))
    ]
    path = jsonl(tmp_path / "wide.jsonl", documents)
    wide = dict(train_files=str(path), tokenizer="char")
    manifest = written("wide", shard_tokens=40_000, **wide).manifest
    assert manifest["tokenizer"]["vocab_size"] > 1 << 16 and manifest["header"] == "20240801"
    text = load_dataset(config(**{**fields, **wide}))
    assert text.train.tokens.dtype == np.uint32
    require_equal(opened("wide"), text)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nothing_depends_on_the_number_of_processes(
    written, opened, config, kind, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(data.encoder, "BATCH", 60)
    ten = [prose(f"ten {number}", 8) for number in range(10)]
    path = jsonl(tmp_path / "ten.jsonl", ten)
    if kind == "parquet":
        path = tmp_path / "ten.parquet"
        pq.write_table(pa.table({"text": [text.decode() for text in ten]}), path, row_group_size=10)
    for processes in (1, 3, 16):
        manifest = written(
            f"by {processes}", processes, data=kind, train_files=str(path), tokenizer="byte"
        ).manifest
        assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == 10
        assert files(tmp_path / f"by {processes}") == files(tmp_path / "by 1")
    found = opened("by 3")
    assert sorted([*texts(found.train), *texts(found.heldout)]) == sorted(ten)


def test_files_of_the_same_text_give_the_same_shards(written, fields, tmp_path) -> None:
    jsonl(tmp_path / "parts/a.jsonl", TEXTS[:40])
    jsonl(tmp_path / "parts/b.jsonl", TEXTS[40:])
    whole, parts = written(), written("of parts", train_files=str(tmp_path / "parts"))
    assert whole.manifest["files"] == parts.manifest["files"]
    assert whole.manifest["fingerprint"] == parts.manifest["fingerprint"]


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "hf"])
def test_whatever_the_text_is_packed_in_the_shards_are_the_same(written, kind, tmp_path) -> None:
    whole = written("whole").manifest
    halves = [
        jsonl(tmp_path / f"{number}.jsonl", part).read_bytes()
        for number, part in ((1, TEXTS[:70]), (2, TEXTS[70:]))
    ]
    packed = tmp_path / f"packed/text.jsonl.{kind}"
    packed.parent.mkdir()
    changes = {"train_files": str(packed)}
    if kind == "gz":
        packed.write_bytes(b"".join(map(gzip.compress, halves)))
    elif kind == "zst":
        packed.write_bytes(b"".join(map(zstandard.compress, halves)))
    elif kind == "parquet":
        changes = {"data": "parquet", "train_files": f"{packed}.parquet"}
        pq.write_table(
            pa.table({"text": [text.decode() for text in TEXTS]}), f"{packed}.parquet", row_group_size=40
        )
    else:
        datasets.Dataset.from_dict({"text": [text.decode() for text in TEXTS]}).save_to_disk(str(packed))
        changes = {"data": "hf", "train_files": None, "dataset_name": str(packed), "eval_split": None}
    assert written("out", **changes).manifest["files"] == whole["files"]


def test_prepared_folders_can_be_mixed(written, config, fields, tmp_path) -> None:
    other = jsonl(tmp_path / "other.jsonl", [prose(f"other {number}", 30) for number in range(60)])
    written()
    written("others", train_files=str(other), tokenizer="byte")
    names = ("text", "others")
    text = [
        {"data": "jsonl", "train_files": path, "weight": 0.5, "name": name}
        for name, path in zip(names, (fields["train_files"], str(other)), strict=True)
    ]
    shards = [
        {"data": "bin", "input_file": str(tmp_path / folder), "weight": 0.5, "name": name}
        for name, folder in zip(names, ("out", "others"), strict=True)
    ]
    one, two = (load_dataset(config(data="mix", mix=mix, tokenizer="bpe-300")) for mix in (text, shards))
    assert one.fingerprint == two.fingerprint and one.content == two.content
    for ours, theirs in ((one.train, two.train), (one.heldout, two.heldout)):
        assert np.array_equal(ours.tokens[:], theirs.tokens[:]) and texts(ours) == texts(theirs)
    with pytest.raises(DataError, match="data=mix: prepare its sources one by one, and mix the folders"):
        written("mixed", data="mix", mix=text, train_files=None)


def test_a_folder_of_text_keeps_its_split_and_order(written, opened, config, fields, tmp_path) -> None:
    for number in range(60):
        path = tmp_path / f"notes/{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(TEXTS[number])
    text = dict(data="text", train_files=None, input_file=str(tmp_path / "notes"))
    written(**text)
    expected = load_dataset(config(**{**fields, **text}))
    assert expected.content != expected.fingerprint  # names of files are told apart
    require_equal(opened(), expected)


def test_documents_can_be_chosen_and_come_in_any_order(
    written, opened, config, fields, bpe, tmp_path, cache
) -> None:
    written()
    ours, _ = load_corpus(config(data="bin", input_file=str(tmp_path / "out"), tokenizer="auto"), cache)
    theirs, _ = load_corpus(config(**fields), cache)
    assert [d.text for d in in_hash_order(ours.train)] == [d.text for d in in_hash_order(theirs.train)]
    assert fingerprint(ours.train, ours.heldout) == ours.fingerprint == theirs.fingerprint
    some = np.array([50, 3, 99])
    for chosen in (ours.train.select(some), ours.train.select(np.arange(100)[::-1]).select(99 - some)):
        assert [document.text for document in chosen] == [theirs.train[int(index)].text for index in some]
        ids = [bpe.encode(document.text) for document in chosen]
        places = zip(chosen.begins_of(np.arange(3)), chosen.lengths_of(np.arange(3)), strict=True)
        assert all(
            np.array_equal(chosen.files.read(begin, begin + length), one)
            for (begin, length), one in zip(places, ids, strict=True)
        )
    assert [document.text for document in ours.train[2:5]] == [
        theirs.train[index].text for index in (2, 3, 4)
    ]
    assert ours.train[-1].text == theirs.train[-1].text
    with pytest.raises(IndexError):
        ours.train[len(ours.train)]


def test_yardsticks_are_computed_beside_a_run(written, opened) -> None:
    written()
    found = opened()
    with start_background(found) as background:
        assert background.result(60) == compute(found.train, found.heldout)


def test_special_looking_text_stays_text(written, opened, tmp_path) -> None:
    path = jsonl(tmp_path / "special.jsonl", [b"a<|endoftext|>b", *TEXTS[:30]])
    written(train_files=str(path))
    found = opened()
    assert b"a<|endoftext|>b" in [*texts(found.train), *texts(found.heldout)]


# -- tokenizers that lose text -------------------------------------------------------------------------------------


def test_a_tokenizer_that_loses_text_needs_the_text(written, opened, config, fields, tmp_path) -> None:
    folder = saved(tmp_path / "bert", word_piece(), tokenizer_config={"eos_token": "[SEP]"})
    lossy = dict(tokenizer=str(folder))
    expected = load_dataset(config(**{**fields, **lossy}))
    with pytest.raises(
        DataError, match=r"text.jsonl:\d+: the ids of tokenizer .* do not give its text back.*--text"
    ):
        written("without", **lossy)
    written(text=True, **lossy)
    assert len(expected.train.lossy_documents)
    require_equal(opened(), expected)
    read = dict(tokenizer="byte")  # of the text itself, not of what the ids say
    require_equal(opened(**read), load_dataset(config(**{**fields, **read})))


def test_a_normalising_tokenizer_is_fine_where_the_text_is_there(
    written, opened, config, fields, tmp_path
) -> None:
    from tokenizers import normalizers

    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    folder = saved(tmp_path / "nfc", tokenizer, tokenizer_config={"eos_token": "<|endoftext|>"})
    path = jsonl(tmp_path / "decomposed.jsonl", [b"cafe\xcc\x81 " + text for text in TEXTS[:40]])
    nfc = dict(tokenizer=str(folder), train_files=str(path))
    written(text=True, **nfc)
    found = opened()
    require_equal(found, load_dataset(config(**{**fields, **nfc})))
    assert all(text.startswith(b"cafe\xcc\x81") for text in texts(found.heldout))


# -- stopped meanwhile ---------------------------------------------------------------------------------------------


class Stop(BaseException):
    """Nothing on its way catches it."""


@pytest.mark.parametrize("call", [1, 2, 3, 6, 7, 15, 35])
def test_what_was_stopped_goes_on_to_the_same_bytes(written, tmp_path, monkeypatch, call) -> None:
    whole = written("whole")
    calls = 0
    with monkeypatch.context() as patch:

        def stop(real):
            def counted(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == call:
                    raise Stop
                return real(*args, **kwargs)

            return counted

        # Before each file is put in its place, of whatever kind.
        patch.setattr(data.prepare, "write_atomic", stop(data.prepare.write_atomic))
        patch.setattr(data.tokenizers, "write_atomic", stop(data.tokenizers.write_atomic))
        patch.setattr(data.prepare, "_to_disk", stop(data.prepare._to_disk))
        with pytest.raises(Stop):
            written()
    assert not (tmp_path / "out" / MANIFEST).exists()
    (tmp_path / "out/.val.sizes.npy.a1b2c3d4").write_text("begun by a process that was killed")
    found = written()
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert found.manifest == whole.manifest
    assert (found.kept > 0) == (call > 6)  # two files, then four of a shard, its record last


@pytest.mark.slow
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(written, fields, tmp_path) -> None:
    path = jsonl(tmp_path / "long.jsonl", [prose(f"killed {number}", 60) for number in range(4000)])
    written("whole", 2, train_files=str(path), shard_tokens=1000)
    asked = {**fields, "train_files": str(path)}
    script = (
        "import sys, json; from types import SimpleNamespace; from pathlib import Path; "
        "from data.prepare import Wanted, prepare; from data.cache import cache_root; "
        "empty = dict.fromkeys(('input_file', 'data_root', 'near_copies', 'val_files', 'shards_tokenizer')); "
        "cfg = SimpleNamespace(**empty, text_field='text', training_mode='pretraining', "
        "packing=True, train_seq_len=32, **json.loads(sys.argv[1])); "
        "prepare(cfg, Wanted(Path(sys.argv[2]), 2, shard_tokens=1000), cache_root())"
    )
    out, killed = tmp_path / "out", 0
    for point in (1, 40, 41, 90, 140):
        process = subprocess.Popen([sys.executable, "-c", script, json.dumps(asked), str(out)])
        while process.poll() is None and len(list(out.glob(".parts/*.json"))) < point:
            time.sleep(0.001)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed == 5 and not (out / MANIFEST).exists()
    found = written(processes=2, train_files=str(path), shard_tokens=1000)
    assert found.kept > 400
    assert files(out) == files(tmp_path / "whole")


def test_a_shard_that_was_damaged_meanwhile_is_made_again(written, tmp_path, monkeypatch) -> None:
    written("whole")
    with monkeypatch.context() as patch:
        patch.setattr(data.prepare, "_finish", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            written()
    path = tmp_path / "out/train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x00")
    found = written()
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    before = sum(shard["documents"] for shard in found.manifest["train"]["shards"][:2])
    assert found.kept == before + found.manifest["heldout"]["documents"]


def test_files_of_others_in_the_folder_stay_and_are_not_listed(
    written, opened, tmp_path, monkeypatch
) -> None:
    whole = written("whole").manifest
    with monkeypatch.context() as patch:
        patch.setattr(data.prepare, "_finish", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            written()
    out = tmp_path / "out"
    names = {"README.md", "train_log.txt", "val_000000.bin.bak", ".train_000000.swp", ".train.log.20240101"}
    names |= {".parts/train_notes.npy", "train_1.bin"}
    for name in names:
        (out / name).write_text("mine")
    begun = {".train_000099.bin", "train_000099.bin", ".parts/train_000099.json", ".val.sizes.npy.a1b2c3d4"}
    for name in begun:
        (out / name).write_text("of a preparation that was killed")
    assert written().manifest == whole
    assert {name for name in names if (out / name).exists()} == names
    assert not [name for name in begun if (out / name).exists()]
    for name in names:
        (out / name).unlink()
    assert opened().train.total_bytes


def test_a_full_disk_gives_a_message_and_leaves_what_is_complete(written, tmp_path, monkeypatch) -> None:
    written("whole")
    with monkeypatch.context() as patch:
        add = data.prepare._Shard.add

        def full(shard, *args):
            if shard.name == "train_000002":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            add(shard, *args)

        patch.setattr(data.prepare._Shard, "add", full)
        with pytest.raises(
            DataError, match="out' cannot be written: No space left on device.*the same command goes on"
        ):
            written()
    assert not list((tmp_path / "out").glob(".train*"))  # room is made
    assert written().kept
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_complete_folder_is_left_as_it_is(written, tmp_path) -> None:
    first = written()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = written(processes=2)
    assert again.manifest == first.manifest and again.kept == 150
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_an_incomplete_folder_is_not_trained_on(written, opened, monkeypatch) -> None:
    monkeypatch.setattr(data.prepare, "_finish", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        written()
    with pytest.raises(DataError, match="is not complete: prepare was stopped there. The same command"):
        opened()


# -- what does not belong together ---------------------------------------------------------------------------------


def test_one_folder_holds_one_text_and_one_tokenizer(written, tmp_path) -> None:
    written()
    with pytest.raises(
        DataError, match=r"out' is of another tokenizer.*bpe-300 \(\w{16}\) and byte \(\w{16}\)"
    ):
        written(tokenizer="byte")
    other = jsonl(tmp_path / "other.jsonl", TEXTS[1:])
    with pytest.raises(DataError, match=r"out' holds other text \(fingerprint \w{16}; asked for is \w{16}\)"):
        written(train_files=str(other))
    with pytest.raises(DataError, match="out' was begun with shard_tokens 2000, and 3000 is asked for"):
        written(shard_tokens=3000)
    with pytest.raises(DataError, match="out' was begun with text False, and True is asked for"):
        written(text=True)
    for place in ("text.jsonl", "text.jsonl/out"):
        with pytest.raises(
            DataError, match=r"text.jsonl' is there and is no folder. Name a new folder: --out"
        ):
            written(place)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="full' holds other files .'thesis.txt'.. Name a new folder"):
        written("full")
    assert files(tmp_path / "full") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("name", ["train_000001.bin", "tokenizer.json", "val.offsets.npy", MANIFEST])
def test_a_changed_file_is_refused_with_both_digests(written, opened, tmp_path, name) -> None:
    written()
    opened()  # as it was written
    path = tmp_path / "out" / name
    raw = bytearray(path.read_bytes())
    place = raw.index(b'"fingerprint": "') + 18 if name == MANIFEST else len(raw) // 2
    raw[place] = raw[place] + 1 if name == MANIFEST else raw[place] ^ 1
    path.write_bytes(bytes(raw))
    with pytest.raises(
        DataError, match=rf"{name}' is another than prepare wrote: its digest is \w{{16}}, and \w{{16}} was"
    ):
        opened()
    with pytest.raises(DataError):
        written()


def test_a_missing_or_shorter_file_is_refused(written, opened, tmp_path) -> None:
    written()
    path = tmp_path / "out/train_000001.bin"
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    with pytest.raises(
        DataError, match=rf"train_000001.bin' has {len(raw) - 2:,} bytes, and prepare wrote {len(raw):,}"
    ):
        opened()
    path.unlink()
    with pytest.raises(DataError, match=r"train_000001.bin' of a prepared folder is not there"):
        opened()


def test_chats_are_not_prepared(written) -> None:
    with pytest.raises(DataError, match="training_mode: chats are read from their rows"):
        written(training_mode="instruction_finetuning")


def test_another_tokenizer_beside_the_shards_is_refused(written, opened, tmp_path) -> None:
    """Also where the manifest was made to fit."""
    written()
    folder = tmp_path / "out"
    ByteTokenizer().save(folder / "tokenizer.json")
    raw = (folder / "tokenizer.json").read_bytes()
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["tokenizer.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=r"tokenizer .*tokenizer.json' is another than prepare wrote: its digest is"
    ):
        opened()


def test_whose_ids_they_are_cannot_be_said_otherwise(written, opened, config, fields, tmp_path) -> None:
    written()
    assert opened(shards_tokenizer=fields["tokenizer"]).tokenizer.name == "bpe-300"
    with pytest.raises(
        DataError, match=r"shards_tokenizer: 'byte' has digest \w{16}, and .*out' was prepared with bpe-300"
    ):
        opened(shards_tokenizer="byte")
    with pytest.raises(
        DataError, match=r"val_files: .*out' was written by prepare.*val_files='.*/val_\*.bin'"
    ):
        opened(val_files="other.bin")


def test_a_cache_that_cannot_be_written_is_no_hindrance(written, tmp_path, monkeypatch) -> None:
    manifest = written().manifest
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "file"))
    require_unchanged(tmp_path / "out", manifest)
    path = tmp_path / "out/train_000001.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"train_000001.bin' is another than prepare wrote"):
        require_unchanged(tmp_path / "out", manifest)


def test_paths_mean_the_same_from_anywhere(written, config, fields, tmp_path, monkeypatch) -> None:
    written()
    monkeypatch.chdir(tmp_path)
    named = config(data="bin", train_files="out", shards_tokenizer="bpe.json")
    assert absolute(named) == {
        "train_files": [str(tmp_path / "out")],
        "shards_tokenizer": str(tmp_path / "bpe.json"),
    }
    assert absolute(config(data="bin", input_file="out")) == {}  # which every source resolves
    assert prepared_tokenizer(config(data_root=str(tmp_path), input_file="out")) == str(
        tmp_path / "out/tokenizer.json"
    )
    assert prepared_tokenizer(config(input_file="text.jsonl")) is None
    assert prepared_tokenizer(config(train_files=["out", "out"])) is None


def test_a_folder_is_not_scored_as_other_text(written, config, bpe, tmp_path) -> None:
    written()
    given = config(data="bin", input_file=str(tmp_path / "out"))
    with pytest.raises(
        DataError, match=r"text.jsonl is a folder of prepare, of which a part is for training.*val_\*.bin"
    ):
        text_to_score(None, given, bpe)
    held = config(
        data="bin",
        input_file=str(tmp_path / "out/val_000000.bin"),
        shards_tokenizer=str(tmp_path / "bpe.json"),
    )
    scored = text_to_score(None, held, bpe)
    assert scored.whole and scored.store.n_docs == written().manifest["heldout"]["documents"]


def test_one_prepare_writes_to_a_folder(written, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with (
        filelock.FileLock(tmp_path / "out/.lock"),
        pytest.raises(
            DataError, match="another prepare is writing to .*out'. Wait for it, or name another folder"
        ),
    ):
        written()


def test_files_are_hashed_once(written, opened, monkeypatch, cache) -> None:
    written()
    shutil.rmtree(cache / "checked")
    hashed: list[str] = []
    real = data.prepared.file_digest
    monkeypatch.setattr("data.prepared.file_digest", lambda path: hashed.append(path.name) or real(path))
    opened()
    assert "train_000001.bin" in hashed
    hashed.clear()
    opened()
    assert not hashed


# -- copies --------------------------------------------------------------------------------------------------------


def test_exact_copies_are_dropped_on_request(written, opened, tmp_path) -> None:
    path = jsonl(tmp_path / "twice.jsonl", [*TEXTS[:60], *TEXTS[20:60], TEXTS[0]])
    assert written(train_files=str(path)).manifest["train"]["documents"] > 60
    found = written("once", train_files=str(path), drop_copies=True)
    manifest = found.manifest
    assert manifest["train"]["documents"] + manifest["heldout"]["documents"] == 60
    (note,) = [note for note in manifest["notes"] if "dropped" in note]
    told = re.fullmatch(r"dropped exact copies: (\d+) documents for training, (\d+) held out", note)
    assert told and int(told[1]) + int(told[2]) == 41 and int(told[2]) > 0
    once = opened("once")
    kept = [*texts(once.train), *texts(once.heldout)]
    assert sorted(kept) == sorted(TEXTS[:60])
    assert [text for text in TEXTS[:60] if text in texts(once.train)] == texts(
        once.train
    )  # the first of each


def test_near_copies_are_dropped_as_a_run_does(written, opened, config, fields, tmp_path) -> None:
    lines = [[prose(f"line {number} {part}", 9) for part in range(6)] for number in range(50)]
    near = [
        b"\n".join(part.replace(b"\n", b" ") for part in [*lines[number][:5], b"but ends so"])
        for number in range(50)
    ]
    held = jsonl(tmp_path / "held.jsonl", [*near[:3], *TEXTS[:9]])
    train = jsonl(
        tmp_path / "train.jsonl", [b"\n".join(p.replace(b"\n", b" ") for p in line) for line in lines]
    )
    named = dict(train_files=str(train), val_files=str(held))
    manifest = written(near_copies="drop", **named).manifest
    assert manifest["heldout"]["documents"] == 9 and manifest["near_copies"]["dropped"]["documents"] == 3
    require_equal(opened(), load_dataset(config(**{**fields, **named, "near_copies": "drop"})))
    assert written("kept", **named).manifest["heldout"]["documents"] == 12


# -- documents that cannot be encoded ------------------------------------------------------------------------------


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


def test_a_panic_names_what_it_was_about(tmp_path) -> None:
    class Panicking(ByteTokenizer):
        def encode(self, text):
            if text == b"bad":
                raise Panic("stack overflow")
            return super().encode(text)

    with open(tmp_path / "place", "wb+") as places:
        answer = _encode(Panicking(), [b"good", b"bad", b"good"], places.fileno())
        assert answer == "Panic: stack overflow"
        assert data.encoder.PLACE.unpack((tmp_path / "place").read_bytes()) == (1,)


def test_a_dying_process_names_file_and_document(bpe, tmp_path, monkeypatch) -> None:
    bpe.save(tmp_path / "bpe.json")
    monkeypatch.setattr(data.encoder, "BATCH", 12)
    workers = []

    class Watched(data.encoder._Worker):
        def __init__(self, *args):
            super().__init__(*args)
            workers.append(self)

    monkeypatch.setattr(data.encoder, "_Worker", Watched)
    documents = [Document(f"b.jsonl:{number}", b"text") for number in range(1, 40)]
    with Encoders(tmp_path / "bpe.json", 2) as encoders:
        found = encoders.encoded(documents)
        assert next(found).document.name == "b.jsonl:1"
        for worker in workers:
            worker._process.kill()
            worker._process.wait()
        with pytest.raises(
            DataError, match=r"b.jsonl:\d+ could not be encoded: the process that encoded it was killed"
        ):
            list(found)
        (one, _) = workers
        one._batch = documents[:3]
        os.pwrite(one._places.fileno(), data.encoder.PLACE.pack(2), 0)
        assert one._died("so") == "b.jsonl:3 could not be encoded: so. Leave that document out, or mend it"


@pytest.mark.parametrize("character", ["^", "a", " "])
def test_a_megabyte_of_one_character_is_a_document(written, opened, tmp_path, monkeypatch, character) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(ranks.seed(tmp_path / "ranks")))
    long = (character * 1_000_000 + ".").encode()
    path = jsonl(tmp_path / "long.jsonl", [*TEXTS[:20], long, *TEXTS[20:40]])
    held = jsonl(tmp_path / "held.jsonl", TEXTS[40:50])
    named = dict(train_files=str(path), val_files=str(held))
    written(processes=2, **named, tokenizer="gpt2", shard_tokens=100_000)
    found = opened()
    sizes = {
        text: length
        for store in (found.train, found.heldout)
        for text, length in zip(texts(store), np.diff(store.offsets), strict=True)
    }
    assert long in sizes
    if character == "^":
        assert sizes[long] == 250_001


def test_the_first_of_each_digest_is_found_whatever_its_first_half_is():
    draw = np.random.default_rng(0)
    halves = draw.integers(0, 3, (2, 40, 8)).astype(
        np.uint8
    )  # few values of few bytes: halves are shared, wholes too
    halves[..., 1:] = 0
    digests = np.concatenate([*halves, draw.integers(0, 256, (40, 16))], axis=1).astype(np.uint8)  # (40, 32)
    wanted = sorted({bytes(row[:16]): place for place, row in reversed(list(enumerate(digests)))}.values())
    assert 3 < len(wanted) < 10
    for cut in (0, 7, 40):
        found = _first_of_each([digests[:cut], digests[cut:]])
        assert found.tolist() == wanted
    assert _first_of_each([digests[:0], digests[:0]]).tolist() == []
