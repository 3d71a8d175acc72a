"""The typed schema of a run. Pure pydantic: importing this file imports neither torch nor a model.

`RunConfig` holds every generic field, with the same defaults as `training.yaml`. `ModelConfig` is the
base of every architecture's own `Config` class, which lives beside its model in `models/<type>.py`.
Both are strict (a bool is not an int, a quoted number is a string, an int is fine where a float is
wanted), closed (unknown keys are errors) and frozen.
"""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from configs.concealed import concealed
from configs.match import Budget, Match, SizeDials, decoder_dials
from configs.messages import REDACTED, is_secret
from naming import Entry, expand_path, load, not_one_of, shorten_text


@dataclass(frozen=True)
class OneOf:
    """Marks a text field as a choice from a table of `naming.Entry`, named "module:TABLE" and imported on use."""

    where: str

    @property
    def table(self) -> Mapping[str, Entry]:
        return load(self.where)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def _known(self, name: str) -> str:
        if name not in self.table:
            raise ValueError(not_one_of(name, self.table))
        return name


@dataclass(frozen=True)
class Names:
    """Marks a text that a file or folder is called by. `check` gives it as it is used, or raises ValueError."""

    check: Callable[[str], str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))


def _path(text: str) -> str:
    return str(expand_path(text)) if text else text


def _run_name(name: str) -> str:
    """A name that is one folder on every system."""
    fits = re.fullmatch(r"[A-Za-z0-9._-]+", name) and name.strip(".")
    if fits and len(name) <= 255:
        return name
    near = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60]
    raise ValueError(
        f"{shorten_text(name)!r} cannot name a run: letters, digits, '.', '_' and '-' can, 255 of them at most and not "
        f"dots alone" + (f". Nearest: '{near}'" if near else "")
    )


