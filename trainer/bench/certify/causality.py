"""Whether what is said of a text depends on what comes behind it.

A place of a row is chosen; the token there and all behind it are replaced by others. What is said of every target
before that place must stay: its own token stayed, and what it may look at did. That a model does not look at the very
token that it is asked for shows elsewhere: put in every id in turn, and the probabilities still add up to one
(`normalisation`), at targets that the network goes on to read.

S targets of a row.
"""

from __future__ import annotations

import numpy as np
import torch

from data.rows import Batch
from trainer.bench.certify.checks import Check, Path, of_one_row, tolerance

__all__ = ["causality"]

ROWS, PLACES = 4, 8  # rows that are tried, and places of each


def causality(path: Path, batch: Batch, ids: np.ndarray, own: str) -> Check:
    """`batch`: rows of text; `ids`: what is put in, ids that text has. `own`: what `normalisation` found of a model
    that looks at the token it is asked for, "" if nothing."""
    together = path.adapter.scored_together
    name = "causality" if path.precision == "no" else f"causality in {path.precision}"
    asked = (
        f"in {min(ROWS, len(batch.rows))} rows of text the token at a place and all behind it were replaced, at up to "
        f"{PLACES} places each; what is said of every target before the place must stay"
    )
    most = tolerance(path.precision, path.device)
    allowed = f"{most:g} nats of a target, the rounding of {path.precision_name}"
    if together is None:
        return Check(
            name, "not asked", asked, allowed, "rows are scored whole, in no order: there is no text to come"
        )
    moved, behind, at = 0.0, 0.0, (-1, -1)
    tried = 0
    rng = np.random.default_rng(0)
    for row in range(min(ROWS, len(batch.rows))):
        targets = int(np.flatnonzero(batch.weights[row]).max(initial=-1)) + 1
        places = np.arange(together, targets, together)
        if not len(places):
            continue
        places = np.sort(rng.choice(places, min(PLACES, len(places)), replace=False))
        before, after, worst = _of_row(path, batch, row, places, ids, rng)
        tried += len(places)
        behind = max(behind, after)
        if not before <= moved:
            moved, at = before, (row, worst)
    measured = {"nats": moved, "nats_behind": behind, "places": float(tried)}
    if not tried:
        return Check(name, "not asked", asked, allowed, "no row has a target before another", measured)
    found = f"{tried} places: at most {moved:.2g} nats before them, {behind:.2g} behind"
    declared = path.adapter.non_causal_routing
    if not moved <= most:
        found = (
            f"what is said of targets before place {at[1]} of row {at[0]} moved by {moved:.3g} nats as tokens behind "
            f"it changed: the model looks ahead"
        )
    elif own:
        found = own
    if declared:
        found += "; it says so of itself (non_causal_routing): no score of it is one of text to come"
    passed = moved <= most and not own and not declared
    return Check(name, "passed" if passed else "failed", asked, allowed, found, measured)


def _of_row(
    path: Path, batch: Batch, row: int, places: np.ndarray, ids: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, int]:
    """The largest changes in nats of a target before the places and behind them, and the place of the first. Place j:
    targets before j keep their tokens, tokens from j + 1 on (the first is the row's context) are others."""
    length = batch.weights.shape[1]
    tokens = np.repeat(batch.tokens[row : row + 1], len(places), axis=0)
    others = _others(tokens, ids, rng)
    position = np.arange(tokens.shape[1])
    changed = np.where(position > places[:, None], others, tokens)
    # Each beside the row as it is, in one batch: equal shapes round alike.
    weights = np.repeat(batch.weights[row : row + 1], 2 * len(places), axis=0)
    pair = np.concatenate([tokens, changed])
    nats, each = path.by_target(of_one_row(batch, row, pair, weights))
    early = torch.from_numpy(np.arange(length) < places[:, None])
    if not each:  # of all targets before the place together: the others are left out
        kept = np.concatenate([early.numpy()] * 2)
        whole = nats
        nats, _ = path.by_target(of_one_row(batch, row, pair, weights * kept))
        early = torch.ones(len(places), 1, dtype=torch.bool)
        late = (whole - nats)[: len(places)] - (whole - nats)[len(places) :]
    moved = (nats[: len(places)] - nats[len(places) :]).abs()
    if each:
        late = torch.where(early, 0.0, moved)
        moved = torch.where(early, moved, 0.0)
    moved = torch.nan_to_num(moved, nan=torch.inf)
    by_place = moved.amax(1)
    return float(by_place.max()), float(late.abs().max()), int(places[int(by_place.argmax())])


def _others(tokens: np.ndarray, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of each token another one of `ids`, which are two at least and in order."""
    place = np.searchsorted(ids, tokens).clip(0, len(ids) - 1)
    return ids[(place + rng.integers(1, len(ids), tokens.shape)) % len(ids)]
