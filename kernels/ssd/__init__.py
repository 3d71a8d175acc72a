"""State-space duality (Dao and Gu 2024, arXiv:2405.21060, section 6): states whose decay is one number for each head
and token, so that products of matrices compute a chunk of tokens at once.

    d_t = softplus(delta_t + delta_bias);  h_t = exp(d_t A) h_{t-1} + d_t x_t B_t;  y_t = C_t h_t + D x_t

Shapes: B rows, T tokens, H heads of P channels, N states of each, G groups of heads that share B and C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels import CHUNKED, CPP, REFERENCE
from kernels.choose import Call, Kernels
from kernels.spec import Sample, Size, Spec, drawn, ids
from kernels.ssd.reference import reference

__all__ = ["SPEC", "choose", "reference", "ssd"]

ONE_TOKEN = "one token"  # a fact of calls


def ssd(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    initial: Tensor | None = None,
    doc_ids: Tensor | None = None,
    *,
    chunk: int,
    kernels: Kernels,
) -> tuple[Tensor, Tensor]:
    """-> y (B, T, H, P) in x's dtype, and the states behind the last token (B, H, P, N), in at least fp32. Decays and
    states in at least fp32, products in x's dtype. Differentiable in every tensor but doc_ids, also through the states.

    x (B, T, H, P), delta (B, T, H), B and C (B, T, G, N), of T >= 1; A (H,), negative; D and delta_bias (H,); initial
    (B, H, P, N): states before the first token, of its document (None: zeros). No state crosses a change of doc_ids
    (B, T), any integers. chunk: tokens of one product; results do not depend on it. ValueError
    where shapes do not fit.
    """
    _check(x, delta, A, B, C, D, delta_bias, initial, doc_ids, chunk)
    facts = (ONE_TOKEN,) if x.shape[1] == 1 else ()
    columns = x.shape[2] * x.shape[3]
    run = kernels.implementation("ssd", device=x.device, dtype=x.dtype, columns=columns, facts=facts)
    return run(x, delta, A, B, C, D, delta_bias, initial, doc_ids, chunk=chunk)


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """Products of matrices, but of one token."""
    if ONE_TOKEN in call.facts:
        return REFERENCE, "one token is one step"
    if not (why_not := lacking(CPP)):
        return CPP, "products of chunks, and compiled passes between them"
    because = f"; not {CPP}: {why_not}" if call.device.type == "cpu" else ""
    return CHUNKED, f"products of chunks{because}"


def _check(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    doc_ids: Tensor | None,
    chunk: int,
) -> None:
    if x.ndim != 4 or B.ndim != 4 or not x.shape[1]:
        raise ValueError(
            f"x (B, T, H, P) and B (B, T, G, N) of T >= 1 are needed, got {tuple(x.shape)} and {tuple(B.shape)}"
        )
    rows, tokens, heads, width = x.shape
    groups, states = B.shape[2:]
    wanted = {
        "delta": (delta, (rows, tokens, heads)),
        "A": (A, (heads,)),
        "B": (B, (rows, tokens, groups, states)),
        "C": (C, (rows, tokens, groups, states)),
        "D": (D, (heads,)),
        "delta_bias": (delta_bias, (heads,)),
        "initial": (initial, (rows, heads, width, states)),
        "doc_ids": (doc_ids, (rows, tokens)),
    }
    for name, (given, shape) in wanted.items():
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {shape} beside x {tuple(x.shape)}, got {tuple(given.shape)}")
    if heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} groups of B and C")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    batch, tokens, heads, width = (int(size[name]) for name in ("batch", "tokens", "heads", "width"))
    groups, states = int(size["groups"]), int(size["states"])

    def draw(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator, scale=scale)

    documents = ids(20, batch, tokens, device=device, generator=generator) if size.get("documents") else None
    fp32 = torch.float32
    tensors = {
        "x": draw(batch, tokens, heads, width),
        "delta": draw(batch, tokens, heads),
        "A": (-draw(heads, dtype=fp32).abs()).detach().requires_grad_(),
        "B": draw(batch, tokens, groups, states, scale=states**-0.5),
        "C": draw(batch, tokens, groups, states),
        "D": draw(heads, dtype=fp32) if size.get("skip", True) else None,
        "delta_bias": (draw(heads, dtype=fp32) - 3).detach().requires_grad_()
        if size.get("bias", True)
        else None,
        "initial": draw(batch, heads, width, states, dtype=fp32) if size.get("initial") else None,
        "doc_ids": None if documents is None else (documents == 0).cumsum(1),
    }
    return Sample(tensors, {"chunk": int(size["chunk"])})


def _flops(size: Size) -> tuple[float, float]:
    """Products of matrices; backward twice as many."""
    tokens = int(size["batch"]) * int(size["tokens"])
    inner, shared = int(size["heads"]) * int(size["width"]), int(size["groups"]) * int(size["states"])
    chunk = min(int(size["chunk"]), int(size["tokens"]))
    forward = 2.0 * tokens * (chunk * (shared + inner) + 2 * inner * int(size["states"]))
    return forward, 2 * forward


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """x, B, C in, y out; these and dy in, three gradients out."""
    tokens = int(size["batch"]) * int(size["tokens"])
    inner, shared = int(size["heads"]) * int(size["width"]), int(size["groups"]) * int(size["states"])
    return float(tokens * itemsize * (2 * inner + 2 * shared)), float(
        tokens * itemsize * (3 * inner + 4 * shared)
    )


def _size(batch: int, tokens: int, heads: int, width: int, states: int, chunk: int, **more: int) -> Size:
    sizes = {
        "batch": batch,
        "tokens": tokens,
        "heads": heads,
        "width": width,
        "states": states,
        "chunk": chunk,
    }
    return {"groups": 1, **sizes, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "2 x 11, 4 heads of 3 in 2 groups": _size(2, 11, 4, 3, 5, 4, groups=2, documents=True, initial=True),
        "plain": _size(2, 8, 2, 4, 6, 4, skip=False, bias=False),
        "one chunk": _size(2, 7, 2, 4, 6, 16, initial=True),
        "one token a chunk": _size(1, 5, 2, 2, 3, 1, documents=True, initial=True),
        "one token": _size(3, 1, 2, 2, 3, 8, initial=True),
        "no rows": _size(0, 4, 2, 2, 3, 2, documents=True),
        "five chunks, a tail": _size(1, 37, 3, 4, 6, 8, initial=True),
    },
    large={
        "8 x 2,048, 24 x 64, 128 states": _size(8, 2_048, 24, 64, 128, 256),
        "8 x 2,048, 24 x 64, 128 states, documents": _size(8, 2_048, 24, 64, 128, 256, documents=True),
    },
    timed_on_cpu={
        "16 x 256, 6 x 64, 128 states": _size(16, 256, 6, 64, 128, 64),
        "16 x 256, 6 x 64, 128 states, documents": _size(16, 256, 6, 64, 128, 64, documents=True),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 2e-5, "float16": 1e-2, "bfloat16": 4e-2},
    peers={"mamba_ssm": "kernels.ssd.peers:of_mamba_ssm", "fla": "kernels.ssd.peers:of_fla"},
)
