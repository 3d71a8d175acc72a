"""Record an architecture's golden names and 20-step curve: `python tests/contract/record.py <type> ...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.contract.tiny import GOLDEN, adapter_of, config, context, random_batch
from trainer.optim.optimizers import build_optimizers, clip_gradients
from trainer.optim.schedules import schedule_factor


def golden_curve(type_: str) -> list[float]:
    """Loss of twenty optimizer steps on three alternating batches, fp64, one thread."""
    torch.set_num_threads(1)
    cfg, _ = config(type_)
    adapter = adapter_of(type_, dtype=torch.float64)
    optimizers = build_optimizers(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    curve = []
    for step in range(20):
        prepared = adapter.prepare(random_batch(seed=step % 3), context(step=step))
        torch.manual_seed(step)  # dropout
        output = adapter(prepared)
        terms = output.terms.values()
        loss = sum(t.weight * t.sum / prepared.denominators[t.denominator] for t in terms)
        loss.backward()
        clip_gradients(list(adapter.parameters()), cfg.max_grad_norm)
        skipped = torch.zeros(())
        optimizers.step(schedule_factor(step, 20, cfg), skipped)
        adapter.after_step(step, skipped)
        optimizers.zero_grad()
        curve.append(loss.item())
    return curve


def record(type_: str) -> None:
    state = {name: list(p.shape) for name, p in adapter_of(type_).model.state_dict().items()}
    text = json.dumps({"curve": golden_curve(type_), "state": state}, indent=1)
    (GOLDEN / f"{type_}.json").write_text(text + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(name)
