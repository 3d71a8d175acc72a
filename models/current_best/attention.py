"""Attention of `current_best_gpt`: normalised queries and keys, half of whose dims turn; values with looked-up ones;
and what is done to its output.

Shapes: B rows, T tokens, S keys, D width, H heads, h head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.attention import Plan, attention
from kernels.attention.masks import additive
from kernels.choose import UsesKernels
from kernels.precision import at_least_fp32
from kernels.qk_norm_rope import qk_norm_rope
from models.current_best.config import CurrentBestConfig
from models.layers.cache import StateCache
from models.layers.init import uniform_
from models.layers.lora import scaled_linear

__all__ = ["EPS", "Attention", "Rotation", "Shared", "compose", "composed_keys"]

EPS = torch.finfo(torch.float32).eps  # of all norms, which have no gain
GATING = 6  # dims of the input, and as many of the value embedding, that decide how much of that is added
QUERY_BLOCK = 128  # of composed heads: each block meets only the keys in its window


class Rotation(NamedTuple):
    """Cosines and sines (T, 1, r/2) of tokens; with paired heads (T H, 1, r/2), of the heads of each token in turn."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Shared:
    """What layers share. Plans of attention and rotations of those kinds of layers that there are; `gains`: of queries
    and keys, (h,) each, in place of a scale of scores. `standing` (h,) bool: dims that do not turn. `exists` (B or 1,
    T) bool: whether a token may look at the one before. `doc_ids` (B, T) or None."""

    plain: Plan | None
    long: Plan | None
    paired: Plan | None
    paired_long: Plan | None
    rotation: Rotation
    paired_rotation: Rotation | None
    gains: tuple[Tensor, Tensor]
    standing: Tensor
    exists: Tensor
    doc_ids: Tensor | None

    def plan(self, paired: bool, long: bool) -> Plan:
        found = (self.paired_long if long else self.paired) if paired else self.long if long else self.plain
        assert found is not None
        return found


