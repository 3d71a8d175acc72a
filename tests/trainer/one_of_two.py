"""What one of several processes does otherwise than the others; see test_budget.py and test_distributed.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tests.contract.tiny import config
from trainer import budget
from trainer.distributed import _everywhere, open_world
from trainer.session import open_session


def steps_that_fit(minutes: float) -> int:
    """Steps take the longer, the higher the rank."""
    cfg, model_cfg = config("gpt2", f"time_budget={minutes}", "num_iterations=500", "val_loss_every=0")
    with open_world(cfg) as world:
        s = open_session(cfg, model_cfg, world)
        budget.seconds_since_start = lambda: 0.0  # of the test's own process
        budget._seconds_per_step = lambda s, should_stop: 5.0 * (1 + world.rank)
        budget._scoring_and_sample = lambda s, should_stop: (20.0, 0.0, 0.0)
        budget.decide(s, lambda: False, print)
        return s.total_steps


def choose_where(lacking: int) -> str:
    """What this process says where process `lacking` has no device."""

    def choose() -> torch.device:
        if dist.get_rank() == lacking:
            raise ValueError(f"process {lacking} has no such device")
        return torch.device("cpu")

    try:
        return str(_everywhere(choose))
    except ValueError as error:
        return str(error)
