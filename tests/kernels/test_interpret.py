"""What the harness is there to notice: kernels that are wrong in ways that the interpreter by itself hides."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

from tests.kernels.interpret import interpreted, poisoned  # noqa: E402
from tests.kernels.samples import rows_far_apart  # noqa: E402

ROWS, WIDTH = 6, 5


@triton.jit
def _sums(x, out, width, stride, WIDE: tl.constexpr, BLOCK: tl.constexpr, FILLED: tl.constexpr):
    """Sums of rows, with an offset in 32 bits, or a load of lanes that hold nothing."""
    row = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    column = tl.arange(0, BLOCK)
    if FILLED:
        values = tl.load(x + row * stride + column, mask=column < width, other=0.0)
    else:
        values = tl.load(x + row * stride + column, mask=column < width)
    tl.store(out + row, tl.sum(values, 0))


@triton.jit
def _doubled(x, out, numel, BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    """Blocks that overlap where STEP < BLOCK, leave gaps where it is larger, and end behind the tensor."""
    at = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    mask = (at < numel) | (not MASKED)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < numel, other=0.0), mask=mask)


def sums(x, wide=True, filled=True):
    out = torch.empty(ROWS)
    with interpreted():
        _sums[(ROWS,)](x, out, WIDTH, x.stride(0), WIDE=wide, BLOCK=8, FILLED=filled)
    return out


def doubled(step=4, programs=3, masked=True):
    x = torch.arange(10.0)
    with interpreted(), poisoned():
        out = torch.empty(10)
        _doubled[(programs,)](x, out, 10, BLOCK=4, STEP=step, MASKED=masked)
    return x, out


def drawn():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def test_right_kernels_are_right():
    x = drawn()
    torch.testing.assert_close(sums(x), x.sum(1))
    torch.testing.assert_close(sums(rows_far_apart(x)), x.sum(1))
    x, out = doubled()
    assert torch.equal(out, 2 * x)


def test_offsets_that_wrap():
    with pytest.raises(Exception, match="would load outside of its tensors"):
        sums(rows_far_apart(drawn()), wide=False)


def test_lanes_that_hold_nothing():
    assert sums(drawn(), filled=False).isnan().all()


def test_two_programs_that_store_to_one_address():
    with pytest.raises(Exception, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) store to one address"):
        doubled(step=3)


def test_a_tile_past_the_end():
    with pytest.raises(Exception, match="would store outside of its tensors"):
        doubled(masked=False)


def test_what_is_not_written():
    _, out = doubled(programs=2)
    assert out[8:].isnan().all() and not out[:8].isnan().any()
