"""The one comparable number: bits per byte of held-out text.

Held-out documents are scored whole, each from its start token, in windows of the model's own context. Every byte
is scored once; document ends and padding are left out and shown apart; the denominator is the raw text's byte
count. Sums run in fp64 and do not depend on batch size or the number of processes (beyond rounding). What is summed
may, as kernels round otherwise for a batch of another shape: by less than 1e-6 of a score in fp32, 1e-3 in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from adapters.base import Context, Likelihood, ModelAdapter
from data.errors import DataError
from trainer.bench.documents import PerDocument
from trainer.bench.statistics import ratio_standard_error
from trainer.memory import NoRoom, agree, shortage
from trainer.meter import Meter
from trainer.precision import autocast

if TYPE_CHECKING:
    from data.rows import Batch, HeldoutRows
    from trainer.distributed import World

__all__ = ["Score", "evaluate", "evaluating", "try_scoring"]


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    `standard_error`: the estimator's own noise in bits per byte (0 when exact). `documents_standard_error`: how far the
    score would move with other documents of the kind, in bits per byte (of a ratio of sums over documents; None for a
    single one). Two models scored on the same documents differ by much less noise than that.
    """

    bits_per_byte: float
    kind: str
    estimator: str
    standard_error: float
    documents_standard_error: float | None
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    end_nats_per_document: float | None  # None: ends are not modelled, or scored with the rest
    bytes: int
    tokens: int
    documents: int
    context_tokens: int
    context_bytes: float
    comparable: bool
    lossy_documents: int = 0  # of which the tokens do not give the text back
    non_causal_routing: bool = False  # choices saw later tokens: see `ModelAdapter.non_causal_routing`
    # Nats per token of what a bound consists of, and of other estimates or scores beside it.
    parts: dict[str, float] = field(default_factory=dict)
    estimates: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # what the adapter reports beside the score
    # Marks of the text of which the adapter reports no accuracy.
    no_accuracy: list[str] = field(default_factory=list)
    # "bits_per_byte" (None: of no text), "bytes" and "documents" by the source of a mixture.
    sources: dict[str, dict[str, float | None]] = field(default_factory=dict)
    # What was scored: "text", or the "answers" of chats, given what comes before: tokens and bytes are those of the
    # answers, nats also of the tokens that end them. The one does not compare with the other.
    of: Literal["text", "answers"] = "text"
    per_document: PerDocument | None = field(
        default=None, compare=False, repr=False
    )  # kept in a file of its own

    def as_dict(self) -> dict[str, Any]:
        told = asdict(replace(self, per_document=None))
        del told["per_document"]
        return told


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run the body in evaluation mode. Every part of `module` goes back to the mode that it was in."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode


def unheard(batch: Batch, found: Likelihood) -> None:
    """For `hear`, where nobody listens."""


