"""Paths in a configuration, as they are used: `~` resolved, and refused where no file can be called so.

The typed check does the same; but which run a command means is asked before it, of the raw values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from configs.messages import ConfigError
from configs.schema import PATHS


def usable_paths(values: Mapping[str, Any], where: Callable[[str], str]) -> dict[str, Any]:
    """Those of the values that name files, as they are used. ConfigError at the place that `where` knows of a key."""
    usable, problems = {}, []
    for name, check in PATHS.items():
        if (
            isinstance(values.get(name), str) and "${" not in values[name]
        ):  # what it stands for is checked later
            try:
                usable[name] = check(values[name])
            except ValueError as error:
                place = where(name)
                problems.append(f"{place}: {name}: {error}" if place else f"{name}: {error}")
    if problems:
        raise ConfigError(problems)
    return usable
