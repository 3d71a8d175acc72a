"""State kept by parameter name: one readable message when a saved state and a model do not fit."""

from collections.abc import Iterable

_SHOWN = 5


def require_same_names(what: str, expected: Iterable[str], given: Iterable[str]) -> None:
    """Raise ValueError listing the missing and the unexpected names (up to five each)."""
    expected, given = list(expected), list(given)
    missing = sorted(set(expected) - set(given))
    unexpected = sorted(set(given) - set(expected))
    problems = [
        f"{label} {len(names)}: {shorten(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise ValueError(f"{what} does not fit this model ({'; '.join(problems)})")


def shorten(names: list[str]) -> str:
    """`a, b, c, d, e and 7 more`."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
