"""Model files handed to Hydra, each as one option of the group `configs`.

A file that lies directly in `configs/` and needs nothing special is left to Hydra's own loader. Every
other file (elsewhere on disk, with other spellings, with a `preset:` of its own) is stored in Hydra's
ConfigStore, so that composition, sweeps and `--info` treat it like a shipped one.

What a preset means for one architecture besides (`preset/for/<type>-<preset>.yaml`) depends on the type, which
Hydra does not know while it collects files; the option it does know. So every option has amendments of its own in
a group that exists in the ConfigStore alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from configs.files import (
    BASE,
    CONFIGS,
    SELF,
    Node,
    check_option,
    options,
    read,
    read_option,
    shown,
)
from configs.messages import ConfigError
from configs.schema import STEPS

AMENDMENTS = "amendment"  # group in `configs`; its options are called <option>-<preset>


@dataclasses.dataclass
class Model:
    """A model file as an option."""

    path: Path
    amendments: dict[str, Node]  # by preset
    option: str = ""
    layers: list[Node] = dataclasses.field(
        default_factory=list
    )  # what it is made of, in the order of application


def amendments(node: Node, type_: str) -> dict[str, Node]:
    """What each preset means for this type besides. `preset/for/` is looked for beside the model file, then beside its
    parents, the shipped one last. `pkg.mod:Class` goes by the name of the class."""
    name = type_.rpartition(":")[2]
    folders = dict.fromkeys(n.path.parent / "preset" / "for" for n in reversed([*node.chain()]))
    found = {}
    for preset in options("preset"):
        paths = [folder / f"{name}-{preset}.yaml" for folder in folders]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            continue
        found[preset] = read(path)
        if found[preset].parents != [SELF]:
            raise ConfigError(f"{shown(path)}: what amends a preset is one file. Leave out its defaults")
    return found


class Registry:
    """The options of one command line. `use_presets`: whether a `preset:` inside a file applies, that is, whether none
    is chosen for all; `sizes`: presets that are files of one's own, by their option."""

    def __init__(self, *, use_presets: bool, sizes: Mapping[str, Path]) -> None:
        self.use_presets = use_presets
        self.sizes = {str(path): option for option, path in sizes.items()}
        self.names: dict[str, Path] = {name: CONFIGS / f"{name}.yaml" for name in options()}
        self.names[BASE.stem] = BASE
        ConfigStore.instance().repo.get("configs", {}).pop(
            AMENDMENTS, None
        )  # of a command line before this one

    def add(self, node: Node, type_: str, extra: dict[str, Any] | None = None) -> Model:
        """Make a file an option. `extra`: values to add where the file states none."""
        model = Model(node.path, amendments(node, type_))
        self._option(node, model, extra)
        for preset, amendment in model.amendments.items():
            self._store(f"configs/{AMENDMENTS}", f"{model.option}-{preset}", amendment.values, amendment.path)
        return model

    def _option(self, node: Node, model: Model, extra: dict[str, Any] | None = None) -> str:
        """The option name of the model or of one of its parents."""
        untouched = not extra and self._untouched(node)
        name = (
            node.path.relative_to(CONFIGS).with_suffix("").as_posix()
            if untouched
            else self._unique(node.path)
        )
        model.option = model.option or name  # the model itself comes first
        if untouched:
            model.layers += node.chain()
            return name
        defaults: list[str] = []
        for parent in node.parents:
            if isinstance(parent, Node) and parent.size:
                defaults += self._preset(parent, model)
            elif isinstance(parent, Node):
                defaults.append(self._option(parent, model))
            else:
                preset = node.values.get("preset")
                if self.use_presets and preset not in (None, "auto"):
                    if preset not in self.sizes:
                        check_option("preset", preset, node.place("preset"))
                    defaults += self._preset(read_option("preset", preset), model)
                defaults.append(SELF)
                model.layers.append(node)
        values = {**(extra or {}), **node.values}
        if any(d.startswith("preset/") for d in defaults) and not values.keys().isdisjoint(STEPS):
            values.setdefault("time_budget", None)  # a preset's budget is for its own number of steps
        self._store("configs", name, {"defaults": defaults, **values}, node.path)
        return name

    def _preset(self, node: Node, model: Model) -> list[str]:
        """Entries of `defaults` for a preset that a file names, and for what amends it."""
        preset = self.sizes.get(node.size, node.size)
        model.layers.append(node)
        if preset not in model.amendments:
            return [f"preset/{preset}"]
        model.layers.append(model.amendments[preset])
        return [f"preset/{preset}", f"{AMENDMENTS}/{model.option}-{preset}"]

    def _untouched(self, node: Node) -> bool:
        # Only our own loader applies a preset that a file names.
        named = (n.size or n.values.get("preset") not in (None, "auto") for n in node.chain())
        return node.native() and not any(named)

    def _unique(self, path: Path) -> str:
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", path.stem) or "model"
        name, n = stem, 1
        while name in self.names:
            n += 1
            name = f"{stem}-{n}"
        self.names[name] = path
        return name

    @staticmethod
    def _store(group: str, name: str, content: dict[str, Any], path: Path) -> None:
        package = "_global_" if group.endswith(AMENDMENTS) else None
        ConfigStore.instance().store(
            group=group, name=name, node=content, package=package, provider=str(path)
        )
