"""What attention compares: queries and keys, normalised over the head width if wanted (Henry et al. 2020), then rotated
by position (Su et al. 2021, equation 34).

Shapes: B rows, T tokens, H query heads, G key heads, h head width, r dims that turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.choose import Call, Kernels
from kernels.qk_norm_rope.reference import reference
from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC", "qk_norm_rope", "reference", "refused_by_closed_form", "rotation_call"]

HALVES = "halves"  # a fact of calls whose pairs are dims i and i + r/2


def rotation_call(width: int, interleaved: bool) -> dict[str, Any]:
    """What the rule of choice may know of a rotation of heads so wide: `columns`, `facts`."""
    return {"columns": width, "facts": () if interleaved else (HALVES,)}


def refused_by_closed_form(call: Call) -> str | None:
    return (
        "of pairs that are halves apart it takes as long as the definition" if HALVES in call.facts else None
    )


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    kernels: Kernels,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, h) and k (B, T, G, h), also views of one fused projection -> both turned, in their dtype.
    Differentiable in q, k and weights.

    cos, sin: of each token's angles, (T, 1, r/2), or (B, T, 1, r/2) where rows have positions of their own. The first
    r dims turn, the others pass. Pairs are dims i and i + r/2 (Llama), `interleaved` 2i and 2i + 1 (the paper, GPT-J).
    weights (h,) of q and of k: first x / sqrt(mean(x^2) + eps) * weight over each head.
    """
    assert not (cos.requires_grad or sin.requires_grad), "angles are constants"
    assert 2 * cos.shape[-1] <= q.shape[-1] == k.shape[-1] and q.shape[-1] % 2 == 0
    assert cos.shape == sin.shape and cos.shape[:-2] == q.shape[4 - cos.ndim : 2]
    q_weight, k_weight = weights or (None, None)
    call = rotation_call(q.shape[-1], interleaved)
    run = kernels.implementation("qk_norm_rope", device=q.device, dtype=q.dtype, **call)
    return run(q, k, cos, sin, q_weight, k_weight, eps=eps, interleaved=interleaved)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    batch, tokens, width = int(size["batch"]), int(size["tokens"]), int(size["width"])
    heads, groups = int(size["heads"]), int(size["groups"])

    def draw(*shape: int, dtype: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return drawn(*shape, device=device, dtype=dtype, generator=generator, grad=grad)

    fused = draw(batch, tokens, (heads + 2 * groups) * width, grad=False).unflatten(-1, (-1, width))
    lead = (batch, tokens) if size.get("own_positions") else (tokens,)
    angles = 3 * draw(*lead, 1, int(size.get("turning", width)) // 2, dtype=torch.float32, grad=False)
    tensors = {
        "q": fused[:, :, :heads].requires_grad_(),
        "k": fused[:, :, heads : heads + groups].requires_grad_(),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "q_weight": draw(width) if size.get("norm") else None,
        "k_weight": draw(width) if size.get("norm") else None,
    }
    interleaved = bool(size.get("interleaved", False))
    return Sample(tensors, {"eps": 1e-5, "interleaved": interleaved}, rotation_call(width, interleaved))


def _elements(size: Size) -> int:
    heads = int(size["heads"]) + int(size["groups"])
    return int(size["batch"]) * int(size["tokens"]) * heads * int(size["width"])


def _flops(size: Size) -> tuple[float, float]:
    forward, backward = (7, 14) if size.get("norm") else (3, 3)
    return float(forward * _elements(size)), float(backward * _elements(size))


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """q and k in and out; their gradients in and out, and with a norm q and k in."""
    moved = float(_elements(size) * itemsize)
    return 2 * moved, (3 if size.get("norm") else 2) * moved


SPEC = Spec(
    sample=_sample,
    small={
        "norm, half": {"batch": 2, "tokens": 5, "heads": 4, "groups": 2, "width": 8, "norm": True},
        "no norm": {"batch": 2, "tokens": 7, "heads": 3, "groups": 1, "width": 12},
        "interleaved": {
            "batch": 1,
            "tokens": 6,
            "heads": 2,
            "groups": 2,
            "width": 12,
            "norm": True,
            "interleaved": True,
        },
        "partial": {
            "batch": 2,
            "tokens": 3,
            "heads": 3,
            "groups": 3,
            "width": 20,
            "norm": True,
            "turning": 6,
        },
        "partial, interleaved": {
            "batch": 2,
            "tokens": 3,
            "heads": 2,
            "groups": 1,
            "width": 10,
            "turning": 4,
            "interleaved": True,
        },
        "own positions": {
            "batch": 3,
            "tokens": 4,
            "heads": 2,
            "groups": 1,
            "width": 8,
            "norm": True,
            "own_positions": True,
        },
        "one token": {"batch": 1, "tokens": 1, "heads": 1, "groups": 1, "width": 2},
        "no rows": {"batch": 0, "tokens": 4, "heads": 2, "groups": 1, "width": 8, "norm": True},
        "more than a tile": {"batch": 3, "tokens": 41, "heads": 5, "groups": 1, "width": 16, "norm": True},
    },
    large={
        "64 x 1,024, 12 x 64": {"batch": 64, "tokens": 1_024, "heads": 12, "groups": 12, "width": 64},
        "64 x 1,024, 12 x 64, norm": {
            "batch": 64,
            "tokens": 1_024,
            "heads": 12,
            "groups": 12,
            "width": 64,
            "norm": True,
        },
        "8 x 2,048, 16 and 4 x 128, norm": {
            "batch": 8,
            "tokens": 2_048,
            "heads": 16,
            "groups": 4,
            "width": 128,
            "norm": True,
        },
    },
    timed_on_cpu={
        "16 x 256, 6 x 32, norm": {
            "batch": 16,
            "tokens": 256,
            "heads": 6,
            "groups": 6,
            "width": 32,
            "norm": True,
        }
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2},
    peers={"liger": "kernels.qk_norm_rope.peers:of_liger"},
)
