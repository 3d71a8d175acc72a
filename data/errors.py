"""The one exception for a user's mistake in data."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used as asked: says what was given, what is allowed, what would work."""
