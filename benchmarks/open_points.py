"""Small questions that only a GPU answers.

`python -m benchmarks.open_points OUTPUT.json [QUESTION ...] [--device cuda] [--tiny]`

1. Which kernels the library's attention runs on by itself, and what heads of 128 save against heads of 64.
2. What a custom operation costs inside compiled code, with and without CUDA graphs, against what the compiler makes of
   the definition.
3. What a CUDA graph saves in a step of Muon.
4. Whether the compiler's own chunks (`auto_chunker`) of the plain head and loss do what ours does, in time and memory.
5. What the second pass of the row kernel costs: at the rate of a copy with `gradient`, counting one read and one write,
   its second read comes from the L2 cache; at two thirds of it from memory.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.sessions import write
from kernels import CHUNKED, KERNELS, REFERENCE, TRITON
from kernels.choose import Kernels, rows_at_once
from kernels.chunks import Rows, States
from kernels.device import interpreting
from kernels.linear_cross_entropy import SPEC
from kernels.rms_norm import rms_norm
from naming import load
from trainer.commands.bench import profile
from trainer.commands.bench.measure import in_turns, peak_bytes
from trainer.commands.bench.sides import Inputs, Side
from trainer.commands.bench.turns import interleaved
from trainer.optim.muon import Muon

__all__ = ["QUESTIONS"]

TURNS = 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output")
    parser.add_argument("questions", nargs="*", help=f"some of {', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for name in args.questions or QUESTIONS:
        found[name] = QUESTIONS[name](args.device, args.tiny)
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


def head_loss(device: torch.device, tiny: bool) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward, and bytes that they hold at most beside their inputs."""
    rows, width, vocabulary = (256, 16, 8_192) if tiny else (65_536, 768, 50_304)
    size = {"rows": rows, "width": width, "vocabulary": vocabulary}
    name = TRITON if device.type == "cuda" else CHUNKED
    ours = load(KERNELS["linear_cross_entropy"].implementations[name].where)
    sides = [
        Side(f"ours, {name}", ours),
        Side("compiled", torch.compile(_plain_head, dynamic=False)),
        Side(
            "compiled, auto_chunker",
            torch.compile(_plain_head, dynamic=False, options={"auto_chunker.enable": True}),
        ),
    ]
    inputs = [Inputs(SPEC, size, device, torch.bfloat16, 0).complete(ours)]
    calls = {side.name: partial(Inputs.both, run=side.run) for side in sides}
    seconds = in_turns(calls, inputs, TURNS, device)
    return {
        side.name: {
            "seconds": statistics.median(seconds[side.name]),
            "peak_bytes": peak_bytes(side, inputs[0], device),
        }
        for side in sides
    }


def _plain_head(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: None = None, **kind: Any
) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def row_kernel(device: torch.device, tiny: bool) -> dict[str, dict[str, float]]:
    """Of a chunk of logits in bf16: seconds, and bytes per second counting every logit once for a read and, where it is
    written, once for that."""
    rows, columns = (
        (4, 100) if tiny else (rows_at_once("linear_cross_entropy", 50_304, device, torch.bfloat16), 50_304)
    )
    z = torch.randn(rows, columns, device=device).to(torch.bfloat16)
    other = torch.empty_like(z)
    moved: dict[str, int] = {"copy": 2 * z.nbytes}
    sides: dict[str, Callable[[int], object]] = {"copy": lambda turn: other.copy_(z)}
    if device.type == "cuda" or interpreting():
        from kernels.linear_cross_entropy.row_kernel import CROSS_ENTROPY, overwrite

        targets = torch.randint(columns, (rows,), device=device)
        known, states = Rows((targets,), torch.ones(rows, device=device)), States(columns, columns, None)
        for name, gradient in (("loss", False), ("loss and gradient", True)):
            moved[name] = (1 + gradient) * z.nbytes
            sides[name] = lambda turn, wanted=gradient: overwrite(CROSS_ENTROPY, z, known, states, wanted)
    seconds = interleaved(sides, TURNS, device)
    found = {name: statistics.median(of_side) for name, of_side in seconds.items()}
    return {name: {"seconds": s, "bytes_per_second": moved[name] / s} for name, s in found.items()}


QUESTIONS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    measure.__name__: measure for measure in (attention, custom_operation, muon, head_loss, row_kernel)
}

if __name__ == "__main__":
    main()
