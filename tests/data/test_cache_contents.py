"""`prepare --clean` says what the cache holds, and deletes nothing else and nothing that is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from data import load_dataset
from data.cache_contents import BUSY, KINDS, chosen_kinds, contents, delete
from data.errors import DataError
from data.yardsticks import yardsticks
from tests.data.test_prepare import TEXTS, jsonl


@pytest.fixture
def cache(config, tmp_path, monkeypatch) -> Path:
    """A cache as runs leave it, some time ago."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("MYTRAINER_CACHE", str(cache))
    jsonl(tmp_path / "text.jsonl", TEXTS)
    dataset = load_dataset(
        config(data="jsonl", train_files=str(tmp_path / "text.jsonl"), tokenizer="bpe-300")
    )
    yardsticks(dataset)
    (cache / "tokenizers/r50k_base.tiktoken").write_text("ranks")
    (cache / "tokenizers/bpe-300-0123456789abcdef-v1.json").write_text("of a text whose tokens are gone")
    (cache / "checked").mkdir()
    (cache / "checked" / ("a" * 32)).write_text("folder")
    age(cache)
    return cache


def age(cache: Path) -> None:
    for path in cache.rglob("*"):
        os.utime(path, (time.time() - 2 * BUSY,) * 2)


def held(cache: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(cache)): p.read_bytes()
        for p in cache.rglob("*")
        if p.is_file() and p.suffix != ".lock"
    }


def test_everything_that_runs_leave_is_told_by_kind(cache) -> None:
    found = contents(cache)
    assert {entry.kind for entry in found} == {"texts", "tokens", "tokenizers", "near_copies", "checked"}
    assert sum(entry.bytes for entry in found) == sum(map(len, held(cache).values()))
    (tokens,) = [entry for entry in found if entry.kind == "tokens"]
    assert tokens.bytes == sum(path.stat().st_size for path in tokens.path.iterdir())
    assert 2 * BUSY <= time.time() - tokens.changed < 2 * BUSY + 600


def test_what_may_go_goes(cache) -> None:
    entries = contents(cache)
    kept = {entry.path.name: entry.kept for entry in entries if entry.kept}
    (used,) = [name for name in kept if name.startswith("bpe")]
    assert used != "bpe-300-0123456789abcdef-v1.json" and kept[used] == "tokens of its text are here"
    assert kept["r50k_base.tiktoken"] == "it came over the network" and len(kept) == 2
    delete(entries)
    assert held(cache).keys() == {"tokenizers/r50k_base.tiktoken", f"tokenizers/{used}"}
    delete(contents(cache))
    assert held(cache).keys() == {"tokenizers/r50k_base.tiktoken"}  # its tokens are gone now


def test_what_others_have_put_there_stays(cache, tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    for place in ("notes.txt", "tokens/notes.txt", "texts/mine/a.txt", "models/weights.pt"):
        path = cache / place
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        os.utime(path, (1e9, 1e9))
    link = cache / "tokens/0123456789abcdef-0123456789abcdef-v1"
    link.symlink_to(outside)
    os.utime(link, (1e9, 1e9), follow_symlinks=False)
    delete(contents(cache))
    mine = {"notes.txt", "tokens/notes.txt", "texts/mine/a.txt", "models/weights.pt"}
    assert mine <= held(cache).keys()
    assert (outside / "thesis.txt").read_text() == "mine"
    assert not link.is_symlink()


def test_what_is_being_written_stays(cache) -> None:
    (text,) = [entry.path for entry in contents(cache) if entry.kind == "texts"]
    (tokens,) = [entry.path for entry in contents(cache) if entry.kind == "tokens"]
    (tokens / "meta.json").touch()
    with filelock.FileLock(f"{text}.lock"):
        kept = {entry.path: entry.kept for entry in contents(cache)}
    assert (
        kept[text] == "a process is writing it"
        and kept[tokens] == "it was written to in the last ten minutes"
    )


def test_tokens_that_a_run_reads_stay_until_it_ends(cache, config, tmp_path) -> None:
    cfg = config(data="jsonl", train_files=str(tmp_path / "text.jsonl"), tokenizer="bpe-300")
    rows = load_dataset(cfg).training_rows(32)  # what a run keeps of its text
    age(cache)
    (entry,) = [entry for entry in contents(cache) if entry.kind == "tokens"]
    assert entry.kept == "a process is reading it"
    delete(contents(cache))
    assert (entry.path / "train.tokens.npy").exists()
    (late,) = delete([replace(entry, kept="")])  # it was looked at before the run began
    assert late == entry and (entry.path / "train.tokens.npy").exists()
    del rows
    assert [entry.kept for entry in contents(cache) if entry.kind == "tokens"] == [""]


def test_tokens_that_another_process_reads_stay_whatever_ends_it(cache) -> None:
    (entry,) = [entry for entry in contents(cache) if entry.kind == "tokens"]
    assert not entry.kept
    script = f"from data.held import hold; held = hold({str(entry.path)!r}); print(bool(held)); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        assert process.stdout.readline() == b"True\n"
        (held,) = [entry for entry in contents(cache) if entry.kind == "tokens"]
        process.kill()
    assert held.kept == "a process is reading it"
    assert [entry.kept for entry in contents(cache) if entry.kind == "tokens"] == [""]


def test_the_folder_of_a_kind_may_lie_on_another_disk(cache, tmp_path) -> None:
    (cache / "tokens").rename(tmp_path / "larger")
    (cache / "tokens").symlink_to(tmp_path / "larger")
    (tmp_path / "larger/notes.txt").write_text("mine")
    delete(contents(cache))
    assert [path.name for path in (tmp_path / "larger").iterdir()] == ["notes.txt"]
    assert (cache / "tokens").is_symlink()


def test_words_name_kinds() -> None:
    assert chosen_kinds(["tokens", "texts"]) == ["texts", "tokens"]
    assert chosen_kinds(["all"]) == list(KINDS) and chosen_kinds([]) == []
    with pytest.raises(DataError, match="clean: 'token' is not one of texts, tokens.*Did you mean 'tokens'"):
        chosen_kinds(["token"])


def test_an_empty_cache_holds_nothing(tmp_path) -> None:
    assert contents(tmp_path / "none") == []
