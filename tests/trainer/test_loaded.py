"""What `load` takes and refuses; what it shows of a model stands in tests/contract/test_loaded.py."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from adapters.base import ModelAdapter
from configs.messages import ConfigError
from data.errors import DataError
from tests.contract.tiny import config
from trainer.loaded import load
from trainer.loop import train
from trainer.run.checkpoint import link_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a run whose text is gone: two checkpoints, an average, no best_model/."""
    work = tmp_path_factory.mktemp("work")
    text = work / "text.txt"
    text.write_text("Was lange währt, wird endlich gut. " * 100, encoding="utf-8")
    words = ["data=text", f"input_file={text}", "tokenizer=bpe-270", "ema_decay=0.5", "save_steps=1"]
    train(
        *config("gpt2", *words, "num_iterations=2", "val_loss_every=0", "save_total_limit=null"), work / "run"
    )
    text.unlink()
    return work


@pytest.fixture(scope="module")
def loaded(work):
    return load(work / "run", device="cpu")


def test_a_run_is_found_however_its_path_is_written(work, loaded, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))
    expected = loaded.hidden("endlich")
    for path in ("run", "~/run", work / "run", str(work / "run" / "checkpoint-2"), "run/final_model"):
        assert torch.equal(load(path, device="cpu").hidden("endlich"), expected)
    assert not torch.equal(load("run/checkpoint-1", device="cpu").hidden("endlich"), expected)
    assert torch.equal(load("run", device=torch.device("cpu")).hidden("endlich"), expected)


def test_it_says_what_it_is(loaded, work):
    assert re.match(
        rf"Loaded\(gpt2, [\d,]+ parameters, ema weights of '{work}/run/checkpoint-2', tokenizer bpe-270, cpu, "
        rf"precision no\)",
        repr(loaded),
    )
    assert (loaded.path, loaded.weights) == (work / "run" / "checkpoint-2", "ema")
    assert loaded.model is loaded.adapter.model and loaded.tokenizer.vocab_size == 270
    assert (loaded.config.type, loaded.model_cfg.d_model, loaded.device.type) == ("gpt2", 64, "cpu")
    assert not loaded.model.training and all(p.requires_grad for p in loaded.model.parameters())
    score = loaded.score("endlich")
    assert repr(score).startswith(
        f"TextScore({score.total:.2f} nats, {score.bits_per_byte:.3f} bits per byte: "
    )


def test_the_best_model_is_one_that_the_run_kept(work):
    with pytest.raises(ValueError, match="run keeps no best_model/. .*save_best_model=true"):
        load(work / "run", best=True, device="cpu")
    link_folder(work / "run" / "checkpoint-1", work / "run" / "best_model")
    best, first = (
        load(work / "run", best=True, device="cpu"),
        load(work / "run" / "checkpoint-1", device="cpu"),
    )
    assert best.path == work / "run" / "best_model"
    assert torch.equal(best.hidden("gut"), first.hidden("gut"))


def test_fields_that_are_no_architecture_may_be_others(work, loaded):
    changed = load(work / "run", device="cpu", overrides=["model_cfg.dropout=0.5"], val_seq_len=4)
    assert (changed.model_cfg.dropout, loaded.model_cfg.dropout) == (0.5, 0.0)
    text = "Was lange währt, wird gut."
    short, long = changed.score(text), loaded.score(text)
    assert (short.score.context_tokens, long.score.context_tokens) == (4, 32)
    same = np.isclose(short.nats, long.nats)
    assert same[:4].all() and not same[4:].all(), "the first window is the same"
    assert torch.equal(changed.hidden(text), loaded.hidden(text)), "nothing is dropped where one looks"


