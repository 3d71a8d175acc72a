"""Gates, dispatch, experts, and the decoder made of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.choose import Kernels
from models.layers.experts import BiasedGate, ExpertLayer, Experts, SoftmaxGate, balance
from models.layers.hashing import hashed_uniform
from models.layers.roles import rule_for
from models.moe import MoE, MoEConfig
from tests.contract.tiny import VOCABULARY, adapter_of, batch_for, config, context, loss_and_gradients
from trainer.session import _recompute_blocks

B, T, D, E, K, HIDDEN = 2, 12, 8, 4, 2, 16
BIASED = {"gate_type": "deepseek_v3"}
DEEPSEEK = ("model_cfg.gate_type=deepseek_v3", "model_cfg.top_k=2")


def gate_of(kind: str, **options) -> SoftmaxGate | BiasedGate:
    gate = (SoftmaxGate if kind == "mixtral" else BiasedGate)(D, E, K, **options)
    gate.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        gate.weight *= 50  # no longer undecided
    return gate


def layer_of(kind: str, dtype=torch.float64, **options) -> ExpertLayer:
    experts = Experts(D, E, HIDDEN, gated=True)
    experts.init_weights(torch.Generator().manual_seed(1), down_std=0.3)
    with torch.no_grad():
        experts.up_proj *= 20
        experts.gate_proj *= 20
    return ExpertLayer(gate_of(kind, **options), experts, None).to(dtype)


def tokens(rows: int = B, dtype=torch.float64, seed: int = 2) -> Tensor:
    return torch.randn(rows, T, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(layer: ExpertLayer, expert: int, x: Tensor) -> Tensor:
    e = layer.experts
    return (F.silu(x @ e.gate_proj[expert].T) * (x @ e.up_proj[expert].T)) @ e.down_proj[expert].T


# -- what is chosen, and how it weighs -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "total"), [("mixtral", 1.0), ("deepseek_v3", 2.5)])
def test_every_token_has_k_experts_whose_weights_add_up(kind, total):
    options = {"factor": total} if kind == "deepseek_v3" else {}
    gate = gate_of(kind, **options).double()
    choice = gate.choose(gate.logits(tokens(), None))
    assert choice.experts.shape == (B, T, K)
    assert (choice.experts.sort(-1).values.diff(dim=-1) > 0).all(), "distinct"
    torch.testing.assert_close(choice.weights.sum(-1), torch.full((B, T), total, dtype=torch.float64))
    torch.testing.assert_close(choice.shares.sum(-1), torch.ones(B, T, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_assignments_are_all_counted(kind):
    layer = layer_of(kind)
    _, told = layer(tokens())
    assert told["load"].sum(1).tolist() == [T * K] * B
    assert told["load"].shape == (B, E)


def test_mixtrals_weights_are_the_softmax_over_all_experts_made_to_sum_to_one():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    choice = gate_of("mixtral").choose(logits)
    p = logits.softmax(-1)[0]
    found = dict(zip(choice.experts[0].tolist(), choice.weights[0].tolist(), strict=True))
    assert found == pytest.approx({1: float(p[1] / (p[1] + p[2])), 2: float(p[2] / (p[1] + p[2]))})


def test_a_bias_chooses_and_does_not_weigh():
    gate = gate_of("deepseek_v3").double()
    logits = gate.logits(tokens(), None)
    plain = gate.choose(logits)
    gate.e_score_correction_bias += 0.7  # the same for all
    shifted = gate.choose(logits)
    assert torch.equal(plain.experts, shifted.experts) and torch.equal(plain.weights, shifted.weights)
    gate.e_score_correction_bias[2] += 0.2
    moved = gate.choose(logits)
    before, after = plain.experts.sort(-1), moved.experts.sort(-1)
    same = (before.values == after.values).all(-1)
    assert 0 < int(same.sum()) < same.numel()
    old, new = (
        c.weights.gather(-1, s.indices)[same] for c, s in ((plain, before), (moved, after))
    )  # by expert
    assert torch.equal(old, new)


def test_groups_leave_all_but_the_best_out():
    """Groups are scored by their two best; a lone favourite does not win for its group."""
    gate = gate_of("deepseek_v3", groups=2, kept_groups=1)
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5]])  # sums 1.0 and 1.1
    for bias in (0.0, -2.0):  # below zero too: what is left out is so for good
        gate.e_score_correction_bias.fill_(bias)
        assert sorted(gate.choose(torch.logit(scores)).experts[0].tolist()) == [2, 3]


def test_a_bias_is_told_apart_where_bf16_cannot():
    gate = BiasedGate(D, 2, 1)
    gate.init_weights(torch.Generator())
    gate.e_score_correction_bias.copy_(torch.tensor([0.300, 0.301]))
    for model in (gate, copy.deepcopy(gate).to(torch.bfloat16), copy.deepcopy(gate).double()):
        assert model.e_score_correction_bias.dtype == torch.float32
        assert model.choose(torch.zeros(1, 2)).experts.tolist() == [[1]]


def test_the_gate_computes_in_fp32_under_autocast():
    gate, x = gate_of("mixtral"), tokens(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate.logits(x, None)
    torch.testing.assert_close(logits, x.float() @ gate.weight.T)


# -- dispatch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3"])
def test_a_layer_is_the_weighted_sum_of_the_experts_of_each_token(kind):
    layer, x = layer_of(kind), tokens()
    y, _ = layer(x)
    choice = layer.gate.choose(layer.gate.logits(x, None))
    for row, place in ((0, 0), (1, 5), (1, T - 1)):
        expected = sum(
            w * dense(layer, int(e), x[row, place])
            for e, w in zip(choice.experts[row, place], choice.weights[row, place], strict=True)
        )
        torch.testing.assert_close(y[row, place], expected)


def test_equal_experts_are_one_dense_network():
    layer, x = layer_of("mixtral"), tokens()
    with torch.no_grad():
        for stack in layer.experts.parameters():
            stack.copy_(stack[:1].expand_as(stack).clone())
    torch.testing.assert_close(layer(x)[0], dense(layer, 0, x))


def test_no_two_experts_share_weights():
    layer = layer_of("mixtral")
    assert all(not torch.equal(p[0], p[1]) for p in layer.experts.parameters())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
def test_all_groups_at_once_are_as_one_by_one(dtype, tolerance):
    """Outputs and all gradients, with an expert that nobody takes and one that everybody does."""
    found = []
    for name in ("reference", "grouped_mm"):
        layer, x = layer_of("mixtral", torch.float32), tokens(dtype=torch.float32).requires_grad_()
        layer.experts.kernels = Kernels({"grouped_linear": name})
        with torch.no_grad():
            layer.gate.weight[:, 0] = torch.tensor([100.0, -100.0, 0.0, 0.0])
            x[..., 0] = x[..., 0].abs() + 1
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, told = layer(x)
        assert y.dtype == dtype and told["load"].sum(0)[:2].tolist() == [B * T, 0]
        y.float().square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        assert not layer.experts.up_proj.grad[1].any(), "of an expert without tokens"
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(one.abs().max()))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        floats = any(isinstance(a, Tensor) and a.is_floating_point() for a in args)
        if floats and not (func.name() == "aten::index_put_" and not args[-1]):
            self.seen.add(func.name().removeprefix("aten::"))
        return func(*args, **kwargs or {})


def test_no_sum_is_made_by_adding_into_places():
    """Atomic on a GPU, and another result each time: neither forward nor backward."""
    layer, x = layer_of("mixtral", torch.float32), tokens(dtype=torch.float32).requires_grad_()
    with Ops() as ops:
        y, told = layer(x)
        (y.sum() + told["balance"].sum() + told["router_z"].sum()).backward()
    assert "index_select" in ops.seen, "gathers are seen"
    wrong = ("scatter_reduce", "index_add", "index_put", "bincount", "index_reduce", "_index_put_impl")
    assert not [name for name in ops.seen if name.startswith(wrong)]
    # Gathered scores have gradients with each place once: an addition there has one order.
    assert {name for name in ops.seen if "scatter" in name} <= {"scatter_add_", "scatter_add"}


# -- losses --------------------------------------------------------------------------------------------------------


def test_a_balance_is_one_where_all_are_equally_busy_and_e_over_k_where_the_same_always_win():
    even = torch.full((3, E), 6), torch.full((3, E), 1 / E)
    assert balance(*even).tolist() == [1.0] * 3
    collapsed = torch.tensor([[12, 12, 0, 0]]), torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert balance(*collapsed).tolist() == [E / K]


def test_a_row_is_balanced_by_its_own_tokens_unless_the_batch_is():
    layer, x = layer_of("mixtral"), tokens(3)
    alone = torch.cat([layer(row[None])[1]["balance"] for row in x])
    torch.testing.assert_close(layer(x)[1]["balance"], alone)
    layer.balance_over_batch = True
    together = layer(x)[1]["balance"]
    assert together.max() == together.min() and not torch.allclose(together, alone)


def test_the_gradient_of_a_balance_goes_through_shares_alone():
    layer, x = layer_of("mixtral"), tokens(1)
    choice = layer.gate.choose(layer.gate.logits(x, None))
    (found,) = torch.autograd.grad(layer(x)[1]["balance"].sum(), layer.gate.weight)
    f = F.one_hot(choice.experts, E).sum((0, 1, 2)) / (T * K)
    shares = (x @ layer.gate.weight.T).softmax(-1).mean((0, 1))
    (expected,) = torch.autograd.grad(E * (f * shares).sum(), layer.gate.weight)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0


def test_the_balance_of_a_sequence_counts_without_the_bias():
    layer, x = layer_of("deepseek_v3"), tokens()
    before = layer(x)[1]
    layer.gate.e_score_correction_bias[1] += 10.0
    after = layer(x)[1]
    assert torch.equal(before["sequence_balance"], after["sequence_balance"])
    assert not torch.equal(before["load"], after["load"])
    s = (x[0] @ layer.gate.weight.T).sigmoid()
    f = F.one_hot(s.topk(K).indices, E).sum((0, 1)) * E / (K * T)
    p = (s / s.sum(-1, keepdim=True)).mean(0)
    torch.testing.assert_close(after["sequence_balance"][0], (f * p).sum())


def test_the_z_loss_is_of_raw_logits():
    layer = layer_of("mixtral")
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[0, 0] = 100.0
    x = torch.zeros(1, 3, D, dtype=torch.float64)
    x[..., 0] = 1.0
    assert layer(x)[1]["router_z"].tolist() == pytest.approx([3 * 10_000.0])


# -- jitter, recomputation ---------------------------------------------------------------------------------------


def test_hashed_numbers_are_uniform_and_their_own_for_each_row_stream_and_place():
    seeds = torch.tensor([1, 2**40 + 7])
    u = hashed_uniform(seeds, 0, 20_000)
    assert u.shape == (2, 20_000) and float(u.min()) > 0 and float(u.max()) < 1
    assert torch.equal(u, hashed_uniform(seeds, 0, 20_000))
    assert torch.equal(u[:, :7], hashed_uniform(seeds, 0, 7))
    for sample in (u[0], u[1], hashed_uniform(seeds, 1, 20_000)[0]):
        assert abs(float(sample.mean()) - 0.5) < 0.01 and abs(float(sample.var()) - 1 / 12) < 0.003
    flat = torch.stack([u[0], u[1], hashed_uniform(seeds, 1, 20_000)[0], u[0].roll(1)])
    assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.03


def test_jitter_moves_what_the_gate_reads_and_nothing_that_experts_do():
    layer, x = layer_of("mixtral", jitter=0.2), tokens()
    seeds = torch.tensor([3, 4])
    plain, jittered = layer.gate.logits(x, None), layer.gate.logits(x, seeds)
    assert not torch.allclose(plain, jittered)
    factors = 1 + 0.2 * (2 * hashed_uniform(seeds, 0, T * D).double().view(x.shape) - 1)
    assert 0.8 < factors.min() < 0.85 and 1.15 < factors.max() < 1.2
    torch.testing.assert_close(jittered, (x * factors) @ layer.gate.weight.T)
    with torch.no_grad():
        for stack in layer.experts.parameters():  # then choices and weights change nothing
            stack.copy_(stack[:1].expand_as(stack).clone())
    torch.testing.assert_close(layer(x, seeds)[0], layer(x, None)[0])


def test_recomputation_draws_the_same_and_chooses_the_same():
    """Even if the scores were other ones the second time: those of the first are kept."""
    words = ("model_cfg.jitter_noise=0.1", "model_cfg.dropout=0.0")
    plain, again = (adapter_of("moe", *words, dtype=torch.float64) for _ in range(2))
    expected = loss_and_gradients(plain.train(), [batch_for(plain)])
    _recompute_blocks(again)
    for layer in again.layers:
        layer.gate.logits = off_by_a_little_every_other_time(layer.gate.logits)
    found = loss_and_gradients(again.train(), [batch_for(again)])
    assert found[0] == expected[0]
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
    assert sum(int(layer.gate.logits.calls[0]) for layer in again.layers) == 4, "each twice"


def off_by_a_little_every_other_time(logits):
    calls = [0]

    def planted(x, row_seeds):
        calls[0] += 1
        out = logits(x, row_seeds)
        return out + 1e-3 * (calls[0] % 2 == 0) * torch.arange(out.shape[-1])

    planted.calls = calls
    return planted


def test_jitter_is_of_training_alone_and_of_each_step():
    adapter = adapter_of("moe", "model_cfg.jitter_noise=0.1")
    batch = batch_for(adapter)
    assert "row_seeds" not in adapter.prepare(batch, context(phase="eval")).tensors
    first, other = (adapter.prepare(batch, context(step=s)).tensors["row_seeds"] for s in (0, 1))
    assert len(set(first.tolist()) | set(other.tolist())) == 8
    assert "row_seeds" not in adapter_of("moe").prepare(batch, context()).tensors


# -- the decoder ---------------------------------------------------------------------------------------------------


def model_of(**fields) -> MoE:
    with torch.device("meta"):
        return MoE(
            MoEConfig(**{"vocab_size": VOCABULARY, "n_layers": 4, "d_model": 192, "n_heads": 6, **fields})
        )


def test_where_experts_are():
    def layers(**fields) -> list[int]:
        return MoEConfig(n_layers=6, **fields).expert_layers

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(gate_type="deepseek_v3") == [1, 2, 3, 4, 5]
    assert layers(first_k_dense=1, moe_every=2) == [1, 3, 5]
    model = model_of(first_k_dense=1)
    assert ["experts" in dict(block.mlp.named_children()) for block in model.layers] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("gate", "sizes", "total", "active"),
    [("mixtral", (8, 2, 1024, 0, 12), 293.5, 123.7), ("deepseek_v3", (32, 7, 256, 1, 11), 286.1, 123.9)],
)
def test_published_sizes(gate, sizes, total, active):
    """Total and active parameters in millions, of GPT-2's width and vocabulary."""
    cfg = MoEConfig(vocab_size=50257, gate_type=gate)
    found = (cfg.experts, cfg.chosen, cfg.expert_width, cfg.shared, len(cfg.expert_layers))
    assert found == sizes
    with torch.device("meta"):
        model = MoE(cfg)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(total, abs=0.05)
    assert model.active_parameters() / 1e6 == pytest.approx(active, abs=0.05)


