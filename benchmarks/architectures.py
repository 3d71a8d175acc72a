"""Every architecture against gpt2 in one run: `python -m benchmarks.architectures OUTPUT.json TYPE[,TYPE] [overrides]`

Steps take turns with those of gpt2 at the same rows and context, as each is configured: tokens/s, time of a step in
units of gpt2's, operations, share of the GPU's peak, parameters in all and of one token, and what two steps took of
memory at most (of the device; on a CPU of the process, where Linux tells).
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.sessions import opened, step, write
from trainer.commands.bench.turns import interleaved, median_ratio
from trainer.distributed import choose_device
from trainer.run.manifest import peak_flops, peak_memory_bytes

TURNS = 10


def main(output: str, types: str, *words: str) -> int:
    found: dict[str, Any] = {"overrides": list(words), "against": "gpt2", "architectures": {}}
    for type_ in types.split(","):
        found["architectures"][type_] = f = _compare(type_, list(words))
        memory = "" if f["peak_memory_bytes"] is None else f"   {f['peak_memory_bytes'] / 2**20:,.0f} MiB"
        print(
            f"{type_:<10}{f['parameters']:>14,} parameters, {f['active_parameters']:,} active   "
            f"{f['flops_per_token'] / 1e6:,.1f} MFLOP/token{f['tokens_per_second']:>11,.0f} tokens/s   "
            f"step {f['step_over_gpt2']:.2f} x gpt2's{memory}",
            flush=True,
        )
        write(output, found)
    return 0


def _compare(type_: str, words: list[str]) -> dict[str, Any]:
    gc.collect()
    device = choose_device("cpu" if "device=cpu" in words else "auto")
    before = _peak_from_now_on(device)
    s = opened(type_, words)
    step(s, 0)
    step(s, 1)  # the optimizer's state is there
    memory = None if before is None else peak_memory_bytes(device) - before
    sides: dict[str, Callable[[int], object]] = {
        "gpt2": partial(step, opened("gpt2", words)),
        type_ + " ": partial(step, s),  # gpt2 against itself has two sides
    }
    seconds = interleaved(sides, TURNS, s.world.device)
    mine = seconds[type_ + " "]
    speed = s.plan.rows * s.cfg.train_seq_len / statistics.median(mine)
    parameters = s.adapter.parameter_count
    flops = s.adapter.flops(s.cfg.train_seq_len).training_per_token
    operations = flops * speed
    peak = peak_flops(s.world.device)
    return {
        "parameters": parameters,
        "active_parameters": s.adapter.active_parameters() or parameters,
        "flops_per_token": flops,
        "tokens_per_second": speed,
        "step_over_gpt2": median_ratio(mine, seconds["gpt2"]),
        "tflops": operations / 1e12,
        "mfu": operations / peak if peak else None,
        "peak_memory_bytes": memory,
        "precision": s.precision,
        "compiled": s.compiled,
    }


def _peak_from_now_on(device: torch.device) -> int | None:
    """What is in use, from which the peak is counted anew; None where that cannot be done."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free, or what comes next would fit into it unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return None
    return peak_memory_bytes(device)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
