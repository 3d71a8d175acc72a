"""The one exception for a user's mistake in data, and the nearest-name helper its messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """Data that cannot be used as asked: says what was given, what is allowed, what would work."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or nothing where no allowed name is close."""
    close = difflib.get_close_matches(given, list(allowed), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
