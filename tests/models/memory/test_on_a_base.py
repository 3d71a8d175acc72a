"""A memory that layers of a pretrained base read: it begins as the base, and is what our own blocks would read."""

import functools

import pytest
import torch

from adapters import build_adapter
from adapters.base import GenerateOptions
from adapters.lora import attach, merge
from adapters.rates import stated_rate
from configs.compose import compose
from configs.messages import ConfigError
from data.huggingface.folder import read_huggingface_tokenizer
from models.layers.decoder import Hidden
from models.layers.recompute import recomputing
from models.layers.roles import rule_for
from tests.contract.tiny import batch_of, config, context
from tests.models.memory.reference import memory_layer
from tests.models.test_memory_adapter import IDS, adapter_on, backward, configured, theirs_of
from tests.pretrained import base_config, base_of, save_base

pytestmark = pytest.mark.xdist_group("transformers")

MEMORY = ("model_cfg.vanilla_mode=false", "model_cfg.num_memory_tokens=8", "use_lora=false")
CHAPTERS = tuple(
    f"model_cfg.{word}"
    for word in ("use_chapters=true", "num_chapters=4", "top_k_chapters=2", "routing_window_size=3")
)
BOTH = ("use_lora=true", "lora_dropout=0")
B = ("model_cfg.memory_block_variant=B",)
LOW_RANK = ("model_cfg.use_low_rank_memory=true", "model_cfg.memory_rank=4")
PROJECTIONS = ("model_cfg.use_low_rank_projections=true", "model_cfg.projection_rank=4")
FOUR_BITS = ("model_cfg.quantize_memory=true", "model_cfg.memory_quant_bits=4")
STARTS = {
    "A": (),
    "B": B,
    "chapters": CHAPTERS,
    "all that is thin, B": (*B, *CHAPTERS, *LOW_RANK, *PROJECTIONS, *FOUR_BITS),
    "reduced_dim, LoRA": (
        *(
            "model_cfg.use_low_rank_memory=true",
            "model_cfg.low_rank_mode=reduced_dim",
            "model_cfg.memory_rank=8",
        ),
        *BOTH,
    ),
}
strategies = pytest.mark.parametrize("strategy", ["sequence", "rolling", "token"])
PACKED = torch.tensor([[0] * 5 + [1] + [2] * 6, [0] * 4 + [1] * 8])


def reading(base, *more, away=True, dtype=torch.float32):
    """An adapter on a frozen base with a memory, its weights away from their zeros."""
    named = (f"model_cfg.base_model_name={base}", "model_cfg.freeze_base_model=true", "warmup_ratio=0")
    cfg, model_cfg = config("memory_adapter", *named, "lora_rank=2", *MEMORY, *more)
    adapter = build_adapter(cfg, model_cfg, _tokenizer(base)).eval()
    if cfg.use_lora:
        attach(adapter, cfg, base="")
    with torch.no_grad():
        for i, p in enumerate(adapter.model.parameters()):
            if away and p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return adapter.to(dtype)


@functools.cache
def _tokenizer(base):
    return read_huggingface_tokenizer(base, 300)


def routed(strategy):
    return (*CHAPTERS, *(f"model_cfg.routing_strategy_{when}={strategy}" for when in ("train", "inference")))


def logits(adapter, *args, **given):
    with torch.no_grad():
        out = adapter.model(*args, **given)
        return adapter.model.logits(out.states if isinstance(out, Hidden) else out)


def test_matrices_begin_with_the_std_that_is_asked_for():
    """Queries, keys and values; the bank has one of its own."""
    control, wider = (
        reading(base_of("qwen2"), *more, away=False).model.state_dict()
        for more in ((), ("model_cfg.initializer_range=0.1",))
    )
    moved = {name for name, tensor in wider.items() if not torch.equal(tensor, control[name])}
    assert moved == {f"memory_layers.{i}.attn.{of}_proj.weight" for i in range(2) for of in "qkv"}
    assert all(torch.allclose(wider[name], 5 * control[name]) for name in moved)


