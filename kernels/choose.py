"""Which implementation of an operation runs: the one rule, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from kernels import AUTO, KERNELS, REFERENCE, problems
from kernels.precision import at_least_fp32
from naming import load

__all__ = ["MIN_CHUNK_ROWS", "Kernels", "rows_at_once"]

# Fewer rows make the matrix products inefficient, and each chunk passes over the head and its gradient: V = 50,257,
# D = 768, bf16, CPU: 10.5 s in chunks of 128 rows, 9.8 of 256, 8.1 of 512.
MIN_CHUNK_ROWS = 512


class Kernels:
    """The field `kernels` of one run, and a record of what its operations used.

    It belongs to the run's adapter, which hands it to every operation it calls: two runs in one process have nothing in
    common. `wanted` maps `default` and operations to an implementation or "auto". An operation's own entry is followed
    or refused; the default is followed by the operations that have it.
    """

    def __init__(self, wanted: Mapping[str, str] | None = None) -> None:
        self.wanted = {"default": AUTO, **(wanted or {})}
        if wrong := problems(self.wanted):
            raise ValueError("; ".join(wrong))
        self.used: dict[str, dict[str, str]] = {}  # operation -> implementation -> why, the first time

    def choose(self, op: str, *, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> str:
        """The implementation that this call of `op` takes; it is recorded. `rows` and `columns` of the logits, `dtype`
        of the matrix products."""
        name, why = self.foresee(op, rows=rows, columns=columns, device=device, dtype=dtype)
        self.used.setdefault(op, {}).setdefault(name, why)
        return name

    def implementation(
        self, op: str, *, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> Callable[..., Any]:
        """The function that `choose` names."""
        name = self.choose(op, rows=rows, columns=columns, device=device, dtype=dtype)
        return load(KERNELS[op].implementations[name])

    def foresee(
        self, op: str, *, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[str, str]:
        """(implementation, why) of such a call, without a record."""
        kernel = KERNELS[op]
        own = self.wanted.get(op)
        if own not in (None, AUTO):
            return own, f"kernels.{op}"
        if own is None and self.wanted["default"] in kernel.implementations:
            return self.wanted["default"], "kernels.default"
        if "chunked" not in kernel.implementations:
            return REFERENCE, "auto: the plain definition"
        at_once = rows_at_once(op, columns, device, dtype)
        if kernel.plain_if_one_chunk and rows <= at_once:
            return REFERENCE, f"auto: logits of {rows:,} rows fit at once"
        return "chunked", f"auto: logits of {at_once:,} rows at a time"

    def unread(self, ops: Iterable[str]) -> list[str]:
        """Operations that have an entry, and are none of those that the run has."""
        return sorted(self.wanted.keys() - {"default", *ops})


def rows_at_once(op: str, columns: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows of a chunk."""
    sizes = KERNELS[op].chunk_bytes
    budget = sizes.get(device.type, sizes["cuda"])
    return max(MIN_CHUNK_ROWS, budget // (at_least_fp32(dtype).itemsize * columns))
