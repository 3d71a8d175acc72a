"""Attention by torch's own `scaled_dot_product_attention`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attention.plan import Backend, Options
from kernels.attention.visible import Visible
from kernels.device import Gpu, gpu_of

__all__ = ["BACKEND", "MOST_ROWS", "order"]

MOST_ROWS = (
    65_535  # of one call: grids of CUDA end there, and torch's kernels have a row of theirs for each of ours
)


class Built(NamedTuple):
    bias: Tensor | None  # (B or 1, 1, T, S)
    causal: bool
    order: (
        list[SDPBackend] | None
    )  # which of torch's kernels may run, the preferred one first; None: torch's choice


def order(gpu: Gpu | None, masked: bool, deterministic: bool) -> list[SDPBackend] | None:
    """cuDNN is the fastest from Hopper on. With a mask tensor it gives NaN gradients (lengths of 64 mod 128) and
    misreads masks in fp32, so it never gets one; its backward adds in no fixed order, while those of the others ask
    `torch.use_deterministic_algorithms`. Flash attention takes no mask; without one it comes before the
    memory-efficient kernels, which also compute fp32."""
    if gpu is None:
        return None
    if masked:
        return [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return [SDPBackend.CUDNN_ATTENTION, *rest] if gpu.capability >= (9, 0) and not deterministic else rest


def build(visible: Visible, options: Options) -> Built:
    bias = None if visible.plain else visible.bias(options.dtype)
    causal = bias is None and visible.causal and visible.queries > 1
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Built(bias, causal, order(gpu_of(visible.device), bias is not None, deterministic))


def attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    if len(q) <= MOST_ROWS:
        return _attend(q, k, v, built, options)
    parts = []
    for start in range(0, len(q), MOST_ROWS):
        rows = slice(start, start + MOST_ROWS)
        bias = built.bias if built.bias is None or len(built.bias) == 1 else built.bias[rows]
        parts.append(_attend(q[rows], k[rows], v[rows], built._replace(bias=bias), options))
    return torch.cat(parts)


def _attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and built.bias is not None:
        # Fused kernels take a bias or grouped heads, not both. These copies die with this call.
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        grouped = False
    with _limited(built.order):
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=built.bias,
            dropout_p=options.dropout,
            is_causal=built.causal,
            scale=options.scale,
            enable_gqa=grouped,
        )


def _limited(order: list[SDPBackend] | None) -> AbstractContextManager[object]:
    return nullcontext() if order is None else sdpa_kernel(order, set_priority=True)


BACKEND = Backend(build, attend)
