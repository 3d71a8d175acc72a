"""nGPT: everything of length 1 has it, and nothing else is normalised, scaled or left out."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from adapters.base import weighted_loss
from configs.compose import compose
from configs.messages import ConfigError
from models.layers.roles import rule_for
from models.ngpt import MLP, NGPT, NGPTConfig, Scale
from models.vanilla import Vanilla, VanillaConfig
from tests.contract.tiny import adapter_of, batch_for, config, context, session_of, train_on
from tests.models.tiny import VOCABULARY, build, tokens_of
from trainer.optim.groups import role_table

NOT_SKIPPED, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)
ROWS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # read the state
COLUMNS = ("o_proj", "down_proj")  # write to it


def model_of(dtype=torch.float64, **fields):
    """Weights away from their start, on the sphere."""
    model = build("ngpt", dtype, **fields)
    model.constrain(NOT_SKIPPED)
    return model


def lengths(model):
    """Of every vector that is to have length 1, by matrix."""
    found = {}
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in ROWS + COLUMNS:
            found[name] = weight.detach().double().norm(dim=1 if kind in ROWS else 0)
    return found


def off_the_sphere(model):
    return max(float((each - 1).abs().max()) for each in lengths(model).values())


# -- weights -----------------------------------------------------------------------------------------------------


def test_weights_begin_on_the_sphere_and_stay_there():
    """Rows of what reads the state, columns of what writes to it; after AdamW, after Muon, with `skipped` nothing."""
    for words in ([], ["optimizer=muon", "muon_learning_rate=0.05"]):
        session = session_of("ngpt", *words, "learning_rate=0.05")
        model = session.adapter.model
        assert len(lengths(model)) == 2 + 2 * 7
        assert off_the_sphere(model) < 1e-5
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = batch_for(session.adapter)
        for step in range(3):
            train_on(session, batch, range(step, step + 1), total=10)
            assert off_the_sphere(model) < 1e-5
        for name, p in model.named_parameters():
            assert (p - before[name]).norm() > 0.02 * p.norm(), f"{name} did not move"


def test_a_step_that_is_skipped_moves_nothing_and_other_steps_wait_for_their_turn():
    model = model_of(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    before = copy.deepcopy(model.state_dict())
    model.constrain(SKIPPED)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.constrain(NOT_SKIPPED)
    assert off_the_sphere(model) < 1e-6

    adapter = adapter_of("ngpt", "model_cfg.normalize_every=3")
    for step in range(6):
        with torch.no_grad():
            adapter.model.layers[0].mlp.up_proj.weight.mul_(2)
        adapter.end_step(step, NOT_SKIPPED)
        assert (off_the_sphere(adapter.model) < 1e-5) == (step in (2, 5))


def test_vectors_of_zeros_stay_so():
    model = model_of(torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight[VOCABULARY:] = 0.0
    model.constrain(NOT_SKIPPED)
    assert not model.embed_tokens.weight[VOCABULARY:].any()
    assert torch.isfinite(model(tokens_of(vocabulary=VOCABULARY))).all()


def test_lengths_of_weights_mean_nothing_to_the_next_forward():
    """All of them times positive numbers of their own, then one step at a rate of nothing."""
    adapter = adapter_of("ngpt", dtype=torch.float64)
    adapter.constrain(NOT_SKIPPED)  # to the rounding of fp64
    model, batch = adapter.model, batch_for(adapter)
    states = adapter.clean_states(batch, context(phase="eval")).detach()
    logits = model.logits(states).detach()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            kind = name.split(".")[-2]
            if kind in ROWS + COLUMNS:
                shape = (len(weight), 1) if kind in ROWS else (1, weight.shape[1])
                weight *= 3 * torch.rand(shape, generator=source, dtype=torch.float64) + 0.1
    assert off_the_sphere(model) > 1
    adapter.end_step(0, NOT_SKIPPED)
    assert off_the_sphere(model) < 1e-12
    again = adapter.clean_states(batch, context(phase="eval"))
    torch.testing.assert_close(again, states, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.logits(again), logits, rtol=0, atol=1e-12)


def test_weights_kept_in_bf16_are_as_long_as_rounding_lets_them_be():
    model = model_of(torch.bfloat16)
    assert off_the_sphere(model) < 4e-3


def test_matrices_begin_as_directions_of_a_normal_distribution():
    model = build("ngpt", torch.float32, std=None, d_model=256, n_heads=4, vocab_size=1000)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            assert float(weight.detach().std()) == pytest.approx(256**-0.5, rel=0.03), name
            assert abs(float(weight.detach().mean())) < 0.02 * 256**-0.5, name
    with torch.no_grad():
        logits = model.logits(model(tokens_of(rows=4, length=32, vocabulary=1000)))
    nats = F.cross_entropy(logits.flatten(0, 1), tokens_of(4, 32, seed=2, vocabulary=1000).flatten())
    assert abs(float(nats) - math.log(1000)) < 0.1


# -- scales ------------------------------------------------------------------------------------------------------


def test_scales_are_stored_and_used_as_the_paper_says():
    """(stored, used) of each; d = 16, f = 64."""
    model = build("ngpt", torch.float64, std=None)
    found = {
        name.removeprefix("layers.0."): (module.weight, module())
        for name, module in model.named_modules()
        if isinstance(module, Scale) and not name.startswith("layers.1")
    }
    expected = {
        "attn_alpha": (16, 0.25, 0.05),
        "mlp_alpha": (16, 0.25, 0.05),
        "self_attn.qk_scale": (16, 0.25, 1.0),
        "mlp.gate_scale": (64, 1.0, 1.0),
        "mlp.up_scale": (64, 1.0, 1.0),
        "head_scale": (128, 0.25, 1.0),
    }
    assert found.keys() == expected.keys()
    for name, (width, stored, used) in expected.items():
        for tensor, value in zip(found[name], (stored, used), strict=True):
            torch.testing.assert_close(tensor, torch.full((width,), value, dtype=torch.float64), msg=name)
    scale = Scale(3, init=0.05, stored=0.25)
    scale.init_weights()
    scale.weight.data += torch.tensor([0.0, 0.25, -0.25])
    torch.testing.assert_close(scale(), torch.tensor([0.05, 0.1, 0.0]))


def test_rates_follow_the_width_as_entries_of_unit_vectors_do():
    """Both of them go as D^-1/2: a step turns a vector by the same angle at every width."""

    def rates(*words):
        adapter = adapter_of("ngpt", "learning_rate=0.003", "lr_base_width=256", *words)
        rules, cfg = (
            adapter.param_roles(),
            config("ngpt", "learning_rate=0.003", "lr_base_width=256", *words)[0],
        )
        found = {}
        for name, p in adapter.named_model_parameters():
            (row,) = role_table([(name, p)], rules, cfg, adapter.width)
            found.setdefault(f"{rule_for(rules, name).role} {name.split('.')[-2]}", set()).add(row["lr"])
        return {name: values.pop() for name, values in found.items() if len(values) == 1}

    plain = rates("lr_scaling=none")
    assert set(plain.values()) == {0.003}
    followed = {"embedding embed_tokens", "head lm_head", "scalar attn_alpha", "scalar mlp_alpha"}
    followed |= {"scalar qk_scale", "scalar head_scale"}
    followed |= {f"matrix {name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    at_64 = rates()
    assert at_64 == {name: 0.006 if name in followed else 0.003 for name in plain}
    assert plain.keys() - followed == {"scalar up_scale", "scalar gate_scale"}
    fixed = rates("model_cfg.alpha_scale=0.1", "model_cfg.sqk_scale=0.1", "model_cfg.sz_scale=0.1")
    given = {"scalar attn_alpha", "scalar mlp_alpha", "scalar qk_scale", "scalar head_scale"}
    assert {name for name, rate in fixed.items() if rate != at_64[name]} == given
    of_muon = rates("optimizer=muon", "muon_learning_rate=0.02")
    assert {rate for name, rate in of_muon.items() if name.startswith("matrix")} == {0.02}


def test_a_step_of_muon_turns_vectors_by_about_its_rate_at_every_width():
    """Of D^-1/2 entries as of matrices that are wider or higher than long."""
    for width in (64, 256):
        session = session_of(
            "ngpt", f"model_cfg.d_model={width}", "optimizer=muon", "muon_learning_rate=0.02"
        )
        before = {name: p.detach().clone() for name, p in session.adapter.model.named_parameters()}
        train_on(session, batch_for(session.adapter), range(1), total=10)
        for name, weight in session.adapter.model.named_parameters():
            kind = name.split(".")[-2]
            if kind.endswith("_proj"):
                moved = (weight - before[name]).norm(dim=1 if kind in ROWS else 0).square().mean().sqrt()
                assert 0.3 < moved / 0.02 < 1.4, (width, name)


def test_rates_of_one_role_that_follow_the_width_in_two_ways_are_both_told():
    rates = session_of("ngpt", "learning_rate=0.003").optimizers.learning_rates()
    assert rates["matrix"] == rates["embedding"] == rates["scalar"] == pytest.approx(0.003 * 12**0.5)
    (other,) = (name for name in rates if name.startswith("scalar x"))
    assert rates[other] == 0.003 and other == "scalar x0.289"


# -- states ------------------------------------------------------------------------------------------------------


def test_states_have_length_1_behind_every_half_block_and_raw_logits_are_cosines(monkeypatch):
    import models.ngpt as ngpt

    model, seen, update = model_of(torch.float32), [], ngpt.ngpt_update
    model.embed_tokens.weight.data *= 3  # as between two of `normalize_every` steps

    def watched(*args):
        seen.append((args[0], update(*args)))
        return seen[-1][1]

    monkeypatch.setattr(ngpt, "ngpt_update", watched)
    last = model(tokens_of())
    assert len(seen) == 4
    for pair in seen:
        for state in pair:
            torch.testing.assert_close(state.norm(dim=-1), torch.ones(2, 9), rtol=0, atol=1e-4)
    raw = last @ model.lm_head.weight.T
    assert raw.abs().max() <= 1 + 1e-6 and raw.std() > 0.05


def test_a_block_that_goes_no_way_is_the_identity_and_one_in_every_dim_by_itself():
    model = model_of()
    block, tokens = model.layers[0], tokens_of()
    x, shared = model.embed(tokens, None, None)
    assert (block(x, *shared) - x).norm() > 0.1
    block.mlp_alpha.weight.data.zero_()
    block.attn_alpha.weight.data.zero_()
    torch.testing.assert_close(block(x, *shared), x, rtol=0, atol=1e-14)
    block.attn_alpha.weight.data[3] = -1.0  # as far as 1: lengths of the way count
    y = block(x, *shared)
    ratio = y / x
    others = ratio[..., [dim for dim in range(16) if dim != 3]]
    torch.testing.assert_close(others, others[..., :1].expand_as(others), rtol=1e-9, atol=0)
    assert (ratio[..., 3] - ratio[..., 0]).abs().min() > 1e-3
    block.attn_alpha.weight.data[3] = 1.0
    assert torch.equal(y, block(x, *shared))


def test_queries_like_their_keys_score_the_root_of_the_head_width(monkeypatch):
    """Whatever their lengths before; each head and dim has its scale, behind the rotation."""
    import models.ngpt as ngpt

    seen = {}

    def listen(q, k, v, plan):
        seen.update(q=q, k=k, v=v, scale=plan.options.scale)
        return torch.zeros_like(q)

    monkeypatch.setattr(ngpt, "attention", listen)
    model = build("ngpt", torch.float64, std=None)
    attention = model.layers[0].self_attn
    attention.k_proj.weight.data = 5 * attention.q_proj.weight.data
    x, shared = model.embed(tokens_of(), None, None)
    attention(x, *shared, None)
    scores = seen["scale"] * seen["q"] @ seen["k"].mT
    torch.testing.assert_close(
        scores.diagonal(dim1=-2, dim2=-1), torch.full((2, 4, 9), 2.0, dtype=torch.float64)
    )
    plain = {name: seen[name] for name in "qkv"}
    scale = torch.rand(16, dtype=torch.float64) + 0.5
    attention.qk_scale.weight.data *= scale
    attention(x, *shared, None)
    by_head = scale.view(1, 4, 1, 4)
    torch.testing.assert_close(seen["q"], plain["q"] * by_head)
    torch.testing.assert_close(seen["k"], plain["k"] * by_head)
    assert torch.equal(seen["v"], plain["v"])
    assert (seen["v"].norm(dim=-1) - 1).abs().max() > 0.1, "values keep their length"


def test_neighbouring_dims_turn_by_position(monkeypatch):
    """Layout "pair": dims 2i and 2i + 1 by t theta^(-2i/h)."""
    import models.ngpt as ngpt

    seen = {}
    monkeypatch.setattr(ngpt, "attention", lambda q, k, v, plan: seen.update(q=q) or torch.zeros_like(q))
    model = build("ngpt", torch.float64, std=None, rope_theta=100.0)
    tokens = torch.full((1, 9), 3)  # the same token everywhere
    x, shared = model.embed(tokens, None, None)
    model.layers[0].self_attn(x, *shared, None)
    q = torch.view_as_complex(seen["q"].unflatten(-1, (2, 2)))  # (1, H, T, h/2)
    angles = torch.arange(9.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(q, q[:, :, :1] * torch.polar(torch.ones_like(angles), angles))


def test_both_forms_of_the_hidden_layer_give_the_same_states():
    """The released code multiplies `u` by sqrt(d) too, which the norm behind takes out again; the paper's needs it in
    front of silu."""
    model, tokens = model_of(torch.float32), tokens_of()
    states = model(tokens)
    for block in model.layers:
        block.mlp.up_scale.factor *= 4.0  # sqrt(16)
    torch.testing.assert_close(model(tokens), states, rtol=0, atol=1e-5)
    for block in model.layers:
        block.mlp.gate_scale.factor *= 4.0
    assert (model(tokens) - states).abs().max() > 1e-2

    mlp = MLP(NGPTConfig(d_model=16, n_heads=4, ffn_hidden=12)).double()
    for p in mlp.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(5, 16, dtype=torch.float64)
    u = mlp.up_scale.weight * (x @ mlp.up_proj.weight.T)
    v = 4.0 * mlp.gate_scale.weight * (x @ mlp.gate_proj.weight.T)
    torch.testing.assert_close(mlp(x), (u * v * torch.sigmoid(v)) @ mlp.down_proj.weight.T)


def test_logits_have_a_scale_per_token_in_training_scores_and_text():
    adapter = adapter_of("ngpt", dtype=torch.float64)
    model, batch = adapter.model, batch_for(adapter)
    source = torch.Generator().manual_seed(0)
    model.head_scale.weight.data.normal_(generator=source)
    prepared = adapter.prepare(batch, context())
    states = adapter.hidden(prepared).states
    used = model.head_scale.weight * 64**0.5
    logits = (used * (states @ model.lm_head.weight.T))[..., :64]
    torch.testing.assert_close(model.logits(states), logits)
    nats = F.cross_entropy(logits.mT, prepared.tensors["targets"], reduction="none")
    torch.testing.assert_close(adapter(prepared).terms["ce"].sum, nats.sum())
    scored = adapter.eval().likelihood(batch, context(phase="eval"))
    torch.testing.assert_close(scored.per_token, nats.detach())
    last = adapter.next_logits(prepared.tensors["inputs"], None)
    torch.testing.assert_close(last, logits[:, -1])

    weighted_loss(adapter(prepared).terms, prepared.denominators).backward()
    ours = [model.head_scale.weight.grad.clone(), model.lm_head.weight.grad.clone()]
    loss = nats.sum() / prepared.denominators["tokens"]
    theirs = torch.autograd.grad(loss, [model.head_scale.weight, model.lm_head.weight])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert ours[0][:64].all() and not ours[0][64:].any(), "padding gets no gradient"


def test_embedding_and_head_may_be_one_matrix():
    tied, untied = build("ngpt", tie_embeddings=True), build("ngpt")
    assert tied.lm_head is None and untied.lm_head.weight is not untied.embed_tokens.weight
    tied.constrain(NOT_SKIPPED)
    assert off_the_sphere(tied) < 1e-12
    states = tied(tokens_of())
    raw = states @ tied.embed_tokens.weight.T * tied.head_scale.weight * 4
    torch.testing.assert_close(tied.logits(states), raw[..., :VOCABULARY])


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1, 1, 1, 1], [7, 2], [5, 1, 3]])
def test_cached_keys_are_as_compared(sizes):
    model, tokens = model_of(), tokens_of()
    whole, cache = model(tokens), model.init_cache(2)
    pieces = [model(part, cache=cache) for part in tokens.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-12)
    keys = cache._layers[0][0][:, :, :9]  # (B, H, T, h)
    scale = model.layers[0].self_attn.qk_scale().view(4, 1, 4)
    torch.testing.assert_close((keys / scale).norm(dim=-1), torch.ones(2, 4, 9, dtype=torch.float64))


# -- runs --------------------------------------------------------------------------------------------------------


def test_an_average_of_weights_is_put_onto_the_sphere_and_the_weights_come_back():
    session = session_of("ngpt", "learning_rate=0.05", "ema_decay=0.9")
    model = session.adapter.model
    train_on(session, batch_for(session.adapter), range(4), total=10)
    raw = {name: p.detach().clone() for name, p in model.named_parameters()}
    shadow = session.ema.shadow["layers.0.mlp.up_proj.weight"]
    assert shadow.norm(dim=1).max() < 0.999, "a mean of unit vectors is shorter"
    with session.averaged_weights():
        assert off_the_sphere(model) < 1e-6
        assert not torch.equal(model.lm_head.weight, raw["lm_head.weight"])
    assert all(torch.equal(p, raw[name]) for name, p in model.named_parameters())


def test_decay_of_weights_is_refused():
    with pytest.raises(
        ConfigError, match=r"weight_decay \(0.1\) shrinks nothing here.*Nearest: weight_decay=0"
    ):
        config("ngpt", "weight_decay=0.1")
    with pytest.raises(ConfigError, match=r"muon_weight_decay \(0.1\) shrinks nothing here"):
        config("ngpt", "optimizer=muon", "muon_weight_decay=0.1")
    cfg, _ = config("ngpt")
    assert (cfg.weight_decay, cfg.warmup_ratio, cfg.scheduler, cfg.min_lr_ratio) == (0.0, 0.0, "cosine", 0.0)


def test_sizes_are_those_of_the_control():
    """The same products, and parameters but for scales in place of gains."""
    sizes = {"d_model": 768, "n_heads": 12, "n_layers": 12, "vocab_size": 50257, "n_ctx": 1024}
    with torch.device("meta"):
        ours = NGPT(NGPTConfig(**sizes))
        control = Vanilla(VanillaConfig(**sizes, tie_embeddings=False))
    matrices = [sum(p.numel() for p in m.parameters() if p.ndim == 2) for m in (ours, control)]
    assert matrices[0] == matrices[1] == 12 * (4 * 768**2 + 3 * 768 * 2048) + 2 * 50304 * 768
    vectors = sum(p.numel() for p in ours.parameters() if p.ndim == 1)
    assert vectors == 12 * (3 * 768 + 2 * 2048) + 50304
    assert ours.flops(1024) == control.flops(1024)


def test_the_papers_file_has_its_sizes():
    cfg, model_cfg = compose(
        ["--hydra_model_cfg=configs/papers/ngpt_paper.yaml", "preset=none"], notify=lambda text: None
    )
    assert cfg.global_batch_size * cfg.train_seq_len == 524_288
    with torch.device("meta"):
        model = NGPT(model_cfg.model_copy(update={"vocab_size": 50257}))
    blocks = 24 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert sum(p.numel() for p in model.layers.parameters() if p.ndim == 2) == blocks


# -- the control -------------------------------------------------------------------------------------------------


def test_the_controls_residual_carries_the_state_itself():
    """Not its norm: with branches that write nothing the embedding arrives as it is, bit for bit."""
    control = build("vanilla", torch.float32)
    for block in control.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    control.norm = torch.nn.Identity()
    tokens = tokens_of()
    assert torch.equal(control(tokens), control.embed_tokens(tokens))
