"""What `export --to hf` writes, opened by transformers: the same logits, ids, text. All models have been trained some
steps, so that no weight is what it began as."""

import json

import pytest
import torch
import transformers

from adapters.base import GenerateOptions, Prepared
from configs.compose import compose
from models.gpt2 import GPT2
from tests.contract.tiny import RUN, config, session_of
from tests.data.foreign import llama, saved
from tests.huggingface_folder import edit_json
from trainer.export.huggingface import HuggingFace
from trainer.loop import train
from trainer.run.checkpoint import save_checkpoint
from trainer.run.facts import checkpoint_contents
from trainer.run.progress import Progress
from trainer.run.restore import restore
from trainer.run.tensor_files import WEIGHTS, read_tensors

pytestmark = pytest.mark.xdist_group(
    "transformers"
)  # whose modules take a second to import, in one worker only

STEPS = ["num_iterations=3", "val_loss_every=0", "val_bytes=64", "sample_tokens=0", "learning_rate=0.01"]
MODELS = {
    "gpt2": ("gpt2", ["ema_decay=0.5", "model_cfg.vocab_size=300"]),  # padded to 384 rows
    "gpt2-plain": ("gpt2", ["model_cfg.bias=false", "model_cfg.tie_embeddings=false", "tokenizer=bpe-270"]),
    "llama": ("vanilla", ["model_cfg.n_kv_heads=2", "tokenizer=bpe-270"]),
    "llama-full": ("vanilla", ["model_cfg.bias=true", "model_cfg.tie_embeddings=false"]),
    "mixtral": ("moe", ["model_cfg.tie_embeddings=false"]),
    "glm": (
        "moe",
        ["model_cfg.gate_type=deepseek_v3", "model_cfg.top_k=2", "model_cfg.bias_update_speed=0.1"],
    ),
}
CLASSES = {
    **{"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"},
    "glm4_moe": "Glm4MoeForCausalLM",
}
TEXT = "0123 \n\n  été \u4e16\U0001f600 don't\t"


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """A run and the folder of its export."""
    import mytrainer

    name, words = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    train(*config(name, *STEPS, *words), folder / "run")
    told = ["export", "--checkpoint", folder / "run", "--to", "hf", "--output", folder / "hf"]
    assert mytrainer.main([str(word) for word in told]) == 0
    return folder / "run", folder / "hf"


