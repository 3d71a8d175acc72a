"""The definition of the diffusion losses: all logits in memory, gradients by autograd, formulas as published.

Slower and larger than `kernels.linear_diffusion_loss`, which computes the same numbers another way.
Shapes: M rows, D width, V states (K in D3PM), V_p rows of the head, n real tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.precision import at_least_fp32, compute_dtype
from naming import not_one_of

__all__ = ["product_dtype", "reference"]

Given = Mapping[str, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor, Given, int | None], tuple[Tensor, Tensor | None]]


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    xt: Tensor,
    weights: Tensor,
    coefficients: Given,
    *,
    mode: str,
    V: int,
    n: int,
    mask_id: int | None,
    aux_weight: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as `kernels.linear_diffusion_loss.linear_diffusion_loss`."""
    if mode not in LOSSES:
        raise ValueError(f"mode: {not_one_of(mode, LOSSES)}")
    dtype = product_dtype(hidden)
    z = F.linear(hidden.to(dtype), weight[:V].to(dtype)).to(at_least_fp32(dtype))  # (M, V)
    if bias is not None:
        z = z + bias[:V].to(z.dtype)
    given = {name: c if c.dtype == torch.bool else c.to(z.dtype) for name, c in coefficients.items()}
    nats, ce = LOSSES[mode](z, x0, xt, given, mask_id)
    weights = weights.to(z.dtype)
    total = (weights * nats).sum()
    if not isinstance(aux_weight, Tensor):
        if aux_weight == 0:
            return total, nats.detach(), None
        aux_weight = aux_weight * weights
    if ce is None:
        raise ValueError(f"aux_weight: mode '{mode}' has no auxiliary cross-entropy")
    return total + (aux_weight.to(z.dtype) * ce).sum(), nats.detach(), ce.detach()


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the output layer's products: autocast's, but never fp16."""
    dtype = compute_dtype(hidden)
    return torch.float32 if dtype == torch.float16 else dtype


def _at(z: Tensor, ids: Tensor) -> Tensor:
    return z.gather(1, ids[:, None]).squeeze(1)


def _is(ids: Tensor, state: int | None) -> Tensor:
    assert state is not None
    return torch.eq(ids, state)


def _without_mask(z: Tensor, mask_id: int | None) -> Tensor:
    column = torch.arange(z.shape[1], device=z.device)
    return z.masked_fill(_is(column, mask_id), -torch.inf)


def _real_cross_entropy(z: Tensor, x0: Tensor, xt: Tensor, mask_id: int | None) -> Tensor:
    """-log softmax over the real tokens at the clean one, 0 at positions that are not masked."""
    return torch.where(_is(xt, mask_id), -_at(_without_mask(z, mask_id).log_softmax(1), x0), 0.0)


def _subs(
    z: Tensor, x0: Tensor, xt: Tensor, given: Given, mask_id: int | None
) -> tuple[Tensor, Tensor | None]:
    return _real_cross_entropy(z, x0, xt, mask_id), None


def _sedd_absorb(
    z: Tensor, x0: Tensor, xt: Tensor, given: Given, mask_id: int | None
) -> tuple[Tensor, Tensor | None]:
    """In units of r, so r = 1 in `sum_y s_y - r log s_x0 + r (log r - 1)`."""
    log_s = z - math.log(z.shape[1] - 1)
    if "shift" in given:
        log_s = log_s + given["shift"][:, None]
    total = _without_mask(log_s, mask_id).exp().sum(1)
    nats = torch.where(_is(xt, mask_id), total - _at(log_s, x0) - 1, 0.0)
    return nats, _real_cross_entropy(z, x0, xt, mask_id)


def _sedd_uniform(
    z: Tensor, x0: Tensor, xt: Tensor, given: Given, mask_id: int | None
) -> tuple[Tensor, Tensor | None]:
    N = z.shape[1]
    states = torch.arange(N, device=z.device)
    grown = torch.expm1(given["sigma_bar"])
    rho = (grown / (N + grown))[:, None]
    is_x0, is_xt = states == x0[:, None], states == xt[:, None]  # (M, N)
    ratio = torch.where((x0 == xt)[:, None], rho, torch.where(is_x0, 1 / rho, 1.0))
    terms = z.exp() - ratio * z + ratio * (ratio.log() - 1)
    return torch.where(is_xt, 0.0, terms).sum(1) / N, None


def _d3pm_absorb(
    z: Tensor, x0: Tensor, xt: Tensor, given: Given, mask_id: int | None
) -> tuple[Tensor, Tensor | None]:
    """q has mass on x0 and the mask alone: KL = q(x0) log(q(x0) / p(x0)) + q(m) log(q(m) / p(m))."""
    first, masked = given["first"].bool(), _is(xt, mask_id)
    a = torch.where(masked, given["a"], 0.5)  # unmasked rows score 0
    b = torch.where(masked, given["b"], 0.25)
    beta = 1 - b / a
    log_x = z.log_softmax(1)
    log_x0, p_m = _at(log_x, x0), log_x[:, mask_id].exp()
    to_mask = a * p_m + 1 - a  # (p Q_bar)_m
    log_norm = torch.log(beta * a * (1 - p_m) + to_mask)
    q_x0 = beta * a / (1 - b)
    q_m = torch.where(first, 0.0, (1 - a) / (1 - b))
    log_p_m = torch.where(first, 1.0, to_mask).log() - log_norm
    kl = q_x0 * (q_x0.log() - ((beta * a).log() + log_x0 - log_norm)) + torch.xlogy(q_m, q_m) - q_m * log_p_m
    return torch.where(masked, kl, 0.0), -log_x0


def _d3pm_zero_mask(
    z: Tensor, x0: Tensor, xt: Tensor, given: Given, mask_id: int | None
) -> tuple[Tensor, Tensor | None]:
    return _d3pm_absorb(_without_mask(z, mask_id), x0, xt, given, mask_id)


def _d3pm_uniform(
    z: Tensor, x0: Tensor, xt: Tensor, given: Given, mask_id: int | None
) -> tuple[Tensor, Tensor | None]:
    """Both distributions over x_{t-1} in full."""
    K = z.shape[1]
    states = torch.arange(K, device=z.device)
    a, b, beta = (given[name][:, None] for name in ("a", "b", "beta"))
    is_x0, is_xt = states == x0[:, None], states == xt[:, None]
    step = torch.where(is_xt, 1 - beta, 0.0) + beta / K  # [Q_t]_{j, xt}
    log_x = z.log_softmax(1)
    log_p = (step.log() + torch.logaddexp(a.log() + log_x, torch.log((1 - a) / K))).log_softmax(1)
    q = step * (a * is_x0 + (1 - a) / K)
    q = q / q.sum(1, keepdim=True)
    kl = (torch.xlogy(q, q) - q * log_p).sum(1)
    return torch.where(given["first"].bool(), -_at(log_p, x0), kl), -_at(log_x, x0)


LOSSES: dict[str, Loss] = {
    "subs": _subs,
    "sedd_absorb": _sedd_absorb,
    "sedd_uniform": _sedd_uniform,
    "d3pm_absorb": _d3pm_absorb,
    "d3pm_absorb_zero_mask": _d3pm_zero_mask,
    "d3pm_uniform": _d3pm_uniform,
}
