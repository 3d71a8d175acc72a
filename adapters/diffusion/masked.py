"""What masked diffusion models share: exact-count bounds, and samplers that reveal masked positions.

B rows, L positions, M gathered positions, V states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from adapters.diffusion.chains import draw
from adapters.diffusion.network import Network, sampling_dtype
from adapters.diffusion.process import Process, Sampling, Window
from adapters.diffusion.schedules import total_noise

__all__ = [
    "Denoise",
    "at_mask_probability",
    "binomial_tail",
    "choose_exactly",
    "first_hitting",
    "grid_times",
    "reveal_by_confidence",
    "reveal_on_grid",
    "sample_clean",
]

CLEAN_END = 1e-5

# (mask probability (B,), x (B, L), index (M,) of the flattened x) -> hidden states (M, D)
Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def grid_times(steps: int, final_step: str) -> Tensor:
    """(S + 1,) times of `reveal_on_grid`, from 1 to 0; with `final_step: argmax` to 1e-5, as in the authors' code, and
    the positions that are masked there take a further step."""
    return torch.linspace(1, CLEAN_END if final_step == "argmax" else 0, steps + 1, dtype=torch.float64)


def at_mask_probability(network: Network, most: float) -> Denoise:
    """The network told the total noise -log(1 - u) of a mask probability u, which the schedule lets reach `most`."""

    def denoise(u: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return network.hidden(x, total_noise(u.double().clamp_max(most)).float(), index)

    return denoise


def choose_exactly(candidates: Tensor, k: Tensor, u: Tensor) -> Tensor:
    """(B, L) bool: k (B,) uniformly chosen positions of each row's candidates, those with the smallest u."""
    rank = u.masked_fill(~candidates, 2.0).argsort(1).argsort(1)
    return candidates & (rank < k.unsqueeze(1))


def binomial_tail(count: Tensor, p: float, k: Tensor) -> Tensor:
    """P(Binomial(count, p) >= k), elementwise over (B,) fp64; the regularised incomplete beta I_p(k, count - k + 1)."""
    if p <= 0:
        return (k <= 0).double()
    if p >= 1:
        return (k <= count).double()
    longest = int(count.max()) if len(count) else 0
    j = torch.arange(longest + 1, dtype=torch.float64)  # (J,)
    n = count.unsqueeze(1)
    inside = j <= n
    log_choose = torch.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma((n - j).clamp_min(0) + 1)
    log_mass = log_choose + j * math.log(p) + (n - j) * math.log1p(-p)
    return (log_mass.exp() * (inside & (j >= k.unsqueeze(1)))).sum(1)


def sample_clean(
    process: Process, network: Network, hidden: Tensor, u: Tensor, sampling: Sampling, argmax: bool = False
) -> tuple[Tensor, Tensor]:
    """Clean tokens (M,) at masked positions and their probabilities (M,) fp64, from hidden states (M, D). `argmax`: the
    likeliest tokens instead of draws."""
    device, _ = sampling_dtype(network.device)
    tokens, confidence = (
        torch.empty(len(hidden), dtype=torch.int64),
        torch.empty(len(hidden), dtype=torch.float64),
    )
    for rows, logits in network.logits(hidden):
        p = sampling(process.clean_log_probs(logits)).exp()
        chosen = p.argmax(1) if argmax else draw(p, u[rows].to(device))
        tokens[rows] = chosen.cpu()
        confidence[rows] = p.gather(1, chosen.unsqueeze(1)).squeeze(1).cpu()
    return tokens, confidence


def _put(x: Tensor, index: Tensor, tokens: Tensor) -> Tensor:
    return x.flatten().index_put((index,), tokens).view_as(x)