# -- where it stands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["qwen2", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gpt2", "llama"))]
)
@pytest.mark.parametrize("more", STARTS.values(), ids=STARTS)
def test_it_begins_as_the_base_to_the_bit(kind, more):
    base, adapter = adapter_on(base_of(kind)), reading(base_of(kind), *more, away=False)
    assert torch.equal(logits(adapter, IDS), logits(base, IDS))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(adapter, IDS), logits(base, IDS))
    for block in map(adapter.model.get_submodule, adapter.blocks()):
        block.forward = recomputing(block)
    adapter.train()
    out = adapter.model(IDS)
    states = out.states if isinstance(out, Hidden) else out
    assert torch.equal(adapter.model.logits(states.detach()), logits(base, IDS))
    assert not torch.equal(logits(reading(base_of(kind), *more), IDS), logits(base, IDS))


@pytest.mark.parametrize("variant", [(), B], ids=["A", "B"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_layers_are_those_written_by_hand(kind, variant):
    """With the reference's memory, token by token, between the base's own parts or behind them."""
    more = (*variant, "model_cfg.memory_layer_placement=custom", "model_cfg.memory_layer_indices=[1]")
    adapter = reading(base_of(kind), *more, *routed("token"), dtype=torch.float64)
    model, layer, seen = adapter.model, adapter.model.layers[1], {}
    assert [memory.layer for memory in model.memories] == [1] and len(model.banks) == 1
    memory, bank, attention = (
        model.memories[0],
        model.banks[0],
        getattr(layer, "attn", None) or layer.self_attn,
    )
    layer.register_forward_pre_hook(
        lambda m, i, k: seen.update(x=i[0] if i else k["hidden_states"]), with_kwargs=True
    )
    # The first of an attention's hooks, in front of the memory's.
    handle = attention.register_forward_hook(lambda m, i, o: seen.update(a=o[0]), prepend=True)
    layer.register_forward_hook(lambda m, i, o: seen.update(y=o[0] if isinstance(o, tuple) else o))
    logits(adapter, IDS)
    handle.remove()
    norm, mlp = (layer.ln_2, layer.mlp) if kind == "gpt2" else (layer.post_attention_layernorm, layer.mlp)

    def read(h):
        return memory_layer(memory, bank, memory.norm(h), model.memory, strategy="token")

    with torch.no_grad():
        h = seen["x"] + seen["a"]
        if not variant:
            h = h + read(h)
            h = h + mlp(norm(h))
        else:
            h = h + mlp(norm(h))
            h = h + read(h)
            h = h + memory.mlp(memory.mlp_norm(h))
        torch.testing.assert_close(seen["y"], h, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("qwen2", marks=pytest.mark.slow)])
@strategies
def test_documents_of_a_packed_row_are_as_if_alone(kind, strategy):
    adapter = reading(base_of(kind), *routed(strategy), dtype=torch.float64)
    packed = logits(adapter, IDS, doc_ids=PACKED)
    for row, lengths in ((0, (5, 1, 6)), (1, (4, 8))):
        alone = torch.cat([logits(adapter, piece) for piece in IDS[row : row + 1].split(lengths, 1)], 1)
        torch.testing.assert_close(packed[row], alone[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed[0, 6:], logits(adapter, IDS)[0, 6:], atol=1e-2), "documents matter"


@strategies
def test_no_token_sees_a_later_one_and_padding_changes_nothing(strategy):
    """What stands behind a text: rows padded to one length are as single ones."""
    adapter = reading(base_of("gpt2"), *routed(strategy), dtype=torch.float64)
    single = logits(adapter, IDS[:, :7])
    padded = IDS.clone()
    padded[:, 7:] = 3
    torch.testing.assert_close(logits(adapter, padded)[:, :7], single, rtol=1e-9, atol=1e-9)


def test_lookahead_does_not_look_at_padding():
    more = (*routed("sequence"), "model_cfg.routing_causality=lookahead")
    adapter = reading(base_of("gpt2"), *more, dtype=torch.float64)
    assert adapter.non_causal_routing and adapter.model.init_cache(2) is None
    valid = torch.arange(12).expand(2, 12) < 7
    padded = IDS.clone()
    padded[:, 7:] = 3
    single = logits(adapter, IDS[:, :7])
    torch.testing.assert_close(logits(adapter, padded, valid=valid)[:, :7], single, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits(adapter, padded)[:, :7], single)


@strategies
def test_text_of_the_cache_pools_what_training_pools(strategy):
    adapter = reading(base_of("gpt2"), *routed(strategy), dtype=torch.float64)
    cache, pieces = adapter.model.init_cache(2), []
    for piece in IDS.split([2, 1, 9], 1):
        here = cache.snapshot()
        logits(adapter, (piece + 1) % 290, cache=cache)
        cache.restore(here)
        pieces.append(logits(adapter, piece, cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1), logits(adapter, IDS), rtol=1e-7, atol=1e-7)
    prompts = [[1, 2, 3], [], [5] * 9]
    options = GenerateOptions(max_new_tokens=5, temperature=0.0, stop_at_document_end=False)
    found = adapter.generate(prompts, options).tokens
    assert found == [adapter.generate([prompt], options).tokens[0] for prompt in prompts]


# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), (*B, *CHAPTERS), (*CHAPTERS, *BOTH)], ids=["A", "B", "LoRA"])
def test_what_has_a_gradient_in_the_first_step_and_the_second(more):
    """Nothing of the base, ever; it is not moved either, nor in a checkpoint."""
    more = (*more, *(["model_cfg.routing_strategy_train=token"] if CHAPTERS[0] in more else []))
    adapter = reading(base_of("qwen2"), *more, "model_cfg.use_load_balance_loss=false", away=False).train()
    trained = {n: p for n, p in adapter.named_model_parameters() if p.requires_grad}
    memory = {n for n in adapter.model.state_dict() if n.startswith(("banks.", "memory_layers."))}
    assert {n for n in trained if "lora_" not in n} == adapter.beside() == memory != set()
    assert any("lora_" in n for n in trained) == ("use_lora=true" in more)
    before = {n: value.clone() for n, value in adapter.model.state_dict().items()}
    optimizer = torch.optim.SGD(trained.values(), 0.5)
    first = backward(adapter)
    assert set(first) == set(trained) == set(adapter.trained_state())
    ends = ("attn.o_proj.weight", "mlp.down_proj.weight", "lora_B")
    assert {n for n, g in first.items() if g.any()} == {
        n for n in trained if n.endswith(ends) and not n.startswith("base") or "lora_B" in n
    }
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert {n for n, g in backward(adapter).items() if g.any()} == set(trained)
    after = adapter.model.state_dict()
    moved = {n for n, value in before.items() if not torch.equal(value, after[n])}
    assert moved and all("lora_" in n or n in adapter.beside() for n in moved)


@pytest.mark.parametrize("more", [(*CHAPTERS, "model_cfg.use_z_loss=true"), B], ids=["chapters", "B"])
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_recomputing_layers_changes_no_gradient_and_no_loss_of_routers(kind, more):
    adapter = reading(
        base_of(kind), *more, "model_cfg.routing_strategy_train=token", "model_cfg.dropout=0.1"
    ).train()
    expected = {name: gradient.clone() for name, gradient in backward(adapter).items()}
    adapter.zero_grad(set_to_none=True)
    for block in map(adapter.model.get_submodule, adapter.blocks()):
        block.forward = recomputing(block)
    found = backward(adapter)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_rates_of_components_and_what_stays_as_it_is():
    words = ("memory_lr=0.02", "memory_bank_lr=0.03", "lora_lr=0.04", *BOTH)
    adapter = reading(base_of("qwen2"), *words, away=False)
    cfg, _ = configured(base_of("qwen2"), *MEMORY, *words)
    rules = adapter.param_roles()
    rates = {
        n: stated_rate(rule_for(rules, n).role, cfg)
        for n, p in adapter.named_model_parameters()
        if p.requires_grad
    }
    of_parts = {"banks": 0.03, "memory_layers": 0.02, "base": 0.04}
    assert all(rate == of_parts[n.partition(".")[0]] for n, rate in rates.items())
    assert {n.partition(".")[0] for n in rates} == set(of_parts)
    still = reading(base_of("qwen2"), *BOTH, "memory_lr=0", away=False)
    assert all("lora_" in n for n, p in still.named_model_parameters() if p.requires_grad)
    assert still.beside() <= set(still.trained_state()), "kept, as it is nowhere else"
    with pytest.raises(ValueError, match="memory_lr: at 0 nothing of this model is left to train"):
        reading(base_of("qwen2"), "memory_lr=0", away=False)


def test_added_up_adapters_leave_the_memory():
    adapter = reading(base_of("gpt2"), *BOTH, *CHAPTERS)
    beside = logits(adapter, IDS)
    merge(adapter)
    torch.testing.assert_close(logits(adapter, IDS), beside, rtol=1e-4, atol=1e-4)
    assert set(adapter.trained_state()) == adapter.beside()
    assert {n for n, p in adapter.named_model_parameters() if p.requires_grad} == adapter.beside()


def test_outside_of_a_pass_of_its_own_the_base_is_the_base():
    adapter = reading(base_of("qwen2"))
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        there = adapter.model.base(input_ids=IDS, attention_mask=mask, use_cache=False).last_hidden_state
        assert torch.equal(
            adapter.model.logits(there), theirs_of(base_of("qwen2"))(IDS, attention_mask=mask).logits
        )


def test_operations_count_the_memory_and_no_gradients_of_the_base():
    base = base_of("qwen2")
    plain, adapter = adapter_on(base, "use_lora=false", "model_cfg.freeze_base_model=false"), reading(base)
    per_layer = 2 * 64 * 64  # queries and outputs
    added = adapter.flops(32).training_per_token - plain.flops(32).training_per_token
    assert added == 2 * (6 * per_layer + 12 * 8 * 64)
    assert (
        adapter.flops(32).training_per_token - adapter.cost(32).training_per_token
        == 2 * plain.flops(32).weights
    )


# -- sizes and bad input ----------------------------------------------------------------------------------------------

QWEN = {
    **{"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    **{"intermediate_size": 8960, "max_position_embeddings": 32768, "tie_word_embeddings": True},
}


@pytest.mark.parametrize(
    ("file", "memory", "adapters"),
    [("adapter_qwen2.5_1.5b", 33_168_464, 0), ("memory_lora_combined", 38_916_636, 2_179_072)],
)
def test_counts_of_the_shipped_files_by_the_config_of_qwen_alone(file, memory, adapters, tmp_path):
    save_base(tmp_path, "qwen2")  # for its tokenizer
    base_config("qwen2", 151936, **QWEN).save_pretrained(tmp_path)
    words = [f"model_cfg.base_model_name={tmp_path}", "preset=none"]
    cfg, model_cfg = compose([f"--hydra_model_cfg=configs/{file}.yaml", *words])
    adapter = build_adapter(cfg, model_cfg, _tokenizer(tmp_path), "meta")
    if cfg.use_lora:
        attach(adapter, cfg, base="")
    trained = {n: p.numel() for n, p in adapter.named_model_parameters() if p.requires_grad}
    assert sum(trained.values()) == memory + adapters
    assert sum(size for n, size in trained.items() if "lora_" in n) == adapters
    layers = "0, 4, 8, 12, 16, 20, 24" if adapters else "0, 1, 2, 3, 4, 23, 24, 25, 26, 27"
    assert adapter.notes[1].endswith(f"read by its layers {layers}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["memory_layer_placement=custom", "memory_layer_indices=[2]"], r"no block 2; valid are 0\.\.1"),
        (["memory_layer_placement=first_k", "memory_layer_k=3"], "Nearest: memory_layer_k=2"),
        (["memory_layer_placement=none"], "leaves nothing to be trained"),
        (
            ["use_chapters=true"],
            r"num_memory_tokens \(8\) must be divisible by model_cfg.num_chapters \(100\)",
        ),
        (["use_z_loss=true"], "without model_cfg.use_chapters there is none"),
        (["use_low_rank_memory=true", "low_rank_mode=reduced_dim", "memory_rank=6"], "nearest: 4 or 8"),
    ],
)
def test_a_memory_that_does_not_fit_the_base_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        configured(base_of("gpt2"), *MEMORY, *(f"model_cfg.{word}" for word in words))


def test_of_a_base_that_is_not_here_the_rest_is_checked():
    with pytest.raises(ConfigError, match="num_memory_tokens 1000 or 1100"):
        configured("no/where", *MEMORY[:1], "model_cfg.use_chapters=true")
    with pytest.raises(ConfigError, match="names block 1 twice"):
        indices = ("model_cfg.memory_layer_placement=custom", "model_cfg.memory_layer_indices=[1, 1]")
        configured("no/where", *MEMORY, *indices)
    configured("no/where", *MEMORY, "model_cfg.memory_layer_placement=first_k", "model_cfg.memory_layer_k=40")


def test_fields_of_a_memory_mean_nothing_without_one(capsys):
    configured(base_of("gpt2"), "model_cfg.memory_rank=3", "model_cfg.norm_eps=0.1")
    said = capsys.readouterr().out
    assert "model_cfg.memory_rank, model_cfg.norm_eps (because of model_cfg.vanilla_mode=true)" in said


def test_a_frozen_base_that_is_disturbed_is_warned_of(capsys):
    configured(base_of("gpt2"), *MEMORY, "model_cfg.wo_init_zero=false")
    assert "wo_init_zero=false disturbs a base that stays as it is" in capsys.readouterr().out


def test_where_attention_and_feed_forward_layer_read_the_same_there_is_no_place_between(tmp_path):
    """GPT-NeoX in parallel and one after the other."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    base = save_base(tmp_path / "base", "gpt2")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    for parallel in (True, False):
        config = GPTNeoXConfig(
            vocab_size=300,
            max_position_embeddings=64,
            use_parallel_residual=parallel,
            bos_token_id=0,
            **sizes,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(base)
        if not parallel:
            reading(base)
            continue
        with pytest.raises(
            ValueError, match="variant=A stands between .* GPTNeoXLayer .* memory_block_variant=B"
        ):
            reading(base)
        plain, adapter = adapter_on(base), reading(base, *B, away=False)
        assert torch.equal(logits(adapter, IDS), logits(plain, IDS))


def test_an_attention_of_another_name_is_told_of(monkeypatch):
    monkeypatch.setattr("models.memory.insertion.ATTENTION", ("other",))
    with pytest.raises(
        ValueError, match=r"GPT2Block has none of other, but ln_1, attn, .*memory_block_variant=B"
    ):
        reading(base_of("gpt2"))


# -- chats ------------------------------------------------------------------------------------------------------------


def test_padding_is_in_no_decision(tmp_path):
    """Rows with room behind them have the losses of routers, and the loads, of rows without."""
    words = (*routed("rolling"), "model_cfg.use_z_loss=true", "model_cfg.use_auxiliary_loss=true")
    adapter = reading(base_of("gpt2"), *words, dtype=torch.float64).train()
    tokens = torch.randint(0, 290, (2, 17), generator=torch.Generator().manual_seed(1)).numpy()
    whole = batch_of(tokens[:, :10])
    padded = batch_of(tokens)
    padded.weights[:, 9:] = 0
    padded.doc_ids[:, 10:] = 1 + torch.arange(7).numpy()
    one, other = (adapter(adapter.prepare(batch, context(2))) for batch in (whole, padded))
    assert set(one.terms) == {"ce", "load_balance", "aux", "z"}
    for name, term in one.terms.items():
        torch.testing.assert_close(other.terms[name].sum, term.sum, rtol=1e-9, atol=1e-9)
    assert one.metrics["chapters"].sum.tolist() == other.metrics["chapters"].sum.tolist()
    assert int(other.metrics["chapters"].sum.sum()) == 2 * 2 * 9 * 2, "layers, rows, tokens, two each"
