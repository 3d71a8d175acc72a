"""The nearest-neighbour chain: tokens move to their neighbours in a given embedding.

Austin et al. 2021 (arXiv:2107.03006), section 3.1 and appendix A.2.4: G_ij = 1 if i is among the k nearest of j;
A = (G + G')/(2k); R = A - diag(A 1); Q_t = exp(a_t R). R is symmetric with zero row sums, so every Q_t is doubly
stochastic, and one eigendecomposition serves all of them. The alternative balances G + G' to a doubly stochastic S
(Sinkhorn and Knopp) and mixes, Q_t = (1 - beta_t) 1 + beta_t S.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from naming import expand_path, not_one_of

__all__ = ["Spectrum", "balance", "generator_matrix", "load_embedding", "neighbor_graph", "spectrum"]

SINKHORN_ROUNDS = 2000


@dataclass(frozen=True)
class Spectrum:
    """`Q_t = vectors diag(factors_t) vectors'`: vectors (K, K), factors (T, K), fp64."""

    vectors: Tensor
    factors: Tensor


def load_embedding(path: str, states: int) -> Tensor:
    """(K, d) fp64 from a .npy file or a tensor saved by torch; one row per token id."""
    file = expand_path(path)
    if not file.is_file():
        raise ValueError(f"model_cfg.nn_embedding_path: no such file: {file}")
    if file.suffix == ".npy":
        table = torch.from_numpy(np.load(file))
    else:
        table = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(table, Tensor) or table.ndim != 2 or table.shape[0] != states:
        found = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(
            f"model_cfg.nn_embedding_path: {file} holds {found}; expected one row per token, ({states}, width). "
            f"It must be a pretrained embedding of this run's tokenizer"
        )
    return table.double()


def neighbor_graph(embedding: Tensor, k: int) -> Tensor:
    """G (K, K) of 0 and 1: G_ij = 1 if i is among the k nearest (by cosine) of j, itself left out.

    Raises ValueError if the graph falls apart: the chain's stationary law would not be uniform.
    """
    states = embedding.shape[0]
    if not 1 <= k < states:
        raise ValueError(f"model_cfg.nearest_neighbors: must be 1 to {states - 1} ({states} tokens), got {k}")
    rows = embedding.double()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    graph = torch.zeros(states, states, dtype=torch.float64)
    for start in range(0, states, 1024):  # never more than 1024 x K similarities
        similarity = unit[start : start + 1024] @ unit.T
        ids = torch.arange(start, start + len(similarity))
        similarity[torch.arange(len(ids)), ids] = -torch.inf
        nearest = similarity.topk(k, dim=1).indices  # (rows, k): neighbours of each j
        graph[nearest, ids.unsqueeze(1)] = 1
    _check_connected(graph, k)
    return graph


def _check_connected(graph: Tensor, k: int) -> None:
    linked = (graph + graph.T) > 0
    label = torch.full((len(graph),), -1)
    sizes: list[int] = []
    while bool((label < 0).any()):
        front = torch.zeros(len(graph), dtype=torch.bool)
        front[int((label < 0).nonzero()[0])] = True
        seen = front.clone()
        while bool(front.any()):
            front = linked[front].any(0) & ~seen
            seen |= front
        label[seen] = len(sizes)
        sizes.append(int(seen.sum()))
    if len(sizes) > 1:
        largest = ", ".join(map(str, sorted(sizes, reverse=True)[:5]))
        raise ValueError(
            f"model_cfg.nearest_neighbors ({k}): the neighbour graph has {len(sizes)} components (sizes {largest}"
            f"{', ...' if len(sizes) > 5 else ''}), so noise would never mix all tokens. Use more neighbours"
        )


def generator_matrix(graph: Tensor, k: int) -> Tensor:
    """R = A - diag(A 1), A = (G + G')/(2k)."""
    a = (graph + graph.T) / (2 * k)
    return a - torch.diag(a.sum(1))


def balance(graph: Tensor) -> Tensor:
    """Doubly stochastic, symmetric S = D (G + G') D, by scaling rows and columns in turn until the sums are 1.

    Raises ValueError where the pattern of neighbours admits no such matrix.
    """
    matrix = graph + graph.T
    scale = torch.ones(len(graph), dtype=matrix.dtype)
    for _ in range(SINKHORN_ROUNDS):
        sums = matrix @ scale
        scale = (scale / sums).sqrt()
    balanced = scale.unsqueeze(1) * matrix * scale
    worst = float((balanced.sum(1) - 1).abs().max())
    if worst > 1e-8:
        raise ValueError(
            f"model_cfg.nn_construction=sinkhorn: this neighbour graph cannot be balanced (sums are off by "
            f"{worst:.1e}). "
            f"Use more nearest_neighbors, or nn_construction=expm"
        )
    return balanced


def spectrum(matrix: Tensor, amounts: Tensor, construction: str) -> Spectrum:
    """`expm`: matrix R and exponents a_t (T,), factors exp(a_t lambda). `sinkhorn`: matrix S and betas,
    factors 1 - beta_t + beta_t lambda."""
    values, vectors = torch.linalg.eigh(matrix)
    amounts = amounts.double().unsqueeze(1)  # (T, 1)
    if construction == "expm":
        return Spectrum(vectors, torch.exp(amounts * values.clamp_max(0)))  # R has no positive eigenvalue
    if construction == "sinkhorn":
        return Spectrum(vectors, 1 - amounts + amounts * values)
    raise ValueError(f"model_cfg.nn_construction: {not_one_of(construction, ('expm', 'sinkhorn'))}")
