"""What the Newton-Schulz iteration computes and moves."""

from __future__ import annotations

__all__ = ["operations"]


def operations(batch: int, rows: int, columns: int, *, steps: int, symmetric: bool = True) -> int:
    """Floating-point operations of a stack of matrices. `symmetric`: one half of each symmetric product, with its
    diagonal; else as plain products compute them."""
    s, k = sorted((rows, columns))
    per_entry = (s + 1) if symmetric else 2 * s  # of a row of the Gram matrix
    gram, polynomial, applied = k * s * per_entry, s * s * per_entry, 2 * s * s * k
    return batch * steps * (gram + polynomial + applied)
