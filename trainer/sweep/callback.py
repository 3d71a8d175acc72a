"""What Hydra is told of a sweep besides its own settings, and hands on to every job: `hydra.callbacks.sweep`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from configs.sweeps import MULTIRUN


@dataclasses.dataclass
class Sweep(Callback):
    """`models` and `words`: the command. `varied`: the fields that the sweep is over. `began`: when this command did,
    in seconds. `numbers`: folder of each job by Hydra's number, and of those beyond, one after the other from
    `first`. `heads`: what files say of them (`Plan.told_of_heads`)."""

    models: list[str]
    words: list[str]
    varied: list[str]
    began: float
    numbers: list[int]
    first: int
    heads: list[dict[str, Any]]

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Record the command, whichever sweeper it is for."""
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / MULTIRUN)
