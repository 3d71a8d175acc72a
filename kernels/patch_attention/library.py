"""Every patch with what it sees of the one before as a row of its own, by whichever implementation of `attention` suits
so many short rows."""

from __future__ import annotations

from torch import Tensor

from kernels.attention import Plan, attention, plan_attention
from kernels.choose import Kernels
from kernels.patch_attention.plan import Backend, Options, Patches, behind

__all__ = ["BACKEND"]


def build(patches: Patches, options: Options, heads: int, width: int, kernels: Kernels) -> Plan:
    return plan_attention(
        patches.visible,
        dtype=options.dtype,
        heads=(heads, heads),
        width=width,
        dropout=options.dropout,
        kernels=kernels,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, patches: Patches, plan: Plan, options: Options) -> Tensor:
    asked = q.unflatten(1, (-1, patches.size)).flatten(0, 1).transpose(1, 2)  # (B K, H, P, h)
    found = attention(asked, behind(k, patches), behind(v, patches), plan)
    return found.transpose(1, 2).reshape(q.shape)


BACKEND = Backend(build, attend)