def reveal_on_grid(
    process: Process,
    network: Network,
    window: Window,
    stay: list[float],
    denoise: Callable[[int, Tensor, Tensor], Tensor],
    lazy: bool,
) -> Iterator[Tensor]:
    """Ancestral sampling (Sahoo et al. 2024, section 3.2.2): at step i a masked position stays masked with probability
    stay[i], else it is drawn from the prediction, for good. Whatever is masked after the last step is drawn then, or is
    the likeliest token where `final_step` says so, as in the authors' code.

    `denoise(i, x, index)` runs the network. `lazy` calls it only at steps where some position is revealed, and on the
    rows where that happens: predictions do not depend on the time, so the text is the same with fewer calls, at most
    one per position.
    """
    x, noise, length = window.x.clone(), window.noise, window.x.shape[1]
    x[window.unknown] = process.mask
    for i, probability in enumerate([*stay, 0.0]):
        masked = x == process.mask
        if not bool(masked.any()):
            return
        reveal = masked & (noise.uniform(f"coin {i}", length) >= probability)
        read = reveal if lazy else masked
        if bool(read.any()):
            index = read.flatten().nonzero().squeeze(1)
            hidden = denoise(i, x, index)
            keep = reveal.flatten()[index].nonzero().squeeze(1)  # on the host, which need not wait then
            index, hidden = index[keep], hidden[keep.to(hidden.device)]
            u = noise.uniform(f"token {i}", length).flatten()[index]
            argmax = i == len(stay) and process.cfg.final_step == "argmax"
            tokens, _ = sample_clean(process, network, hidden, u, window.sampling, argmax)
            x = _put(x, index, tokens)
        yield x


def first_hitting(process: Process, network: Network, window: Window, denoise: Denoise) -> Iterator[Tensor]:
    """One position at a time, at the very times the continuous process would reveal them (Zheng et al. 2024,
    arXiv:2409.02908): with k masked, the mask probability falls to u U^(1/k). Every token is drawn, the last one too.

    `denoise(u, x, index)` runs the network at mask probabilities u (B,).
    """
    x, noise, length = window.x.clone(), window.noise, window.x.shape[1]
    x[window.unknown] = process.mask
    u = torch.ones(len(x), dtype=torch.float64)
    for i in range(int(window.unknown.sum(1).max())):
        masked = x == process.mask
        count = masked.sum(1)
        fresh = noise.uniform(f"hit {i}", 2)  # (B, 2): time, token
        u = u * fresh[:, 0] ** (1 / count.clamp_min(1))
        revealed = choose_exactly(masked, count.clamp_max(1), noise.uniform(f"place {i}", length))
        index = revealed.flatten().nonzero().squeeze(1)
        hidden = denoise(u, x, index)
        tokens, _ = sample_clean(process, network, hidden, fresh[index // length, 1], window.sampling)
        x = _put(x, index, tokens)
        yield x


def reveal_by_confidence(
    process: Process, network: Network, window: Window, steps: int, denoise: Denoise
) -> Iterator[Tensor]:
    """Not the model's distribution: at each step an equal share of the positions, those drawn with the highest
    probability (Nie et al. 2025, LLaDA, arXiv:2502.09992, low-confidence remasking)."""
    x, noise, length = window.x.clone(), window.noise, window.x.shape[1]
    x[window.unknown] = process.mask
    total = window.unknown.sum(1)  # (B,)
    own_steps = total.clamp(1, steps)  # (B,), so that no row depends on its neighbours
    for i in range(int(own_steps.max())):
        masked = x == process.mask
        index = masked.flatten().nonzero().squeeze(1)
        hidden = denoise(masked.sum(1) / total.clamp_min(1), x, index)
        u = noise.uniform(f"token {i}", length).flatten()[index]
        tokens, confidence = sample_clean(process, network, hidden, u, window.sampling)
        drawn = _put(x, index, tokens)
        doubt = (
            torch.full(x.shape, torch.inf, dtype=torch.float64)
            .flatten()
            .index_put((index,), -confidence)
            .view_as(x)
        )
        left = total - (total * (i + 1) // own_steps).clamp_max(total)  # masked after this step
        reveal = choose_exactly(masked, masked.sum(1) - left, doubt)
        x = torch.where(reveal, drawn, x)
        yield x