def test_flops_are_those_of_the_experts_that_a_token_uses():
    small = model_of().flops(64)
    assert model_of(tie_embeddings=False).flops(64) == small
    more = model_of(num_experts=16).flops(64)
    assert more.training_per_token - small.training_per_token == 6 * 4 * 192 * 8
    matrices = (
        4 * (4 * 192**2 + 2 * 3 * 192 * 256 + 192 * 8) + 128 * 192
    )  # by hand: attention, experts, gates, head
    assert small.training_per_token == 6 * matrices + 12 * 4 * (64 + 1) / 2 * 192


def test_roles_of_everything_but_the_control():
    adapter = adapter_of("moe", *DEEPSEEK)
    rules = adapter.param_roles()
    names = {name for name, _ in adapter.named_model_parameters() if ".mlp." in name and "layers.1" in name}
    kinds = {name.removeprefix("layers.1.mlp."): name for name in names}
    assert not any("bias" in name for name in names), "of no optimizer"

    def rule(name):
        found = rule_for(rules, kinds[name])
        return found.role, found.wd_mult

    assert {name: rule(name) for name in kinds} == {
        "gate.weight": ("router", 0.0),
        **{f"experts.{m}_proj": ("matrix", 1.0) for m in ("gate", "up", "down")},
        **{f"shared_experts.{m}_proj.weight": ("matrix", 1.0) for m in ("gate", "up", "down")},
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"top_k": 9}, "top_k (9) must not exceed model_cfg.num_experts (8); nearest: top_k=8"),
        (
            {"alpha": 0.0, "alphas": [0.1] * 4},
            "alpha (0) and model_cfg.alphas ([0.1, 0.1, 0.1, 0.1]) are both given",
        ),
        ({"alphas": [0.1]}, "alphas has 1 values, and 4 layers have experts"),
        ({**BIASED, "betas": [0.0, 0.0]}, "betas has 2 values, and 3 layers have experts (1, 2, 3"),
        ({"first_k_dense": 4}, "nearest: first_k_dense=3"),
        ({**BIASED, "n_group": 5}, "nearest: 4, 8"),
        ({**BIASED, "n_group": 32}, "nearest: 16"),
        ({**BIASED, "n_group": 8}, "topk_group (1) must be from 2 to 8"),
    ],
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(fields, said):
    cfg, _ = config("moe")
    (problem,) = MoEConfig(n_layers=4, **fields).problems(cfg)
    assert said in problem


