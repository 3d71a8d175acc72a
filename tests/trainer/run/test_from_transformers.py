"""Folders that `transformers` itself wrote: equal logits, equal scores, and runs that go on from there. No download."""

import json
import shutil

import pytest
import torch
import transformers

from adapters.base import Prepared
from configs import compose
from configs.grammar import word
from data.scored import text_to_score
from tests.data.foreign import byte_level, llama, saved
from trainer.commands.launch import config_text
from trainer.loop import train
from trainer.run.restore import restore

pytestmark = pytest.mark.xdist_group(
    "transformers"
)  # whose modules take a second to import, in one worker only

TEXTS = ["the cat sat on a mat. " * 9, "rain fell  softly\n", "def f(x):\n    return x + 1\n" * 3]
PLAIN = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = {**PLAIN, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    **PLAIN,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA |= {"vocab_size": 340, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
MOE = {**LLAMA, "num_key_value_heads": 2, "experts_implementation": "eager"}
# name -> (class of their config, what it is made with, how it is saved)
FOLDERS = {
    "gpt2-sharded-untied": (
        transformers.GPT2Config, {**GPT2, "tie_word_embeddings": False}, {"max_shard_size": "40KB"}
    ),
    "gpt2-bf16": (transformers.GPT2Config, {**GPT2, "dtype": "bfloat16"}, {}),
    "llama-grouped": (transformers.LlamaConfig, {**LLAMA, "num_key_value_heads": 2, "rope_theta": 500.0}, {}),
    "llama-bias-tied": (
        transformers.LlamaConfig,
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "dtype": "float16"},
        {},
    ),
    "mixtral-llama-sharded": (
        transformers.MixtralConfig, {**MOE, "num_local_experts": 4, "tie_word_embeddings": True},
        {"max_shard_size": "40KB"},
    ),
    "glm-llama-stacked": (
        transformers.Glm4MoeConfig,
        {
            **{**MOE, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"partial_rotary_factor": 1.0, "routed_scaling_factor": 1.5},
        },
        {"save_original_format": False},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FOLDERS)
def path(request, tmp_path_factory):
    config_class, entries, options = FOLDERS[request.param]
    config, folder = config_class(**entries), tmp_path_factory.mktemp("hf") / request.param
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # zero biases and gains of one would hide a mistake
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2, generator=generator)
    model.save_pretrained(folder, **options)
    if "llama" in request.param:
        return saved(folder, llama(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    return saved(folder, byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"})


@pytest.fixture(scope="module")
def theirs(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(path):
    return restore(path, device="cpu", changes={"mixed_precision": "no"}, note=lambda text: None)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in enumerate(TEXTS):
        (folder / f"{name}.txt").write_text(text)
    return folder


def nats_of(model, ids, window=32):
    """-log p of each id behind the first, in windows that begin with the last id of the one before."""
    parts = []
    for first in range(0, len(ids) - 1, window):
        row = torch.tensor([ids[first : first + window + 1]])
        with torch.no_grad():
            logits = model(row[:, :-1]).logits.double()
        parts.append(torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="none"))
    return torch.cat(parts)


def expected(theirs, tokenizer):
    """(nats of text, nats of ends, tokens) of all documents under transformers: start token, document, end."""
    found = [
        nats_of(theirs, [tokenizer.eot, *tokenizer.encode(text).tolist(), tokenizer.eot]) for text in TEXTS
    ]
    return sum(n[:-1].sum() for n in found), sum(n[-1] for n in found), sum(len(n) - 1 for n in found)


def test_logits_are_equal(theirs, ours):
    tokens = torch.randint(0, 290, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        prepared = Prepared({"inputs": tokens}, {})
        mine = ours.adapter.model.logits(ours.adapter.hidden(prepared).states)
    torch.testing.assert_close(mine, theirs(tokens).logits, rtol=0, atol=1e-5)


def test_documents_score_as_under_transformers(theirs, ours, texts):
    nats, ends, tokens = expected(theirs, ours.tokenizer)
    asked = ours.cfg.model_copy(update={"data": "text", "input_file": str(texts)})
    text = text_to_score(None, asked, ours.tokenizer)
    assert (
        text.whole
        and text.overlap is None
        and "what these weights were trained on is not known" in text.notes[0]
    )
    score = ours.score(ours.rows(text.store))
    assert (score.documents, score.tokens, score.context_tokens) == (3, tokens, 32)
    assert score.nats_per_token * tokens == pytest.approx(float(nats), rel=1e-6)
    assert score.end_nats_per_document * 3 == pytest.approx(float(ends), rel=1e-6)
    assert score.bytes == sum(len(t) for t in TEXTS)


RUN = ["device=cpu", "mixed_precision=no", "train_seq_len=32", "global_batch_size=2", "sample_tokens=3"]
RUN += ["optimizer=adamw", "learning_rate=3e-3", "val_loss_every=0", "logging_steps=1", "save_minutes=null"]


@pytest.fixture
def run(path, texts, tmp_path):
    def begin(*words, folder=tmp_path / "run", source=("init_from_checkpoint", path)):
        text = [f"input_file={texts}", word("val_files", texts / "0.txt")]
        given = [word(*source), *text, *RUN, *words]
        return train(*compose(given, notify=lambda text: None), folder, config_text)

    return begin


@pytest.mark.parametrize("path", ["gpt2-sharded-untied", "llama-bias-tied"], indirect=True)
def test_a_run_scores_the_same_before_its_first_step(theirs, ours, run):
    ids = [ours.tokenizer.eot, *ours.tokenizer.encode(TEXTS[0]).tolist(), ours.tokenizer.eot]
    nats = float(nats_of(theirs, ids)[:-1].sum())
    assert run("eval_only=true") == pytest.approx(
        nats / torch.log(torch.tensor(2.0)) / len(TEXTS[0]), rel=1e-6
    )


@pytest.mark.parametrize("path", ["gpt2-sharded-untied", "llama-grouped"], indirect=True)
def test_a_run_goes_on_training_and_is_gone_on_with_when_the_folder_is_gone(run, tmp_path, path, ours):
    whole = run("num_iterations=6", folder=tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    first = tmp_path / "first"
    run("num_iterations=6", "save_steps=3", folder=first)
    for later in ("checkpoint-6", "final_model"):
        shutil.rmtree(first / later)
    (first / "summary.json").unlink()
    gone = path.rename(path.with_name("gone"))
    try:
        again = run("num_iterations=6", folder=first, source=("resume", first))
        assert restore(first, device="cpu").tokenizer.digest == ours.tokenizer.digest
    finally:
        gone.rename(path)
    assert again == whole
