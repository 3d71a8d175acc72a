"""Tiny versions of architectures, and the ways the contract tests run them.

An architecture is a type of the table or the path of a YAML file, whose package may lie beside it. All that is known
of it comes from that file, from its Config (`tiny`) and from its adapter (`unit`, `data_spec`).
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from adapters import adapter_class, build_adapter
from adapters.base import Context, ModelAdapter, weighted_loss
from configs.compose import check, compose, compose_tree, prepare
from configs.frontend import parse
from configs.messages import ConfigError
from configs.schema import ModelConfig, RunConfig
from configs.validate import architecture_config, validate
from data.rows import Batch
from data.tokenizers import ByteTokenizer
from models import ARCHITECTURES
from tests.pretrained import base_of
from trainer.batching import StepBatch
from trainer.distributed import World, choose_device
from trainer.loop import Trainer
from trainer.session import Session, open_session

GOLDEN = Path(__file__).parent / "golden"
TYPES = sorted(ARCHITECTURES)
VOCABULARY = 64  # of architectures that read tokens
SEQ_LEN = 32
RUN = [
    "preset=none",
    "data=synthetic",
    "synthetic_bytes=20000",
    f"train_seq_len={SEQ_LEN}",
    "global_batch_size=4",
    "num_iterations=6",
    "val_loss_every=3",
    "val_bytes=500",
    "logging_steps=2",
    "sample_tokens=4",
    "device=cpu",  # unless --device says otherwise
    "mixed_precision=no",
    "save_minutes=null",
]
# Of the run that every architecture makes. What could break exactness at once: accumulation, EMA, dropout.
STEPS = 4
HARD = ["batch_size=2", "ema_decay=0.9", "save_steps=1", "save_total_limit=null", "logging_steps=3"]
SHORT = [f"num_iterations={STEPS}", "val_loss_every=2", "val_tokens=256"]
# Fields that choose among groups of files, and those of runs on the disk: only the front end knows what they mean.
_COMPOSED = {"preset", "data"}
_OF_RUNS = {"output_dir", "model_name", "resume", "init_from_checkpoint"}


_devices = [torch.device("cpu")]  # the last one counts


def run_on(device: torch.device) -> None:
    """Before any configuration is made."""
    _devices.append(device)


def device() -> torch.device:
    """Where the contract tests run."""
    return _devices[-1]


def _here() -> list[str]:
    """Eager, as on a CPU: a GPU compiles unless told otherwise, which takes longer than most tests."""
    return [] if device().type == "cpu" else [f"device={device()}", "torch_compile=false"]


# -- configurations ------------------------------------------------------------------------------------------


def of_tests(config_class: type[ModelConfig], name: str) -> dict[str, Any]:
    """A Config's `tiny` or `examples`, those of its bases included."""
    classes = reversed(config_class.__mro__)
    return {field: value for cls in classes for field, value in vars(cls).get(name, {}).items()}


@functools.cache
def _tree(architecture: str) -> dict[str, Any]:
    """What the front end makes of the file and `RUN`: once, as it takes longer than most tests."""
    folder = str(Path(architecture).parent)
    if architecture not in ARCHITECTURES and folder not in sys.path:
        sys.path.insert(0, folder)
    return compose_tree(prepare([f"--hydra_model_cfg={architecture}", *RUN, *_here()]).overrides)


def _tiny(architecture: str) -> dict[str, Any]:
    config_class = _config_class(architecture)
    bases = {"base_model_name": str(base_of())} if needs_base(config_class) else {}
    return {**of_tests(config_class, "tiny"), **bases}


def _config_class(architecture: str) -> type[ModelConfig]:
    tree = _tree(architecture)
    return architecture_config(tree["type"], tree.get("model_adapter"), lambda key: "")


def needs_base(config_class: type[ModelConfig]) -> bool:
    """Whether it stands on a model that was trained elsewhere: here one is made, and trained on itself."""
    return "base_model_name" in config_class.model_fields


def _run(architecture: str) -> list[str]:
    """Words of its runs, beside `RUN`."""
    return ["use_lora=false"] if needs_base(_config_class(architecture)) else []


def overrides(architecture: str, *more: str) -> list[str]:
    """Command-line arguments; a later value replaces an earlier one of the same key."""
    sizes = [f"model_cfg.{name}={json.dumps(value)}" for name, value in _tiny(architecture).items()]
    words = [*sizes, *RUN, *_run(architecture), *_here(), *more]
    merged = {item.partition("=")[0]: item for item in words}
    return [f"--hydra_model_cfg={architecture}", *merged.values()]


@functools.cache
def config(architecture: str, *more: str) -> tuple[RunConfig, Any]:
    """What `overrides` compose to, mostly without composing anew."""
    request = parse([*_run(architecture), *more])
    if request.problems:
        raise ConfigError(request.problems)
    if request.keys & _COMPOSED:
        return compose(overrides(architecture, *more))
    tree = dict(_tree(architecture))
    tree["model_cfg"] = {**tree["model_cfg"], **_tiny(architecture)}
    for key, value in request.values.items():
        *groups, leaf = key.split(".")
        place = tree
        for group in groups:
            place[group] = place = dict(place[group])
        place[leaf] = value
    if request.keys & _OF_RUNS:
        words = [*_run(architecture), *more]
        checked = check(prepare([f"--hydra_model_cfg={architecture}", "preset=none", *words]), tree)
        return checked.cfg, checked.model_cfg
    return validate(tree)


