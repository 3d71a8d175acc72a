"""Every Triton kernel, compiled by its real launcher for GPUs that are not here, at the sizes that models have."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from kernels import KERNELS, TRITON
from kernels.aot import Binary, ahead_of_time
from kernels.device import H100, Gpu
from kernels.spec import spec_of
from tests.kernels.offsets import narrow_products
from tests.kernels.samples import LAUNCHED
from tests.kernels.toys import added_kernel, doubled_kernel, sums_kernel
from trainer.commands.bench.ahead import GPUS, compiled

pytestmark = pytest.mark.slow
DOTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
FEW_ROWS = "HMMA"  # for tiles of fewer than 64
LARGE = [(op, size) for op in LAUNCHED for size in spec_of(op).large]


built = cache(compiled)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("op", "size"), LARGE)
def test_no_spills_and_wide_loads(op, size, gpu):
    binaries = built(op, size, gpu)
    assert binaries
    for binary in binaries:
        what = f"{op}, {size}: {binary}"
        assert binary.spilled == 0, f"{what} spills {binary.spilled} bytes"
        assert binary.shared <= gpu.shared_bytes, what
        assert KERNELS[op].implementations[TRITON].adds_in_any_order or not float_atomics(binary), what
        assert binary.has("LDG", "128") or binary.has("LDGSTS", "128") or binary.has("UTMALDG"), what
        if binary.kernel in spec_of(op).dots:
            narrow = binary.kernel in spec_of(op).narrow.get(size, ())
            assert binary.has(FEW_ROWS if narrow else DOTS[gpu.name]), what


def float_atomics(binary: Binary) -> list[str]:
    """Instructions that add floats to memory in whatever order programs come: two runs differ."""
    adds = (i for i in binary.instructions if re.match(r"(RED|ATOM)[GS]?\.", i) and ".ADD" in i)
    return [i for i in adds if re.search(r"\.B?F(16|32|64)", i)]


def test_an_addition_in_any_order_is_noticed():
    with ahead_of_time(H100) as binaries:
        added_kernel[(6,)](*(torch.empty(n, device="meta") for n in (6 * 16, 16)), BLOCK=16)
    assert float_atomics(binaries[0])


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_wide_rows_fit_where_shared_memory_is_small(op):
    ada = Gpu((8, 9), 128, 99 * 1024)
    (wide,) = (size for size in spec_of(op).large if "8,192 x 8,192" in size)
    assert all(binary.shared <= ada.shared_bytes for binary in compiled(op, wide, ada))


@pytest.mark.parametrize(("op", "size"), LARGE)
def test_offsets_have_64_bits(op, size):
    """A view of a fused projection has the whole projection between its rows: rows times stride outgrow 31 bits."""
    for binary in built(op, size, H100):
        assert not narrow_products(binary.ttir), binary.kernel


@pytest.mark.parametrize(("op", "size"), LARGE)
def test_gradients_in_fp32_beside_bf16(op, size):
    """Operands of unlike number formats fail only when they are compiled."""
    assert all(binary.spilled == 0 for binary in built(op, size, H100, wide_results=True))


def test_a_product_in_32_bits_is_noticed():
    x, out = (torch.empty(n, device="meta") for n in (6 * 4096, 6))
    with ahead_of_time(H100) as binaries:
        for wide in (True, False):
            sums_kernel[(6,)](x, out, 5, 4096, WIDE=wide, BLOCK=8, FILLED=True)
        doubled_kernel[(3,)](x, out, 10, BLOCK=4, STEP=4, MASKED=True)
    assert [len(narrow_products(b.ttir)) for b in binaries] == [
        0,
        1,
        0,
    ]  # number of a tile times its size is no offset
