"""One of several processes on which steps take the longer, the higher its rank; see test_budget.py."""

from __future__ import annotations

from tests.contract.tiny import config
from trainer import budget
from trainer.distributed import open_world
from trainer.session import open_session


def steps_that_fit(minutes: float) -> int:
    cfg, model_cfg = config("gpt2", f"time_budget={minutes}", "num_iterations=500", "val_loss_every=0")
    with open_world(cfg) as world:
        s = open_session(cfg, model_cfg, world)
        budget._seconds_per_step = lambda s, should_stop: 5.0 * (1 + world.rank)
        budget._scoring_and_sample = lambda s, should_stop: (20.0, 0.0, 0.0)
        budget.decide(s, lambda: False)
        return s.total_steps
