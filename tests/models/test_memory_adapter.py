"""A pretrained base under adapters, against the model of transformers that it is."""

import json

import pytest
import torch

from adapters import build_adapter
from adapters.base import GenerateOptions, weighted_loss
from adapters.lora import attach, merge
from adapters.memory import PretrainedAdapter
from configs.compose import compose
from configs.messages import ConfigError
from data.cache import file_digest
from models.layers.recompute import recomputing
from models.memory.pretrained import model_digest
from tests.contract.tiny import batch_of, context
from tests.pretrained import base_config, base_of, save_base

pytestmark = pytest.mark.xdist_group("transformers")

KINDS = ("gpt2", "qwen2", pytest.param("llama", marks=pytest.mark.slow))
IDS = torch.arange(24).view(2, 12) * 7 % 290


def configured(base, *more):
    words = ["preset=none", "data=synthetic", "train_seq_len=32", "warmup_ratio=0", "lora_rank=2"]
    named = [] if base is None else [f"model_cfg.base_model_name={base}"]
    return compose(["--hydra_model_cfg=configs/memory_adapter.yaml", *words, *named, *more], notify=print)


def adapter_on(base, *more, device="cpu", b_std=0.0):
    """Frozen, with adapters and numbers in B, unless `more` says otherwise."""
    cfg, model_cfg = configured(base, *more)
    adapter = build_adapter(cfg, model_cfg, PretrainedAdapter.own_tokenizer(model_cfg), device)
    if cfg.use_lora:
        attach(adapter, cfg, base="")
        for i, (name, p) in enumerate(adapter.named_model_parameters()):
            if "lora_B" in name and b_std:
                torch.nn.init.normal_(p, std=b_std, generator=torch.Generator().manual_seed(i))
    return adapter.eval()


def theirs_of(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base).eval()


def logits(adapter, *args, **kwargs):
    with torch.no_grad():
        return adapter.model.logits(adapter.model(*args, **kwargs))


def backward(adapter, tokens=None):
    batch = batch_of(torch.randint(0, 290, (2, 33), generator=torch.Generator().manual_seed(1)).numpy())
    prepared = adapter.prepare(batch, context(2))
    torch.manual_seed(0)
    output = adapter(prepared)
    weighted_loss(output.terms, prepared.denominators).backward()
    return {n: p.grad for n, p in adapter.named_model_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_to_the_bit(kind):
    base = base_of(kind)
    adapter = adapter_on(base)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]  # without one another product is taken
    with torch.no_grad():
        expected = theirs_of(base)(IDS, attention_mask=mask).logits
    assert torch.equal(logits(adapter, IDS), expected)
    expected_targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    assert {target.path.rpartition(".")[2] for target in adapter.adapted} == set(expected_targets)


