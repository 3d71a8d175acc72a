"""Muon: momentum whose matrices are orthogonalised before they are applied.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the `rms` scale is that of
Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982, eq. 4).

Matrices of one shape are orthogonalised together (kernels/newton_schulz). `torch.optim.Muon` walks over them one by
one, which on a GPU is a launch per matrix and product (1,080 for a 12-layer GPT against 45 here), and it takes a fused
query-key-value weight for one matrix.

Shapes: B matrices of one shape, m rows, n columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.choose import Kernels
from kernels.newton_schulz import newton_schulz
from kernels.newton_schulz.coefficients import COEFFICIENTS
from naming import not_one_of

if TYPE_CHECKING:
    from configs.schema import RunConfig

# Update scale as a function of rows and columns. `spectral` keeps the change of the layer's output
# independent of its shape; `rms` gives each update the RMS of a typical AdamW update (0.2).
SCALES: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


@cache
def iteration_dtype(parameter_dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Dtype of the Newton-Schulz products: bf16 where the hardware multiplies it, fp64 in an fp64 model.

    Rounding only perturbs singular values that the iteration leaves at 1 +- 0.3 anyway. On an EPYC core with
    AVX512-BF16, 12 matrices of 192 x 512 take 26 ms in bf16 and 59 ms in fp32; without those instructions
    bf16 is emulated and slower than fp32.
    """
    if parameter_dtype == torch.float64:
        return torch.float64
    if device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if device_type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


