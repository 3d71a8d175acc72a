"""Fields that are gone: what was saved with them is read without, and who asks for one is told what to use. And fields
that are younger than some runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from configs.messages import ConfigError

# What to say, by the full name that the field had.
REMOVED: dict[str, str] = {
    "model_cfg.loss_impl": "the field kernels chooses how losses are computed (kernels=reference was 'naive')",
}

# What a run did that knew no such field, where it is not what the default does now.
YOUNGER: dict[str, Any] = {
    "near_copies": "keep",
    "val_files": [],
}


def drop_removed(
    values: Mapping[str, Any],
    fields: Collection[str],
    where: Callable[[str], str],
    notices: list[str],
    prefix: str = "",
) -> dict[str, Any]:
    """`values` without what was removed; a name that is among `fields` (an architecture's own) stays.

    `prefix` leads the names, `where` gives the place of one. ConfigError for those of the command line.
    """
    kept, problems = {}, []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key not in REMOVED or name in fields:
            kept[name] = value
            continue
        place = where(key)
        said = f"{place or 'config'}: '{key}' is no longer a field: {REMOVED[key]}"
        if place == "command line":
            problems.append(said)
        else:
            notices.append(f"{said}. Left out (it was {value})")
    if problems:
        raise ConfigError(problems)
    return kept
