"""Attention: of several libraries the one that can do what a model asks for. None of its kernels is ours.

    plan = plan_attention(Visible(...), dtype=..., heads=(H, G), width=h, kernels=self.kernels)  # once per forward pass
    y = attention(q, k, v, plan)  # in every layer

Layers that see different things (windows) have a plan each.

Shapes: B rows, T queries, S keys, H query heads, G key/value heads, h head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from kernels.attention.block_diffusion import OnePass
from kernels.attention.plan import Backend, Options, Plan
from kernels.attention.visible import Visible
from kernels.choose import Kernels
from kernels.spec import Sample, Size, Spec, drawn

__all__ = [
    "SPEC",
    "OnePass",
    "Plan",
    "Visible",
    "attention",
    "attention_call",
    "plan_attention",
    "training_facts",
]


def plan_attention(
    visible: Visible,
    *,
    dtype: torch.dtype,
    heads: tuple[int, int],
    width: int,
    kernels: Kernels,
    softcap: float | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Plan:
    """Choose an implementation and make what it needs: masks, offsets, tiles. `dtype` of queries, keys and values;
    `heads`: (H, G); `width`: h; the others as in `Options`. `dropout`: pass 0 outside of training."""
    if heads[0] % heads[1]:
        raise ValueError(f"heads: {heads[0]} query heads cannot share {heads[1]} key/value heads evenly")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: must be from 0 to 1, got {dropout}")
    call = attention_call(visible.facts, heads, width, softcap=softcap, dropout=dropout)
    backend = kernels.implementation("attention", device=visible.device, dtype=dtype, **call)
    return Plan.of(cast("Backend", backend), visible, Options(dtype, softcap, dropout, scale))


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
    """softmax(q k^T / sqrt(h)) v over the keys that the plan lets be seen, for q (B, H, T, h), k and v (B, G, S, h);
    returns (B, H, T, h). Query head j reads key/value head floor(j G / H) (Ainslie et al. 2023). Given more than the
    plan's T queries, the last T are computed."""
    return plan.run(q, k, v)


