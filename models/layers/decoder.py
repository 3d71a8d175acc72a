"""What every decoder here offers to the outside, besides its own `forward`.

Shapes: B rows, T tokens, D width, V vocabulary, V_p padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DefaultModelConfig
from kernels.choose import UsesKernels
from kernels.precision import at_least_fp32, compute_dtype
from kernels.softcap import Softcap
from models.layers.cache import Cache, KVCache
from models.layers.flops import Flops

__all__ = [
    "Decoder",
    "Hidden",
    "document_positions",
    "further",
    "padded_vocabulary",
    "positions_of",
    "stacked",
    "through",
]

VOCABULARY_MULTIPLE = 128


@dataclass
class Hidden:
    """What a backbone returns in place of a plain tensor when it has more to tell: hidden states (B, T, D), and by name
    what its adapter makes loss terms and metrics of, such as balance losses or tokens per expert."""

    states: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


def further(k: int) -> str:
    """The name of the prediction of the k-th token after each position, k > 1: of its states and its loss."""
    return f"head_{k}"


class Decoder(UsesKernels):
    """A stack of blocks between an embedding and a head, with a padded, possibly tied vocabulary.

    A subclass sets `lm_head` (None when tied), and defines `embedding_weight`, `stack`, `embed` and `init_part`;
    `shared`, `new_block`, `block_flops` and `new_norm` too, where others may be built around it or of its parts.
    """

    cfg: DefaultModelConfig
    lm_head: nn.Linear | None
    logit_softcap: Softcap | None = None  # of all logits, in training, scoring and generation
    fixed_norm = False  # whether hidden states have one norm, whatever the weights

    def __init__(self, cfg: DefaultModelConfig) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("vocab_size: must be filled in before the model is built")
        self.cfg, self.vocab_size = cfg, cfg.vocab_size

    @property
    def embedding_weight(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define embedding_weight")

    def forward(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        **drawn: Any,
    ) -> Tensor | Hidden:
        """tokens (B, T) int64 -> hidden (B, T, D) after the final norm, with what blocks told beside it.

        doc_ids (B, T): attention stays within equal ids, and learned positions restart at each change (rotary ones are
        relative). None: one document per row. cu_seqlens (N + 1,): the same as offsets (data/offsets.py), which
        faster attention asks for. With a cache the tokens continue what it holds. `drawn`: what `shared` takes
        besides where layers draw, such as seeds. ValueError beyond n_ctx tokens where positions are learned.
        """
        x, _, told = self.run_stack(tokens, doc_ids, cache, cu_seqlens, **drawn)
        x = self.stack[1](x)
        return Hidden(x, told) if told else x

    def run_stack(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        **drawn: Any,
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Tensor]]:
        """As `forward`: x (B, T, D) before the final norm, what the blocks share, and what they told."""
        x, shared = self.embed(tokens, doc_ids, cache, cu_seqlens, **drawn)
        x, told = through(self.stack[0], x, shared, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x, shared, told

    # For the checker alone: a subclass that needs none of these may give their names to modules of its own.
    if TYPE_CHECKING:

        @property
        def stack(self) -> tuple[nn.ModuleList, nn.Module]:
            """The blocks in their order, and the norm behind the last."""

        def embed(
            self,
            tokens: Tensor,
            doc_ids: Tensor | None,
            cache: Cache | None,
            cu_seqlens: Tensor | None = None,
        ) -> tuple[Tensor, tuple[Any, ...]]:
            """What enters the blocks: x (B, T, D), and what all of them share, `shared`."""

        def shared(
            self, tokens: Tensor, past: int, doc_ids: Tensor | None, cu_seqlens: Tensor | None = None
        ) -> tuple[Any, ...]:
            """What every block is called with besides x and the cache, for tokens (B, T) behind `past` others."""

        def new_block(self, layer: int) -> nn.Module:
            """A further block like those of the stack. `layer`: its place in a cache."""

        def new_norm(self) -> nn.Module:
            """A norm like that behind the stack."""

        def block_flops(self, seq_len: int) -> Flops:
            """Of one block of `new_block`, per token."""

    def init_weights(self, generator: torch.Generator) -> None:
        self.init_part(self, generator)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """Initialise all parameters of a module made of what the stack is made of."""
        raise NotImplementedError(f"{type(self).__name__} must define init_part")

    @property
    def logit_scale(self) -> Tensor | None:
        """(V_p,): what every column of logits is multiplied by."""
        return None

    @property
    def head_weight(self) -> Tensor:
        """(V_p, D): what logits are products with, scaled where they are. Rows from `vocab_size` on are padding."""
        return self._head if self.logit_scale is None else self.logit_scale[:, None] * self._head

    @property
    def _head(self) -> Tensor:
        return self.embedding_weight if self.lm_head is None else self.lm_head.weight

    @property
    def max_context(self) -> int | None:
        """Tokens that generation may look back on; None = all of them."""
        return self.cfg.n_ctx

    def init_cache(self, rows: int) -> Cache:
        return KVCache(self.cfg.n_layers, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): without the padding. Capped ones in at least fp32."""
        weight, scale = self._head, self.logit_scale
        if compute_dtype(weight) != hidden.dtype:
            weight = weight.to(hidden.dtype)
        # Sliced behind the product: autocast converts a whole parameter once, a slice of it in every call.
        logits = F.linear(hidden, weight)[..., : self.vocab_size]
        if scale is not None:  # here it costs a row, in front of the product the whole head
            logits = logits * scale[: self.vocab_size].to(logits.dtype)
        if self.logit_softcap is None:
            return logits
        return self.logit_softcap(logits.to(at_least_fp32(logits.dtype)))

    def check_input(self, tokens: Tensor, doc_ids: Tensor | None, cache: Cache | None, learned: bool) -> int:
        """Refuse what a model (with `learned` positions) cannot process; returns the length of the cache."""
        past = 0 if cache is None else cache.length
        if doc_ids is not None and cache is not None:
            raise ValueError("doc_ids cannot be combined with a cache: a cached row is one document")
        length = past + tokens.shape[1]
        if learned and length > (n_ctx := self.cfg.n_ctx):
            raise ValueError(
                f"input of {length} tokens exceeds n_ctx ({n_ctx}): positions are learned, and there are no more. Give "
                f"at most {n_ctx} tokens at once, the start token among them"
            )
        return past


def through(
    blocks: Iterable[nn.Module], x: Tensor, shared: tuple[Any, ...], cache: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run x (B, T, D) through blocks. One that has more to tell returns (x, {name: tensor}): such tensors come back
    stacked along a new first dim, over the blocks that told."""
    told: list[dict[str, Tensor]] = []
    for block in blocks:
        x, more = out if isinstance(out := block(x, *shared, cache), tuple) else (out, {})
        told.append(more)
    return x, stacked(told)


def stacked(told: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the same name along a new first dim."""
    found: dict[str, list[Tensor]] = {}
    for more in told:
        for name, tensor in more.items():
            found.setdefault(name, []).append(tensor)
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def padded_vocabulary(vocab_size: int) -> int:
    """The next multiple of 128: odd numbers of columns make matrix products slow."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def positions_of(tokens: Tensor, past: int, doc_ids: Tensor | None) -> Tensor:
    """Of tokens (B, T) in their documents, to look up: (T,) where rows are one document each, else (B, T)."""
    if doc_ids is not None:
        return document_positions(doc_ids)
    return torch.arange(past, past + tokens.shape[1], device=tokens.device)


def document_positions(doc_ids: Tensor) -> Tensor:
    """Position of each token since the last change of document in its row, (B, T) -> (B, T) int64."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand(doc_ids.shape)
    starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values
