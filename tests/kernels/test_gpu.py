"""Every implementation of every operation on a GPU, by what its SPEC says, against the plain one in fp64.

The bodies run on a CPU too, at the first size of each, in the slow tier: so that their own mistakes are found without
a GPU. There Triton is interpreted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import cache
from typing import Any

import pytest
import torch

from kernels import CHUNKED, KERNELS, REFERENCE, TRITON
from kernels.against import deviations
from kernels.attention import Visible, attention, plan_attention
from kernels.choose import Call, Kernels
from kernels.device import gpu_of
from kernels.spec import Sample, Size, spec_of
from kernels.tuned import forced, read
from naming import load
from tests.kernels.interpret import interpreted
from tests.kernels.memory import guarded
from tests.kernels.samples import asked_by

HALF, SINGLE = torch.bfloat16, torch.float32
gpu = pytest.mark.gpu
EVERY = [(op, name) for op, kernel in KERNELS.items() if spec_of(op) for name in kernel.implementations]
OURS = [op for op, name in EVERY if name == TRITON]
FIRST = [pytest.param("cpu", *way, None, SINGLE, marks=pytest.mark.slow) for way in EVERY]
SMALL = [
    pytest.param("cuda", op, name, size, dtype, marks=gpu)
    for op, name in EVERY
    for size in spec_of(op).small
    for dtype in (SINGLE, torch.float16, HALF)
]


@pytest.fixture(autouse=True)
def room_for_others():
    """What a test took of the GPU's memory is not kept from other processes."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def refusal(op: str, name: str, sample: Sample, device: torch.device, dtype: torch.dtype) -> str:
    """Why the implementation cannot run this call; "" if it can."""
    return Kernels().lacking(op, name, Call(device, dtype, **sample.known))


def check(op: str, name: str, size: Size, where: str, dtype: torch.dtype) -> None:
    spec, device = spec_of(op), torch.device(where)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op} {size}".encode()))
    sample = spec.sample(size, device, dtype, generator)
    ways = KERNELS[op].implementations
    if missing := refusal(op, name, sample, device, dtype):
        pytest.skip(missing)
    # Chunks are exact, and whole logits of large sizes in fp64 fit into no GPU.
    plain = CHUNKED if CHUNKED in ways and name != CHUNKED else REFERENCE
    found = deviations(load(ways[name].where), load(ways[plain].where), sample)
    allowed = spec.tolerance[str(dtype).removeprefix("torch.")]
    wrong = {what: off for what, off in found.items() if not off <= allowed}
    assert found and not wrong, f"allowed {allowed}"


@pytest.mark.parametrize(("where", "op", "name", "size", "dtype"), [*FIRST, *SMALL])
def test_small_sizes(where, op, name, size, dtype):
    sizes = spec_of(op).small
    with guarded(), interpreted() if where == "cpu" else nullcontext():
        check(op, name, sizes[size or next(iter(sizes))], where, dtype)


@gpu
@pytest.mark.parametrize(
    ("op", "name", "size"), [(*way, size) for way in EVERY for size in spec_of(way[0]).large]
)
def test_sizes_of_models(op, name, size):
    if name == REFERENCE and CHUNKED in KERNELS[op].implementations:
        pytest.skip("all logits at once are what the other implementations are there to avoid")
    check(op, name, spec_of(op).large[size], "cuda", HALF)


@cache
def launched_by(op: str) -> set[str]:
    """Kernels that the operation launches, by the names of their launch choices."""
    return {asked.kernel for asked in asked_by(op, next(iter(spec_of(op).small)))}


