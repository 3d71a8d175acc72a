"""Markov chains that corrupt one token: what D3PM calls the transition matrices (Austin et al. 2021, arXiv:2107.03006).

Row convention: `[Q_t]_ij = q(x_t = j | x_{t-1} = i)`, `Qbar_t = Q_1 ... Q_t`, `Qbar_0 = 1`. A chain never shows a
matrix; it multiplies distributions by one, and reads rows and columns. Everything works on M independent tokens with
times of their own.

M tokens, K states, T steps.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.diffusion.neighbors import Spectrum

__all__ = ["AbsorbingChain", "Chain", "GaussianChain", "SpectralChain", "UniformChain", "draw"]

LARGEST_TABLE_BYTES = 4 * 2**30


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw from unnormalised fp64 rows (M, K) with uniforms (M,): (M,) ids, never one of probability 0.
    ValueError if a row is no law, as those of a network are whose weights are not finite."""
    cumulative = probabilities.cumsum(1)
    total = cumulative[:, -1:]
    _require_laws(total)
    threshold = (u.unsqueeze(1).to(cumulative) * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)


def _require_laws(total: Tensor) -> None:
    """ValueError unless every row has something to draw from. A device other than the CPU refuses it by itself: nothing
    waits for the answer."""
    laws, message = ((total > 0) & (total < torch.inf)).all(), "what the network predicts is not finite"
    if not total.is_cpu:
        torch._assert_async(laws, message)
    elif not laws:
        raise ValueError(f"nothing can be drawn: {message}")


class Chain(ABC):
    """`states` K, `steps` T, `mask_id` of an absorbing state or None. Times are (M,) int64."""

    states: int
    steps: int
    mask_id: int | None = None

    @abstractmethod
    def push(self, p: Tensor, t: Tensor) -> Tensor:
        """p Qbar_t for distributions p (M, K)."""

    @abstractmethod
    def column(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """(M, K): the probability of each state at time s to be in state x (M,) at time t > s."""

    @abstractmethod
    def prior_nats(self, x0: Tensor) -> Tensor:
        """(M,) KL(q(x_T | x0) || p(x_T)), p the law that sampling starts from."""

    def row(self, x: Tensor, t: Tensor) -> Tensor:
        """(M, K): q(x_t | x_0 = x)."""
        return self.push(F.one_hot(x, self.states).to(self.dtype), t)

    def log_push(self, log_p: Tensor, t: Tensor) -> Tensor:
        """log(p Qbar_t). Differentiable; the floor keeps the slope finite where a probability has underflown."""
        return self.push(log_p.exp(), t).clamp_min(torch.finfo(log_p.dtype).tiny).log()

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0), from uniforms (M,)."""
        return draw(self.row(x0, t), u)

    def start(self, u: Tensor) -> Tensor:
        """x_T from the stationary law: the mask, or uniform ids."""
        if self.mask_id is not None:
            return torch.full_like(u, self.mask_id, dtype=torch.int64)
        return (u * self.states).long().clamp_max(self.states - 1)

    # -- where the tables live ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Number format of rows and columns."""

    def to(self, device: torch.device) -> Chain:
        """A copy with its tables there; in fp32 where the device knows nothing wider."""
        narrow = torch.float32 if device.type == "mps" else None
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device, narrow if value.is_floating_point() else None))
        return moved


class _ClosedForm(Chain):
    """Chains that are known by alpha-bar_t = prod(1 - beta_s) alone."""

    def __init__(self, states: int, betas: Tensor) -> None:
        self.states, self.steps = states, len(betas)
        self.betas = F.pad(betas.double(), (1, 0))  # (T+1,), beta_0 = 0: indexed by t
        self.alpha_bar = torch.cumprod(1 - self.betas, 0)  # (T+1,)

    @property
    def dtype(self) -> torch.dtype:
        return self.alpha_bar.dtype

    def survival(self, s: Tensor, t: Tensor) -> Tensor:
        """alpha-bar_t / alpha-bar_s; 0 where nothing has survived until s."""
        a = self.alpha_bar[s]
        return torch.where(a > 0, self.alpha_bar[t] / a.clamp_min(1e-300), 0.0)