def test_a_weight_of_zero_is_not_one_that_is_left_open():
    assert MoEConfig().weights("alpha", 2) == [0.005, 0.005]
    assert MoEConfig(alpha=0.0).weights("alpha", 2) == [0.0, 0.0]
    assert MoEConfig(alphas=(0.0, 0.0), aux_reduction="sum").weights("alpha", 3) == [0.0, 0.0, 0.0]
    assert MoEConfig(betas=(1.0, 2.0), aux_reduction="sum").weights("beta", 3) == [1.0, 2.0, 2.0]
    assert MoEConfig(gate_type="deepseek_v3").weights("alpha", 1) == [0.0]


@pytest.mark.parametrize("gate", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("width", [192, 384, 768, 896, 1024])
def test_at_the_width_of_every_size_experts_are_as_wide_together_as_the_control(gate, width):
    cfg = MoEConfig(gate_type=gate, d_model=width)
    assert cfg.expert_width * (cfg.chosen + cfg.shared) == cfg.hidden_width and cfg.expert_width % 8 == 0


def test_what_the_other_gate_reads_is_said_to_be_idle():
    assert MoEConfig().unread().keys() >= {
        "n_group",
        "bias_update_speed",
        "gate_norm_factor",
        "seq_aux_alpha",
    }
    assert MoEConfig(**BIASED, bias_update_speed=0.0).unread().keys() == {"bias_freeze_frac", "topk_group"}


def test_the_dense_width_is_idle_where_nothing_is_dense_and_experts_have_a_width_of_their_own():
    dense = {"ffn_hidden", "multiple_of"}
    assert dense <= MoEConfig(d_ff_expert=64).unread().keys()
    assert not dense & MoEConfig().unread().keys(), "the experts' width follows from it"
    for mixed in ({"first_k_dense": 1}, {"moe_every": 2}):
        assert not dense & MoEConfig(d_ff_expert=64, **mixed).unread().keys()
