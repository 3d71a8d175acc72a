"""A trained model back from disk, for `generate`, `eval` and `export`."""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from adapters import adapter_class, build_adapter, own_tokenizer
from adapters.base import ModelAdapter
from adapters.lora import merge
from configs.messages import ConfigError
from configs.removed import REMOVED
from configs.trust import trusting
from data.chats.rows import heldout_rows
from data.rows import HeldoutRows
from naming import did_you_mean, not_one_of, shorten
from trainer.diagnose import non_finite
from trainer.distributed import World, choose_device
from trainer.errors import TrainingError
from trainer.evaluate import Score, evaluate, try_scoring
from trainer.memory import NoRoom, largest_that_fits
from trainer.precision import choose_precision, tune_host
from trainer.run.checkpoint import NotAsWritten, as_written, load_named_tensors, load_tensors
from trainer.run.source import Source, load_weights, open_source
from trainer.view.stream import patient

if TYPE_CHECKING:
    from configs.saved import WeightsAre
    from configs.schema import ModelConfig, RunConfig
    from data.store import TokenStore
    from data.tokenizers import Tokenizer
    from trainer.optim.ema import EMA
    from trainer.session import Session

__all__ = [
    "Restored",
    "add_checkpoint_arguments",
    "add_source_arguments",
    "load_average",
    "named",
    "restore",
    "restore_named",
    "say",
    "weights_of",
    "with_free_fields",
]


NO_RUN = ("output_dir=null", "model_name=null")  # a file may be that of a run, which has a folder already


@dataclass
class Restored:
    cfg: RunConfig
    adapter: ModelAdapter
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    source: Source | None
    weights: WeightsAre
    micro_rows: int  # rows of a forward pass: what the run used

    @property
    def checkpoint(self) -> Path | None:
        """The folder that the weights are from."""
        return self.source.path if self.source else None

    def merge(self) -> None:
        """Have a model without adapters, where it has some, that computes the same to rounding."""
        merge(self.adapter)
        self.cfg = self.cfg.model_copy(update={"use_lora": False})

    def rows(
        self,
        store: TokenStore,
        max_bytes: int | None = None,
        seq_len: int | None = None,
        max_documents: int | None = None,
    ) -> HeldoutRows:
        """Documents as the model's score reads them: in windows of the run's context, or of `seq_len` tokens."""
        return heldout_rows(
            store,
            self.tokenizer.eot,
            seq_len or self.cfg.val_seq_len or self.cfg.train_seq_len,
            lookahead=self.adapter.data_spec().lookahead,
            max_bytes=max_bytes,
            max_documents=max_documents,
        )

    def score(self, rows: HeldoutRows, batch_rows: int | None = None, **more: Any) -> Score | None:
        """Score `rows`. With the run's own batch its score comes out to the last digit, as the same shapes round alike;
        where memory does not suffice for that one, smaller ones are taken, which is said.

        `more`: `should_stop`, `hear` and `estimates` of `evaluate`. Rows may be heard of again then. TrainingError
        where memory does not suffice for `batch_rows`, or for one row.
        """
        size = batch_rows or self.micro_rows
        while True:
            try:
                return evaluate(
                    self.adapter,
                    rows,
                    World(self.device, alone=True),
                    batch_rows=size,
                    seed=self.cfg.seed,
                    precision=self.precision,
                    **more,
                )
            except NoRoom as error:
                told = str(error)
            smaller = [n for n in range(1, size) if size % n == 0]
            fits = largest_that_fits(smaller, partial(try_scoring, self.adapter, rows, self.precision))
            if not fits:
                raise TrainingError(
                    f"out of memory with a single row of {rows.seq_len} tokens ({told}). Less takes a shorter "
                    "val_seq_len, or mixed_precision=bf16"
                )
            if batch_rows:
                raise TrainingError(
                    f"out of memory with {size} rows at a time ({told}). batch_size={fits} fits"
                )
            say(f"out of memory with {size} rows at a time ({told}), begun again with {fits}")
            size = fits


def say(text: str) -> None:
    print(f"note: {text}", file=patient(sys.stderr))


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that name trained weights; `named` says which."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint",
        help="a run folder, a checkpoint-<step> folder, best_model or final_model; what export wrote; a folder of "
        "Hugging Face transformers",
    )
    which.add_argument("--model_name", help="short for --checkpoint checkpoints/<model_name>")
    parser.add_argument(
        "--trust",
        default="",
        metavar="MODULE",
        help="modules, a,b, whose code may run although only a file of the run names them (type, model_adapter)",
    )
    parser.add_argument("--raw", action="store_true", help="use the raw weights even if the run kept an EMA")


