"""The diffusion transformer against loops written from the equations; its sizes; what may depend on what."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import RunConfig
from kernels.attention import Visible, attention, plan_attention
from kernels.choose import Kernels
from kernels.linear_diffusion_loss import linear_diffusion_loss
from models.bd3lm import BD3LM, BD3LMConfig
from models.d3pm import D3PM, D3PMConfig
from models.dit import DiT, DiTConfig
from models.layers.roles import parameters_by_role, rule_for
from models.mdl import MDL, MDLConfig
from models.sedd import SEDD, SEDDConfig
from tests.models.dit_reference import hidden_states

SIZES = {"vocab_size": 11, "n_ctx": 16, "d_model": 12, "n_layers": 2, "n_heads": 2, "cond_dim": 8}
ALL = ((D3PM, D3PMConfig), (MDL, MDLConfig), (SEDD, SEDDConfig), (BD3LM, BD3LMConfig))


def build(
    cls: type[DiT] = SEDD, dtype: torch.dtype = torch.float64, trained: bool = True, **fields: Any
) -> Any:
    """A tiny model in evaluation mode. `trained`: all parameters moved off their initial values."""
    model = cls(cls.Config(**{**SIZES, "dropout": 0.0, **fields})).to(dtype)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def inputs(rows: int = 2, length: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tau = 3 * torch.rand(rows, generator=generator)
    return torch.randint(0, 12, (rows, length), generator=generator), tau


# -- equations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_equals_loops_in_fp64(tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    tokens, tau = inputs()
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 1], [4, 4, 4, 4, 4, 5]], dtype=torch.int32)
    found = model(tokens, tau, doc_ids=doc_ids)
    weights = dict(model.named_parameters())
    rows = []
    for b in range(2):
        same = (doc_ids[b][:, None] == doc_ids[b]).tolist()
        rows.append(hidden_states(weights, tokens[b].tolist(), [tau[b].item()] * 6, same, 2, 2, 1e-5))
    wanted = torch.stack(rows)
    assert (found - wanted).abs().max() < 1e-9

    direction = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    used = {name: p for name, p in weights.items() if not name.startswith("output")}
    one, other = (torch.autograd.grad((h * direction).sum(), list(used.values())) for h in (found, wanted))
    for name, a, b in zip(used, one, other, strict=True):
        assert (a - b).abs().max() < 1e-7 * max(1.0, b.abs().max().item()), name


def test_time_per_position() -> None:
    """The same time everywhere is the time of the row; different times act where they are."""
    model = build()
    tokens, tau = inputs()
    everywhere = model(tokens, tau[:, None].expand(tokens.shape))
    assert (everywhere - model(tokens, tau)).abs().max() < 1e-12
    times = 3 * torch.rand(6, generator=torch.Generator().manual_seed(3))
    found = model(tokens[:1], times[None])[0]
    wanted = hidden_states(
        dict(model.named_parameters()), tokens[0].tolist(), times.tolist(), [[True] * 6] * 6, 2, 2, 1e-5
    )
    assert (found - wanted).abs().max() < 1e-9


def test_logits_are_the_output_layer() -> None:
    for tied in (False, True):
        model = build(tie_word_embeddings=tied)
        hidden = model(*inputs())
        weight = model.embed.weight if tied else model.output.weight
        assert torch.allclose(model.logits(hidden), hidden @ weight.T + model.output.bias)
        assert model.logits(hidden).shape[-1] == model.V == 12


# -- what may depend on what -------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "config"), ALL[:3])
def test_sees_later_tokens(cls: type[DiT], config: type[DiTConfig]) -> None:
    """Not causal: a changed token reaches every position, before and after it."""
    model = build(cls)
    tokens, tau = inputs()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    difference = (model(tokens, tau) - model(changed, tau)).abs().amax(-1)
    assert difference.min() > 1e-6


def test_documents_do_not_see_each_other() -> None:
    model = build()
    tokens, tau = inputs()
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    difference = (model(tokens, tau, doc_ids) - model(changed, tau, doc_ids)).abs().amax(-1)
    assert difference[:, :3].max() == 0
    assert difference[:, 3:].min() > 1e-6
    # A document alone gives the same: positions are relative.
    alone = model(tokens[:, 3:], tau)
    assert (alone - model(tokens, tau, doc_ids)[:, 3:]).abs().max() < 1e-10
    # Rows do not see each other either.
    assert (model(tokens, tau)[1:] - model(tokens[1:], tau[1:])).abs().max() < 1e-12


def test_attention_argument_restricts() -> None:
    model = build()
    tokens, tau = inputs()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    difference = (model(tokens, tau, attention=causal) - model(changed, tau, attention=causal)).abs().amax(-1)
    assert difference[:, :4].max() == 0 and difference[:, 4:].min() > 1e-6
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1]] * 2)
    both = model(tokens, tau, doc_ids, attention=causal)
    assert (both[:, :4] - model(tokens, tau, attention=causal)[:, :4]).abs().max() < 1e-12
    assert (both[:, 4:] - model(tokens[:, 4:], tau, attention=causal[:2, :2])).abs().max() < 1e-10


@pytest.mark.parametrize(("cls", "config"), ALL[:3])
def test_time_matters_where_it_is_used(cls: type[DiT], config: type[DiTConfig]) -> None:
    model = build(cls)
    tokens, tau = inputs()
    moved = (model(tokens, tau) - model(tokens, tau + 0.5)).abs().max()
    assert (moved > 1e-3) if model.cfg.time_conditioning else (moved == 0)
    assert model.cfg.time_conditioning == (cls is not MDL)
    # The time MLP exists and learns in either case: no parameter is left out of a distributed step.
    model(tokens, tau).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.time.parameters())


def test_dropout() -> None:
    model = build(dropout=0.5)
    tokens, tau = inputs()
    quiet = model(tokens, tau)
    assert torch.equal(quiet, model(tokens, tau))
    model.train()
    torch.manual_seed(0)
    noisy = model(tokens, tau)
    assert (noisy - quiet).abs().max() > 1e-3
    assert (noisy - model(tokens, tau)).abs().max() > 1e-3
    for name, fields in (("off", {"dropout": 0.0}), ("on", {"dropout": 0.5})):
        same = torch.equal(build(**fields).train()(tokens, tau), build(**fields)(tokens, tau))
        assert same == (name == "off")


def test_dropout_acts_on_what_attention_and_mlp_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each in every block, at the configured rate, before the residual sum; without either, a block is nothing."""
    model = build(dropout=0.37, n_layers=3)
    tokens, tau = inputs()
    added: list[Tensor] = []
    for block in model.layers:
        for part in (block.attn, block.mlp):
            part.register_forward_hook(lambda module, given, out: added.append(out))
    calls: list[tuple[Tensor, float, bool]] = []
    silent: set[int] = set()

    class Functional:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch.nn.functional, name)

        def dropout(self, x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
            calls.append((x, p, training))
            return torch.zeros_like(x) if len(calls) - 1 in silent else x

    monkeypatch.setattr("models.dit.F", Functional())
    whole = model(tokens, tau)
    assert not any(training for _, _, training in calls)
    model.train()
    for index in range(6):
        calls.clear()
        added.clear()
        silent = {index}
        assert (model(tokens, tau) - whole).abs().max() > 1e-6
        assert [(p, training) for _, p, training in calls] == [(0.37, True)] * 6
        assert all(x is branch for (x, _, _), branch in zip(calls, added, strict=True))
    calls.clear()
    silent = set(range(6))
    c = model.condition(tau)
    alone = model.final_norm(model.embed(tokens), *model.final_adaln(c))
    assert torch.allclose(model(tokens, tau), alone, atol=1e-12)


@pytest.mark.parametrize("name", ["eps", "d_mult", "cond_dim", "n_heads"])
def test_sizes_matter(name: str) -> None:
    tokens, tau = inputs()
    other = {"eps": 0.1, "d_mult": 2, "cond_dim": 6, "n_heads": 3}[name]
    assert (build()(tokens, tau) - build(**{name: other})(tokens, tau)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_paths_agree(dtype: torch.dtype) -> None:
    """In bf16 on a CPU short rows take plain products."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator).to(dtype) for _ in range(3))
    allowed = torch.rand(2, 1, 7, 7, generator=generator) < 0.6
    allowed |= torch.eye(7, dtype=torch.bool)
    visible = Visible(2, 7, 7, q.device, causal=False, mask=allowed)
    plan = plan_attention(visible, dtype=dtype, heads=(3, 3), width=8, kernels=Kernels())
    found = attention(q, k, v, plan)
    scores = (q.double() @ k.double().transpose(-1, -2) / math.sqrt(8)).masked_fill(~allowed, -torch.inf)
    assert (found.double() - scores.softmax(-1) @ v.double()).abs().max() < (
        1e-6 if dtype.itemsize == 4 else 3e-2
    )


def test_autocast_is_near_and_fp32_at_its_residual_stream() -> None:
    model = build(dtype=torch.float32)
    tokens, tau = inputs()
    exact = model(tokens, tau)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, tau)
        assert rough.dtype == torch.bfloat16  # ready for the output layer
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


# -- initialisation ----------------------------------------------------------------------------------------


def test_starts_as_identity_and_uniform() -> None:
    model = build(MDL, trained=False, d_model=48, vocab_size=100)
    tokens, tau = inputs()
    x = model.embed(tokens)
    expected = torch.nn.functional.layer_norm(x, (48,), eps=1e-5)
    assert (model(tokens, tau) - expected).abs().max() < 1e-12
    assert model.logits(model(tokens, tau)).abs().max() == 0
    # so the integrand of the bound is log n per masked token
    x0, xt = tokens.flatten(), torch.full((12,), model.mask_id)
    for mode in ("subs", "sedd_absorb"):
        _, nats, _ = linear_diffusion_loss(
            model(tokens, tau).flatten(0, 1),
            model.head_weight,
            model.head_bias,
            x0,
            xt,
            torch.ones(12),
            {},
            mode=mode,
            V=model.V,
            n=model.n,
            mask_id=model.mask_id,
        )
        assert torch.allclose(nats, torch.full_like(nats, math.log(100)), rtol=1e-13)


@pytest.mark.parametrize("tied", [False, True])
def test_initial_scales(tied: bool) -> None:
    """Uniform within 1/sqrt(fan_in) has standard deviation 1/sqrt(3 fan_in)."""
    model = DiT(DiTConfig(vocab_size=2000, d_model=256, n_layers=1, n_heads=4, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        if "adaln" in name or name.startswith("output"):
            assert p.abs().max() == 0, name
        elif name.endswith("norm.weight") or "norm1" in name or "norm2" in name:
            assert (p == 1).all(), name
        elif name == "embed.weight":
            wanted = 0.02 if tied else 1 / math.sqrt(3 * 256)
            assert p.std().item() == pytest.approx(wanted, rel=0.01)
            assert tied or p.abs().max() <= 256**-0.5
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(1 / math.sqrt(3 * p.shape[1]), rel=0.02), name
            assert p.abs().max() <= p.shape[1] ** -0.5
        else:
            fan_in = model.get_parameter(name.replace("bias", "weight")).shape[1]
            assert 0.9 * fan_in**-0.5 < p.abs().max() <= fan_in**-0.5, name


def test_same_seed_same_weights_and_meta_build() -> None:
    with torch.device("meta"):
        model = SEDD(SEDDConfig(**SIZES))
    model.to_empty(device="cpu")
    assert not list(model.buffers())
    model.init_weights(torch.Generator().manual_seed(0))
    other = build(dtype=torch.float32, trained=False)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# -- sizes, roles, cost ------------------------------------------------------------------------------------


def test_published_parameter_counts() -> None:
    """MDLM and SEDD at the size of GPT-2: 12 layers of 768, conditioning 128, 50257 tokens and the mask."""
    counts = {}
    for tied in (False, True):
        with torch.device("meta"):
            model = MDL(MDLConfig(vocab_size=50257, tie_word_embeddings=tied))
        counts[tied] = sum(p.numel() for p in model.parameters())
        inner = [
            p.numel() for name, p in model.named_parameters() if not name.startswith(("embed", "output"))
        ]
        assert sum(inner) == 92_380_672
        assert sum(parameters_by_role(model.param_roles(), model.named_parameters()).values()) == counts[tied]
    assert counts == {False: 169_627_218, True: 131_029_074}


def test_roles() -> None:
    model = build()
    rules = model.param_roles()
    hidden = ("attn.qkv.weight", "attn.out.weight", "mlp.up.weight", "mlp.down.weight")
    for name, parameter in model.named_parameters():
        matching = rule_for(rules, name)
        wanted = "matrix" if name.endswith(hidden) else "scalar"
        wanted = {"embed.weight": "embedding", "output.weight": "head"}.get(name, wanted)
        assert matching.role == wanted, name
        assert matching.split == (3 if name.endswith("qkv.weight") else 1)
        assert parameter.ndim == 2 or matching.role == "scalar"
    assert all(rule_for(rules, f"{block}.attn.qkv.weight").role == "matrix" for block in model.blocks())
    assert all(isinstance(model.get_submodule(block), torch.nn.Module) for block in model.blocks())


@pytest.mark.parametrize(
    "fields", [{}, {"d_mult": 2}, {"tie_word_embeddings": True}, {"time_conditioning": False}]
)
def test_flops_equal_the_counter(fields: dict[str, Any]) -> None:
    """Attention counts all pairs: there is no causal half. Without time conditioning, it is computed once and counts as
    nothing."""
    model = build(dtype=torch.float32, **fields)
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(tokens, torch.ones(1)))
    flops = model.flops(16)
    once = 0 if model.cfg.time_conditioning else model._conditioning()
    assert counter.get_total_flops() - once == 16 * flops.forward_per_token
    unread = (1 - model.cfg.share_of_logits) * 2 * model.head_weight.numel()
    assert flops.training_per_token == 3 * (flops.forward_per_token - unread)


def test_published_flops() -> None:
    with torch.device("meta"):
        model = SEDD(SEDDConfig(vocab_size=50257))
    assert round(model.flops(1024).forward_per_token / 1e6, 1) == 284.8
    assert round(model.flops(1024).training_per_token / 1e6) == 739, "masked rows alone reach the head"
    with torch.device("meta"):
        every = SEDD(SEDDConfig(vocab_size=50258, transition_type="uniform"))
    assert round(every.flops(1024).training_per_token / 1e6) == 854


def test_the_head_is_counted_where_the_loss_reads_it() -> None:
    """Masked positions, half of all on average; with an auxiliary loss or without a mask all of them."""
    discrete: dict[str, Any] = {"use_subs_parameterization": False, "continuous_time": False}
    assert MDLConfig(**discrete).share_of_logits == MDLConfig().share_of_logits == 0.5
    assert (
        D3PMConfig().share_of_logits == 1.0 and D3PMConfig(auxiliary_loss_weight=0.0).share_of_logits == 0.5
    )
    assert BD3LMConfig(block_length=1).share_of_logits == 1.0
    assert BD3LMConfig(sampling_eps_min=0.3, sampling_eps_max=0.8).share_of_logits == pytest.approx(0.55)


# -- states and configuration ------------------------------------------------------------------------------


def test_state_space() -> None:
    appended = build(MDL)
    assert (appended.n, appended.V, appended.mask_id) == (11, 12, 11)
    reserved = build(MDL, absorbing_state_idx=3)
    assert (reserved.n, reserved.V, reserved.mask_id) == (10, 11, 3)
    maskless = build(D3PM, transition_type="uniform")
    assert (maskless.n, maskless.V, maskless.mask_id) == (11, 11, None)
    assert maskless.embed.weight.shape[0] == 11
    with pytest.raises(ValueError, match="must be below the vocabulary"):
        build(MDL, absorbing_state_idx=11)
    with pytest.raises(ValueError, match="must be filled in"):
        MDL(MDLConfig())


PROBLEMS: list[tuple[type[DiTConfig], dict[str, Any], str]] = [
    (DiTConfig, {"d_model": 12, "n_heads": 4}, "must be even"),
    (DiTConfig, {"d_model": 13, "n_heads": 4}, "must be divisible"),
    (DiTConfig, {"vocab_size": 5, "absorbing_state_idx": 5}, "must be below model_cfg.vocab_size"),
    (D3PMConfig, {"transition_type": "uniform", "absorbing_state_idx": 3}, "this chain has none"),
    (D3PMConfig, {"sampling_timesteps": 11, "num_timesteps": 10}, "must not exceed"),
    (D3PMConfig, {"linear_beta_min": 0.5, "linear_beta_max": 0.1}, "linear_beta_max"),
    (D3PMConfig, {"gaussian_beta_min": 0.5}, "gaussian_beta_max"),
    (D3PMConfig, {"transition_type": "uniform", "zero_mask_logit": True}, "needs a mask state"),
    (D3PMConfig, {"transition_type": "nearest_neighbor"}, "nn_embedding_path"),
    (D3PMConfig, {"transition_type": "gaussian", "vocab_size": 20000}, "dense_state_limit"),
    (MDLConfig, {"alpha_min": 0.5, "alpha_max": 0.5}, "must be below model_cfg.alpha_max"),
    (MDLConfig, {"alpha_type": "geometric", "sigma_min": 30.0}, "must be below model_cfg.sigma_max"),
    (MDLConfig, {"alpha_type": "geometric", "sigma_min": 0.0}, "above 0"),
    (MDLConfig, {"use_subs_parameterization": False, "sampler": "ancestral"}, "continuous_time=false"),
    (MDLConfig, {"time_conditioning": True}, "ancestral_cache"),
    (
        MDLConfig,
        {"sampler": "first_hitting", "use_subs_parameterization": False, "continuous_time": False},
        "never draws the mask",
    ),
    (MDLConfig, {"sar_chunk_size": 1024}, "nearest: 1023"),
    (SEDDConfig, {"sigma_min": 30.0}, "must be below model_cfg.sigma_max"),
    (SEDDConfig, {"se_loss_weight": 0.0}, "nothing is trained"),
    (SEDDConfig, {"transition_type": "uniform", "scale_by_sigma": True}, "scale_by_sigma must be false"),
    (SEDDConfig, {"transition_type": "uniform", "lm_loss_weight": 0.1}, "lm_loss_weight=0"),
    (BD3LMConfig, {"sampling_eps_min": 0.5, "sampling_eps_max": 0.4}, "must be below"),
    (BD3LMConfig, {"block_length": 4, "sampling_eps_max": 0.2}, "nothing would be trained. At least 0.25"),
    (BD3LMConfig, {"sampler": "ancestral_cache", "time_conditioning": True}, "ancestral_cache"),
    (BD3LMConfig, {"n_ctx": 1000}, "nearest: 992, 1008"),
]


@pytest.mark.parametrize(("config", "fields", "message"), PROBLEMS)
def test_problems_are_named_once(config: type[DiTConfig], fields: dict[str, Any], message: str) -> None:
    run = RunConfig(type="sedd")
    assert config().problems(run) == []
    (problem,) = config(**fields).problems(run)
    assert message in problem


def test_an_embedding_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "table.npy").touch()
    for path, found in (("~/table.npy", 0), ("~/absent.npy", 1), ("~nobody-at-all/table.npy", 1)):
        cfg = D3PMConfig(transition_type="nearest_neighbor", nn_embedding_path=path)
        assert len(cfg.problems(RunConfig(type="d3pm"))) == found


def test_blocks_of_one_token_read_no_range() -> None:
    assert BD3LMConfig(block_length=1, sampling_eps_max=0.5).problems(RunConfig(type="bd3lm")) == []


def test_row_lengths_of_block_diffusion() -> None:
    run = RunConfig(type="bd3lm", train_seq_len=100, val_seq_len=10)
    assert len(BD3LMConfig(block_length=4).problems(run)) == 1
    assert len(BD3LMConfig(block_length=3, n_ctx=99).problems(run)) == 2


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (D3PMConfig, {"transition_type": "masking"}),
        (D3PMConfig, {"noise_schedule": "loglinear"}),
        (D3PMConfig, {"sampling_eps": 1e-3}),  # times are discrete
        (MDLConfig, {"alpha_type": "sqrt"}),
        (SEDDConfig, {"transition_type": "uniform", "noise_schedule": "mutual_info"}),
        (SEDDConfig, {"noise_schedule": "cosine"}),
        (DiTConfig, {"absorbing_state_idx": -2}),
        (DiTConfig, {"is_causal": True}),
        (BD3LMConfig, {"sar_chunk_size": 4}),
    ],
)
def test_refused_values(config: type[DiTConfig], fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        config(**fields)


def test_a_name_of_two_schedules_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"loglinear.*linear_sigma"):
        MDLConfig(alpha_type="linear")  # type: ignore[arg-type]


def test_other_names_of_schedules() -> None:
    assert SEDDConfig(noise_schedule="mutual_info").noise_schedule == "loglinear"  # type: ignore[arg-type]
    assert MDLConfig().sar_chunk == 512 and MDLConfig(sar_chunk_size=7).sar_chunk == 7
    assert SEDDConfig().scaled and not SEDDConfig(transition_type="uniform").scaled
    assert not SEDDConfig(scale_by_sigma=False).scaled


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    model = build()
    tokens, tau = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    doc_ids = torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    assert (compiled(tokens, tau, doc_ids) - model(tokens, tau, doc_ids)).abs().max() < 1e-12
