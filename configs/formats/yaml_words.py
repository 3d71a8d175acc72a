"""YAML, whose bare words mean what they mean in every other format and on the command line.

YAML 1.1, which PyYAML reads, takes `010` for 8, `12:30` for 750, `0b11` for 3 and `on` for true; YAML 1.2, JSON and
Hydra's grammar do not. Here they are text, which a field that wants a number or a truth value refuses.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

_TEXT = "tag:yaml.org,2002:str"
_NULL = "tag:yaml.org,2002:null"
_OTHERWISE = re.compile(r"(?i:yes|no|on|off)|[+-]?0[0-9_].*|[+-]?0[xXbB].*|[^.].*:.*", re.DOTALL)
_Base: Any = get_yaml_loader()  # that of OmegaConf, which refuses keys given twice


class _Loader(_Base):  # type: ignore[misc]
    otherwise = False  # whether OmegaConf's own loader would read another value

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        plain = kind is yaml.ScalarNode and implicit[0] and tag not in (_TEXT, _NULL)
        if plain and _OTHERWISE.fullmatch(value):
            self.otherwise = True
            return _TEXT
        return tag


def load(text: str) -> tuple[Any, yaml.Node | None, bool]:
    """Values, the tree that knows their lines, and whether OmegaConf's own loader would read others. Values of `env`
    are text as it is written. Raises yaml.YAMLError."""
    loader = _Loader(text.removeprefix("\ufeff"))
    try:
        tree = loader.get_single_node()
        otherwise = _env_as_written(tree) or loader.otherwise
        values = None if tree is None else loader.construct_document(tree)
    finally:
        loader.dispose()
    return values, tree, otherwise


def _env_as_written(tree: yaml.Node | None) -> bool:
    """Make numbers and truth values in `env` text, in place; whether there were any."""
    scalars = [value for key, env in _entries(tree) if key.value == "env" for _, value in _entries(env)]
    others = [
        node for node in scalars if isinstance(node, yaml.ScalarNode) and node.tag not in (_TEXT, _NULL)
    ]
    for node in others:
        node.tag = _TEXT
    return bool(others)


def _entries(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a mapping; nothing of anything else."""
    return node.value if isinstance(node, yaml.MappingNode) else []