def with_dropout(architecture: str) -> list[str]:
    _, model_cfg = config(architecture)
    return ["model_cfg.dropout=0.1"] if "dropout" in type(model_cfg).model_fields else []


# -- adapters ------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of `size` symbols, the last of them the document token."""

    def __init__(self, size: int = VOCABULARY) -> None:
        self.vocab_size, self.eot, self.name, self.digest = size, size - 1, "letters", "0" * 64
        self.token_bytes, self.ends, self.lead = np.array([1] * (size - 1) + [0]), frozenset({size - 1}), b""


def tokenizer_for(cfg: RunConfig, model_cfg: Any, vocabulary: int = VOCABULARY) -> Any:
    """`vocabulary` letters for an architecture that reads tokens; for one that reads bytes, these."""
    return Letters(vocabulary) if adapter_class(cfg).unit(model_cfg) == "token" else ByteTokenizer()


def adapter_of(
    architecture: str, *more: str, vocabulary: int = VOCABULARY, dtype: torch.dtype = torch.float32
) -> ModelAdapter:
    cfg, model_cfg = config(architecture, *more)
    if vocabulary != VOCABULARY and needs_base(type(model_cfg)):
        model_cfg = model_cfg.model_copy(update={"base_model_name": str(base_of(vocabulary=vocabulary))})
    return build_adapter(cfg, model_cfg, tokenizer_for(cfg, model_cfg, vocabulary), device()).to(dtype)


@torch.no_grad()
def move_away_from_uniform(adapter: ModelAdapter, std: float = 0.3) -> None:
    """Add N(0, std^2) to every trained weight, as many models begin by predicting nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += std * noise.to(parameter.device)
    adapter.constrain(torch.zeros((), device=adapter.device))


def is_exact(adapter: ModelAdapter) -> bool:
    """Whether likelihoods are exact; a bound is estimated from noise, and single losses of it scatter."""
    return adapter.likelihood(batch_for(adapter, rows=1), context(1, phase="eval")).kind == "exact"


# -- batches -------------------------------------------------------------------------------------------------


def batch_for(adapter: ModelAdapter, rows: int = 4, length: int = SEQ_LEN, seed: int = 0) -> Batch:
    """Random rows of the adapter's symbols, with its look-ahead."""
    return random_batch(rows, length, adapter.tokenizer.vocab_size, seed, adapter.data_spec().lookahead)


def random_batch(
    rows: int = 4, length: int = SEQ_LEN, vocabulary: int = VOCABULARY, seed: int = 0, n: int = 1
) -> Batch:
    """Rows of random symbols, each one document; every target scored."""
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


# -- steps ---------------------------------------------------------------------------------------------------


def loss_and_gradients(adapter: ModelAdapter, parts: list[Batch], rows: int = 4) -> tuple[dict, dict]:
    """Sums of every loss term over the parts divided by the step's denominators, and the gradient by name."""
    adapter.zero_grad(set_to_none=True)
    adapter.on_step_start(context(rows), 1)
    prepared = [adapter.prepare(part, context(rows)) for part in parts]
    denominators: dict[str, float] = {}
    for p in prepared:
        for name, value in p.denominators.items():
            denominators[name] = denominators.get(name, 0.0) + value
    losses: dict[str, float] = {}
    for p in prepared:
        output = adapter(p.to(adapter.device))
        for name, term in output.terms.items():
            part = term.sum.item() / (denominators[term.denominator] or 1.0)
            losses[name] = losses.get(name, 0.0) + part
        weighted_loss(output.terms, denominators).backward()
    return losses, {n: p.grad.clone() for n, p in adapter.named_model_parameters() if p.grad is not None}


def session_of(architecture: str, *more: str) -> Session:
    cfg, model_cfg = config(architecture, *more)
    return open_session(cfg, model_cfg, World(choose_device(cfg.device)))


def trainer_of(session: Session) -> Trainer:
    """One that keeps no record and that nobody stops."""
    trainer = Trainer(session, SimpleNamespace(console=None), SimpleNamespace(requested=False))  # type: ignore
    session.adapter.train()
    return trainer


def train_on(session: Session, batch: Batch, steps: range, total: int) -> None:
    """Optimizer steps on one batch, through the adapter's hooks."""
    trainer = trainer_of(session)
    trainer.total = total
    for step in steps:
        ctx = context(len(batch.rows), step)
        prepared = session.adapter.prepare(batch, ctx)
        trainer._train_step(
            StepBatch(ctx, [prepared], [0], prepared.denominators, 0, 0), prepared.denominators
        )


# -- what was recorded ---------------------------------------------------------------------------------------


def golden_file(architecture: str) -> Path:
    """Beside the tests for the table's architectures, beside its YAML for any other."""
    if architecture in ARCHITECTURES:
        return GOLDEN / f"{architecture}.json"
    return Path(architecture).with_suffix(".golden.json")


def golden(architecture: str) -> dict[str, Any]:
    return json.loads(golden_file(architecture).read_text())