def test_the_number_format_may_be_another(work, loaded):
    rough = load(work / "run", device="cpu", mixed_precision="bf16")
    assert (rough.precision, loaded.precision) == ("bf16", "no")
    here, there = rough.logits("endlich"), loaded.logits("endlich")
    assert here.dtype == torch.float32 and 0 < (here - there).abs().max() < 0.05 * there.abs().max()
    assert rough.score("endlich").total == pytest.approx(loaded.score("endlich").total, rel=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "runn"}, "no such checkpoint or run folder: .*runn. In .*: run"),
        ({"path": "runn", "best": True}, "no such checkpoint or run folder: .*runn"),
        ({"path": "."}, "holds no weights that are read"),
        ({"weights": "EMMA"}, "weights: 'EMMA' is not one of ema, raw"),
        ({"device": "gpu"}, "device: 'gpu' is not one of auto, cpu, cuda"),
        ({"val_seq_len": 0}, "val_seq_len: must satisfy 1 <= val_seq_len, got 0"),
        ({"val_seq_len": "long"}, "val_seq_len: expected int or null, got 'long'"),
        ({"mixed_precision": "fp8"}, "mixed_precision: 'fp8' is not one of auto, no, bf16, fp16"),
        ({"overrides": ["model_cfg.d_model=32"]}, "d_model is fixed with the architecture. Free: dropout"),
        ({"best": "no"}, "best: must be True or False, got 'no'"),
        ({"overrides": "model_cfg.dropout=0"}, "overrides: a list of words is meant, got the text"),
        ({"overrides": ["learning_rate=1"]}, "'learning_rate=1' is not model_cfg.<field>=<value>"),
    ],
)
def test_what_cannot_be_loaded_is_said(work, monkeypatch, given, message):
    monkeypatch.chdir(work)
    with pytest.raises((ValueError, ConfigError), match=message):
        load(**{"path": "run", "device": "cpu", **given})


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda m: m.score(""), "the text has no tokens, so that there is nothing to score"),
        (lambda m: m.score(["a", "b"]), r"text: must be str or bytes, got list \(\['a', 'b'\]\)"),
        (lambda m: m.generate(["a", None]), r"text: must be str or bytes, got NoneType \(None\)"),
        (lambda m: m.score("\ud800"), "lone surrogate at character 0"),
        (lambda m: m.hidden("ab", layer=2), "layer: must be 0 to 1, or -2 to -1 from the last, got 2"),
        (lambda m: m.hidden("ab", layer="h.0"), "layer: must be 0 to 1, .* got 'h.0'"),
        (lambda m: m.hidden("☃" * 20), "61 tokens exceeds n_ctx .32.: positions are learned"),
        (lambda m: m.logits("☃" * 20), "61 tokens exceeds n_ctx .32.: positions are learned"),
        (lambda m: m.generate("a", temprature=1), "generate: 'temprature' is not one of .*'temperature'"),
        (lambda m: m.generate("a", top_p=2), "top_p: must satisfy 0 < top_p <= 1, got 2"),
        (lambda m: m.generate("a", max_new_tokens=0), "max_new_tokens: must be at least 1, got 0"),
        (lambda m: m.generate("a", max_new_tokens="x"), "max_new_tokens: must be of type int, got 'x'"),
        (lambda m: m.generate("a", top_k=True), "top_k: must be of type int, got True"),
        (lambda m: m.generate("a", stop_ids=[999]), "stop_ids: 999 is no token: ids are 0 to 269"),
        (lambda m: m.generate(None), "prompts: a text or a list of texts is meant, got None"),
        (lambda m: m.hidden("ab", layer=True), "layer: must be 0 to 1, .* got True"),
        (lambda m: m.hidden("ab", layer=1.0), "layer: must be 0 to 1, .* got 1.0"),
        (lambda m: m.generate("a", steps=4), "steps and by_confidence are for models that draw many"),
    ],
)
def test_what_cannot_be_looked_at_is_said(loaded, look, message):
    with pytest.raises((ValueError, DataError), match=message):
        look(loaded)
    assert not any(module._forward_hooks for module in loaded.model.modules())


def test_a_block_without_a_row_for_each_token_is_not_shown(loaded):
    last = loaded.model.h[-1]
    doubled = last.register_forward_hook(lambda module, args, output: output.repeat(1, 2, 1))
    try:
        with pytest.raises(ValueError, match=r"block h.1 gives \(1, 6, 64\) for 3 tokens"):
            loaded.hidden(b"\xff\xfe", layer=-1)
    finally:
        doubled.remove()


def test_an_adapter_that_does_not_read_clean_text_says_so(loaded, monkeypatch):
    monkeypatch.setattr(type(loaded.adapter), "clean_states", ModelAdapter.clean_states)
    with pytest.raises(
        ValueError, match="DefaultModelAdapter does not say what its network makes of clean text"
    ):
        loaded.logits("gut")


def test_the_start_of_a_document_can_be_looked_at(loaded):
    assert loaded.ids("").tolist() == [loaded.tokenizer.eot]
    assert loaded.hidden("").shape == (1, 64) and loaded.logits("").shape == (1, 270)
    first = loaded.score("gut")
    assert first.nats[0] == pytest.approx(-float(loaded.logits("").log_softmax(1)[0, first.ids[0]]), abs=1e-5)


def test_threads_get_the_states_of_their_own_text(loaded, monkeypatch):
    """A forward hook hears every thread's pass through the network."""
    expected = {text: loaded.hidden(text, layer=0) for text in ("endlich", "wird gut")}
    clean_states, inside = type(loaded.adapter).clean_states, []

    def slow(adapter, batch, ctx):
        inside.append(batch)
        assert len(inside) == 1
        time.sleep(0.01)
        inside.clear()
        return clean_states(adapter, batch, ctx)

    monkeypatch.setattr(type(loaded.adapter), "clean_states", slow)
    with ThreadPoolExecutor(2) as pool:
        texts = [*expected] * 5
        for text, found in zip(texts, pool.map(lambda t: loaded.hidden(t, layer=0), texts), strict=True):
            assert torch.equal(found, expected[text])


def test_many_prompts_are_continued_at_once(loaded):
    texts = loaded.generate(["Was", b"wird", ""], max_new_tokens=5, stop_at_document_end=False)
    assert len(texts) == 3 and all(isinstance(text, str) and text for text in texts)
    assert loaded.generate([], max_new_tokens=5) == []
    assert loaded.generate("Was", max_new_tokens=5, stop_at_document_end=False) == texts[:1]
