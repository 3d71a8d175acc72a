"""One row of the table, and what it says of a config.json: its sizes, and whether it asks for more than we compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import TYPE_CHECKING, Any

from configs.messages import ConfigError
from models.huggingface.entries import IGNORED, unnested
from naming import shorten_text

if TYPE_CHECKING:
    from configs.schema import ModelConfig

__all__ = ["Field", "Row"]


@dataclass(frozen=True)
class Field:
    """A field of `model_cfg` that an entry of config.json decides.

    `default`: what the entry means where it is absent; a text names another entry, whose value it then has, as it also
    has where it is null; a function makes it of the entries, where the entry is "auto" too. `least` whole number;
    `nullable`: null is a value too, ours as theirs.
    """

    name: str
    kind: type
    default: Any
    least: int = 1
    nullable: bool = False

    def takes(self, value: Any) -> bool:
        if value is None or self.kind is bool or isinstance(value, bool):
            return self.nullable if value is None else self.kind is bool and isinstance(value, bool)
        if self.kind is int:
            return isinstance(value, int) and value >= self.least
        return isinstance(value, int | float) and value > 0

    @property
    def needed(self) -> str:
        whole = f"a whole number from {self.least} on"
        said = {int: whole, float: "a number above 0", bool: "true or false"}[self.kind]
        return f"{said}, or null," if self.nullable else said


@dataclass(frozen=True)
class Row:
    """An architecture in both worlds.

    `classes`: its class with a language-model head in transformers, then the one without. `fields`: entry -> field;
    where two entries are one field, they must agree. `required`: entry -> the values that are computed here, the one
    that counts where the entry is absent first; or a function of the fields read. `derived`: entry of these ->
    attribute of our Config that is written there. `ours`: field -> the value that it
    has in every such file; a model with another has no such form. `in_force`: field that may be null -> attribute of
    our Config with what it then is. `dropouts`: entries that say what `dropout` does, which stays the run's.
    `spellings`: other names of entries. `ignored`: entries that change nothing, besides those of all rows. `rotated`:
    the part of each head that is rotated where the file does not say. `experts`: what the parts of an expert layer are
    called in files, by our names.
    """

    type: str
    name: str
    classes: tuple[str, str]
    fields: Mapping[str, Field]
    required: Mapping[str, tuple[Any, ...] | Callable[[Mapping[str, Any]], tuple[Any, ...]]]
    ours: Mapping[str, Any]
    in_force: Mapping[str, str] = attribute(default_factory=dict)
    derived: Mapping[str, str] = attribute(default_factory=dict)
    dropouts: tuple[str, ...] = ()
    spellings: Mapping[str, str] = attribute(default_factory=dict)
    ignored: set[str] = attribute(default_factory=set)
    rotated: float = 1.0
    experts: Mapping[str, str] = attribute(default_factory=dict)

    def read(self, config: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Fields of `model_cfg` that a config.json decides. `source` is its name in messages.

        Raises:
            ConfigError: entries with values that cannot be, and all those that ask for what is not computed here.
        """
        entries, problems = self._spelled(unnested(config, self.rotated))
        fields: dict[str, Any] = {}
        for entry, field in self.fields.items():
            value = self._value(entry, entries)
            if not field.takes(value):
                problems.append(f"{entry} is {_said(value)}: {field.needed} is needed")
            elif fields.setdefault(field.name, value) != value:
                problems.append(self._divided(field.name, entries))
        if not problems:
            problems = self._refused(entries, fields)
        problems += self._unknown(entries)
        if problems:
            raise ConfigError([f"{source}: {problem}" for problem in problems])
        return {**fields, **self.ours}

    def write(self, model_cfg: ModelConfig) -> dict[str, Any]:
        """The entries of a config.json for such a model. ValueError names the fields that have no form there."""
        self.require_form(model_cfg)
        fixed = {name: values[0] for name, values in self.required.items() if isinstance(values, tuple)}
        return {
            "architectures": [self.classes[0]],
            **{entry: self._own(model_cfg, field.name) for entry, field in self.fields.items()},
            **fixed,
            **{entry: getattr(model_cfg, name) for entry, name in self.derived.items()},
            **dict.fromkeys(self.dropouts, getattr(model_cfg, "dropout", 0.0)),
        }

    def require_form(self, model_cfg: ModelConfig) -> None:
        """ValueError unless the architecture in transformers can be what this Config says."""
        if other := self.beyond(model_cfg):
            told = ", ".join(f"{k}: {_said(v)}" for k, v in other.items())
            raise ValueError(f"{self.name} has no counterpart of {told}")

    def beyond(self, model_cfg: ModelConfig) -> dict[str, Any]:
        """Fields of a Config, with their values, that have no form there."""
        found = {name: self._own(model_cfg, name) for name in self.ours}
        found = {name: value for name, value in found.items() if value != self.ours[name]}
        for field in self.fields.values():
            value = self._own(model_cfg, field.name)
            if value is not None and not field.takes(value):
                found[field.name] = value
        return found

    def _own(self, model_cfg: ModelConfig, name: str) -> Any:
        return getattr(model_cfg, self.in_force.get(name, name))

    def _value(self, entry: str, entries: Mapping[str, Any]) -> Any:
        default = self.fields[entry].default
        if callable(default):
            value = entries.get(entry, "auto")
            return default(entries) if value == "auto" else value
        if isinstance(default, str):  # null, as that entry
            value = entries.get(entry)
            return self._value(default, entries) if value is None else value
        return entries.get(entry, default)

    def _divided(self, field: str, entries: Mapping[str, Any]) -> str:
        """Of entries that are one field here, and differ."""
        told = [f"{e} is {_said(self._value(e, entries))}" for e, f in self.fields.items() if f.name == field]
        return f"{', '.join(told)}: here model_cfg.{field} is the one as the other"

    def _spelled(self, entries: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The entries under the names that the row knows, and what is said in two ways."""
        found = {name: value for name, value in entries.items() if name not in self.spellings}
        problems = []
        for name, known in self.spellings.items():
            if name in entries and found.setdefault(known, entries[name]) != entries[name]:
                told = f"{name} is {_said(entries[name])}, {known} {_said(found[known])}"
                problems.append(f"{told}: they are one entry, and differ")
        return found, problems

    def _refused(self, entries: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
        """Entries with a value that is not computed here."""
        problems = []
        for entry, values in self.required.items():
            allowed = values if isinstance(values, tuple) else values(fields)
            if entry in entries and entries[entry] not in allowed:
                legal = " or ".join(_said(v) for v in allowed)
                problems.append(
                    f"{entry} is {_said(entries[entry])}: {self.name} is computed with {legal} here"
                )
        named = entries.get("architectures") or []
        if not isinstance(named, list) or any(name not in self.classes for name in named):
            problems.append(f"architectures is {_said(named)}: weights of a {self.classes[0]} are read")
        return problems

    def _unknown(self, entries: Mapping[str, Any]) -> list[str]:
        known = {*self.fields, *self.required, *self.dropouts, *self.ignored, *IGNORED}
        return [
            f"{entry} is {_said(value)}: this is not computed here, and without it the weights mean another model"
            for entry, value in entries.items()
            if entry not in known and value is not False and value not in (None, [], {})
        ]


def _said(value: Any) -> str:
    """A value as config.json has it, its beginning where it is long."""
    return shorten_text(json.dumps(value), 200)
