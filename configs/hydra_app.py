"""Hydra's part: the root config, composition, and what it finds wrong in our words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from secrets import token_hex
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from configs.files import ROOT, choices, options, read_option
from configs.messages import ConfigError
from configs.registry import AMENDMENTS
from configs.schema import GENERIC_FIELDS
from configs.secret import field_of, kept_secret
from naming import did_you_mean

APP = "mytrainer"
MODEL_GROUP = "configs@_global_"
Where = Callable[[str], str]  # key -> place of its value, "" if unknown
_LIST_FOR_MAPPING = re.compile(
    r"Error merging override \+*(?P<key>[\w.]+)=(?P<value>.*): Cannot merge DictConfig with ListConfig"
)


def register(presets: Mapping[str, str], callbacks: Mapping[str, Any] | None = None) -> None:
    """Store the root config: three group choices and Hydra's own settings. `presets`: names or paths of those that are
    JSON files, by their option; `callbacks`: Hydra's, by name. ConfigError for what is wrong with such a file."""
    settings: dict[str, Any] = {
        "callbacks": dict(callbacks or {}),
        "job": {"name": APP, "chdir": False},
        # By the clock to be found, and by a number of its own: two sweeps may start in one second.
        "sweep": {
            "dir": f"multirun/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}-{token_hex(2)}",
            "subdir": "${hydra.job.num}",
        },
    }
    if callbacks:  # of a sweep: its jobs may not be numbered from 0 on
        settings["sweep"]["subdir"] = (
            "${job_number:${hydra.job.num},${hydra.callbacks.sweep.numbers},${hydra.callbacks.sweep.first}}"
        )
    OmegaConf.register_new_resolver("job_number", job_number, replace=True)
    node = {
        "defaults": [
            {MODEL_GROUP: None},
            {"configs/data": None},
            {"configs/preset": None},
            # What a size means for one architecture besides (configs/registry.py); wins over the preset's own.
            {f"optional configs/{AMENDMENTS}": f"${{{MODEL_GROUP}}}-${{configs/preset}}"},
            "_self_",
            {"override hydra/job_logging": "none"},
        ],
        "hydra": settings,
    }
    store = ConfigStore.instance()
    store.store(name=APP, node=node)
    for option, name in presets.items():
        values = read_option("preset", name).values
        store.store(group="configs/preset", name=option, node=values, package="_global_")
    for name in set(choices("data")) - set(options("data")):  # rows of the table need no file
        store.store(group="configs/data", name=name, node={"data": name}, package="_global_")


def job_number(number: int, numbers: Sequence[int], first: int) -> int:
    """The number of Hydra's job `number` in the sweep's folder: `numbers` says it, of those beyond `first` and on."""
    return numbers[number] if number < len(numbers) else first + number - len(numbers)


@contextmanager
def _hydra(where: Where) -> Iterator[None]:
    GlobalHydra.instance().clear()
    try:
        with (
            kept_secret(),
            hydra.initialize_config_dir(config_dir=str(ROOT), version_base="1.3", job_name=APP),
        ):
            yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_in_our_words(error, where)) from error


def _in_our_words(error: Exception, where: Where) -> str:
    """What Hydra or OmegaConf could not do, at the place of the field where it knows one."""
    first, _, more = str(error).strip().partition("\n")
    reason = " ".join([first, *more.splitlines()[:1]]) if first.endswith(":") else first
    key = str(getattr(error, "full_key", None) or "")
    if not key:
        why = str(error.__cause__ or "").strip().split("\n")[0]
        told = reason.removesuffix(".") + (f": {why}" if why else "")
        return "command line: " + _LIST_FOR_MAPPING.sub(
            r"\g<key>: expected mapping, got \g<value> (list)", told
        )
    if unset := re.search(r"Environment variable '(.*?)' not found", reason):
        name = unset[1]
        reason = f"the environment variable {name} is not set. Set it, or write ${{oc.env:{name},<default>}}"
    elif isinstance(error, InterpolationKeyError) and (
        missing := re.search(r"key '(.*?)' not found", reason)
    ):
        name = missing[1]
        hint = did_you_mean(name, GENERIC_FIELDS)
        reason = f"${{{name}}} names no field" + (f".{hint}" if hint else "")
    reason = reason.removeprefix("ValueError raised while resolving interpolation: ")  # of configs/secret.py
    return f"{where(key) or 'config'}: {key}: {reason}"