def named(args: argparse.Namespace) -> str | None:
    """The path that those options give."""
    return args.checkpoint or (f"checkpoints/{args.model_name}" if args.model_name else None)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The same, where it is a model to run; `restore_named` makes it."""
    add_source_arguments(parser)
    parser.add_argument(
        "--hydra_model_cfg",
        "--config",
        help="with no checkpoint: this untrained model; with one: what must be its architecture",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--mixed_precision", help="auto, no (fp32), bf16 or fp16 (default: the run's)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="model_cfg.FIELD=VALUE",
        help="fields that are no architecture, such as a sampler or the number of noise draws",
    )


def with_free_fields(
    cfg: RunConfig, model_cfg: ModelConfig, overrides: list[str], note: Callable[[str], None] = say
) -> ModelConfig:
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
    if problems := changed.problems(as_trained(cfg)):
        raise ConfigError(problems)
    unread = [
        f"model_cfg.{n} is not read (because of model_cfg.{why})"
        for n, why in changed.unread().items()
        if n in given
    ]
    for text in (*request.notices, *unread):
        note(text)
    return changed


def as_trained(cfg: RunConfig) -> RunConfig:
    """The run as one that goes on: sizes are those of the weights, and no message is to propose others."""
    return cfg.model_copy(update={"resume": "auto"})


def load_average(ema: EMA, checkpoint: Path) -> bool:
    """Go on with the average that a checkpoint keeps. Where it keeps none, begin one at the present weights; False."""
    if (checkpoint / "ema.pt").is_file():
        saved = load_tensors(checkpoint, "ema.pt")
        with as_written(checkpoint / "ema.pt"):
            ema.load_state_dict(saved)
        return True
    ema.restart()
    return False


@contextmanager
def weights_of(s: Session, checkpoint: Path) -> Iterator[None]:
    """Run the body with the weights of a checkpoint of this run, and their average; those of `s` always come back."""
    own = {name: tensor.clone() for name, tensor in s.adapter.trained_state().items()}
    average = copy.deepcopy(s.ema.state_dict()) if s.ema else None
    try:
        load_weights(s.adapter, load_named_tensors(checkpoint, "model.pt"), f"{checkpoint}/model.pt")
        if s.ema:
            load_average(s.ema, checkpoint)
        yield
    finally:
        load_weights(s.adapter, own, "the weights of this run")
        if s.ema and average:
            s.ema.load_state_dict(average)


def restore(
    given: str | Path | Source,
    *,
    raw: bool = False,
    device: str = "auto",
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] = MappingProxyType({}),
    note: Callable[[str], None] = say,
) -> Restored:
    """The model that a path names, ready to score and to write.

    Args:
        given: a run folder, one of its checkpoints, or any other kind of `trainer.run.source`; or such a one, opened.
        raw: the weights themselves even where an average of them was kept.
        device: auto, cpu, cuda, cuda:N or mps.
        overrides: words `model_cfg.FIELD=VALUE`, of fields that are no architecture.
        changes: generic fields to replace.
        note: hears what was passed over, and what has no effect.

    Raises:
        ValueError: there is no such thing, or it cannot be used; ConfigError for `overrides` and `changes`.
    """
    where = _device(device)
    source: Source | None = given if isinstance(given, Source) else open_source(given, note)
    first: Restored | NotAsWritten | None = None  # what is to be told where nothing sound lies before it
    while source is not None:
        found: Restored | NotAsWritten
        try:
            found = _restore(source, raw, where, overrides, changes, note)
            names = non_finite(found.adapter)
            if not names:
                break
            why = f"its weights are not finite: {shorten(names)}"
        except NotAsWritten as error:
            found, why = error, str(error)
        path, source = source.path, source.before(note)
        first = first or found
        if source is not None:
            note(f"{path} is damaged ({why}); using the one before it")
    else:
        assert first is not None
        found = first
    if isinstance(found, NotAsWritten):
        raise found
    return found


def _restore(
    source: Source,
    raw: bool,
    where: torch.device,
    overrides: Sequence[str],
    changes: Mapping[str, Any],
    note: Callable[[str], None],
) -> Restored:
    if raw and source.averaged:
        raise ValueError(f"raw: {source.path} holds the average (EMA) of the weights alone")
    cfg, model_cfg = source.config(note)
    try:
        model_cfg = with_free_fields(cfg, model_cfg, [*overrides], note)
    except ConfigError as error:
        if overrides:
            raise
        raise NotAsWritten(f"{source.path} says what no model can be: {error}") from None
    cfg = _changed(cfg, model_cfg, changes)
    tune_host(cfg, where)
    adapter = build_adapter(cfg, model_cfg, source.tokenizer, where)
    weights: WeightsAre = source.weights
    if raw:
        source.fill(adapter)
    elif source.fill_as_scored(adapter):
        weights = "EMA"
    precision, _ = choose_precision(cfg.mixed_precision, where)
    return Restored(cfg, adapter.eval(), source.tokenizer, where, precision, source, weights, source.rows)


def _changed(cfg: RunConfig, model_cfg: ModelConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`cfg` with other values of generic fields, which are checked as those of a run are, also by its architecture."""
    from configs.explain import explain

    if not changes:
        return cfg
    kind, values = type(cfg), {**cfg.model_dump(mode="json"), **changes}
    try:
        changed = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError([p for _, p in explain(error, kind, values, lambda key: "")]) from None
    if problems := model_cfg.problems(as_trained(changed)):
        raise ConfigError(problems)
    return changed


