"""Record an architecture's golden names, groups and 20-step curve:
`python tests/contract/record.py <type or YAML file> ...`

Those of the table go to tests/contract/golden, those of a file beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from adapters.base import weighted_loss
from tests.contract.located import located
from tests.contract.tiny import adapter_of, batch_for, config, context, golden_file
from trainer.optim.groups import assign_groups
from trainer.optim.optimizers import build_optimizers, clip_gradients
from trainer.optim.schedules import schedule_factor

STEPS = 20


def golden_curve(architecture: str) -> list[float]:
    """Loss of twenty optimizer steps on three alternating batches, fp64, one thread."""
    torch.set_num_threads(1)
    cfg, _ = config(architecture)
    adapter = adapter_of(architecture, dtype=torch.float64)
    optimizers = build_optimizers(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    curve = []
    for step in range(STEPS):
        ctx = context(step=step)
        adapter.on_step_start(ctx, STEPS)
        prepared = adapter.prepare(batch_for(adapter, seed=step % 3), ctx)
        torch.manual_seed(step)  # dropout
        loss = weighted_loss(adapter(prepared.to(adapter.device)).terms, prepared.denominators)
        loss.backward()
        clip_gradients(list(adapter.parameters()), cfg.max_grad_norm)
        skipped = torch.zeros((), device=adapter.device)
        optimizers.step(schedule_factor(step, STEPS, cfg), skipped)
        adapter.end_step(step, skipped)
        optimizers.zero_grad()
        curve.append(loss.item())
    return curve


def golden_groups(architecture: str) -> dict[str, str]:
    """How every parameter is stepped, by name: role, optimizer, what its rates are and what counts as one matrix."""
    cfg, _ = config(architecture)
    adapter = adapter_of(architecture)
    found = {}
    for group in assign_groups(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width):
        t = group.treatment
        for name, split in zip(group.parameters, group.splits, strict=True):
            rates = f"lr {t.lr:.6g}, decay {t.weight_decay:g}, every {t.every}, split {split}"
            betas = f", betas {t.betas}" if t.betas else ""
            found[name] = f"{t.role}: {t.optimizer}, {rates}{betas}"
    return found


def record(architecture: str) -> None:
    state = {name: list(p.shape) for name, p in adapter_of(architecture).model.state_dict().items()}
    recorded = {"curve": golden_curve(architecture), "state": state, "groups": golden_groups(architecture)}
    golden_file(architecture).write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    try:
        architectures = [located(name, Path.cwd()) for name in sys.argv[1:]]
    except ValueError as error:
        sys.exit(f"error: {error}")
    for architecture in architectures:
        record(architecture)
