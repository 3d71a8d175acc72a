"""Curves as they go into a page: as many points as it has room for, two bytes a number."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from trainer.view.comparison.runs import AXES, Curve

__all__ = ["LEAST", "packed", "thinned"]

LEAST = 8  # points of a curve
ALIKE = 5e-4  # share by which what is in proportion to something may be off
STEPS = 65535  # of a number of two bytes


def thinned(curve: Curve, points: int) -> Curve:
    """At most `points` of it (8 at least): the first, the last, and of each bin between the lowest and the highest.
    Half of the bins are of equal length, half grow with the distance from the start, so that an axis may be
    logarithmic."""
    n, limit = len(curve), max(points, LEAST)
    if n <= limit:
        return curve
    bins = (limit - 2) // 2
    even = np.linspace(1, n - 1, bins // 2 + 1)
    growing = np.geomspace(1, n - 1, bins - bins // 2 + 1)
    edges = np.unique(np.concatenate((even, growing)).round().astype(int))
    kept = {0, n - 1}
    for start, end in zip(edges, edges[1:], strict=False):
        bits = curve.bits[start:end]
        kept |= {start + int(bits.argmin()), start + int(bits.argmax())}
    places = np.array(sorted(kept))
    return Curve(curve.bits[places], {axis: values[places] for axis, values in curve.spent.items()})


def packed(curve: Curve) -> dict[str, Any]:
    """JSON that the page's script reads: by column [lowest, highest, base64 of little-endian uint16], in equal steps
    for `bits`, in equal ratios for what was spent; "=" for what is in proportion to the tokens. Columns with gaps, or
    of what nothing was spent of, are left out."""
    found: dict[str, Any] = {"bits": _pack(curve.bits, curve.bits)}
    for axis in AXES:
        values = curve.spent[axis]
        if np.isfinite(values).all() and (values > 0).all():
            found[axis] = _pack(values, np.log(values))
            each = values / curve.spent["tokens"]
            if axis != "tokens" and each.max() < (1 + ALIKE) * each.min():
                found[axis][2] = "="
    return found


def _pack(values: np.ndarray, spaced: np.ndarray) -> list[Any]:
    """values (n,); spaced (n,): of them what is in equal steps."""
    low, high = spaced.min(), spaced.max()
    whole = np.rint((spaced - low) / ((high - low) or 1.0) * STEPS).astype("<u2")
    return [
        float(f"{values.min():.7g}"),
        float(f"{values.max():.7g}"),
        base64.b64encode(whole.tobytes()).decode(),
    ]