def restore_named(args: argparse.Namespace, changes: dict[str, Any] | None = None) -> Restored:
    """What the arguments of `add_checkpoint_arguments` name. `changes`: generic fields to replace."""
    with trusting(args.trust):
        return _restore_named(args, changes)


def _restore_named(args: argparse.Namespace, changes: dict[str, Any] | None) -> Restored:
    changes = {**(changes or {}), **({"mixed_precision": p} if (p := args.mixed_precision) else {})}
    if given := named(args):
        found = restore(given, raw=args.raw, device=args.device, overrides=args.overrides, changes=changes)
        if args.hydra_model_cfg:
            _compare_architectures(args.hydra_model_cfg, found)
        return found
    if args.hydra_model_cfg:
        return _untrained(args, changes)
    raise ValueError("nothing to load. Give --checkpoint <run folder> or --model_name <name>")


def _untrained(args: argparse.Namespace, changes: dict[str, Any]) -> Restored:
    from configs.compose import compose
    from data import load_dataset

    device = _device(args.device)
    cfg, model_cfg = compose([f"--hydra_model_cfg={args.hydra_model_cfg}", *NO_RUN, *args.overrides])
    cfg = _changed(cfg, model_cfg, changes)
    if cfg.init_from_checkpoint:
        raise ValueError(
            f"init_from_checkpoint: a run of {args.hydra_model_cfg} begins with the weights of "
            f"{cfg.init_from_checkpoint}{', which adapters leave as they are at first' if cfg.use_lora else ''}. Give "
            f"--checkpoint {cfg.init_from_checkpoint}"
        )
    tune_host(cfg, device)
    tokenizer = own_tokenizer(cfg, model_cfg)
    if tokenizer is None:
        tokenizer = load_dataset(cfg, unit=adapter_class(cfg).unit(model_cfg)).tokenizer
    adapter = build_adapter(cfg, model_cfg, tokenizer, device)
    precision, _ = choose_precision(cfg.mixed_precision, device)
    return Restored(cfg, adapter.eval(), tokenizer, device, precision, None, "untrained", Source.rows)


def _device(given: str) -> torch.device:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", given):
        raise ValueError(f"device: {not_one_of(given, ('auto', 'cpu', 'cuda', 'cuda:N', 'mps'))}")
    return choose_device(given)


def _compare_architectures(given: str, found: Restored) -> None:
    """A model file beside a checkpoint is not needed: one of another architecture is an error."""
    from configs.compose import compose

    cfg, where = found.cfg, found.checkpoint
    other, other_model = compose(
        [f"--hydra_model_cfg={given}", "preset=none", *NO_RUN], notify=lambda text: None
    )
    if other.type != cfg.type:
        raise ValueError(
            f"{given} is type {other.type}, but {where} is type {cfg.type}. Leave --hydra_model_cfg out: the "
            f"checkpoint knows its architecture"
        )
    mine, theirs = found.adapter.model_cfg.model_dump(), other_model.model_dump()
    # Filled in once there is a tokenizer, or a base.
    open_ = {k for k in {"vocab_size", *other_model.elsewhere} if theirs.get(k) is None}
    free = type(other_model).free()
    differing = [
        f"model_cfg.{k} {theirs.get(k)} (there {mine[k]})"
        for k in mine
        if k not in open_ | free and mine[k] != theirs.get(k)
    ]
    if differing:
        raise ValueError(
            f"{given} is not the architecture of {where}: {', '.join(differing)}. Leave --hydra_model_cfg out, as the "
            f"checkpoint knows its own, or give its run's config.yaml"
        )
