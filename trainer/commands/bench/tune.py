"""`bench kernels --tune`: launch choices of this GPU, each held against the reference before it is timed, and whether
our kernels are worth their code here. Written into kernels/tuned/<sm_NN>.json, to be committed."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import KERNELS, REFERENCE, TRITON, tuned
from kernels.against import deviation, deviations, gradients, upstream
from kernels.device import gpu_of
from kernels.spec import Sample, Size, Spec, spec_of
from kernels.tuned import Asked
from naming import load
from trainer.commands.bench.measure import in_turns, peak_bytes, rotated
from trainer.commands.bench.sides import COMPILED, Inputs, Side
from trainer.commands.bench.turns import median_ratio
from trainer.run.files import write_atomically

__all__ = ["candidates", "report", "tune"]

DTYPE = torch.bfloat16
TURNS = 20
HEURISTIC = "heuristic"
MIN_GAIN = 1.03  # of a choice over the heuristic one: less is noise
Timer = Callable[
    [Mapping[str, Callable[[Inputs], object]], list[Inputs], torch.device], dict[str, list[float]]
]


def by_the_clock(
    calls: Mapping[str, Callable[[Inputs], object]], inputs: list[Inputs], device: torch.device
) -> dict[str, list[float]]:
    return in_turns(calls, inputs, TURNS, device)


def candidates(asked: Asked) -> list[dict[str, Any]]:
    """Choices that differ from the heuristic one, by what differs; everything that may vary, crossed."""
    names = list(asked.vary)
    crossed = (dict(zip(names, values, strict=True)) for values in itertools.product(*asked.vary.values()))
    differing = ({n: v for n, v in each.items() if v != asked.default.get(n)} for each in crossed)
    return [each for each in differing if each]


def tune(
    ops: list[str],
    device: torch.device,
    environment: Mapping[str, Any],
    tell: Callable[[str], object],
    timer: Timer = by_the_clock,
) -> dict[str, Any]:
    """What was found, as it was written; what the file says of other operations stays."""
    gpu = gpu_of(device)
    if gpu is None:
        raise ValueError(
            f"tune: launch choices are found on the GPU that they are for, and this is {device.type}"
        )
    found = {"device": environment["device"], "commit": environment["git_commit"], "versions": {}}
    found["versions"] = {"torch": environment["torch"], **environment.get("packages", {})}
    before = tuned.read(gpu.name)
    measured, launches = dict(before.get("measured", {})), dict(before.get("launch", {}))
    path = tuned.path_of(gpu.name)
    for op in ops:
        spec = spec_of(op)
        if spec is None or TRITON not in KERNELS[op].implementations:
            continue
        for size in spec.large:
            tell(f"tuning {op}, {size}")
            for asked, choice in _choices(op, spec, size, device, timer):
                entries = [e for e in launches.get(asked.kernel, []) if e["key"] != asked.key]
                launches[asked.kernel] = [*entries, {"key": asked.key, "choice": choice}]
            _write(path, {**found, "measured": measured, "launch": launches})
        measured[op] = {TRITON: _worth(op, spec, device, timer)}
        _write(path, {**found, "measured": measured, "launch": launches})
    return {"file": str(path), **tuned.read(gpu.name)}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    tuned.forget()


def _choices(
    op: str, spec: Spec, size: str, device: torch.device, timer: Timer
) -> list[tuple[Asked, dict[str, Any]]]:
    """For each kernel of a call the fastest choice that gives right results, where it is worth writing down."""
    run = load(KERNELS[op].implementations[TRITON].where)
    inputs = rotated(spec, spec.large[size], device, DTYPE, run)
    with tuned.asked() as launched:
        inputs[0].both(run)
    chosen = []
    for asked in {a.kernel: a for a in launched}.values():
        calls = {HEURISTIC: _launched_so(run, asked.kernel, {})}
        choices = {}
        for choice in candidates(asked):
            if _right(op, spec, size, asked.kernel, choice, device):
                name = json.dumps(choice)
                choices[name], calls[name] = choice, _launched_so(run, asked.kernel, choice)
        seconds = timer(calls, inputs, device)
        best = min(seconds, key=lambda name: statistics.median(seconds[name]))
        if best != HEURISTIC and median_ratio(seconds[HEURISTIC], seconds[best]) >= MIN_GAIN:
            chosen.append((asked, choices[best]))
    return chosen


def _launched_so(
    run: Callable[..., Any], kernel: str, choice: Mapping[str, Any]
) -> Callable[[Inputs], object]:
    def call(inputs: Inputs) -> object:
        with tuned.forced(kernel, choice):
            return inputs.both(run)

    return call


def _right(
    op: str, spec: Spec, size: str, kernel: str, choice: Mapping[str, Any], device: torch.device
) -> bool:
    """Whether every small size agrees with the reference in fp64, and the tuned one with the heuristic choice, in
    memory full of NaN. A choice that the compiler or the GPU refuses is none."""
    from triton.errors import TritonError

    run, reference = (load(KERNELS[op].implementations[name].where) for name in (TRITON, REFERENCE))
    allowed = spec.tolerance[str(DTYPE).removeprefix("torch.")]
    drawn = {name: _sample(spec, small, device) for name, small in spec.small.items()}
    large = _sample(spec, spec.large[size], device)
    try:
        with _full_of_nan():
            with tuned.forced(kernel, {}):
                expected = results(run, large)
            with tuned.forced(kernel, choice):
                found = [deviations(run, reference, sample) for sample in drawn.values()]
                again = results(run, large)
    except TritonError:
        return False
    found.append({str(i): deviation(a, b) for i, (a, b) in enumerate(zip(again, expected, strict=True))})
    return all(worst <= allowed for each in found for worst in each.values())


def _sample(spec: Spec, size: Size, device: torch.device) -> Sample:
    return spec.sample(size, device, DTYPE, torch.Generator().manual_seed(1))


def results(run: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Outputs and gradients."""
    outputs = sample.call(run)
    return [*outputs, *gradients(outputs, sample, upstream(outputs)).values()]


