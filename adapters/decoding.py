"""Text from left to right, many rows at once, over any cache that `models.layers.cache.Cache` describes.

The rows of a forward pass have always seen equally many tokens of their windows. Where one row's prompt is longer
than another's, it is still being read, token by token, while the shorter one is already continued; as soon as every
row has more to read, they read all of it at once. So no row is padded, no model needs masks or positions of single
rows, states of a recurrence stay exact, and rows reach the end of the model's context together. The price is that
passes are counted from the shortest prompt: a prompt that is n tokens longer than the shortest costs up to n more.

Shapes: B running rows, T tokens read in a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.base import Generation, OnTokens
from adapters.shaping import Shaping
from models.layers.cache import Cache

__all__ = ["Endings", "LanguageModel", "Row", "decode", "draw", "in_turn", "rows_of", "sample_next"]

# Rows in one forward pass; more are taken in turn, so that memory has a bound whatever is asked for.
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class LanguageModel:
    """The part of a model that decoding needs."""

    # Tokens (B, T) behind the cache's, `Row.opening` of each row (B, 1), None of text -> (B, V).
    next_logits: Callable[[Tensor, Cache | None, Tensor | None], Tensor]
    init_cache: Callable[[int], Cache] | None  # rows -> empty; None = each pass reads whole windows
    max_context: int | None  # tokens it can look back on; None = all
    device: torch.device


@dataclass
class Row:
    """`text` from the document token on, of which the model sees the window from `start`. `opening`, of chats: how many
    tokens the window begins with that were given before the first answer; where it starts anew, all it has then."""

    number: int
    text: list[int]
    prompt: int  # tokens of `text` that were given
    generator: torch.Generator
    start: int = 0
    opening: int | None = None

    @property
    def known(self) -> int:
        """Tokens of the window."""
        return len(self.text) - self.start

    @property
    def new(self) -> list[int]:
        return self.text[self.prompt :]

    def slide(self, limit: int | None) -> None:
        """Positions may be absolute, so a full window starts anew with its last half."""
        if limit is not None and self.known > limit:
            self.start = len(self.text) - max(1, limit // 2)
            self.opening = None if self.opening is None else self.known


@dataclass(frozen=True)
class Endings:
    """How far texts go, and who hears of them."""

    max_new_tokens: int
    stops: set[int]
    on_tokens: OnTokens | None = None

    def add(self, row: Row, tokens: list[int]) -> bool:
        """Append `tokens` to a row's text, up to a stop, which is not part of it, or to the length asked for; whether
        the text goes on."""
        room = self.max_new_tokens - len(row.new)
        stop = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        new = tokens[: min(room, stop)]
        row.text += new
        if new and self.on_tokens is not None:
            self.on_tokens(row.number, new)
        return stop == len(tokens) and len(new) < room


def rows_of(texts: list[list[int]], seed: int) -> list[Row]:
    """Each row has a generator of its own, made of (seed, row)."""
    return [
        Row(i, list(text), len(text), torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63))
        for i, text in enumerate(texts)
    ]


def in_turn(rows: list[Row]) -> Iterator[list[Row]]:
    """As many at once as there may be."""
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[first : first + ROWS_AT_ONCE]


def decode(
    model: LanguageModel,
    texts: list[list[int]],
    shaping: Shaping,
    endings: Endings,
    seed: int,
    openings: Sequence[int] = (),
) -> Generation:
    """Continue each of `texts` (not empty) as far as `endings` says. `openings`, of chats: `Row.opening` of each."""
    rows = rows_of(texts, seed)
    for row, opening in zip(rows, openings, strict=bool(openings)):
        row.opening = opening
    calls = sum(_decode_together(model, group, shaping, endings) for group in in_turn(rows))
    return Generation([row.new for row in rows], calls)


def _decode_together(model: LanguageModel, rows: list[Row], shaping: Shaping, endings: Endings) -> int:
    """Appends to the rows' texts; returns the number of forward passes."""
    window = _Windows(model)
    while rows:
        # Rows whose windows are full are so together: all have been read to the same length.
        for row in rows:
            row.slide(model.max_context)
        logits = window.read(rows)  # (B, V)
        read_out = [i for i, row in enumerate(rows) if row.known == window.length]
        if len(read_out) < len(rows):
            logits = logits[read_out]
        tokens = sample_next(logits, shaping, [rows[i].generator for i in read_out])
        finished = {i for i, token in zip(read_out, tokens, strict=True) if not endings.add(rows[i], [token])}
        if finished:
            running = [i for i in range(len(rows)) if i not in finished]
            rows = [rows[i] for i in running]
            window.keep(running)
    return window.calls


class _Windows:
    """The windows of the running rows, read up to a common length."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.length = self.calls = 0
        self.cache: Cache | None = None

    def read(self, rows: list[Row]) -> Tensor:
        """Read on to the end of the shortest window; the logits behind it, (B, V) fp32 on the CPU."""
        shortest = min(row.known for row in rows)
        if shortest <= self.length:  # the windows have moved on
            self.length, self.cache = 0, None
        if self.cache is None and self.model.init_cache is not None:
            self.cache = self.model.init_cache(len(rows))
        first = 0 if self.cache is None else self.length
        windows = [row.text[row.start + first : row.start + shortest] for row in rows]
        tokens = torch.tensor(windows, dtype=torch.int64, device=self.model.device)  # (B, T)
        logits = self.model.next_logits(tokens, self.cache, self._openings(rows))
        self.length = shortest
        self.calls += 1
        assert self.cache is None or self.cache.length == shortest, "the model has not counted its tokens"
        return logits.float().cpu()

    def _openings(self, rows: list[Row]) -> Tensor | None:
        known = [[row.opening] for row in rows if row.opening is not None]
        return torch.tensor(known, dtype=torch.int64, device=self.model.device) if known else None

    def keep(self, running: list[int]) -> None:
        if self.cache is not None and running:
            self.cache.select(torch.tensor(running, dtype=torch.int64, device=self.model.device))


def sample_next(logits: Tensor, shaping: Shaping, generators: list[torch.Generator]) -> list[int]:
    """Draw a token id from each row of logits (M, V), with its own generator. In fp64: fp32 noise truncates the
    tails."""
    if shaping.temperature == 0:
        return shaping.only_tokens(logits).argmax(1).tolist()
    return draw(shaping(logits).exp(), generators)


def draw(weights: Tensor, generators: list[torch.Generator]) -> list[int]:
    """An index of each row of weights (M, V) fp64, in proportion to them, with the row's own generator."""
    # The first of exponential clocks with these rates, which is what torch.multinomial draws of each row too: at
    # times -log(1 - u), taken of all rows at once. `exponential_` makes the same numbers one by one, at four times the
    # cost: a fifth of a pass of 64 rows.
    times = torch.empty_like(weights)
    for row, generator in zip(times, generators, strict=True):
        row.uniform_(generator=generator)
    times = times.neg_().log1p_().neg_()
    return (weights / times).argmax(1).tolist()
