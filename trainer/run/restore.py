"""A trained model back from disk, for `generate` and `eval`."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from adapters import adapter_class, build_adapter
from adapters.base import ModelAdapter
from configs.messages import ConfigError
from configs.removed import REMOVED
from naming import did_you_mean, not_one_of, require_fit, shapes
from trainer.distributed import choose_device
from trainer.precision import choose_precision, tune_host
from trainer.run.checkpoint import find_checkpoint, load_json, load_tensors

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer
    from trainer.optim.ema import EMA
    from trainer.session import Session

__all__ = [
    "Restored",
    "add_checkpoint_arguments",
    "config_of",
    "load_average",
    "load_weights",
    "require_same_provenance",
    "restore",
    "weights_of",
    "with_free_fields",
]


@dataclass
class Restored:
    cfg: RunConfig
    adapter: ModelAdapter
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    checkpoint: Path | None
    weights: str  # "EMA", "raw" or "untrained"
    micro_rows: int  # rows of a forward pass: what the run used


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint", help="a run folder, a checkpoint-<step> folder, best_model or final_model"
    )
    which.add_argument("--model_name", help="short for --checkpoint checkpoints/<model_name>")
    parser.add_argument(
        "--hydra_model_cfg", "--config", help="with no checkpoint: score this untrained model"
    )
    parser.add_argument("--raw", action="store_true", help="use the raw weights even if the run kept an EMA")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="model_cfg.FIELD=VALUE",
        help="fields that are no architecture, such as a sampler or the number of noise draws",
    )


def config_of(checkpoint: Path) -> tuple[RunConfig, Any]:
    """(RunConfig, model_cfg) a checkpoint was trained with."""
    from configs.validate import read_saved

    generic = load_json(checkpoint, "training_state.json")["training_config"]
    architecture = load_json(checkpoint, "config.json")["model_cfg"]
    notes: list[str] = []
    found = read_saved(generic, architecture, str(checkpoint), notes)
    for text in notes:
        print(f"note: {text}", file=sys.stderr)
    return found


def with_free_fields(cfg: RunConfig, model_cfg: ModelConfig, overrides: list[str]) -> ModelConfig:
    """`model_cfg` with `model_cfg.field=value` words applied. ConfigError for what no such field is, what is fixed with
    the architecture, and what the Config refuses."""
    from configs.explain import explain
    from configs.frontend import parse
    from configs.validate import refuse_own_words

    cls, values = type(model_cfg), model_cfg.model_dump()
    strange = [word for word in overrides if "=" not in word or not word.lstrip("+").startswith("model_cfg")]
    problems = [f"command line: '{word}' is not model_cfg.<field>=<value>" for word in strange]
    request = parse([word for word in overrides if word not in strange])
    problems += request.problems
    refuse_own_words(cfg.type, request.spelled.values(), "command line")
    free, given = sorted(cls.free()), {key.partition(".")[2]: value for key, value in request.values.items()}
    for name, value in given.items():
        if (gone := f"model_cfg.{name}") in REMOVED and name not in values:
            problems.append(f"command line: '{gone}' is no longer a field: {REMOVED[gone]}")
        elif name not in values:
            problems.append(f"command line: unknown key 'model_cfg.{name}'.{did_you_mean(name, values)}")
        elif name not in free:
            allowed = ", ".join(free) or "none of this type"
            problems.append(f"command line: model_cfg.{name} is fixed with the architecture. Free: {allowed}")
        else:
            values[name] = value
    if problems:
        raise ConfigError(problems)
    try:
        changed = cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError([p for _, p in explain(error, cls, values, lambda key: "", "model_cfg.")]) from None
    if problems := changed.problems(cfg):
        raise ConfigError(problems)
    unread = [
        f"model_cfg.{n} is not read (because of model_cfg.{why})"
        for n, why in changed.unread().items()
        if n in given
    ]
    for text in (*request.notices, *unread):
        print(f"note: {text}", file=sys.stderr)
    return changed


def load_weights(adapter: ModelAdapter, state: dict[str, torch.Tensor], source: str) -> None:
    """Exact match of names and shapes, or a ValueError that lists the differences. External parts keep their own."""
    require_fit(source, shapes(adapter.trained_state()), shapes(state))
    adapter.model.load_state_dict(state, strict=False)


def load_average(ema: EMA, checkpoint: Path) -> bool:
    """Go on with the average that a checkpoint keeps. Where it keeps none, begin one at the present weights; False."""
    if (checkpoint / "ema.pt").is_file():
        ema.load_state_dict(load_tensors(checkpoint, "ema.pt"))
        return True
    ema.restart()
    return False


@contextmanager
def weights_of(s: Session, checkpoint: Path) -> Iterator[None]:
    """Run the body with the weights of a checkpoint of this run, and their average; those of `s` always come back."""
    own = {name: tensor.clone() for name, tensor in s.adapter.trained_state().items()}
    average = copy.deepcopy(s.ema.state_dict()) if s.ema else None
    try:
        load_weights(s.adapter, load_tensors(checkpoint, "model.pt"), f"{checkpoint}/model.pt")
        if s.ema:
            load_average(s.ema, checkpoint)
        yield
    finally:
        load_weights(s.adapter, own, "the weights of this run")
        if s.ema and average:
            s.ema.load_state_dict(average)


def require_same_provenance(adapter: ModelAdapter, saved: dict[str, Any], source: Path) -> None:
    """`saved`: the config.json of a checkpoint, whose weights belong to the external parts they were trained with."""
    theirs, mine = saved.get("provenance") or {}, adapter.provenance()
    differing = [k for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k)]
    if differing:
        told = "; ".join(
            f"{k} was {theirs.get(k, 'not there')}, here it is {mine.get(k, 'not there')}" for k in differing
        )
        raise ValueError(
            f"{source} was trained on another base: {told}. Give the base that it was trained on"
        )


def restore(args: argparse.Namespace, changes: dict[str, Any] | None = None) -> Restored:
    """Build what the arguments of `add_checkpoint_arguments` name. `changes`: generic fields to replace."""
    from configs.compose import compose
    from data import load_dataset
    from data.tokenizers import load_tokenizer

    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", args.device):
        raise ValueError(f"device: {not_one_of(args.device, ('auto', 'cpu', 'cuda', 'cuda:N', 'mps'))}")
    device = choose_device(args.device)
    given = args.checkpoint or (f"checkpoints/{args.model_name}" if args.model_name else None)
    checkpoint = find_checkpoint(given, lambda text: print(text, file=sys.stderr)) if given else None
    if checkpoint:
        cfg, model_cfg = config_of(checkpoint)
        model_cfg = with_free_fields(cfg, model_cfg, args.overrides)
    elif args.hydra_model_cfg:
        cfg, model_cfg = compose([f"--hydra_model_cfg={args.hydra_model_cfg}", *args.overrides])
    else:
        raise ValueError("nothing to load. Give --checkpoint <run folder> or --model_name <name>")
    cfg = cfg.model_copy(update=changes or {})
    if checkpoint and args.hydra_model_cfg:
        _compare_architectures(args.hydra_model_cfg, cfg, model_cfg, checkpoint)
    tune_host(cfg, device)
    if checkpoint:
        tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    else:
        tokenizer = load_dataset(cfg, unit=adapter_class(cfg).unit(model_cfg)).tokenizer
    adapter = build_adapter(cfg, model_cfg, tokenizer, device)
    weights = _load(adapter, checkpoint, args.raw) if checkpoint else "untrained"
    precision, _ = choose_precision(cfg.mixed_precision, device)
    micro_rows = load_json(checkpoint, "config.json")["batch_size"] if checkpoint else 16
    return Restored(cfg, adapter.eval(), tokenizer, device, precision, checkpoint, weights, micro_rows)


def _load(adapter: ModelAdapter, checkpoint: Path, raw: bool) -> str:
    """Fill the model; says which weights these are."""
    require_same_provenance(adapter, load_json(checkpoint, "config.json"), checkpoint)
    load_weights(adapter, load_tensors(checkpoint, "model.pt"), f"{checkpoint}/model.pt")
    if raw or not (checkpoint / "ema.pt").exists():
        return "raw"
    shadow = load_tensors(checkpoint, "ema.pt")["shadow"]
    with torch.no_grad():
        for name, parameter in adapter.named_model_parameters():
            if name in shadow:
                parameter.copy_(shadow[name])
    adapter.constrain(
        torch.zeros((), device=adapter.device)
    )  # an average of points of a set need not lie on it
    return "EMA"


def _compare_architectures(given: str, cfg: RunConfig, model_cfg: ModelConfig, checkpoint: Path) -> None:
    """A model file beside a checkpoint is not needed: another type is an error, other sizes give way."""
    from configs.compose import compose

    other, other_model = compose([f"--hydra_model_cfg={given}", "preset=none"], notify=lambda text: None)
    if other.type != cfg.type:
        raise ValueError(
            f"{given} is type {other.type}, but {checkpoint} is type {cfg.type}. Leave --hydra_model_cfg out: the "
            f"checkpoint knows its architecture"
        )
    mine, theirs = model_cfg.model_dump(), other_model.model_dump()
    differing = [
        f"{k} {mine[k]} (not {theirs.get(k)})" for k in mine if k != "vocab_size" and mine[k] != theirs.get(k)
    ]
    if differing:
        print(f"note: the architecture is that of {checkpoint}: {', '.join(differing)}", file=sys.stderr)
