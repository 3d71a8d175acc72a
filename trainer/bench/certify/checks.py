"""What a check of a certificate is, and the scoring path that all of them go through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from adapters.base import Context, Likelihood, Otherwise
from data.rows import Batch, HeldoutRows
from trainer.evaluate import evaluating
from trainer.precision import autocast

if TYPE_CHECKING:
    from trainer.run.restore import Restored

__all__ = ["Check", "Path", "Result", "of_one_row", "split", "tolerance"]

Result = Literal["passed", "failed", "not asked"]

# Nats of one token by which nothing but rounding moves what is said of it. fp32: logits of 10 to 100, summed in another
# order, differ by 1e-7 to 1e-6 of themselves. bf16 and fp16 keep 8 and 11 bits, so that logits differ by 1e-2, and
# choices (experts, chunks, blocks) that are made on rounded numbers may fall the other way.
ROUNDING = {"no": 1e-4, "fp16": 5e-2, "bf16": 2e-1}


@dataclass(frozen=True)
class Check:
    """`asked`: what was tried; `tolerance`: what would still pass, and why; `found`: what came out, in words, and as
    numbers in `measured`. A check that makes no sense for a model is "not asked", and `found` says why."""

    name: str
    result: Result
    asked: str
    tolerance: str
    found: str
    measured: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tolerance(precision: str, device: torch.device) -> float:
    """Nats of a token: `ROUNDING`, of products in fp32 as the device makes them (TF32 keeps 11 bits)."""
    return ROUNDING["fp16"] if precision == "no" and device.type == "cuda" else ROUNDING[precision]


class Path:
    """The path by which `evaluate` scores rows: the adapter's `likelihood`, in its mode, number format and context."""

    def __init__(self, restored: Restored, rows: HeldoutRows, batch_rows: int, precision: str) -> None:
        """`batch_rows`: of a forward pass over `rows`, which those of probes are not to exceed in tokens."""
        self.adapter, self.device = restored.adapter, restored.device
        self.seq_len, rows_in_step = rows.seq_len, rows.n_rows
        self.seed, self.rows_in_step = restored.cfg.seed, rows_in_step
        self.batch_rows, self.precision = batch_rows, precision

    @property
    def precision_name(self) -> str:
        return "fp32" if self.precision == "no" else self.precision

    def rows_of(self, targets: int) -> int:
        """Rows of so many targets that may be scored at once."""
        return max(1, self.batch_rows * self.seq_len // max(targets, 1))

    @property
    def _context(self) -> Context:
        return Context(seed=self.seed, step=0, phase="eval", rows_in_step=self.rows_in_step)

    @torch.no_grad()
    def score(self, batch: Batch) -> Likelihood:
        with evaluating(self.adapter), autocast(self.precision, self.device):
            return self.adapter.likelihood(batch, self._context)

    @torch.no_grad()
    def bound_otherwise(self, batch: Batch) -> Otherwise | None:
        with evaluating(self.adapter), autocast(self.precision, self.device):
            return self.adapter.bound_otherwise(batch, self._context)

    def by_target(self, batch: Batch) -> tuple[Tensor, bool]:
        """Nats of each target (B, S) fp64, 0 where it does not count, where the score says them and they add up to it;
        else of each row (B, 1). And which of the two."""
        parts = [self.score(part) for part in split(batch, self.rows_of(batch.weights.shape[1]))]
        nats = torch.cat([part.nats for part in parts])
        if parts[0].kind != "exact" or any(part.per_token is None for part in parts):
            return nats[:, None], False
        each = torch.cat([part.per_token for part in parts if part.per_token is not None])
        each = torch.where(torch.from_numpy(batch.weights) > 0, each, 0.0)
        adds_up = torch.allclose(each.sum(1), nats, rtol=1e-6, atol=1e-6)
        return (each, True) if adds_up else (nats[:, None], False)


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows in parts of at most `size`."""
    for start in range(0, len(batch.rows), size):
        part = slice(start, start + size)
        yield Batch(
            tokens=batch.tokens[part],
            doc_ids=batch.doc_ids[part],
            weights=batch.weights[part],
            end_weights=batch.end_weights[part],
            rows=batch.rows[part],
            bytes=0,
        )


def of_one_row(batch: Batch, row: int, tokens: np.ndarray, weights: np.ndarray) -> Batch:
    """Versions of one row of a batch, with other tokens (R, S + n) and weights (R, S). They keep the row's number: what
    a score draws for it is the same for all. No end of a document is scored."""
    count = len(tokens)
    return Batch(
        tokens=tokens,
        doc_ids=np.repeat(batch.doc_ids[row : row + 1], count, axis=0),
        weights=weights.astype(np.float32),
        end_weights=np.zeros_like(weights, dtype=np.float32),
        rows=np.repeat(batch.rows[row], count),
        bytes=0,
    )
