"""How often a core runs: draws of the law, and what is said of it without drawing."""

import pytest
import torch

from models.layers.depth import DepthLaw


def draws(law, number=200_000, seed=0):
    u = torch.rand(number, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return law.draw(u)


@pytest.mark.parametrize(
    "law", [DepthLaw(32, 0.25), DepthLaw(4, 0.25), DepthLaw(4, 0.0), DepthLaw(8, 1.0, 9)], ids=str
)
def test_what_is_expected_is_what_is_drawn(law):
    """Without a cap the mean is one more than the given one: not that of a log-normal of another parameter."""
    r = draws(law).double()
    assert r.min() >= 1 and r.max() <= (law.cap or 10_000)
    if law.cap is None:
        assert law.expected() == law.mean + 1
    for most in (None, 1, 4, 40):
        kept = r if most is None else r.clamp(max=most)
        error = 4 * float(kept.std()) / len(r) ** 0.5
        assert law.expected(most) == pytest.approx(float(kept.mean()), abs=error + 1e-9)
    beyond = law.beyond(6) if law.cap is None else law.beyond(law.cap)
    for j, probability in enumerate(beyond):
        assert probability == pytest.approx(
            float((r > j).double().mean()) if j < (law.cap or 99) else 0, abs=0.005
        )


@pytest.mark.slow
def test_the_law_is_the_published_one():
    """Of the mean 32: what a million draws show."""
    r = draws(DepthLaw(32, 0.25), 1_000_000).double()
    assert float(r.mean()) == pytest.approx(33, abs=0.2) and r.min() >= 1
    quantiles = torch.quantile(r, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    assert quantiles.tolist() == [12, 29, 67]


def test_draws_follow_the_numbers_they_are_made_of():
    """A function of these alone, and growing in both."""
    law = DepthLaw(32, 0.25)
    u = torch.tensor(
        [[0.5, 0.5], [0.9, 0.5], [0.5, 0.9], [1e-12, 1e-12], [1 - 1e-16, 1 - 1e-16]], dtype=torch.float64
    )
    middle, later, luckier, least, most = law.draw(u).tolist()
    assert (middle, least) == (29, 1) and later > middle < luckier < most < 5000
    assert law.draw(u[:1]).tolist() == [middle]
    assert DepthLaw(2000, 0.25).draw(u[:1]).item() == pytest.approx(2000 * 0.8825, rel=0.01)  # no underflow


def test_the_spread_is_a_variance():
    """Of the logarithm: standard deviation 0.5, not 0.25. Of rates so high that Poisson's own spread is little."""
    log_r = draws(DepthLaw(2_000, 0.25), 2000).double().log()
    assert float(log_r.std()) == pytest.approx(0.5, rel=0.06)


def test_typical_steps_cost_what_steps_cost_on_average():
    for law, retained in (
        (DepthLaw(4, 0.25), 4),
        (DepthLaw(32, 0.25), 8),
        (DepthLaw(4, 0.25), 1),
        (DepthLaw(3, 1.0), 50),
    ):
        r = draws(law)
        cost = float((r + 2 * r.clamp(max=retained)).double().mean())
        typical = law.typical(retained)
        of = [n + 2 * min(n, retained) for n in range(1, 60)]
        assert abs(of[typical - 1] - cost) == min(abs(c - cost) for c in of), (law, typical, cost)


def test_the_deepest_is_one_that_a_run_may_meet():
    law = DepthLaw(4, 0.25)
    assert law.deepest(4) == 4 and DepthLaw(4, 0.25, 3).deepest(8) == 3
    assert draws(law).max() <= law.deepest(1_000_000) < 80
