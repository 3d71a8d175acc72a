"""Reverse steps from ratios s_y = p_t(y) / p_t(x) of one token (Lou et al. 2024, arXiv:2310.16834, section 4.2).

A graph says where a token may go: to the mask (absorbing), or anywhere (uniform, rate 1/N). Steps return unnormalised
probabilities over the next state. M positions, V states; `log_s` (M, V) fp64 is 0 at the present token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from adapters.diffusion.chains import draw
from adapters.diffusion.network import Network, sampling_dtype
from adapters.diffusion.process import Process, Sampling, Window

__all__ = ["AbsorbingGraph", "ScoreModel", "Step", "UniformGraph", "reveal_by_scores", "shape_scores"]


class AbsorbingGraph:
    """Every token jumps to the mask at rate 1. Only masked positions move backwards."""

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id

    def analytic(self, log_s: Tensor, now: Tensor, delta: float) -> Tensor:
        """Tweedie tau-leaping at masked positions: p(y) = (e^delta - 1) s_y, the rest stays masked."""
        grown = torch.expm1(torch.tensor(delta, dtype=log_s.dtype))
        return self._with_rest(grown * log_s.exp())

    def euler(self, log_s: Tensor, now: Tensor, amount: float) -> Tensor:
        """One Euler step: p(y) = dt sigma'(t) s_y."""
        return self._with_rest(amount * log_s.exp())

    def _with_rest(self, p: Tensor) -> Tensor:
        p[:, self.mask_id] = 0
        p[:, self.mask_id] = (1 - p.sum(1)).clamp_min(0)
        return p


class UniformGraph:
    """Every token jumps to any token at rate 1/N."""

    def __init__(self, states: int) -> None:
        self.states = states

    def analytic(self, log_s: Tensor, now: Tensor, delta: float) -> Tensor:
        """[e^(-delta Q) s]_y [e^(delta Q)](y -> x)."""
        d = torch.tensor(delta, dtype=log_s.dtype)
        s = log_s.exp()
        undone = s + torch.expm1(d) * (s - s.sum(1, keepdim=True) / self.states)
        arrive = torch.full_like(s, float(-torch.expm1(-d)) / self.states)
        arrive.scatter_add_(1, now.unsqueeze(1), torch.exp(-d).expand(len(s), 1))
        return (undone * arrive).clamp_min(0)

    def euler(self, log_s: Tensor, now: Tensor, amount: float) -> Tensor:
        p = (amount / self.states * log_s.exp()).scatter(1, now.unsqueeze(1), 0.0)
        return p.scatter(1, now.unsqueeze(1), (1 - p.sum(1, keepdim=True)).clamp_min(0))


def shape_scores(log_s: Tensor, now: Tensor, sampling: Sampling) -> Tensor:
    """Apply `sampling` to the normalised scores of y != x, whose total is kept."""
    others = log_s.scatter(1, now.unsqueeze(1), -torch.inf)
    total = others.logsumexp(1, keepdim=True)
    return (sampling(others - total) + total).scatter(1, now.unsqueeze(1), 0.0)


class ScoreModel(Protocol):
    """A process that can be read as scores."""

    def log_scores(self, logits: Tensor, now: Tensor, sigma: float) -> Tensor:
        """(M, V) fp64 from logits (M, V), present tokens (M,) and total noise."""
        ...


Step = Callable[[Tensor, Tensor, float], Tensor]


def reveal_by_scores(
    process: Process,
    model: ScoreModel,
    network: Network,
    window: Window,
    plan: Sequence[tuple[float, Step, float]],
    final_argmax: bool = False,
) -> Iterator[Tensor]:
    """Run the reverse chain from noise. `plan` holds per step the total noise sigma that the network is told, the step
    function and its amount; the last one is the final denoising, which leaves no mask and with `final_argmax` takes the
    likeliest token.

    Known positions hold clean tokens throughout. On the absorbing graph that is the exact conditional; on the uniform
    one it conditions on the noisy token having that value, an approximation.
    """
    x, noise, length = window.x.clone(), window.noise, window.x.shape[1]
    u = noise.uniform("start", length)
    start = torch.full_like(x, process.mask_id) if process.mask_id is not None else (u * process.n).long()
    x = torch.where(window.unknown, start, x)
    for i, (sigma, step, amount) in enumerate(plan):
        last = i == len(plan) - 1
        moving = window.unknown if process.mask_id is None else x == process.mask_id
        if not bool(moving.any()):
            return
        index = moving.flatten().nonzero().squeeze(1)
        hidden = network.hidden(x, torch.full((len(x),), sigma), index)
        now, u = x.flatten()[index], noise.uniform(f"step {i}", length).flatten()[index]
        drawn = _draw_step(
            process,
            model,
            network,
            hidden,
            now,
            u,
            window.sampling,
            (sigma, step, amount),
            last,
            final_argmax,
        )
        x = x.flatten().index_put((index,), drawn).view_as(x)
        yield x


def _tokens_only(p: Tensor, log_s: Tensor, mask_id: int | None, sampling: Sampling) -> Tensor:
    """The last step's law p (M, V) without what is no token. Where nothing is left of it, the scores' own."""
    allowed = sampling.only_tokens(torch.zeros_like(p)) == 0
    if mask_id is not None:
        allowed[:, mask_id] = False
    p = p.where(allowed, 0.0)
    return torch.where(p.sum(1, keepdim=True) > 0, p, log_s.where(allowed, -torch.inf).softmax(1))


def _draw_step(
    process: Process,
    model: ScoreModel,
    network: Network,
    hidden: Tensor,
    now: Tensor,
    u: Tensor,
    sampling: Sampling,
    plan: tuple[float, Step, float],
    last: bool,
    final_argmax: bool,
) -> Tensor:
    """Next states (M,) from hidden states (M, D)."""
    sigma, step, amount = plan
    device, _ = sampling_dtype(network.device)
    drawn = torch.empty_like(now)
    for rows, logits in network.logits(hidden):
        present = now[rows].to(device)
        # Between the ends any state may be visited that noise leads to; text is made of tokens.
        drawable = sampling if last or process.mask_id is not None else replace(sampling, tokens=None)
        log_s = shape_scores(model.log_scores(logits, present, sigma), present, drawable)
        p = step(log_s, present, amount)
        if last:
            p = _tokens_only(p, log_s, process.mask_id, sampling)
        drawn[rows] = (p.argmax(1) if last and final_argmax else draw(p, u[rows].to(device))).cpu()
    return drawn
