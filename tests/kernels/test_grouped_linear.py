"""The product of groups: what the generic tests of kernels do not ask."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.choose import Call, Kernels
from kernels.device import A100, B200, H100, as_if
from kernels.grouped_linear import by_groups, grouped_linear
from kernels.grouped_linear.grouped_mm import aligned
from kernels.spec import drawn
from tests.contract.test_devices import OnDevice
from tests.kernels.interpret import poisoned

CPU = torch.device("cpu")
LOOP, BY_GROUPS, AT_ONCE = EVERY = [
    Kernels({"grouped_linear": name}) for name in ("reference", "by_groups", "grouped_mm")
]


def call_of(ends=(3, 3, 10, 12), inputs=8, outputs=16, dtype=torch.float32, device=CPU):
    generator = torch.Generator().manual_seed(0)
    shapes = (ends[-1], inputs), (len(ends), outputs, inputs)
    x, weight = (drawn(*shape, device=device, dtype=dtype, generator=generator) for shape in shapes)
    return x, weight, torch.tensor(ends, dtype=torch.int32, device=device)


def test_every_row_meets_the_matrix_of_its_group():
    x, weight, ends = call_of()
    groups = [0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 3, 3]
    expected = torch.stack([weight[e] @ row for e, row in zip(groups, x, strict=True)])
    for kernels in EVERY:
        torch.testing.assert_close(grouped_linear(x, weight, ends, kernels), expected)


def test_a_cpu_takes_what_is_fastest_there_and_waits_for_nobody():
    by_groups = {"by_groups": "auto: group by group, in few shapes"}
    for dtype, expected in (
        (torch.float64, by_groups),
        (torch.float32, {"grouped_mm": "auto: all groups at once"}),
        (torch.bfloat16, by_groups),
    ):
        kernels = Kernels()
        grouped_linear(*call_of(dtype=dtype), kernels)
        assert kernels.used == {"grouped_linear": expected} and kernels.host_syncs == ()
    grouped_linear(*call_of(), kernels := Kernels({"default": "reference"}))
    assert kernels.host_syncs == ("_to_copy", "_local_scalar_dense")


@pytest.mark.parametrize("kernels", EVERY)
def test_operands_are_narrowed_under_autocast(kernels):
    x, weight, ends = call_of()
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, ends, kernels)
    narrow = grouped_linear(x.bfloat16(), weight.bfloat16(), ends, kernels)
    assert y.dtype == torch.bfloat16 and torch.equal(y, narrow)
    assert {g.dtype for g in torch.autograd.grad(y.float().sum(), (x, weight))} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", EVERY)
def test_the_gradient_of_a_matrix_that_no_row_chose_is_0(kernels, dtype):
    """Also of all at once, where there is no row."""
    for ends in ((3, 3, 10), (0, 0, 0)):
        x, weight, ends = call_of(ends, dtype=dtype)
        used = ends.diff(prepend=ends.new_zeros(1)) > 0
        (gradient,) = torch.autograd.grad(grouped_linear(x, weight, ends, kernels).sum(), weight)
        assert torch.equal(gradient.abs().amax((1, 2)) > 0, used)


@pytest.mark.parametrize("outputs", [16, 9])
def test_rubbish_for_a_group_without_rows_is_not_handed_on(monkeypatch, outputs):
    """As on a B200 (pytorch#172439)."""
    original = torch.nn.functional.grouped_mm

    def spoiled(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        y = original(a, b, offs=offs)
        if b.ndim == 2:
            y[1] = torch.nan
        return y

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", spoiled)
    x, weight, ends = call_of(outputs=outputs)
    (gradient,) = torch.autograd.grad(grouped_linear(x, weight, ends, AT_ONCE).sum(), weight)
    assert gradient.isfinite().all() and torch.equal(gradient[1], torch.zeros_like(gradient[1]))


@pytest.mark.parametrize(
    ("where", "kernels"),
    [("cpu", BY_GROUPS), ("cpu", AT_ONCE), pytest.param("cuda", Kernels(), marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("outputs", [16, 9])
def test_memory_that_held_nan_reaches_no_gradient(where, kernels, outputs):
    """Blocks are filled and freed before each of three passes; one group is empty."""
    x, weight, ends = call_of(outputs=outputs, dtype=torch.bfloat16, device=torch.device(where))
    for _ in range(3):
        blocks = [torch.full((size, 16), torch.nan, dtype=x.dtype, device=where) for size in (8, 64, 512)]
        del blocks
        with poisoned() if where == "cpu" else nullcontext():
            y = grouped_linear(x, weight, ends, kernels)
            found = y, *torch.autograd.grad(y.float().sum(), (x, weight))
        assert all(t.isfinite().all() for t in found) and not found[2][1].any()


def test_rows_behind_the_last_group_are_ours_to_prevent():
    x, weight, ends = call_of()
    for kernels in EVERY:
        with pytest.raises(AssertionError, match="row 11 of 12"):
            grouped_linear(x, weight, ends.clamp(max=11), kernels)


def test_what_does_not_fit_is_refused():
    x, weight, ends = call_of()
    for args in ((x[:, :7], weight, ends), (x, weight, ends[:3]), (x[None], weight, ends)):
        with pytest.raises(ValueError, match="are needed, got shapes"):
            grouped_linear(*args, Kernels())
    with pytest.raises(ValueError, match="int32, got torch.int64"):
        grouped_linear(x, weight, ends.long(), Kernels())


def test_operations_are_counted():
    """2 M K N of the forward, and twice that behind it: whatever the groups are."""
    x, weight, ends = call_of()
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x, weight, ends, AT_ONCE).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 8 * 16


def test_only_the_loop_waits_for_the_device():
    x, weight, ends = call_of(device=torch.device("meta"))
    with OnDevice("meta"):
        grouped_linear(x, weight, ends, Kernels()).sum().backward()
        with pytest.raises(AssertionError, match="fetched from the device"):
            grouped_linear(x, weight, ends, LOOP)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        grouped_linear(*call_of(), LOOP)


@pytest.mark.parametrize(
    ("gpu", "dtype", "name", "why"),
    [
        (H100, torch.bfloat16, "grouped_mm", "auto: all groups at once"),
        (B200, torch.bfloat16, "grouped_mm", "auto: all groups at once"),
        (
            H100,
            torch.float16,
            "reference",
            "on a GPU torch has kernels of it in bfloat16, and this is float16",
        ),
        (
            A100,
            torch.bfloat16,
            "reference",
            "torch has kernels of it for sm_90 and sm_100, and this is sm_80",
        ),
    ],
)
def test_a_gpu_takes_it_where_torch_has_a_kernel(gpu, dtype, name, why):
    with as_if(gpu):
        found = Kernels().foresee("grouped_linear", Call(torch.device("cuda"), dtype, columns=64))
    assert found[0] == name and found[1].endswith(why)


@pytest.mark.parametrize(
    ("t", "copied"),
    [
        (torch.zeros(6, 8), False),
        (torch.zeros(8, 6).mT, True),  # columns of 24 bytes
        (torch.zeros(8, 8).mT, False),
        (torch.zeros(3, 8, 12)[..., :5], False),
        (torch.zeros(3, 8, 12).mT, False),
        (torch.zeros(6, 7), True),
        (torch.zeros(6, 1), True),
        (torch.zeros(1, 1).expand(6, 8), True),
        (torch.zeros(49)[1:].view(6, 8), True),  # from an address that is no multiple of 16
    ],
)
def test_what_is_read_as_it_lies(t, copied):
    found = aligned(t)
    assert (found.data_ptr() != t.data_ptr()) == copied and torch.equal(found, t)
    assert found.data_ptr() % 16 == 0 and min(found.stride()[-2:]) == 1
    assert all(stride % 4 == 0 for stride in found.stride() if stride != 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_any_size_on_a_cpu_are_as_their_own_products(dtype):
    """Also where the rows of a group are filled up: what lies behind it, even NaN, does not get in."""
    sizes = [0, 1, 64, 65, 0, 130, 3]
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(sizes), n, generator=generator).to(dtype) for n in (8, 16))
    weight = torch.randn(len(sizes), 16, 8, generator=generator).to(dtype)
    x[66] = torch.nan  # a row of the fourth group
    y, outer = by_groups.multiply(x, weight, ends), by_groups.multiply_outer(dy, x, ends)
    for group, (end, size) in enumerate(zip(ends.tolist(), sizes, strict=True)):
        rows = slice(end - size, end)
        tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(y[rows], x[rows] @ weight[group].mT, equal_nan=True, **tolerance)
        torch.testing.assert_close(outer[group], dy[rows].mT @ x[rows], equal_nan=True, **tolerance)
    assert y.isnan().any(1).sum() == 1
