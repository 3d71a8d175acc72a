"""Attention by torch's kernels, each by itself, and by flash-attn, for the benchmark."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention import flash_attn
from kernels.attention.visible import Visible
from kernels.device import gpu_of

__all__ = ["of_cudnn", "of_efficient", "of_flash", "of_flash_attn", "of_math"]

TAKES_A_MASK = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend, visible: Visible) -> Tensor:
    if not visible.plain and backend not in TAKES_A_MASK:
        raise NotImplementedError(f"{backend.name} takes no mask")
    bias = None if visible.plain else visible.kept.setdefault("peer", visible.bias(q.dtype))
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None and visible.causal
        )


of_cudnn: Any = partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)
of_flash: Any = partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION)
of_efficient: Any = partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION)
of_math: Any = partial(_sdpa, backend=SDPBackend.MATH)


def of_flash_attn(q: Tensor, k: Tensor, v: Tensor, *, visible: Visible) -> Tensor:
    """The newest version that is installed and made for the GPU."""
    if flash_attn.function_for(gpu_of(q.device)) is None:
        raise ImportError(f"none of {', '.join(flash_attn.MODULES)} can be imported and is made for this GPU")
    if visible.pattern is not None:
        raise NotImplementedError("flash_attn cannot say what block diffusion does")
    return flash_attn.BACKEND(q, k, v, visible=visible)
