"""Every operation of the table: which implementation `auto` takes on each device, whether it is right there, and why
the others are not taken."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainer.doctor.lines import Line, note, ok, problem, said_by, tried

if TYPE_CHECKING:
    import torch

__all__ = ["check"]


def check() -> Iterator[Line]:
    import torch

    from kernels import KERNELS

    yield from tried("C++ compiler", _compiler)
    yield from tried("triton", _triton, torch.cuda.is_available())
    devices = [torch.device("cpu")]
    capabilities = set()
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if (capability := torch.cuda.get_device_capability(index)) not in capabilities:
            capabilities.add(capability)  # of several of a kind one
            devices.append(torch.device("cuda", index))
    for device in devices:
        for op in KERNELS:
            yield from tried(f"{op} on {device}", _operation, op, device)


def _compiler() -> Line:
    from kernels import KERNELS, cpp

    sources = sorted(
        {way.source for kernel in KERNELS.values() for way in kernel.implementations.values() if way.source}
    )
    missing = {source: why for source in sources if (why := cpp.missing(source))}
    if not missing:
        return ok("C++ compiler", f"{cpp.compiler()}, compiles all {len(sources)} sources of kernels")
    for_all = next(iter(missing.values()))
    text = for_all if len(set(missing.values())) == 1 else "; ".join(missing.values())
    remedy = "apt install g++, or CXX=<path of a compiler>: mamba's steps take several times as long without"
    return problem("C++ compiler", text, remedy)


def _triton(wanted: bool) -> Line:
    install = f'{sys.executable} -m pip install "triton>=3.6,<3.8"'
    if importlib.util.find_spec("triton") is None:
        text = "not installed; kernels for GPUs need it, and torch with CUDA brings it"
        return problem("triton", text, install) if wanted else note("triton", text)
    try:
        import triton
    except Exception as error:  # torch imports it where it is there
        remedy = f"{install} --force-reinstall, or without a GPU: {sys.executable} -m pip uninstall triton"
        return problem("triton", f"cannot be imported: {said_by(error)}", remedy)
    return ok("triton", str(triton.__version__))


def _operation(op: str, device: torch.device) -> Line:
    """On a small call of its tests, in the number format of runs there."""
    import torch

    from kernels import KERNELS
    from kernels.choose import Call, Kernels
    from kernels.spec import spec_of
    from trainer.commands.bench.sides import WRONG, right_sides, sides_of
    from trainer.precision import choose_precision

    precision, _ = choose_precision("auto", device)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ways = KERNELS[op].implementations
    spec = spec_of(op)
    assert spec is not None, op
    call = Call(device, dtype, **_known(spec))
    taken, why = Kernels().foresee(op, call)
    sides, left_out = sides_of(op, device, dtype, spec, compiled=False)
    sides = [side for side in sides if side.name in ways]
    sample = spec.sample(next(iter(spec.small.values())), device, dtype, torch.Generator().manual_seed(0))
    right, remarks = right_sides(op, sides, spec, sample, dtype)
    wrong = {name: said for name, said in remarks.items() if said.startswith(WRONG)}
    others = {
        name: Kernels().lacking(op, name, call) or left_out.get(name, "") for name in ways if name != taken
    }
    why_not = [f"{name}: {wrong.get(name) or said or 'runs too'}" for name, said in others.items()]
    text = f"{taken} ({why.removeprefix('auto: ')})"
    if why_not:
        text += f"; not taken: {', '.join(why_not)}"
    about = f"{op} on {device}"
    if wrong:
        instead = next((side.name for side in right), "reference")
        said = ", ".join(f"{name} is {what}" for name, what in wrong.items())
        return problem(about, f"{said}; {text}", f"kernels.{op}={instead} avoids it; please report it")
    return ok(about, text)


def _known(spec: Any) -> dict[str, Any]:
    """What the rule of choice looks at, of a call as it occurs in models."""
    import torch

    size = next(iter(spec.large.values()))
    known = spec.sample(size, torch.device("meta"), torch.float32, torch.Generator()).known
    logits = size.get("vocabulary") or size.get("states")
    columns = logits or size.get("width") or size.get("columns") or size.get("channels") or size.get("inputs")
    rows = {"rows": int(size["rows"])} if "vocabulary" in size else {}
    return {**rows, "columns": int(columns or 1), **known}
