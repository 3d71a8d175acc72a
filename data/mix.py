"""`data=mix`: several sources, of which training takes whole documents by weight.

`mix` is a list of entries: `data`, a source, with fields of its own as if it stood alone, a `weight`, and a `name`.
Weights are shares of bytes, so that the order of documents (`data/mix_order.py`) knows no tokenizer. A list of weights
is one for each stage of a run; stages are equal parts of the text that it reads. Each source has its own held-out text.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data import SOURCES
from data.errors import DataError
from naming import load as load_named
from naming import not_one_of, shorten

__all__ = ["OWN", "Entry", "Mix", "MixConfig", "absolute", "entries_of", "fields_of", "load"]

OWN = ("data", "name", "weight")  # what every entry may state


class MixConfig(Protocol):
    data: str
    mix: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Entry:
    """`cfg`: the run as if this were all its text. `weights`: one for each stage."""

    name: str
    weights: tuple[float, ...]
    cfg: Any


@dataclass(frozen=True)
class Mix:
    """What `load` found; `data/mix_texts.py` makes a corpus of it."""

    entries: tuple[Entry, ...]

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """(stages, sources): those of each stage add up to 1."""
        stages = zip(*(entry.weights for entry in self.entries), strict=True)
        return tuple(_shares(stage) for stage in stages)


def _shares(weights: Sequence[float]) -> tuple[float, ...]:
    _, exponent = math.frexp(max(weights))
    parts = [math.ldexp(weight, -exponent) for weight in weights]  # exactly, and their sum is a number
    return tuple(part / math.fsum(parts) for part in parts)


class _Alone:
    """A run whose text is that of one entry: what this does not state is as the run has it."""

    def __init__(self, run: Any, entry: Mapping[str, Any]):
        self._run, self._entry = run, entry

    def __getattr__(self, name: str) -> Any:
        return self._entry[name] if name in self._entry else getattr(self._run, name)


def load(cfg: MixConfig) -> Mix:
    """The entries of `mix`.

    Raises:
        DataError: there are none, one names no source or a mixture, or weights are not what they can be.
    """
    return Mix(tuple(entries_of(cfg)))


def absolute(cfg: MixConfig) -> dict[str, list[dict[str, Any]]]:
    """The entries with paths that mean the same from any folder. DataError where a source has nothing there."""
    found = []
    for entry, stated in zip(entries_of(cfg), cfg.mix or [], strict=True):
        look = SOURCES[entry.cfg.data].absolute
        try:
            changes: dict[str, Any] = load_named(look)(entry.cfg) if look else {}
        except DataError as error:
            raise DataError(f"mix, {entry.name}: {error}") from error
        for field in ("data_root", "input_file"):  # the first is in front of the second
            if stated.get(field) is not None:
                changes[field] = os.path.abspath(stated[field])
                break
        found.append({**stated, **changes})
    return {"mix": found}


def fields_of(data: str) -> tuple[str, ...]:
    """What an entry of this source may state. DataError where a mixture cannot have it."""
    if data == "mix":
        raise DataError("a mixture within a mixture is none: list its sources in this one")
    if data not in SOURCES:
        raise DataError(not_one_of(data, _single()))
    return (*OWN, *SOURCES[data].reads)


def _single() -> list[str]:
    return [name for name in SOURCES if name != "mix"]


def entries_of(cfg: MixConfig) -> list[Entry]:
    """As `load`, in a list."""
    if not cfg.mix:
        raise DataError(
            "data=mix needs mix=[{data: <source>, weight: <share>}, ...], with the fields of each source"
        )
    entries = []
    for place, stated in enumerate(cfg.mix):
        if not stated.get("data"):
            raise DataError(f"mix.{place}: names no source. Add data: <one of {', '.join(_single())}>")
        try:
            known = fields_of(stated["data"])
        except DataError as error:
            raise DataError(f"mix.{place}.data: {error}") from None
        if unknown := [field for field in stated if field not in known]:
            raise DataError(f"mix.{place}.{unknown[0]}: {not_one_of(unknown[0], known)}")
        entries.append(Entry(_name(cfg.mix, place), _weights(stated, place), _Alone(cfg, stated)))
    _require_names([entry.name for entry in entries])
    return _in_stages(entries)


def _name(mix: Sequence[Mapping[str, Any]], place: int) -> str:
    """As stated, else that of its source, with a number behind the further ones of a kind."""
    stated = mix[place]
    if (name := stated.get("name")) is not None:
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise DataError(f"mix.{place}.name: {name!r} is none: letters, digits and the like are")
        return name
    before = sum(other.get("name") is None and other.get("data") == stated["data"] for other in mix[:place])
    return f"{stated['data']}-{before + 1}" if before else str(stated["data"])


def _weights(stated: Mapping[str, Any], place: int) -> tuple[float, ...]:
    if "weight" not in stated:
        raise DataError(
            f"mix.{place}: has no weight. Add weight: <its share>, or a list of one for each stage"
        )
    given = stated["weight"]
    weights = given if isinstance(given, list | tuple) else [given]
    if not weights:
        raise DataError(f"mix.{place}.weight: must not be empty")
    for weight in weights:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise DataError(
                f"mix.{place}.weight: must be a finite number, 0 or more, or a list of them, got {given!r}"
            )
    return tuple(float(weight) for weight in weights)


def _require_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"mix: several entries are called {name!r}. Give each a name of its own")


def _in_stages(entries: Sequence[Entry]) -> list[Entry]:
    """With a weight for each stage: a single one holds in all."""
    stages = max(len(entry.weights) for entry in entries)
    found = []
    for entry in entries:
        weights = entry.weights * stages if len(entry.weights) == 1 else entry.weights
        if len(weights) != stages:
            counts = ", ".join(f"{other.name} {len(other.weights)}" for other in entries)
            raise DataError(
                f"mix: weights are a number, or lists of one for each stage, all equally long; got {counts}"
            )
        found.append(Entry(entry.name, weights, entry.cfg))
    if without := [stage for stage in range(stages) if not any(entry.weights[stage] for entry in found)]:
        where = f" in stage {without[0] + 1}" if stages > 1 else ""
        raise DataError(
            f"mix: all weights are 0{where} ({shorten([e.name for e in found])}). Give one a share"
        )
    return found
