"""Recurrent depth: the block, the state and its noise, what gradients go back through, the cache, sizes."""

import math

import pytest
import torch
from torch._dynamo.utils import counters

import models.vanilla
from configs.compose import compose
from configs.messages import ConfigError
from models.layers.flops import Flops
from models.rd import RD, RDConfig, states_after
from tests.contract.tiny import adapter_of, batch_for, context, loss_and_gradients
from tests.models.tiny import SIZES, build, tokens_of


def model_of(dtype=torch.float64, **fields):
    """Prelude, core and coda of 1, 2 and 1 blocks; every weight away from its start."""
    return build("rd", dtype, **{"n_layers": 4, "mean_recurrence": 3, "k_trunc": 2, **fields})


def logits_of(model, tokens, **given):
    return model.logits(model(tokens, **given).states)


# -- blocks ------------------------------------------------------------------------------------------------------


def test_a_block_normalises_the_sum_of_state_and_branch():
    """Not a pre-norm block: what leaves has unit length before the last gain, also where nothing is added."""
    model = model_of()
    block, x = model.core[0], 5 * torch.randn(2, 9, 16, dtype=torch.float64)
    shared = model.shared(tokens_of(), 0, None)
    y = block(x, *shared) / block.mlp_sum_norm.weight
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 9, dtype=torch.float64), rtol=1e-4, atol=0)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(name).weight.data.zero_()
    first, last = block.attn_sum_norm.weight, block.mlp_sum_norm.weight
    unit = torch.nn.functional.rms_norm
    expected = unit(unit(x, (16,), first), (16,), last)
    torch.testing.assert_close(block(x, *shared), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, unit(x, (16,), last), atol=0.1)


def test_the_state_keeps_its_precision_where_products_are_narrow():
    model = model_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        e, shared = model.embed(tokens_of(), None, None)
        s = model.recur(model.start(e, 0, None), e, shared)
        assert (e.dtype, s.dtype) == (torch.float32, torch.float32)
        assert model.decode(s, shared).dtype == torch.bfloat16  # which the head's product reads


def test_biases_are_those_of_queries_and_keys_alone():
    names = {name.rsplit(".", 2)[-2] for name, _ in model_of().named_parameters() if name.endswith("bias")}
    assert names == {"q_proj", "k_proj"}
    assert not any(name.endswith("bias") for name, _ in model_of(qk_bias=False).named_parameters())


# -- the state ---------------------------------------------------------------------------------------------------


def test_every_iteration_is_told_of_the_tokens():
    """With the state held, another text gives another next one; and another state another, with the text held."""
    model = model_of()
    s = torch.randn(1, 9, 16, dtype=torch.float64)
    (one, shared), (other, _) = (model.embed(tokens_of(1, seed=seed), None, None) for seed in (1, 2))
    assert not torch.allclose(model.recur(s, one, shared), model.recur(s, other, shared))
    assert not torch.allclose(model.recur(s, one, shared), model.recur(-s, one, shared))


def test_noise_is_a_function_of_seed_place_and_dim():
    model, like = model_of(torch.float32), torch.zeros(3, 9, 16)
    seeds = torch.tensor([5, 6, 5])
    s = model.start(like, 0, seeds)
    assert torch.equal(s[0], s[2]) and not torch.equal(s[0], s[1])
    assert torch.equal(s[:1], model.start(like[:1], 0, seeds[:1])), "whatever the other rows are"
    assert torch.equal(s[:, 4:7], model.start(like[:, :3], 4, seeds)), "wherever a piece begins"
    for_all = model.start(like, 0, seeds[:1])
    assert torch.equal(for_all, s[:1].expand(3, -1, -1))
    assert torch.equal(model.start(like, 0, None)[0], model.start(like, 0, None)[2])
    assert len(s.unique()) == 2 * 9 * 16, "no two places alike"


def test_noise_is_normal_and_cut_off():
    """Std sqrt(2/5), but for what is cut off beyond 3 std."""
    s = model_of(torch.float32, d_model=64).start(torch.zeros(40, 500, 64), 0, torch.arange(40))
    std = math.sqrt(0.4)
    cut = math.sqrt(1 - 6 * math.exp(-4.5) / math.sqrt(2 * math.pi) / math.erf(3 / math.sqrt(2)))
    assert float(s.std()) == pytest.approx(std * cut, rel=0.003) and abs(float(s.mean())) < 0.003
    assert 2.95 * std < float(s.abs().max()) < 3.0001 * std
    for within, share in ((1, 0.6827), (2, 0.9545)):
        assert float((s.abs() < within * std).double().mean()) == pytest.approx(share / 0.9973, abs=0.002)
    flat = s.flatten(1).double() / s.double().std()
    for shifted in (flat.roll(1, 0), flat.roll(1, 1), flat.roll(64, 1)):  # rows, dims, places
        assert abs(float((flat * shifted).mean())) < 0.005
    assert float(model_of(s0_std=0.1).start(torch.zeros(1, 50, 16), 0, None).std()) == pytest.approx(
        0.1, rel=0.1
    )


