"""Every Triton kernel, compiled by its real launcher for GPUs that are not here, at the sizes that models have."""

from __future__ import annotations

import pytest
import torch

from kernels import KERNELS, TRITON
from kernels.aot import Binary, ahead_of_time
from kernels.device import A100, B200, H100, Gpu
from kernels.spec import spec_of
from naming import load
from tests.kernels.test_triton import OPERATIONS

DOTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


def compiled(op: str, size: str, gpu: Gpu, dtype: torch.dtype) -> list[Binary]:
    """Forward and backward, the upstream gradient in fp32, as autocast may hand it down."""
    spec, meta = spec_of(op), torch.device("meta")
    with ahead_of_time(gpu) as binaries:
        sample = spec.sample(spec.large[size], meta, dtype, torch.Generator())
        outputs = sample.call(load(KERNELS[op].implementations[TRITON].where))
        dy = [torch.empty_like(y) for y in outputs if y.requires_grad]
        torch.autograd.grad([y for y in outputs if y.requires_grad], list(sample.differentiable.values()), dy)
    return binaries


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [A100, H100, B200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("op", "size"), [(op, size) for op in OPERATIONS for size in spec_of(op).large])
def test_no_spills_and_wide_loads(op, size, gpu):
    binaries = compiled(op, size, gpu, torch.bfloat16)
    assert binaries
    for binary in binaries:
        what = f"{op}, {size}: {binary}"
        assert binary.spilled == 0, f"{what} spills {binary.spilled} bytes"
        assert binary.shared <= gpu.shared_bytes, what
        assert binary.has("LDG", "128") or binary.has("LDGSTS", "128") or binary.has("UTMALDG"), what
        if binary.kernel in spec_of(op).dots:
            assert binary.has(DOTS[gpu.name]) or any(DOTS[gpu.name] in i for i in binary.instructions), what
