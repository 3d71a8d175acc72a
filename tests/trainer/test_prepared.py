"""Runs on a text and on what `prepare` made of it are the same run."""

import json

import pytest

from data.cache import cache_root
from data.prepare import Wanted, prepare
from tests.contract.tiny import config
from tests.trainer.test_streams import TEXTS, lines, same, weights
from trainer.loop import train

TEXT = {
    "jsonl": ("data=jsonl", "train_files={}/text.jsonl"),
    "text": ("data=text", "input_file={}/notes"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("prepared")
    (work / "text.jsonl").write_bytes(lines(TEXTS))
    (work / "notes").mkdir()
    for number, text in enumerate(TEXTS):
        (work / f"notes/{number}.txt").write_text(text)
    return work


def run(model, path, *words, steps=4):
    fields = ("val_loss_every=2", "save_steps=2", "sample_tokens=0", f"num_iterations={steps}")
    train(*config(model, *fields, f"output_dir={path}", *words), path)
    losses = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    told = ("step", "loss", "val_bits_per_byte", "bytes")
    summary = json.loads((path / "summary.json").read_text())
    return [[line.get(name) for name in told] for line in losses], summary["score"], summary["yardsticks"]


@pytest.mark.parametrize("source", TEXT)
@pytest.mark.parametrize("model", ["gpt2", "megabyte"])
def test_a_run_on_shards_is_that_on_the_text(work, tmp_path, source, model):
    text = [word.format(work) for word in TEXT[source]]
    cfg, _ = config("gpt2", *text, "tokenizer=bpe-270")
    prepare(cfg, Wanted(tmp_path / "shards", 2, shard_tokens=1000), cache_root())
    tokenizer = f"tokenizer={'byte' if model == 'megabyte' else 'bpe-270'}"
    expected = run(model, tmp_path / "text", *text, tokenizer)
    found = run(model, tmp_path / "run", "data=bin", f"input_file={tmp_path}/shards", "tokenizer=auto")
    assert found == expected
    assert same(weights(tmp_path / "run"), weights(tmp_path / "text"))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("run", "text")]
    told = [[manifest["data"][name] for name in ("fingerprint", "content")] for manifest in manifests]
    assert told[0] == told[1]


def test_a_run_on_the_text_goes_on_with_its_shards(work, tmp_path):
    text = [word.format(work) for word in TEXT["jsonl"]]
    cfg, _ = config("gpt2", *text, "tokenizer=bpe-270")
    prepare(cfg, Wanted(tmp_path / "shards", shard_tokens=1000), cache_root())
    words = ("learning_rate=0.001", "scheduler=constant", "tokenizer=bpe-270")
    run("gpt2", tmp_path / "long", *text, *words)
    run("gpt2", tmp_path / "cut", *text, *words, steps=2)
    shards = ("data=bin", f"input_file={tmp_path}/shards", *words[:2], "tokenizer=auto")
    run("gpt2", tmp_path / "cut", *shards, f"resume={tmp_path}/cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "long"))
    # Shards of another tokenizer hold the same text, and the run has its own.
    cfg, _ = config("gpt2", *text, "tokenizer=bpe-280")
    prepare(cfg, Wanted(tmp_path / "others"), cache_root())
    run("gpt2", tmp_path / "cut2", *text, *words, steps=2)
    others = ("data=bin", f"input_file={tmp_path}/others", *words[:2], "tokenizer=auto")
    run("gpt2", tmp_path / "cut2", *others, f"resume={tmp_path}/cut2")
    assert same(weights(tmp_path / "cut2"), weights(tmp_path / "long"))
