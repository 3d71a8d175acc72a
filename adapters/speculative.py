"""Text in fewer forward passes: a model drafts the next tokens and puts them to the test all at once in its next pass
(Leviathan et al. 2023, arXiv:2211.17192; by the model itself: Stern et al. 2018, arXiv:1811.03115).

The text is what plain decoding writes: greedy, token for token; sampled, from the same law. But for rounding: a pass
over several tokens rounds otherwise than one over a single token, so that greedy text may part where the two best
logits lie within rounding of each other (never seen in fp64, in bf16 now and then).

Rows of a pass have all been read equally far (`adapters/decoding.py`), but do not accept equally many drafts. What all
of them are sure of is kept; a row that is ahead reads the rest of its own text again, in the places where the others
have their drafts, and waits when these do not fit behind it. What a row drafts and draws is a function of its own text
and generator: other rows only change when that happens. Windows slide when all rows have filled theirs.

Shapes: B running rows, T tokens read in a pass, r drafts of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adapters.base import Generation, Speculation
from adapters.decoding import Endings, Row, draw, in_turn, rows_of
from adapters.shaping import Shaping
from models.layers.decoder import Hidden
from models.layers.drafter import Drafter

__all__ = ["Draft", "DraftingModel", "speculate", "verdict"]

FILLER = 0  # a token that is read where a row has none: what is made of it is never looked at


@dataclass(frozen=True)
class DraftingModel:
    """The part of a model that speculative decoding needs."""

    init_drafter: Callable[[int], Drafter]  # rows -> empty
    hear: Callable[[Tensor | Hidden], Tensor]  # is told what a pass gave; its states
    logits: Callable[[Tensor], Tensor]  # states (M, D) -> (M, V)
    drafts: int  # in each round
    max_context: int | None
    device: torch.device


@dataclass(frozen=True)
class Draft:
    """`law`: the probabilities (V,) fp64 that the token was drawn with, after all shaping; None: the likeliest was
    taken."""

    token: int
    law: Tensor | None = None


@dataclass
class _Drafting:
    """A row, and the drafts behind its text that are to be tested."""

    row: Row
    drafts: list[Draft] = field(default_factory=list)

    def unread(self, length: int) -> int:
        """Tokens of the text behind the `length` first ones of the window."""
        return self.row.known - length

    def tokens(self, length: int, size: int) -> list[int]:
        """`size` tokens from there on: text, drafts, filler."""
        found = self.row.text[self.row.start + length :][:size]
        found += [draft.token for draft in self.drafts][: size - len(found)]
        return found + [FILLER] * (size - len(found))


def speculate(
    model: DraftingModel, texts: list[list[int]], shaping: Shaping, endings: Endings, seed: int
) -> Generation:
    """As `decode`, with drafts."""
    rows = rows_of(texts, seed)
    counted = Speculation([0] * model.drafts, [0] * model.drafts)
    calls = 0
    for group in in_turn(rows):
        together = _Together(model, [_Drafting(row) for row in group], shaping, endings, counted)
        while together.rows:
            together.round()
            calls += 1
    counted.tokens = sum(len(row.new) for row in rows)
    return Generation([row.new for row in rows], calls, counted)


@dataclass
class _Together:
    """Rows that are read in the same passes."""

    model: DraftingModel
    rows: list[_Drafting]
    shaping: Shaping
    endings: Endings
    counted: Speculation
    drafter: Drafter | None = None

    def round(self) -> None:
        """One forward pass: read, test, draft, keep what is sure."""
        drafter = self.windows()
        length = drafter.length
        tested, size = self.block(length)
        tokens = self.tensor([row.tokens(length, size) for row in self.rows])  # (B, T)
        states = self.model.hear(drafter.read(tokens))  # (B, T, D)
        self.counted.passes += len(self.rows)
        running = self.test(states, tested, length)
        if not running:
            self.rows = []
            return
        self.draft(drafter, tested & running, length, size)
        drafter.forget(min(*(self.rows[i].unread(0) - 1 for i in running), length + size))
        if len(running) < len(self.rows):
            drafter.select(self.tensor(sorted(running)))
            self.rows = [self.rows[i] for i in sorted(running)]

    def windows(self) -> Drafter:
        limit = self.model.max_context
        if self.drafter is None or (limit is not None and all(r.row.known > limit for r in self.rows)):
            for r in self.rows:
                r.row.slide(limit)
            self.drafter = self.model.init_drafter(len(self.rows))
        return self.drafter

    def block(self, length: int) -> tuple[set[int], int]:
        """Which rows are tested in this pass, and how many tokens it reads. The row that has been read furthest is
        tested; others too, unless they are so far ahead that their drafts do not lie within `drafts` of its own."""
        limit = self.model.max_context
        ends = {
            i: r.unread(length) + len(r.drafts)
            for i, r in enumerate(self.rows)
            if limit is None or r.row.known <= limit  # else it waits for all to slide
        }
        reach = min(r.unread(length) for r in self.rows) + 2 * self.model.drafts
        tested = {i for i, end in ends.items() if end <= reach}
        return tested, max(ends[i] for i in tested)

    def test(self, states: Tensor, tested: set[int], length: int) -> set[int]:
        """Let the model judge the drafts of the rows `tested`, and write; the rows whose text goes on."""
        running = set(range(len(self.rows)))
        order = sorted(tested)
        spans = [
            range(r.unread(length) - 1, r.unread(length) + len(r.drafts))
            for r in (self.rows[i] for i in order)
        ]
        at_row = self.tensor([i for i, span in zip(order, spans, strict=True) for _ in span])
        at_token = self.tensor([t for span in spans for t in span])
        logits = self.model.logits(states[at_row, at_token]).float().cpu()  # (M, V)
        parts = logits.split([len(span) for span in spans])
        for i, part in zip(order, parts, strict=True):
            r = self.rows[i]
            said = verdict(part, r.drafts, self.shaping, r.row.generator)
            before = len(r.row.new)
            if not self.endings.add(r.row, said):
                running.discard(i)
            stopped = len(r.row.new) - before < len(said)
            self.counted.count(len(r.drafts), len(said) - 1, len(r.row.new) - before + 1 if stopped else None)
            r.drafts = []
        return running

    def draft(self, drafter: Drafter, rows: set[int], length: int, size: int) -> None:
        """New drafts for `rows`, whose text has just grown: as many as its window and the text asked for have room."""
        wanted = {i: self.room(self.rows[i].row) for i in rows}
        tokens = self.tensor(
            [r.tokens(length, size + self.model.drafts) for r in self.rows]
        )  # (B, T + drafts)
        # What is drafted follows the newest token, which follows the last state that counts. Rows of which nothing is
        # wanted stand where the others do, or behind all that was read: nobody has to read anything for them.
        newest = [r.unread(length) - 1 if i in rows else size for i, r in enumerate(self.rows)]
        newest = [place if i in rows else min(newest) for i, place in enumerate(newest)]
        at = self.tensor(newest) - 1
        for depth in range(1, self.model.drafts + 1):
            logits = drafter.draft(depth, tokens, at)  # (B, V)
            takers = sorted(i for i, room in wanted.items() if room >= depth)
            if not takers:
                continue
            made = _drafts(
                logits[takers].float().cpu(), self.shaping, [self.rows[i].row.generator for i in takers]
            )
            for i, draft in zip(takers, made, strict=True):
                self.rows[i].drafts.append(draft)
                if depth < self.model.drafts:
                    tokens[i, newest[i] + depth] = draft.token

    def room(self, row: Row) -> int:
        """Drafts that can be tested next time: each test also gives a token of the model's own."""
        room = min(self.model.drafts, self.endings.max_new_tokens - len(row.new) - 1)
        return room if self.model.max_context is None else min(room, self.model.max_context - row.known)

    def tensor(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.model.device)


