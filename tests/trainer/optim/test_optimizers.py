"""Roles, the torch optimizers behind them, the skip flag, `every`, saved state and clipping."""

import io
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import RunConfig
from kernels.newton_schulz.coefficients import COEFFICIENTS
from models.layers.roles import Rule
from trainer.optim import OPTIMIZERS
from trainer.optim.optimizers import build_optimizers, clip_gradients, role_table
from trainer.optim.schedules import momentum_at, schedule_factor

KINDS = list(OPTIMIZERS)
RULES = [
    Rule(r"embedding\.weight", "embedding"),
    Rule(r"head\.weight", "head", lr_mult=0.5),
    Rule(r"attention\.weight", "matrix", split=3),
    Rule(r"mlp\.weight", "matrix", wd_mult=2.0),
    Rule(r".*bias", "scalar"),
]


def config(**overrides):
    return RunConfig(type="none", **({"learning_rate": 0.01, "lr_base_width": 32} | overrides))


class Toy(nn.Module):
    """Only its parameters matter; `gradients` depend on the step and not on the weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.Linear(8, 24, bias=False)
        self.mlp = nn.Linear(8, 12)
        self.head = nn.Linear(8, 11, bias=False)
        self.to(dtype)
        for p in self.parameters():
            p.data.normal_(generator=generator)

    def gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)

    def build(self, rules=RULES, **overrides):
        return build_optimizers(self.named_parameters(), rules, config(**overrides), width=8)

    def values(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def flatten(state: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": t.clone() for name, entries in state["state"].items() for key, t in entries.items()
    }


# --- roles --------------------------------------------------------------------------------------------


def row(table, role, **match):
    found = [r for r in table if r["role"] == role and all(r[k] == v for k, v in match.items())]
    assert len(found) == 1, table
    return found[0]


def test_width_scaling_is_by_role():
    named = list(Toy().named_parameters())
    adamw = role_table(named, RULES, config(), width=8)
    assert {r["lr"] for r in adamw if r["role"] == "matrix"} == {0.01 * 32 / 8}
    assert row(adamw, "embedding")["lr"] == 0.01
    assert row(adamw, "head")["lr"] == 0.005
    assert row(adamw, "scalar")["lr"] == 0.01
    muon = role_table(named, RULES, config(optimizer="muon"), width=8)
    assert {(r["optimizer"], r["lr"]) for r in muon if r["role"] == "matrix"} == {("muon", 0.02)}
    assert {r["optimizer"] for r in muon if r["role"] != "matrix"} == {"adamw"}
    assert row(muon, "embedding")["lr"] == 0.01
    for off in ({"lr_scaling": "none"}, {"lr_base_width": None}, {"optimizer": "sgd"}):
        assert {r["lr"] for r in role_table(named, RULES, config(**off), 8) if r["role"] == "matrix"} == {
            0.01
        }


def test_routers_and_recurrences_scale_too_and_a_rule_may_have_its_own_width():
    named = list(Toy().named_parameters())
    for role in ("router", "recurrent"):
        table = role_table(named, [Rule(r"mlp\.weight", role), *RULES], config(optimizer="muon"), width=8)
        assert row(table, role)["lr"] == 0.01 * 32 / 8
    own = role_table(named, [Rule(r"mlp\.weight", "matrix", width=16), *RULES], config(), width=8)
    assert sorted(r["lr"] for r in own if r["role"] == "matrix") == [0.01 * 32 / 16, 0.01 * 32 / 8]


def test_a_rule_may_state_the_power_of_the_width_that_its_rate_follows():
    """Whatever the role; of the rule's own width where it has one; with optimizers whose rates follow the width."""
    own = [
        Rule(r"embedding\.weight", "embedding", width_power=0.5),
        Rule(r"mlp\.bias", "scalar", width_power=2.0),
        Rule(r"attention\.weight", "matrix", width_power=0.0),
        Rule(r"head\.weight", "head", width_power=0.5, width=2),
    ]
    named = list(Toy().named_parameters())
    table = role_table(named, [*own, *RULES], config(), width=8)
    assert row(table, "embedding")["lr"] == 0.01 * 2
    assert row(table, "head")["lr"] == 0.01 * 4
    assert 0.01 * 16 in {r["lr"] for r in table if r["role"] == "scalar"}
    assert 0.01 in {r["lr"] for r in table if r["role"] == "matrix"}
    by_sgd = role_table(named, [*own, *RULES], config(optimizer="sgd"), width=8)
    assert row(by_sgd, "embedding")["lr"] == 0.01
    with pytest.raises(ValueError, match="width_power must be 0 or more"):
        Rule("x", "head", width_power=-0.5)


