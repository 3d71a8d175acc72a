"""Bounds on logits: their interval and their slope."""

import pytest
import torch

from kernels.softcap import SigmoidCap, TanhCap


@pytest.mark.parametrize(
    ("cap", "low", "high"), [(TanhCap(1.5), -1.5, 1.5), (SigmoidCap(23.0, 5.0, 7.5), 0.0, 23.0)]
)
def test_a_cap_stays_in_its_interval_and_says_its_slope(cap, low, high):
    z = torch.linspace(-60, 60, 81, dtype=torch.float64, requires_grad=True)
    capped = cap(z)
    assert low <= capped.min() < low + 0.1 and high - 0.1 < capped.max() <= high
    (slope,) = torch.autograd.grad(capped.sum(), z)
    torch.testing.assert_close(cap.slope(capped.detach()), slope)
    assert cap(torch.tensor([-1e30, 1e30])).tolist() == pytest.approx([low, high])


@pytest.mark.parametrize("make", [lambda: TanhCap(0.0), lambda: SigmoidCap(1.0, 0.0, -2.0)])
def test_a_cap_without_an_interval_is_refused(make):
    with pytest.raises(ValueError, match="must be a positive number"):
        make()
