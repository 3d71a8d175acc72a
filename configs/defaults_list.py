"""One entry of a `defaults` list: which files it names, and where their fields are placed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from configs.messages import ConfigError


@dataclass(frozen=True)
class Entry:
    """`optional name@package`: a file that may be missing, its fields under `package` ("" = where the list stands)."""

    name: str
    package: str = ""
    optional: bool = False


def parse_entry(entry: Any, where: str) -> list[Entry]:
    """The files of one entry: `name`, `{group: name}`, `{group: [a, b]}`, with Hydra's `optional` and `@package`."""
    key, values = entry, [""]
    if isinstance(entry, dict) and len(entry) == 1:
        ((key, value),) = entry.items()
        values = [f"/{v}" for v in (value if isinstance(value, list) else [value]) if v is not None]
        if str(key).startswith("override ") or str(key).lstrip("/").startswith("hydra"):
            raise ConfigError(
                f"{where}: '{key}: {value}' cannot stand in a model file. "
                f"Give it on the command line: {str(key).removeprefix('override ').lstrip('/')}={value}"
            )
    if not isinstance(key, str):
        raise ConfigError(f"{where}: a defaults entry is a name or a path, got {entry!r}")
    name = key.removeprefix("optional ").strip()
    name, at, package = name.rpartition("@") if re.search(r"@[\w.]*$", name) else (name, "", "")
    if package in ("_here_", "_global_"):
        package = ""
    if at and package and not all(part.isidentifier() for part in package.split(".")):
        raise ConfigError(f"{where}: '{package}' is no place for fields; write {name}@model_cfg, say")
    return [Entry(name + value, package, name != key and key.startswith("optional ")) for value in values]


def placed(
    values: dict[str, Any], lines: dict[str, int], package: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """Fields and their lines under a dotted package."""
    if not package:
        return values, lines
    for part in reversed(package.split(".")):
        values = {part: values}
    return values, {f"{package}.{key}": line for key, line in lines.items()}
