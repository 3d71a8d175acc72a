"""Seconds and bytes of one operation at one size, its sides taking turns."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import REFERENCE
from kernels.spec import Size, Spec
from trainer.commands.bench.sides import AGAIN, COMPILED, Inputs, Side
from trainer.commands.bench.turns import interleaved, median_ratio

__all__ = ["compare", "figures", "graph_seconds", "in_turns", "peak_bytes", "rotated"]

# Bytes of inputs that calls go round in: a GPU's are several times its cache.
BEYOND_CACHE = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
MOST_BUFFERS = 16


def rotated(
    spec: Spec, size: Size, device: torch.device, dtype: torch.dtype, run: Callable[..., Any]
) -> list[Inputs]:
    """Inputs that calls go round in, so that none finds its own in a cache."""
    first = Inputs(spec, size, device, dtype, 0)
    many = min(MOST_BUFFERS, 1 + BEYOND_CACHE.get(device.type, 0) // max(1, first.bytes))
    others = (Inputs(spec, size, device, dtype, seed) for seed in range(1, many))
    return [inputs.complete(run) for inputs in (first, *others)]


def in_turns(
    calls: Mapping[str, Callable[[Inputs], object]], inputs: list[Inputs], turns: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every turn of every side. Calls go round in the inputs; what one wrote into them is put back, untimed,
    half a round before they are used again: nothing lies in a cache because of that."""
    around = itertools.cycle(range(len(inputs)))
    present = 0

    def refill(turn: int) -> None:
        nonlocal present
        present = next(around)
        inputs[(present + len(inputs) // 2) % len(inputs)].refill()

    def one(call: Callable[[Inputs], object], turn: int) -> object:
        return call(inputs[present])

    sides = {name: partial(one, call) for name, call in calls.items()}
    return interleaved(sides, turns, device, before=refill)


def compare(
    sides: Sequence[Side], inputs: list[Inputs], turns: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every turn: {"forward" | "both": {side: [...]}}."""
    parts = {"forward": Inputs.forward, "both": Inputs.both}
    return {
        part: in_turns({side.name: partial(call, run=side.run) for side in sides}, inputs, turns, device)
        for part, call in parts.items()
    }


def graph_seconds(
    sides: Sequence[Side], inputs: list[Inputs], turns: int, device: torch.device
) -> dict[str, float]:
    """Seconds of the GPU alone, forward and backward: a graph that goes through all inputs once, replayed. A side that
    waits for the GPU cannot be captured and has none."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for side in sides:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                inputs[0].both(side.run)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept: list[tuple[Tensor, ...]] = [each.both(side.run) for each in inputs]
        except RuntimeError:
            torch.cuda.synchronize(device)
            continue
        del kept
        graphs[side.name] = graph

    def replay(graph: torch.cuda.CUDAGraph, turn: int) -> None:
        graph.replay()

    seconds = interleaved({name: partial(replay, graph) for name, graph in graphs.items()}, turns, device)
    return {name: statistics.median(found) / len(inputs) for name, found in seconds.items()}


def peak_bytes(side: Side, inputs: Inputs, device: torch.device) -> int:
    """Bytes that forward and backward hold at most, beside their inputs."""
    inputs.refill()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        inputs.both(side.run)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report its starts
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        inputs.both(side.run)
    now = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def figures(
    spec: Spec,
    size: Size,
    dtype: torch.dtype,
    seconds: Mapping[str, Mapping[str, list[float]]],
    best: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    """By side: what its seconds come to. `best`: the measured ceilings."""
    (flops, more_flops), (moved, more_moved) = spec.flops(size), spec.bytes(size, dtype.itemsize)
    least = {"forward": (flops, moved), "both": (flops + more_flops, moved + more_moved)}
    both = seconds["both"]
    peers = {name: statistics.median(both[name]) for name in both if name in spec.peers}
    rows: dict[str, dict[str, Any]] = {}
    for name in both:
        if name == AGAIN:
            continue
        row: dict[str, Any] = {}
        for part, (operations, bytes_moved) in least.items():
            if part == "forward" and name in spec.gradients_in_forward:
                continue
            row[part] = _rates(operations, bytes_moved, statistics.median(seconds[part][name]), best)
        # Backward is not timed alone: a graph that was kept would be one more thing in memory. Noise may leave nothing.
        added = row["both"]["seconds"] - row["forward"]["seconds"] if "forward" in row else 0.0
        if added > 0 and (more_flops or more_moved):
            row["backward"] = _rates(more_flops, more_moved, added, best)
        if COMPILED in both:
            row["times_compiled_reference"] = median_ratio(both[COMPILED], both[name])
        row["times_reference"] = median_ratio(both[REFERENCE], both[name])
        if peers:
            row["times_best_peer"] = median_ratio(both[min(peers, key=lambda peer: peers[peer])], both[name])
        rows[name] = row
    return rows


def _rates(operations: float, moved: float, taken: float, best: Mapping[str, float]) -> dict[str, float]:
    floor = max(moved / best["bytes_per_second"], operations / best["flops_per_second"])
    return {
        "seconds": taken,
        "bytes_per_second": moved / taken,
        "flops_per_second": operations / taken,
        "share_of_ceiling": floor / taken,
    }
