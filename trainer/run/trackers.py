"""Trackers: sinks that send a run's lines to a tool of somebody else. `trainer/run/__init__.py` has their table.

Each imports its tool in `begin`, in the thread that `InBackground` gave it. After a resume the lines of the steps
behind the checkpoint come once more: a tracker sees to it that every step stands there once.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.run import TRACKERS
from trainer.run.background import InBackground
from trainer.run.facts import Facts
from trainer.run.files import write_atomically

if TYPE_CHECKING:
    from configs.schema import RunConfig

# Without a network a run ends no later for it: requests are given up after two times five seconds, uploads at the end
# after three; what was not sent lies in <run folder>/wandb. Being silent, W&B does not prompt for a key either.
WANDB_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",  # leave standard output alone
    "finish_timeout": 3.0,
    "x_graphql_timeout_seconds": 5.0,
    "x_graphql_retry_max": 1,
}

__all__ = ["TensorBoard", "Wandb", "chosen_trackers", "numbers"]


def chosen_trackers(cfg: RunConfig, note: Callable[[str], None]) -> list[InBackground]:
    """Those that the configuration turns on."""
    return [
        InBackground(name, row.load()(), note) for name, row in TRACKERS.items() if getattr(cfg, row.switch)
    ]


def numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """What of a line can be drawn; a mapping's entries as `name/key`."""
    found: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found


class TensorBoard:
    """Event files in `<run folder>/tensorboard`. Steps that a life cut short wrote beyond its checkpoint are purged."""

    def begin(self, facts: Facts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(facts.path / "tensorboard"), purge_step=facts.step + 1)

    def step(self, line: dict[str, Any]) -> None:
        for name, value in numbers(line).items():
            if name != "step":
                self._writer.add_scalar(name, value, line["step"])

    evaluation = step

    def finish(self, summary: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases, by its mode `online` or `offline` (files in `<run folder>/wandb`, for `wandb sync`).

    No account is ever asked for: online without a key is an error, hence a note. The run's id and the last step sent
    of each value are kept in `<run folder>/wandb.json`; a later life goes on with that run and sends what is new.
    """

    def begin(self, facts: Facts) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")  # from its import on
        import wandb

        self._state = facts.path / "wandb.json"
        kept = json.loads(self._state.read_text(encoding="utf-8")) if self._state.exists() else {}
        self._id, self._sent = kept.get("id", secrets.token_hex(4)), dict(kept.get("sent", {}))
        self._before = dict(self._sent)
        self._run = wandb.init(
            project=facts.config["wandb_project"],
            name=facts.config["wandb_run_name"] or facts.path.resolve().name,
            id=self._id,
            resume="allow" if facts.config["use_wandb"] == "online" else None,
            mode=facts.config["use_wandb"],
            dir=str(facts.path),
            config=facts.config,
            settings=wandb.Settings(**WANDB_SETTINGS),
        )
        # Rows of their own over our steps: W&B's counter would refuse a second line of one step after a resume.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._keep()

    def step(self, line: dict[str, Any]) -> None:
        step = line["step"]
        new = {k: v for k, v in numbers(line).items() if k != "step" and self._before.get(k, -1) < step}
        if new:
            self._run.log({**new, "step": step})
            self._sent |= dict.fromkeys(new, step)
            self._keep()

    evaluation = step

    def finish(self, summary: dict[str, Any]) -> None:
        self._run.summary.update(numbers(summary))

    def close(self) -> None:
        self._run.finish()

    def _keep(self) -> None:
        write_atomically(self._state, json.dumps({"id": self._id, "sent": self._sent}) + "\n")
