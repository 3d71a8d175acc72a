"""How a model of recurrent depth reads where it does not learn: through a cache, and with what may be chosen then.

    exit_criterion      a token leaves when its state or its law has come to rest (`models/layers/exits.py`)
    kv_budget           recurrence i reads and writes the entries i mod m of the core's blocks
    continuous_compute  a token's state begins as the one before it ended, not as noise

(Geiping et al. 2025, arXiv:2502.05171, section 6.) The tokens of a pass go through the recurrences together, unless
what a token does depends on tokens before it being done: then they are read one by one, in a pass or not, with a cache
or not, so that text and scores are of one model. That is slow for long prompts, and for scores. (In bf16 a change that
is within rounding of the threshold may let a token leave at another recurrence where it is read in a piece of another
size.)

Shapes: B rows, R of them with tokens still on their way, T tokens, S tokens from the window's start on, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from configs.schema import Free, ModelConfig, NonNegativeFloat, Positive
from kernels.attention.masks import same
from models.layers.decoder import Hidden
from models.layers.exits import CRITERIA, Criterion, Watch, state_change
from models.layers.recurrent_cache import RecurrentCache

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from models.rd import RD

__all__ = ["DRAFTED", "ReadingConfig", "read", "read_together"]

FINAL, DRAFTED = (
    0,
    1,
)  # what the coda keeps of a token: of its last state, and of the one that drafts are made of


class ReadingConfig(ModelConfig):
    """What may be chosen where text is scored and written; training heeds none of it."""

    exit_criterion: Free[
        Literal["none", "kl", "latent-diff", "entropy-diff", "cosine", "argmax-stability", "minp-kl"]
    ] = "none"
    exit_threshold: Free[NonNegativeFloat | None] = None  # None = the criterion's own; 0 = never
    kv_budget: Free[Positive | None] = None  # entries that a core block keeps of a token; None = all
    continuous_compute: Free[bool] = False
    draft_recurrence: Free[Positive | None] = None  # r of drafts; None = a quarter of that of text

    # A model that has learned nothing never comes to rest.
    examples = {
        "exit_criterion": ("latent-diff", {"exit_threshold": 9.0}),
        "exit_threshold": (9.0, {"exit_criterion": "latent-diff"}),
        "kv_budget": 1,
    }
    rare = {
        "draft_recurrence": "text is the same whatever drafts are made with: tests/models/test_drafters.py"
    }

    @property
    def eval_depth(self) -> int:
        """Recurrences of scores and text."""
        raise NotImplementedError(f"{type(self).__name__} must define eval_depth")

    @property
    def draft_depth(self) -> int:
        return self.draft_recurrence or max(1, self.eval_depth // 4)

    @property
    def exit(self) -> Criterion | None:
        """None: tokens take all recurrences. No change is below a threshold of 0."""
        return CRITERIA[self.exit_criterion] if self.exit_criterion != "none" and self.threshold else None

    @property
    def threshold(self) -> float:
        own = CRITERIA[self.exit_criterion].threshold
        return own if self.exit_threshold is None else self.exit_threshold

    @property
    def shares_entries(self) -> bool:
        return self.kv_budget is not None and self.kv_budget < self.eval_depth

    @property
    def one_by_one(self) -> str:
        """What makes a token wait for those before it to be done, as `name=value`; "" where nothing does. A law is what
        the coda makes of a state behind what it kept of the tokens before, and that is of their last states."""
        if self.exit is not None and self.exit.of_laws:
            return f"exit_criterion={self.exit_criterion}"
        if self.shares_entries:
            return f"kv_budget={self.kv_budget}"
        return "continuous_compute=true" if self.continuous_compute else ""

    @property
    def reads_plainly(self) -> bool:
        """All tokens together, as often as each other, as in training."""
        return self.exit is None and not self.one_by_one

    def problems(self, run: RunConfig) -> list[str]:
        found, threshold = super().problems(run), self.exit_threshold
        if self.exit_criterion == "argmax-stability" and threshold is not None:
            nearest = max(1, round(threshold))
            if threshold != nearest:
                found.append(
                    f"model_cfg.exit_threshold ({threshold:g}) of exit_criterion=argmax-stability is a number of "
                    f"recurrences: a whole one, at least 1. Nearest: {nearest}"
                )
        return found

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.exit_criterion == "none":
            found["exit_threshold"] = "exit_criterion=none"
        if self.kv_budget is not None and not self.shares_entries:
            found["kv_budget"] = f"a depth of {self.eval_depth} recurrences"
        if self.one_by_one:
            found["draft_recurrence"] = self.one_by_one
        return found


def read(
    model: RD,
    tokens: Tensor,
    doc_ids: Tensor | None = None,
    cache: RecurrentCache | None = None,
    *,
    depth: int,
    seeds: Tensor | None = None,
) -> Hidden:
    """Tokens (B, T) behind what `cache` holds, or alone, through up to `depth` recurrences; hidden states (B, T, D).
    `Hidden.extra["recurrences"]` (B, T) where tokens may leave: how many each of them took; else `change` (B, T), as
    `RD.forward` gives it."""
    model.check_input(tokens, doc_ids, cache, learned=False)
    cfg, length = model.cfg, tokens.shape[1]
    if cache is None:
        # Tokens that all stand in the same recurrence need the entries of no other.
        cache = model.init_cache(len(tokens), depth if cfg.one_by_one else 1)
    size = 1 if cfg.one_by_one else length
    parts = [
        read_together(
            model,
            tokens[:, begin : begin + size],
            cache,
            depth=depth,
            doc_ids=None if doc_ids is None else doc_ids[:, : begin + size],
            seeds=seeds,
        )
        for begin in range(0, length, size)
    ]
    if len(parts) == 1:
        return parts[0]
    told = {name: torch.cat([part.extra[name] for part in parts], 1) for name in parts[0].extra}
    return Hidden(torch.cat([part.states for part in parts], 1), told)


@torch.no_grad()
def read_together(
    model: RD,
    tokens: Tensor,
    cache: RecurrentCache,
    *,
    depth: int,
    doc_ids: Tensor | None = None,
    seeds: Tensor | None = None,
    drafts_from: int | None = None,
    ends: int = FINAL,
) -> Hidden:
    """As `read`, tokens (B, T) that go through the recurrences together; doc_ids (B, S) from the window's start on.
    `ends`: what the coda keeps of them. `drafts_from`: it also keeps, as `DRAFTED`, what it makes of the states behind
    so many recurrences."""
    way = _Way(model, tokens, cache, doc_ids, seeds)
    shared, drafts = way.shared, None
    for turn in range(depth):
        way.recur(turn)
        if turn + 1 == drafts_from:
            drafts = way.states
        if not way.go_on(turn):
            break
    if drafts_from is not None:
        model.decode(way.states if drafts is None else drafts, shared, cache.turn(DRAFTED))
    hidden = way.hidden
    if hidden is None:
        hidden = model.decode(way.states, shared, cache.turn(ends))
    if way.watch is None:
        told = {"change": state_change(way.before, way.states)}
    else:
        told = {"recurrences": way.left_after.clamp(max=depth)}
        cache.close(model.core_places, told["recurrences"])
    if model.cfg.continuous_compute:
        cache.carried.append(way.states[:, -1])
    cache.advance(tokens.shape[1])
    return Hidden(hidden, told)


class _Way:
    """Of the tokens of a pass through the recurrences.

    `states` (B, T, D), and those `before` the last recurrence. `left_after` (B, T): how many recurrences a token took
    to leave; the largest number where it has not. `hidden` (B, T, D) behind the coda, where the criterion is of laws;
    else None.

    What is computed is of the rows in which tokens are still on their way: their numbers `rows` (R,) and which tokens
    these are, `walking` (R, T), both None where that is all; states `s` and what is injected `e`, (R, T, D), and what
    blocks share.
    """

    def __init__(
        self, model: RD, tokens: Tensor, cache: RecurrentCache, doc_ids: Tensor | None, seeds: Tensor | None
    ) -> None:
        self.model, self.tokens, self.cache, self.doc_ids = model, tokens, cache, doc_ids
        self.rows: Tensor | None = None
        self.walking: Tensor | None = None
        self.shared = self._shared()
        self.e = model.inject(tokens, self.shared, cache.turn())
        self.s = self.states = self.before = self._start(seeds)
        self.left_after = torch.full_like(tokens, torch.iinfo(tokens.dtype).max)
        self.watch: Watch | None = None
        self.of_laws = False
        self.hidden: Tensor | None = None
        if (criterion := model.cfg.exit) is not None:
            self.of_laws = criterion.of_laws
            start = self.s.new_zeros(*tokens.shape, model.vocab_size) if self.of_laws else self.s
            self.watch = criterion.watch(start, model.cfg.threshold)

    def _shared(self) -> tuple[Any, ...]:
        """What blocks share, of `rows`."""
        rows = slice(None) if self.rows is None else self.rows
        tokens, past = self.tokens[rows], self.cache.length
        if self.doc_ids is None:
            return self.model.shared(tokens, past, None)
        docs = self.doc_ids[rows]
        return self.model.shared(tokens, past, None, mask=same(docs[:, past:], docs))

    def _start(self, seeds: Tensor | None) -> Tensor:
        noise = self.model.start(self.e, self.cache.length, seeds)
        if not self.cache.carried:
            return noise
        carried = self.cache.carried[-1][:, None]  # (B, 1, D)
        if self.doc_ids is None:
            return carried
        goes_on = self.doc_ids[:, -1] == self.doc_ids[:, -2]  # not into another document
        return torch.where(goes_on[:, None, None], carried, noise)

    def recur(self, turn: int) -> None:
        """The (turn + 1)-th recurrence, of those that are on their way."""
        now = self.model.recur(self.s, self.e, self.shared, self.cache.turn(turn, self.rows, self.walking))
        self.s = now if self.walking is None else torch.where(self.walking[..., None], now, self.s)
        self.before, self.states = self.states, _placed(self.states, self.rows, self.s)

    def go_on(self, turn: int) -> bool:
        """Let those leave that may; whether any do not."""
        if self.watch is None:
            return True
        seen = self.s
        if self.of_laws:
            hidden = self.model.decode(self.s, self.shared, self.cache.turn(FINAL, self.rows))
            self.hidden = hidden if self.hidden is None else _placed(self.hidden, self.rows, hidden)
            seen = self.model.logits(hidden)
        staying = ~self.watch.settled(seen)  # (R, T)
        if self.walking is not None:
            staying = staying & self.walking
        self._note(staying, turn + 1)
        going = staying.any(1).nonzero()[:, 0]
        if len(going) < len(staying):
            self._keep(going)
            staying = staying[going]
        # Of single tokens those in the rows that are left are all on their way.
        self.walking = staying if staying.shape[1] > 1 else None
        return len(going) > 0

    def _note(self, staying: Tensor, recurrences: int) -> None:
        walked = torch.ones_like(staying) if self.walking is None else self.walking
        before = self.left_after if self.rows is None else self.left_after[self.rows]
        after = torch.where(walked & ~staying, recurrences, before)
        self.left_after = _placed(self.left_after, self.rows, after)

    def _keep(self, going: Tensor) -> None:
        """Go on with these of the rows."""
        self.rows = going if self.rows is None else self.rows[going]
        self.s, self.e = self.s[going], self.e[going]
        if self.watch is not None:
            self.watch.select(going)
        if self.doc_ids is not None:
            self.shared = self._shared()


def _placed(everyone: Tensor, rows: Tensor | None, of_rows: Tensor) -> Tensor:
    """`everyone` (B, ...) with those of `rows` (R, ...)."""
    return of_rows if rows is None else everyone.index_copy(0, rows, of_rows)
