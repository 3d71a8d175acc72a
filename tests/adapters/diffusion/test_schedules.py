"""Schedules: their products, weights and derivatives."""

import pytest
import torch

from adapters.diffusion.chains import AbsorbingChain
from adapters.diffusion.schedules import (
    AlphaSchedule,
    Geometric,
    LinearSigma,
    absorbing_mutual_info_betas,
    cosine_betas,
    linear_betas,
)
from tests.adapters.diffusion.toy import F64


def test_cosine_and_linear_products():
    assert torch.cumprod(1 - cosine_betas(1000), 0)[-1].item() == pytest.approx(1.5584501619e-6, rel=1e-9)
    assert torch.cumprod(1 - linear_betas(1000, 1e-4, 0.02), 0)[-1].item() == pytest.approx(
        4.0358297654e-5, rel=1e-9
    )


def test_absorbing_loses_information_linearly():
    chain = AbsorbingChain(4, absorbing_mutual_info_betas(50), mask_id=3)
    t = torch.arange(51, dtype=F64)
    assert torch.allclose(chain.alpha_bar, 1 - t / 50, atol=1e-14)


def test_weights_of_the_continuous_schedules():
    t = torch.tensor(0.63, dtype=F64)
    for schedule, weight in (
        (AlphaSchedule("loglinear"), 1.587301587),
        (AlphaSchedule("cosine"), 2.911196365),
        (AlphaSchedule("cosine_sq"), 2.063640656),
        (Geometric(1e-4, 20.0), 10.92052040),
        (LinearSigma(0.0, 10.0), 0.01839682996),
    ):
        assert schedule.weight(t).item() == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [AlphaSchedule(k) for k in ("loglinear", "cosine", "cosine_sq")] + [Geometric(), LinearSigma(0.01, 9.0)],
)
def test_weight_and_rate_are_the_derivatives(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.mask_probability(t).sum(), t)
    assert torch.allclose(schedule.weight(t), slope / schedule.mask_probability(t), rtol=1e-9)
    (slope,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
    assert torch.allclose(schedule.rate(t), slope, rtol=1e-9)
    assert torch.allclose(torch.exp(-schedule.sigma(t)), schedule.alpha(t), rtol=1e-12)
