"""Model files of any format, written as YAML or as directives.

What is written builds on the same file of ours as what was read; files of other formats in between are taken in. So
both compose to the same, whatever our files come to say. What the other format cannot say is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import models
from configs.files import ANY_TYPE, BASE, CONFIGS, EXTENSIONS, SELF, Node, read, shown
from configs.formats.directives import DIRECTIVES, typed
from configs.formats.gpt_keys import TABLE, WHOLE_STEPS, WORDS
from configs.messages import ConfigError, is_secret

_LONGEST = 100  # letters of a line, unless one value has more
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.]*")
_ENV_KEY = re.compile(r"[A-Z_][A-Z0-9_]*")
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./:-]*")


def to_yaml(node: Node, out: Path) -> str:
    """The text of a YAML file that composes to the same as a model file. `out`: the path that it is for. Raises
    ConfigError."""
    parent, values = _taken_in(node)
    problems = _secrets(values)
    if problems:
        raise ConfigError([f"{shown(node.path)}: {p}" for p in problems])
    named = _name(parent, out) or str(parent.path)
    if parent.path.parent == CONFIGS:
        named = named.removesuffix(".yaml")
    return OmegaConf.to_yaml(OmegaConf.create({"defaults": [named, SELF], **values}))


def to_directives(node: Node, out: Path) -> str:
    """The same of a file of directives."""
    parent, values = _taken_in(node)
    problems = _secrets(values)
    type_ = values.pop("type", None) or parent.stated("type")
    if type_ is None:
        type_ = node.path.stem if node.path.stem in models.ARCHITECTURES else ANY_TYPE
    home = CONFIGS / f"{type_}.yaml" if type_ in models.ARCHITECTURES else BASE
    lines = []
    if parent.path != home:
        if named := _name(parent, out):
            lines.append(f"FROM {_text(named)}")
        else:
            problems.append(
                f"it builds on {parent.path}, and FROM names files in {out.parent} and configs/ alone"
            )
    own = frozenset(read(home).values["model_cfg"]) if home != BASE else None
    said: dict[str, list[tuple[str, str]]] = {name: [] for name in DIRECTIVES}
    if values.items() >= WHOLE_STEPS.items() and type(values.get("global_batch_size")) is int:
        said["DATA"].append(("batch_size", str(values["global_batch_size"])))
        values = {k: v for k, v in values.items() if k not in ("global_batch_size", *WHOLE_STEPS)}
    for field, value in _flat(values):
        try:
            section, key = _place(field, own)
            said[section].append((key, _text(value, quoted=section == "ENV")))
        except ValueError as error:
            problems.append(f"{field}: {error}")
    if problems:
        raise ConfigError([f"{shown(node.path)}: {p}" for p in problems])
    said["MODEL"] = [("type", _text(type_)), *sorted(said["MODEL"])]
    for section, pairs in said.items():
        lines += _wrapped(section, pairs if section == "MODEL" else sorted(pairs))
    return "\n".join(lines) + "\n"


def _taken_in(node: Node) -> tuple[Node, dict[str, Any]]:
    """The file of ours that a model file builds on, and all that is stated over it."""
    parents = [p for p in node.parents if isinstance(p, Node)]
    if node.path.suffix in EXTENSIONS:
        (parent, *others) = parents
        if others or read(parent.path).values != parent.values:
            raise ConfigError(
                f"{shown(node.path)}:{node.lines.get('defaults', 1)}: defaults: what is converted builds on one file, "
                "all of it. Name one there, or take a file that does"
            )
        return parent, _copy(node.values)
    (base,) = parents
    if base.path.suffix in EXTENSIONS:
        return base, _copy(node.values)
    parent, values = _taken_in(base)
    _merge(values, node.values)
    return parent, values


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = {}
    _merge(copied, values)
    return copied


def _merge(values: dict[str, Any], over: dict[str, Any]) -> None:
    """Lay values over others in place, as composition does."""
    for name, value in over.items():
        if isinstance(value, dict):
            inner = values.get(name)
            values[name] = inner if isinstance(inner, dict) else {}
            _merge(values[name], value)
        else:
            values[name] = value


def _name(parent: Node, out: Path) -> str:
    """How the file `out` names a parent, "" where that one is in neither folder that is looked into."""
    place = out.parent.resolve()
    if parent.path.is_relative_to(place):
        return str(parent.path.relative_to(place))
    if not parent.path.is_relative_to(CONFIGS):
        return ""
    name = parent.path.relative_to(CONFIGS)
    hidden = (place / name).exists() or str(name) == out.name  # by one of the same name beside `out`
    return str(parent.path if hidden else name)


def _secrets(values: dict[str, Any]) -> list[str]:
    env = values.get("env")
    names = [name for name in env if is_secret(str(name))] if isinstance(env, dict) else []
    return [f"env.{name} is a secret, which is written to no file. Set it in the shell" for name in names]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted field -> value. A mapping without entries changes nothing."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _exact() -> Iterator[tuple[str, tuple[str, str]]]:
    """Our field -> the directive and key that mean it alone, as it is."""
    for section, keys in TABLE.items():
        for key, turn in keys.items():
            try:
                fields = turn(1)
            except ValueError:  # of a word
                continue
            if [*fields.values()] == [1]:
                yield next(iter(fields)), (section, key)


_KEYS = dict(_exact())


def _place(field: str, own: frozenset[str] | None) -> tuple[str, str]:
    """Directive and key of a field. ValueError where there are none."""
    root, _, rest = field.partition(".")
    if root == "env":
        if not _ENV_KEY.fullmatch(rest):
            raise ValueError("names of ENV are of A-Z, 0-9 and _")
        return "ENV", rest
    if field in _KEYS:
        return _KEYS[field]
    if not _KEY.fullmatch(field) or field.count(".") > 5:
        raise ValueError("is no key of a directive: letters, digits, '_' and '.' are")
    if root == "model_cfg":
        known = own is not None and rest.partition(".")[0] in own and rest not in WORDS
        return ("MODEL", rest) if known else ("ADVANCED", field)
    if field in WORDS or root in (own or ()):
        raise ValueError(f"{field} means something else in a file of directives")
    return "ADVANCED", field


def _text(value: Any, *, quoted: bool = False) -> str:
    """A value as it is written. ValueError where it cannot be."""
    if isinstance(value, list):
        if not value:
            raise ValueError("an empty list cannot be written as a directive's value")
        return f"[{', '.join(_text(item, quoted=True) for item in value)}]"
    if isinstance(value, str):
        return _word(value, quoted)
    if quoted and isinstance(value, bool | None):
        raise ValueError(f"expected text, got {value!r}")
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    raise ValueError(f"{value!r} cannot be written as a directive's value")


def _word(value: str, quoted: bool) -> str:
    if "${" in value or value == "???":
        raise ValueError(f"{value!r} has a meaning in YAML files alone")
    if unfit := next((c for c in value if c in "\r\0"), None):
        raise ValueError(f"{unfit!r} cannot be written as a directive's value")
    if not quoted and _BARE.fullmatch(value) and _is_text(value):
        return value
    escaped = value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'"{escaped}"'


def _is_text(word: str) -> bool:
    try:
        return typed(word) == word
    except ValueError:
        return False


def _wrapped(section: str, pairs: list[tuple[str, str]]) -> Iterator[str]:
    """The lines of a directive."""
    line = ""
    for key, text in pairs:
        if line and len(line) + len(key) + len(text) + 2 > _LONGEST:
            yield line
            line = ""
        line = f"{line or section} {key}={text}"
    if line:
        yield line
