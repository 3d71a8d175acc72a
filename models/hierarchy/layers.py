"""Stacks of a hierarchy: layers of Mamba-2 or attention, and a norm behind the last (network normalisation, Hwang et
al. 2025, arXiv:2507.07955, section 2.3.1). Parameters are named as in the authors' checkpoints.

Shapes: R rows, M places, D width, H heads of h dims, B rows of the batch, W places of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Plan, Visible, attention, attention_call, plan_attention, training_facts
from kernels.choose import UsesKernels
from kernels.precision import at_least_fp32, compute_dtype
from kernels.qk_norm_rope import qk_norm_rope, rotation_call
from models.hierarchy.cache import RowsOf
from models.hierarchy.config import HierarchyConfig, StageSizes
from models.hierarchy.places import Places
from models.hierarchy.sparse import ChunkAttention, Chunks
from models.layers.flops import Flops, matmul_flops
from models.layers.init import INIT_STD, normal_
from models.layers.norms import RMSNorm
from models.layers.rotary import rotary_tables
from models.sparse.config import NSAConfig
from models.sparse.flops import sparse_attention_flops
from models.sparse.gates import Gates
from models.sparse.mixer import layout_of
from models.sparse.summaries import Mean, Summary
from models.state_space.dual import DualMixer
from models.state_space.mixer import Documents, State

__all__ = ["Block", "Stack"]

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Around:
    """What the layers of a stack share. Of text as a whole `places`; behind a cache `at`, and `slots` (R, C) on the
    CPU where keys and values go. `sparse`: what sparse attention is told in their place."""

    documents: Documents | None = None
    plan: Plan | None = None
    rotation: tuple[Tensor, Tensor] | None = None
    places: Places | None = None
    at: RowsOf | None = None
    slots: Tensor | None = None
    sparse: Chunks | None = None


class Attention(UsesKernels):
    def __init__(self, sizes: StageSizes, name: str) -> None:
        super().__init__()
        self.sizes, self.name = sizes, name
        self.Wqkv = nn.Linear(sizes.width, 3 * sizes.width, bias=False)
        self.out_proj = nn.Linear(sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, around: Around) -> Tensor:
        """x (R, M, D)"""
        qkv = self.Wqkv(x)
        if around.places is not None:
            qkv = around.places.rows(qkv)  # (B, W, 3D): each row of the batch attends by itself
        q, k, v = qkv.unflatten(-1, (3, self.sizes.heads, -1)).unbind(2)  # (B, W, H, h)
        if around.rotation is not None:
            q, k = qk_norm_rope(q, k, *around.rotation, self.kernels)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if around.at is not None:
            assert around.slots is not None
            k, v = around.at.cache.store(self.name, around.at, around.slots, k, v)
        assert around.plan is not None
        y = attention(q, k, v, around.plan).transpose(1, 2).flatten(2)
        return self.out_proj(y if around.places is None else around.places.back(y))

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        sizes = self.sizes
        facts = training_facts(seq_len, window=sizes.window, offsets=False)
        calls = {"attention": attention_call(facts, (sizes.heads, sizes.heads), sizes.head_width)}
        if sizes.turning:
            calls["qk_norm_rope"] = rotation_call(sizes.head_width, interleaved=False)
        return calls


class SwiGLU(nn.Module):
    """fc2( y * silu(gate) ), y and gate the halves of fc1 x."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class Block(nn.Module):
    """One layer; `kind` as in `models/hierarchy/layout.py`. The residual stream is at least fp32."""

    def __init__(self, cfg: HierarchyConfig, sizes: StageSizes, kind: str, name: str) -> None:
        super().__init__()
        self.name = name
        self.norm1 = RMSNorm(sizes.width, cfg.norm_eps)
        self.mixer: DualMixer | Attention | ChunkAttention
        if kind in "mM":
            self.mixer = DualMixer(cfg.mixer(sizes.width))
        elif sizes.sparse is not None:
            self.mixer = ChunkAttention(sizes.sparse, name)
        else:
            self.mixer = Attention(sizes, name)
        self.norm2 = RMSNorm(sizes.width, cfg.norm_eps) if kind.isupper() else None
        self.mlp = SwiGLU(sizes.width, sizes.hidden) if kind.isupper() else None

    def forward(self, x: Tensor, around: Around) -> Tensor:
        """x (R, M, D)"""
        y, at = self.norm1(x), around.at
        if isinstance(self.mixer, Attention):
            branch = self.mixer(y, around)
        elif isinstance(self.mixer, ChunkAttention):
            branch = self.mixer(y, around.sparse)
        else:
            state = (
                None if at is None else State(at.read(f"{self.name}.recent"), at.read(f"{self.name}.states"))
            )
            branch, after = self.mixer(y, around.documents, state)
            if at is not None:
                at.write(f"{self.name}.recent", after.recent)
                at.write(f"{self.name}.states", after.states)
        if self.norm2 is not None and self.mlp is not None:
            x, y = self.norm2(x, branch.to(x.dtype))
            branch = self.mlp(y)
        return x + branch.to(x.dtype)

    def flops(self, cfg: HierarchyConfig, sizes: StageSizes, length: Any, longest: int) -> Flops:
        """Per place of a stage whose row holds `length` places (a number, or a tensor of them), `longest` at most."""
        found = matmul_flops(3 * sizes.width * sizes.hidden) if self.mlp is not None else Flops(0, 0)
        if isinstance(self.mixer, DualMixer):
            return found + self.mixer.flops(longest)
        if isinstance(self.mixer, ChunkAttention):
            return found + sparse_attention_flops(self.mixer.cfg, length)
        keys = seen(length, sizes.window, longest)
        forward, masked = 4.0 * sizes.width * keys, 4.0 * sizes.width * (length - keys)
        weights = matmul_flops(4 * sizes.width**2)
        return found + weights + Flops(forward, 3 * forward, keys, length, masked, 3 * masked)


