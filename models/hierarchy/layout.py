"""How many layers of which kind each stage of a hierarchy has, from the outermost in:

    ["m4", ["T1m4", ["T26"], "m4T1"], "m4"]

An encoder, what lies within, and a decoder; the innermost is one stack alone. `m`: a mixer of Mamba-2; `t`: attention;
`M`, `T`: the same with a feed-forward layer behind it (Hwang et al. 2025, arXiv:2507.07955, section 2.3, and the
configs of its authors).
"""

from __future__ import annotations

import re
from typing import Any

__all__ = ["Stage", "layers_of", "stages_of"]

Stage = tuple[str, ...]  # (encoder, decoder), or (main,) of the innermost


def layers_of(code: str) -> str:
    """Kinds of layers one by one: "T1m4" -> "Tmmmm". ValueError where it is no such code."""
    if not re.fullmatch(r"([mMtT][1-9]\d*)+", code):
        raise ValueError(
            f"a stack is written as kinds of layers (m, M, t, T), each with how many, such as 'm4' or 'T1m4', got "
            f"{code!r}"
        )
    return "".join(kind * int(count) for kind, count in re.findall(r"([mMtT])(\d+)", code))


def stages_of(layout: Any) -> list[Stage]:
    """Kinds of layers of each stage, from the outermost in, of a nested list. ValueError where it is none."""
    if not isinstance(layout, list) or not layout:
        raise ValueError(f"a list such as ['m4', ['T15'], 'm4'] is needed, got {layout!r}")
    if len(layout) == 1 and isinstance(layout[0], str):
        return [(layers_of(layout[0]),)]
    if len(layout) == 3 and isinstance(layout[0], str) and isinstance(layout[2], str):
        return [(layers_of(layout[0]), layers_of(layout[2])), *stages_of(layout[1])]
    raise ValueError(
        f"a stage is [encoder, [what lies within], decoder], and the innermost [main], such as ['m4', ['T15'], 'm4'], "
        f"got {layout!r}"
    )