def _drafts(logits: Tensor, shaping: Shaping, generators: list[torch.Generator]) -> list[Draft]:
    """One of each row of logits (M, V)."""
    if shaping.temperature == 0:
        return [Draft(token) for token in shaping.only_tokens(logits).argmax(1).tolist()]
    laws = shaping(logits).exp()
    return [Draft(token, law) for token, law in zip(draw(laws, generators), laws, strict=True)]


def verdict(logits: Tensor, drafts: list[Draft], shaping: Shaping, generator: torch.Generator) -> list[int]:
    """What the model makes of r drafts, given its logits (r + 1, V) before each and behind the last: as many of them
    as are accepted, and a token of its own.

    A draft x, drawn with probability q(x), is accepted with min(1, p(x) / q(x)); where it is not, the model's token is
    drawn from max(p - q, 0), so that all is distributed as p (Leviathan et al. 2023, theorem 3.5). p is the law that
    plain decoding would draw from, shaped as q is. Greedy: both laws are sure of one token each.
    """
    if shaping.temperature == 0:
        own = shaping.only_tokens(logits).argmax(1).tolist()
        right = next((i for i, draft in enumerate(drafts) if draft.token != own[i]), len(drafts))
        return own[: right + 1]
    laws = shaping(logits).exp()  # (r + 1, V)
    said: list[int] = []
    for p, draft in zip(laws, drafts, strict=False):
        q = draft.law
        assert q is not None, "a draft is drawn in the way that it is judged"
        u = torch.rand((), generator=generator, dtype=torch.float64)
        if u * q[draft.token] >= p[draft.token]:
            rest = (p - q).clamp(min=0)
            # Where nothing is left, the laws are the same, and rounding alone refused.
            return said + draw((rest if rest.any() else p)[None], [generator])
        said.append(draft.token)
    return said + draw(laws[len(drafts)][None], [generator])