@dataclass(frozen=True)
class Piece:
    """Equal matrices that lie in one parameter: `count` of `rows` rows each, in the parameter's rows from `start` on
    (of each matrix of a stack). `suffix` tells their entries in the optimizer's state from those of other pieces."""

    start: int
    length: int  # rows of the parameter
    count: int
    rows: int
    columns: int
    suffix: str = ""

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of the parameter, of its gradient or of a tensor like it, as a view."""
        return tensor.narrow(-2, self.start, self.length)


def pieces_of(parameter: Tensor, split: int | tuple[int, ...]) -> list[Piece]:
    """The matrices that a parameter holds. Raises ValueError where it holds none.

    Two dimensions are one matrix, `split` equal ones stacked along the rows (a fused query-key-value projection), or
    one of each number of rows in a tuple `split`; three dimensions are a stack of such (experts).
    """
    if parameter.ndim not in (2, 3):
        raise ValueError(f"a matrix or a stack of matrices is needed, got shape {tuple(parameter.shape)}")
    *stack, rows, columns = parameter.shape
    number = math.prod(stack)
    if isinstance(split, int):
        if rows % split:
            raise ValueError(f"{rows} rows cannot be split into {split} equal matrices")
        return [Piece(0, rows, number * split, rows // split, columns)]
    if sum(split) != rows:
        raise ValueError(f"{rows} rows cannot be split into parts of {', '.join(map(str, split))}")
    starts = itertools.accumulate(split, initial=0)
    return [
        Piece(start, length, number, length, columns, f".{i}")
        for i, (start, length) in enumerate(zip(starts, split, strict=False))
    ]


@dataclass
class Bucket:
    """All matrices of one shape in one group, with their momentum in one tensor."""

    members: list[tuple[Parameter, Piece]]
    momentum: Tensor  # (B, m, n); B is the sum of the pieces' counts

    def state(self) -> dict[str, Sequence[Tensor]]:
        """What is saved: name -> the part of each member, as views."""
        return {"momentum_buffer": self.unstack(self.momentum)}

    @property
    def weights(self) -> list[Tensor]:
        return [piece.of(parameter) for parameter, piece in self.members]

    def stack_gradients(self) -> Tensor:
        shape = (-1, *self.momentum.shape[1:])
        gradients = [piece.of(p.grad).reshape(shape) for p, piece in self.members if p.grad is not None]
        return torch.cat(gradients).to(self.momentum.dtype)

    def agreeing(self, update: Tensor) -> Tensor:
        """Weights where (B, m, n) `update` does not have the other sign, else 0. By signs, as products of values may
        vanish; in floats, as a CPU is slow at choosing by booleans."""
        shape = (-1, *self.momentum.shape[1:])
        weights = torch.cat([weight.reshape(shape) for weight in self.weights])
        return weights.mul_(update.sign().mul_(weights.sign()).clamp_(max=0.0).add_(1.0))

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """(B, ...) -> the part (count, ...) of each member, as views."""
        return stacked.split([piece.count for _, piece in self.members])

    def unstack(self, stacked: Tensor) -> list[Tensor]:
        """(B, m, n) -> the part of each member, in its shape, as views."""
        parts = self.split(stacked)
        return [part.view(piece.of(p).shape) for part, (p, piece) in zip(parts, self.members, strict=True)]


class Muon(torch.optim.Optimizer):
    """M <- mu M + (1 - mu) g;  u = (1 - mu) g + mu M;  W <- W - lr wd W - lr s orth(u).

    A group may carry `splits`, one per parameter (see `pieces_of`). Momentum is fp32 (fp64 in an
    fp64 model) and is allocated at construction. Setting `found_inf` to a device scalar that holds 1 makes
    the next step leave parameters and momentum exactly as they are, without a host synchronisation: the
    contract of torch's fused optimizers.

    `cautious`: only entries of W decay whose sign is that of their entry of orth(u), or where that one is 0, so that
    decay never works against the update (Chen et al., arXiv:2510.12402).
    """

    found_inf: Tensor | None = None
    kernels = Kernels()  # a run sets its own
    bucket: type[Bucket] = Bucket

    def __init__(
        self,
        params,
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        scale: str = "spectral",
        ns_steps: int = 5,
        coefficients: str = "classic",
        cautious: bool = False,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"muon_scale: {not_one_of(scale, SCALES)}")
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"muon_coefficients: {not_one_of(coefficients, COEFFICIENTS)}")
        if ns_steps < 1:
            raise ValueError(f"muon_ns_steps must be at least 1, got {ns_steps}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"muon_momentum must satisfy 0 <= momentum < 1, got {momentum}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "scale": scale,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "cautious": cautious,
            "splits": None,
        }
        super().__init__(params, defaults)
        self._buckets = [self._make_buckets(group) for group in self.param_groups]

    def _make_buckets(self, group: dict) -> list[Bucket]:
        splits = group["splits"] or [1] * len(group["params"])
        members: dict[tuple, list[tuple[Parameter, Piece]]] = {}
        for parameter, split in zip(group["params"], splits, strict=True):
            for piece in pieces_of(parameter, split):
                key = (piece.rows, piece.columns, parameter.dtype, parameter.device)
                members.setdefault(key, []).append((parameter, piece))
        buckets = []
        for (rows, columns, dtype, device), pairs in members.items():
            number, state_dtype = (
                sum(piece.count for _, piece in pairs),
                torch.promote_types(dtype, torch.float32),
            )
            bucket = self.bucket(pairs, torch.zeros(number, rows, columns, dtype=state_dtype, device=device))
            for name, parts in bucket.state().items():
                for (parameter, piece), part in zip(pairs, parts, strict=True):
                    self.state[parameter][f"{name}{piece.suffix}"] = part
            buckets.append(bucket)
        return buckets

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; every parameter needs a gradient."""
        assert closure is None, "Muon takes no closure"
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            for bucket in buckets:
                self._step_bucket(group, bucket)

    def _step_bucket(self, group: dict, bucket: Bucket) -> None:
        momentum, mu = bucket.momentum, group["momentum"]
        rows, columns = momentum.shape[1:]
        dtype = bucket.members[0][0].dtype
        gradient = bucket.stack_gradients()  # (B, m, n)
        # A skipped step goes through the same arithmetic with a gradient (which may hold NaN) and rates of 0.
        # `new_full` and not `tensor`: filling on the device does not wait for it.
        share = momentum.new_full((), 1 - mu)
        rate = momentum.new_full((), -group["lr"] * SCALES[group["scale"]](rows, columns))
        shrinking = momentum.new_full((), group["lr"] * group["weight_decay"])
        decay = momentum.new_full((), 1 - group["lr"] * group["weight_decay"])
        if self.found_inf is not None:
            skip = self.found_inf > 0
            gradient.masked_fill_(skip, 0.0)
            share.masked_fill_(skip, 0.0)
            rate.masked_fill_(skip, 0.0)
            shrinking.masked_fill_(skip, 0.0)
            decay.masked_fill_(skip, 1.0)

        momentum.lerp_(gradient, share)
        nesterov = gradient.lerp_(momentum, mu)
        update = newton_schulz(
            nesterov,
            self.kernels,
            coefficients=group["coefficients"],
            steps=group["ns_steps"],
            dtype=iteration_dtype(dtype, momentum.device.type),
        )
        update = self.adjusted(bucket, update).to(dtype)
        if group["weight_decay"] and group["cautious"]:
            agreeing = bucket.agreeing(update)
            update.mul_(rate).sub_(agreeing.mul_(shrinking))
        else:
            update.mul_(rate)
            if group["weight_decay"]:
                torch._foreach_mul_(bucket.weights, decay)
        torch._foreach_add_(bucket.weights, tuple(bucket.unstack(update.contiguous())))

    def adjusted(self, bucket: Any, update: Tensor) -> Tensor:
        """What a kind of Muon makes of orthogonalised updates, (B, m, n) -> (B, m, n). Where `found_inf` holds 1, none
        of its state may change."""
        return update


def muon(groups: list[dict[str, Any]], cfg: RunConfig) -> Muon:
    return Muon(groups, **options(cfg))


def options(cfg: RunConfig) -> dict[str, Any]:
    """What every kind of Muon is told of the run."""
    return {
        "lr": 0.0,
        "momentum": cfg.muon_momentum,
        "scale": cfg.muon_scale,
        "ns_steps": cfg.muon_ns_steps,
        "coefficients": cfg.muon_coefficients,
        "cautious": cfg.cautious_weight_decay,
    }
