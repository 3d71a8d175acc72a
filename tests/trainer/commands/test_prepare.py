"""The `prepare` command: its words, what it says, and what it refuses."""

from __future__ import annotations

import json
import os

import pytest

import mytrainer
from configs.completion import complete
from data.prepared import MANIFEST
from tests.data.test_prepare import TEXTS, jsonl
from trainer.commands.prepare import PAUSE_IN_FILE, _Bar
from trainer.view.console import Console


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.chdir(tmp_path)
    return jsonl(tmp_path / "text.jsonl", TEXTS)


def prepared(*words) -> int:
    return mytrainer.main(["prepare", *words])


def test_a_text_is_prepared_and_what_became_of_it_said(text, tmp_path, capsys) -> None:
    words = (
        "data=jsonl",
        f"train_files={text}",
        "--tokenizer",
        "bpe-300",
        "--out",
        "shards",
        "--processes",
        "1",
    )
    assert prepared(*words, "learning_rate=0.1", "--shard_tokens", "2000") == 0
    out, err = capsys.readouterr()
    manifest = json.loads((tmp_path / "shards" / MANIFEST).read_text())
    train, heldout = manifest["train"], manifest["heldout"]
    assert len(train["shards"]) > 3 and manifest["tokenizer"]["name"] == "bpe-300"
    assert (
        f"training: {train['documents']:,} documents, {train['tokens']:,} tokens, {train['bytes']:,} bytes"
        in out
    )
    assert f"held out: {heldout['documents']:,} documents" in out and "in 1 shard\n" in out
    assert "text kept in the cache: " in out and str(tmp_path / "cache") in out
    assert "data=bin input_file=shards" in out and f"digest {manifest['digest'][:16]}" in out
    assert err == "note: prepare does not read learning_rate\n"
    assert prepared(*words, "--shard_tokens", "2000") == 0
    assert "all of it was in shards already" in capsys.readouterr().out
    assert prepared(*words) == 2
    assert "begun with shard_tokens 2000, and 100000000 is asked for" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(text, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.commands.prepare.prepare", interrupted)
    assert prepared("data=jsonl", f"train_files={text}", "tokenizer=byte", "--out", "shards") == 130
    assert "what is complete is kept in shards: the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "out: --out <folder> says where the shards go; none was given"),
        (["--out", "x", "--processes", "0"], "processes: must be at least 1, got 0"),
        (
            ["--out", "x", "--shard_tokens", "7"],
            "shard_tokens: must be 1,000 to 2,147,483,647, got 7. Nearest: 1000",
        ),
        (["--out", "x", "--dry_run"], "dry_run: it belongs to --clean"),
        (["--out", "x", "data=synthetic"], "data=synthetic is generated anew by every run"),
        (["--out", "x", "data=jsonl"], "data=jsonl needs train_files"),
        (["--out", "x", "tokenizr=gpt2"], "Did you mean 'tokenizer'"),
        (["--out", "x", "data=jsonl", "train_files=nowhere.jsonl"], "nowhere.jsonl' does not exist"),
        (["--clean", "tokns"], "Did you mean 'tokens'"),
        (["--clean", "texts", "data=jsonl"], "clean: 'data=jsonl' is not one of texts"),
    ],
)
def test_bad_words_are_refused_before_anything_is_written(text, tmp_path, capsys, words, told) -> None:
    assert prepared(*words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_the_cache_is_told_and_cleaned(text, tmp_path, capsys) -> None:
    assert prepared("data=jsonl", f"train_files={text}", "tokenizer=byte", "--out", "shards") == 0
    cache = tmp_path / "cache"
    capsys.readouterr()
    assert prepared("--clean") == 0
    out = capsys.readouterr().out
    assert str(cache) in out and "texts " in out and "--clean texts" in out
    (kept,) = [path for path in (cache / "texts").iterdir() if path.is_dir()]
    assert prepared("--clean", "texts", "--dry_run") == 0
    assert f"would be deleted: {kept}" in capsys.readouterr().out and kept.is_dir()
    assert prepared("--clean", "texts") == 0
    assert f"\ndeleted: {kept}" in capsys.readouterr().out and not kept.exists()
    assert list((cache / "checked").iterdir())
    assert prepared("--clean", "all") == 0
    assert not list((cache / "checked").iterdir())
    assert (tmp_path / "shards" / MANIFEST).is_file()


def test_progress_is_a_line_now_and_then(monkeypatch, capsys) -> None:
    now = [100.0]
    monkeypatch.setattr("trainer.commands.prepare.time.monotonic", lambda: now[0])
    bar = _Bar(Console(live=False))
    for done in range(0, 2001, 100):
        bar(done * 10**6, 2000 * 10**6)
        now[0] += PAUSE_IN_FILE / 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].split() == ["15.0%", "300MB", "of", "2.00GB", "20.0MB/s", "1m25s", "left"]
    assert lines[-1].split() == ["95.0%", "1.90GB", "of", "2.00GB", "20.0MB/s", "5s", "left"]


def test_completion_knows_the_command() -> None:
    assert "prepare" in complete("mytrainer.py pre")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--clean", "--out", "shards"], "out: --clean does not read it. Leave out --out"),
        (["--clean", "texts", "--text"], "text: --clean does not read it"),
        (["fineweb10B", "--shards", "1", "--drop_copies"], "drop_copies: fetching does not read it"),
        (["fineweb10B", "--shards", "1", "--clean"], "clean: fetching does not read it"),
    ],
)
def test_options_of_another_use_of_the_command_are_refused(text, capsys, words, told) -> None:
    assert prepared(*words) == 2
    assert told in capsys.readouterr().err
