"""YAML that people wrote: its values, and the tree that knows their lines.

A few lines of aliases can stand for more values than memory holds, and OmegaConf follows each: what a file comes to is
counted first.

Bare words mean what they mean in every other format and on the command line. YAML 1.1, which PyYAML reads, takes `010`
for 8, `12:30` for 750, `0b11` for 3 and `on` for true; YAML 1.2, JSON and Hydra's grammar do not. Here they are text,
which a field that wants a number or a truth value refuses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

__all__ = ["Unreadable", "literal", "parse"]

_MOST_VALUES = 100_000  # of a file, those behind aliases counted wherever they stand
_MOST_NESTED = 50
_TEXT = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_OTHERWISE = re.compile(r"(?i:yes|no|on|off)|[+-]?0[0-9_].*|[+-]?0[xXbB].*|[^.].*:.*", re.DOTALL)
_Base: Any = get_yaml_loader()  # that of OmegaConf, which refuses keys given twice
_MARK = re.compile(r"(\\*)\$\{")
# What reading a value raises, besides YAML's own errors: of tags (`!!int x`), of marks (`${`), of endless numbers.
_ERRORS = (OmegaConfBaseException, ValueError, TypeError, LookupError, ArithmeticError)


class Unreadable(ValueError):
    """A value that is none. `line`: where it stands, None if that is not known."""

    def __init__(self, text: str, line: int | None = None) -> None:
        super().__init__(text)
        self.line = line


class _Loader(_Base):  # type: ignore[misc]
    otherwise = False  # whether OmegaConf's own loader would read another value

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        plain = kind is yaml.ScalarNode and implicit[0] and tag not in (_TEXT, _NULL)
        if plain and _OTHERWISE.fullmatch(value):
            self.otherwise = True
            return _TEXT
        return tag


@functools.lru_cache(maxsize=256)
def parse(text: str) -> tuple[Any, yaml.Node | None, bool]:
    """Values, tree, and whether OmegaConf's own loader would read others; nothing of it is to be changed. Values of
    `env` are text as it is written. Raises yaml.YAMLError or Unreadable. Kept by their text, as every point of a sweep
    reads the same files and YAML in pure Python takes tens of milliseconds each time."""
    loader = _Loader(text.removeprefix("\ufeff"))
    try:
        tree = loader.get_single_node()
        if tree is None or isinstance(tree, yaml.ScalarNode):
            return {}, tree, False
        _measure(tree, {}, frozenset())
        otherwise = _env_as_written(tree) or loader.otherwise
        return OmegaConf.to_container(OmegaConf.create(loader.construct_document(tree))), tree, otherwise
    except RecursionError:
        raise Unreadable(f"lists and mappings are nested {_MOST_NESTED} deep at most") from None
    except _ERRORS as error:
        if isinstance(error, Unreadable):
            raise
        blamed = next(_unreadable(tree), None)
        raise (blamed or Unreadable(_first_line(error))) from None
    finally:
        loader.dispose()


def _env_as_written(tree: yaml.Node) -> bool:
    """Make numbers and truth values in `env` text, in place; whether there were any."""
    scalars = [value for key, env in _entries(tree) if key.value == "env" for _, value in _entries(env)]
    others = [
        node for node in scalars if isinstance(node, yaml.ScalarNode) and node.tag not in (_TEXT, _NULL)
    ]
    for node in others:
        node.tag = _TEXT
    return bool(others)


def _entries(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a mapping; nothing of anything else."""
    return node.value if isinstance(node, yaml.MappingNode) else []


def literal(value: Any) -> Any:
    """A value, mappings and lists included, in whose texts `${` is written so that reading gives these very letters."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return _MARK.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]], above: frozenset[int]) -> tuple[int, int]:
    """(values that a node comes to, how deep it is nested). Raises Unreadable where either is too much."""
    if id(node) in known:
        return known[id(node)]
    line = node.start_mark.line + 1
    if id(node) in above:
        raise Unreadable("an alias leads back to where it stands", line)
    if len(above) >= _MOST_NESTED:
        raise Unreadable(f"lists and mappings are nested {_MOST_NESTED} deep at most", line)
    count, depth = 1, 0
    for inner in _inner(node):
        more, below = _measure(inner, known, above | {id(node)})
        count, depth = count + more, max(depth, below + 1)
        if count > _MOST_VALUES:
            raise Unreadable(f"its aliases come to more than {_MOST_VALUES:,} values", line)
        if len(above) + depth > _MOST_NESTED:
            raise Unreadable(f"lists and mappings are nested {_MOST_NESTED} deep at most", line)
    known[id(node)] = count, depth
    return known[id(node)]


def _inner(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _unreadable(node: yaml.Node) -> Iterator[Unreadable]:
    """What is wrong with each scalar that cannot be read."""
    for inner in _inner(node):
        yield from _unreadable(inner)
    if not isinstance(node, yaml.ScalarNode):
        return
    try:
        OmegaConf.create([_Loader("").construct_object(node)])
    except yaml.YAMLError:
        raise  # which knows its place
    except _ERRORS as error:
        given = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
        why = "" if isinstance(error, LookupError) else f": {_first_line(error)}"
        kind = node.tag.rpartition(":")[2]
        text = f"{given!r} cannot be read" + (f" as {kind}" if kind != "str" else "") + why
        if "${" in node.value:
            text += ". For these very letters write \\${"
        yield Unreadable(text, node.start_mark.line + 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
