"""The Triton kernel behind every norm of rows: one pass forward, one backward. Bound by memory: what counts is bytes
in flight.

    total = x + branch;  y = (total - mean) * scale * weight + bias

mean is 0 unless `centred`; scale = 1 / sqrt(mean of squares + eps), and of the sum of squares for a `unit` norm;
branch, weight and bias are optional. A program takes tiles of whole rows. Backward, a few programs per multiprocessor
walk over all rows and keep their share of the gradients of weight and bias, summed up afterwards: nothing is added in
an order that may change.

Shapes: N rows, D width, G groups of N / G neighbouring rows, each with a weight and a bias of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import gpu_of
from kernels.library import opaque
from kernels.tuned import launch

__all__ = ["TILE_BYTES", "launch_of", "normalise", "programs_of", "rows_of"]

TILE_BYTES = 8 * 1024  # of what a step reads; backward reads two tensors
PROGRAMS_PER_SM = 4  # backward


def normalise(
    x: Tensor,
    branch: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float,
    centred: bool = False,
    unit: bool = False,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor]:
    """x and branch (..., D), weight and bias (D,) or (G, 1, ..., D) -> x + branch, None without a branch, and its norm
    in `out_dtype`. Differentiable in all four tensors."""
    total, y, _, _ = _operation(x, branch, weight, bias, eps, centred, unit, out_dtype)
    return (None if branch is None else total), y


@triton.jit
def _forward_kernel(
    x,
    branch,
    weight,
    bias,
    total,
    y,
    mean,
    scale,
    group_rows,
    group_tiles,
    width,
    divisor,
    x_stride,
    branch_stride,
    weight_stride,
    bias_stride,
    eps,
    CENTRED: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // group_tiles
    within = (program % group_tiles) * ROWS + tl.arange(0, ROWS)
    row = group * group_rows + within
    column = tl.arange(0, WIDTH)
    in_rows = within < group_rows
    in_width = column < width
    inside = in_rows[:, None] & in_width[None, :]
    values = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        added = tl.load(branch + row[:, None] * branch_stride + column[None, :], mask=inside, other=0.0)
        # Statistics are of the sum as it is stored: backward reads that.
        rounded = (values + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row[:, None] * width + column[None, :], rounded, mask=inside)
        values = rounded.to(tl.float32)
    if CENTRED:
        middle = tl.sum(values, 1) / width
        tl.store(mean + row, middle, mask=in_rows)
        values = tl.where(inside, values - middle[:, None], 0.0)
    factor = 1 / tl.sqrt(tl.sum(values * values, 1) / divisor + eps)
    tl.store(scale + row, factor, mask=in_rows)
    values *= factor[:, None]
    if HAS_WEIGHT:
        gain = tl.load(weight + group * weight_stride + column, mask=in_width, other=0.0)
        values *= gain.to(tl.float32)[None, :]
    if HAS_BIAS:
        shift = tl.load(bias + group * bias_stride + column, mask=in_width, other=0.0)
        values += shift.to(tl.float32)[None, :]
    tl.store(y + row[:, None] * width + column[None, :], values, mask=inside)


@triton.jit
def _backward_kernel(
    dy,
    dtotal,
    total,
    weight,
    mean,
    scale,
    dx,
    dbranch,
    dweight,
    dbias,
    group_rows,
    group_programs,
    tiles_per_program,
    width,
    divisor,
    dy_stride,
    dtotal_stride,
    total_stride,
    weight_stride,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DTOTAL: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
    RELOAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    group = program // group_programs
    first = (program % group_programs) * tiles_per_program * ROWS
    column = tl.arange(0, WIDTH)
    in_width = column < width
    if HAS_WEIGHT:
        gain = tl.load(weight + group * weight_stride + column, mask=in_width, other=0.0)
        weight_sum = tl.zeros([WIDTH], tl.float32)
    if HAS_BIAS:
        bias_sum = tl.zeros([WIDTH], tl.float32)
    for i in tl.range(0, tiles_per_program, num_stages=STAGES):
        within = first + i * ROWS + tl.arange(0, ROWS)
        row = group * group_rows + within
        in_rows = within < group_rows
        inside = in_rows[:, None] & in_width[None, :]
        values = tl.load(total + row[:, None] * total_stride + column[None, :], mask=inside, other=0.0)
        values = values.to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(scale + row, mask=in_rows, other=0.0)
        if CENTRED:
            values -= tl.load(mean + row, mask=in_rows, other=0.0)[:, None]
        values *= factor[:, None]
        if HAS_BIAS:
            bias_sum += tl.sum(grad, 0)
        if HAS_WEIGHT:
            weight_sum += tl.sum(grad * values, 0)
            if RELOAD:
                gain = tl.load(weight + group * weight_stride + column, mask=in_width, other=0.0)
            grad *= gain.to(tl.float32)[None, :]
        # Outside of the row grad is 0, so that its products are.
        along = tl.sum(grad * values, 1) / divisor
        if CENTRED:
            grad -= (tl.sum(grad, 1) / width)[:, None]
        grad = (grad - values * along[:, None]) * factor[:, None]
        if HAS_DTOTAL:
            passed = tl.load(dtotal + row[:, None] * dtotal_stride + column[None, :], mask=inside, other=0.0)
            grad += passed.to(tl.float32)
        tl.store(dx + row[:, None] * width + column[None, :], grad, mask=inside)
        if HAS_DBRANCH:
            tl.store(dbranch + row[:, None] * width + column[None, :], grad, mask=inside)
    if HAS_WEIGHT:
        tl.store(dweight + program * width + column, weight_sum, mask=in_width)
    if HAS_BIAS:
        tl.store(dbias + program * width + column, bias_sum, mask=in_width)


def _forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    unit: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> x + branch (empty without a branch), y (..., D), mean (N,) (empty unless centred), scale (N,)."""
    total, y, mean, scale = _outputs(x, branch, weight, bias, eps, centred, unit, out_dtype)
    if not y.numel():
        return total, y, mean, scale
    width, groups = x.shape[-1], _groups(weight, bias, x.shape[-1])
    group_rows = scale.numel() // groups
    flat, (added, added_stride) = rows_of(x), _optional_rows(branch)
    (gain, gain_stride), (shift, shift_stride) = _optional_rows(weight), _optional_rows(bias)
    chosen = launch_of("row_norm.forward", x, width, TILE_BYTES, 32)
    tiles = triton.cdiv(group_rows, chosen["ROWS"])
    _forward_kernel[(groups * tiles,)](
        flat,
        added,
        gain,
        shift,
        total,
        y,
        mean,
        scale,
        group_rows,
        tiles,
        width,
        1 if unit else width,
        flat.stride(0),
        added_stride,
        gain_stride,
        shift_stride,
        eps,
        CENTRED=centred,
        HAS_BRANCH=branch is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **chosen,
    )
    return total, y, mean, scale


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    groups: int,
    has_bias: bool,
    unit: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx like x, the same in the branch's dtype (empty if that is x's), dweight and dbias (G, D) fp32, or (G, 0)."""
    options = has_bias, unit, x_dtype, branch_dtype
    if not total.numel():
        dx, dbranch, dweight, dbias = _gradients(dy, dtotal, total, weight, mean, scale, groups, *options)
        return dx, dbranch, dweight.zero_(), dbias.zero_()
    width, group_rows = total.shape[-1], scale.numel() // groups
    chosen = launch_of("row_norm.backward", total, width, TILE_BYTES // 2, 16)
    tiles = triton.cdiv(group_rows, chosen["ROWS"])
    programs = programs_of(total.device, tiles, groups)
    dx, dbranch, dweight, dbias = _gradients(
        dy, dtotal, total, weight, mean, scale, groups * programs, *options
    )
    flat, grad = rows_of(total), rows_of(dy)
    (passed, passed_stride), (gain, gain_stride) = _optional_rows(dtotal), _optional_rows(weight)
    _backward_kernel[(groups * programs,)](
        grad,
        passed,
        flat,
        gain,
        mean,
        scale,
        dx,
        dbranch,
        dweight,
        dbias,
        group_rows,
        programs,
        triton.cdiv(tiles, programs),
        width,
        1 if unit else width,
        grad.stride(0),
        passed_stride,
        flat.stride(0),
        gain_stride,
        CENTRED=mean.numel() > 0,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=has_bias,
        HAS_DTOTAL=dtotal is not None,
        HAS_DBRANCH=branch_dtype != x_dtype,
        RELOAD=chosen["WIDTH"] > 4096,  # the weight, for each tile, for want of registers
        STAGES=chosen.pop("num_stages"),
        **chosen,
    )
    return dx, dbranch, _shares(dweight, groups), _shares(dbias, groups)


def _shares(of_programs: Tensor, groups: int) -> Tensor:
    """(G * programs, D or 0) -> (G, D or 0), summed up."""
    return of_programs.view(groups, len(of_programs) // groups, of_programs.shape[1]).sum(1)


def rows_of(x: Tensor) -> Tensor:
    """(N, D) with neighbouring columns; a copy only where strides ask for one."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _optional_rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """The same and its stride from row to row."""
    if x is None:
        return None, 0
    flat = rows_of(x)
    return flat, flat.stride(0)


def _groups(weight: Tensor | None, bias: Tensor | None, width: int) -> int:
    given = bias if weight is None else weight
    return 1 if given is None else given.numel() // width


def programs_of(device: torch.device, tiles: int, groups: int = 1) -> int:
    """Of a backward pass, to each group."""
    gpu = gpu_of(device)
    return max(1, min(tiles, PROGRAMS_PER_SM * (gpu.sms if gpu else 1) // groups))


def launch_of(kernel: str, x: Tensor, width: int, tile_bytes: int, per_thread: int) -> dict[str, Any]:
    """`per_thread`: elements of a tile, at most, for the sake of registers."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(16, tile_bytes // (block * x.element_size())))
    warps = min(8, max(4, rows * block // (32 * per_thread)))  # more have too few registers each
    row_bytes, gpu = block * x.element_size(), gpu_of(x.device)
    stages = 3 if row_bytes <= 2 * TILE_BYTES else 2  # or shared memory does not hold them
    if gpu is not None and 4 * row_bytes > gpu.shared_bytes:
        stages = 1
    default = {"ROWS": rows, "WIDTH": block, "num_warps": warps, "num_stages": stages}
    key: dict[str, int | str] = {"width": width, "dtype": str(x.dtype)}
    return launch(kernel, x.device, key, default, {"ROWS": (1, 2, 4, 8, 16)})


def _outputs(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    unit: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_forward` returns, without values."""
    rows, device = x.shape[:-1].numel(), x.device
    if branch is None:
        total = torch.empty(0, dtype=x.dtype, device=device)
    else:
        total = torch.empty(x.shape, dtype=torch.result_type(x, branch), device=device)
    y = torch.empty(x.shape, dtype=out_dtype, device=device)
    mean = torch.empty(rows if centred else 0, dtype=torch.float32, device=device)
    return total, y, mean, torch.empty(rows, dtype=torch.float32, device=device)


def _gradients(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    groups: int,
    has_bias: bool,
    unit: bool,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_backward` returns, without values."""
    width, device = total.shape[-1], total.device
    return (
        torch.empty(total.shape, dtype=x_dtype, device=device),
        torch.empty(total.shape if branch_dtype != x_dtype else 0, dtype=branch_dtype, device=device),
        torch.empty(groups, 0 if weight is None else width, dtype=torch.float32, device=device),
        torch.empty(groups, width if has_bias else 0, dtype=torch.float32, device=device),
    )


_operation = opaque("row_norm", _forward, _outputs, flops=lambda x, *args, **kwargs: 4 * x.numel())
_differentiated = opaque("row_norm_backward", _backward, _gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, bias, _, _, ctx.unit, _ = inputs
    total, _, mean, scale = output
    ctx.save_for_backward(x if branch is None else total, weight, mean, scale)
    ctx.mark_non_differentiable(mean, scale, *([total] if branch is None else []))
    ctx.set_materialize_grads(False)
    ctx.groups = _groups(weight, bias, x.shape[-1])
    ctx.x_dtype, ctx.branch_dtype = x.dtype, None if branch is None else branch.dtype
    ctx.bias = None if bias is None else (bias.shape, bias.dtype)


def _differentiate(ctx: Any, dtotal: Tensor | None, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, weight, mean, scale = ctx.saved_tensors
    branch_dtype = ctx.branch_dtype or ctx.x_dtype
    dx, dbranch, dweight, dbias = _differentiated(
        torch.zeros_like(total) if dy is None else dy,
        dtotal,
        total,
        weight,
        mean,
        scale,
        ctx.groups,
        ctx.bias is not None,
        ctx.unit,
        ctx.x_dtype,
        branch_dtype,
    )
    return (
        dx,
        None if ctx.branch_dtype is None else dx if branch_dtype == ctx.x_dtype else dbranch,
        None if weight is None else dweight.view(weight.shape).to(weight.dtype),
        None if ctx.bias is None else dbias.view(ctx.bias[0]).to(ctx.bias[1]),
        *(None, None, None, None),
    )


_operation.register_autograd(_differentiate, setup_context=_save)
