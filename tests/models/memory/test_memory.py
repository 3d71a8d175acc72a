"""What blocks read of a bank, what they add with it, and that a model without one is the control bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from adapters import build_adapter
from configs.schema import RunConfig
from data.offsets import document_offsets
from models.layers.roles import rule_for
from models.memory.block import MemoryBlock
from models.memory.config import MemoryConfig
from models.memory.quant import levels, quantized, rounded
from tests.contract.tiny import Letters, batch_for, config, context
from tests.models.memory.reference import bank_of, memory_layer
from tests.models.tiny import build, tokens_of

ROWS, LENGTH = 2, 9
CHAPTERS = {"use_chapters": True, "num_chapters": 4, "top_k_chapters": 2, "routing_window_size": 3}
FACTORIZED = {"use_low_rank_memory": True, "memory_rank": 4}
REDUCED = {**FACTORIZED, "memory_rank": 8, "low_rank_mode": "reduced_dim"}
VARIANTS = {
    "standard": {},
    "another width, grouped heads": {"memory_dim": 6, "n_kv_heads": 2},
    "heads of its own": {"memory_num_heads": 8, "memory_num_kv_heads": 2},
    "heads of its own, not grouped": {"memory_num_heads": 2, "n_kv_heads": 1},
    "factorized": FACTORIZED,
    "reduced_dim": REDUCED,
    "low-rank projections": {"use_low_rank_projections": True, "projection_rank": 3},
    "8 bits": {"quantize_memory": True},
    "4 bits, factorized": {"quantize_memory": True, "memory_quant_bits": 4, **FACTORIZED},
    "LayerNorm, GELU, bias": {"use_rmsnorm": False, "use_swiglu": False, "bias": True},
    "chapters": CHAPTERS,
    "chapters, none": {**CHAPTERS, "chapter_weighting": "none", "n_kv_heads": 2},
    "chapters, scale_memory": {**CHAPTERS, "chapter_weighting": "scale_memory", "num_shared_chapters": 1},
    "chapters, shared": {**CHAPTERS, "num_shared_chapters": 1, "routed_scaling_factor": 2.5},
    "chapters, reduced, 4 bits": {**CHAPTERS, **REDUCED, "quantize_memory": True, "memory_quant_bits": 4},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
every_strategy = pytest.mark.parametrize("strategy", ["sequence", "rolling", "token"])
PACKED = torch.tensor([[0] * 5 + [1] * 4, [0, 0, 1, 1, 1, 1, 1, 2, 2]])


def model_of(**fields):
    return build("memory", num_memory_tokens=8, **fields)


def states(model, tokens, **given):
    out = model(tokens, **given)
    return out if isinstance(out, torch.Tensor) else out.states


def added_by(model, tokens, **given):
    """What the first memory layer reads and adds."""
    layer, found = model.memories[0], {}
    handle = layer.register_forward_hook(lambda m, i, o: found.update(x=i[0], added=o[0]))
    states(model, tokens, **given)
    handle.remove()
    return found["x"].detach(), found["added"]


# -- what a layer adds ------------------------------------------------------------------------------------------------


@every_variant
def test_a_layer_adds_what_the_definition_says(fields):
    model = model_of(**fields)
    x, added = added_by(model, tokens_of(ROWS, LENGTH))
    torch.testing.assert_close(added, memory_layer(model.memories[0], model.banks[0], x, model.cfg))


@every_strategy
@pytest.mark.parametrize("weighting", ["log_bias", "none", "scale_memory"])
def test_every_document_decides_for_itself(strategy, weighting):
    model = model_of(**CHAPTERS, routing_strategy_inference=strategy, chapter_weighting=weighting)
    offsets = torch.from_numpy(document_offsets(PACKED.numpy()))
    x, added = added_by(model, tokens_of(ROWS, LENGTH), doc_ids=PACKED, cu_seqlens=offsets)
    first = torch.tensor([[0] * 5 + [5] * 4, [0, 0, 2, 2, 2, 2, 2, 7, 7]])
    expected = memory_layer(model.memories[0], model.banks[0], x, model.cfg, first, strategy)
    torch.testing.assert_close(added, expected)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_where_a_block_adds_it(variant):
    model = model_of(memory_block_variant=variant, memory_layer_placement="first_k", memory_layer_k=1)
    block, tokens, seen = model.layers[0], tokens_of(ROWS, LENGTH), {}
    assert isinstance(block, MemoryBlock)
    block.register_forward_hook(lambda m, i, o: seen.update(i=i, o=o[0]))
    states(model, tokens)
    x, plan, rotation, reading, _ = seen["i"]
    memory = block.memory

    def read(h):
        return memory_layer(memory, model.banks[0], memory.norm(h), model.cfg)

    h = x + block.self_attn(block.input_layernorm(x), plan, rotation, None)
    if variant == "A":
        h = h + read(h)
        h = h + block.mlp(block.post_attention_layernorm(h))
    else:
        h = h + block.mlp(block.post_attention_layernorm(h))
        h = h + read(h)
        h = h + memory.mlp(memory.mlp_norm(h))
    torch.testing.assert_close(seen["o"], h)


@pytest.mark.parametrize("fields", [{}, CHAPTERS], ids=["all", "chapters"])
def test_no_order_in_the_memory(fields):
    model = model_of(**fields, routing_strategy_inference="token")
    tokens = tokens_of(ROWS, LENGTH)
    before, order = states(model, tokens), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        bank = model.banks[0].weight
        bank.copy_(bank.view(4, 2, -1)[order].flatten(0, 1))
        for layer in model.memories:
            if layer.router is not None:
                layer.router.weight.copy_(layer.router.weight[order])
                layer.router.bias.copy_(layer.router.bias[order])
    torch.testing.assert_close(states(model, tokens), before)
    with torch.no_grad():
        bank[0] += 1
    assert not torch.allclose(states(model, tokens), before)


# -- beside the control -----------------------------------------------------------------------------------------------

STARTS = {
    "A": {},
    "B": {"memory_block_variant": "B"},
    "chapters": CHAPTERS,
    "factorized, 4 bits": {"quantize_memory": True, "memory_quant_bits": 4, **FACTORIZED},
    "low-rank projections, B": {
        "use_low_rank_projections": True,
        "projection_rank": 3,
        "memory_block_variant": "B",
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fields", STARTS.values(), ids=STARTS)
def test_at_first_it_is_the_control_bit_for_bit(fields, dtype):
    def logits(type_, **more):
        model = build(type_, torch.float32, std=None, **more)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model.logits(states(model, tokens_of(ROWS, LENGTH)))

    control = logits("vanilla")
    for more in (fields, {**fields, "vanilla_mode": True}, {**fields, "memory_layer_placement": "none"}):
        assert torch.equal(logits("memory", num_memory_tokens=8, **more), control)
    assert not torch.equal(logits("memory", num_memory_tokens=8, **fields, wo_init_zero=False), control)


@pytest.mark.parametrize("more", [{"vanilla_mode": True}, {"memory_layer_placement": "none"}], ids=str)
def test_without_a_memory_there_is_nothing_of_one(more):
    control = build("vanilla", std=None).state_dict()
    found = build("memory", std=None, **CHAPTERS, **more).state_dict()
    assert found.keys() == control.keys() and all(torch.equal(found[n], t) for n, t in control.items())
    with_memory = model_of(**CHAPTERS).state_dict()
    assert {n for n in with_memory if n not in control} == {
        n for n in with_memory if ".memory." in n or n.startswith("banks.")
    }


@pytest.mark.parametrize("fields", [{}, CHAPTERS], ids=["all", "chapters"])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_what_has_a_gradient_in_the_first_step_and_the_second(variant, fields):
    model = build(
        "memory",
        std=None,
        num_memory_tokens=8,
        memory_block_variant=variant,
        **{**fields, "routing_strategy_inference": "token"},
    )
    tokens = tokens_of(ROWS, LENGTH)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)

    def moved():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            model.logits(states(model, tokens))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
        own = {n: p.grad for n, p in model.named_parameters() if ".memory." in n or n.startswith("banks.")}
        return {name for name, gradient in own.items() if gradient.any()}, set(own)

    ends = ("attn.o_proj.weight", "mlp.down_proj.weight")
    first, every = moved()
    assert first == {name for name in every if name.endswith(ends)}
    optimizer.step()
    assert moved()[0] == every


# -- banks ------------------------------------------------------------------------------------------------------------


def test_a_factorized_bank_of_full_rank_is_the_standard_one():
    model, control = model_of(use_low_rank_memory=True, memory_rank=8, memory_dim=8), model_of(memory_dim=8)
    state = control.state_dict()
    with torch.no_grad():
        state["banks.0.basis"] = torch.eye(8, dtype=torch.float64)
        model.load_state_dict(state)
    tokens = tokens_of(ROWS, LENGTH)
    torch.testing.assert_close(states(model, tokens), states(control, tokens))


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_factorized_bank_made_of_the_largest_singular_values_is_off_by_the_others(rank):
    """Eckart and Young 1936: in the Frobenius norm by all of them, in the spectral norm by the largest."""
    model = model_of(use_low_rank_memory=True, memory_rank=rank, memory_dim=8)
    whole = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(whole)
    with torch.no_grad():
        model.banks[0].weight.copy_(left[:, :rank] * values[:rank])
        model.banks[0].basis.copy_(right[:rank].mT)
        error = whole - model.banks[0].tokens()
    torch.testing.assert_close(error.norm() ** 2, (values[rank:] ** 2).sum())
    assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(
        [*map(float, values), 0.0][rank], abs=1e-12
    )


def test_a_factorized_bank_begins_with_the_std_of_the_bank():
    model = build(
        "memory",
        std=None,
        num_memory_tokens=2000,
        memory_dim=200,
        use_low_rank_memory=True,
        memory_init_std=0.05,
    )
    assert float(model.banks[0].tokens().detach().std()) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_rows_are_half_a_step_away_at_most(bits):
    rows = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[3], rows[4] = 0.0, 1e-30
    integers, scale = quantized(rows, bits)
    assert int(integers.abs().max()) == levels(bits) == {8: 127, 4: 7}[bits]
    assert float(scale[3]) == 1 and not integers[3].any()
    assert ((integers * scale - rows).abs() <= scale / 2 * (1 + 1e-12)).all()
    assert (integers.abs().amax(1)[torch.arange(50) != 3] == levels(bits)).all(), "the largest is kept"


@pytest.mark.parametrize("fields", [{}, FACTORIZED], ids=["standard", "factorized"])
def test_gradients_of_a_rounded_bank_are_those_where_it_was_rounded_to(fields):
    model, plain = model_of(quantize_memory=True, memory_quant_bits=4, **fields), model_of(**fields)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for weight in plain.banks[0].parameters():
            weight.copy_(rounded(weight, 4))
    tokens = tokens_of(ROWS, LENGTH)
    for one in (model, plain):
        states(one, tokens).square().sum().backward()
    for mine, theirs in zip(model.banks[0].parameters(), plain.banks[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
        assert not torch.equal(mine, theirs)
    torch.testing.assert_close(model.banks[0].tokens(), bank_of(model.banks[0], model.cfg))


# -- fields of the backbone --------------------------------------------------------------------------------------------


def test_attention_has_a_dropout_of_its_own():
    """Where none is said, the backbone's; the memory keeps that one."""
    assert model_of(dropout=0.3).attention_dropout == 0.3
    model, plans = model_of(dropout=0.3, attention_dropout=0.0).train(), []
    model.layers[0].register_forward_pre_hook(lambda m, given: plans.append((given[1], given[3].plan)))
    states(model, tokens_of(ROWS, LENGTH))
    ((own, of_memory),) = plans
    assert own.options.dropout == 0.0 and of_memory.options.dropout == 0.3
    model.cfg = model.cfg.model_copy(update={"dropout": 0.0, "attention_dropout": 0.5})
    states(model, tokens_of(ROWS, LENGTH))
    own, of_memory = plans[-1]
    assert own.options.dropout == 0.5 and of_memory.options.dropout == 0.0


