"""What the harness is there to notice: kernels that are wrong in ways that the interpreter by itself hides."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpret import interpreted, poisoned
from tests.kernels.samples import rows_far_apart
from tests.kernels.toys import doubled_kernel, sums_kernel

ROWS, WIDTH = 6, 5


def sums(x, wide=True, filled=True):
    out = torch.empty(ROWS)
    with interpreted():
        sums_kernel[(ROWS,)](x, out, WIDTH, x.stride(0), WIDE=wide, BLOCK=8, FILLED=filled)
    return out


def doubled(step=4, programs=3, masked=True):
    x = torch.arange(10.0)
    with interpreted(), poisoned():
        out = torch.empty(10)
        doubled_kernel[(programs,)](x, out, 10, BLOCK=4, STEP=step, MASKED=masked)
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
