"""Where the time of a training step goes, by the name of what runs: operations on the host, kernels on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["by_name", "report"]

STEPS = 3
NAME_WIDTH = 60
MICROSECONDS = 1e6


def by_name(step: Callable[[int], object], device: torch.device) -> dict[str, Any]:
    """`seconds_per_step`, as the profiler slows it down, and what it is made of: lists "cpu" and, on a GPU, "cuda" of
    {name, calls, seconds} per step, the dearest first. Time is an operation's own, without that of others it calls. A
    GPU works beside the host: each list is a part of the same seconds."""
    on_gpu = device.type == "cuda"
    for turn in range(2):  # first calls allocate and compile
        step(turn)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    _wait(device)
    with profile(activities=activities) as seen:
        started = time.perf_counter()
        for turn in range(STEPS):
            step(2 + turn)
        _wait(device)
        seconds = time.perf_counter() - started
    # Ranges that somebody named contain what is listed anyway.
    events = [e for e in seen.key_averages() if not e.is_user_annotation]
    found: dict[str, Any] = {"steps": STEPS, "seconds_per_step": seconds / STEPS}
    found["cpu"] = _dearest((e.key, e.count, e.self_cpu_time_total) for e in events)
    if on_gpu:
        kernels = (e for e in events if e.device_type == DeviceType.CUDA)
        found["cuda"] = _dearest((e.key, e.count, e.self_device_time_total) for e in kernels)
    return found


def _dearest(events: Any) -> list[dict[str, Any]]:
    listed = [
        {"name": name, "calls": calls / STEPS, "seconds": spent / MICROSECONDS / STEPS}
        for name, calls, spent in events
        if spent
    ]
    return sorted(listed, key=lambda entry: -entry["seconds"])


def report(found: dict[str, Any], most: int) -> list[str]:
    """Lines of a table: the `most` dearest names of each list, and what the rest makes."""
    step, lines = found["seconds_per_step"], []
    for where, title in (("cuda", "kernel on the GPU"), ("cpu", "operation on the CPU")):
        if where not in found:
            continue
        lines.append(f"{title:<{NAME_WIDTH}}{'calls':>8}{'ms a step':>11}{'of it':>8}")
        shown, rest = found[where][:most], found[where][most:]
        for entry in shown:
            lines.append(_line(entry["name"], entry["calls"], entry["seconds"], step))
        if rest:
            calls, seconds = (sum(entry[key] for entry in rest) for key in ("calls", "seconds"))
            lines.append(_line(f"{len(rest)} others", calls, seconds, step))
        idle = step - sum(entry["seconds"] for entry in found[where])
        lines.append(_line("idle" if where == "cuda" else "between operations", None, max(idle, 0.0), step))
    return lines


def _line(name: str, calls: float | None, seconds: float, step: float) -> str:
    name = name if len(name) < NAME_WIDTH else name[: NAME_WIDTH - 4] + "..."
    many = "" if calls is None else f"{calls:,.0f}"
    return f"{name:<{NAME_WIDTH}}{many:>8}{seconds * 1e3:>11.3f}{seconds / step:>8.1%}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
