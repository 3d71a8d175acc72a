"""Runs on text that streams from files: what they train on depends on the text alone, and goes on exactly."""

import gzip
import json
import os

import numpy as np
import pytest
import torch

from adapters.base import Prepared
from data import load_dataset
from data.errors import DataError
from data.rows import TrainingRows
from data.tokenizers import ByteTokenizer, load_tokenizer
from tests.contract.tiny import config
from tests.data.shard_files import headerless
from trainer.batching import StepLoader, plan_batch
from trainer.errors import TrainingError
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
    with pytest.raises(TrainingError, match=r"text_000.bin' has changed since it was first read. Restore it"):
        run(tmp_path / "run", *shards, steps=40)
    os.utime(path, (1e9, 1e9))
    monkeypatch.undo()
    run(tmp_path / "run", *shards, f"resume={tmp_path}/run", steps=6)


# -- the end of the data -----------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Three short documents in two shards, 67 tokens with their starts, and the words of runs on them."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path / "cache"))
    ByteTokenizer().save(tmp_path / "bytes.json")
    for name, texts in {"t_1": [b"a" * 20, b"b" * 30], "t_2": [b"c" * 14], "v": [b"d" * 9]}.items():
        path = headerless(tmp_path / f"few/{name}.bin", np.concatenate([[256, *text] for text in texts]))
        os.utime(path, (1e9, 1e9))
    files = (f"train_files={tmp_path}/few/t_*.bin", f"val_files={tmp_path}/few/v.bin")
    return ("data=bin", *files, f"tokenizer={tmp_path}/bytes.json", f"shards_tokenizer={tmp_path}/bytes.json")


class Whole:
    """Keeps the rows that it is given."""

    def prepare(self, batch, ctx):
        tensors = {"tokens": torch.from_numpy(batch.tokens), "rows": torch.from_numpy(batch.rows)}
        return Prepared(tensors, {"targets": float(batch.weights.sum())})


@pytest.mark.parametrize("seq_len", [10, 32])  # of the longer ones there are fewer in a pass than processes
def test_three_passes_over_three_documents_by_four_processes(few, seq_len):
    """Every process has rows in every step; each pass is the whole text; and one goes on in the second as if whole."""
    cfg, _ = config("gpt2", *few, "global_batch_size=4", f"train_seq_len={seq_len}")
    rows = TrainingRows(load_dataset(cfg).train, 256, seq_len, seed=cfg.seed)
    assert rows.rows_per_epoch == (67 - 1) // seq_len
    steps = -(-3 * rows.rows_per_epoch // 4)
    plan = plan_batch(4, None, None, 4, seq_len)

    def seen(first, position):
        loaders = [StepLoader(rows, Whole(), plan, rank, cfg.seed) for rank in range(4)]
        for loader in loaders:
            loader.start_at(first, position)
        by_rank = [[batch.micro[0].tensors for batch in loader.steps(first, steps)] for loader in loaders]
        assert {len(batches) for batches in by_rank} == {steps - first}, "all end"
        return [tensors for batches in zip(*by_rank, strict=True) for tensors in batches], loaders[0]

    whole, loader = seen(0, 0)
    assert [int(t["rows"][0]) for t in whole] == list(range(4 * steps))
    for epoch in range(3):
        read = whole[epoch * rows.rows_per_epoch : (epoch + 1) * rows.rows_per_epoch]
        targets = torch.cat([t["tokens"][0, 1:] for t in read]).tolist()
        dropped = 66 - len(targets)
        assert 0 <= dropped < seq_len and len(targets) == rows.rows_per_epoch * seq_len
        missing = [size - targets.count(ord(letter)) for letter, size in {"a": 20, "b": 30, "c": 14}.items()]
        assert all(0 <= count <= dropped for count in missing)
    second = next(step for step in range(steps) if 4 * step > rows.rows_per_epoch)
    again, _ = seen(second, loader.position(second))
    assert len(again) == len(whole) - 4 * second
    both = zip(again, whole[4 * second :], strict=True)
    assert all(torch.equal(one["tokens"], other["tokens"]) for one, other in both)


def test_a_run_goes_on_in_its_second_pass_to_its_third(few, tmp_path):
    words = (*few, "train_seq_len=10", "global_batch_size=4", "val_loss_every=0", "scheduler=constant")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*config("gpt2", *words, "num_epochs=3"), whole)
    train(*config("gpt2", *words, "num_iterations=2"), parts)  # 8 of the 6 rows of a pass
    train(*config("gpt2", *words, "num_epochs=3", f"resume={parts}"), parts)
    assert same(weights(whole), weights(parts))


def test_rows_longer_than_the_text_are_refused_in_one_message(few, tmp_path):
    with pytest.raises(
        DataError, match="too short for one row: it has 67 tokens .*largest train_seq_len for it is 66"
    ):
        train(*config("gpt2", *few, "train_seq_len=70", "model_cfg.n_ctx=128"), tmp_path / "run")