@pytest.mark.parametrize(
    "attention",
    ["use_flash_attention=true", pytest.param("use_flash_attention=false", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_packed_row_are_as_if_alone(kind, attention):
    adapter = adapter_on(base_of(kind), f"model_cfg.{attention}", b_std=0.3)
    lengths = (5, 1, 6)
    doc_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, 12)
    packed = logits(adapter, IDS, doc_ids=doc_ids)
    alone = torch.cat([logits(adapter, piece) for piece in IDS.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed[:, 5:], logits(adapter, IDS)[:, 5:], atol=1e-2), "documents matter"
    with torch.no_grad():  # and the model of transformers says the same of each
        merge(adapter)
        adapter.model.eval()
        torch.testing.assert_close(logits(adapter, IDS, doc_ids=doc_ids), packed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_many_prompts_is_that_of_each_alone(kind):
    adapter = adapter_on(base_of(kind), b_std=0.3).double()
    cache, pieces = adapter.model.init_cache(2), []
    for piece in IDS.split([4, 1, 7], 1):
        pieces.append(logits(adapter, piece, cache=cache))
    # Norms of Llama are in fp32 whatever the model.
    torch.testing.assert_close(torch.cat(pieces, 1), logits(adapter, IDS), rtol=1e-5, atol=1e-5)
    prompts = [[1, 2, 3], [], [5] * 9]
    options = GenerateOptions(max_new_tokens=8, temperature=0.0, stop_at_document_end=False)
    found = adapter.generate(prompts, options).tokens
    assert found == [adapter.generate([prompt], options).tokens[0] for prompt in prompts]
    plain = GenerateOptions(max_new_tokens=8, temperature=0.0, stop_at_document_end=False, use_cache=False)
    assert found == adapter.generate(prompts, plain).tokens


def test_a_frozen_base_has_no_gradients_and_draws_no_dropout():
    base = base_of("gpt2")
    drops = json.loads((base / "config.json").read_text()) | dict.fromkeys(("resid_pdrop", "embd_pdrop"), 0.5)
    adapter = adapter_on(base, "lora_dropout=0", b_std=0.3)
    for module in adapter.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = drops["resid_pdrop"]
    still = logits(adapter, IDS)
    adapter.train()
    assert torch.equal(logits(adapter, IDS), still)
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    gradients = backward(adapter)
    assert gradients and all("lora_" in name for name in gradients)
    assert {n for n, p in adapter.named_model_parameters() if p.requires_grad} == set(gradients)
    assert set(adapter.trained_state()) == set(gradients), "the base is in no checkpoint"
    merge(adapter)
    assert not any(p.requires_grad for p in adapter.parameters()), "nor is it trained when they are added up"
    assert any(not torch.equal(before[n], value) for n, value in adapter.model.state_dict().items())
    trained = adapter_on(base, "use_lora=false", "model_cfg.freeze_base_model=false").train()
    for module in trained.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    assert not torch.equal(logits(trained, IDS), logits(trained, IDS))
    assert len(trained.trained_state()) == len(trained.model.state_dict())


def test_dropout_of_adapters_is_drawn_beside_a_frozen_base():
    adapter = adapter_on(base_of("qwen2"), "lora_dropout=0.5", b_std=0.5)
    assert torch.equal(logits(adapter, IDS), logits(adapter, IDS))
    adapter.train()
    assert not torch.equal(logits(adapter, IDS), logits(adapter, IDS))


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_blocks_of_a_frozen_base_changes_no_gradient(kind):
    adapter = adapter_on(base_of(kind), "lora_dropout=0.1", b_std=0.3).train()
    expected = {name: gradient.clone() for name, gradient in backward(adapter).items()}
    adapter.zero_grad(set_to_none=True)
    calls = 0
    for path in adapter.blocks():
        block = adapter.model.get_submodule(path)
        block.forward = recomputing(block)

        def count(*args):
            nonlocal calls
            calls += 1

        next(m for m in block.modules() if m is not block).register_forward_hook(count)
    found = backward(adapter)
    assert calls == 2 * len(adapter.blocks()), "each runs again in the backward"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_added_up_they_say_the_same(kind):
    adapter = adapter_on(base_of(kind), "lora_targets=all-linear", b_std=0.3)
    beside = logits(adapter, IDS)
    merge(adapter)
    assert not any("lora_" in name for name in adapter.model.state_dict())
    torch.testing.assert_close(logits(adapter, IDS), beside, rtol=1e-4, atol=1e-4)
    assert (beside - logits(adapter_on(base_of(kind)), IDS)).abs().max() > 0.1


def test_counts_of_qwen_by_its_config_alone(tmp_path):
    """Without weights: 28 layers of width 1536, two heads of keys; 2,179,072 numbers in adapters of rank 16."""
    config = base_config(
        "qwen2",
        151936,
        hidden_size=1536,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        intermediate_size=8960,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    save_base(tmp_path, "qwen2")  # for its tokenizer
    config.save_pretrained(tmp_path)
    adapter = adapter_on(tmp_path, "lora_rank=16", "lora_targets=[q_proj, v_proj]", device="meta")
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert trained == 2_179_072 and adapter.parameter_count - trained == 1_543_714_304
    assert adapter.width == 1536 and adapter.model_cfg.vocab_size == 151936
    plan, cost = adapter.flops(512), adapter.cost(512)
    products = (
        1_543_714_304 - 28 * (2 * 1536 + 1536 + 2 * 256) - 1536
    )  # all but norms and biases; the head once
    assert plan.weights == products
    assert plan.training_per_token - cost.training_per_token == 2 * products - 6 * trained


def test_a_digest_is_of_weights_and_config_and_not_of_the_place(tmp_path):
    base = base_of("gpt2")
    again, other = save_base(tmp_path / "again"), save_base(tmp_path / "other", seed=1)
    assert (
        model_digest(base, file_digest)
        == model_digest(again, file_digest)
        != model_digest(other, file_digest)
    )
    assert model_digest(again, None) == model_digest(other, None)
    wider = save_base(tmp_path / "wider", n_positions=64)
    assert model_digest(again, None) != model_digest(wider, None)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model_cfg.d_model=128"], r"model_cfg.d_model \(128\) must be that of .*, 64"),
        (["model_cfg.n_layers=3"], r"model_cfg.n_layers \(3\) must be that of .*, 2"),
        (["model_cfg.n_heads=8"], r"model_cfg.n_heads \(8\) must be that of .*, 4"),
        (["model_cfg.vocab_size=400"], r"model_cfg.vocab_size \(400\) must be that of .*, 300"),
        (
            ["train_seq_len=256"],
            r"train_seq_len \(256\) must not exceed the 128 positions .*train_seq_len=128",
        ),
        (["val_seq_len=129"], r"val_seq_len \(129\) must not exceed the 128"),
        (["use_lora=false"], r"freeze_base_model leaves nothing to be trained. Set use_lora=true"),
        (["model_cfg.freeze_base_model=false"], r"use_lora leaves the base as it is"),
        (["model_cfg.base_model_revision=main"], r"base_model_revision \(main\) is for names"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        configured(base_of("gpt2"), *words)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0|cannot read"),
        ({"hidden_size": "a"}, "cannot read|does not say hidden_size"),
        ({"hidden_act": "foo"}, "cannot load .*KeyError: 'foo'"),
        (None, "cannot load .*SafetensorError"),
    ],
    ids=["no heads", "no number", "no function", "cut off"],
)
def test_a_damaged_base_is_told_by_name(tmp_path, damage, told):
    base = save_base(tmp_path / "base", "qwen2")
    if damage is None:
        weights = base / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        entries = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(entries | damage))
    with pytest.raises(ValueError, match=told):
        adapter_on(base)


def test_sizes_that_are_the_bases_are_taken_and_presets_set_none():
    _, model_cfg = configured(base_of("gpt2"), "model_cfg.d_model=64", "model_cfg.n_layers=2", "preset=nano")
    assert (model_cfg.d_model, model_cfg.n_layers, model_cfg.n_heads) == (64, 2, None)
    full = model_cfg.completed()
    assert (full.d_model, full.n_layers, full.n_heads, full.vocab_size) == (64, 2, 4, 300)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"model_type": "t5"}, "is a t5, which is no causal language model"),
        ({"model_type": "no-such"}, "transformers cannot read .* code of a folder is never executed"),
        ({"sliding_window": 16, "use_sliding_window": True}, "do not all see the whole text"),
        ({"model_type": "mixtral", "num_local_experts": 4, "sliding_window": None}, "with experts"),
        ({"model_type": "cohere", "logit_scale": 0.1}, r"changes its logits \(logit_scale\)"),
    ],
)
def test_no_base(entries, told, tmp_path):
    content = base_config("qwen2").to_dict() | {"layer_types": None} | entries
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=told):
        configured(tmp_path)


