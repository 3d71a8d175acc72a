"""MEGABYTE: a wide stack reads patches of bytes, a narrow one predicts the bytes of each patch.

Yu et al. 2023, "Predicting Million-byte Sequences with Multiscale Transformers" (arXiv:2305.07185), section 2. Both
stacks are behind what they predict by one step of their own: the global one by a patch, in whose place the first has a
trained pad, the local one by a byte within its patch, with a pad of its own. All patches are computed at once; text is
written with one step of the global stack for each patch.

What predicts a document's byte t is the state at its place t, which has read its bytes before t. The token in front of
a document or window (its start, or the byte before) stands at place 0 and is not read: a pad stands there.

Shapes: B rows, T tokens, K patches, P bytes of a patch, L = K P places, D_G and D_L width of a byte in the global and
the local stack, V_p padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Plan, Visible, attention_call, plan_attention, training_facts
from kernels.patch_attention import Patches, patch_call, plan_patches
from kernels.precision import compute_dtype
from models.layers.cache import Cache, KVCache, StateCache
from models.layers.decoder import Decoder, padded_vocabulary
from models.layers.flops import Flops, decoder_flops, matmul_flops, mean_keys
from models.layers.init import normal_, truncated_normal_
from models.layers.norms import LayerNorm
from models.layers.roles import Rule
from models.layers.rotary import rotary_tables
from models.patches.block import GlobalBlock, LocalBlock, Neighbours, norm
from models.patches.config import MegabyteConfig
from models.patches.convolution import WIDTHS, PatchConvolutions
from models.patches.layout import Layout

__all__ = ["Megabyte", "MegabyteConfig"]

INIT_STD, INIT_BOUND = 0.006, 2.0  # appendix A.1: normal, cut off at two standard deviations
ROPE_THETA = 10000.0


class Megabyte(Decoder):
    Config = MegabyteConfig
    cfg: MegabyteConfig  # type: ignore[assignment]  # its sizes are those of two stacks
    lm_head = None  # the local embedding is the head

    def __init__(self, cfg: MegabyteConfig) -> None:
        super().__init__(cfg)  # type: ignore[arg-type]
        wide, narrow, patch_byte = cfg.d_global, cfg.d_local, cfg.d_global_pre_patch
        self.global_embedding = nn.Embedding(self.vocab_size, patch_byte)
        self.positions = nn.Embedding(cfg.n_ctx, patch_byte)
        self.convolutions = PatchConvolutions(patch_byte) if cfg.patch_conv else None
        self.global_pad = nn.Parameter(torch.empty(wide))
        self.global_layers = nn.ModuleList(GlobalBlock(cfg, layer) for layer in range(cfg.n_layers_d_global))
        self.global_norm = norm(wide)
        self.to_local = nn.Linear(patch_byte, narrow, bias=False)
        self.local_embedding = nn.Embedding(padded_vocabulary(self.vocab_size), narrow)
        self.local_pad = nn.Parameter(torch.empty(narrow))
        self.local_layers = nn.ModuleList(LocalBlock(cfg, layer) for layer in range(cfg.n_layers_d_local))
        self.local_norm = norm(narrow)

    @property
    def embedding_weight(self) -> Tensor:
        return self.local_embedding.weight

    def forward(  # type: ignore[override]
        self, tokens: Tensor, cache: Cache | None = None, layout: Layout | None = None
    ) -> Tensor:
        """tokens (B, T) int64, the first of a document its start -> states (B, T, D_L) of what follows each of them.

        layout: where documents and their bytes stand (`Layout.of`); None: every row is one document. With a cache the
        tokens continue what it holds. ValueError beyond n_ctx tokens of a row.
        """
        self.check_input(tokens, None, cache, learned=True)
        if cache is not None:
            return self._continue(tokens, cache)  # type: ignore[arg-type]
        if layout is None:
            layout = Layout.of_one(tokens, self.cfg.patch_size)
        placed = tokens.gather(1, layout.source)  # (B, L)
        told = self._told(self.read_patches(placed, layout))
        local = self._local_input(placed, layout.positions == 0)
        x = F.dropout(told + local, self.cfg.dropout, self.training)  # (B, K, P, D_L)
        shared = self._neighbours(layout)
        for block in self.local_layers:
            x = block(x, shared)
        states = self.local_norm(x).flatten(1, 2)  # (B, L, D_L)
        return states.gather(1, layout.places[..., None].expand(-1, -1, states.shape[-1]))

    # -- the wide stack --------------------------------------------------------------------------------------------

    def read_patches(self, placed: Tensor, layout: Layout) -> Tensor:
        """placed (B, L), the tokens at their places -> (B, K, P D_G): what the global stack says to each patch, of
        those before it."""
        rows, patches = layout.documents.shape
        # The byte that place t predicts is read at place t + 1; those that fill a document's last patch are read by
        # nobody, whatever stands there.
        h = self._embed_patches(placed.roll(-1, 1), layout.positions.clamp(min=0))  # (B, L, D_G)
        if layout.offset:
            h = h * (layout.positions >= 0)[..., None]
        if self.convolutions is not None:
            h = self.convolutions(h, layout.documents.repeat_interleave(self.cfg.patch_size, 1))
        h = h.reshape(rows, patches, -1)
        begins = F.pad(layout.documents[:, 1:] != layout.documents[:, :-1], (1, 0), value=True)  # (B, K)
        x = torch.where(begins[..., None], self.global_pad, h.roll(1, 1))
        visible = Visible.causally(layout.documents, doc_ids=layout.documents, cu_seqlens=layout.cu_seqlens)
        return self._wide(x, visible)

    def _embed_patches(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.global_embedding(tokens) + self.positions(positions)

    def _wide(self, x: Tensor, visible: Visible, cache: KVCache | None = None) -> Tensor:
        x = F.dropout(x, self.cfg.dropout, self.training)
        plan = self._plan(visible, self.cfg.global_n_heads, self.cfg.d_global)
        for block in self.global_layers:
            x = block(x, plan, cache)
        return self.global_norm(x)

    def _told(self, wide: Tensor) -> Tensor:
        """(B, K, P D_G) -> (B, K, P, D_L): to each place its slice."""
        return self.to_local(wide.unflatten(-1, (self.cfg.patch_size, -1)))

    # -- the narrow one --------------------------------------------------------------------------------------------

    def _local_input(self, placed: Tensor, first: Tensor | None) -> Tensor:
        """(B, K P) -> (B, K, P, D_L): at each place of a patch the byte before, at its first the pad; also where a
        document is `first` at another place."""
        patch = self.cfg.patch_size
        x = self.local_embedding(placed).unflatten(1, (-1, patch))
        at_pad = (torch.arange(patch, device=placed.device) == 0)[:, None]  # (P, 1)
        if first is not None:
            at_pad = at_pad | first.unflatten(1, (-1, patch))[..., None]
        return torch.where(at_pad, self.local_pad, x)

    def _neighbours(self, layout: Layout) -> Neighbours:
        cfg = self.cfg
        known = layout.positions >= 0 if layout.offset else None
        plan = plan_patches(
            Patches(cfg.patch_size, cfg.reach, layout.documents, known),
            dtype=compute_dtype(self.embedding_weight),
            heads=cfg.local_n_heads,
            width=cfg.d_local // cfg.local_n_heads,
            dropout=cfg.dropout if self.training else 0.0,
            kernels=self.kernels,
        )
        index = torch.arange(layout.source.shape[1], device=layout.source.device)
        return Neighbours(plan, self._rotation(index))

    def _local_plan(self, visible: Visible) -> Plan:
        return self._plan(visible, self.cfg.local_n_heads, self.cfg.d_local)

    def _rotation(self, index: Tensor) -> tuple[Tensor, Tensor]:
        width = self.cfg.d_local // self.cfg.local_n_heads
        return rotary_tables(index, width, ROPE_THETA, self.embedding_weight.dtype)

    def _plan(self, visible: Visible, heads: int, width: int) -> Plan:
        return plan_attention(
            visible,
            dtype=compute_dtype(self.embedding_weight),
            heads=(heads, heads),
            width=width // heads,
            dropout=self.cfg.dropout if self.training else 0.0,
            kernels=self.kernels,
        )

    # -- text ------------------------------------------------------------------------------------------------------

    def init_cache(self, rows: int) -> StateCache:
        """`recent`: bytes of the patch that is not full yet; `told`: what the global stack said to it; `local_<n>`:
        keys and values of a local layer, of this patch and the r places before it."""
        weight = self.embedding_weight
        cfg, heads = self.cfg, self.cfg.local_n_heads
        parts: dict[str, Any] = {
            "recent": torch.zeros(rows, 0, dtype=torch.int64, device=weight.device),
            "told": weight.new_zeros(rows, cfg.patch_size, cfg.d_local),
            "patches": KVCache(cfg.n_layers_d_global, rows),
        }
        for layer in range(cfg.n_layers_d_local):
            parts[f"local_{layer}"] = weight.new_zeros(rows, 2, 0, heads, cfg.d_local // heads)
        if self.convolutions is not None:
            for number, w in enumerate(WIDTHS):
                parts[f"conv_{number}"] = weight.new_zeros(rows, w - 1, cfg.d_global_pre_patch)
        return StateCache(**parts)

    def _continue(self, tokens: Tensor, cache: StateCache) -> Tensor:
        """Up to the end of the patch that is not full, then all others at once."""
        rest = -cache.length % self.cfg.patch_size
        pieces = [piece for piece in (tokens[:, :rest], tokens[:, rest:]) if piece.shape[1]]
        return torch.cat([self._piece(piece, cache) for piece in pieces], 1)

    def _piece(self, tokens: Tensor, cache: StateCache) -> Tensor:
        """Tokens (B, T) of the patch that is not full, or those that begin a patch, and others behind them."""
        patch, length = self.cfg.patch_size, tokens.shape[1]
        slot = cache.length % patch
        if slot:
            cache["recent"] = torch.cat((cache["recent"], tokens), 1)
            told = cache["told"][:, None, slot : slot + length]
            x = told + self.local_embedding(tokens)[:, None]  # (B, 1, T, D_L)
        else:
            told = self._told(self._step_patches(tokens, cache))  # (B, K, P, D_L)
            cache["told"] = told[:, -1]
            x = told + self._local_input(F.pad(tokens, (0, -length % patch)), None)
        shared = self._cached_neighbours(x, slot, length, cache)
        for block in self.local_layers:
            x = block(x, shared, cache)
        cache.advance(length)
        return self.local_norm(x).flatten(1, 2)[:, :length]

    def _step_patches(self, tokens: Tensor, cache: StateCache) -> Tensor:
        """tokens (B, T), the first of which fills the last patch, or is a document's start -> (B, K, P D_G): what the
        global stack says to the K patches that these begin."""
        patch, wide = self.cfg.patch_size, cache["patches"]
        patches = -(-tokens.shape[1] // patch)
        bytes_ = torch.cat((cache["recent"], tokens), 1) if cache.length else tokens[:, 1:]
        full = (patches if cache.length else patches - 1) * patch
        cache["recent"] = bytes_[:, full:]
        x = self.global_pad.expand(len(tokens), 1, -1)
        if full:
            first = max(0, cache.length - patch)
            index = torch.arange(first, first + full, device=tokens.device)
            h = self._embed_patches(bytes_[:, :full], index)  # (B, full, D_G)
            if self.convolutions is not None:
                h = self.convolutions(h, None, cache)
            h = h.reshape(len(tokens), -1, patch * h.shape[-1])
            x = h if cache.length else torch.cat((x, h), 1)
        out = self._wide(x, Visible.causally(x[..., 0], wide.length), wide)
        wide.advance(patches)
        return out

    def _cached_neighbours(self, x: Tensor, slot: int, length: int, cache: StateCache) -> Neighbours:
        """Of x (B, K, N, D_L), which `length` tokens of text fill from `slot` on."""
        rows, patches, places = x.shape[:3]
        reach = 0 if slot or (patches == 1 and not cache.length) else self.cfg.reach
        if not slot:  # of the patch before, the last r
            for layer in range(len(self.local_layers)):
                kept = cache[f"local_{layer}"]
                cache[f"local_{layer}"] = kept[:, :, max(0, kept.shape[2] - reach) :]
        before = cache["local_0"].shape[2] or reach
        mask = None
        if reach and not cache.length:  # nothing is before the first patch
            seen = torch.arange(-reach, places, device=x.device) >= 0
            mask = (seen | (torch.arange(patches, device=x.device) > 0)[:, None]).repeat(rows, 1)
            mask = mask[:, None, None].expand(-1, -1, places, -1)
        index = torch.arange(cache.length, cache.length + patches * places, device=x.device)
        visible = Visible(rows * patches, places, before + places, x.device, mask=mask)
        keep = length - (patches - 1) * places
        return Neighbours(self._local_plan(visible), self._rotation(index), reach, keep)

    # -- what others ask -------------------------------------------------------------------------------------------

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        """Of attention what either stack asks for, should the narrow one ask for any."""
        cfg = self.cfg
        local = {"cache", "mask"} if cfg.reach else set()
        facts = (*training_facts(-(-seq_len // cfg.patch_size)), *sorted(local))
        heads = (cfg.local_n_heads, cfg.local_n_heads)
        width = cfg.d_local // heads[0]
        return {
            "attention": attention_call(facts, heads, width, dropout=cfg.dropout),
            "patch_attention": patch_call(cfg.patch_size, width, cfg.dropout),
        }

    def init_weights(self, generator: torch.Generator) -> None:
        """Matrices and tables N(0, 0.006^2) cut off at two standard deviations, pads uncut, biases 0, gains 1."""
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.init_weights()
            elif isinstance(module, nn.Embedding | nn.Linear):
                truncated_normal_(module.weight, INIT_STD, INIT_BOUND, generator)
        normal_(self.global_pad, INIT_STD, generator)
        normal_(self.local_pad, INIT_STD, generator)

    def blocks(self) -> list[str]:
        wide = [f"global_layers.{layer}" for layer in range(self.cfg.n_layers_d_global)]
        return wide + [f"local_layers.{layer}" for layer in range(self.cfg.n_layers_d_local)]

    @property
    def kept_passes(self) -> float:
        """In global blocks, at every byte: one of them runs once for a patch, and local ones are narrower."""
        cfg = self.cfg
        return cfg.n_layers_d_global / cfg.patch_size + cfg.n_layers_d_local * cfg.d_local / cfg.d_global

    def passes(self, path: str) -> float:
        return 1.0 / self.cfg.patch_size if path.startswith("global_layers.") else 1.0

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        """Rates scale with what a matrix reads."""
        cfg = self.cfg
        return [
            Rule(r"positions\.weight", "embedding", wd_mult=0.0),
            Rule(r"(global|local)_embedding\.weight", "embedding"),
            Rule(r"(global|local)_pad|.*norm\.(weight|bias)", "scalar", wd_mult=0.0),
            Rule(r"to_local\.weight", "matrix", width=cfg.d_global_pre_patch),
            *(
                Rule(rf"convolutions\.mixes\.{n}\.weight", "matrix", width=w * cfg.d_global_pre_patch)
                for n, w in enumerate(WIDTHS)
            ),
            Rule(r"global_layers\..*_proj\.weight", "matrix", width=cfg.d_global),
            Rule(r"local_layers\..*_proj\.weight", "matrix", width=cfg.d_local),
        ]

    def flops_of_row(self, patches: int, scored: int) -> Flops:
        """Of a row of so many patches, of which the head reads so many places."""
        cfg, patch = self.cfg, self.cfg.patch_size
        products = 3 if cfg.mlp_type == "swiglu" else 2

        def weights(width: int) -> int:  # of a block
            return 4 * width**2 + products * width * cfg.hidden_width(width)

        wide = decoder_flops(weights(cfg.d_global), [mean_keys(patches)], cfg.d_global, [patches])
        seen = mean_keys(patch) + cfg.reach * (patches - 1) / patches
        narrow = decoder_flops(weights(cfg.d_local), [seen], cfg.d_local, [patch + cfg.reach])
        between = cfg.d_global_pre_patch * cfg.d_local
        if self.convolutions is not None:
            between += sum(WIDTHS) * cfg.d_global_pre_patch**2
        return (
            wide * (cfg.n_layers_d_global * patches)
            + (narrow * cfg.n_layers_d_local + matmul_flops(between)) * (patches * patch)
            + matmul_flops(self.vocab_size * cfg.d_local) * scored
        )

    def flops(self, seq_len: int) -> Flops:
        return self.flops_of_row(-(-seq_len // self.cfg.patch_size), seq_len) * (1 / seq_len)