def choices(where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kernel, launch choice) of all that was committed for this GPU; on a CPU two that stand in for them."""
    if where == "cpu":
        yield "row_norm.forward", {"ROWS": 2}
        yield "newton_schulz.symmetric", {"BLOCK": 16, "BLOCK_K": 16}
        return
    table = read(gpu_of(torch.device(where)).name).get("launch", {})
    yield from ((kernel, entry["choice"]) for kernel, entries in table.items() for entry in entries)


@pytest.mark.parametrize(
    "where", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=gpu)]
)
def test_every_launch_choice_of_the_table_is_right(where):
    for kernel, choice in choices(where):
        users = [op for op in OURS if kernel in launched_by(op)]
        assert users, f"nothing launches {kernel}"
        for op in users:
            for size in [*spec_of(op).small][: 1 if where == "cpu" else None]:
                with ExitStack() as stack:
                    stack.enter_context(guarded())
                    stack.enter_context(forced(kernel, choice))
                    if where == "cpu":
                        stack.enter_context(interpreted())
                    check(op, TRITON, spec_of(op).small[size], where, SINGLE if where == "cpu" else HALF)


@pytest.mark.slow
def test_a_wrong_launch_choice_would_be_found(monkeypatch):
    monkeypatch.setitem(globals(), "choices", lambda where: [("row_norm.forward", {"WIDTH": 4})])
    with pytest.raises(AssertionError):
        test_every_launch_choice_of_the_table_is_right("cpu")


@gpu
@pytest.mark.parametrize("op", OURS)
def test_no_offset_overflows(op):
    """As under TRITON_DEBUG=1: kernels are compiled with assertions that fail where integers overflow."""
    from triton import knobs

    with knobs.runtime.scope():
        knobs.runtime.debug = True
        for size in spec_of(op).small.values():
            check(op, TRITON, size, "cuda", HALF)
        torch.cuda.synchronize()  # where an assertion would be told


@gpu
def test_selected_attention_is_the_same_bit_for_bit():
    """Gradients of keys are sums over all who selected them, of which programs come in any order."""
    spec = spec_of("selected_attention")
    size = spec.large["8 x 4,096, 16 heads in 4 groups, documents"]
    sample = spec.sample(size, torch.device("cuda"), HALF, torch.Generator().manual_seed(0))
    run = load(KERNELS["selected_attention"].implementations[TRITON].where)

    def both() -> tuple[torch.Tensor, ...]:
        (o,) = sample.call(run)
        return o, *torch.autograd.grad(o.square().sum(), list(sample.differentiable.values()))

    first = both()
    for _ in range(3):
        assert all(map(torch.equal, both(), first))


@gpu
def test_a_stack_beyond_32_bits_is_multiplied():
    """2.1 thousand million numbers, in more matrices than the second axis of a grid has; the last one is compared."""
    from kernels.newton_schulz.triton import newton_schulz

    last = torch.randn(64, 512, device="cuda", dtype=HALF)
    stack = torch.zeros(2**16 + 1, 64, 512, device="cuda", dtype=HALF)
    stack[-1] = last
    options = {"coefficients": "classic", "steps": 2, "dtype": HALF}
    found = newton_schulz(stack, **options)[-1]
    assert torch.equal(found, newton_schulz(last[None], **options)[0])


@gpu
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_more_rows_than_a_grid_has(masked):
    """65,537 patches of 8 bytes, behind 4 of the patch before: the last one is compared."""
    rows, device = 2**16 + 1, torch.device("cuda")
    mask = torch.ones(rows, 1, 8, 12, dtype=torch.bool, device=device) if masked else None
    if mask is not None:
        mask[-1, ..., :4] = False
    tensors = [
        torch.randn(rows, 2, n, 32, device=device, dtype=HALF, requires_grad=True) for n in (8, 12, 12)
    ]

    def found(part: slice) -> list[torch.Tensor]:
        given = [t[part] for t in tensors]
        seen = None if mask is None else mask[part]
        visible = Visible(len(given[0]), 8, 12, device, causal=masked, mask=seen)
        plan = plan_attention(visible, dtype=HALF, heads=(2, 2), width=32, kernels=Kernels())
        y = attention(*given, plan)
        return [t[-1] for t in (y, *torch.autograd.grad(y.float().square().sum(), tensors))]

    for one, other in zip(found(slice(None)), found(slice(-1, None)), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        pytest.param("cpu", SINGLE, marks=pytest.mark.slow),
        pytest.param("cuda", HALF, marks=gpu),
        pytest.param("cuda", SINGLE, marks=gpu),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("name", ["auto", *KERNELS["attention"].implementations])
def test_attention_where_every_logit_is_far_below_zero(where, dtype, documents, name):
    """T = 704, all scores near -120: cuDNN with a mask made NaN of the queries' gradients (pytorch#196678)."""
    rows, heads, groups, length, width = 2, 4, 2, 704, 64
    device = torch.device(where)
    ids = offsets = None
    if documents:
        ids = (torch.arange(length, device=device) >= 300).long().expand(rows, length)
        offsets = torch.tensor([0, 300, 704, 1004, 1408], dtype=torch.int32, device=device)
    visible = Visible(rows, length, length, device, True, None, ids, offsets)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, n, length, width, generator=generator) / 16 for n in (heads, groups, groups))
    q, k = q + 960**0.5 / 8, k - 960**0.5 / 8  # products of -15 in each of 64 places, / sqrt(64): -120
    q, k, v = (t.to(device, dtype).requires_grad_() for t in (q, k, v))
    sample = Sample({"q": q, "k": k, "v": v}, {"visible": visible})
    if name != "auto" and (missing := refusal("attention", name, sample, device, dtype)):
        pytest.skip(missing)
    shape = {"heads": (heads, groups), "width": width}
    y = attention(
        q, k, v, plan_attention(visible, dtype=dtype, kernels=Kernels({"attention": name}), **shape)
    )
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    plain = plan_attention(visible, dtype=torch.float64, kernels=Kernels({"attention": REFERENCE}), **shape)
    wanted = attention(*exact, plain)
    dy = torch.randn(y.shape, generator=generator)
    grads = torch.autograd.grad(y, (q, k, v), dy.to(device, dtype))
    wanted_grads = torch.autograd.grad(wanted, exact, dy.to(device, torch.float64))
    scores = (exact[0][0, 0, 0] @ exact[1][0, 0, 0]).detach() / width**0.5
    assert -130 < scores.item() < -110
    for found, right in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        assert torch.isfinite(found).all()
        # Gradients of scores are rounded by 2^-9 and cancel over keys 62 times as long as what is left of their sum:
        # coarse in bf16, but NaN and noise are not mistaken for it.
        assert (found.double() - right).norm() <= (0.3 if dtype == HALF else 1e-3) * right.norm()
