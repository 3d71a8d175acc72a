"""What a run leaves behind: its folder, checkpoints, manifest and metrics, the way back from them; and the table of
trackers. Importing this brings no torch: what a row names is imported on use."""

from __future__ import annotations

from dataclasses import dataclass

from naming import Entry

__all__ = ["TRACKERS", "TrackerEntry"]


@dataclass(frozen=True)
class TrackerEntry(Entry):
    """A place outside the run folder that a run's lines also go to.

    `factory` makes a `trainer.run.sinks.Sink` from nothing; it is used in a thread of its own, and dropped with a note
    when it raises or falls behind. `switch`: the generic field that turns it on. `needs`: the module it imports, which
    comes with the extra named like the row ("" = nothing to install).
    """

    switch: str = ""
    needs: str = ""


TRACKERS: dict[str, TrackerEntry] = {
    "wandb": TrackerEntry(
        "trainer.run.trackers:Wandb",
        ("wandb_project", "wandb_run_name"),
        "Weights & Biases, online or kept for later in the run folder",
        switch="use_wandb",
        needs="wandb",
    ),
    "tensorboard": TrackerEntry(
        "trainer.run.trackers:TensorBoard",
        description="event files in <run folder>/tensorboard",
        switch="use_tensorboard",
        needs="tensorboard",
    ),
}
