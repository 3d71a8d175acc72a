"""Whether the probabilities of all that may come at a place add up to one, through the path that scores text.

At sampled targets of a row every id of the vocabulary is put in as the token, and scored as any other text: nothing is
taken from logits. exp(-nats) of all of them is one; of a bound, which is estimated, at most one. Rows are short, as the
vocabulary may be large: V ids at each target, in parts of the run's batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from data.rows import Batch
from trainer.bench.certify.checks import Check, Path, of_one_row, tolerance

__all__ = ["Normalised", "normalisation"]

WINDOW = 16  # targets of a row that is tried
TOKENS = 2**18  # that are scored at most; but two targets are always tried
PLACES, FEWER_PLACES = 6, 2  # of exact scores, and of bounds, whose estimates take several passes
COPIES = 4  # estimates of each id that are averaged
Z = 5.0  # standard errors that an estimated sum may lie above one: 3 in 10,000,000 by chance


@dataclass(frozen=True)
class Normalised:
    """`own`: what shows that the model looks at the token that it is asked for; "" if nothing does."""

    check: Check
    own: str


def normalisation(path: Path, batch: Batch) -> Normalised:
    """`batch`: rows of at most `WINDOW` targets of text."""
    ids = vocabulary(path)
    bound = path.score(of_one_row(batch, 0, batch.tokens[:1], batch.weights[:1])).kind == "bound"
    places = _sampled(batch, len(ids), FEWER_PLACES if bound else PLACES)
    sums, errors = [], []
    for place in places:
        total, error = _sum(path, batch, place, ids)
        sums.append(total)
        errors.append(error)
    last = [target == batch.weights.shape[1] - 1 for _, target in places]
    most = tolerance(path.precision, path.device)
    name = "normalisation" if path.precision == "no" else f"normalisation in {path.precision}"
    asked = (
        f"every one of {len(ids):,} ids was put in as the token at {len(sums)} targets of text and scored: their "
        f"probabilities add up to {'at most one, as a bound leaves some over' if bound else 'one'}"
    )
    allowed = f"{most:g}, the rounding of {path.precision_name}"
    if bound:
        allowed += f", and {Z:g} standard errors of the estimate"
    limits = [most + Z * error for error in errors]
    off = [
        not (total - 1 <= limit) or (not bound and not total >= 1 - limit)
        for total, limit in zip(sums, limits, strict=True)
    ]
    worst = int(np.argmax(np.abs(np.nan_to_num(np.array(sums), nan=np.inf) - 1)))
    measured = {
        "smallest_sum": float(min(sums)),
        "largest_sum": float(max(sums)),
        "targets": float(len(sums)),
    }
    if not any(off):
        found = f"the sums are {min(sums):.6f} to {max(sums):.6f}"
        if any(errors):
            found += f", with standard errors of up to {max(errors):.2g}"
        return Normalised(Check(name, "passed", asked, allowed, found, measured), "")
    row, target = places[worst]
    found = (
        f"the probabilities of all ids at target {target} of row {row} add up to {sums[worst]:.6g}: "
        f"{'more than one' if bound else 'this is no distribution'}"
    )
    read = [wrong for wrong, end in zip(off, last, strict=True) if not end]
    unread = [wrong for wrong, end in zip(off, last, strict=True) if end]
    own = ""
    if not bound and read and all(read) and unread and not any(unread):
        own = (
            f"the probabilities of all ids add up to one where the network does not read the token, and to "
            f"{sums[worst]:.4g} where it does: the model looks at the very token that it is asked for"
        )
    return Normalised(Check(name, "failed", asked, allowed, found, measured), own)


def vocabulary(path: Path) -> np.ndarray:
    """Ids (V,) that are scored: those of the tokenizer, and what more the model has, without what no text may have."""
    own = getattr(path.adapter.model_cfg, "vocab_size", None)
    every = np.arange(max(path.adapter.tokenizer.vocab_size, own or 0))
    return every[~np.isin(every, list(path.adapter.reserved_ids))]


def _sampled(batch: Batch, size: int, most: int) -> list[tuple[int, int]]:
    """Rows and targets: the last one of a row, which the network never reads, and others, `most` at most and as many as
    there is time for."""
    length = batch.weights.shape[1]
    count = int(np.clip(TOKENS // max(1, size * length), 2, most))
    whole = np.flatnonzero(batch.weights[:, -1] > 0)
    found = [(int(whole[0]), length - 1)] if len(whole) else []
    every = [(int(r), int(p)) for r, p in np.argwhere(batch.weights > 0) if p < length - 1]
    chosen = np.random.default_rng(1).permutation(len(every))[: count - len(found)]
    return found + [every[i] for i in chosen]


def _sum(path: Path, batch: Batch, place: tuple[int, int], vocabulary: np.ndarray) -> tuple[float, float]:
    """Of exp(-nats) over all ids at one target, and the standard error of that, 0 where nothing is estimated. Estimates
    are means over `COPIES` of the row, whose numbers are others, and so is their noise; all ids have the same."""
    row, target = place
    alone = np.zeros_like(batch.weights[row : row + 1])
    alone[0, target] = 1
    one = path.score(of_one_row(batch, row, batch.tokens[row : row + 1], alone))
    copies = COPIES if one.variance is not None and bool(one.variance.any()) else 1
    nats = torch.zeros(len(vocabulary), dtype=torch.float64)
    variance = torch.zeros_like(nats)
    # Rows are shorter than those of the score: as many tokens at a time as a batch of these has.
    at_once = path.rows_of(batch.weights.shape[1])
    for start in range(0, len(vocabulary), at_once):
        ids = vocabulary[start : start + at_once]
        here = slice(start, start + len(ids))
        tokens = np.repeat(batch.tokens[row : row + 1], len(ids), axis=0)
        tokens[:, target + 1] = ids
        versions = of_one_row(batch, row, tokens, np.repeat(alone, len(ids), axis=0))
        for copy in range(copies):
            found = path.score(replace(versions, rows=versions.rows + copy))
            nats[here] += found.nats / copies
            if found.variance is not None:
                variance[here] += found.variance / copies**2
    p = torch.exp(-nats)
    # As the noise is one, errors of all ids go together. Half the variance is what exp adds to a noisy number.
    return float(p.sum()), float((p * (variance.sqrt() + variance / 2)).sum())