def attention_call(
    facts: tuple[str, ...],
    heads: tuple[int, int],
    width: int,
    *,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """What the rule of choice may know of it (`kernels.choose.Call`)."""
    more = {
        "grouped heads": heads[0] != heads[1],
        "softcap": softcap is not None,
        "dropout": dropout > 0,
        "dropout of all": dropout == 1,
    }
    return {"columns": width, "facts": (*facts, *(name for name, holds in more.items() if holds))}


def training_facts(
    seq_len: int, *, causal: bool = True, window: int | None = None, offsets: bool = True
) -> tuple[str, ...]:
    """Facts of the rows of a training step, which hold documents; `offsets`: whether the model is given these."""
    ids = torch.empty(1, seq_len, device="meta")
    return Visible(1, seq_len, seq_len, ids.device, causal, window, ids, ids if offsets else None).facts


def _visible(size: Size, device: torch.device) -> Visible:
    rows, length = int(size["rows"]), int(size["length"])
    kind = str(size["sees"])
    if kind == "block diffusion":
        blocks = torch.arange(length, device=device) // 16
        return Visible(rows, 2 * length, 2 * length, device, causal=False, pattern=OnePass(blocks, 16))
    doc_ids = offsets = None
    if "documents" in kind:
        span = max(1, length // 4 - 1)  # four and a bit in a row, so that one ends in the middle of a tile
        doc_ids = (torch.arange(length, device=device) // span).expand(rows, length)
        starts = torch.arange(0, length, span, device=device)
        every = (torch.arange(rows, device=device)[:, None] * length + starts).flatten()
        offsets = torch.cat((every, every.new_full((1,), rows * length))).to(torch.int32)
    window = max(1, length // 8) if "window" in kind else None
    return Visible(rows, length, length, device, "causal" in kind, window, doc_ids, offsets)


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    visible = _visible(size, device)
    rows, heads, groups, width = (int(size[name]) for name in ("rows", "heads", "groups", "width"))
    shapes = {"q": (heads, visible.queries), "k": (groups, visible.keys), "v": (groups, visible.keys)}
    tensors: dict[str, Tensor | None] = {
        name: drawn(rows, *shape, width, device=device, dtype=dtype, generator=generator)
        for name, shape in shapes.items()
    }
    return Sample(tensors, {"visible": visible}, attention_call(visible.facts, (heads, groups), width))


def _pairs(size: Size) -> float:
    """Pairs of query and key that are seen, per head."""
    rows, length, kind = int(size["rows"]), int(size["length"]), str(size["sees"])
    if kind == "block diffusion":
        return rows * float(length * length + length * 16)
    span = min(length, max(1, length // 4 - 1)) if "documents" in kind else length
    parts = [min(span, length - start) for start in range(0, length, span)]
    if "causal" not in kind:
        return rows * float(sum(part * part for part in parts))
    window = max(1, length // 8) if "window" in kind else length
    return rows * float(sum(min(t + 1, window) for part in parts for t in range(part)))


def _flops(size: Size) -> tuple[float, float]:
    """Two products forward; backward five, one of them the scores once more."""
    forward = 4.0 * int(size["heads"]) * int(size["width"]) * _pairs(size)
    return forward, 2.5 * forward


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """q, k, v in and the result out; backward these and dy in, three gradients out."""
    tokens = int(size["rows"]) * int(size["length"]) * (2 if size["sees"] == "block diffusion" else 1)
    wide = float(tokens * int(size["heads"]) * int(size["width"]) * itemsize)
    narrow = float(tokens * int(size["groups"]) * int(size["width"]) * itemsize)
    return 2 * wide + 2 * narrow, 4 * wide + 4 * narrow


def _size(sees: str, rows: int, length: int, heads: int, groups: int, width: int) -> Size:
    return {"sees": sees, "rows": rows, "length": length, "heads": heads, "groups": groups, "width": width}


SPEC = Spec(
    sample=_sample,
    small={
        "documents": _size("causal documents", 2, 67, 4, 2, 16),
        "causal": _size("causal", 2, 33, 2, 2, 8),
        "window": _size("causal window", 1, 130, 2, 1, 8),
        "documents, both ways": _size("documents", 2, 40, 2, 2, 8),
        "window in documents": _size("causal documents window", 2, 65, 2, 2, 8),
        "one token": _size("causal", 1, 1, 2, 1, 8),
        "block diffusion": _size("block diffusion", 2, 40, 2, 2, 8),
    },
    large={
        "causal, 16 x 1,024, 12 heads of 64": _size("causal", 16, 1024, 12, 12, 64),
        "documents, 16 x 1,024, 12 heads of 64": _size("causal documents", 16, 1024, 12, 12, 64),
        "window, 4 x 4,096, 16 heads of 128 by 4": _size("causal window", 4, 4096, 16, 4, 128),
        "block diffusion, 8 x 1,024, 12 heads of 64": _size("block diffusion", 8, 1024, 12, 12, 64),
    },
    timed_on_cpu={
        "documents, 16 x 256, 6 heads of 32": _size("causal documents", 16, 256, 6, 6, 32),
        "causal, 4 x 256, 6 heads of 32": _size("causal", 4, 256, 6, 6, 32),
        "window, 4 x 256, 6 heads of 32 by 2": _size("causal window", 4, 256, 6, 2, 32),
        "block diffusion, 4 x 256, 6 heads of 32": _size("block diffusion", 4, 256, 6, 6, 32),
    },
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2},
    peers={
        "sdpa cuDNN": "kernels.attention.peers:of_cudnn",
        "sdpa flash": "kernels.attention.peers:of_flash",
        "sdpa efficient": "kernels.attention.peers:of_efficient",
        "sdpa math": "kernels.attention.peers:of_math",
        "flash_attn": "kernels.attention.peers:of_flash_attn",
    },
)
