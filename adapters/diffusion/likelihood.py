"""Upper bounds on held-out nats by drawing noise, with standard errors.

A row's bound is estimated by independent replicates; a replicate is the mean of draws whose times are stratified. The
spread of a row's replicates gives its variance, and since no two rows share a draw, variances of rows add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.diffusion.network import Network
from adapters.diffusion.process import Draw, Process
from adapters.randomness import Noise, stratum

__all__ = ["REPLICATES", "Bound", "estimate_bound"]

REPLICATES = 4


@dataclass
class Bound:
    """`nats`, `variance` (of `nats`) (B,) fp64; `parts`: prior, diffusion, recon, which add up to it; `estimates`:
    `paper`, the released code's; `per_token` (B, S) of an exact one."""

    nats: Tensor
    variance: Tensor
    parts: dict[str, Tensor]
    estimates: dict[str, Tensor]
    per_token: Tensor | None = None


@torch.no_grad()
def estimate_bound(
    process: Process,
    network: Network,
    x0: Tensor,
    noised: Tensor,
    doc_ids: Tensor | None,
    noise: Noise,
    draws: int,
) -> Bound:
    """Bound on the nats of the `noised` positions (B, L) of x0 (B, L), given all others.

    `draws` per row, a multiple of 4 (one is enough where the bound is exact); `noise` is keyed by the rows. Positions
    outside `noised` are seen clean where `doc_ids` lets them be seen.
    """
    if draws % REPLICATES or draws < REPLICATES:
        raise ValueError(f"model_cfg.nelbo_draws: must be a multiple of {REPLICATES}, got {draws}")
    repeats = REPLICATES
    if process.exact:
        repeats = draws = 1
    strata, length = draws // repeats, x0.shape[1]
    replicates: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    shared = process.shared(network, x0, doc_ids)
    for replicate in range(repeats):
        total = torch.zeros(len(x0), dtype=torch.float64)
        for j in range(strata):
            name = f"{replicate}/{j}"
            r = stratum(noise.uniform(f"time {name}", process.time_streams(length)), j, strata)
            u, u_recon = noise.uniform(f"mask {name}", length), noise.uniform(f"recon {name}", length)
            parts = process.estimate(Draw(network, x0, noised, doc_ids, r, u, u_recon, shared))
            for part, nats in parts.items():
                sums[part] = sums.get(part, 0.0) + nats / draws
                if part not in ("paper", "per_token"):
                    total += nats / strata
        replicates.append(total)
    paper, per_token = {"paper": sums.pop("paper")}, sums.pop("per_token", None)
    values = torch.stack(replicates)  # (R, B)
    variance = values.var(0, correction=min(1, repeats - 1)) / repeats
    return Bound(values.mean(0), variance, sums, paper, per_token)