def test_states_come_to_depend_less_on_where_they_began():
    """Trained on one batch: from two noises states draw near to each other, turn by turn, and so do predictions."""
    adapter = adapter_of("rd", "model_cfg.mean_recurrence=4", "model_cfg.k_trunc=4")
    model, batch = adapter.model, batch_for(adapter, rows=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for step in range(8):
        adapter(adapter.prepare(batch, context(2, step))).terms["ce"].sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens = torch.from_numpy(batch.tokens[:, :-1])

    @torch.no_grad()
    def apart(recurrences):
        e, shared = model.embed(tokens, None, None)
        states = [model.start(e, 0, torch.tensor([seed])) for seed in (1, 2)]
        for _ in range(recurrences):
            states = [model.recur(s, e, shared) for s in states]
        logits = [model.logits(model.decode(s, shared)).log_softmax(-1) for s in states]
        return [float((a - b).norm() / b.norm()) for a, b in (states, logits)]

    at_once, soon, later = (apart(r) for r in (1, 4, 12))
    assert at_once[0] > 2 * soon[0] > 4 * later[0], (at_once, soon, later)
    assert at_once[1] > 2 * soon[1] > 4 * later[1], (at_once, soon, later)


# -- gradients ---------------------------------------------------------------------------------------------------


def gradients(model, tokens, **given):
    model.zero_grad()
    logits_of(model, tokens, **given).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_gradients_go_back_through_the_last_iterations_alone():
    """As if the states before had been constants; what the prelude injects into those that are kept is none."""
    model, tokens = model_of(), tokens_of()
    found = gradients(model, tokens, recurrences=7, retained=3)
    with torch.no_grad():
        e, shared = model.embed(tokens, None, None)
        s = model.start(e, 0, None)
        for _ in range(4):
            s = model.recur(s, e, shared)
    model.zero_grad()
    e, shared = model.embed(tokens, None, None)
    for _ in range(3):
        s = model.recur(s, e, shared)
    model.logits(model.decode(s, shared)).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    whole, fewer = (
        gradients(model, tokens, recurrences=7),
        gradients(model, tokens, recurrences=7, retained=1),
    )
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0 and float((found[name] - gradient).abs().max()) < 1e-9 * scale, name
    for name in ("prelude.0.mlp.up_proj.weight", "adapter.weight", "core.1.self_attn.v_proj.weight"):
        scale = float(whole[name].abs().max())
        assert float((found[name] - whole[name]).abs().max()) > 1e-3 * scale, name
        assert float((found[name] - fewer[name]).abs().max()) > 1e-3 * scale, name


def bytes_kept(model, **given):
    """What the backward of a forward pass holds."""
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model(tokens_of(), **given)
    assert hidden.states.requires_grad  # which keeps what is held alive until here
    return sum(held.values())


def test_memory_is_flat_in_the_number_of_recurrences():
    model = model_of().train()
    kept = {r: bytes_kept(model, recurrences=r, retained=8) for r in (4, 8, 9, 64)}
    assert kept[8] == kept[9] == kept[64] > 1.5 * kept[4]
    assert bytes_kept(model, recurrences=24) > 2 * kept[64], "without a cut it grows"


def test_what_memory_is_estimated_from_is_what_is_kept():
    """Each block outside of the core once, those of the core as often as gradients go back."""
    model, once = model_of(k_trunc=8), model_of(k_trunc=1)
    assert (model.kept_passes, once.kept_passes) == (2 + 8 * 2, 2 + 2)
    one, two, eight = (bytes_kept(model, recurrences=9, retained=k) for k in (1, 2, 8))
    assert eight - one == pytest.approx(7 * (two - one), rel=0.01)


# -- the cache ---------------------------------------------------------------------------------------------------


def test_keys_of_every_block_and_recurrence_are_those_without_a_cache(monkeypatch):
    """Where pieces begin is asked of the cache once: not of one that this pass has advanced already."""
    model, tokens = model_of(eval_recurrence=3), tokens_of()
    seen = []
    attention = models.vanilla.attention

    def looking(q, k, v, plan):
        seen.append(k)
        return attention(q, k, v, plan)

    monkeypatch.setattr(models.vanilla, "attention", looking)
    with torch.no_grad():
        model(tokens)
        alone, cache = seen[:], model.init_cache(2)
        model(tokens[:, :5], cache=cache)
        seen.clear()
        model(tokens[:, 5:], cache=cache)
    assert len(alone) == len(seen) == 1 + 3 * 2 + 1 and cache.length == 9
    for one, other in zip(alone, seen, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    flat = [k[0, 0, 4] for k in alone]
    assert all(not torch.allclose(a, b) for i, a in enumerate(flat) for b in flat[:i]), "no two share one"


def test_other_depths_are_read_off_one_pass():
    model, tokens = model_of(eval_recurrence=3), tokens_of()
    hidden = model(tokens, also_after=(1, 3, 6))
    assert torch.equal(hidden.states, model(tokens).states)
    for r in (1, 3, 6):
        assert torch.equal(hidden.extra[states_after(r)], model(tokens, recurrences=r).states)


# -- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"n_layers": 3}, (1, 1, 1)),
        ({"n_layers": 4}, (1, 2, 1)),
        ({"n_layers": 6}, (1, 4, 1)),
        ({"n_layers": 8}, (2, 4, 2)),
        ({"n_layers": 16}, (4, 8, 4)),
        ({"n_layers": None}, (2, 4, 2)),
        ({"n_layers": None, "l_core": 1}, (2, 1, 2)),
        ({"n_layers": 8, "l_p": 1}, (1, 5, 2)),
        ({"n_layers": 6, "l_p": 1, "l_core": 4, "l_c": 1}, (1, 4, 1)),
    ],
    ids=str,
)
def test_blocks_are_split_among_the_parts(given, parts):
    cfg = RDConfig(**{**SIZES, **given})
    model = RD(cfg)
    assert cfg.parts == tuple(map(len, (model.prelude, model.core, model.coda))) == parts
    assert len(model.blocks()) == sum(parts)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["n_layers=2"], r"n_layers \(2\) leaves no core .* Nearest: n_layers=3"),
        (
            ["n_layers=8", "l_p=1", "l_core=4", "l_c=1"],
            r"1 \+ 4 \+ 1 = 6\) must be .* n_layers=6 or .*l_core=6",
        ),
        (["n_layers=8", "l_p=5", "l_c=5"], r"n_layers \(8\) leaves no core .* Nearest: n_layers=11"),
        (["r_max=1"], "r_max"),
        (["r_max=3", "mean_recurrence=9"], r"r_max \(3\) is below .* Nearest: r_max=9, or mean_recurrence=3"),
        (["s0_std=0.0"], "s0_std"),
        (["k_trunc=0"], "k_trunc"),
        (["eval_recurrence=0"], "eval_recurrence"),
        (["d_model=90", "n_heads=6"], "must be even for rotary positions"),
    ],
)
def test_what_cannot_be_is_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        compose(["--hydra_model_cfg=rd", "preset=none", *(f"model_cfg.{word}" for word in words)])


