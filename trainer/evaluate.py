"""The one comparable number: bits per byte of held-out text, and the `eval` command that prints it.

Held-out documents are scored whole, each from its start token, in windows of the model's own context. Every byte
is scored once; document ends and padding are left out and shown apart; the denominator is the raw text's byte
count. Sums run in fp64 and do not depend on batch size or the number of processes (beyond rounding).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapters.base import Context, ModelAdapter
from trainer.precision import autocast
from trainer.signals import StopSignal

if TYPE_CHECKING:
    from data.rows import HeldoutRows
    from trainer.distributed import World

__all__ = ["Score", "evaluate", "main"]


@dataclass(frozen=True)
class Score:
    """What an evaluation found. `standard_error` is the estimator's own noise in bits per byte (0 when exact)."""

    bits_per_byte: float
    kind: str
    estimator: str
    standard_error: float
    nats_per_token: float
    perplexity: float
    end_nats_per_document: float
    bytes: int
    tokens: int
    documents: int
    context_tokens: int
    context_bytes: float
    comparable: bool
    # Bits per byte of what a bound consists of, and of other estimates of it; empty when exact.
    parts: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """`1.234`, or `<= 1.234 +- 0.005` for a bound."""
        if self.kind == "exact":
            return f"{self.bits_per_byte:.3f}"
        return f"<= {self.bits_per_byte:.3f} +- {self.standard_error:.3f}"


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
) -> Score | None:
    """Score `rows`; None when a stop was asked for on any process before the end.

    Rows are dealt out to the processes in turn, all getting the same number of batches: what is missing at the
    end is padding that counts nowhere.
    """
    training = adapter.training
    adapter.eval()
    per_process = -(-rows.n_rows // world.size)
    mine = np.arange(per_process) * world.size + world.rank
    ctx = Context(seed=seed, step=0, phase="eval", rows_in_step=rows.n_rows)
    nats = end_nats = variance = tokens = ends = 0.0
    kind, estimator = "exact", "exact"
    parts: dict[str, float] = {}
    try:
        for start in range(0, per_process, batch_rows):
            if world.agree(should_stop()):
                return None
            ids = mine[start : start + batch_rows]
            batch = rows.batch(np.where(ids < rows.n_rows, ids, -1))
            with autocast(precision, world.device):
                found = adapter.likelihood(batch, ctx)
            kind, estimator = found.kind, found.estimator
            nats += float(found.nats.sum())
            end_nats += float(found.end_nats.sum())
            tokens += float(batch.weights.sum(dtype=np.float64))
            ends += float(batch.end_weights.sum(dtype=np.float64))
            if found.variance is not None:
                variance += float(found.variance.sum())
            for name, part in found.parts.items():
                parts[name] = parts.get(name, 0.0) + float(part.sum())
    finally:
        adapter.train(training)
    sums = world.add_up([nats, end_nats, variance, tokens, ends, *parts.values()])
    nats, end_nats, variance, tokens, ends = sums[:5]
    per_token = nats / tokens
    bits_per_byte = 1 / (math.log(2) * rows.total_bytes)  # of one nat
    context_bytes = rows.seq_len * rows.total_bytes / tokens
    return Score(
        bits_per_byte=nats * bits_per_byte,
        kind=kind,
        estimator=estimator,
        standard_error=math.sqrt(variance) * bits_per_byte,
        nats_per_token=per_token,
        perplexity=math.exp(min(per_token, 700.0)),
        end_nats_per_document=end_nats / max(ends, 1.0),
        bytes=rows.total_bytes,
        tokens=int(tokens),
        documents=len(rows.documents),
        context_tokens=rows.seq_len,
        context_bytes=round(context_bytes, 1),
        comparable=rows.complete,
        parts={name: part * bits_per_byte for name, part in zip(parts, sums[5:], strict=True)},
    )


def main(argv: list[str]) -> int:
    """`python mytrainer.py eval`: score a checkpoint on held-out text."""
    from trainer.restore import add_checkpoint_arguments, restore

    parser = argparse.ArgumentParser(
        prog="python mytrainer.py eval",
        description="Bits per byte of a trained model on the held-out documents of its run, or of other text.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--data", choices=["embedded", "text", "synthetic"], help="score other data than the run's"
    )
    parser.add_argument(
        "--input_file", help="with --data text: a file or folder; its held-out part is scored"
    )
    parser.add_argument("--val_seq_len", type=int, help="context in tokens (default: the run's)")
    parser.add_argument("--val_bytes", type=int, help="score at most this many bytes of whole documents")
    parser.add_argument("--batch_size", type=int, help="rows per forward pass (default: the run's)")
    parser.add_argument("--output", help="also write the result to this JSON file")
    args = parser.parse_args(argv)
    for name in ("val_seq_len", "val_bytes", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}: must be at least 1, got {getattr(args, name)}")
    if args.input_file and args.data != "text":
        raise ValueError("input_file is read by --data text only. Add --data text")
    if args.output:  # found out now, not when the work is done
        _require_writable(Path(args.output))

    from data import load_dataset
    from data.rows import HeldoutRows
    from trainer.checkpoint import write_atomically
    from trainer.distributed import World

    changes = {
        name: getattr(args, name) for name in ("data", "input_file", "val_seq_len") if getattr(args, name)
    }
    restored = restore(args, changes)
    cfg = restored.cfg
    dataset = load_dataset(cfg, tokenizer=restored.tokenizer)
    rows = HeldoutRows(
        dataset.heldout,
        restored.tokenizer.eot,
        cfg.val_seq_len or cfg.train_seq_len,
        lookahead=restored.adapter.data_spec().lookahead,
        max_bytes=args.val_bytes or cfg.val_bytes,
    )
    with StopSignal() as stop:
        score = evaluate(
            restored.adapter,
            rows,
            World(restored.device),
            # The run's own batch: the same shapes round alike, so its score comes out to the last digit.
            batch_rows=args.batch_size or restored.micro_rows,
            seed=cfg.seed,
            precision=restored.precision,
            should_stop=lambda: stop.requested,
        )
    if score is None:
        print(f"{stop.name} received: stopped before the score was complete", file=sys.stderr)
        return 0
    result = {
        "checkpoint": str(restored.checkpoint) if restored.checkpoint else None,
        "type": cfg.type,
        "weights": restored.weights,
        "data": dataset.name,
        "data_fingerprint": dataset.fingerprint,
        "precision": restored.precision,
        "score": score.as_dict(),
    }
    print(f"{cfg.type} ({restored.weights} weights) on the held-out part of {dataset.name}", file=sys.stderr)
    print(f"  bits per byte     {score.text()}", file=sys.stderr)
    print(
        f"  nats per token    {score.nats_per_token:.4f}  (perplexity {score.perplexity:.2f})",
        file=sys.stderr,
    )
    print(f"  text              {score.documents:,} documents, {score.bytes:,} bytes", file=sys.stderr)
    print(
        f"  context           {score.context_tokens} tokens, {score.context_bytes:.0f} bytes", file=sys.stderr
    )
    print(json.dumps(result))
    if args.output:
        write_atomically(Path(args.output), json.dumps(result, indent=2) + "\n")
    return 0


def _require_writable(path: Path) -> None:
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"output: cannot write {path}. Give a file in an existing folder")
