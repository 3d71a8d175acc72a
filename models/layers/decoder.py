"""What every decoder here offers to the outside, besides its own `forward`.

Shapes: B rows, T tokens, D width, V vocabulary, V_p padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DefaultModelConfig
from kernels.choose import UsesKernels
from kernels.precision import at_least_fp32, compute_dtype
from kernels.softcap import Softcap
from models.layers.cache import Cache, KVCache

__all__ = ["Decoder", "Hidden", "document_positions", "padded_vocabulary"]

VOCABULARY_MULTIPLE = 128


@dataclass
class Hidden:
    """What a backbone returns in place of a plain tensor when it has more to tell: hidden states (B, T, D), and by name
    what its adapter makes loss terms and metrics of, such as balance losses or tokens per expert."""

    states: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


class Decoder(UsesKernels):
    """Head and cache of a decoder with a padded, possibly tied vocabulary.

    A subclass sets `lm_head` (None when tied), and defines `embedding_weight` and `forward`.
    """

    cfg: DefaultModelConfig
    lm_head: nn.Linear | None
    logit_softcap: Softcap | None = None  # of all logits, in training, scoring and generation

    def __init__(self, cfg: DefaultModelConfig) -> None:
        super().__init__()
        if cfg.vocab_size is None:
            raise ValueError("vocab_size: must be filled in before the model is built")
        self.cfg, self.vocab_size = cfg, cfg.vocab_size

    @property
    def embedding_weight(self) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define embedding_weight")

    @property
    def head_weight(self) -> Tensor:
        """(V_p, D). Rows from `vocab_size` on are padding."""
        return self.embedding_weight if self.lm_head is None else self.lm_head.weight

    @property
    def max_context(self) -> int | None:
        """Tokens that generation may look back on; None = all of them."""
        return self.cfg.n_ctx

    def init_cache(self, rows: int) -> Cache:
        return KVCache(self.cfg.n_layers, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): without the padding. Capped ones in at least fp32."""
        weight = self.head_weight
        if compute_dtype(weight) != hidden.dtype:
            weight = weight.to(hidden.dtype)
        # Sliced behind the product: autocast converts a whole parameter once, a slice of it in every call.
        logits = F.linear(hidden, weight)[..., : self.vocab_size]
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


def padded_vocabulary(vocab_size: int) -> int:
    """The next multiple of 128: odd numbers of columns make matrix products slow."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def document_positions(doc_ids: Tensor) -> Tensor:
    """Position of each token since the last change of document in its row, (B, T) -> (B, T) int64."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand(doc_ids.shape)
    starts = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values