def test_small_presets_recur_less():
    for preset, depth in (("nano", 4), ("small", 8), ("150M", 32)):
        _, cfg = compose(["--hydra_model_cfg=rd", f"preset={preset}"])
        assert (cfg.mean_recurrence, cfg.eval_depth) == (depth, depth)


def test_operations_are_those_of_the_depth():
    """Of a core block and the matrix in front of the core: forward r times, backward min(k, r) times."""
    model = model_of(k_trunc=4, eval_recurrence=5)
    d, f, length = 16, 64, 12
    block = 2 * (4 * d * d + 3 * d * f) + 4 * d * (length + 1) / 2
    turn, once = 2 * block + 2 * 2 * d * d, 2 * block + 2 * d * 128
    for r in (1, 4, 9):
        found = model.flops(length, r)
        assert found.training_per_token == pytest.approx(3 * once + (r + 2 * min(4, r)) * turn, rel=1e-12)
        assert found.forward_per_token == pytest.approx(once + r * turn, rel=1e-12)
    plan, mean_kept = model.flops(length), model.cfg.depth_law.expected(4)
    assert plan.training_per_token == pytest.approx(3 * once + (4 + 2 * mean_kept) * turn, rel=1e-12)
    assert plan.forward_per_token == pytest.approx(once + 5 * turn, rel=1e-12)
    assert isinstance(plan, Flops)
    narrower = model_of(k_trunc=4, eval_recurrence=5, adapter_mode="add").flops(length, 1)
    assert model.flops(length, 1).training_per_token - narrower.training_per_token == 3 * 2 * 2 * d * d


# -- compilation -------------------------------------------------------------------------------------------------

VARIANTS = 2  # of all blocks together, in training: with a graph and without


@pytest.mark.slow
def test_twenty_depths_are_compiled_twice():
    """Another depth compiles nothing: the loop over recurrences is none of the compiler's business. All graphs are
    whole, so that nothing of a block runs eagerly in silence."""
    adapter = adapter_of("rd")
    for path in adapter.blocks():
        adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    counters.clear()
    prepared = adapter.prepare(batch_for(adapter), context())
    for r in range(1, 21):
        prepared.host["recurrences"] = r
        adapter(prepared).terms["ce"].sum.backward()
    assert counters["stats"]["unique_graphs"] == VARIANTS
    assert not counters["recompile_limit"] and not counters["graph_break"]
    eager = adapter_of("rd")
    prepared.host["recurrences"] = 5
    one, other = (a(prepared).terms["ce"].sum.detach() for a in (adapter, eager))
    assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_every_parameter_has_a_gradient_at_every_depth():
    adapter = adapter_of("rd", "model_cfg.r_max=2")
    for step in range(4):
        _, found = loss_and_gradients(adapter, [batch_for(adapter, seed=step)])
        assert found.keys() == dict(adapter.named_model_parameters()).keys()
