"""What the drivers of this folder share: sessions of a size, and the step that no training can leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from configs.compose import compose
from configs.validate import architecture_config
from models import ARCHITECTURES
from trainer.distributed import World, choose_device
from trainer.optim.optimizers import clip_gradients
from trainer.run.files import write_atomically
from trainer.session import Session, open_session
from trainer.step import accumulate_gradients

__all__ = ["opened", "step", "without_a_base", "write"]


def without_a_base() -> list[str]:
    """The architectures that can be measured as they are: another needs weights that were trained elsewhere."""
    return [name for name in ARCHITECTURES if not architecture_config(name, None, lambda key: "").elsewhere]


def opened(type_: str, words: list[str]) -> Session:
    """A session of the architecture's own file under the words of a command line. They are sizes for all architectures:
    what of them is no field of this one, such as heads where nothing attends, is left out, as of a preset."""
    file = f"--hydra_model_cfg=configs/{type_}.yaml"
    fields = architecture_config(type_, None, lambda key: "").model_fields
    sizes = [word for word in words if _field(word) is None or _field(word) in fields]
    cfg, model_cfg = compose([file, "resume=none", "batch_stages=null", *sizes], notify=lambda text: None)
    return open_session(cfg, model_cfg, World(choose_device(cfg.device)))


def _field(word: str) -> str | None:
    """Of `model_cfg.<field>=<value>`; None of another word."""
    key = word.partition("=")[0]
    return key.removeprefix("model_cfg.") if key.startswith("model_cfg.") else None


def step(s: Session, index: int) -> None:
    """Forward, backward, clip, optimizer, and what the architecture does behind it."""
    batch = s.loader.load(index, "mean")
    accumulate_gradients(s, batch, batch.denominators, s.total_steps)
    clip_gradients(s.parameters, s.cfg.max_grad_norm)
    s.optimizers.step(1.0)
    s.adapter.end_step(index, torch.zeros((), device=s.world.device))
    s.optimizers.zero_grad()


def write(output: str, figures: dict[str, Any]) -> None:
    """After each part anew: whoever is stopped half way has the first half."""
    write_atomically(Path(output), json.dumps(figures, indent=2) + "\n")