@contextmanager
def _full_of_nan() -> Iterator[None]:
    """In the body new memory of torch holds NaN: what a choice leaves out is not what another one wrote there."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _worth(op: str, spec: Spec, device: torch.device, timer: Timer) -> dict[str, Any]:
    """Against the compiled reference, forward and backward: the least of all sizes."""
    run, reference = (load(KERNELS[op].implementations[name].where) for name in (TRITON, REFERENCE))
    speedups, saved = [], []
    for size in spec.large.values():
        torch._dynamo.reset()
        sides = [Side(TRITON, run), Side(COMPILED, torch.compile(reference, dynamic=False))]
        inputs = rotated(spec, size, device, DTYPE, run)
        seconds = timer({side.name: partial(Inputs.both, run=side.run) for side in sides}, inputs, device)
        peaks = {side.name: peak_bytes(side, inputs[0], device) for side in sides}
        speedups.append(median_ratio(seconds[COMPILED], seconds[TRITON]))
        saved.append(1 - peaks[TRITON] / max(1, peaks[COMPILED]))
    return {"speedup": min(speedups), "memory_saved": min(saved), "shapes": list(spec.large)}


def report(found: Mapping[str, Any]) -> str:
    lines = []
    for op, ways in found["measured"].items():
        for name, each in ways.items():
            worth = "auto takes it" if tuned.worth(each) else "the reference is the product"
            lines.append(
                f"{op:<24}{name:<10}{each['speedup']:.2f} x the compiled reference, "
                f"{each['memory_saved']:.0%} less memory: {worth}"
            )
    for kernel, entries in found["launch"].items():
        lines += [f"{kernel:<34}{entry['key']}: {entry['choice']}" for entry in entries]
    return "\n".join([*lines, f"written to {found['file']}: commit it"])