def test_matrices_begin_with_the_std_that_is_asked_for():
    model, control = (
        build("memory", std=None, num_memory_tokens=8, wo_init_zero=False, **more)
        for more in ({"initializer_range": 0.1}, {})
    )
    larger = {n for n, p in model.named_parameters() if torch.allclose(p, 5 * control.state_dict()[n])}
    zero = {n for n, p in model.named_parameters() if not p.any()}
    alike = {n for n, _ in model.named_parameters() if "norm" in n or n.startswith("banks.")}
    assert larger - zero == {n for n, _ in model.named_parameters()} - alike - zero


def test_plain_attention_is_the_same_attention():
    found = {}
    for choice in (True, False):
        cfg, model_cfg = config("memory", f"model_cfg.use_flash_attention={json.dumps(choice)}")
        adapter = build_adapter(cfg, model_cfg, Letters()).double().eval()
        assert adapter.kernels.wanted.get("attention") == (None if choice else "reference")
        found[choice] = adapter.clean_states(batch_for(adapter), context(phase="eval"))
        assert (adapter.kernels.used["attention"].keys() == {"reference"}) == (not choice)
    torch.testing.assert_close(found[True], found[False])


# -- which blocks, which banks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 12, 28])
def test_placement(layers):
    def placed(placement, **more):
        return MemoryConfig(n_layers=layers, memory_layer_placement=placement, **more).memory_layers

    every = list(range(layers))
    assert placed("all") == every and placed("none") == []
    assert placed("first_k", memory_layer_k=1) == [0] and placed("last_k", memory_layer_k=1) == [layers - 1]
    assert placed("first_k", memory_layer_k=layers) == placed("last_k", memory_layer_k=layers) == every
    assert placed("every_n", memory_layer_n=3) == every[::3]
    assert placed("custom", memory_layer_indices=(layers - 1, 0)[: min(2, layers)]) == sorted({0, layers - 1})