def test_an_encoder_has_no_layers_that_are_known(tmp_path):
    from transformers import BertConfig

    BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    cfg, model_cfg = configured(tmp_path)
    letters = type("Letters", (), {"vocab_size": 10, "name": "letters"})
    with pytest.raises(
        ValueError, match="a bert has none of the lists of layers .* There are: embeddings, encoder"
    ):
        build_adapter(cfg, model_cfg, letters, "meta")


def test_a_base_without_all_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path / "base")
    held = load_file(base / "model.safetensors")
    held.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*c_fc\.weight"):
        adapter_on(base)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ValueError, match="transformers cannot load"):
        adapter_on(base)


def test_what_sees_other_documents_is_refused(monkeypatch):
    from models.memory.adapter import MemoryAdapter

    whole_row = MemoryAdapter._mask
    monkeypatch.setattr(
        MemoryAdapter, "_mask", lambda self, tokens, past, doc_ids: whole_row(self, tokens, past, None)
    )
    with pytest.raises(ValueError, match="a gpt2 lets documents of one row see each other"):
        adapter_on(base_of("gpt2"))


def test_a_larger_tokenizer_is_refused(tmp_path):
    base = save_base(tmp_path / "base", vocabulary=100)
    with pytest.raises(ValueError, match="is id 289, and the model has 100 rows"):
        adapter_on(base)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "no/such-model",
            "'no/such-model' is not on this machine. Give a local folder, or download it once: hf download",
        ),
        ("./nowhere", "'./nowhere' is not on this machine"),
        (None, "base_model_name is not given"),
    ],
)
def test_without_the_base_the_rest_is_checked(name, told, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    cfg, model_cfg = configured(name)
    assert told in capsys.readouterr().out and told in model_cfg.lacking()
    with pytest.raises(ConfigError, match="unknown key"):
        configured(name, "model_cfg.no_such=1")
    with pytest.raises(ValueError, match="base_model_name"):
        build_adapter(cfg, model_cfg, None)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("models.memory.pretrained._has_transformers", lambda: False)
    _, model_cfg = configured(base_of("gpt2"))
    assert "needs transformers from version 5 on: pip install -e '.[hf]'" in model_cfg.lacking()
