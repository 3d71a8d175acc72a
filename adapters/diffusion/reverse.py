"""Posteriors and reverse steps of any chain.

    p(x_s = j | x_t = i)  ~  [Q_{s..t}]_ji  [p(x_0 | x_t) Qbar_s]_j

is equation 4 of Austin et al. 2021 (arXiv:2107.03006) with the chain's own matrices; it holds for any s < t. M
positions, K states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adapters.diffusion.chains import Chain, draw
from adapters.diffusion.network import Network, sampling_dtype
from adapters.diffusion.process import Sampling

__all__ = ["NEVER", "ancestral_step", "log_posterior", "log_reverse", "reverse_kl"]

NEVER = -1e30  # logarithm of probability 0 where a gradient passes: -inf would make it NaN


def log_posterior(chain: Chain, x0: Tensor, xt: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """log q(x_s | x_t, x_0), (M, K); -inf where it is impossible."""
    joint = chain.column(xt, s, t).log() + chain.row(x0, s).log()
    return joint.log_softmax(1)


def log_reverse(
    chain: Chain, log_p: Tensor, xt: Tensor, s: Tensor, t: Tensor, parameterization: str = "joint"
) -> Tensor:
    """log p(x_s | x_t), (M, K), from log p(x_0 | x_t) (M, K).

    `joint` is the paper's equation 4. `mixture` averages the normalised posteriors q(x_s | x_t, x_0) instead: the same
    formula with each x_0's probability divided by q(x_t | x_0), as that is the posterior's normaliser.
    """
    column = chain.column(xt, s, t).to(log_p.dtype)
    if parameterization == "mixture":
        reach = chain.column(xt, torch.zeros_like(t), t).to(log_p.dtype)  # q(x_t | x_0) for every x_0
        possible, tiny = reach > 0, torch.finfo(reach.dtype).tiny
        log_p = torch.where(possible, log_p - reach.clamp_min(tiny).log(), NEVER).log_softmax(1)
    return (column.log() + chain.log_push(log_p, s)).log_softmax(1)


def reverse_kl(
    chain: Chain, log_p: Tensor, x0: Tensor, xt: Tensor, s: Tensor, t: Tensor, parameterization: str
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)), (M,); at s = 0 this is -log p(x_0 | x_t)."""
    log_q = log_posterior(chain, x0, xt, s, t).to(log_p.dtype)
    log_r = log_reverse(chain, log_p, xt, s, t, parameterization)
    # Where q is 0 the term is 0, whatever the logarithms are.
    possible = log_q > -torch.inf
    return torch.where(possible, log_q.exp() * (log_q - log_r.where(possible, 0.0)), 0.0).sum(1)


def ancestral_step(
    chain: Chain,
    network: Network,
    hidden: Tensor,
    xt: Tensor,
    times: tuple[int, int],
    u: Tensor,
    sampling: Sampling,
    cfg: Any,
    parameterization: str = "joint",
    last_from_clean: bool = False,
    zero_mask: bool = False,
) -> Tensor:
    """x_s (M,) drawn from p(x_s | x_t), from hidden states (M, D) and uniforms u (M,); times = (s, t).

    At s = 0 the mask is left out. `last_from_clean`: there, draw from p(x_0 | x_t) itself.
    """
    device, _ = sampling_dtype(network.device)
    chain = chain.to(device)
    drawn = torch.empty_like(xt)
    for rows, logits in network.logits(hidden):
        if zero_mask:
            logits[:, chain.mask_id] = -torch.inf
        log_p = sampling(logits.log_softmax(1))
        now = xt[rows].to(device)
        s, t = (torch.full_like(now, time) for time in times)
        if times[0] == 0 and last_from_clean:
            p = log_p.exp()
        else:
            p = log_reverse(chain, log_p, now, s, t, parameterization).exp()
        if times[0] == 0 and chain.mask_id is not None:
            p[:, chain.mask_id] = 0
        argmax = times[0] == 0 and cfg.final_step == "argmax"
        drawn[rows] = (p.argmax(1) if argmax else draw(p, u[rows].to(device))).cpu()
    return drawn
