"""What the diffusion models differ in: how text turns into noise, what is learned, and how a step is undone.

The adapter, the evaluation and the generation loops know only this class.

B rows, L positions, M gathered positions, V states. Masks of positions are (B, L) bool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.base import LossTerm
from adapters.diffusion.network import Network, RowLoss, Rows
from adapters.diffusion.otherwise import Levels
from adapters.documents import documents
from adapters.randomness import Noise
from adapters.shaping import Shaping

__all__ = ["Sampling", "Process", "Window"]


@dataclass(frozen=True)
class Sampling(Shaping):
    """What a caller may ask of sampling beside changes to the predicted distribution of a clean token."""

    steps: int = 0  # reverse steps; 0 = the model's own number
    by_confidence: bool = False  # masked processes: reveal the surest positions first
    use_cache: bool = True  # False: run the network again wherever its answer could be reused


@dataclass
class Window:
    """Positions being generated together. `x` (B, L) holds the text where `unknown` (B, L) is False; the first
    position is always known. `noise` is keyed by the window."""

    x: Tensor
    unknown: Tensor
    noise: Noise
    sampling: Sampling


class Process(ABC):
    """`cfg`: the architecture's Config; `n` real tokens, `V` states, `mask_id` or None."""

    estimator: str  # how the bound is estimated, in words
    stratified = True  # training times are stratified over a step
    exact = False  # the bound is the likelihood itself
    kernel = "linear_diffusion_loss"  # operation of kernels/ that its loss runs in

    def __init__(self, cfg: Any, n: int, V: int, mask_id: int | None) -> None:
        self.cfg, self.n, self.V, self.mask_id = cfg, n, V, mask_id

    @property
    def trains_on_bound(self) -> bool:
        """What training minimises, beside auxiliary terms, is an estimate of the bound."""
        return True

    @property
    def mask(self) -> int:
        """The mask's id, in processes that have one."""
        assert self.mask_id is not None
        return self.mask_id

    def time_streams(self, length: int) -> int:
        """Times per row of `length` positions; more than one where each block has its own."""
        return 1

    def per_position(self, values: Tensor, length: int) -> Tensor:
        """(B, time_streams) -> broadcastable to (B, length)."""
        return values

    def noise_width(self, length: int) -> int:
        """Uniform numbers per row that `corrupt` reads."""
        return length

    def network_tau(self, time: Tensor, length: int) -> Tensor:
        """`tau` as the network takes it: (B,), or (B, L) where positions differ."""
        return self.tau(time)

    def extra(self, x0: Tensor) -> dict[str, Tensor]:
        """Further inputs of the network beside noisy tokens, time and document ids."""
        return {}

    def shared(self, network: Network, x0: Tensor, doc_ids: Tensor | None) -> dict[str, Any]:
        """`extra` for many noisy versions of the same rows, without gradients."""
        return dict(self.extra(x0))

    def read(self, network: Network, x0: Tensor, doc_ids: Tensor) -> Tensor:
        """Hidden states (B, L, D) of text (B, L) without noise, at the smallest time that training draws."""
        smallest = torch.zeros(len(x0), self.time_streams(x0.shape[1]), dtype=torch.float64)
        tau = self.network_tau(self.training_time(smallest), x0.shape[1])
        device = network.device
        told = {name: t.to(device) for name, t in documents(network.model, doc_ids).items()}
        return network.model(x0.to(device), tau.to(device, torch.float32), **told)

    @property
    @abstractmethod
    def sampler_steps(self) -> int:
        """Reverse steps of a window; 0 for a sampler that has none."""

    def check(self, sampling: Sampling) -> None:
        """Raises ValueError for what this process would not heed."""
        if sampling.by_confidence and self.mask_id is None:
            raise ValueError(
                "by_confidence: reveals masked positions in order of confidence, and this chain has no mask"
            )
        if sampling.steps and not sampling.by_confidence and not self.sampler_steps:
            raise ValueError(
                f"steps: this model's sampler is first_hitting, which reveals one token per call and takes no number "
                f"of steps, got {sampling.steps}. Leave it out, or reveal several tokens per call with by_confidence"
            )

    @property
    def gap_notes(self) -> tuple[str, ...]:
        """How filled gaps differ from draws of the model's conditional law."""
        if self.mask_id is not None:
            return ()
        return (
            "without a mask, filling gaps is an approximation: known text is noised as far as the rest at each step",
        )

    @property
    def chunk(self) -> int:
        """New tokens per window when text is longer than one window: half the context."""
        return max(1, self.cfg.n_ctx // 2)

    # -- corruption --------------------------------------------------------------------------------------------

    @abstractmethod
    def training_time(self, r: Tensor) -> Tensor:
        """Uniform numbers r in (0, 1) -> times, (B, 1), as `corrupt` and `rows` read them."""

    @abstractmethod
    def corrupt(self, x0: Tensor, noised: Tensor, time: Tensor, u: Tensor) -> Tensor:
        """x_t (B, L): a draw from q(x_t | x_0) at `noised` positions, from uniforms u (B, L); x_0 elsewhere."""

    def progress(self, time: Tensor) -> Tensor:
        """`time` as a part of the whole way to noise, in (0, 1]."""
        return time

    @abstractmethod
    def tau(self, time: Tensor) -> Tensor:
        """What the network is told of the time: (B,)."""

    # -- objective ---------------------------------------------------------------------------------------------

    @abstractmethod
    def rows(self, x0: Tensor, xt: Tensor, noised: Tensor, time: Tensor) -> Rows:
        """The positions that the loss reads, with their weights."""

    @abstractmethod
    def row_loss(self, network: Network, hidden: Tensor, rows: Rows) -> RowLoss:
        """Loss of gathered hidden states (M, D)."""

    def bound_nats(self, loss: RowLoss, rows: Rows) -> Tensor:
        """(M,) each row's part of the estimate of the bound, in nats."""
        return loss.nats * rows.weights.to(loss.nats.dtype)

    def terms(self, network: Network, hidden: Tensor, loss: RowLoss, rows: Rows) -> dict[str, LossTerm]:
        """Loss terms over the step's tokens; the first is the bound."""
        return {"nelbo": LossTerm(loss.sum, "tokens")}

    def statistics(self, network: Network, hidden: Tensor, loss: RowLoss, rows: Rows) -> dict[str, Tensor]:
        """Sums over the loss's rows of further quantities, reported as means."""
        return {}

    # -- bound -------------------------------------------------------------------------------------------------

    @abstractmethod
    def estimate(self, draw: Draw) -> dict[str, Tensor]:
        """One unbiased draw of the bound: nats (B,) fp64 by part. `diffusion`, `recon` and `prior` add up to it;
        `paper` is the released code's, without the ends. Where the process is `exact`, `per_token` (B, L - 1) too."""

    def levels(self) -> Levels | None:
        """The bound written out as a sum over times, which `eval --certify` compares its estimates with. None where
        that is not known: the bound cannot be certified then."""
        return None

    def noised_together(self, noised: Tensor) -> list[Tensor]:
        """Places of `noised` (L,) by what shares a time, (G,) each."""
        return [noised.nonzero().squeeze(1)]

    # -- sampling ----------------------------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, network: Network, window: Window) -> Iterator[Tensor]:
        """Draw the unknown positions; yields x (B, L) after every step, the result last."""

    def clean_log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities (M, V) of the clean token at a masked position: a softmax without the mask."""
        if self.mask_id is not None:
            logits = logits.clone()
            logits[:, self.mask_id] = -torch.inf
        return logits.log_softmax(1)


@dataclass
class Draw:
    """One draw of the bound for a batch: `r` (B, streams) and `u` (B, L) uniforms, independent of all others.

    `u_recon` (B, L) is for the noise at the clean end. `doc_ids` (B, L) or None keeps attention within documents.
    `shared`: further inputs of the network, from `Process.shared`.
    """

    network: Network
    x0: Tensor
    noised: Tensor
    doc_ids: Tensor | None
    r: Tensor
    u: Tensor
    u_recon: Tensor
    shared: dict[str, Any]

    @property
    def counts(self) -> Tensor:
        """(B,) fp64: positions that are noised and scored."""
        return self.noised.sum(1).double()

    def hidden(self, xt: Tensor, tau: Tensor, rows: Rows) -> Tensor:
        return self.network.hidden(
            xt, tau, rows.index, **documents(self.network.model, self.doc_ids), **self.shared
        )

    def by_row(self, rows: Rows, values: Tensor) -> Tensor:
        return rows.sum_by_row(values, *self.x0.shape)
