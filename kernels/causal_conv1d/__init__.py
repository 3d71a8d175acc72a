"""A short causal convolution over tokens, each channel by itself: what mamba sees of the tokens just before (Gu and Dao
2023, arXiv:2312.00752, section 3.4).

Shapes: B rows, T tokens, E channels, k taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.causal_conv1d.reference import reference
from kernels.choose import Kernels
from kernels.spec import Sample, Size, Spec, drawn, ids

__all__ = ["SPEC", "causal_conv1d", "reference"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial: Tensor | None = None,
    doc_ids: Tensor | None = None,
    *,
    activation: bool,
    kernels: Kernels,
) -> Tensor:
    """y_t = bias + sum over j < k of weight_j x_{t-k+1+j}, through silu if `activation`; in x's dtype, computed in at
    least fp32. Differentiable in x, weight, bias and initial.

    x (B, T, E), channels last, also a view of a fused projection; weight (E, 1, k), of nn.Conv1d, the last tap for the
    token itself; bias (E,); initial (B, k - 1, E): inputs before the first token, the oldest first, of its document
    (None: zeros). No tap reaches across a change of doc_ids (B, T), any integers. ValueError where shapes do not fit.
    """
    shapes = {"bias": (bias, x.shape[2:]), "doc_ids": (doc_ids, x.shape[:2])}
    if x.ndim == weight.ndim == 3:
        shapes["initial"] = initial, torch.Size((x.shape[0], weight.shape[2] - 1, x.shape[2]))
    fits = x.ndim == 3 and weight.ndim == 3 and weight.shape[:2] == (x.shape[2], 1)
    if not fits or any(t is not None and t.shape != shape for t, shape in shapes.values()):
        given = {"x": x, "weight": weight, "bias": bias, "initial": initial, "doc_ids": doc_ids}
        raise ValueError(
            "x (B, T, E), weight (E, 1, k), bias (E,), initial (B, k - 1, E) and doc_ids (B, T) are needed, got "
            + ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items() if t is not None)
        )
    run = kernels.implementation("causal_conv1d", device=x.device, dtype=x.dtype, columns=x.shape[2])
    return run(x, weight, bias, initial, doc_ids, activation=activation)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    batch, tokens, channels, taps = (int(size[name]) for name in ("batch", "tokens", "channels", "taps"))

    def draw(*shape: int, grad: bool = True) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator, grad=grad)

    fused = draw(batch, tokens, 2 * channels, grad=False)  # as mamba projects: the gate beside it
    length = int(size.get("documents", 0))  # of one, on the average
    documents = ids(length, batch, tokens, device=device, generator=generator) if length else None
    tensors = {
        "x": fused[..., :channels].requires_grad_(),
        "weight": draw(channels, 1, taps),
        "bias": draw(channels) if size.get("bias", True) else None,
        "initial": draw(batch, taps - 1, channels) if size.get("initial") else None,
        "doc_ids": None if documents is None else (documents == 0).cumsum(1),
    }
    return Sample(tensors, {"activation": bool(size.get("activation", True))})


def _elements(size: Size) -> int:
    return int(size["batch"]) * int(size["tokens"]) * int(size["channels"])


def _flops(size: Size) -> tuple[float, float]:
    """Products and sums of k taps; backward those before silu again, of the gradients of x and of the weights."""
    taps = int(size["taps"])
    return float(2 * taps * _elements(size)), float(3 * 2 * taps * _elements(size))


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """x in, y out; x and dy in, dx out."""
    moved = float(_elements(size) * itemsize)
    return 2 * moved, 3 * moved


def _size(batch: int, tokens: int, channels: int, taps: int = 4, **more: int) -> Size:
    return {"batch": batch, "tokens": tokens, "channels": channels, "taps": taps, **more}


SPEC = Spec(
    sample=_sample,
    small={
        "2 x 13 x 24, documents, initial": _size(2, 13, 24, documents=5, initial=True),
        "plain": _size(2, 7, 20),
        "no bias, no silu": _size(1, 9, 8, bias=False, activation=False),
        "documents": _size(3, 21, 5, documents=5),
        "two taps": _size(2, 6, 16, 2, initial=True),
        "three taps": _size(2, 6, 16, 3, documents=5),
        "one token": _size(3, 1, 8, initial=True),
        "fewer tokens than taps": _size(2, 2, 8, initial=True, documents=5),
        "no rows": _size(0, 4, 8, documents=5),
        "more than a tile": _size(2, 70, 130, documents=5),
    },
    large={
        "8 x 2,048 x 1,536": _size(8, 2_048, 1_536),
        "8 x 2,048 x 1,536, documents": _size(8, 2_048, 1_536, documents=300),
        "8 x 2,048 x 1,792, initial": _size(8, 2_048, 1_792, initial=True),
    },
    timed_on_cpu={
        "16 x 256 x 384": _size(16, 256, 384),
        "16 x 256 x 384, documents": _size(16, 256, 384, documents=100),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 3e-6, "float16": 3e-3, "bfloat16": 2e-2},
    peers={
        "causal_conv1d": "kernels.causal_conv1d.peers:of_causal_conv1d",
        "fla": "kernels.causal_conv1d.peers:of_fla",
    },
)
