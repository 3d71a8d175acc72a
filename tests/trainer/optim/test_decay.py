"""Cautious weight decay, decay that follows the rate, decay of matrices alone: against plain definitions in fp64."""

import pytest
import torch
from torch.nn import Parameter

from tests.trainer.optim.test_muon import SHAPES
from tests.trainer.optim.test_optimizers import RULES, Toy, assert_equal, config
from trainer.optim import OPTIMIZERS
from trainer.optim.muon import Muon
from trainer.optim.optimizers import role_table
from trainer.optim.torch_fused import CautiousAdamW

CAUTIOUS = [name for name, row in OPTIMIZERS.items() if "cautious_weight_decay" in row.reads]


def two_steps(weight_decay: float, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(before, after) the second step of Muon on every kind of parameter."""
    torch.manual_seed(3)
    params = [Parameter(torch.randn(shape, dtype=torch.float64)) for shape, _ in SHAPES]
    for p in params:
        p.data[..., 0, 0] = 0.0
    groups = [{"params": params, "splits": [split for _, split in SHAPES]}]
    optimizer = Muon(groups, lr=0.1, weight_decay=weight_decay, **options)
    for step in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
            if step == 0:
                p.grad.zero_()  # momentum and weights are as they were drawn
                optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        optimizer.param_groups[0]["weight_decay"] = weight_decay
    return [(b, p.detach()) for b, p in zip(before, params, strict=True)]


def test_of_muon_touches_exactly_the_entries_that_agree_with_the_update():
    """W - lr s O - lr wd W [O W >= 0], and never away from zero."""
    for (start, plain), (again, cautious) in zip(two_steps(0.0), two_steps(0.3, cautious=True), strict=True):
        assert torch.equal(start, again)
        update = start - plain  # lr s O
        agree = update * start >= 0
        assert 0.2 < agree.float().mean() < 0.8
        torch.testing.assert_close(cautious, start - update - 0.1 * 0.3 * start * agree, rtol=0, atol=1e-14)
        assert torch.equal(cautious[~agree], plain[~agree])
        decay = cautious - plain
        assert (decay * start <= 0).all() and (decay.abs() <= 0.1 * 0.3 * start.abs() + 1e-15).all()


def test_of_muon_where_nothing_moves_decays_as_ever():
    """The update is 0 and agrees; the strict condition of Adam does not."""
    p = Parameter(torch.ones(4, 3, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    Muon([p], lr=0.1, weight_decay=0.5, cautious=True).step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 0.95))
    toy = Toy(torch.float64)
    before = toy.values()
    optimizers = toy.build(cautious_weight_decay=True)
    for q in toy.parameters():
        q.grad = torch.zeros_like(q)
    optimizers.step()
    assert_equal(toy.values(), before)


def test_the_smallest_numbers_have_signs():
    """Products of values may vanish, and would then agree with anything, or with nothing."""
    p = Parameter(torch.tensor([[-1e-30, 1e-30]]))
    (bucket,) = Muon([p], lr=0.1)._buckets[0]
    assert bucket.agreeing(torch.full((1, 1, 2), 1e-30)).flatten().tolist() == [0.0, p[0, 1].item()]
    p.grad = torch.full_like(p, 1e-25)
    CautiousAdamW(
        [p], lr=1e-20, weight_decay=5e19, fused=True
    ).step()  # halves what decays; lr u is far smaller
    assert p.flatten().tolist() == pytest.approx([-1e-30, 0.5e-30], rel=1e-5, abs=0)


def test_of_adamw_touches_exactly_the_entries_that_agree_with_the_update():
    """Against Adam and the definition written out: p - lr u - lr wd p [u p > 0]."""
    toy = Toy(torch.float64)
    optimizers = toy.build(cautious_weight_decay=True, adam_beta1=0.8, weight_decay=0.5)
    decays = {"embedding.weight": 0.5, "head.weight": 0.5, "mlp.weight": 1.0, "mlp.bias": 0.0}
    rates = {"embedding.weight": 0.01, "head.weight": 0.005, "mlp.weight": 0.04, "mlp.bias": 0.01}
    named = dict(toy.named_parameters())
    expected = {name: named[name].detach().clone() for name in decays}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in (1, 2, 3, 4):
        toy.gradients(t)
        for name, p in expected.items():
            gradient = named[name].grad
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            update = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            agree = update * p > 0
            assert 0.1 < agree.float().mean() < 0.9
            expected[name] = p - rates[name] * update - rates[name] * decays[name] * p * agree
        optimizers.step()
    for name, p in expected.items():
        torch.testing.assert_close(named[name].detach(), p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", CAUTIOUS)
def test_off_is_the_plain_step_and_on_is_another(kind):
    results = []
    for cautious in (None, False, True):
        toy = Toy()
        optimizers = toy.build(
            optimizer=kind, **({} if cautious is None else {"cautious_weight_decay": cautious})
        )
        toy.gradients(0)
        optimizers.step()
        results.append(toy.values())
    assert_equal(results[0], results[1])
    for name in ("embedding.weight", "attention.weight"):
        assert not torch.equal(results[1][name], results[2][name])
    assert torch.equal(results[1]["mlp.bias"], results[2]["mlp.bias"]), "not decayed"


@pytest.mark.parametrize("kind", CAUTIOUS)
def test_a_flagged_cautious_step_never_happened_and_resume_is_exact(kind):
    options = {"optimizer": kind, "cautious_weight_decay": True, "weight_decay": 0.5}
    clean, toy = Toy(), Toy()
    reference, optimizers = clean.build(**options), toy.build(**options)
    for step in range(3):
        before = toy.values()
        for p in toy.parameters():
            p.grad = torch.full_like(p, float("nan"))
        optimizers.step(1.0, torch.ones(()))
        assert_equal(toy.values(), before)
        for model, optimizer in ((clean, reference), (toy, optimizers)):
            model.gradients(step)
            optimizer.step(0.5, torch.zeros(()))
        saved, weights = optimizers.state_dict(), toy.values()
        toy = Toy()
        toy.load_state_dict(weights)
        optimizers = toy.build(**options)
        optimizers.load_state_dict(saved)
    assert_equal(toy.values(), clean.values())


@pytest.mark.parametrize("kind", CAUTIOUS)
@pytest.mark.parametrize("cautious", [False, True])
def test_decay_that_follows_the_rate_goes_as_its_square(kind, cautious):
    """At half the rate a quarter of the decay: as if the weight decay had been half as large."""
    options = {"optimizer": kind, "cautious_weight_decay": cautious}
    follows = Toy(torch.float64), {"weight_decay": 0.4, "weight_decay_follows_rate": True}
    halved = Toy(torch.float64), {"weight_decay": 0.2}
    as_ever = Toy(torch.float64), {"weight_decay": 0.4}
    for toy, fields in (follows, halved, as_ever):
        optimizers = toy.build(**options, **fields)
        for step in range(2):
            toy.gradients(step)
            optimizers.step(0.5)
    for name, p in follows[0].values().items():
        torch.testing.assert_close(p, halved[0].values()[name], rtol=0, atol=1e-14)
    assert not torch.equal(follows[0].mlp.weight, as_ever[0].mlp.weight)


@pytest.mark.parametrize("kind", sorted(set(OPTIMIZERS) - set(CAUTIOUS)))
def test_decay_within_the_gradient_follows_nothing(kind):
    results = []
    for on in (False, True):
        toy = Toy()
        optimizers = toy.build(optimizer=kind, weight_decay_follows_rate=on, cautious_weight_decay=on)
        toy.gradients(0)
        optimizers.step(0.5)
        results.append(toy.values())
    assert_equal(*results)


def test_matrices_may_have_a_decay_of_their_own():
    named = list(Toy().named_parameters())

    def decays(**overrides):
        table = role_table(named, RULES, config(weight_decay=0.1, **overrides), width=8)
        return {(r["role"], r["weight_decay"]) for r in table}

    rest = {("embedding", 0.1), ("head", 0.1), ("scalar", 0.0)}
    for kind in ("muon", "normuon"):
        assert decays(optimizer=kind) == rest | {("matrix", 0.1), ("matrix", 0.2)}
        assert decays(optimizer=kind, muon_weight_decay=0.5) == rest | {("matrix", 0.5), ("matrix", 1.0)}
        assert decays(optimizer=kind, muon_weight_decay=0.0) == rest | {("matrix", 0.0)}
    assert decays(muon_weight_decay=0.5) == rest | {("matrix", 0.1), ("matrix", 0.2)}, "AdamW's are not"
