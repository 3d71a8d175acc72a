"""`bench kernels`: every operation as we compute it, as its definition does, compiled, and as others do.

All sides of one operation take turns in one process, on fresh random inputs that are put back before every call, after
each was held against the reference in fp64. The same side twice says what of a difference is noise. With
`newton_schulz` goes a whole step of the optimizer that it is for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kernels import KERNELS
from kernels.spec import Size, Spec, spec_of
from naming import not_one_of
from trainer.commands.bench import ahead, measure, optimizer, plot, tune
from trainer.commands.bench.ceilings import ceilings
from trainer.commands.bench.sides import AGAIN, WRONG, right_sides, sides_of
from trainer.commands.bench.turns import median_ratio
from trainer.distributed import choose_device
from trainer.precision import choose_precision
from trainer.run.files import output_file, write_atomically
from trainer.run.manifest import collect_environment
from trainer.view.console import Console

__all__ = ["main"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TURNS = 20  # by default
NOT_WITH = {  # of another kind of work the options that say nothing there
    "aot": ("tune", "device", "turns", "no_compile", "plot"),
    "tune": ("dtype", "turns", "no_compile", "plot"),
}
PACKAGES = ("triton", "liger-kernel", "fla-core", "flash-attn", "mamba-ssm", "causal-conv1d")


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    _refuse_what_says_nothing(args)
    ops = _chosen("ops", args.ops, _measurable())
    output = output_file(args.output) if args.output else None
    picture = plot.picture_file(args.plot) if args.plot else None
    if args.turns is not None and args.turns < 2:
        raise ValueError(f"turns: must be at least 2, got {args.turns}")
    if args.aot:
        dtypes = [DTYPES[name] for name in _chosen("dtype", args.dtype, list(DTYPES), "bf16")]
        result: dict[str, Any] = {
            "ahead_of_time": _shown("compiling", lambda tell: ahead.compiled_table(ops, dtypes, tell))
        }
        report = ahead.report(result["ahead_of_time"])
    else:
        device = choose_device(args.device or "auto")
        names = _chosen("dtype", args.dtype, list(DTYPES), "bf16" if device.type == "cuda" else "fp32,bf16")
        result = {"environment": {**collect_environment(device), "packages": _packages()}}
        if args.tune:
            result["tuned"] = _shown(
                "tuning", lambda tell: tune.tune(ops, device, result["environment"], tell)
            )
            report = tune.report(result["tuned"])
        else:
            result |= _shown("measuring", lambda tell: _measure(args, ops, names, device, tell))
            report = _report(result)
    if output:  # before anything is printed: whoever reads that may leave
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    if picture:
        plot.draw(result, picture)
    print(report)
    measured = [*result.get("operations", []), result.get("muon_step", {"remarks": {}})]
    remarks = [why for each in measured for why in each["remarks"].values()]
    return int(any(why.startswith(WRONG) for why in remarks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py bench kernels",
        description="Operations of kernels/: ours, the definition, compiled, and other libraries', in turns.",
    )
    parser.add_argument("--ops", help=f"some of {','.join(_measurable())}")
    parser.add_argument("--dtype", help=f"some of {','.join(DTYPES)}; bf16 on a GPU, fp32,bf16 on a CPU")
    parser.add_argument("--device", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--turns", type=int, help=f"measured calls of each side, {TURNS}")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled reference")
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument(
        "--plot", help="draw shares of the ceiling into this file, .png or .svg (needs matplotlib)"
    )
    parser.add_argument(
        "--aot", action="store_true", help="compile for sm_80, sm_90, sm_100; no GPU is needed"
    )
    parser.add_argument(
        "--tune", action="store_true", help="find launch choices for this GPU, into kernels/tuned/"
    )
    return parser


def _measurable() -> list[str]:
    return [op for op in KERNELS if spec_of(op) is not None]


def _refuse_what_says_nothing(args: argparse.Namespace) -> None:
    for work, others in NOT_WITH.items():
        given = [f"--{name}" for name in others if getattr(args, name) not in (None, False)]
        if getattr(args, work) and given:
            raise ValueError(f"{work}: {', '.join(given)} would have no effect beside --{work}; leave it out")


def _small_one_like(size: Size, spec: Spec) -> Size:
    """Of those that a CPU can time the first that shares most of what is no number, such as the kind of mask."""

    def shared(other: Size) -> int:
        return sum(
            isinstance(value, (str, bool)) and size.get(name) == value for name, value in other.items()
        )

    return max(spec.timed_on_cpu.values(), key=shared)


def _chosen(field: str, given: str | None, allowed: list[str], default: str | None = None) -> list[str]:
    names = (given or default or ",".join(allowed)).split(",")
    for name in names:
        if name not in allowed:
            raise ValueError(f"{field}: {not_one_of(name, allowed)}")
    return names


def _shown(what: str, work: Callable[[Callable[[str], object]], Any]) -> Any:
    with Console(live=False, stream=sys.stderr).doing(f"{what} kernels") as tell:
        return work(tell)


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _measure(
    args: argparse.Namespace,
    ops: list[str],
    dtypes: list[str],
    device: torch.device,
    tell: Callable[[str], object],
) -> dict[str, Any]:
    best = {name: ceilings(device, DTYPES[name]) for name in dtypes}
    native = device.type != "cpu" or choose_precision("auto", device)[0] == "bf16"
    found = []
    for op in ops:
        spec = spec_of(op)
        assert spec is not None
        for size in spec.timed_on_cpu if device.type == "cpu" else spec.large:
            for name in dtypes:
                tell(f"measuring {op}, {size}, {name}")
                emulated = name == "bf16" and not native
                row = _operation(op, spec, size, DTYPES[name], device, best[name], args)
                found.append({"op": op, "size": size, "dtype": name, "emulated": emulated, **row})
    result = {"ceilings": best, "operations": found}
    if "newton_schulz" in ops:
        tell("measuring a step of Muon")
        result["muon_step"] = optimizer.muon_step(device, args.turns or TURNS)
    return result


def _operation(
    op: str,
    spec: Spec,
    size: str,
    dtype: torch.dtype,
    device: torch.device,
    best: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    sizes = spec.timed_on_cpu if device.type == "cpu" else spec.large
    turns = args.turns or TURNS
    sides, left_out = sides_of(op, device, dtype, spec, not args.no_compile)
    checked = _small_one_like(sizes[size], spec)  # fp64 with all logits has to fit
    sample = spec.sample(checked, device, dtype, torch.Generator().manual_seed(1))
    sides, remarks = right_sides(op, sides, spec, sample, dtype)
    inputs = measure.rotated(spec, sizes[size], device, dtype, sides[0].run)
    seconds = measure.compare(sides, inputs, turns, device)
    graphs = measure.graph_seconds(sides, inputs, turns, device) if device.type == "cuda" else {}
    rows = measure.figures(spec, sizes[size], dtype, seconds, best)
    for side in sides:
        if side.name != AGAIN:
            rows[side.name]["peak_bytes"] = measure.peak_bytes(side, inputs[0], device)
            rows[side.name]["graph_seconds"] = graphs.get(side.name)
    noise = abs(median_ratio(seconds["both"]["reference"], seconds["both"][AGAIN]) - 1)
    return {"noise": noise, "sides": rows, "remarks": left_out | remarks}


def _report(result: dict[str, Any]) -> str:
    e = result["environment"]
    lines = [f"{e['device']}, {e['threads']} threads, torch {e['torch']}, load average {e['load_average']}"]
    for name, best in result["ceilings"].items():
        gigabytes, teraflops = best["bytes_per_second"] / 1e9, best["flops_per_second"] / 1e12
        lines.append(f"at best {gigabytes:,.1f} GB/s (a copy), {teraflops:,.3f} TFLOP/s (a product, {name})")
    for each in result["operations"]:
        lines += ["", *_table(each)]
    if "muon_step" in result:
        lines += ["", *optimizer.report(result["muon_step"])]
    return "\n".join([*lines, "", LEGEND])


COLUMNS = (
    "fwd ms",
    "fwd ceiling",
    "bwd ms",
    "bwd ceiling",
    "all ms",
    "graph ms",
    "GB/s",
    "TFLOP/s",
    "ceiling",
    "MiB",
    "x reference",
    "x compiled",
    "x best peer",
)


LEGEND = """\
fwd: forward; bwd: what backward adds; both blank where gradients are computed in the forward pass, as its time compares
with no other's; all, and what stands right of it: forward and backward; graph: the same without launches, replayed
ceiling: the time that moving the least bytes or computing the least FLOPs takes at best, over the time taken; beyond
100 % something came from a cache
MiB: held at most beside the inputs; x: so many times as fast as that side, by turns"""


def _table(each: dict[str, Any]) -> list[str]:
    emulated = " (emulated: this CPU has no bf16)" if each["emulated"] else ""
    head = f"{each['op']} · {each['size']} · {each['dtype']}{emulated} · the same twice differs by {each['noise']:.1%}"
    rows = {name: _cells(side) for name, side in each["sides"].items()}
    shown = [i for i in range(len(COLUMNS)) if any(cells[i] for cells in rows.values())]
    widths = {i: max(len(COLUMNS[i]), *(len(cells[i]) for cells in rows.values())) for i in shown}
    lines = [head, " " * 22 + "  ".join(COLUMNS[i].rjust(widths[i]) for i in shown)]
    for name, cells in rows.items():
        lines.append(f"  {name:<20}" + "  ".join(cells[i].rjust(widths[i]) for i in shown))
    return [*lines, *(f"  {name:<20}{why}" for name, why in each["remarks"].items())]


def _cells(side: dict[str, Any]) -> list[str]:
    both, graph = side["both"], side["graph_seconds"]

    def times(name: str) -> str:
        return f"{side[name]:.2f}" if name in side else ""

    def part(name: str) -> tuple[str, str]:
        if name not in side:
            return "", ""
        return f"{1e3 * side[name]['seconds']:.3f}", f"{side[name]['share_of_ceiling']:.0%}"

    return [
        *part("forward"),
        *part("backward"),
        f"{1e3 * both['seconds']:.3f}",
        f"{1e3 * graph:.3f}" if graph else "",
        f"{both['bytes_per_second'] / 1e9:,.1f}",
        f"{both['flops_per_second'] / 1e12:,.3f}",
        f"{both['share_of_ceiling']:.0%}",
        f"{side['peak_bytes'] / 2**20:,.1f}",
        times("times_reference"),
        times("times_compiled_reference"),
        times("times_best_peer"),
    ]
