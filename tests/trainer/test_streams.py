"""Runs on text that streams from files: what they train on depends on the text alone, and goes on exactly."""

import gzip
import json
import os

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.tokenizers import load_tokenizer
from tests.contract.tiny import config
from tests.data.shard_files import headerless
from trainer.loaded import load
from trainer.loop import train

TEXTS = [f"document {n} says " + "so much " * (n % 9) + f"and ends {n * n}" for n in range(120)]


def lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the text whole and in pieces, and a run of four steps on the whole."""
    work = tmp_path_factory.mktemp("streams")
    (work / "whole.jsonl").write_bytes(lines(TEXTS))
    (work / "1.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[:70])) + gzip.compress(lines(TEXTS[70:90])))
    (work / "2.jsonl").write_bytes(lines(TEXTS[90:]))
    run(work / "run", f"train_files={work}/whole.jsonl")
    return work


def run(path, *words, steps=4):
    fields = ("data=jsonl", "tokenizer=bpe-270", "val_loss_every=0", "save_steps=2", "sample_tokens=0")
    return train(*config("gpt2", *fields, f"num_iterations={steps}", f"output_dir={path}", *words), path)


def weights(path):
    return load(path, device="cpu").model.state_dict()


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_files_cut_and_packed_otherwise_train_the_same_weights(work, tmp_path):
    run(tmp_path / "pieces", f"train_files={work}/[12].jsonl*")
    assert same(weights(tmp_path / "pieces"), weights(work / "run"))
    with open(work / "other.jsonl", "wb") as file:
        file.write(lines([*TEXTS[:-1], "another document altogether"]))
    run(tmp_path / "other", f"train_files={work}/other.jsonl")
    assert not same(weights(tmp_path / "other"), weights(work / "run"))


def test_a_run_goes_on_exactly_and_not_on_other_text(work, tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_bytes(lines(TEXTS))
    os.utime(text, (1e9, 1e9))
    run(tmp_path / "run", f"train_files={text}", "learning_rate=0.001", "scheduler=constant", steps=2)
    run(tmp_path / "long", f"train_files={text}", "learning_rate=0.001", "scheduler=constant")
    words = ("learning_rate=0.001", "scheduler=constant", f"resume={tmp_path}/run")
    run(tmp_path / "run", f"train_files={text}", *words)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "long"))
    text.write_bytes(lines(TEXTS[::-1]))
    with pytest.raises((ValueError, DataError), match="not what the run was trained on|Restore the data"):
        run(tmp_path / "run", f"train_files={text}", *words, steps=6)


def shards_of(work, folder, texts=TEXTS):
    """Shards of the text in the ids of the run on it, cut anywhere; the words of a run on them."""
    tokenizer = load_tokenizer(work / "run/tokenizer.json")
    ids = np.concatenate([np.append(tokenizer.encode(text), tokenizer.eot) for text in texts])
    for number, start in enumerate(range(0, len(ids), 500)):
        path = headerless(folder / f"text_{number:03}.bin", ids[start : start + 500])
        os.utime(path, (1e9, 1e9))
    return "data=bin", f"train_files={folder}/*.bin", f"tokenizer={work}/run/tokenizer.json"


def test_shards_of_a_text_train_its_weights_and_go_on_exactly(work, tmp_path):
    shards = shards_of(work, tmp_path / "shards")
    run(tmp_path / "whole", *shards)
    assert same(weights(tmp_path / "whole"), weights(work / "run"))
    scores = [
        json.loads((path / "summary.json").read_text())["score"]
        for path in (tmp_path / "whole", work / "run")
    ]
    assert scores[0] == scores[1]
    words = ("learning_rate=0.001", "scheduler=constant")
    run(tmp_path / "long", *shards, *words)
    run(tmp_path / "cut", *shards, *words, steps=2)
    run(tmp_path / "cut", *shards, *words, f"resume={tmp_path}/cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "long"))


def test_a_shard_that_changes_ends_the_run_with_its_name(work, tmp_path, monkeypatch):
    shards = shards_of(work, tmp_path / "shards")
    path = tmp_path / "shards/text_000.bin"
    from trainer.loop import Trainer

    save = Trainer._save

    def touch(self):
        save(self)
        os.utime(path, (2e9, 2e9))

    monkeypatch.setattr(Trainer, "_save", touch)
    with pytest.raises(DataError, match=r"text_000.bin' has changed since it was first read. Restore it"):
        run(tmp_path / "run", *shards, steps=40)
    os.utime(path, (1e9, 1e9))
    monkeypatch.undo()
    run(tmp_path / "run", *shards, f"resume={tmp_path}/run", steps=6)
