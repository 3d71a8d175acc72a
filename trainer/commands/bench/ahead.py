"""`bench kernels --aot`: what compilers make of our kernels, for GPUs that are not here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from kernels import KERNELS, TRITON
from kernels.against import gradients
from kernels.aot import Binary, ahead_of_time
from kernels.device import A100, B200, H100, Gpu
from kernels.spec import Sample, spec_of
from naming import load

__all__ = ["GPUS", "compiled", "compiled_table", "report"]

GPUS = (A100, H100, B200)
# What is looked for in a binary: copies of 128 bits, asynchronous ones, those of the tensor memory accelerator, tensor
# cores by generation, atomics.
NOTABLE = (
    ("LDG", "128"),
    ("STG", "128"),
    ("LDGSTS", "128"),
    ("UTMALDG",),
    ("HMMA",),
    ("HGMMA",),
    ("UTCHMMA",),
    ("RED",),
    ("ATOMG",),
)


def compiled(
    op: str, size: str, gpu: Gpu, dtype: torch.dtype = torch.bfloat16, *, wide_results: bool = False
) -> list[Binary]:
    """Forward and backward of our kernels in `dtype`; with `wide_results` in fp32 where a call chooses, and so are
    upstream gradients."""
    spec = spec_of(op)
    assert spec is not None
    with ahead_of_time(gpu) as binaries:
        sample = spec.sample(spec.large[size], torch.device("meta"), dtype, torch.Generator())
        if wide_results:
            options = sample.options.items()
            wide = {name: torch.float32 if isinstance(v, torch.dtype) else v for name, v in options}
            sample = Sample(sample.tensors, wide)
        outputs = sample.call(load(KERNELS[op].implementations[TRITON].where))
        gradients(outputs, sample, [torch.empty_like(y) for y in outputs if y.requires_grad])
    return binaries


def compiled_table(
    ops: list[str], dtypes: list[torch.dtype], tell: Callable[[str], object]
) -> list[dict[str, Any]]:
    """One row for each kernel, size, dtype and GPU."""
    if find_spec("triton") is None:
        raise ValueError("aot: Triton, which compiles them, is not installed. On Linux: pip install triton")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for op in ops:
        spec = spec_of(op)
        if spec is None or TRITON not in KERNELS[op].implementations:
            continue
        for size, dtype, gpu in itertools.product(spec.large, dtypes, GPUS):
            name = str(dtype).removeprefix("torch.")
            tell(f"compiling {op}, {size}, {name}, for {gpu.name}")
            for binary in compiled(op, size, gpu, dtype):
                row = _row(op, size, name, binary)
                found[tuple(map(str, row.values()))] = row  # launched again alike: once
    return list(found.values())


def _row(op: str, size: str, dtype: str, binary: Binary) -> dict[str, Any]:
    return {
        "op": op,
        "size": size,
        "dtype": dtype,
        "kernel": binary.kernel,
        "gpu": binary.gpu.name,
        "registers": binary.registers,
        "spilled_bytes": binary.spilled,
        "shared_bytes": binary.shared,
        "warps": binary.warps,
        "instructions": [".".join(parts) for parts in NOTABLE if binary.has(*parts)],
    }


def report(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<30}{'':<8}{'registers':>10}{'spilled':>9}{'shared':>10}{'warps':>7}  instructions"]
    last = ""
    for row in rows:
        head = f"{row['op']} · {row['size']} · {row['dtype']}"
        if head != last:
            lines.append(head)
            last = head
        lines.append(
            f"  {row['kernel']:<28}{row['gpu']:<8}{row['registers']:>10}{row['spilled_bytes']:>9}"
            f"{row['shared_bytes']:>10,}{row['warps']:>7}  {' '.join(row['instructions'])}"
        )
    return "\n".join(lines)