def test_weight_decay_is_by_role_and_dimension():
    rules = [Rule(r"mlp\.bias", "router"), Rule(r"head\.weight", "scalar"), *RULES]
    table = role_table(Toy().named_parameters(), rules, config(), width=8)
    assert row(table, "router")["weight_decay"] == 0.0  # one dimension
    assert row(table, "scalar")["weight_decay"] == 0.0  # two dimensions, but a scalar by role
    assert sorted(r["weight_decay"] for r in table if r["role"] == "matrix") == [0.1, 0.2]
    assert row(table, "embedding")["weight_decay"] == 0.1


def test_first_matching_rule_wins_and_the_whole_name_counts():
    rules = [Rule(r"head", "scalar"), Rule(r"head\..*", "head"), Rule(r".*", "embedding")]
    table = role_table(Toy().named_parameters(), rules, config(), width=8)
    assert row(table, "head")["parameters"] == 88
    assert {r["role"] for r in table} == {"head", "embedding"}


def test_table_counts_every_parameter_once_and_lists_frozen_ones():
    toy = Toy()
    toy.embedding.weight.requires_grad_(False)
    table = role_table(toy.named_parameters(), RULES, config(), width=8)
    assert sum(r["parameters"] for r in table) == sum(p.numel() for p in toy.parameters())
    assert sum(r["tensors"] for r in table) == len(list(toy.parameters()))
    frozen = row(table, "embedding")
    assert (frozen["optimizer"], frozen["lr"], frozen["parameters"]) == ("frozen", 0.0, 88)
    optimizers = toy.build()
    assert "embedding.weight" not in optimizers.state_dict()["state"]
    before = toy.values()
    toy.gradients(0)
    optimizers.step()
    assert torch.equal(toy.embedding.weight, before["embedding.weight"])
    assert not torch.equal(toy.mlp.weight, before["mlp.weight"])


def test_unmatched_parameter_is_named():
    with pytest.raises(ValueError, match=r"no parameter role for mlp\.bias.*roles it names now: embedding"):
        Toy().build(rules=RULES[:-1])


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(r"mlp\.bias", "matrix"), r"mlp\.bias has the role matrix: .*got shape \(12,\)"),
        (Rule(r"mlp\.weight", "matrix", split=5), r"mlp\.weight .*12 rows cannot be split into 5"),
        (
            Rule(r"mlp\.weight", "matrix", split=(8, 3)),
            r"mlp\.weight .*12 rows cannot be split into parts of 8, 3",
        ),
    ],
)
def test_matrix_that_is_none(rule, message):
    with pytest.raises(ValueError, match=message):
        Toy().build(rules=[rule, *RULES])


def test_learning_rates_by_role():
    rates = Toy().build(optimizer="muon").learning_rates(0.5)
    assert rates == {"embedding": 0.005, "head x0.5": 0.0025, "matrix": 0.01, "scalar": 0.005}


@pytest.mark.parametrize("kind", KINDS)
def test_what_steps_the_rest_is_read_too(kind):
    row = OPTIMIZERS[kind]
    assert not row.roles or set(OPTIMIZERS[row.rest].reads) <= set(row.reads)