def seen(length: Any, window: int | None, longest: int) -> Any:
    """Keys that a place attends to, itself included, averaged over a row: `models.layers.flops.mean_keys`, of a
    number or of a tensor on any device."""
    if window is None or window >= longest:
        return (length + 1) / 2
    if not isinstance(length, Tensor):
        length = torch.tensor(float(length), dtype=torch.float64)
        return float(seen(length, window, longest))
    return torch.where(length <= window, (length + 1) / 2, window - window * (window - 1) / (2 * length))


class Stack(UsesKernels):
    """Layers of one width, and the norm of what comes out of them."""

    def __init__(self, cfg: HierarchyConfig, sizes: StageSizes, kinds: str, name: str) -> None:
        super().__init__()
        self.cfg, self.sizes, self.kinds, self.name = cfg, sizes, kinds, name
        self.layers = nn.ModuleList(
            Block(cfg, sizes, kind, f"{name}.{layer}") for layer, kind in enumerate(kinds)
        )
        self.rmsnorm = RMSNorm(sizes.width, cfg.norm_eps)

    @property
    def _blocks(self) -> list[Block]:
        return [block for block in self.layers if isinstance(block, Block)]

    @property
    def attends(self) -> bool:
        return "t" in self.kinds.lower()

    def forward(self, x: Tensor, places: Places, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (R, M, D) -> the same, in the format of matrix products. `cu_seqlens`: of the outermost stage's rows, the
        same as offsets."""
        ids, _ = places.in_rows
        plan = rotation = sparse = None
        if self.sizes.sparse is not None:
            layout = layout_of(
                self.sizes.sparse, ids, 0, ids, cu_seqlens, compute_dtype(self.rmsnorm.weight), self.kernels
            )
            sparse = Chunks(layout, places)
        elif self.attends:
            visible = Visible.causally(ids, window=self.sizes.window, doc_ids=ids, cu_seqlens=cu_seqlens)
            plan = self._plan(visible, x)
            rotation = self._rotation(torch.arange(ids.shape[1], device=x.device), x)
        documents = Documents(places.ids, F.pad(places.begins[:, 1:], (1, 0)))
        return self._through(x, Around(documents, plan, rotation, places, sparse=sparse))

    def step(self, x: Tensor, at: RowsOf) -> Tensor:
        """x (R, C, D), which follows what the cache holds of these rows."""
        if not self.attends:
            return self._through(x, Around(at=at))
        slots = at.slots(self.name, x.shape[1])
        if self.sizes.sparse is not None:
            return self._sparse_step(self.sizes.sparse, x, at, slots)
        query, key = slots.to(x.device)[..., None], torch.arange(int(slots.max()) + 1, device=x.device)
        mask = key <= query  # (R, C, S)
        if self.sizes.window is not None:
            mask &= query - key < self.sizes.window
        rows, queries, keys = mask.shape
        visible = Visible(rows, queries, keys, x.device, causal=False, mask=mask[:, None])
        around = Around(None, self._plan(visible, x), self._rotation(query[..., 0], x), None, at, slots)
        return self._through(x, around)

    def _sparse_step(self, cfg: NSAConfig, x: Tensor, at: RowsOf, slots: Tensor) -> Tensor:
        """Rows that hold equally many places go together: blocks, summaries and windows of others end elsewhere."""
        found, dtype = torch.empty_like(x), compute_dtype(self.rmsnorm.weight)
        for past in sorted(set(slots[:, 0].tolist())):
            chosen = (slots[:, 0] == past).nonzero()[:, 0]
            rows, here = chosen.to(x.device), at.among(chosen)
            layout = layout_of(cfg, slots[chosen].to(x.device), past, None, None, dtype, self.kernels)
            y = self._through(x[rows], Around(at=here, sparse=Chunks(layout, at=here, past=past)))
            found = found.to(y.dtype).index_copy(0, rows, y)
        return found

    def _through(self, x: Tensor, around: Around) -> Tensor:
        x = x.to(at_least_fp32(x.dtype))
        for block in self.layers:
            # Stages of other widths share the code of blocks: a compiler takes the second width for one that varies.
            if block._compiled_call_impl is not None:
                torch._dynamo.mark_static(x, x.ndim - 1)
            x = block(x, around)
        return self.rmsnorm(x)

    def _plan(self, visible: Visible, x: Tensor) -> Plan:
        heads = (self.sizes.heads, self.sizes.heads)
        dtype = compute_dtype(self.rmsnorm.weight)
        return plan_attention(
            visible, dtype=dtype, heads=heads, width=self.sizes.head_width, kernels=self.kernels
        )

    def _rotation(self, positions: Tensor, x: Tensor) -> tuple[Tensor, Tensor] | None:
        turning = self.sizes.turning
        return rotary_tables(positions, turning, ROPE_THETA, x.dtype) if turning else None

    def empty(self, rows: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of a cache: states before the first place, and counts of places."""
        states: dict[str, Tensor] = {}
        for block in self._blocks:
            if isinstance(block.mixer, DualMixer):
                recent, kept = block.mixer.empty(rows)
                states |= {f"{block.name}.recent": recent, f"{block.name}.states": kept}
            elif isinstance(block.mixer, ChunkAttention):
                states |= block.mixer.empty(rows)
        counts = {self.name: torch.zeros(rows, dtype=torch.int64, device="cpu")} if self.attends else {}
        return states, counts

    def init_weights(self, generator: torch.Generator, residuals: int) -> None:
        """N(0, 0.02^2); what writes to the residual stream, N(0, 0.02^2 / residuals): additions to the stream up to
        here, from the outermost stage in. Summaries and gates of sparse attention as `nsa` begins."""
        own: set[nn.Module] = set()
        for module in self.modules():
            if isinstance(module, DualMixer | Summary | Mean):
                module.init_weights(generator)
            elif isinstance(module, Gates):
                module.init_weights(generator, INIT_STD)
            elif isinstance(module, RMSNorm):
                module.init_weights()
            if isinstance(module, Summary | Mean | Gates):
                own |= set(module.modules())
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and module not in own:
                writes = name.endswith(("out_proj", "o_proj", "fc2"))
                normal_(module.weight, INIT_STD / residuals**0.5 if writes else INIT_STD, generator)

    def flops(self, length: Any, longest: int) -> Flops:
        """As `Block.flops`, of all layers."""
        total = Flops(0, 0)
        for block in self._blocks:
            total = total + block.flops(self.cfg, self.sizes, length, longest)
        return total
