"""From noisy tokens to hidden states, losses and logits of chosen positions.

B rows, L positions, M gathered positions, D width, V states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.linear_diffusion_loss import linear_diffusion_loss
from kernels.linear_function_loss import RowFunction, linear_function_loss

__all__ = ["Network", "RowLoss", "Rows", "sampling_dtype"]

CHUNK_BYTES = 64 * 2**20  # of fp64 logits that exist at once in sampling


@dataclass
class Rows:
    """The positions that a loss reads, and what it needs to know of each.

    `index` (M,) into the flattened (B, L); `x0`, `xt` (M,); `weights` (M,) multiply the loss; `aux_weights` (M,) its
    cross-entropy beside the bound; `coefficients` of the fused loss by name.
    """

    index: Tensor
    x0: Tensor
    xt: Tensor
    weights: Tensor
    coefficients: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, chosen: Tensor, x0: Tensor, xt: Tensor, per_position: dict[str, Tensor]) -> Rows:
        """Gather where `chosen` (B, L) is true. `per_position` are (B, L), or (B, 1): one number per row; it must hold
        `weights`."""
        index = chosen.flatten().nonzero().squeeze(1)
        values = {k: v.expand(x0.shape).flatten()[index] for k, v in per_position.items()}
        return cls(index, x0.flatten()[index], xt.flatten()[index], values.pop("weights"), values)

    def tensors(self) -> dict[str, Tensor]:
        named = {"index": self.index, "x0": self.x0, "xt": self.xt, "weights": self.weights}
        return {f"rows.{k}": v for k, v in named.items()} | {
            f"rows.c.{k}": v for k, v in self.coefficients.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rows:
        prefix = "rows.c."
        coefficients = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        index, x0, xt, weights = (tensors[f"rows.{k}"] for k in ("index", "x0", "xt", "weights"))
        return cls(index, x0, xt, weights, coefficients)

    def to(self, device: torch.device, dtype: torch.dtype) -> Rows:
        """There, with fractions in `dtype`."""
        moved = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.tensors().items()}
        return Rows.from_tensors(moved)

    def sum_by_row(self, values: Tensor, batch: int, length: int) -> Tensor:
        """(M,) -> (B,) fp64 on the CPU."""
        owner = (self.index // length).cpu()
        return torch.zeros(batch, dtype=torch.float64).index_add_(0, owner, values.double().cpu())


@dataclass
class RowLoss:
    """`sum` of weights * (bound + aux_weight * cross-entropy), differentiable; `nats` (M,) of the bound and `aux` (M,)
    of the cross-entropy, unweighted and detached."""

    sum: Tensor
    nats: Tensor
    aux: Tensor | None = None


def sampling_dtype(device: torch.device) -> tuple[torch.device, torch.dtype]:
    """Where probabilities are computed: in fp64, hence on the CPU where a device has none. Draws from fp32 truncate the
    tails, which acts like a lower temperature (Zheng et al. 2024, arXiv:2409.02908)."""
    return (torch.device("cpu") if device.type == "mps" else device), torch.float64


class Network:
    """A backbone with its output layer. `kernels` of the run choose how losses are computed; None = automatically."""

    def __init__(self, model: Any, kernels: Kernels | None = None) -> None:
        self.model, self.kernels = model, kernels or Kernels()
        self.calls = 0

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device

    def hidden(self, xt: Tensor, tau: Tensor, index: Tensor, **extra: Any) -> Tensor:
        """Hidden states (M, D) at `index` (M,) of the flattened (B, L). `extra`: further inputs of the backbone."""
        self.calls += 1
        device = self.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in extra.items()}
        hidden = self.model(xt.to(device), tau.to(device, torch.float32), **moved)  # (B, L, D)
        return hidden.flatten(0, 1).index_select(0, index.to(device))

    @property
    def dtype(self) -> torch.dtype:
        """Number format of losses: at least fp32."""
        return torch.promote_types(self.model.head_weight.dtype, torch.float32)

    def loss(self, hidden: Tensor, rows: Rows, mode: str, aux_weight: float | Tensor = 0.0) -> RowLoss:
        """A fused loss of the kernel's `mode` over gathered hidden states. `aux_weight` of the cross-entropy: relative
        to the rows' weights, or (M,) by itself."""
        model = self.model
        args = (hidden, model.head_weight, model.head_bias, rows.x0, rows.xt, rows.weights, rows.coefficients)
        kind = {"mode": mode, "V": model.V, "n": model.n, "mask_id": model.mask_id, "aux_weight": aux_weight}
        return RowLoss(*linear_diffusion_loss(*args, **kind, kernels=self.kernels))

    def loss_of_logits(
        self, hidden: Tensor, weights: Tensor, function: RowFunction, aux_weight: float = 0.0
    ) -> RowLoss:
        """A loss that no mode of the fused one knows, written on logits (kernels/linear_function_loss)."""
        model = self.model
        args = (hidden, model.head_weight, model.head_bias, weights, function)
        return RowLoss(*linear_function_loss(*args, V=model.V, aux_weight=aux_weight, kernels=self.kernels))

    def logits(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits (m, V) fp64) in chunks, for sampling; never all positions at once."""
        device, dtype = sampling_dtype(self.device)
        chunk = max(1, CHUNK_BYTES // (8 * self.model.V))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            yield rows, self.model.logits(hidden[rows])[:, : self.model.V].to(device, dtype)