def compose_hydra(overrides: list[str], where: Where = lambda key: "") -> DictConfig:
    """Hydra's composition, its own settings included."""
    with _hydra(where):
        return hydra.compose(APP, overrides, return_hydra_config=True)


def compose_tree(overrides: list[str], where: Where = lambda key: "") -> dict[str, Any]:
    """Hydra's composition, resolved, as plain values. `where`: places of keys, for messages."""
    with _hydra(where):
        # Hydra's own part stays beside it while values that point there (${hydra.job.name}) are resolved.
        cfg = hydra.compose(APP, overrides, return_hydra_config=True)
        return {str(key): field_of(str(key), partial(resolved, cfg, key)) for key in cfg if key != "hydra"}


def compose_unresolved(overrides: list[str], where: Where = lambda key: "") -> dict[str, Any]:
    """The same with ${...} as it was written."""
    with _hydra(where):
        tree = OmegaConf.to_container(hydra.compose(APP, overrides))
    assert isinstance(tree, dict)
    return {str(k): v for k, v in tree.items()}


class Composer:
    """Compositions of many points, which give what `compose_tree` does: files are read and merged once for each choice
    of files, and what the command line sets is put on top. Where values refer to others, or are deleted, Hydra
    composes every point by itself."""

    def __init__(self) -> None:
        self._bases: dict[tuple[str, ...], dict[str, Any] | None] = {}
        self._parsed: dict[str, Override] = {}

    def tree(self, overrides: Sequence[str], where: Where = lambda key: "") -> dict[str, Any]:
        """Raises ConfigError as `compose_tree` does."""
        parsed = [self._read(text) for text in overrides]
        chosen = tuple(t for t, o in zip(overrides, parsed, strict=True) if _chooses(o))
        if chosen not in self._bases:
            base = compose_unresolved(list(chosen), where)
            self._bases[chosen] = None if "${" in repr(base) else base
        known = self._bases[chosen]
        values = [o for o in parsed if not _chooses(o) and not _is_hydras(o)]
        if known is None or any(o.is_delete() or "${" in repr(o.value()) for o in values):
            return compose_tree(list(overrides), where)
        tree = copy.deepcopy(known)
        for override in values:
            if not _put(tree, override):
                return compose_tree(list(overrides), where)
        return tree

    def _read(self, text: str) -> Override:
        if text not in self._parsed:
            self._parsed[text] = OverridesParser.create().parse_override(text)
        return self._parsed[text]


def _chooses(override: Override) -> bool:
    """Whether an override is a choice of files."""
    return override.key_or_group.startswith("configs/") or override.key_or_group == "configs"


def _is_hydras(override: Override) -> bool:
    return override.key_or_group.partition(".")[0].partition("/")[0] == "hydra"


def _put(tree: dict[str, Any], override: Override) -> bool:
    """Set what an override says as Hydra does. False where that is more than setting it."""
    *path, last = override.key_or_group.split(".")
    for name in path:
        if name not in tree and not override.is_force_add():
            return False
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            return False
    value = override.value()
    if not override.is_force_add() and (override.is_add() or last not in tree):
        return False
    if isinstance(value, dict) or isinstance(tree.get(last), dict):
        return False  # mappings are merged, and other things in their place refused
    tree[last] = copy.deepcopy(value)
    return True


def resolved(cfg: DictConfig, key: Any) -> Any:
    """The value of a key as plain values, "???" where it has none."""
    if OmegaConf.is_missing(cfg, key):
        return "???"
    value = cfg[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def sweep_folder(overrides: list[str], where: Where) -> str:
    """`hydra.sweep.dir` of a sweep; what names its jobs' folders is found wrong here too, before the first job."""
    with _hydra(where):
        cfg = hydra.compose(APP, overrides, return_hydra_config=True)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.num, cfg.hydra.job.id = 0, "0"
        assert cfg.hydra.sweep.subdir is not None
        return str(cfg.hydra.sweep.dir)