def _device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError(not_one_of(name, ("auto", "cpu", "cuda", "cuda:<n>", "mps")))
    return name


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[str, Names(_path)]
Place = Annotated[str, Field(min_length=1), Names(_path)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
OpenFraction = Annotated[float, Field(ge=0, lt=1)]
# 1.0 silences a layer completely. It is legal (some file formats allow it) and draws a warning.
Dropout = Fraction

T = TypeVar("T")


@dataclass(frozen=True)
class _FreeMark:
    """See `Free`; `results`: whether the choice may change any."""

    results: bool = True


# `Free[int]` in an architecture's Config: a choice of training or execution (a dropout rate, a loss weight, a sampler),
# not of the architecture. It may change when a run goes on, and in `eval` and `generate`.
Free = Annotated[T, _FreeMark()]
# `Execution[bool]`: free too, and nothing but a way to compute: weights, losses, scores and text stay the same.
Execution = Annotated[T, _FreeMark(results=False)]


def _is_free(mark: Any) -> bool:
    return isinstance(mark, _FreeMark)


# YAML 1.1 reads a bare `no` as false; as a value of `mixed_precision` it can only mean the word.
_WordNo = BeforeValidator(lambda v: "no" if v is False else v)
# Python writes `pkg.mod.Class`, entry points `pkg.mod:Class`.
_WithColon = BeforeValidator(
    lambda v: ":".join(v.rsplit(".", 1)) if isinstance(v, str) and ":" not in v else v
)
_NullIsNone = BeforeValidator(lambda v: "none" if v is None else v)
_TrueIsOnline = BeforeValidator(lambda v: "online" if v is True else v)


def env_strings(value: Any) -> Any:
    """`env` values are strings whatever they look like: `OMP_NUM_THREADS: 1` means "1"."""
    if not isinstance(value, dict):
        return value
    return {
        k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in value.items()
    }


def no_variable(name: str, value: str) -> str:
    """Why an environment cannot hold this, "" where it can."""
    if not name or "=" in name or "\0" in name + value:
        return f"{shorten_text(name)!r}: the name of a variable is not empty and has no '=', and neither has a NUL"
    try:
        os.fsencode(name + value)
    except UnicodeEncodeError:
        return f"{shorten_text(name)!r}: {shorten_text(value)!r} is not UTF-8 text"
    return ""


def _variables(env: dict[str, str]) -> dict[str, str]:
    if problem := next((p for name, value in env.items() if (p := no_variable(name, value))), None):
        raise ValueError(problem)
    return env


def kernel_mapping(value: Any) -> Any:
    """`kernels: V` means `{default: V}`; an operation that is not named follows the default."""
    value = {"default": value} if isinstance(value, str) else value
    return {"default": "auto", **value} if isinstance(value, dict) else value


def one_line(value: str) -> str:
    """A text that can be a line of its own."""
    if not value.strip() or len(value.splitlines()) > 1:
        raise ValueError("must be what stands on a line of its own, such as '<|endoftext|>'")
    return value.strip()


def divisible(width_name: str, width: int, heads_name: str, heads: int) -> list[str]:
    """Problem (at most one) if `width` is no multiple of `heads`, with the nearest legal widths."""
    if heads < 1 or width % heads == 0:
        return []
    below = width // heads * heads
    nearest = [str(v) for v in (below, below + heads) if v > 0]
    return [
        f"model_cfg.{width_name} ({width}) must be divisible by model_cfg.{heads_name} ({heads}); "
        f"nearest: {', '.join(nearest)}"
    ]


def within_context(run: RunConfig, n_ctx: int) -> list[str]:
    """Problems of a row longer than a learned position table; for models without one nothing is wrong."""
    problems = []
    trained = (
        run.init_from_checkpoint is not None or run.resume != "none"
    )  # then the table is as long as it is
    for name in ("train_seq_len", "val_seq_len"):
        length = getattr(run, name)
        if length is not None and length > n_ctx:
            problems.append(
                f"{name} ({length}) must not exceed model_cfg.n_ctx ({n_ctx}): positions are learned. "
                f"Nearest: {name}={n_ctx}" + ("" if trained else f", or model_cfg.n_ctx={length}")
            )
    return problems


def byte_vocabulary(vocab_size: int | None) -> list[str]:
    """Problem (at most one) of a model that reads bytes and is given a tokenizer's vocabulary."""
    if vocab_size is None or vocab_size <= MOST_BYTES:
        return []
    return [
        f"model_cfg.vocab_size ({vocab_size}) is that of a tokenizer, and this model reads bytes, which are 257 ids "
        f"with the start of a document. Nearest: vocab_size=null"
    ]


def in_whole(run: RunConfig, name: str, size: int) -> list[str]:
    """Problems of rows that are no multiple of `size`, what `model_cfg.<name>` comes to, such as bytes of a patch."""
    problems = []
    for field in ("train_seq_len", "val_seq_len"):
        length = getattr(run, field)
        if length is not None and length % size:
            below = length // size * size
            nearest = ", ".join(str(v) for v in (below, below + size) if v > 0)
            problems.append(
                f"{field} ({length}) must be a multiple of model_cfg.{name} ({size}); nearest: {nearest}"
            )
    return problems


MOST_BYTES = 512  # rows of a table of bytes, however it is padded


class ModelConfig(BaseModel):
    """Base of every architecture's `Config`. Field names are canonical (`d_model`, `n_layers`, ...):
    other spellings are folded before validation, so a Config class knows one name per quantity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    unit: ClassVar[Literal["token", "byte"]] = (
        "token"  # what the model reads: the run's tokenizer's tokens, or bytes
    )
    # Sizes of presets that it has under names of its own, which configs/preset/for/ sets.
    own_sizes: ClassVar[frozenset[str]] = frozenset()
    # Sizes that weights decide which were trained elsewhere: presets leave them alone.
    elsewhere: ClassVar[frozenset[str]] = frozenset()
    # For the contract tests (tests/contract). A subclass states its own; those of its bases hold beside them.
    tiny: ClassVar[dict[str, Any]] = {}  # field -> value that makes the architecture small and quick
    # field -> another value, or (another value, what other fields must be for it to mean something), where the tests
    # cannot guess one. A value that is a file is given as a function (folder, vocabulary) that makes it.
    examples: ClassVar[dict[str, Any]] = {}
    # field -> why what it changes is too rare for them to see. A test of its own shows it.
    rare: ClassVar[dict[str, str]] = {}

    @classmethod
    def free(cls) -> set[str]:
        """Names of the fields that are `Free` or `Execution`; all others are fixed once a run has begun."""
        return {name for name, field in cls.model_fields.items() if any(map(_is_free, field.metadata))}

    @classmethod
    def execution(cls) -> set[str]:
        """Names of the fields that are `Execution`."""
        fields = cls.model_fields.items()
        return {n for n, f in fields if any(_is_free(m) and not m.results for m in f.metadata)}

    def problems(self, run: RunConfig) -> list[str]:
        """Constraints between fields, and between the architecture and the run. One complete sentence
        per problem, naming fields by their full path (`model_cfg.d_model`) with the nearest legal values.
        Subclasses extend the list of their parent. Single-field ranges belong into the annotations."""
        return []

    def remarks(self, run: RunConfig) -> list[str]:
        """What is legal and yet hardly meant: a sentence each, told before the start. Nothing is stopped."""
        return []

    def unread(self) -> dict[str, str]:
        """Fields that mean nothing because of another one: name -> that one as `name=value`."""
        return {}

    def lacking(self) -> str:
        """Why the model cannot be built on this machine, such as a base that is not there; "" where it can. All that
        does not need it is checked, and training refused."""
        return ""

    def added(self) -> str:
        """What stands on weights that were trained elsewhere and that other programs, which read those, have no place
        for; "" for nothing."""
        return ""

    def size_dials(self) -> SizeDials:
        """What `match` may change to give the model another size; by default nothing."""
        return SizeDials()

    def completed(self) -> Self:
        """With what weights decide that were trained elsewhere. ValueError where they are not there."""
        return self


class DefaultModelConfig(ModelConfig):
    """The sizes that almost every decoder has."""

    vocab_size: Positive | None = None
    n_ctx: Positive = 1024
    d_model: Positive = 768
    n_heads: Positive = 12
    n_layers: Positive = 12

    tiny = {"n_ctx": 32, "d_model": 64, "n_heads": 4, "n_layers": 2}

    def size_dials(self) -> SizeDials:
        return decoder_dials(self)

    def problems(self, run: RunConfig) -> list[str]:
        return super().problems(run) + divisible("d_model", self.d_model, "n_heads", self.n_heads)


class BatchStage(BaseModel):
    """A part of a run whose steps have a batch size of their own."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    until: Annotated[float, Field(gt=0, le=1)]  # part of the run at which it ends
    rows: Positive | None = None  # per optimizer step; None = global_batch_size
    rate: Rate = 1.0  # multiplies the scheduled learning rates


class RunConfig(BaseModel):
    """One run: every generic field, the architecture's name and its raw fields.

    `model_cfg` is checked apart from this class, against the architecture's own Config (that needs the
    model file, hence torch). What each field means stands as a comment in `training.yaml`.
    JSON-able: `RunConfig.model_validate(cfg.model_dump(mode="json")) == cfg`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    # what is trained
    type: str
    model_cfg: dict[str, Any] = Field(default_factory=dict)
    model_adapter: Annotated[str, _WithColon] | None = None
    preset: str = "auto"

    # where it goes
    model_name: Annotated[str, Names(_run_name)] | None = None
    output_dir: Place | None = None
    seed: Seed = 1337
    deterministic: bool = False

    # text and tokens
    data: Annotated[str, OneOf("data:SOURCES")] = "embedded"
    input_file: FilePath | None = None
    data_root: FilePath | None = None
    train_files: FilePath | list[FilePath] | None = None
    val_files: FilePath | list[FilePath] | None = None
    text_field: Text | Annotated[list[Text], Field(min_length=1)] = "text"
    training_mode: Literal["pretraining", "instruction_finetuning"] = "pretraining"
    packing: bool = True
    shards_tokenizer: str | None = None
    dataset_name: FilePath | None = None
    dataset_subset: str | None = None
    dataset_split: Text = "train"
    eval_split: Text | None = "test"
    dataset_bytes: Positive | None = None
    document_separator: Annotated[str, AfterValidator(one_line)] | None = None
    mix: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    near_copies: Literal["drop", "keep"] | None = None
    synthetic: Literal["markov", "grammar", "recall"] = "markov"
    synthetic_bytes: Annotated[int, Field(ge=1000)] = 1_000_000
    synthetic_symbols: Annotated[int, Field(ge=2, le=95)] = 32
    synthetic_order: Positive = 1
    synthetic_pairs: Positive = 8
    synthetic_rounds: Positive = 5
    synthetic_keys: Positive = 26
    synthetic_values: Annotated[int, Field(ge=2)] = 10
    synthetic_min_distance: Annotated[int, Field(ge=2)] = 32
    synthetic_max_distance: Annotated[int, Field(ge=2)] = 61
    tokenizer: FilePath = "auto"

    # rows, batches, steps
    train_seq_len: Positive = 1024
    val_seq_len: Positive | None = None
    global_batch_size: Positive = 48
    batch_stages: Annotated[list[BatchStage], Field(min_length=1)] | None = None
    batch_size: Positive | Literal["auto"] = "auto"
    gradient_accumulation_steps: Positive | None = None
    num_iterations: Positive = 1750
    num_epochs: Rate | None = None
    time_budget: Rate | None = None

    # equal sizes and lengths
    match: Match = Match()
    budget: Budget = Budget()

    # evaluation
    val_loss_every: NonNegative = 125
    val_bytes: Positive | None = None
    val_bytes_interim: Positive | None = None
    val_tokens: Positive | None = None
    val_steps: Positive | None = None

    # optimisation
    optimizer: Annotated[str, OneOf("trainer.optim:OPTIMIZERS")] = "adamw"
    learning_rate: Rate = 6e-4
    muon_learning_rate: Rate = 0.02
    muon_momentum: OpenFraction = 0.95
    muon_momentum_ends: OpenFraction | None = None
    muon_momentum_rise: Fraction = 0.25
    muon_momentum_fall: Fraction = 0.05
    muon_scale: Literal["spectral", "rms"] = "spectral"
    muon_ns_steps: Positive = 5
    muon_coefficients: Literal["classic", "polar_express", "polar_express_nanogpt"] = "classic"
    muon_weight_decay: NonNegativeFloat | None = None
    normuon_beta2: OpenFraction = 0.95
    lr_scaling: Literal["width", "none"] = "width"
    lr_base_width: Positive | None = None
    weight_decay: NonNegativeFloat = 0.1
    cautious_weight_decay: bool = False
    weight_decay_follows_rate: bool = False
    adam_beta1: OpenFraction = 0.9
    adam_beta2: OpenFraction = 0.95
    adam_epsilon: Rate = 1e-8
    max_grad_norm: NonNegativeFloat = 1.0
    z_loss: NonNegativeFloat = 0.0
    ema_decay: OpenFraction = 0.0

    # learning-rate schedule
    scheduler: Annotated[str, OneOf("trainer.optim:SCHEDULES")] = "cooldown"
    cooldown_frac: Fraction = 0.45
    warmup_steps: NonNegative = 0
    warmup_ratio: OpenFraction | None = None
    min_lr_ratio: Fraction = 0.1
    min_lr: NonNegativeFloat | None = None
    lr_decay_steps: Positive | None = None

    # adapters
    use_lora: bool = False
    lora_rank: Positive = 16
    lora_alpha: Rate = 32.0
    lora_dropout: OpenFraction = 0.05
    lora_targets: Text | Annotated[list[Text], Field(min_length=1)] | None = None
    lora_lr: NonNegativeFloat = 1e-4

    # rates of components
    base_model_lr: NonNegativeFloat | None = None
    memory_lr: NonNegativeFloat = 1e-4
    memory_bank_lr: NonNegativeFloat | None = None

    # machine
    device: Annotated[str, AfterValidator(_device_name)] = "auto"
    mixed_precision: Annotated[Literal["auto", "no", "bf16", "fp16"], _WordNo] = "auto"
    torch_compile: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    kernels: Annotated[dict[str, str], BeforeValidator(kernel_mapping)] = Field(
        default_factory=lambda: {"default": "auto"}
    )
    num_gpus: Positive | Literal["auto"] = "auto"
    ddp_backend: Literal["nccl", "gloo"] | None = None

    # checkpoints
    save_checkpoint: bool = True
    save_minutes: Rate | None = 10.0
    save_steps: Positive | None = None
    save_total_limit: Positive | None = 3
    save_best_model: bool = False
    save_only_best: bool = False
    save_precision: Literal["fp32", "fp16", "bf16"] | None = None
    early_stopping: bool = False
    early_stopping_patience: Positive = 3
    early_stopping_threshold: NonNegativeFloat = 0.0
    resume: Annotated[Place, _NullIsNone] = "none"
    init_from_checkpoint: Place | None = None
    eval_only: bool = False

    # what is printed, and where else it goes
    logging_steps: Positive = 10
    sample_tokens: NonNegative = 200
    sample_prompt: str = ""
    use_wandb: Annotated[Literal[False, "offline", "online"], _TrueIsOnline] = False
    wandb_project: Text = "mytrainer"
    wandb_run_name: Text | None = None
    use_tensorboard: bool = False
    env: Annotated[dict[str, str], BeforeValidator(env_strings), AfterValidator(_variables)] = Field(
        default_factory=dict
    )


GENERIC_FIELDS: tuple[str, ...] = tuple(RunConfig.model_fields)
STEPS = ("num_iterations", "num_epochs")  # how long a run trains
# The choices of a run: field -> where its table is.
CHOICES: dict[str, OneOf] = {
    name: mark
    for name, field in RunConfig.model_fields.items()
    for mark in field.metadata
    if isinstance(mark, OneOf)
}


def _marks(annotation: Any) -> Iterator[Any]:
    """What is attached to an annotation or to a member of its union."""
    if typing.get_origin(annotation) is Annotated:
        yield from typing.get_args(annotation)[1:]
    for member in typing.get_args(annotation):
        yield from _marks(member)


# Fields that files and folders are called by: field -> check. Some are needed before the types are checked.
PATHS: dict[str, Callable[[str], str]] = {
    name: mark.check
    for name, field in RunConfig.model_fields.items()
    for mark in (*field.metadata, *_marks(field.annotation))
    if isinstance(mark, Names)
}


def redacted(cfg: RunConfig) -> dict[str, Any]:
    """The run as JSON values, for whatever is saved or printed: no secret is in it."""
    values = {k: v if k == "model_cfg" else concealed(v) for k, v in cfg.model_dump(mode="json").items()}
    values["env"] = {k: REDACTED if is_secret(k) else v for k, v in values["env"].items()}
    return values
