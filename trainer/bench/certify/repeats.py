"""Whether a score comes out again: the same batches once more, and the rows in other company.

B rows.
"""

from __future__ import annotations

import math

import numpy as np

from data.rows import HeldoutRows
from trainer.bench.certify.checks import Check, Path, Result

__all__ = ["repeats"]

BATCHES, ALONE = 4, 8  # batches that are scored again, and rows that are scored alone
# Parts of a row's nats by which other shapes may round (`trainer.evaluate`, of a whole score: rows scatter more).
SAME = {"no": 1e-4, "fp16": 1e-2, "bf16": 2e-2}

AGAIN = 1e-6  # of equal shapes on a CPU


def repeats(path: Path, rows: HeldoutRows, nats: dict[int, float]) -> tuple[Check, Check]:
    """`nats`: of each row as the score found them, in batches of `path.batch_rows` from the first on."""
    return _again(path, rows, nats), _alone(path, rows, nats)


def _again(path: Path, rows: HeldoutRows, nats: dict[int, float]) -> Check:
    asked = "batches of the score were scored once more, as they were"
    most = AGAIN if path.device.type == "cpu" else SAME[path.precision]
    allowed = (
        f"{most:g} of a row's nats, as where a tensor lies in memory may decide in which order it is summed"
        if path.device.type == "cpu"
        else f"{most:g} of a row's nats, as a GPU adds in no fixed order"
    )
    starts = np.arange(0, rows.n_rows, path.batch_rows)
    chosen = starts[np.unique(np.linspace(0, len(starts) - 1, BATCHES).round().astype(int))]
    apart, count = 0.0, 0
    for start in chosen.tolist():
        ids = np.arange(start, min(start + path.batch_rows, rows.n_rows))
        found = path.score(rows.batch(ids)).nats.tolist()
        for number, again in zip(ids.tolist(), found, strict=True):
            apart, count = max(apart, _apart(again, nats[number])), count + 1
    how = f"apart by at most {apart:.2g} of their nats" if apart else "equal to the last digit"
    found_ = f"{count:,} rows in {len(chosen)} batches: {how}"
    result: Result = "passed" if apart <= most else "failed"
    return Check("repeatability", result, asked, allowed, found_, {"apart": apart, "rows": float(count)})


def _alone(path: Path, rows: HeldoutRows, nats: dict[int, float]) -> Check:
    asked = "rows of the score were scored alone: what is said of a text depends on no other text beside it"
    most = SAME["fp16" if path.precision == "no" and path.device.type == "cuda" else path.precision]
    allowed = f"{most:g} of a row's nats, as products of another shape round otherwise"
    apart, at = 0.0, -1
    chosen = np.unique(np.linspace(0, rows.n_rows - 1, ALONE).round().astype(int)).tolist()
    for number in chosen:
        found = float(path.score(rows.batch(np.array([number]))).nats[0])
        if not (now := _apart(found, nats[number])) <= apart:
            apart, at = now, number
    found_ = f"{len(chosen)} rows: apart by at most {apart:.2g} of their nats"
    if not apart <= most:
        found_ += f" (row {at}): the score depends on what is scored together"
    result: Result = "passed" if apart <= most else "failed"
    return Check(
        "independence of rows", result, asked, allowed, found_, {"apart": apart, "rows": float(len(chosen))}
    )


def _apart(one: float, other: float) -> float:
    """As a part of the larger, or of one nat where both are less."""
    apart = abs(one - other) / max(abs(one), abs(other), 1.0)
    return apart if math.isfinite(apart) else math.inf
