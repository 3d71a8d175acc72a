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

__all__ = ["NEVER", "ancestral_step", "log_posterior", "log_reverse", "reverse_kl", "shape_prediction"]

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


def shape_prediction(log_p: Tensor, mask_id: int | None, sampling: Sampling) -> Tensor:
    """`sampling` applied to log p(x_0 | x_t) (M, K) of the tokens; what is given to the mask stays with the mask."""
    if mask_id is None:
        return sampling(log_p)
    tokens = log_p.index_fill(1, torch.tensor(mask_id, device=log_p.device), -torch.inf)
    shaped = sampling(tokens) + tokens.logsumexp(1, keepdim=True)
    shaped[:, mask_id] = log_p[:, mask_id]
    return shaped


def _tokens_only(log_r: Tensor, log_p: Tensor, mask_id: int | None, sampling: Sampling) -> Tensor:
    """Probabilities (M, K) of the last step's tokens. A narrow `sampling` may leave only tokens that the chain cannot
    have come from, to fp64: then the prediction decides."""

    def tokens(log: Tensor) -> Tensor:
        log = sampling.only_tokens(log)
        if mask_id is None:
            return log
        return log.index_fill(1, torch.tensor(mask_id, device=log.device), -torch.inf)

    p = tokens(log_r).softmax(1)  # NaN where nothing is left
    return torch.where(p.isnan().any(1, keepdim=True), tokens(log_p).softmax(1), p)


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

    At s = 0 nothing but tokens is left. `last_from_clean`: there, draw from p(x_0 | x_t) itself.
    """
    device, _ = sampling_dtype(network.device)
    chain = chain.to(device)
    drawn = torch.empty_like(xt)
    for rows, logits in network.logits(hidden):
        if zero_mask:
            logits[:, chain.mask_id] = -torch.inf
        log_p = shape_prediction(logits.log_softmax(1), chain.mask_id, sampling)
        now = xt[rows].to(device)
        s, t = (torch.full_like(now, time) for time in times)
        last = times[0] == 0
        log_r = log_p
        if not (last and last_from_clean):
            log_r = log_reverse(chain, log_p, now, s, t, parameterization)
        p = _tokens_only(log_r, log_p, chain.mask_id, sampling) if last else log_r.exp()
        argmax = last and cfg.final_step == "argmax"
        drawn[rows] = (p.argmax(1) if argmax else draw(p, u[rows].to(device))).cpu()
    return drawn
