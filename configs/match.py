"""What makes runs of different architectures comparable: equal sizes (`match`) and equal lengths (`budget`).

Sizes are found before a run starts, and so is the number of its steps (`trainer/bench/fit.py`). Equal time is the
field `time_budget`. A `Dial` is what an architecture changes its size by: its Config names them (`size_dials`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

__all__ = [
    "Budget",
    "Count",
    "Dial",
    "Match",
    "SizeDials",
    "decoder_dials",
    "multiples",
    "ratio_dial",
    "width_dial",
]

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_PATTERN = r"^\s*[0-9]+(\.[0-9]+)?\s*[KMGTPkmgtp]?\s*$"
PARTS = 32  # of a width, by which hidden widths of so many times that width change
TILE = 16  # widths are multiples of it: what a tensor core multiplies at once


def _count(value: Any) -> Any:
    """`10M` is ten million; a whole number may be written as 1e7. Anything else is for the typed check."""
    if isinstance(value, str) and re.match(_PATTERN, value):
        number, suffix = value.strip(), ""
        if number[-1].isalpha():
            number, suffix = number[:-1].strip(), number[-1].upper()
        value = float(number) * _SUFFIXES[suffix] if "." in number else int(number) * _SUFFIXES[suffix]
    elif isinstance(value, str):
        raise ValueError(f"expected a number, such as 10M (K, M, G, T and P are allowed), got {value!r}")
    return round(value) if isinstance(value, float) and math.isfinite(value) and value >= 1 else value


Count = Annotated[
    Annotated[int, Field(ge=1)],
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 1}, {"type": "string", "pattern": _PATTERN}]}),
]


class _Target(BaseModel):
    """A target is one of several quantities, of which one may be given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    quantities: ClassVar[tuple[str, ...]]

    # What the fields had been that were changed to meet the target: a search starts there again.
    start: dict[str, Any] | None = None

    @property
    def given(self) -> dict[str, int]:
        """Quantity -> target."""
        return {name: value for name in self.quantities if (value := getattr(self, name)) is not None}

    def problems(self, name: str) -> list[str]:
        """Two targets at once: a sentence."""
        if len(self.given) < 2:
            return []
        both = " and ".join(f"{name}.{quantity}" for quantity in self.given)
        return [f"{both} are two targets, of which one can be met. Leave out all but one"]


class Match(_Target):
    """The size of a model. `counted`: which parameters `params` counts; `flops_per_byte` are those of a training step
    for each byte of text that it reads."""

    quantities = ("params", "flops_per_byte")

    params: Count | None = None
    counted: Literal["total", "active", "non_embedding"] = "total"
    flops_per_byte: Count | None = None


class Budget(_Target):
    """How long a run trains. Tokens are what the model reads (bytes, of one that reads bytes), bytes are of text."""

    quantities = ("flops", "tokens", "bytes")

    flops: Count | None = None
    tokens: Count | None = None
    bytes: Count | None = None


@dataclass(frozen=True)
class Dial:
    """A whole number that sizes follow, `at` for now. `fields(n)`: fields of `model_cfg` that make it n, which are the
    same for all n; of these `least` to `most` are tried. What the Config refuses is left out."""

    at: int
    fields: Callable[[int], Mapping[str, Any]]
    least: int = 1
    most: int = 2**16


@dataclass(frozen=True)
class SizeDials:
    """What an architecture changes its size by, in the order in which it is tried: the width, the depth, and finer ones
    from the coarsest on."""

    width: Dial | None = None
    depth: Dial | None = None
    fine: tuple[Dial, ...] = ()


def field_of(model_cfg: Any, name: str) -> Any:
    """A field of a Config, or `field.key` of one that is a mapping."""
    first, _, inner = name.partition(".")
    value = getattr(model_cfg, first)
    return value.get(inner) if inner else value


def multiples(name: str, at: int, step: int, make: Callable[[int], Any] = int) -> Dial:
    """A fine dial: a field between half of what it is and twice that, in multiples of `step`. `make`: the value of the
    field for such a multiple."""
    here = max(1, round(at / step))
    return Dial(here, lambda n: {name: make(n * step)}, max(1, here // 2), max(2, 2 * here))


def width_dial(width: int, heads: int, kv_heads: int | None, **others: int | None) -> Dial:
    """The width of a decoder in heads that stay as wide as they are, so many at a time that it fills tiles and that
    each key and value head is read by as many as before. `others`: widths that grow in proportion, None = which follow
    by themselves."""
    group = heads // kv_heads if kv_heads and heads % kv_heads == 0 else 1
    head = max(1, width // heads)
    unit = math.lcm(group, TILE // math.gcd(head, TILE))
    grown = {name: value for name, value in others.items() if value is not None}

    def fields(n: int) -> dict[str, Any]:
        found: dict[str, Any] = {"d_model": n * unit * head, "n_heads": n * unit}
        if kv_heads is not None:
            found["n_kv_heads"] = n * unit // group
        return found | {name: _in_tiles(value * n * unit / heads) for name, value in grown.items()}

    return Dial(max(1, round(heads / unit)), fields)


def _in_tiles(width: float) -> int:
    return max(1, round(width / TILE)) * TILE


def ratio_dial(name: str, at: float) -> Dial:
    """A fine dial that is a multiple of some width: in 32nds, between half of what it is and twice that."""
    here = max(1, round(at * PARTS))
    whole = {n * PARTS: n for n in range(1, 2 * here // PARTS + 1)}
    return Dial(here, lambda n: {name: whole.get(n, n / PARTS)}, max(1, here // 2), 2 * here)


def decoder_dials(cfg: Any) -> SizeDials:
    """Of a decoder with the usual fields: its width in heads, its blocks, and the hidden width of its feed-forward
    layers where it has a field for that."""
    named = type(cfg).model_fields
    inner = {"ffn_hidden": cfg.ffn_hidden} if "ffn_hidden" in named else {}
    width = width_dial(cfg.d_model, cfg.n_heads, getattr(cfg, "n_kv_heads", None), **inner)
    fine = (multiples("ffn_hidden", cfg.hidden_width, 8),) if inner else ()
    return SizeDials(width, Dial(cfg.n_layers, lambda n: {"n_layers": n}), fine)