# --- the updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reference"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_betas_and_epsilon_are_those_of_the_run(kind, reference):
    toy, plain = Toy(torch.float64), Toy(torch.float64)
    words = {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 0.3, "weight_decay": 0.0}
    rules = [Rule(r".*", "embedding")]  # which follows no width
    optimizers = toy.build(rules, optimizer=kind, **words)
    theirs = reference(plain.parameters(), lr=0.01, betas=(0.5, 0.7), eps=0.3, weight_decay=0.0)
    for step in range(3):
        toy.gradients(step)
        plain.gradients(step)
        optimizers.step()
        theirs.step()
    for mine, other in zip(toy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_adamw_equals_torch_with_the_groups_written_out():
    toy, plain = Toy(torch.float64), Toy(torch.float64)
    optimizers = toy.build()
    reference = torch.optim.AdamW(
        [
            {"params": [plain.embedding.weight], "lr": 0.01, "weight_decay": 0.1},
            {"params": [plain.head.weight], "lr": 0.005, "weight_decay": 0.1},
            {"params": [plain.attention.weight], "lr": 0.04, "weight_decay": 0.1},
            {"params": [plain.mlp.weight], "lr": 0.04, "weight_decay": 0.2},
            {"params": [plain.mlp.bias], "lr": 0.01, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        foreach=False,
    )
    peak = [group["lr"] for group in reference.param_groups]
    for step, factor in enumerate((0.25, 1.0, 0.5)):
        toy.gradients(step)
        plain.gradients(step)
        for group, lr in zip(reference.param_groups, peak, strict=True):
            group["lr"] = lr * factor
        optimizers.step(factor)
        reference.step()
    for p, q in zip(toy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "adam", "muon", "normuon"])
def test_a_rule_may_have_betas_of_its_own(kind):
    """Wherever Adam steps its parameters; in the table they stand where they are stated."""
    rules = [
        Rule(r"embedding\.weight", "embedding", betas=(0.5, 0.99)),
        Rule(r"mlp\.weight", "matrix", betas=(0.0, 0.9)),
    ]
    toy, plain = Toy(torch.float64), Toy(torch.float64)
    optimizers = toy.build([*rules, *RULES], optimizer=kind)
    by_hand = plain.build(optimizer=kind, adam_beta1=0.5, adam_beta2=0.99)
    of_the_run = Toy(torch.float64)
    as_ever = of_the_run.build(optimizer=kind)
    for step in range(3):
        for model, opt in ((toy, optimizers), (plain, by_hand), (of_the_run, as_ever)):
            model.gradients(step)
            opt.step()
    assert torch.equal(toy.embedding.weight, plain.embedding.weight)
    assert torch.equal(toy.head.weight, of_the_run.head.weight)
    assert not torch.equal(toy.embedding.weight, of_the_run.embedding.weight)
    table = role_table(toy.named_parameters(), [*rules, *RULES], config(optimizer=kind), width=8)
    assert [r["betas"] for r in table if "betas" in r] == [(0.5, 0.99), (0.0, 0.9)][
        : 1 if "muon" in kind else 2
    ]


def test_betas_of_a_rule_are_checked():
    with pytest.raises(ValueError, match=r"betas must be at least 0 and less than 1, got \(0.9, 1.0\)"):
        Rule("x", "head", betas=(0.9, 1.0))


@pytest.mark.parametrize("kind", ["muon", "normuon"])
def test_momentum_of_a_step_is_that_of_muon_alone(kind):
    """0.5 in each of three steps is what muon_momentum=0.5 does; others take no notice."""
    fixed, scheduled = Toy(), Toy()
    a, b = fixed.build(optimizer=kind, muon_momentum=0.5), scheduled.build(optimizer=kind)
    for step in range(3):
        for model, optimizers, momentum in ((fixed, a, None), (scheduled, b, 0.5)):
            model.gradients(step)
            optimizers.step(1.0, momentum=momentum)
    assert_equal(fixed.values(), scheduled.values())
    for other in ("sgd", "adamw"):
        toys = [Toy(), Toy()]
        for toy, momentum in zip(toys, (None, 0.1), strict=True):
            optimizers = toy.build(optimizer=other)
            for step in range(2):
                toy.gradients(step)
                optimizers.step(1.0, momentum=momentum)
        assert_equal(toys[0].values(), toys[1].values())


def test_adam_puts_weight_decay_into_the_gradient():
    """Kingma and Ba (arXiv:1412.6980), algorithm 1, on g + wd w."""
    toy = Toy(torch.float64)
    weight = toy.embedding.weight.detach().clone()
    optimizers = toy.build(optimizer="adam")
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for t in (1, 2, 3):
        toy.gradients(t)
        gradient = toy.embedding.weight.grad + 0.1 * weight
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        weight -= 0.01 * (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizers.step()
    torch.testing.assert_close(toy.embedding.weight.detach(), weight, rtol=0, atol=1e-12)


def test_sgd_has_momentum():
    toy = Toy(torch.float64)
    weight = toy.mlp.weight.detach().clone()
    optimizers = toy.build(optimizer="sgd")
    buffer = torch.zeros_like(weight)
    for step in range(3):
        toy.gradients(step)
        buffer = 0.9 * buffer + toy.mlp.weight.grad + 0.2 * weight
        weight -= 0.01 * buffer
        optimizers.step()
    torch.testing.assert_close(toy.mlp.weight.detach(), weight, rtol=0, atol=1e-12)


def test_muon_options_and_split_reach_the_update():
    def result(rules=RULES, **overrides):
        toy = Toy()
        toy.gradients(0)
        toy.build(rules, optimizer="muon", **overrides).step()
        return toy.attention.weight.detach()

    base = result()
    assert torch.equal(base, result())
    unsplit = [Rule(r"attention\.weight", "matrix"), *RULES]
    assert not torch.equal(base, result(unsplit))
    for change in (
        {"muon_scale": "rms"},
        {"muon_ns_steps": 3},
        {"muon_coefficients": "polar_express"},
        {"muon_coefficients": "polar_express_nanogpt"},
        {"muon_momentum": 0.5},
        {"muon_learning_rate": 0.03},
        {"weight_decay": 0.0},
    ):
        # Momentum 0.5 alone leaves the direction of the first update, to rounding: a second step is needed to see it.
        same = torch.allclose(base, result(**change), rtol=0, atol=1e-9)
        assert same == (change == {"muon_momentum": 0.5})
    toys = [Toy(), Toy()]
    for toy, momentum in zip(toys, (0.95, 0.5), strict=True):
        optimizers = toy.build(optimizer="muon", muon_momentum=momentum)
        for step in range(2):
            toy.gradients(step)
            optimizers.step()
    assert not torch.equal(toys[0].attention.weight, toys[1].attention.weight)


def test_parameter_without_gradient_is_named():
    toy = Toy()
    optimizers = toy.build()
    toy.gradients(0)
    toy.head.weight.grad = None
    with pytest.raises(RuntimeError, match=r"no gradient for head\.weight"):
        optimizers.step()


def test_zero_grad_drops_gradients():
    toy = Toy()
    optimizers = toy.build()
    toy.gradients(0)
    optimizers.zero_grad()
    assert all(p.grad is None for p in toy.parameters())


# --- the skip flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_flagged_step_never_happened(kind, every, skipped):
    """A step full of NaN leaves weights and state bit for bit, first step included, and the rest goes on."""
    rules = [Rule(r.pattern, r.role, r.lr_mult, r.wd_mult, every, r.split) for r in RULES]
    clean, toy = Toy(), Toy()
    reference, optimizers = clean.build(rules, optimizer=kind), toy.build(rules, optimizer=kind)
    for step in range(4):
        if step == skipped:
            before, state = toy.values(), flatten(optimizers.state_dict())
            for p in toy.parameters():
                p.grad = torch.full_like(p, float("nan"))
            optimizers.step(1.0, torch.ones(()))
            assert_equal(toy.values(), before)
            assert_equal(flatten(optimizers.state_dict()), state)
        for model, optimizer in ((clean, reference), (toy, optimizers)):
            model.gradients(step)
            optimizer.step(0.5, torch.zeros(()) if model is toy else None)
    assert_equal(toy.values(), clean.values())
    assert_equal(flatten(optimizers.state_dict()), flatten(reference.state_dict()))
    assert not torch.equal(clean.mlp.weight, Toy().mlp.weight)


class NoHostReads(TorchDispatchMode):
    """Refuses what would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3])
def test_no_host_synchronisation(kind, every):
    rules = [Rule(r.pattern, r.role, r.lr_mult, r.wd_mult, every, r.split) for r in RULES]
    toy = Toy()
    optimizers = toy.build(rules, optimizer=kind)
    optimizers.allocate()
    toy.gradients(0)
    with NoHostReads():
        clip_gradients(toy.parameters(), 1.0)
        optimizers.step(1.0, torch.zeros(()))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        torch.ones(()).item()


# --- every n-th step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_third_step_uses_the_mean_gradient(kind):
    rules = [Rule(r"mlp\.weight", "matrix", every=3), *RULES]
    toy, plain = Toy(torch.float64), Toy(torch.float64)
    optimizers, reference = (
        toy.build(rules, optimizer=kind),
        plain.build([Rule(r"mlp\.weight", "matrix"), *RULES], optimizer=kind),
    )
    for update in range(2):
        collected = torch.zeros_like(toy.mlp.weight)
        start = toy.mlp.weight.detach().clone()
        for part in range(3):
            toy.gradients(3 * update + part)
            collected += toy.mlp.weight.grad
            assert torch.equal(toy.mlp.weight, start)
            embedding = toy.embedding.weight.detach().clone()
            optimizers.step()
            assert not torch.equal(toy.embedding.weight, embedding)
        plain.gradients(0)
        plain.mlp.weight.grad = collected / 3
        reference.step()
        torch.testing.assert_close(toy.mlp.weight, plain.mlp.weight, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_other_steps_leave_them_untouched(kind):
    """Every second step, as modded-nanogpt steps everything but matrices: weights, moments and counters stand still in
    steps 0, 2, ..., whatever decays, and move in steps 1, 3, ..."""
    rules = [replace(rule, every=1 if rule.role == "matrix" else 2) for rule in RULES]
    toy = Toy()
    optimizers = toy.build(rules, optimizer=kind, weight_decay=0.5)
    for step in range(4):
        before = toy.values(), flatten(optimizers.state_dict())
        toy.gradients(step)
        optimizers.step()
        after = toy.values(), flatten(optimizers.state_dict())
        for values, now in zip(before, after, strict=True):
            for name in values:
                held = "embedding" in name or "head" in name or "bias" in name
                if not held or "collected" in name:
                    assert not torch.equal(values[name], now[name]), name
                elif step % 2 == 0:
                    assert torch.equal(values[name], now[name]), name
                else:
                    assert not torch.equal(values[name], now[name]), name


# --- saved state --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_also_within_every(kind):
    rules = [Rule(r"mlp\.weight", "matrix", every=3), *RULES]
    whole = Toy()
    optimizers = whole.build(rules, optimizer=kind)
    for step in range(7):
        whole.gradients(step)
        optimizers.step(1 / (1 + step))
        if step == 3:  # one gradient of three collected
            file = io.BytesIO()
            torch.save(optimizers.state_dict(), file)
            weights = whole.values()
    file.seek(0)
    resumed = Toy()
    resumed.load_state_dict(weights)
    fresh = resumed.build(rules, optimizer=kind)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 7):
        resumed.gradients(step)
        fresh.step(1 / (1 + step))
    assert_equal(resumed.values(), whole.values())
    assert_equal(flatten(fresh.state_dict()), flatten(optimizers.state_dict()))


def test_misfit_is_explained_and_changes_nothing():
    toy = Toy()
    optimizers = toy.build()
    toy.gradients(0)
    optimizers.step()
    kept = flatten(optimizers.state_dict())

    def saved():
        state = optimizers.state_dict()
        state["state"] = {
            name: {key: tensor + 1 for key, tensor in entries.items()}
            for name, entries in state["state"].items()
        }
        return state

    renamed = saved()
    for part in renamed.values():
        part["lm_head.weight"] = part.pop("head.weight")
    with pytest.raises(ValueError, match=r"missing 1: head\.weight; unexpected 1: lm_head\.weight"):
        optimizers.load_state_dict(renamed)
    with pytest.raises(ValueError, match=r"another optimizer: .*mlp\.weight \(muon, now adamw\)"):
        optimizers.load_state_dict(Toy().build(optimizer="muon").state_dict())
    wide = saved()
    wide["state"]["head.weight"]["exp_avg"] = torch.zeros(11, 9)
    with pytest.raises(ValueError, match=r"head\.weight .*exp_avg is \(11, 9\).*needed is \(11, 8\)"):
        optimizers.load_state_dict(wide)
    assert_equal(flatten(optimizers.state_dict()), kept)
    optimizers.load_state_dict(saved())
    assert torch.equal(
        optimizers.state_dict()["state"]["head.weight"]["exp_avg"], kept["head.weight.exp_avg"] + 1
    )


def test_long_lists_of_names_are_cut():
    toy = Toy()
    many = toy.build().state_dict()
    many["optimizer"] |= {f"block.{i}": "adamw" for i in range(9)}
    with pytest.raises(ValueError, match=r"unexpected 9: block\.0, .*block\.4 and 4 more"):
        toy.build().load_state_dict(many)


@pytest.mark.parametrize("kind", KINDS)
def test_all_state_is_there_before_the_first_step(kind):
    toy = Toy()
    optimizers = toy.build(optimizer=kind)
    optimizers.allocate()
    allocated, size = flatten(optimizers.state_dict()), optimizers.state_bytes()
    toy.gradients(0)
    optimizers.step()
    assert allocated.keys() == flatten(optimizers.state_dict()).keys()
    assert optimizers.state_bytes() == size
    assert Toy().to("meta").build(optimizer=kind).state_bytes() == size, "as much where nothing is allocated"


def test_state_is_measured_in_bytes():
    toy = Toy()
    matrices, rest = 24 * 8 + 12 * 8, 11 * 8 + 12 + 11 * 8
    assert toy.build(optimizer="sgd").state_bytes() == 4 * (matrices + rest)
    assert toy.build(optimizer="adamw").state_bytes() == 4 * (2 * (matrices + rest) + 5)  # and a counter each
    assert toy.build(optimizer="muon").state_bytes() == 4 * (matrices + 2 * rest + 3)
    assert toy.build(optimizer="normuon").state_bytes() == 4 * (matrices + 3 * 8 + 12 + 2 * rest + 3)
    every = [Rule(r"mlp\..*|attention\..*", "embedding", every=2), *RULES]
    collected = 4 * (matrices + 12 + 1)
    assert toy.build(every, optimizer="sgd").state_bytes() == 4 * (matrices + rest) + collected


# --- clipping -----------------------------------------------------------------------------------------


def test_clipping_scales_all_gradients_by_one_norm():
    toy = Toy(torch.float64)
    toy.gradients(0)
    before = {name: p.grad.clone() for name, p in toy.named_parameters()}
    expected = torch.cat([g.flatten() for g in before.values()]).norm()
    assert torch.equal(clip_gradients(toy.parameters(), 0.0), clip_gradients(toy.parameters(), 1e6))
    assert_equal({name: p.grad for name, p in toy.named_parameters()}, before)
    norm = clip_gradients(toy.parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for name, p in toy.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * 0.5 / expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["muon", "normuon"])
def test_clipping_does_not_reach_an_orthogonalised_update(monkeypatch, kind):
    """Gradients clipped to norms of 1 and of 0.01 have one direction, and matrices move alike, but for what is added to
    the norm that they are divided by."""
    name = "polar_express_nanogpt"
    monkeypatch.setitem(COEFFICIENTS, name, replace(COEFFICIENTS[name], epsilon=0.0))
    moved = []
    for most in (1.0, 0.01):
        toy = Toy(torch.float64)
        optimizers = toy.build(optimizer=kind, muon_coefficients=name, weight_decay=0.0)
        for step in range(3):
            toy.gradients(step)
            assert clip_gradients(toy.parameters(), most) > 1
            optimizers.step()
        start = Toy(torch.float64).values()
        moved.append({name: value - start[name] for name, value in toy.values().items()})
    one, other = moved
    for name in ("attention.weight", "mlp.weight"):
        assert (one[name] - other[name]).norm() <= 1e-10 * one[name].norm()


@pytest.mark.parametrize("kind", ["muon", "normuon"])
def test_what_every_parameter_is_stepped_with_at_first_in_the_middle_and_at_last(kind):
    """The golden table: optimizer, rate, decay, betas or momentum, of both halves."""
    rules = [Rule(r"embedding\.weight", "embedding", lr_mult=75, wd_mult=5, betas=(0.75, 0.95)), *RULES]
    fields = {"scheduler": "cooldown", "cooldown_frac": 0.6, "min_lr_ratio": 0.1, "muon_weight_decay": 1.2}
    fields |= {"muon_momentum_ends": 0.85, "muon_momentum_rise": 0.2, "muon_momentum_fall": 0.1}
    toy, cfg = Toy(), config(optimizer=kind, weight_decay=0.005, weight_decay_follows_rate=True, **fields)
    optimizers = build_optimizers(toy.named_parameters(), rules, cfg, width=8)
    golden = {  # step: (factor of rate and decay, momentum)
        0: (1.0, 0.85),
        50: (1 - 0.9 * 10 / 60, 0.95),
        99: (1 - 0.9 * 59 / 60, 0.86),
    }
    peaks = {  # rate, decay, betas
        "embedding.weight": (0.75, 0.025, (0.75, 0.95)),
        "head.weight": (0.005, 0.005, (0.9, 0.95)),
        "attention.weight": (0.02, 1.2, None),
        "mlp.weight": (0.02, 2.4, None),
        "mlp.bias": (0.01, 0.0, (0.9, 0.95)),
    }
    for step, (factor, momentum) in golden.items():
        toy.gradients(step)
        optimizers.step(schedule_factor(step, 100, cfg), None, momentum_at(step, 100, cfg))
        found = {}
        for member in optimizers._members:
            for group in member.optimizer.param_groups:
                for p in group["params"]:
                    found[optimizers._names[p]] = group
        for name, (rate, decay, betas) in peaks.items():
            group = found.pop(name)
            assert (group["lr"], group["weight_decay"]) == pytest.approx((rate * factor, decay * factor)), (
                name
            )
            assert group.get("betas") == betas
            assert betas or group["momentum"] == pytest.approx(momentum)
        assert not found
