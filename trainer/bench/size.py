"""`match`: the size of a model that meets a target, found before anything is trained.

The width is tried first, then the depth, then the finer dials that the architecture names (`size_dials` of its Config);
what is within the tolerance stays as it is. What cannot be met is met as nearly as can be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from configs.match import Dial, SizeDials, field_of
from configs.messages import ConfigError
from trainer.bench.counting import size_of, unbuilt
from trainer.bench.targets import refuse_given, remark, target_met
from trainer.bench.text import text_or_vocabulary
from trainer.view.format import quantity

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig

__all__ = ["fit_size", "kept_size"]

OTHER_WIDTHS = (-1, 1, -2, 2)  # tried where neither depth nor finer dials meet the target at the nearest one
OTHER_DEPTHS = 2  # times as deep or as shallow, before any depth is tried
REACH = 8  # neighbours of a place that the Config refuses, to either side

Fields = Mapping[str, Any]  # field of `model_cfg`, dotted where it lies within another -> value


def fit_size(
    cfg: RunConfig, model_cfg: ModelConfig, explicit: set[str], notices: list[str]
) -> tuple[RunConfig, ModelConfig]:
    """`notices` hears what was found. ConfigError where `explicit` fields, those of the command line, are among those
    that the target decides."""
    quantity_, target = next(iter(cfg.match.given.items()))
    if cfg.init_from_checkpoint:
        raise ConfigError(
            f"match.{quantity_} decides sizes, and those of init_from_checkpoint are what they are. Leave out one of "
            f"the two"
        )
    begin = _with(model_cfg, cfg.match.start or {})
    if begin is None:
        raise ConfigError(f"match.start ({cfg.match.start}) is no size of type '{cfg.type}'")
    decided = _decided(begin.size_dials())
    within = {f"model_cfg.{field}" for field in decided}
    refuse_given(sorted(key for key in explicit if _within(key, within)), f"match.{quantity_}")
    found = _Search(cfg, begin, target).best()
    fields = {k: v for k, v in found.fields.items() if v != field_of(begin, k)}
    start = {k: field_of(begin, k) for k in fields}
    fitting = _with(begin, fields)
    assert fitting is not None  # it was built
    said = f"match.{quantity_}" + (f" ({cfg.match.counted})" if quantity_ == "params" else "")
    notices.append(remark(said, cfg.type, target, found.value, start, fields))
    match = cfg.match.model_copy(update={"start": start or None})
    return cfg.model_copy(update={"match": match, "model_cfg": fitting.model_dump(mode="json")}), fitting


def kept_size(cfg: RunConfig, model_cfg: ModelConfig, asked: Fields) -> RunConfig:
    """That of a run that goes on: what its command asks for is what the search had begun with."""
    start = {}
    for name in sorted(_decided(model_cfg.size_dials())):
        first, _, inner = name.partition(".")
        given = asked.get(first, ...)
        given = given.get(inner, ...) if inner and isinstance(given, Mapping) else given
        if given not in (..., field_of(model_cfg, name)):
            start[name] = given
    return cfg.model_copy(
        update={"match": cfg.match.model_copy(update={"start": cfg.match.start or start or None})}
    )


def _within(key: str, fields: set[str]) -> bool:
    """Whether a key is one of the fields, or a mapping that holds one."""
    return any(field == key or field.startswith(f"{key}.") for field in fields)


def _decided(dials: SizeDials) -> set[str]:
    every = [dial for dial in (dials.width, dials.depth, *dials.fine) if dial is not None]
    return {name for dial in every for name in dial.fields(dial.at)}


def _with(model_cfg: ModelConfig, fields: Fields) -> ModelConfig | None:
    """The Config with these fields; None where it refuses them."""
    values = model_cfg.model_dump(mode="json")
    for name, value in fields.items():
        first, _, inner = name.partition(".")
        within = values.get(first)
        if inner and not isinstance(within, dict):
            return None
        values[first] = {**within, inner: value} if inner and within is not None else value
    with suppress(ValidationError):
        return type(model_cfg).model_validate(values)
    return None


@dataclass(frozen=True)
class _Size:
    """Fields that were tried, and what the model comes to with them."""

    fields: dict[str, Any]
    value: float
    target: float

    @property
    def error(self) -> float:
        return abs(math.log(self.value / self.target))

    @property
    def met(self) -> bool:
        return target_met(self.target, self.value)


class _Search:
    """Among the sizes of one architecture for one target. Sizes grow with every dial."""

    def __init__(self, cfg: RunConfig, begin: ModelConfig, target: float) -> None:
        self.cfg, self.begin, self.target = cfg, begin, target
        self._measure, told = _measure_of(cfg, begin)
        self._known = _KNOWN.setdefault(told, {})

    def best(self) -> _Size:
        """The first size within the tolerance, else the nearest that was seen. ConfigError where none can be built."""
        here = self._size({})
        if here is not None and here.met:
            return here
        seen = [here] if here is not None else []
        for size in self._sizes():
            seen.append(size)
            if size.met:
                break
        if not seen:
            raise ConfigError(
                f"match: no size of type '{self.cfg.type}' near {quantity(self.target)} can be built"
            )
        return min(seen, key=lambda size: size.error)

    def _sizes(self) -> Iterator[_Size]:
        """In the order in which they are to be tried: first those of about the depth that it has."""
        width = self.begin.size_dials().width
        if width is None:
            yield from self._deeper({})
            return
        number = self._nearest({}, width)
        if number is None:
            return
        for any_depth in (False, True):
            for other in (0, *OTHER_WIDTHS):
                if width.least <= number + other <= width.most:
                    fields = dict(width.fields(number + other))
                    if (size := self._size(fields)) is not None:
                        yield size
                    yield from self._deeper(fields, any_depth=any_depth)

    def _deeper(self, fields: dict[str, Any], *, any_depth: bool = True) -> Iterator[_Size]:
        """At this width: the nearest depth, and at that what finer dials make of it."""
        depth = self._dials(fields).depth
        if depth is not None and not any_depth:
            least, most = -(-depth.at // OTHER_DEPTHS), depth.at * OTHER_DEPTHS
            depth = replace(depth, least=max(depth.least, least), most=min(depth.most, most))
        for dial in (depth, *self._dials(fields).fine):
            # The places of finer ones follow from what the others are by now.
            if dial is not depth and dial is not None:
                name = [*dial.fields(dial.at)]
                dial = next((d for d in self._dials(fields).fine if [*d.fields(d.at)] == name), None)
            if dial is None or (number := self._nearest(fields, dial)) in (None, dial.at):
                continue
            fields = {**fields, **dial.fields(number)}
            if (size := self._size(fields)) is not None:
                yield size

    def _dials(self, fields: Fields) -> SizeDials:
        """Of the Config with these fields."""
        there = _with(self.begin, fields)
        return SizeDials() if there is None else there.size_dials()

    def _nearest(self, fields: Fields, dial: Dial) -> int | None:
        """The place of a dial at which the target is met most nearly. None where no place of it is legal, or nothing
        that is counted depends on it."""
        seen: dict[int, _Size] = {}

        def look(number: int, least: int, most: int) -> int | None:
            """The first legal place from here on, to both sides."""
            for away in range(REACH + 1):
                for place in dict.fromkeys((number + away, number - away)):
                    if least <= place <= most and (size := self._size({**fields, **dial.fields(place)})):
                        seen[place] = size
                        return place
            return None

        below, above = dial.least - 1, dial.most + 1
        place = look(min(max(dial.at, dial.least), dial.most), dial.least, dial.most)
        while place is not None:
            if seen[place].value < self.target:
                below = max(below, place)
                following = 2 * place if above > dial.most else (below + above) // 2
            else:
                above = min(above, place)
                following = place // 2 if below < dial.least else (below + above) // 2
            if above - below <= 1:
                break
            following = min(max(following, below + 1), above - 1)
            place = look(following, below + 1, above - 1)
        if not seen or (len(seen) > 1 and len({size.value for size in seen.values()}) == 1):
            return None
        return min(seen, key=lambda number: seen[number].error)

    def _size(self, fields: dict[str, Any]) -> _Size | None:
        """None where the Config refuses these fields, or there is no such model."""
        key = json.dumps(fields, sort_keys=True)
        if key not in self._known:
            there = _with(self.begin, fields)
            value = None
            if there is not None and not there.problems(self.cfg):
                with suppress(ValueError):
                    value = self._measure(there)
            self._known[key] = value
        found = self._known[key]
        return None if found is None else _Size(fields, found, self.target)


# What models came to: once for all points of a sweep that differ in other things alone.
_KNOWN: dict[str, dict[str, float | None]] = {}


def _measure_of(cfg: RunConfig, begin: ModelConfig) -> tuple[Callable[[ModelConfig], float], str]:
    """What is to be met, of a Config, and all that it depends on besides the fields that are tried."""
    text = text_or_vocabulary(cfg, begin, measured=cfg.match.flops_per_byte is not None)

    def measure(model_cfg: ModelConfig) -> float:
        return size_of(unbuilt(cfg, model_cfg, text.vocab_size), cfg, lambda: text)

    lora = [cfg.use_lora, cfg.lora_rank, cfg.lora_targets, cfg.base_model_lr]
    told = [
        cfg.type,
        cfg.model_adapter,
        begin.model_dump(mode="json"),
        cfg.train_seq_len,
        cfg.val_seq_len,
        *lora,
    ]
    return measure, json.dumps([*told, cfg.match.counted, list(cfg.match.given), vars(text)], sort_keys=True)
