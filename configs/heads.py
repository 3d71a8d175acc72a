"""The number of heads of a model whose width the command line changes, and nothing else of them.

A head keeps the width that the files give it: `model_cfg.d_model=256` of a file with 12 heads in 768 has 4 of 64. A
sweep over widths then changes one thing of attention, and a width need not be a multiple of the number that a file
happens to have. Who means another number says so: `model_cfg.n_heads=8`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeGuard

import models
from configs.files import CONFIGS, Node, read

# Width -> numbers of heads that lie in it, the first of which decides how wide one is.
HEADS = {
    "d_model": ("n_heads", "n_kv_heads", "memory_num_heads", "memory_num_kv_heads"),
    "d_local": ("local_n_heads",),
    "d_global_pre_patch": ("global_n_heads",),  # of each byte of a patch
}
OWN_WIDTH = "head_dim"  # where an architecture has it, heads are as wide as it says
# Where these are so, heads of a memory lie in memory_rank.
OF_A_RANK = {"use_low_rank_memory": True, "low_rank_mode": "reduced_dim"}

_NAMES = {name for width, numbers in HEADS.items() for name in (width, *numbers)} | {OWN_WIDTH}


class Told(TypedDict):
    """What the files of a model say of `model_cfg`, as far as it is here of interest."""

    own: list[str]  # what they state without their presets
    values: dict[str, int | None]  # None: no number


def given(keys: Iterable[str]) -> set[str]:
    """The widths among the keys of a command line."""
    return {name for name in HEADS if f"model_cfg.{name}" in keys}


def told(layers: Sequence[Node]) -> Told:
    """What files say. `layers`: in the order in which they apply, presets among them."""
    own = {name for node in layers if not node.size for name in _fields(node)}
    values = {name: value for node in layers for name, value in _fields(node).items()}
    return {"own": sorted(own), "values": values}


def _of_type(type_: Any, files: Told) -> dict[str, int]:
    """Those of them that an architecture has, with the values of its own YAML behind them. Of one that is not ours,
    what a preset alone states is left out, as it drops what it lacks; and so is a width that our YAML leaves to weights
    from elsewhere, of which presets say nothing either."""
    shipped = CONFIGS / f"{type_}.yaml"
    known = _fields(read(shipped)) if type_ in models.ARCHITECTURES and shipped.is_file() else {}
    names = {n for n in known if known[n] or n not in HEADS} or set(files["own"])
    values = {**known, **files["values"]}
    return {n: v for n in names if (v := values[n])} if OWN_WIDTH not in names else {}


def _fields(node: Node) -> dict[str, int | None]:
    fields = node.values.get("model_cfg")
    stated = fields.items() if isinstance(fields, dict) else ()
    return {name: value if _is_size(value) else None for name, value in stated if name in _NAMES}


def keep_widths(tree: Mapping[str, Any], said: Told, explicit: set[str]) -> tuple[list[str], list[str]]:
    """Give a model whose width is `explicit`, and whose number of heads is not, as many as keep the width that its
    files give them; in place. Remarks, and problems where no whole number of them does."""
    fields, notices, problems = tree.get("model_cfg"), [], []
    if not isinstance(fields, dict):
        return [], []
    files = _of_type(tree.get("type"), said)
    for name in given(explicit):
        counts = [heads for heads in HEADS[name] if heads in files]
        of_files, width = files.get(name), fields.get(name)
        if not counts or f"model_cfg.{counts[0]}" in explicit or of_files is None or not _is_size(width):
            continue
        if width == of_files or of_files % files[counts[0]]:
            continue
        other = all(fields.get(field) == value for field, value in OF_A_RANK.items())
        counts = [
            heads
            for heads in counts
            if f"model_cfg.{heads}" not in explicit and not (other and heads.startswith("memory_"))
        ]
        unit = of_files // math.gcd(of_files, *(files[heads] for heads in counts))
        told = f"{of_files} with " + ", ".join(f"{heads} {files[heads]}" for heads in counts)
        if width % unit:
            near = [w for w in (width // unit * unit, (width // unit + 1) * unit) if w]
            problems.append(
                f"model_cfg.{name} ({width}) must be a multiple of {unit}, so that heads are as wide as in the files "
                f"({told}); nearest: {', '.join(map(str, near))}. Another number of heads: "
                f"model_cfg.{counts[0]}=<heads>"
            )
            continue
        kept = {heads: files[heads] * width // of_files for heads in counts}
        fields |= kept
        notices.append(
            f"model_cfg.{name} {width}: {', '.join(f'{heads} {n}' for heads, n in kept.items())}, heads as wide as in "
            f"the files ({told}). Another number: model_cfg.{counts[0]}=<heads>"
        )
    return notices, problems


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0