class Attention(UsesKernels):
    """lambda_1 W_o attend(q, k, v) of (q, k, v) = lambda_0 W_qkv z, all in the words of one layer of a `Layout`."""

    def __init__(self, cfg: CurrentBestConfig, layer: int, valued: bool) -> None:
        super().__init__()
        layout, width, heads = cfg.layout, cfg.d_model, cfg.n_heads
        self.layer, self.heads = layer, heads
        self.interleaved = cfg.of("rope_layout") == "pair"
        self.paired, self.long = layer in layout.paired, layer in layout.long
        self.exclusive, self.composing = layer in layout.xsa, layer in layout.composed
        self.window = cfg.dc_window
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.lambdas = nn.Parameter(torch.empty(2))
        self.value_gate = self.value_lambda = None
        if valued and cfg.of("ve_gate"):
            self.value_gate = nn.Linear(2 * min(GATING, width), heads, bias=False)
        elif valued:
            self.value_lambda = nn.Parameter(torch.empty(()))
        self.offset = self.long and not self.paired and cfg.offsets_keys
        self.zero_output = cfg.record == "record26"

    def forward(
        self,
        z: Tensor,
        value: Tensor | None,
        added: Tensor | None,
        gates: dict[str, Tensor],
        shared: Shared,
        cache: StateCache | None,
    ) -> Tensor:
        """z (B, T, D), normalised. `value`: the token's value embedding, `added`: to be added to values as it is, both
        (B, T, D). `gates`: numbers per token and head, "xsa", "gate", "read", "write"."""
        lambda_v, lambda_o = self.lambdas.unbind()
        q, k, v = scaled_linear(self.qkv_proj, z, lambda_v).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        v = self._with_values(v, z, value, added)
        rotate = self._rotate_pairs if self.paired else self._rotate
        q, k = rotate(q, k, shared)  # (B, T, H, h)
        if self.offset:
            k = self._offset(k, shared, cache)
        if self.paired:
            y = self._attend_in_pairs(q, k, v, shared, cache)
        else:
            y = self._attend(q, k, v, gates, shared, cache)
        if "xsa" in gates:
            y = _exclusive(y, v, gates["xsa"])
        if "gate" in gates:
            y = y * gates["gate"][..., None].to(y.dtype)
        return scaled_linear(self.o_proj, y.flatten(2), lambda_o)

    def _with_values(self, v: Tensor, z: Tensor, value: Tensor | None, added: Tensor | None) -> Tensor:
        if value is not None and self.value_gate is not None:
            half = self.value_gate.in_features // 2
            read = torch.cat((z[..., :half], value[..., :half].to(z.dtype)), -1)
            gate = 2 * torch.sigmoid(self.value_gate(read))  # (B, T, H)
            v = v + (gate[..., None] * value.unflatten(-1, (self.heads, -1))).to(v.dtype)
        elif value is not None:
            assert self.value_lambda is not None
            v = v + (self.value_lambda * value).unflatten(-1, (self.heads, -1)).to(v.dtype)
        return v if added is None else v + added.unflatten(-1, (self.heads, -1)).to(v.dtype)

    def _rotate(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        return self._turned(q, k, shared.rotation, shared)

    def _rotate_pairs(self, q: Tensor, k: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        """A head of even number is at place 2 t, one of odd number at 2 t + 1: heads in the place of tokens."""
        assert shared.paired_rotation is not None
        one_by_one = [t.flatten(1, 2)[:, :, None] for t in (q, k)]  # (B, T H, 1, h)
        turned = self._turned(one_by_one[0], one_by_one[1], shared.paired_rotation, shared)
        turned_q, turned_k = (t[:, :, 0].unflatten(1, (-1, self.heads)) for t in turned)
        return turned_q, turned_k

    def _turned(self, q: Tensor, k: Tensor, by: Rotation, shared: Shared) -> tuple[Tensor, Tensor]:
        return qk_norm_rope(
            q,
            k,
            by.cos,
            by.sin,
            self.kernels,
            weights=shared.gains,
            eps=EPS,
            interleaved=self.interleaved,
        )

    def _offset(self, k: Tensor, shared: Shared, cache: StateCache | None) -> Tensor:
        """Dims that do not turn are those of the token before: what a key stands behind, and what it is, in one."""
        name = f"key_{self.layer}"
        before = k[:, :1] if cache is None or cache.length == 0 else cache[name].to(k.dtype)
        shifted = torch.cat((before, k[:, :-1]), 1)
        if cache is not None:
            cache[name] = k[:, -1:]
        return torch.where(shared.exists[..., None, None] & shared.standing, shifted, k)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: dict[str, Tensor],
        shared: Shared,
        cache: StateCache | None,
    ) -> Tensor:
        q, keys, values = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, h)
        if cache is not None:
            keys, values = cache["keys"].append(self.layer, keys, values)
        plan = shared.plan(False, self.long)
        attended = slice(keys.shape[2] - plan.visible.keys, None)  # composed heads may see more
        y = attention(q, keys[:, :, attended], values[:, :, attended], plan)
        if "read" in gates:
            read, write = (gates[name].expand(*v.shape[:2], self.heads) for name in ("read", "write"))
            y = y + compose(q, keys, values, read, write, self.window, shared.doc_ids)
        return y.transpose(1, 2)

    def _attend_in_pairs(
        self, q: Tensor, k: Tensor, v: Tensor, shared: Shared, cache: StateCache | None
    ) -> Tensor:
        """Heads j and j + H/2 of one token one behind the other, as one head of twice as many places."""
        rows = (t.unflatten(2, (2, -1)).flatten(1, 2).transpose(1, 2) for t in (q, k, v))  # (B, H/2, 2 T, h)
        q, k, v = rows
        if cache is not None:
            k, v = cache["pairs"].append(self.layer, k, v)
        y = attention(q, k, v, shared.plan(True, self.long)).transpose(1, 2)  # (B, 2 T, H/2, h)
        return y.unflatten(1, (-1, 2)).flatten(2, 3)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"qk_norm_rope": {"columns": self.qkv_proj.in_features // self.heads}}

    def init_weights(self, generator: torch.Generator) -> None:
        """Uniform of std 0.5 D^-1/2; what record26 writes out begins at 0."""
        std = 0.5 * self.qkv_proj.in_features**-0.5
        uniform_(self.qkv_proj.weight, std, generator)
        if self.zero_output:
            nn.init.zeros_(self.o_proj.weight)
        else:
            uniform_(self.o_proj.weight, std, generator)
        with torch.no_grad():
            self.lambdas[0].fill_(0.5)
            self.lambdas[1].fill_(1.0)
            if self.value_lambda is not None:
                self.value_lambda.fill_(0.5)
        if self.value_gate is not None:
            nn.init.zeros_(self.value_gate.weight)


def _exclusive(y: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
    """Without what y (B, T, H, h) has in the direction of the token's own value v, as far as tanh(alpha), (B, T, H) or
    (H,), says (Zhai 2026, arXiv:2603.09078)."""
    dtype = at_least_fp32(y.dtype)
    length = (
        torch.linalg.vector_norm(v, dim=-1, dtype=dtype).square().clamp(min=torch.finfo(dtype).tiny)
    )  # (B, T, H)
    share = torch.tanh(alpha).to(dtype) * (y * v).sum(-1, dtype=dtype) / length
    return y - share.to(y.dtype)[..., None] * v


def compose(
    q: Tensor, k: Tensor, v: Tensor, read: Tensor, write: Tensor, window: int, doc_ids: Tensor | None
) -> Tensor:
    """What all heads together look at, for each of them (Xiao et al. 2024, arXiv:2405.08553, trimmed): of query t
    sum_s p(t, s) v_n(s), times write_n(t), where p = sum_m w_m(t) softmax_s(q_m k_m) over the `window` keys that end
    with its own, and w = read / RMS(read) over the heads.

    q (B, H, T, h), already scaled; k, v (B, H, S, h); read, write (B, T, H) -> (B, H, T, h).
    """
    queries, keys = q.shape[2], k.shape[2]
    read = read.to(at_least_fp32(read.dtype))
    read = (
        (read * (read.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(q.dtype).transpose(1, 2)[..., None]
    )
    index = torch.arange(keys, device=q.device)
    parts = []
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        mine = slice(keys - queries + start, keys - queries + end)
        seen = slice(max(0, mine.start - window + 1), mine.stop)
        ahead = index[mine, None] - index[seen]  # (c, s)
        allowed = ((ahead >= 0) & (ahead < window))[None, None]
        if doc_ids is not None:
            allowed = allowed & (doc_ids[:, None, mine, None] == doc_ids[:, None, None, seen])
        scores = q[:, :, start:end] @ k[:, :, seen].mT + additive(allowed, q.dtype)
        # torch.softmax computes in fp32 also where it reads and writes bf16.
        mixed = (read[:, :, start:end] * torch.softmax(scores, -1)).sum(1, keepdim=True)  # (B, 1, c, s)
        parts.append(mixed @ v[:, :, seen])
    return write.transpose(1, 2)[..., None].to(v.dtype) * torch.cat(parts, 2)


def composed_keys(queries: int, window: int) -> float:
    """Keys that `compose` multiplies a query with, masked ones too, on average over a row."""
    total = 0
    for start in range(0, queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, queries)
        total += (end - start) * (end - max(0, start - window + 1))
    return total / queries