@pytest.mark.parametrize("layers", [1, 2, 12, 28])
def test_sharing(layers):
    def built(sharing, k=2):
        fields = {"memory_sharing": sharing, "memory_sharing_k": k}
        with torch.device("meta"):
            model = build("memory", n_layers=layers, num_memory_tokens=8, **fields, std=None)
        return model, [memory.bank for memory in model.memories]

    one, of_one = built("shared")
    each, of_each = built("per_layer")
    assert of_one == [0] * layers and of_each == list(range(layers))
    pairs, of_pairs = built("every_k_layers")
    assert of_pairs == [i // 2 for i in range(layers)]
    assert built("every_k_layers", 1)[1] == of_each and built("every_k_layers", layers)[1] == of_one

    def count(model):
        return sum(p.numel() for p in model.parameters())

    bank = 8 * one.cfg.d_model
    assert count(each) - count(one) == (layers - 1) * bank
    assert count(pairs) - count(one) == ((layers + 1) // 2 - 1) * bank


def test_every_layer_reads_its_own_bank():
    model = model_of(memory_sharing="per_layer")
    tokens, layer = tokens_of(ROWS, LENGTH), model.layers[1]
    seen = {}
    layer.memory.register_forward_hook(lambda m, i, o: seen.update(x=i[0], added=o[0]))
    states(model, tokens)
    expected = memory_layer(layer.memory, model.banks[1], seen["x"].detach(), model.cfg)
    torch.testing.assert_close(seen["added"], expected)


def test_parameter_counts_of_the_published_sizes():
    sizes = {
        "vocab_size": 32000,
        "n_ctx": 8192,
        "d_model": 768,
        "n_heads": 12,
        "n_layers": 12,
        "ffn_hidden": 3072,
    }
    chapters = {"num_memory_tokens": 4096, "use_chapters": True, "num_chapters": 16, "top_k_chapters": 4}

    def count(**fields):
        with torch.device("meta"):
            model = build("memory", torch.float32, std=None, **sizes, **fields)
        return sum(p.numel() for p in model.parameters())

    assert count(vanilla_mode=True) == 137_841_408
    assert count(**chapters) == 137_841_408 + 31_614_144


def test_roles():
    model = model_of(**CHAPTERS, memory_block_variant="B", **FACTORIZED)
    rules = model.param_roles()
    roles = {name: rule_for(rules, name).role for name, _ in model.named_parameters()}
    assert {n for n, role in roles.items() if role == "memory_bank"} == {"banks.0.weight", "banks.0.basis"}
    assert all((role == "memory") == (".memory." in name) for name, role in roles.items())


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    ({"memory_layer_placement": "custom"}, "needs model_cfg.memory_layer_indices"),
    ({"memory_layer_indices": (0,)}, "memory_layer_placement=custom alone, and that is all"),
    (
        {"memory_layer_placement": "custom", "memory_layer_indices": (28,), "n_layers": 28},
        r"valid are 0\.\.27",
    ),
    ({"memory_layer_placement": "custom", "memory_layer_indices": (1, 1)}, "names block 1 twice"),
    ({"memory_layer_placement": "first_k", "memory_layer_k": 13}, "Nearest: memory_layer_k=12"),
    ({"memory_layer_placement": "last_k", "memory_layer_k": 13}, "Nearest: memory_layer_k=12"),
    (
        {"use_chapters": True},
        r"num_memory_tokens \(1024\) must be divisible by model_cfg.num_chapters \(100\); nearest: "
        "num_memory_tokens 1000 or 1100, num_chapters 64 or 128",
    ),
    ({**CHAPTERS, "top_k_chapters": 5}, "Nearest: top_k_chapters=4"),
    ({**CHAPTERS, "num_shared_chapters": 3}, r"less num_shared_chapters \(3\). Nearest: top_k_chapters=1"),
    ({**CHAPTERS, "num_shared_chapters": 4}, "Nearest: num_shared_chapters=3"),
    ({**CHAPTERS, "tokens_per_chapter": 7}, "must be num_memory_tokens / num_chapters = 256"),
    ({"use_low_rank_memory": True, "low_rank_mode": "reduced_dim"}, "nearest: 60 or 72"),
    ({**REDUCED, "memory_rank": 12, "memory_dim": 768}, "memory_dim has no meaning with low_rank_mode"),
    (
        {**REDUCED, "memory_rank": 12, "use_low_rank_projections": True},
        "use_low_rank_projections has no meaning",
    ),
    ({"memory_num_heads": 5}, "nearest: 765, 770"),
    ({"memory_num_heads": 6, "memory_num_kv_heads": 4}, "nearest: 3 or 6"),
    ({"memory_num_kv_heads": 5}, r"must divide model_cfg.n_heads \(12\); nearest: 4 or 6"),
    (
        {"use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_num_heads": 6},
        r"memory_num_heads \(6\) with low_rank_mode=reduced_dim; nearest: 60 or 66",
    ),
    ({**FACTORIZED, "memory_rank": 800}, "Nearest: memory_rank=768"),
    ({"use_low_rank_projections": True, "projection_rank": 768}, "Nearest: projection_rank=767"),
    ({"quantize_memory": True, "memory_quant_bits": 4, "memory_dim": 7}, "Nearest: memory_dim=6 or 8"),
    (
        {"quantize_memory": True, "memory_quant_bits": 4, **FACTORIZED, "memory_rank": 3},
        "Nearest: memory_rank=2 or 4",
    ),
    ({"use_auxiliary_loss": True}, "without model_cfg.use_chapters there is none"),
    ({"use_z_loss": True}, "without model_cfg.use_chapters there is none"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_told_of(fields, message):
    found = MemoryConfig(**fields).problems(RunConfig(type="memory"))
    assert len(found) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found[0])
    assert not MemoryConfig(**fields, vanilla_mode=True).problems(RunConfig(type="memory"))


@pytest.mark.parametrize("name", ["memory_layer_placement", "memory_block_variant", "memory_quant_bits"])
def test_words_that_are_none(name):
    with pytest.raises(ValueError, match=name):
        MemoryConfig(**{name: 3})