@torch.no_grad()
def evaluate(
    adapter: ModelAdapter,
    rows: HeldoutRows,
    world: World,
    *,
    batch_rows: int,
    seed: int,
    precision: str = "no",
    should_stop: Callable[[], bool] = lambda: False,
    hear: Callable[[Batch, Likelihood], None] = unheard,
    estimates: bool = False,
) -> Score | None:
    """Score `rows`; None when a stop was asked for on any process before the end. ValueError where they hold no token
    of a text; on every process, NoRoom where one has no memory for a batch, and DataError where one cannot read it.

    Rows are dealt out to the processes in turn, all getting the same number of batches: what is missing at the
    end is padding that counts nowhere. `hear` is called with each batch of this process and what was found of it.
    `estimates`: also the other scores that the adapter has further passes for.
    """
    per_process = -(-rows.n_rows // world.size)
    mine = np.arange(per_process) * world.size + world.rank
    ctx = Context(seed=seed, step=0, phase="eval", rows_in_step=rows.n_rows, estimates=estimates)
    found: Likelihood | None = None
    metrics = Meter(world.device)
    sums = _Sums(len(rows.documents))
    adapter.on_evaluation_start()

    def score(batch: Batch) -> None:
        nonlocal found
        with autocast(precision, world.device):
            found = adapter.likelihood(batch, ctx)

    short = unreadable = ""
    with evaluating(adapter):
        for start in range(0, per_process, batch_rows):
            stop, given_up = world.maximum([should_stop(), bool(short or unreadable)])
            if given_up:
                break
            if stop:
                return None
            ids = mine[start : start + batch_rows]
            ids = np.where(ids < rows.n_rows, ids, -1)
            try:
                batch = rows.batch(ids)
            except DataError as error:
                unreadable = str(error)
                continue
            if short := shortage(lambda batch=batch: score(batch)):  # type: ignore[misc]
                continue
            assert found is not None
            metrics.add_metrics(found.metrics)
            sums.add(found, batch, rows.document_of[ids])
            hear(batch, found)
    if told := agree(world, short):
        raise NoRoom(told)
    if told := agree(world, unreadable):
        raise DataError(told)
    assert found is not None
    sums.add_up(world)
    total = sums.values
    if not total["tokens"]:
        raise ValueError("the text has no tokens, so that there is nothing to score")
    of_a_nat = 1 / (math.log(2) * rows.total_bytes)  # bits per byte
    per_token = total["nats"] / total["tokens"]
    return Score(
        bits_per_byte=total["nats"] * of_a_nat,
        kind=found.kind,
        estimator=found.estimator,
        standard_error=math.sqrt(total["variance"]) * of_a_nat,
        documents_standard_error=sums.spread_over_documents(),
        nats_per_token=per_token,
        bits_per_token=per_token / math.log(2),
        perplexity=math.exp(min(per_token, 700.0)),
        end_nats_per_document=None
        if found.end_nats is None or rows.scores == "answers"
        else total["end_nats"] / max(total["ends"], 1.0),
        bytes=rows.total_bytes,
        tokens=int(total["tokens"]),
        documents=len(rows.documents),
        context_tokens=rows.seq_len,
        context_bytes=round(rows.seq_len * rows.total_bytes / total["tokens"], 1),
        comparable=rows.complete and not rows.lossy_documents and not adapter.non_causal_routing,
        lossy_documents=rows.lossy_documents,
        non_causal_routing=adapter.non_causal_routing,
        parts={name: total[f"part {name}"] / total["tokens"] for name in found.parts},
        estimates={name: total[f"estimate {name}"] / total["tokens"] for name in found.estimates},
        metrics=metrics.read(world),
        no_accuracy=[name for name in rows.store.marks if f"{name}_accuracy" not in found.metrics],
        sources={name: sums.of(documents) for name, documents in rows.sources.items()},
        of=rows.scores,
        per_document=PerDocument(rows, sums.document_nats, sums.document_bytes.astype(np.int64)),
    )


@torch.no_grad()
def try_scoring(adapter: ModelAdapter, rows: HeldoutRows, precision: str, n: int) -> None:
    """Score the first `n` rows, to see whether memory suffices. Nothing remains of it."""
    ctx = Context(seed=0, step=0, phase="eval", rows_in_step=rows.n_rows)
    ids = np.arange(n)
    with evaluating(adapter), autocast(precision, adapter.device):
        adapter.likelihood(rows.batch(np.where(ids < rows.n_rows, ids, -1)), ctx)
    adapter.on_evaluation_start()


class _Sums:
    """Sums over rows in fp64, local until `add_up`; and nats and bytes of each document."""

    def __init__(self, documents: int) -> None:
        self.values: dict[str, float] = {}
        self.document_nats, self.document_bytes = np.zeros(documents), np.zeros(documents)

    def add(self, found: Likelihood, batch: Batch, document: np.ndarray) -> None:
        """document (B,): of each row."""
        assert batch.sizes is not None
        one = {
            "nats": found.nats,
            "end_nats": found.end_nats,
            "variance": found.variance,
            "tokens": batch.weights,
            "ends": batch.end_weights,
            **{f"part {k}": v for k, v in found.parts.items()},
            **{f"estimate {k}": v for k, v in found.estimates.items()},
        }
        for name, value in one.items():
            sum_ = 0.0 if value is None else float(np.asarray(value, dtype=np.float64).sum())
            self.values[name] = self.values.get(name, 0.0) + sum_
        np.add.at(self.document_nats, document, found.nats.numpy())
        np.add.at(self.document_bytes, document, batch.sizes.sum(1))

    def add_up(self, world: World) -> None:
        """Over all processes."""
        n, names = len(self.document_nats), list(self.values)
        every = world.add_up([*self.values.values(), *self.document_nats, *self.document_bytes])
        self.values = dict(zip(names, every, strict=False))
        self.document_nats, self.document_bytes = np.array(every[len(names) :]).reshape(2, n)

    def of(self, documents: np.ndarray) -> dict[str, float | None]:
        """What some of the documents (n,) bool come to, or so much of them as was scored."""
        bytes_, nats = int(self.document_bytes[documents].sum()), float(self.document_nats[documents].sum())
        return {
            "bits_per_byte": nats / math.log(2) / bytes_ if bytes_ else None,
            "bytes": bytes_,
            "documents": int(documents.sum()),
        }

    def spread_over_documents(self) -> float | None:
        """Standard error in bits per byte of the ratio nats / bytes, documents being drawn at random."""
        scored = self.document_bytes > 0
        error = ratio_standard_error(self.document_nats[scored], self.document_bytes[scored])
        return None if error is None else error / math.log(2)
