"""Every architecture against gpt2 in one run: `python -m benchmarks.architectures OUTPUT.json TYPE[,TYPE] [overrides]`

Steps take turns with those of gpt2 at the same rows and context, as each is configured: tokens/s, share of the GPU's
peak, and what the other's peak memory was (on a GPU; the memory of a process cannot be told apart).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.sessions import opened, step, write
from trainer.commands.bench.turns import interleaved, median_ratio
from trainer.run.manifest import peak_flops

TURNS = 10


def main(output: str, types: str, *words: str) -> int:
    found: dict[str, Any] = {"overrides": list(words), "against": "gpt2", "architectures": {}}
    for type_ in types.split(","):
        found["architectures"][type_] = f = _compare(type_, list(words))
        memory = "" if f["peak_memory_bytes"] is None else f"   {f['peak_memory_bytes'] / 2**30:.2f} GiB"
        print(
            f"{type_:<10}{f['parameters']:>14,} parameters{f['tokens_per_second']:>11,.0f} tokens/s   "
            f"{f['times_gpt2']:.2f} x gpt2{memory}",
            flush=True,
        )
        write(output, found)
    return 0


def _compare(type_: str, words: list[str]) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available() and "device=cpu" not in words
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    s = opened(type_, words)
    step(s, 0)
    step(s, 1)  # the optimizer's state is there
    memory = torch.cuda.max_memory_allocated() - before if on_gpu else None
    sides: dict[str, Callable[[int], object]] = {
        "gpt2": partial(step, opened("gpt2", words)),
        type_ + " ": partial(step, s),  # gpt2 against itself has two sides
    }
    seconds = interleaved(sides, TURNS, s.world.device)
    mine = seconds[type_ + " "]
    speed = s.plan.rows * s.cfg.train_seq_len / statistics.median(mine)
    operations = s.adapter.flops(s.cfg.train_seq_len).training_per_token * speed
    peak = peak_flops(s.world.device)
    return {
        "parameters": sum(p.numel() for p in s.adapter.model.parameters()),
        "tokens_per_second": speed,
        "times_gpt2": median_ratio(seconds["gpt2"], mine),
        "tflops": operations / 1e12,
        "mfu": operations / peak if peak else None,
        "peak_memory_bytes": memory,
        "precision": s.precision,
        "compiled": s.compiled,
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
