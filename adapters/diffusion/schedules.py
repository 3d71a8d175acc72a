"""How fast text turns into noise.

Continuous time t in [0, 1]: alpha(t) is the probability that a token is still itself, sigma = -log alpha the total
noise, and the weight of the masked bound is w(t) = -alpha'/(1 - alpha) = sigma'/(e^sigma - 1). Discrete time
t = 1..T: beta_t is the probability that step t changes a token. Everything here is fp64.

Sources: Sahoo et al. 2024 (arXiv:2406.07524, appendix E.1), Lou et al. 2024 (arXiv:2310.16834, appendix C.1), Austin
et al. 2021 (arXiv:2107.03006, appendix A).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from naming import not_one_of

__all__ = [
    "AlphaSchedule",
    "Geometric",
    "LinearSigma",
    "Schedule",
    "absorbing_mutual_info_betas",
    "cosine_betas",
    "linear_betas",
    "total_noise",
]

HALF_PI = math.pi / 2
LARGEST_SIGMA = 69.0  # sigma is infinite where alpha is 0; e^-69 = 1e-30 is as good as that


def total_noise(mask_probability: Tensor) -> Tensor:
    """sigma = -log(1 - u) of mask probabilities u, finite where these are 1."""
    return -torch.log1p(-mask_probability).clamp_min(-LARGEST_SIGMA)


class Schedule(ABC):
    """Total noise and its rate as functions of t (any shape, fp64)."""

    @abstractmethod
    def mask_probability(self, t: Tensor) -> Tensor:
        """1 - alpha(t), exact near 0."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -alpha'(t) / (1 - alpha(t))."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.mask_probability(t)

    def sigma(self, t: Tensor) -> Tensor:
        return total_noise(self.mask_probability(t))

    def rate(self, t: Tensor) -> Tensor:
        """sigma'(t) = w(t) (e^sigma - 1)."""
        return self.weight(t) * torch.expm1(self.sigma(t))


@dataclass(frozen=True)
class AlphaSchedule(Schedule):
    """alpha(t) = alpha_min + (alpha_max - alpha_min) a(t), with a(t) falling from 1 to 0.

    `kind`: loglinear, a = 1 - t; cosine, a = cos(pi t / 2); cosine_sq, its square.
    """

    kind: str
    alpha_min: float = 1e-3
    alpha_max: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in _FALLS:
            raise ValueError(f"alpha schedule: {not_one_of(self.kind, _FALLS)}")

    def mask_probability(self, t: Tensor) -> Tensor:
        fallen, _ = _FALLS[self.kind](t)
        return (1 - self.alpha_max) + (self.alpha_max - self.alpha_min) * fallen

    def weight(self, t: Tensor) -> Tensor:
        _, slope = _FALLS[self.kind](t)
        return (self.alpha_max - self.alpha_min) * slope / self.mask_probability(t)


# kind -> (1 - a(t), -a'(t)); 1 - a in a form that keeps its digits near t = 0.
_FALLS = {
    "loglinear": lambda t: (t, torch.ones_like(t)),
    "cosine": lambda t: (2 * torch.sin(math.pi * t / 4) ** 2, HALF_PI * torch.sin(HALF_PI * t)),
    "cosine_sq": lambda t: (torch.sin(HALF_PI * t) ** 2, HALF_PI * torch.sin(math.pi * t)),
}


class _SigmaSchedule(Schedule):
    """Stated by its total noise, which is cut where fp64 tells nothing more of alpha."""

    @abstractmethod
    def stated(self, t: Tensor) -> Tensor:
        """sigma(t), however large."""

    def sigma(self, t: Tensor) -> Tensor:
        return self.stated(t).clamp_max(LARGEST_SIGMA)

    def mask_probability(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self.sigma(t))

    def weight(self, t: Tensor) -> Tensor:
        return self.rate(t) / torch.expm1(self.sigma(t))


@dataclass(frozen=True)
class Geometric(_SigmaSchedule):
    """sigma(t) = sigma_min^(1-t) sigma_max^t."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def stated(self, t: Tensor) -> Tensor:
        return torch.exp((1 - t) * math.log(self.sigma_min) + t * math.log(self.sigma_max))

    def rate(self, t: Tensor) -> Tensor:
        return self.stated(t) * math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class LinearSigma(_SigmaSchedule):
    """sigma(t) = sigma_min + t (sigma_max - sigma_min)."""

    sigma_min: float = 0.0
    sigma_max: float = 10.0

    def stated(self, t: Tensor) -> Tensor:
        return self.sigma_min + t * (self.sigma_max - self.sigma_min)

    def rate(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_max - self.sigma_min)


def cosine_betas(steps: int, offset: float = 0.008) -> Tensor:
    """(T,) beta_t = 1 - f(t)/f(t-1), f(t) = cos(((t/T) + s)/(1 + s) pi/2), clipped to [0, 0.999]."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + offset) / (1 + offset) * HALF_PI)
    return (1 - f[1:] / f[:-1]).clamp(0, 0.999)


def linear_betas(steps: int, first: float, last: float) -> Tensor:
    """(T,) evenly spaced."""
    return torch.linspace(first, last, steps, dtype=torch.float64)


def absorbing_mutual_info_betas(steps: int) -> Tensor:
    """(T,) beta_t = 1/(T - t + 1): the mutual information of an absorbing chain falls linearly, alpha-bar = 1 - t/T."""
    return 1 / (steps - torch.arange(steps, dtype=torch.float64))
