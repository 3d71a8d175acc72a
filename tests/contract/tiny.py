"""Tiny versions of every architecture in the table, and the ways the contract tests run them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from adapters import build_adapter
from adapters.base import Context, ModelAdapter
from configs import compose
from configs.schema import RunConfig
from data.rows import Batch
from models import ARCHITECTURES
from trainer.batching import StepBatch
from trainer.loop import Trainer
from trainer.optim.schedules import schedule_factor
from trainer.session import Session

GOLDEN = Path(__file__).parent / "golden"
TYPES = sorted(ARCHITECTURES)
VOCABULARY = 64
SEQ_LEN = 32

# Sizes that every architecture understands. What one of them needs besides goes into EXTRA.
SIZES = ["model_cfg.d_model=64", "model_cfg.n_layers=2", "model_cfg.n_heads=4", f"model_cfg.n_ctx={SEQ_LEN}"]
_FEW = ["model_cfg.nelbo_draws=4"]
EXTRA: dict[str, list[str]] = {
    "d3pm": [*_FEW, "model_cfg.sampling_timesteps=8", "model_cfg.num_timesteps=50"],
    "mdl": [*_FEW, "model_cfg.num_sampling_steps=8"],
    "sedd": [*_FEW, "model_cfg.sampling_timesteps=8"],
    "bd3lm": [*_FEW, "model_cfg.num_sampling_steps=8", "model_cfg.block_length=8"],
}
RUN = [
    "preset=none",
    "data=synthetic",
    "synthetic_bytes=20000",
    f"train_seq_len={SEQ_LEN}",
    "global_batch_size=4",
    "num_iterations=6",
    "val_loss_every=3",
    "val_bytes=2000",
    "logging_steps=2",
    "sample_tokens=4",
    "device=cpu",
    "mixed_precision=no",
    "save_minutes=null",
]


def overrides(type_: str, *more: str) -> list[str]:
    """Command-line arguments; a later value replaces an earlier one of the same key."""
    merged = {item.partition("=")[0]: item for item in [*SIZES, *EXTRA.get(type_, []), *RUN, *more]}
    return [f"--hydra_model_cfg={type_}", *merged.values()]


def config(type_: str, *more: str) -> tuple[RunConfig, Any]:
    return compose(overrides(type_, *more))


class Letters:
    """A tokenizer of `size` symbols, the last of them the document token."""

    def __init__(self, size: int = VOCABULARY) -> None:
        self.vocab_size, self.eot, self.name, self.digest = size, size - 1, "letters", "0" * 64
        self.token_bytes = np.array([1] * (size - 1) + [0])


def adapter_of(
    type_: str, *more: str, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> ModelAdapter:
    cfg, model_cfg = config(type_, *more)
    return build_adapter(cfg, model_cfg, Letters(vocabulary)).to(dtype)


def random_batch(
    rows: int = 4, length: int = SEQ_LEN, vocabulary: int = VOCABULARY, seed: int = 0, n: int = 1
) -> Batch:
    """Rows of random letters, each one document; every target scored."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary - 1, (rows, length + n))
    tokens[:, 0] = vocabulary - 1
    return batch_of(tokens, n)


def batch_of(tokens: np.ndarray, n: int = 1, first_row: int = 0) -> Batch:
    scored = (len(tokens), tokens.shape[1] - n)
    return Batch(
        tokens=tokens.astype(np.int64),
        doc_ids=np.zeros(tokens.shape, np.int32),
        weights=np.ones(scored, np.float32),
        end_weights=np.zeros(scored, np.float32),
        rows=np.arange(first_row, first_row + len(tokens)),
        bytes=int(np.prod(scored)),
    )


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    """The same rows cut into micro-batches."""
    edges = np.cumsum([0, *sizes])
    parts = []
    for a, b in zip(edges, edges[1:], strict=False):
        fields = {k: getattr(batch, k)[a:b] for k in ("tokens", "doc_ids", "weights", "end_weights", "rows")}
        parts.append(Batch(**fields, bytes=int(fields["weights"].sum())))
    return parts


def context(rows: int = 4, step: int = 0, phase: str = "train") -> Context:
    return Context(seed=1337, step=step, phase=phase, rows_in_step=rows)  # type: ignore[arg-type]


def loss_and_gradients(adapter: ModelAdapter, parts: list[Batch], rows: int = 4) -> tuple[dict, dict]:
    """Sums of every loss term over the parts divided by the step's denominators, and the gradient by name."""
    adapter.zero_grad(set_to_none=True)
    prepared = [adapter.prepare(part, context(rows)) for part in parts]
    denominators: dict[str, float] = {}
    for p in prepared:
        for name, value in p.denominators.items():
            denominators[name] = denominators.get(name, 0.0) + value
    losses: dict[str, float] = {}
    for p in prepared:
        output = adapter(p)
        total = torch.zeros((), dtype=torch.float64)
        for name, term in output.terms.items():
            part = term.sum / denominators[term.denominator]
            losses[name] = losses.get(name, 0.0) + part.item()
            total = total + term.weight * part
        total.backward()
    return losses, {n: p.grad.clone() for n, p in adapter.named_model_parameters() if p.grad is not None}


def train_on(session: Session, batch: Batch, steps: int) -> list[float]:
    """Optimizer steps on one batch, through the adapter's hooks; the first term's loss of each."""
    trainer = Trainer(session, SimpleNamespace(console=None), SimpleNamespace(requested=False))  # type: ignore
    trainer.total = steps
    losses = []
    session.adapter.train()
    for step in range(steps):
        prepared = session.adapter.prepare(batch, context(len(batch.rows), step))
        packed = StepBatch(context(len(batch.rows), step), [prepared], [0], prepared.denominators, 0, 0)
        trainer.meter.add_step(prepared.denominators, 0, 1)
        trainer._train_step(packed, prepared.denominators)
        losses.append(trainer.meter.read(session.world)["loss"])
    assert schedule_factor(0, steps, session.cfg) > 0
    return losses


def is_exact(adapter: ModelAdapter) -> bool:
    """Whether likelihoods are exact; a bound is estimated from noise, and single losses of it scatter."""
    return adapter.likelihood(random_batch(), context(phase="eval")).kind == "exact"


def golden(type_: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{type_}.json").read_text())
