"""What a command line asks for, in canonical spelling."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from configs.hydra_words import COMPLETION
from configs.messages import ConfigError, own_words


@dataclasses.dataclass
class Request:
    """What a command line asks for."""

    models: list[str] = dataclasses.field(default_factory=list)  # values of --hydra_model_cfg, as given
    config_path: str | None = None  # Hydra's --config-path: the folder of --config-name
    config_dir: str | None = None  # Hydra's --config-dir: one more folder in which files are looked for
    flags: list[str] = dataclasses.field(default_factory=list)  # for Hydra
    overrides: list[str] = dataclasses.field(default_factory=list)  # Hydra's language
    values: dict[str, Any] = dataclasses.field(default_factory=dict)  # key -> value of every plain override
    spelled: dict[str, str] = dataclasses.field(default_factory=dict)  # every key given -> as it was written
    settings: dict[str, str] = dataclasses.field(default_factory=dict)  # Hydra's own: hydra.*
    sweeps: set[str] = dataclasses.field(default_factory=set)  # keys with more than one value
    implied: Path | None = None  # the file of a run that stands for the model
    sizes: dict[str, Path] = dataclasses.field(
        default_factory=dict
    )  # presets of one's own: option -> JSON file
    config_file: str = ""  # of --config_file
    gpt_sizes: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # --n_layer and the like: key -> value
    sweep_limit: int | None = None  # points that a grid may have, where the command line says so
    trust: frozenset[str] = frozenset()  # modules that files of runs may name
    words: list[list[str]] = dataclasses.field(
        default_factory=list
    )  # as they were given, a flag with its value; without those that name models
    problems: list[str] = dataclasses.field(default_factory=list)
    notices: list[str] = dataclasses.field(default_factory=list)
    _written: dict[str, str] = dataclasses.field(default_factory=dict)  # key -> its override

    @property
    def keys(self) -> set[str]:
        """Every key set on the command line, in canonical spelling."""
        return set(self.spelled)

    @property
    def multirun(self) -> bool:
        return "--multirun" in self.flags

    @property
    def mode(self) -> str:
        """`run`, or what is only shown: `help`, `cfg`, `info`, or `hydra` (Hydra's own business)."""
        for flag, mode in (("--help", "help"), ("--cfg", "cfg"), ("--info", "info")):
            if any(f.split("=")[0] == flag for f in self.flags):
                return mode
        own = ("--hydra-help", "--version", "--shell-completion")
        return "hydra" if any(f in own for f in self.flags) else "run"

    @property
    def completes(self) -> bool:
        """Whether a shell asks, not a person."""
        return COMPLETION[1] in self.flags

    @property
    def shows_job(self) -> bool:
        """`--cfg job`: the configuration that a run would have."""
        return "--cfg=job" in self.flags

    @property
    def needs_no_model(self) -> bool:
        return self.mode in ("help", "hydra", "info")

    def claim(self, key: str, spelled: str) -> None:
        """A key is given. Given again in the same spelling, the last counts; in another one it is a mistake."""
        before = self.spelled.get(key)
        if before is not None and before != spelled:
            raise ConfigError(
                f"command line: {before} and {spelled} name the same field. Keep {key}{own_words([before, spelled])}"
            )
        if before is not None:
            self.notices.append(f"{spelled} is given more than once; the last value counts")
            if key in self._written:
                self.overrides.remove(self._written.pop(key))
            self.sweeps.discard(key)
            self.values.pop(key, None)
        self.spelled[key] = spelled

    def withdraw(self, key: str) -> str:
        """Take a key back, as if it had not been given; its value in Hydra's grammar, "" if it was not."""
        value = self.written(key) if key in self._written else ""
        if value:
            self.overrides.remove(self._written.pop(key))
        self.spelled.pop(key, None)
        self.values.pop(key, None)
        self.sweeps.discard(key)
        return value

    def respell(self, key: str, meant: str) -> None:
        """A key that was given is another one, which its architecture calls so."""
        spelled, override = self.spelled.pop(key), self._written.pop(key)
        self.overrides.remove(override)
        self.claim(meant, spelled)
        self.write(meant, override.replace(key, meant, 1))
        if key in self.values:
            self.values[meant] = self.values.pop(key)
        if key in self.sweeps:
            self.sweeps.remove(key)
            self.sweeps.add(meant)

    def write(self, key: str, override: str) -> None:
        """The override of a key that was claimed."""
        self.overrides.append(override)
        self._written[key] = override

    def written(self, key: str) -> str:
        """The value of a key in Hydra's grammar."""
        return self._written[key].partition("=")[2]
