"""Which keys each query of an attention may look at: said once per forward pass, by the model.

Shapes: B rows, T queries, S keys (the last T of them the queries' own, unless a pattern says otherwise), N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.attention.block_diffusion import OnePass
from kernels.attention.masks import additive, same

__all__ = ["LONG", "MAX_PLAIN_KEYS", "NARROW", "QUERY_BLOCK", "Visible"]

# Of chunked.py: queries that are computed at a time, and keys that plain products of them are good for.
QUERY_BLOCK, MAX_PLAIN_KEYS = 128, 512
# The facts that there are more, or more queries where these go all at once; and that most keys are in nobody's window
# who is computed at the same time.
LONG, NARROW = "long", "narrow"
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Visible:
    """A query may look at a key if everything that is given here allows it.

    `causal`: at itself and what lies before it; `window`: at no more than so many tokens, itself included (needs
    `causal`). `doc_ids` (B, S), S = T: at its own document. `cu_seqlens` (N + 1,) int32 beside them: where the
    documents of all rows begin, rows laid end to end, 0 first and B T last, possibly repeated (data/offsets.py makes
    them); they must say the same, and let some implementations do without a mask. `pattern`: of block diffusion, in
    place of `causal`; its `doc_ids` are (B, S / 2). `mask` (B or 1, 1, T, S) bool: True where it may look. Every query
    must see a key.
    """

    rows: int
    queries: int
    keys: int
    device: torch.device
    causal: bool = True
    window: int | None = None
    doc_ids: Tensor | None = None
    cu_seqlens: Tensor | None = None
    pattern: OnePass | None = None
    mask: Tensor | None = None
    kept: dict[Any, Any] = field(
        default_factory=dict, init=False, repr=False
    )  # what implementations made of it

    def __post_init__(self) -> None:
        if self.window is not None and not (self.causal and self.window > 0):
            raise ValueError(
                f"window: must be at least 1 and causal, got {self.window}, causal={self.causal}"
            )
        if self.window is not None and self.window >= self.keys:
            object.__setattr__(self, "window", None)
        if self.pattern is not None and (self.causal or self.mask is not None):
            raise ValueError("pattern: takes the place of causal and mask; give causal=False and no mask")
        if self.causal and self.queries > self.keys:
            raise ValueError(
                f"queries: {self.queries} are more than the {self.keys} keys, and see no later ones"
            )
        if self.doc_ids is not None and self.pattern is None and self.queries != self.keys:
            raise ValueError(
                f"doc_ids: a cached row is one document, and {self.queries} queries look at {self.keys} keys"
            )
        if self.cu_seqlens is not None:
            self._check_offsets(self.cu_seqlens)

    def _check_offsets(self, offsets: Tensor) -> None:
        """On a CPU only: a GPU would have to be waited for."""
        if offsets.device.type != "cpu" or type(offsets) is not Tensor or torch.compiler.is_compiling():
            return
        tokens, values = self.rows * self.queries, offsets.numpy()
        if offsets.ndim != 1 or offsets.dtype != torch.int32 or len(values) < 2:
            given = f"{tuple(offsets.shape)} of {offsets.dtype}"
        elif (values[0], values[-1]) != (0, tokens):
            given = f"from {values[0]} to {values[-1]}"
        elif (values[1:] < values[:-1]).any():
            given = "some that go back"
        else:
            return
        raise ValueError(
            f"cu_seqlens: where documents begin, rows laid end to end: (N + 1,) int32 rising from 0 to B T = {tokens}, "
            f"got {given}. data/offsets.py makes them of doc_ids"
        )

    @classmethod
    def causally(
        cls,
        tokens: Tensor,
        past: int = 0,
        *,
        window: int | None = None,
        doc_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Visible:
        """Of tokens (B, T) behind `past` cached ones."""
        rows, length = tokens.shape
        offsets = None if doc_ids is None else cu_seqlens
        return cls(rows, length, past + length, tokens.device, True, window, doc_ids, offsets)

    @property
    def facts(self) -> tuple[str, ...]:
        """What the choice of an implementation may depend on."""
        found = {
            "causal": self.causal,
            "documents": self.doc_ids is not None,
            "offsets": self.cu_seqlens is not None,
            "window": self.window is not None,
            "block diffusion": self.pattern is not None,
            "mask": self.mask is not None,
            "cache": self.queries != self.keys and self.pattern is None,
            "one query": self.queries == 1,
            LONG: max(self._keys_at_a_time, 0 if self.causal else self.queries) > MAX_PLAIN_KEYS,
            NARROW: self.keys >= 2 * self._keys_at_a_time,
        }
        return tuple(name for name, holds in found.items() if holds)

    @property
    def plain(self) -> bool:
        """Whether a triangle, or everything, says it all: no tensor is needed."""
        bare = self.doc_ids is None and self.window is None and self.mask is None and self.pattern is None
        return bare and (not self.causal or self.queries in (self.keys, 1))

    @property
    def _keys_at_a_time(self) -> int:
        """Most keys that a block of queries looks at."""
        return self.keys if self.window is None else min(self.keys, self.window + QUERY_BLOCK - 1)

    def reach(self, queries: slice) -> slice:
        """The keys at which a causal block of queries, with a start and a stop, looks at all."""
        past = self.keys - self.queries
        first = 0 if self.window is None else max(0, past + queries.start - self.window + 1)
        return slice(first, past + queries.stop)

    def allowed(self, queries: slice = ALL, keys: slice = ALL) -> Tensor | None:
        """(B or 1, 1, T, S) bool, True where a query may look; None where it may look everywhere. Of some queries and
        keys, if there is no pattern."""
        mask = None if self.mask is None else self.mask[..., queries, keys]
        parts = [self._causal(queries, keys), self._documents(queries, keys), mask]
        if self.pattern is not None:
            parts = [self.pattern.mask(self.doc_ids)]
        given = [part for part in parts if part is not None]
        if not given:
            return None
        found = given[0]
        for part in given[1:]:
            found = found & part
        return found

    def _causal(self, queries: slice, keys: slice) -> Tensor | None:
        if not self.causal or (self.queries == 1 and self.window is None):
            return None
        query = torch.arange(self.keys - self.queries, self.keys, device=self.device)[queries, None]  # (T, 1)
        key = torch.arange(self.keys, device=self.device)[keys]  # (S,)
        allowed = key <= query
        if self.window is not None:
            allowed = allowed & (query - key < self.window)
        return allowed[None, None]

    def _documents(self, queries: slice, keys: slice) -> Tensor | None:
        return None if self.doc_ids is None else same(self.doc_ids[:, queries], self.doc_ids[:, keys])

    def bias(self, dtype: torch.dtype, queries: slice = ALL, keys: slice = ALL) -> Tensor | None:
        """What to add to scores, in their dtype: 0 where `allowed`, -inf elsewhere; None where nothing is forbidden."""
        return additive(self.allowed(queries, keys), dtype)
