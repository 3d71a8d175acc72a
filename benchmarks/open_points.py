"""Small questions that only a GPU answers: `python -m benchmarks.open_points OUTPUT.json [--device cuda] [--tiny]`

1. Which kernels the library's attention runs on by itself, and what heads of 128 save against heads of 64.
2. What a custom operation costs inside compiled code, with and without CUDA graphs, against what the compiler makes of
   the definition.
3. What a CUDA graph saves in a step of Muon.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.sessions import write
from kernels import REFERENCE, TRITON
from kernels.choose import Kernels
from kernels.rms_norm import rms_norm
from trainer.commands.bench import profile
from trainer.commands.bench.turns import interleaved
from trainer.optim.muon import Muon

TURNS = 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name, measure in {"attention": attention, "custom_operation": custom_operation, "muon": muon}.items():
        found[name] = measure(args.device, args.tiny)
        print(f"{name}: done", flush=True)
        write(args.output, found)


def attention(device: torch.device, tiny: bool) -> dict[str, Any]:
    rows, length, width = (1, 32, 128) if tiny else (8, 1024, 768)
    found = {}
    for head in (64, 128):
        shape = (rows, width // head, length, head)
        q, k, v = (
            torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_(True) for _ in range(3)
        )

        def both(turn: int, q: Any = q, k: Any = k, v: Any = v) -> None:
            F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        seconds = interleaved({"both": both}, TURNS, device)["both"]
        found[f"heads of {head}"] = {
            "shape": shape,
            "seconds": statistics.median(seconds),
            "kernels": profile.by_name(both, device)["cuda" if device.type == "cuda" else "cpu"][:8],
        }
    return found


def custom_operation(device: torch.device, tiny: bool) -> dict[str, float]:
    """Seconds of a norm between two additions, forward and backward."""
    rows, width = (8, 64) if tiny else (16_384, 768)
    x = torch.randn(rows, width, device=device).to(torch.bfloat16).requires_grad_(True)
    weight = torch.ones(width, device=device, requires_grad=True)
    sides: dict[str, Callable[[int], object]] = {}
    for name in (REFERENCE, TRITON) if device.type == "cuda" else (REFERENCE,):
        for mode in ("default", "reduce-overhead") if device.type == "cuda" else ("default",):
            kernels = Kernels({"rms_norm": name})

            def between(x: torch.Tensor, kernels: Kernels = kernels) -> torch.Tensor:
                return rms_norm(x + 1, weight, 1e-5, kernels) + 1

            compiled = torch.compile(between, mode=mode, fullgraph=True)
            sides[f"{name}, {mode}"] = lambda turn, run=compiled: run(x).sum().backward()
    seconds = interleaved(sides, TURNS, device)
    return {name: statistics.median(of_side) for name, of_side in seconds.items()}


def muon(device: torch.device, tiny: bool) -> dict[str, float]:
    """Seconds of a step over the matrices of 12 blocks."""
    blocks, width = (1, 16) if tiny else (12, 768)
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    weights = [torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for s in shapes * blocks]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = Muon([{"params": weights}], lr=1e-3)
    sides: dict[str, Callable[[int], object]] = {"eager": lambda turn: optimizer.step()}
    if device.type == "cuda":
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        sides["graph"] = lambda turn: graph.replay()
    seconds = interleaved(sides, TURNS, device)
    return {name: statistics.median(of_side) for name, of_side in seconds.items()}


if __name__ == "__main__":
    main()
