"""What is looked up of a token and of the one before it.

Shapes: B rows, T tokens, D width, R rows of the table of pairs, S rows of signs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.cache import StateCache

__all__ = ["Bigrams", "Previous", "Smear", "previous", "tied"]

FACTORS = 36313, 27191  # of a token and of the one before it
SMEARING = 12  # dims of an embedding that decide how much of the one before is added


class Previous(NamedTuple):
    """`tokens` (B, T): in front of each; `exists` (B or 1, T) bool: whether there is one that it may look at."""

    tokens: Tensor
    exists: Tensor


def previous(
    tokens: Tensor, doc_ids: Tensor | None, cache: StateCache | None, within_documents: bool
) -> Previous:
    """Of tokens (B, T), which go on from a `cache` or begin a row: a row's first has none, and with `within_documents`
    the first of a document neither."""
    past = 0 if cache is None else cache.length
    before = tokens[:, :1] if cache is None or past == 0 else cache["token"]
    shifted = torch.cat((before, tokens[:, :-1]), 1)
    exists = past + torch.arange(tokens.shape[1], device=tokens.device)[None] > 0
    if within_documents and doc_ids is not None:
        exists = exists & F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0), value=True)
    return Previous(shifted, exists)


class Smear(nn.Module):
    """e_t + lambda sigmoid(w e_t[:12]) e_{t-1}."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(min(SMEARING, width), 1, bias=False)
        self.strength = nn.Parameter(torch.empty(()))

    def forward(self, e: Tensor, before: Tensor, exists: Tensor) -> Tensor:
        """e, before (B, T, D): embeddings of tokens and of those in front of them."""
        gate = torch.sigmoid(F.linear(e[..., : self.gate.in_features], self.gate.weight).to(e.dtype))
        return e + self.strength * gate * torch.where(exists[..., None], before, 0.0)

    def init_weights(self) -> None:
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.strength)


class Bigrams(nn.Module):
    """A row of a table, by a hash of a token and the one before it, times a row of signs, by another: pairs that share
    a row of the table mostly do not share their signs. The last row of the table is for tokens without one before."""

    signs: Tensor

    def __init__(self, rows: int, width: int, sign_rows: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        if sign_rows:
            self.register_buffer("signs", torch.empty(sign_rows, width, dtype=torch.int8))
        self.sign_rows = sign_rows

    def forward(self, tokens: Tensor, before: Previous) -> Tensor:
        """(B, T) -> (B, T, width)"""
        last = self.table.num_embeddings - 1
        token, one_before = tokens.to(torch.int32), before.tokens.to(torch.int32)
        hashed = ((FACTORS[0] * token) ^ (FACTORS[1] * one_before)) % last  # int32, which wraps around
        found = self.table(torch.where(before.exists, hashed, last))
        if not self.sign_rows:
            return found
        which = torch.where(before.exists, (token ^ one_before) % self.sign_rows, 0)
        return found * F.embedding(which, self.signs).to(found.dtype)

    def init_weights(self, generator: torch.Generator) -> None:
        nn.init.zeros_(self.table.weight)
        if self.sign_rows and not self.signs.is_meta:
            drawn = torch.randint(2, self.signs.shape, generator=generator, device=generator.device)
            self.signs.copy_(2 * drawn - 1)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return embedding.view_as(embedding), head.view_as(head)

    @staticmethod
    def backward(ctx: Any, of_embedding: Tensor, of_head: Tensor) -> tuple[Tensor, Tensor]:
        both = of_embedding + of_head
        return both, both  # autograd makes of it a gradient of its own for each


def tied(embedding: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Two parameters of equal values (V_p, D), each of which gets the gradients of both: equal they stay, and so do
    their moments, until this is not asked for any more."""
    return _Tied.apply(embedding, head)  # type: ignore[no-any-return]