class AbsorbingChain(_ClosedForm):
    """`Q_t = (1 - beta_t) 1 + beta_t 1 e_m'`: a token becomes the mask and stays it."""

    def __init__(self, states: int, betas: Tensor, mask_id: int) -> None:
        super().__init__(states, betas)
        self.mask_id: int = mask_id

    def push(self, p: Tensor, t: Tensor) -> Tensor:
        a = self.alpha_bar[t].to(p.dtype).unsqueeze(1)
        pushed = a * p
        pushed[:, self.mask_id] += ((1 - a) * p.sum(1, keepdim=True)).squeeze(1)
        return pushed

    def log_push(self, log_p: Tensor, t: Tensor) -> Tensor:
        a = self.alpha_bar[t].to(log_p.dtype).unsqueeze(1)
        kept = a.log() + log_p
        is_mask = torch.arange(self.states, device=log_p.device).eq(self.mask_id)
        return torch.where(is_mask, torch.logaddexp(kept, torch.log1p(-a).expand_as(kept)), kept)

    def column(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        kept = self.survival(s, t).unsqueeze(1)
        own = kept * F.one_hot(x, self.states).to(kept.dtype)
        to_mask = (1 - kept).expand(-1, self.states).clone()
        to_mask[:, self.mask_id] = 1
        return torch.where(x.eq(self.mask_id).unsqueeze(1), to_mask, own)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return torch.where(u < self.alpha_bar[t], x0, self.mask_id)

    def prior_nats(self, x0: Tensor) -> Tensor:
        """What has survived is spread over the n = K - 1 real tokens: alpha-bar_T log n."""
        return (self.alpha_bar[-1] * math.log(self.states - 1)).expand(x0.shape)


class UniformChain(_ClosedForm):
    """`Q_t = (1 - beta_t) 1 + beta_t 11'/K`."""

    def push(self, p: Tensor, t: Tensor) -> Tensor:
        a = self.alpha_bar[t].to(p.dtype).unsqueeze(1)
        return a * p + (1 - a) / self.states * p.sum(1, keepdim=True)

    def log_push(self, log_p: Tensor, t: Tensor) -> Tensor:
        a = self.alpha_bar[t].to(log_p.dtype).unsqueeze(1)
        return torch.logaddexp(a.log() + log_p, (torch.log1p(-a) - math.log(self.states)).expand_as(log_p))

    def column(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        kept = self.survival(s, t).unsqueeze(1)
        return kept * F.one_hot(x, self.states).to(kept.dtype) + (1 - kept) / self.states

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        a = self.alpha_bar[t]
        redrawn = ((u - a) / (1 - a) * self.states).long().clamp(0, self.states - 1)
        return torch.where(u < a, x0, redrawn)

    def prior_nats(self, x0: Tensor) -> Tensor:
        a, k = self.alpha_bar[-1], self.states
        own, other = a + (1 - a) / k, (1 - a) / k
        return (own * torch.log(k * own) + (k - 1) * torch.xlogy(other, k * other)).expand(x0.shape)


class GaussianChain(Chain):
    """Ordinal states: a discretised Gaussian around each, doubly stochastic (Austin et al. 2021, eq. 8).

    The Q_t do not commute, so all Qbar_t are tabulated: T K^2 numbers, meant for bytes.
    """

    def __init__(self, states: int, betas: Tensor, table_dtype: torch.dtype = torch.float32) -> None:
        self.states, self.steps = states, len(betas)
        size = (self.steps + 1) * states**2 * table_dtype.itemsize
        if size > LARGEST_TABLE_BYTES:
            most = LARGEST_TABLE_BYTES // (states**2 * table_dtype.itemsize) - 1
            raise ValueError(
                f"model_cfg.transition_type=gaussian keeps {self.steps} matrices of {states} x {states}: "
                f"{size / 2**30:.1f} GiB, and the limit is {LARGEST_TABLE_BYTES / 2**30:.0f}. Set "
                f"model_cfg.num_timesteps to at most {most}, or tokenizer=byte (257 states)"
            )
        self.betas = F.pad(betas.double(), (1, 0))
        self.table = torch.empty(self.steps + 1, states, states, dtype=table_dtype)
        product = torch.eye(states, dtype=torch.float64)
        self.table[0] = product
        for t in range(1, self.steps + 1):
            product = product @ self.matrix(t)
            self.table[t] = product

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def matrix(self, t: int) -> Tensor:
        """Q_t (K, K) fp64, symmetric."""
        ids = torch.arange(self.states, device=self.betas.device)
        return self._kernel(ids, self.betas[t].double().expand(self.states))

    def _kernel(self, x: Tensor, beta: Tensor) -> Tensor:
        """Rows x (M,) of the one-step matrices with those betas (M,): (M, K)."""
        k = self.states
        # A chain of one or two states has no scale of its own; 1 keeps the formula defined.
        scale = 4 / (max(k - 1, 1) ** 2 * beta.unsqueeze(1))  # (M, 1)
        offsets = torch.arange(-(k - 1), k, device=x.device)
        total = torch.exp(-(offsets**2) * scale).sum(1, keepdim=True)
        distance = torch.arange(k, device=x.device) - x.unsqueeze(1)
        off = torch.exp(-(distance**2) * scale) / total * (distance != 0)
        return off + (distance == 0) * (1 - off.sum(1, keepdim=True))

    def push(self, p: Tensor, t: Tensor) -> Tensor:
        out = torch.empty_like(p)
        for step in t.unique().tolist():
            chosen = t == step
            out[chosen] = p[chosen] @ self.table[step].to(p.dtype)
        return out

    def row(self, x: Tensor, t: Tensor) -> Tensor:
        return self.table[t, x]

    def column(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        if bool((t == s + 1).all()):
            return self._kernel(x, self.betas[t]).to(self.dtype)  # symmetric
        out = torch.empty(len(x), self.states, dtype=self.dtype, device=x.device)
        for first, last in torch.stack([s, t], 1).unique(dim=0).tolist():
            chosen = (s == first) & (t == last)
            out[chosen] = self._between(first, last)[:, x[chosen]].T.to(self.dtype)
        return out

    def _between(self, s: int, t: int) -> Tensor:
        """Q_{s+1} ... Q_t (K, K) fp64."""
        if s == 0:
            return self.table[t].double()
        product = self.matrix(s + 1)
        for step in range(s + 2, t + 1):
            product = product @ self.matrix(step)
        return product

    def prior_nats(self, x0: Tensor) -> Tensor:
        return _nats_from_uniform(self.table[-1][x0].double())


class SpectralChain(Chain):
    """Chains whose steps share the eigenvectors of one symmetric matrix: nearest neighbours in an embedding.

    `Q_t = U diag(f_t) U'`, with the factors f_t (K,) from `neighbors.Spectrum`.
    """

    def __init__(self, spectrum: Spectrum) -> None:
        self.vectors = spectrum.vectors  # U (K, K)
        self.factors = F.pad(spectrum.factors, (0, 0, 1, 0), value=1.0)  # (T+1, K), f_0 = 1
        self.cumulative = torch.cumprod(self.factors, 0)  # (T+1, K)
        self.states, self.steps = self.vectors.shape[0], len(self.factors) - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors.dtype

    def push(self, p: Tensor, t: Tensor) -> Tensor:
        vectors = self.vectors.to(p.dtype)
        return self._clean(p @ vectors * self.cumulative[t].to(p.dtype) @ vectors.T, p.sum(1, keepdim=True))

    def row(self, x: Tensor, t: Tensor) -> Tensor:
        return self._clean(self.vectors[x] * self.cumulative[t] @ self.vectors.T, 1.0)

    def column(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Q is symmetric, so a column is a row."""
        factors = self.factors[t] if bool((t == s + 1).all()) else self._between(s, t)
        return self._clean(self.vectors[x] * factors @ self.vectors.T, 1.0)

    def _between(self, s: Tensor, t: Tensor) -> Tensor:
        """Factors (M, K) of Q_{s+1} ... Q_t; a product, as factors of late steps may be 0."""
        out = torch.empty(len(s), self.states, dtype=self.dtype, device=s.device)
        for first, last in torch.stack([s, t], 1).unique(dim=0).tolist():
            out[(s == first) & (t == last)] = self.factors[first + 1 : last + 1].prod(0)
        return out

    @staticmethod
    def _clean(p: Tensor, total: Tensor | float) -> Tensor:
        """Rounding leaves entries of -1e-17 and sums of 1 - 1e-15."""
        p = p.clamp_min(0)
        return p * (total / p.sum(1, keepdim=True))

    def prior_nats(self, x0: Tensor) -> Tensor:
        return _nats_from_uniform(self.row(x0, torch.full_like(x0, self.steps)).double())


def _nats_from_uniform(p: Tensor) -> Tensor:
    """KL(p || uniform) of rows (M, K): (M,)."""
    return torch.xlogy(p, p * p.shape[1]).sum(1)
