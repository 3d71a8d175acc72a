"""`bench kernels --tune`: launch choices of this GPU, each held against the reference before it is timed, and whether
our kernels are worth their code here. Written into kernels/tuned/<sm_NN>.json, to be committed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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

T = TypeVar("T")
DTYPE = torch.bfloat16
TURNS = 20
MIN_GAIN = 1.03  # of a choice over the heuristic one: less is noise
Timer = Callable[
    [Mapping[str, Callable[[Inputs], object]], list[Inputs], torch.device], dict[str, list[float]]
]


def by_the_clock(
    calls: Mapping[str, Callable[[Inputs], object]], inputs: list[Inputs], device: torch.device
) -> dict[str, list[float]]:
    return in_turns(calls, inputs, TURNS, device)


def candidates(asked: Asked, best: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The best choice so far with each other value of one name; of a choice, what differs from the heuristic one."""
    tried = ({**asked.default, **best, name: value} for value in asked.vary[name])
    differing = [{n: v for n, v in each.items() if v != asked.default.get(n)} for each in tried]
    return [each for each in differing if each != best]


def tune(
    ops: list[str],
    device: torch.device,
    environment: Mapping[str, Any],
    tell: Callable[[str], object],
    timer: Timer = by_the_clock,
) -> dict[str, Any]:
    """What was found, as it was written, and the choices that were `refused`; what the file says of other operations
    stays."""
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
    refused: list[dict[str, Any]] = []
    tunable = {op: spec for op in ops if (spec := spec_of(op)) and TRITON in KERNELS[op].implementations}

    def weigh(op: str) -> None:
        tell(f"measuring {op}")
        measured[op] = {TRITON: _worth(op, tunable[op], device, timer)}
        _write(path, {**found, "measured": measured, "launch": launches})

    for op in tunable:  # before the many choices: whoever is stopped has what `auto` goes by
        weigh(op)
    for op, spec in tunable.items():
        better = False
        for size in spec.large:
            tell(f"tuning {op}, {size}")
            for asked, choice in _choices(op, spec, size, device, timer, refused):
                entries = [e for e in launches.get(asked.kernel, []) if e["key"] != asked.key]
                launches[asked.kernel] = [*entries, {"key": asked.key, "choice": choice}]
                better = True
            _write(path, {**found, "measured": measured, "launch": launches})
        if better:
            weigh(op)
    return {"file": str(path), **tuned.read(gpu.name), "refused": refused}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")
    tuned.forget()


def _choices(
    op: str,
    spec: Spec,
    size: str,
    device: torch.device,
    timer: Timer,
    refused: list[dict[str, Any]],
) -> list[tuple[Asked, dict[str, Any]]]:
    """For each kernel of a call the fastest choice that gives right results, where it is worth writing down."""
    run = load(KERNELS[op].implementations[TRITON].where)
    inputs = rotated(spec, spec.large[size], device, DTYPE, run)
    with tuned.asked() as launched:
        inputs[0].both(run)
    chosen = []
    for asked in {a.kernel: a for a in launched}.values():
        best: dict[str, Any] = {}
        for name in asked.vary:  # one after another: all at once are hundreds
            tried = [
                c
                for c in candidates(asked, best, name)
                if _right(run, spec, size, asked.kernel, c, device, refused)
            ]
            best = _fastest(run, asked.kernel, [best, *tried], inputs, device, timer)[0]
        if best and _right_everywhere(op, spec, asked.kernel, best, device, refused):
            chosen += [(asked, best)] * (
                _fastest(run, asked.kernel, [{}, best], inputs, device, timer)[1] >= MIN_GAIN
            )
    return chosen


def _fastest(
    run: Callable[..., Any],
    kernel: str,
    choices: list[dict[str, Any]],
    inputs: list[Inputs],
    device: torch.device,
    timer: Timer,
) -> tuple[dict[str, Any], float]:
    """And how many times as fast as the first of them it is."""
    calls = {json.dumps(choice): _launched_so(run, kernel, choice) for choice in choices}
    seconds = timer(calls, inputs, device)
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return json.loads(best), median_ratio(seconds[json.dumps(choices[0])], seconds[best])


def _launched_so(
    run: Callable[..., Any], kernel: str, choice: Mapping[str, Any]
) -> Callable[[Inputs], object]:
    def call(inputs: Inputs) -> object:
        with tuned.forced(kernel, choice):
            return inputs.both(run)

    return call


def _tried(
    kernel: str, choice: Mapping[str, Any], call: Callable[[], T], refused: list[dict[str, Any]]
) -> T | None:
    """What the call gives with this choice; None where the compiler or the GPU refuses it, which is noted."""
    from triton.errors import TritonError

    try:
        with tuned.forced(kernel, choice):
            return call()
    except (TritonError, RuntimeError) as error:  # of LLVM, of the launch, of memory
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        refused.append({"kernel": kernel, "choice": dict(choice), "why": why})
        return None


def _right(
    run: Callable[..., Any],
    spec: Spec,
    size: str,
    kernel: str,
    choice: Mapping[str, Any],
    device: torch.device,
    refused: list[dict[str, Any]],
) -> bool:
    """Whether it gives what the heuristic choice does, in memory full of NaN. One that is refused is none."""
    sample = _sample(spec, spec.large[size], device)
    with _full_of_nan():
        found = _tried(kernel, choice, lambda: results(run, sample), refused)
        if found is None:
            return False
        with tuned.forced(kernel, {}):
            expected = results(run, sample)
    return all(deviation(a, b) <= _allowed(spec) for a, b in zip(found, expected, strict=True))


def _right_everywhere(
    op: str,
    spec: Spec,
    kernel: str,
    choice: Mapping[str, Any],
    device: torch.device,
    refused: list[dict[str, Any]],
) -> bool:
    """Whether every small size agrees with the reference in fp64: edges of tiles, one row, none."""
    run, reference = _both(op)

    def all_sizes() -> list[dict[str, float]]:
        return [deviations(run, reference, _sample(spec, size, device)) for size in spec.small.values()]

    with _full_of_nan():
        found = _tried(kernel, choice, all_sizes, refused)
    return found is not None and all(worst <= _allowed(spec) for each in found for worst in each.values())


def _both(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Our kernels, and the reference."""
    run, reference = (load(KERNELS[op].implementations[name].where) for name in (TRITON, REFERENCE))
    return run, reference


def _allowed(spec: Spec) -> float:
    return spec.tolerance[str(DTYPE).removeprefix("torch.")]


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
    run, reference = _both(op)
    speedups, saved = [], []
    for name, size in spec.large.items():
        sample = _sample(spec, size, device)
        with _full_of_nan():
            pairs = zip(results(run, sample), results(reference, sample), strict=True)
            worst = max(deviation(a, b) for a, b in pairs)
        if worst > 2 * _allowed(spec):  # both round
            raise ValueError(
                f"tune: {op} is WRONG here, off by {worst:.2g} of the largest value at {name}. Nothing is written of it"
            )
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
    for each in found["refused"]:
        lines.append(f"{each['kernel']:<34}{each['choice']} refused: {each['why']}")
    return "\n".join([*lines, f"written to {found['file']}: commit it"])
