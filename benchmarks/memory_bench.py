"""What a bank is for: `python -m benchmarks.memory_bench [STEPS [OUTPUT.json]]`

A decoder with random weights that stay as they are learns a table, 64 keys and the value of each, in its memory alone.
Told are the share of values that the likeliest token gets right without the memory, along the way, and with the bank
set to zeros afterwards: what was learned is in the bank, not in what reads it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.sessions import write
from models.memory.config import MemoryConfig
from models.memory.transformer import MemoryTransformer

PAIRS, VOCABULARY = 64, 256
RATE, EVERY = 3e-3, 50


def main(steps: str = "400", output: str = "") -> int:
    began = time.perf_counter()
    found = {**learned(int(steps)), "seconds": time.perf_counter() - began}
    for step, right in found["right"].items():
        print(f"step {step:>5}  {right:6.1%}")
    print(
        f"without a memory {found['without']:.1%}, with a bank of zeros {found['emptied']:.1%}, chance {1 / PAIRS:.1%}"
    )
    if output:
        write(output, found)
    return 0


def learned(steps: int, seed: int = 0, **fields: Any) -> dict[str, Any]:
    """Shares of values that are right: `right` by step, `without` the memory, `emptied` afterwards. `fields`: others of
    the memory."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "n_ctx": 8,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "initializer_range": 0.1,
    }
    model = MemoryTransformer(MemoryConfig(**{**sizes, "num_memory_tokens": 128, **fields}))
    model.init_weights(generator)
    model.eval()
    keys, values = (torch.randperm(VOCABULARY, generator=generator)[:PAIRS] for _ in range(2))
    own = [p.requires_grad_(model.added(name)) for name, p in model.named_parameters()]
    optimizer = torch.optim.Adam([p for p in own if p.requires_grad], RATE)

    def logits() -> Tensor:
        """(PAIRS, V), of documents of one key."""
        states = model(keys[:, None])
        return model.logits(states if isinstance(states, Tensor) else states.states)[:, -1].float()

    @torch.no_grad()
    def share() -> float:
        return float((logits().argmax(-1) == values).float().mean())

    found: dict[str, Any] = {"without": share(), "right": {}}  # what a memory writes begins with zeros
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(logits(), values).backward()
        optimizer.step()
        if step % EVERY == 0 or step == steps:
            found["right"][step] = share()
    with torch.no_grad():
        for bank in model.every_bank:
            for parameter in bank.parameters():
                parameter.zero_()
    return {**found, "emptied": share()}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
