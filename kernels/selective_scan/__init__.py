"""The selective scan of a state-space model (Gu and Dao 2023, Mamba, arXiv:2312.00752, algorithm 2).

Shapes: B rows of T steps, E channels of N states each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import CHUNKED, CPP, REFERENCE, TRITON
from kernels.choose import Call, Kernels
from kernels.selective_scan.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "choose", "reference", "selective_scan"]


FEW = 16  # steps that the definition is faster for, where no gradient is asked for
FEW_STEPS, ONE_STEP = "few steps", "one step"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    reset: Tensor | None,
    *,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """y (B, T, E) in the dtype of u, and the states behind the last step (B, E, N), at least fp32.

    With step sizes d = softplus(delta + delta_bias), for every channel and state:

        h_t = exp(d_t A) h_{t-1} + d_t B_t u_t,    y_t = (sum over states of C_t h_t + D u_t) silu(z_t)

    u, delta, z (B, T, E): inputs, step sizes before the bias, gates (None: y as it is); A (E, N): rates, negative; B, C
    (B, T, N): into and out of states; D (E,): what goes past the states (None: nothing); delta_bias (E,) or None;
    initial (B, E, N): states before the first step (None: 0); reset (B, T) bool: True where a document begins, which
    sees no state of what stands before it (None: nowhere). Computed in at least fp32. Differentiable in all but
    reset, through both results, once. ValueError where shapes do not fit.
    """
    problem = _mismatch(u, delta, A, B, C, D, z, delta_bias, initial, reset)
    if problem:
        raise ValueError(problem)
    # With gradients blocks keep less and are what FLOPs are counted for; few steps take them up to 1.3 times as long.
    few = u.shape[1] <= FEW and not torch.is_grad_enabled()
    facts = ((ONE_STEP, FEW_STEPS) if u.shape[1] == 1 else (FEW_STEPS,)) if few else ()
    run = kernels.implementation(
        "selective_scan", device=u.device, dtype=u.dtype, columns=u.shape[-1], facts=facts
    )
    return run(u, delta, A, B, C, D, z, delta_bias, initial, reset)


def _mismatch(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Tensor | None) -> str:
    """What is wrong with the shapes; "" if nothing."""
    if u.ndim != 3 or A.ndim != 2:
        return f"u (B, T, E) and A (E, N) are needed, got shapes {tuple(u.shape)} and {tuple(A.shape)}"
    batch, length, width = u.shape
    states = A.shape[1]
    of_channels, of_states, of_steps = (batch, length, width), (batch, length, states), (batch, length)
    last = (batch, width, states)
    names = ("delta", "A", "B", "C", "D", "z", "delta_bias", "initial", "reset")
    wanted = (
        of_channels,
        (width, states),
        of_states,
        of_states,
        (width,),
        of_channels,
        (width,),
        last,
        of_steps,
    )
    for name, t, shape in zip(names, (delta, A, B, C, *others), wanted, strict=True):
        if t is not None and t.shape != shape:
            beside = f"beside u {tuple(u.shape)} and A {tuple(A.shape)}"
            return f"{name} must have the shape {shape} {beside}, got {tuple(t.shape)}"
    reset = others[-1]
    if reset is not None and reset.dtype != torch.bool:
        return f"reset must be bool, got {reset.dtype}"
    return ""


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """By a kernel, whose states stay in registers or in the first cache. Elsewhere in pieces: the definition keeps the
    states of all steps for its gradients, and needs many operations a step. Of a few steps, as text is written, it is
    the faster one of these two; of one step on a CPU, of all."""
    because = ""
    # 45 : 78 microseconds in 1 row, 107 : 173 in 8, as many in 64.
    if ONE_STEP in call.facts and call.device.type == "cpu":
        return REFERENCE, "one step, which needs no kernel"
    if kernel := {"cuda": TRITON, "cpu": CPP}.get(call.device.type):
        if not (why_not := lacking(kernel)):
            return kernel, "states stay where they are computed"
        because = f"; not {kernel}: {why_not}"
    if FEW_STEPS in call.facts:
        return REFERENCE, f"the plain definition, of at most {FEW} steps{because}"
    return CHUNKED, f"in blocks of steps, whose states are computed again in the backward pass{because}"


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    batch, length, width, states = (int(size[name]) for name in ("rows", "length", "width", "states"))

    def draw(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator, scale=scale)

    bare = bool(size.get("bare"))
    tensors: dict[str, Tensor | None] = {
        "u": draw(batch, length, width),
        "delta": draw(batch, length, width),
        "A": -draw(width, states, dtype=torch.float32).detach().abs(),
        "B": draw(batch, length, states),
        "C": draw(batch, length, states),
        "D": None if bare else draw(width, dtype=torch.float32),
        "z": None if bare else draw(batch, length, width),
        "delta_bias": None if bare else draw(width, dtype=torch.float32),
        "initial": draw(batch, width, states, dtype=torch.float32) if size.get("initial") else None,
        "reset": None,
    }
    tensors["A"].requires_grad_()  # type: ignore[union-attr]
    if every := int(size.get("reset", 0)):
        first = torch.arange(length, device=device) % every == every - 1
        tensors["reset"] = first.expand(batch, length)
    return Sample(tensors)


def _states(size: Size) -> int:
    return int(size["rows"]) * int(size["length"]) * int(size["width"]) * int(size["states"])


def _flops(size: Size) -> tuple[float, float]:
    """Exponential, products and sums of every state and step."""
    return 9.0 * _states(size), 18.0 * _states(size)


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """u, delta, z, B, C in, y out; all of them and the gradient in, five gradients out. States stay where they are."""
    steps, width, states = int(size["rows"]) * int(size["length"]), int(size["width"]), int(size["states"])
    return (
        float(steps * (4 * width + 2 * states) * itemsize),
        float(steps * (7 * width + 4 * states) * itemsize),
    )


def _size(rows: int, length: int, width: int, states: int, **more: int | bool) -> Size:
    return {"rows": rows, "length": length, "width": width, "states": states, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "2 x 21 x 20, documents": _size(2, 21, 20, 4, initial=True, reset=9),
        "bare": _size(1, 35, 7, 3, bare=True),
        "one step": _size(2, 1, 9, 4, initial=True),
        "one row of 70": _size(1, 70, 5, 2, initial=True, reset=33),
        "no rows": _size(0, 5, 8, 4),
    },
    large={
        "8 x 2,048 x 1,536": _size(8, 2048, 1536, 16),
        "32 x 1,024 x 1,536, documents": _size(32, 1024, 1536, 16, reset=300),
    },
    timed_on_cpu={
        "1 x 1,024 x 384": _size(1, 1024, 384, 16),
        "16 x 256 x 384": _size(16, 256, 384, 16),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2},
    peers={"mamba_ssm": "kernels.selective_scan.peers:of_mamba_ssm"},
)
