"""A trained model back from disk, for `generate` and `eval`."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters import build_adapter
from adapters.base import ModelAdapter
from naming import not_one_of, require_fit, shapes
from trainer.distributed import choose_device
from trainer.precision import choose_precision, tune_host
from trainer.run.checkpoint import find_checkpoint, load_json, load_tensors

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from data.tokenizers import Tokenizer

__all__ = ["Restored", "add_checkpoint_arguments", "config_of", "load_weights", "restore"]


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


def config_of(checkpoint: Path) -> tuple[RunConfig, Any]:
    """(RunConfig, model_cfg) a checkpoint was trained with."""
    from configs.compose import model_config_class
    from configs.schema import RunConfig

    cfg = RunConfig.model_validate(load_json(checkpoint, "training_state.json")["training_config"])
    saved = load_json(checkpoint, "config.json")
    return cfg, model_config_class(cfg).model_validate(saved["model_cfg"])


def load_weights(adapter: ModelAdapter, state: dict[str, torch.Tensor], source: str) -> None:
    """Exact match of names and shapes, or a ValueError that lists the differences."""
    require_fit(source, shapes(adapter.model.state_dict()), shapes(state))
    adapter.model.load_state_dict(state)


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
    elif args.hydra_model_cfg:
        cfg, model_cfg = compose([f"--hydra_model_cfg={args.hydra_model_cfg}"])
    else:
        raise ValueError("nothing to load. Give --checkpoint <run folder> or --model_name <name>")
    cfg = cfg.model_copy(update=changes or {})
    if checkpoint and args.hydra_model_cfg:
        _compare_architectures(args.hydra_model_cfg, cfg, model_cfg, checkpoint)
    tune_host(cfg, device)
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json") if checkpoint else load_dataset(cfg).tokenizer
    adapter = build_adapter(cfg, model_cfg, tokenizer, device)
    weights = _load(adapter, checkpoint, args.raw) if checkpoint else "untrained"
    precision, _ = choose_precision(cfg.mixed_precision, device)
    micro_rows = load_json(checkpoint, "config.json")["batch_size"] if checkpoint else 16
    return Restored(cfg, adapter.eval(), tokenizer, device, precision, checkpoint, weights, micro_rows)


def _load(adapter: ModelAdapter, checkpoint: Path, raw: bool) -> str:
    """Fill the model; says which weights these are."""
    load_weights(adapter, load_tensors(checkpoint, "model.pt"), f"{checkpoint}/model.pt")
    if raw or not (checkpoint / "ema.pt").exists():
        return "raw"
    shadow = load_tensors(checkpoint, "ema.pt")["shadow"]
    with torch.no_grad():
        for name, parameter in adapter.named_model_parameters():
            if name in shadow:
                parameter.copy_(shadow[name])
    return "EMA"


def _compare_architectures(given: str, cfg: RunConfig, model_cfg: Any, checkpoint: Path) -> None:
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