@pytest.fixture(scope="module")
def opened(pair):
    run, folder = pair
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return restore(run, device="cpu"), theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_logits_are_equal(opened):
    ours, theirs, _ = opened
    assert type(theirs).__name__ == CLASSES[theirs.config.model_type]
    tokens = torch.randint(0, ours.tokenizer.vocab_size, (3, 32), generator=torch.Generator().manual_seed(0))
    hidden = ours.adapter.hidden(Prepared({"inputs": tokens}, {}))
    expected = ours.adapter.logits(hidden.states)
    assert expected.std() > 0.1
    torch.testing.assert_close(theirs(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_text_becomes_the_same_ids_and_comes_back(opened):
    ours, _, tokenizer = opened
    ids = ours.tokenizer.encode(TEXT).tolist()
    assert tokenizer(TEXT)["input_ids"] == ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == ours.tokenizer.eot
    assert tokenizer.model_max_length == 32


def test_what_is_spelled_like_the_special_token_is_text_there_too(opened):
    """And the token itself, by its id, is left out of text and ends it."""
    ours, theirs, tokenizer = opened
    eot, text = ours.tokenizer.eot, f"a{tokenizer.eos_token} b{tokenizer.eos_token}"
    ids = tokenizer(text)["input_ids"]
    assert ids == ours.tokenizer.encode(text).tolist() and eot not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text
    assert tokenizer.decode([eot, *ids, eot], skip_special_tokens=True) == text
    assert tokenizer.decode([eot, *ids]) == tokenizer.bos_token + text
    assert tokenizer.convert_tokens_to_ids(tokenizer.bos_token) == tokenizer.bos_token_id == eot
    assert tokenizer([text, text])["input_ids"] == [ids, ids]
    assert theirs.generation_config.eos_token_id == eot


def test_a_saved_tokenizer_still_splits(opened, tmp_path):
    ours, _, tokenizer = opened
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = f"a{tokenizer.eos_token}"
    assert again(text)["input_ids"] == ours.tokenizer.encode(text).tolist()


def test_it_writes_the_same_text(opened):
    ours, theirs, _ = opened
    prompt = ours.tokenizer.encode("01").tolist()
    options = GenerateOptions(max_new_tokens=12, temperature=0)
    [mine] = ours.adapter.generate([prompt], options).tokens
    found = theirs.generate(
        torch.tensor([[ours.tokenizer.eot, *prompt]]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    written = found[0, 1 + len(prompt) :].tolist()
    assert mine and written[: len(mine)] == mine and written[len(mine) :] in ([], [ours.tokenizer.eot])


def test_what_is_tied_and_what_is_padding_is_not_written(opened, pair):
    ours, theirs, _ = opened
    tensors = read_tensors(pair[1] / WEIGHTS)
    assert ("lm_head.weight" in tensors) != ours.adapter.model_cfg.tie_embeddings
    assert theirs.get_input_embeddings().weight.shape[0] == ours.adapter.model_cfg.vocab_size
    assert {p.name for p in pair[1].iterdir()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS)
    }


def test_a_run_that_begins_with_it_scores_the_same(pair, tmp_path):
    """And so it is read as it was written."""
    run, folder = pair
    cfg = restore(run, device="cpu").cfg
    back = [
        f"init_from_checkpoint={folder}",
        "eval_only=true",
        "val_bytes=64",
        "sample_tokens=0",
        "preset=none",
    ]
    score = train(*compose([*back, *RUN, f"train_seq_len={cfg.train_seq_len}"]), tmp_path / "back")
    assert score == pytest.approx(
        json.loads((run / "summary.json").read_text())["score"]["bits_per_byte"], rel=1e-6
    )


def test_half_of_the_bits(pair, tmp_path, command):
    run, folder = pair
    out, err = command(
        *(
            "export",
            "--checkpoint",
            run,
            "--to",
            "hf",
            "--output",
            tmp_path / "out",
            "--save_precision",
            "bf16",
        )
    )
    assert "bf16)" in out and "rounded to bf16" in err
    exact, rounded = (read_tensors(where / WEIGHTS) for where in (folder, tmp_path / "out"))
    for name in exact:  # what moves choices of experts by less than bf16 can tell stays
        whole = name.endswith("e_score_correction_bias")
        assert torch.equal(rounded[name], exact[name] if whole else exact[name].bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_tokenizer_from_elsewhere_goes_out_as_it_came(command, tmp_path):
    """One that begins documents with another token than ends them, and puts a blank before a text."""
    run = checkpoint_of(tmp_path / "run", "vanilla", "model_cfg.vocab_size=340")
    command("export", "--checkpoint", run, "--to", "hf", "--output", tmp_path / "theirs")
    saved(tmp_path / "theirs", llama(), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    for name in ("config.json", "generation_config.json"):
        edit_json(tmp_path / "theirs" / name, bos_token_id=1, eos_token_id=2)
    for form in ("hf", "safetensors"):
        _, err = command(
            "export", "--checkpoint", tmp_path / "theirs", "--to", form, "--output", tmp_path / form
        )
        assert ("is that token there, and ordinary characters here" in err) == (form == "hf")
    began, *back = (
        restore(tmp_path / name, device="cpu").tokenizer for name in ("theirs", "hf", "safetensors")
    )
    for found in back:
        assert (found.eot, found.ends, found.to_huggingface()) == (1, {1, 2}, began.to_huggingface())
        assert found.encode(TEXT).tolist() == began.encode(TEXT).tolist()
    ids = {"bos_token_id": 1, "eos_token_id": [2, 1]}
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()) == ids
    assert json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == began.encode(TEXT).tolist()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    said = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert "split_special_tokens" not in said and "</s> b" in tokenizer.decode(began.encode("a</s> b"))
    assert 2 in tokenizer("a</s> b")["input_ids"] and 2 not in began.encode("a</s> b"), "as the note says"


# -- what has no such form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d3pm", "mdl", "sedd", "bd3lm"])
def test_architectures_that_transformers_lacks(name):
    told = f"to: type {name} has no form.*gpt2, vanilla, mamba, moe have one. --to safetensors takes every architecture"
    with pytest.raises(ValueError, match=told):
        HuggingFace().check(*config(name))


def test_fields_that_it_lacks():
    with pytest.raises(ValueError, match="to: Llama has no counterpart of qk_norm: true. --to safetensors"):
        HuggingFace().check(*config("vanilla", "model_cfg.qk_norm=true"))


def checkpoint_of(folder, name, *words):
    """A run folder without a run."""
    save_checkpoint(folder, 1, *checkpoint_contents(session_of(name, *words), Progress(), {}))
    return folder


def test_a_model_of_an_adapters_own_is_no_model_of_the_table(command, tmp_path, monkeypatch):
    run = checkpoint_of(tmp_path / "run", "gpt2")
    monkeypatch.setattr("adapters.base.ModelAdapter.build_model", lambda *_: GPT2Lookalike(config("gpt2")[1]))
    out, err = command("export", "--checkpoint", run, "--to", "hf", "--output", tmp_path / "out", status=2)
    assert out == "" and "to: a GPT2Lookalike does not write the weights of transformers" in err


class GPT2Lookalike(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        cfg = cfg.model_copy(update={"vocab_size": 257})
        self.__dict__["inner"] = inner = GPT2(cfg)
        for name, child in inner.named_children():
            self.add_module(name, child)

    def init_weights(self, generator):
        pass


def test_it_is_said_before_anything_is_read(command, tmp_path, monkeypatch):
    run = checkpoint_of(tmp_path / "run", "mdl")
    monkeypatch.setattr("trainer.commands.export.restore", lambda *a, **k: pytest.fail("it was read"))
    out, err = command("export", "--checkpoint", run, "--to", "hf", "--output", tmp_path / "out", status=2)
    assert out == "" and "type mdl has no form" in err and not (tmp_path / "out").exists()


def test_a_tokenizer_without_such_a_form_stays_behind(command, tmp_path, monkeypatch):
    run = checkpoint_of(tmp_path / "run", "gpt2")
    monkeypatch.setattr("data.tokenizers.ByteTokenizer.to_huggingface", lambda self: None)
    out, err = command("export", "--checkpoint", run, "--to", "hf", "--output", tmp_path / "out")
    assert "tokenizer byte has no form that transformers opens, and is left out" in err
    assert "AutoModelForCausalLM" in out and "AutoTokenizer" not in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        WEIGHTS,
    }
