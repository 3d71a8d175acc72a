"""The contract between the trainer and every architecture.

The trainer owns the step (backward, accumulation, clipping, optimizers, schedules, EMA, checkpoints, logging)
and knows nothing of objectives. An adapter turns a batch into named loss SUMS with denominators, scores text,
generates it, and says what role each parameter plays. One step of the trainer is

    1. `prepare` every micro-batch (CPU, loader's thread) and add up the denominators over the whole step
       and all processes;
    2. per micro-batch: `loss = sum_k weight_k * sum_k / denominator_k`, backward;
    3. finite check, clip, optimizer, `end_step` (`after_step`, `constrain`), EMA.

Because a term is a sum and its denominator belongs to the step, eight rows in one micro-batch, one row in
eight, or four on each of two processes give the same gradient.

A block (`ModelAdapter.blocks`) runs twice where activations are recomputed in backward: it must be a function of its
inputs and parameters. What it counts (tokens per expert) it returns; it changes no buffer.

Shapes: B rows, S scored positions of a row, n look-ahead (1 for next-token), D width, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from adapters.annotation import Annotation, Map, Span, Spans
from adapters.rates import BESIDE, COMPONENTS
from adapters.shaping import Shaping
from data.corpus import Document
from data.rows import HeldoutRows
from data.store import encode_documents
from data.tokenizers import as_bytes
from kernels.choose import Kernels, UsesKernels
from models import ARCHITECTURES
from models.layers.flops import Flops, matmul_flops
from models.layers.lora import LOW_RANK, LowRank, Target, matrices
from models.layers.roles import Rule
from naming import load

if TYPE_CHECKING:
    from configs.schema import ModelConfig
    from data.config import Unit
    from data.rows import Batch
    from data.store import TokenStore
    from data.tokenizers import Tokenizer

__all__ = [
    "Annotation",
    "Context",
    "DataSpec",
    "Figures",
    "Flops",
    "GenerateOptions",
    "Generation",
    "Likelihood",
    "LossTerm",
    "Map",
    "Metric",
    "ModelAdapter",
    "OfDraws",
    "OnState",
    "OnTokens",
    "Otherwise",
    "Prepared",
    "Rule",
    "Span",
    "Spans",
    "Speculation",
    "StepOutput",
    "weighted_loss",
]


@dataclass(frozen=True)
class DataSpec:
    """What an architecture asks of the rows. `lookahead`: n, so that a row has 1 context token, S scored ones and n - 1
    further targets."""

    lookahead: int = 1


OfDraws = Literal["drawn", "mean", "most"]


@dataclass(frozen=True)
class Context:
    """Where a batch stands in the run. Everything random in an objective is a function of this and of the
    batch's global row ids, never of a generator's history, so that resuming, splitting a batch and recomputing
    activations cannot change it."""

    seed: int
    step: int  # 0-based optimizer step; 0 in evaluation
    phase: Literal["train", "eval"]
    rows_in_step: int  # global batch size
    # What of a thing that is drawn once for all rows of a step, such as a depth: the draw; or, where steps are timed or
    # what fits into memory is found out, what it is on average, and where it takes the most memory.
    of_draws: OfDraws = "drawn"
    # Whether other scores are wanted beside the one (`Likelihood.estimates`), though they cost further passes.
    estimates: bool = False


@dataclass
class Prepared:
    """A micro-batch ready for `forward`: tensors, and the denominators its loss terms will be divided by.

    `denominators` are host floats that depend on the batch and its context only (rows, tokens, bytes), never
    on hidden states: the trainer adds them up over the step before the first forward. `host` values (a number of
    recurrences, a mode) reach `forward` as they are: they neither move to the device nor are added up.
    """

    tensors: dict[str, Tensor]
    denominators: dict[str, float]
    host: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Prepared:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)


@dataclass
class LossTerm:
    """`sum`: scalar, at least fp32; `denominator`: a key of `Prepared.denominators`; `weight` 0 = reported only.

    `likelihood`: the sum is the text's negative log-likelihood in nats, a bound on it or an unbiased estimate of
    either, so that bits per byte can be made of it. `z_loss`: (), what the sum has the gradient of besides, and its
    value is without.
    """

    sum: Tensor
    denominator: str
    weight: float = 1.0
    likelihood: bool = True
    z_loss: Tensor | None = None


# Of a total, on the CPU: what is said of it, by name.
Figures = Callable[[Tensor], dict[str, float]]


@dataclass
class Metric:
    """A reported statistic: `sum` and `count` are added over micro-batches and processes ("mean" divides them);
    "max" and "last" look at `sum` alone. Either may be a device scalar: nothing waits for it before the log line.

    `figures`, for what of no part is what it is of the whole, such as the busiest expert: `sum` may have any shape, is
    added up over all that a log line tells of, and reported as what this makes of the total, under names of its own.
    """

    sum: float | Tensor
    count: float | Tensor = 1.0
    reduce: Literal["mean", "sum", "max", "last"] = "mean"
    figures: Figures | None = None


@dataclass
class StepOutput:
    """What `forward` returns. The first term is the one called "loss" on the console, with its bits per byte where it
    is a likelihood.

    `flops`: operations of this micro-batch, forward and backward, as the documented formula counts them, where these
    are decided by the data or by a draw (experts, capacity, recurrences); None: as `ModelAdapter.flops` plans.
    """

    terms: dict[str, LossTerm]
    metrics: dict[str, Metric] = field(default_factory=dict)
    flops: float | Tensor | None = None


def weighted_loss(terms: Mapping[str, LossTerm], denominators: Mapping[str, float]) -> Tensor:
    """What a micro-batch contributes to the step's loss, (): sum of weight * sum / denominator.

    `denominators` are the step's. One of 0 (no row of the step has such a target) divides by 1: its sum is 0 too.
    """
    parts = [t.weight * t.sum / (denominators[t.denominator] or 1.0) for t in terms.values()]
    return sum(parts[1:], parts[0])


@dataclass
class Likelihood:
    """Negative log-likelihood of held-out rows, in nats.

    `nats`: (B,) fp64 over the positions that stand for text; `end_nats`: (B,) fp64 over document ends, which
    are reported apart. `kind` "exact", or "bound" for an upper bound estimated by `estimator`, whose variance
    (nats squared, per row) is `variance`, (B,). `end_nats` None: ends of documents are not modelled. `per_token`: the
    nats of every scored position, (B, S) fp64, of exact models. `metrics` are reported as
    `val_<name>`; a row of weight 0 is padding and must count in none.
    """

    nats: Tensor
    end_nats: Tensor | None
    kind: Literal["exact", "bound"] = "exact"
    estimator: str = "exact"
    variance: Tensor | None = None
    # Further sums (B,) fp64 in nats, shown beside the score: what a bound consists of, and other estimates of it or
    # scores under other settings, by the names that people read.
    parts: dict[str, Tensor] = field(default_factory=dict)
    estimates: dict[str, Tensor] = field(default_factory=dict)
    per_token: Tensor | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass
class Otherwise:
    """A bound that is not taken from the code that estimates it: `nats` (B,) fp64 and their standard `errors` (B,), 0
    where everything that may be drawn was summed. `how`, in words."""

    nats: Tensor
    errors: Tensor
    how: str


@dataclass(frozen=True)
class GenerateOptions:
    """Sampling options. `temperature` 0 is greedy, None the adapter's `default_temperature`; `top_k` 0 and `top_p` 1
    are off; `min_p` keeps tokens that are at least so many times as likely as the likeliest; `seed` makes it
    repeatable. Text ends before the first of `stop_ids`, and before a document's end if `stop_at_document_end`.

    For models that draw many positions at once: `steps` of the sampler (0 = the model's own number), and
    `by_confidence`, which reveals the surest positions first instead of sampling the model's distribution.

    For models that can draft tokens for themselves to verify: `speculative`, the same text in fewer forward passes, and
    `draft`, how many tokens ahead at most (None = as many as the model can).

    `openings`, where prompts are chats: of each, how many of its tokens stand before its first answer, all of them in a
    chat without one (`ChatTemplate.opening`). Models that treat these otherwise than what follows read it.
    """

    max_new_tokens: int = 100
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_at_document_end: bool = True
    stop_ids: tuple[int, ...] = ()
    use_cache: bool = True
    steps: int = 0
    by_confidence: bool = False
    speculative: bool = False
    draft: int | None = None
    openings: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: must be 0 (the model's own) or more, got {self.steps}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be at least 1, got {self.max_new_tokens}")
        if self.temperature is not None and not self.temperature >= 0:
            raise ValueError(f"temperature: must be 0 (greedy) or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k: must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: must satisfy 0 < top_p <= 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: must satisfy 0 <= min_p < 1 (0 is off), got {self.min_p}")
        if self.draft is not None and not self.speculative:
            raise ValueError(
                f"draft: {self.draft} is read with speculative alone; set that too, or leave draft out"
            )
        if self.draft is not None and self.draft < 1:
            raise ValueError(f"draft: must be at least 1, got {self.draft}")
        if self.speculative and not self.use_cache:
            raise ValueError(
                "speculative: drafts are verified behind what the cache holds; leave out speculative or no_cache "
                "(use_cache=False)"
            )


@dataclass
class Speculation:
    """What became of drafts. `drafted`, `accepted`: of each depth, the first being that of the token behind the next
    one; a draft behind a rejected one is rejected with it, one behind a text's end is not counted. `tokens`: new ones
    of all rows; `passes`: forward passes, each counted once for every row that took part."""

    drafted: list[int]
    accepted: list[int]
    tokens: int = 0
    passes: int = 0

    @property
    def tokens_per_pass(self) -> float:
        """1 is what plain decoding gives."""
        return self.tokens / max(1, self.passes)

    def count(self, drafts: int, accepted: int, judged: int | None) -> None:
        """Of one test: so many drafts, of which the first `accepted` were; `judged`: at most so many before an end."""
        judged = drafts if judged is None else min(drafts, judged)
        for depth in range(judged):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < accepted


@dataclass
class Generation:
    """`tokens`: one list of new token ids per prompt; `network_calls`: forward passes it took; `speculation`: of
    `GenerateOptions.speculative`; `metrics`: means over these passes that the adapter reports."""

    tokens: list[list[int]]
    network_calls: int
    speculation: Speculation | None = None
    metrics: dict[str, float] = field(default_factory=dict)


# Called with (row, new token ids) whenever text of a row becomes final; rows may take turns.
OnTokens = Callable[[int, list[int]], None]
# Called with (row, the whole text so far) after every step of a model that draws positions in any order; None where a
# position is undecided.
OnState = Callable[[int, list[int | None]], None]


class ModelAdapter(nn.Module):
    """Wraps a backbone; this module is what data-parallel training wraps, with ONE `forward`.

    Subclasses must define `prepare`, `forward`, `likelihood` and `generate`, and `clean_states` to be looked into;
    everything else has a default that asks the model. The training mode is decided by what `prepare` returns, never by
    another method name: calling anything but the wrapper's `forward` leaves gradients un-synced under
    DistributedDataParallel. Every step gives every trainable parameter a gradient: a part that is off gets weight 0,
    it is not skipped.

    Parameters and buffers belong into `model`, where checkpoints, roles and averages find them.
    """

    Cfg: type[ModelConfig] | None = None  # schema of `model_cfg` when it is not the model's own `Config`
    # Operations of a training step that wait for the device, as a boolean mask does ("nonzero"). Best is none. `waits`
    # has those of kernels/ too.
    host_syncs: tuple[str, ...] = ()
    console_metrics: tuple[str, ...] = ()  # metrics shown while training, beside the loss
    # Whether training heeds the field of this name, `self.z_loss`; where not, a run that sets it is refused.
    takes_z_loss = False
    z_loss = 0.0
    # Why objective or layers cannot leave out positions of a row that are padding, and targets that do not count, in a
    # few words; "" where they can, as rows of chats, and padded ones, ask for. `masks` asks.
    no_masks = "its objective is that of whole rows"
    default_temperature = 0.8  # of generation
    sample_steps = 0  # of the samples along a run: `GenerateOptions.steps`
    generation_notes: tuple[str, ...] = ()  # what a reader of generated text should know
    # Whether the model is told where chats have their first answer: its `forward` takes `openings` then.
    reads_openings = False
    # Buffers of the model that are no weights, where it has them: fitted during a "run", so that one that begins with
    # its weights starts without; or to the "text", and taken along only to the same text.
    fitted: Mapping[str, Literal["run", "text"]] = MappingProxyType({})
    # Set by `adapters.lora.attach`: what adapters are like, which matrices have one, and what tells the weights that
    # they belong to from others.
    low_rank: LowRank | None = None
    adapted: tuple[Target, ...] = ()
    base: str = ""
    # Roles of what stays as it is, at a rate of 0; set by `adapters.rates.hold_still`.
    still: tuple[str, ...] = ()

    model: Any  # the backbone, an nn.Module; Any because each has attributes of its own

    def __init__(self, model: nn.Module, model_cfg: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.model_cfg: Any = model_cfg
        self.tokenizer = tokenizer
        self.kernels = Kernels()

    @property
    def kernels(self) -> Kernels:
        """The run's choice of implementations, set by `build_adapter`: hand it to every operation of `kernels/`. The
        model's layers that call some (`UsesKernels`) have it too."""
        return self._kernels

    @kernels.setter
    def kernels(self, kernels: Kernels) -> None:
        self._kernels = kernels
        for module in self.modules():
            if isinstance(module, UsesKernels):
                module.kernels = kernels

    @classmethod
    def build_model(cls, model_class: Any, model_cfg: ModelConfig) -> nn.Module:
        """Make the backbone. An adapter that brings its own model overrides this."""
        return model_class(model_cfg)

    @classmethod
    def unit(cls, model_cfg: ModelConfig) -> Unit:
        """What the model reads: tokens of the run's tokenizer, or bytes. Asked before there is a tokenizer."""
        return model_cfg.unit

    @classmethod
    def masks(cls, model_cfg: ModelConfig) -> str:
        """Why a model of this Config takes no rows of which parts do not count, "" where it does."""
        return cls.no_masks

    @classmethod
    def own_tokenizer(cls, model_cfg: ModelConfig) -> Tokenizer | None:
        """What `tokenizer: auto` means where the model's weights were trained elsewhere and know the ids of one. None:
        the source of text decides."""
        return None

    # -- training ------------------------------------------------------------------------------------------

    def data_spec(self) -> DataSpec:
        return DataSpec()

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """CPU work in the loader's thread: targets, masks, noise, times, denominators."""
        raise NotImplementedError(f"{type(self).__name__} must define prepare")

    def forward(self, prepared: Prepared) -> StepOutput:
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def on_training_text(self, store: TokenStore) -> None:
        """Called once before training with the training text, for objectives that are fitted to its statistics. What is
        learned here belongs into a buffer of the model, so that checkpoints carry it, and into `fitted`."""

    def on_step_start(self, ctx: Context, total_steps: int) -> None:
        """Curricula, and draws that all rows of a step share: a function of `ctx` and `total_steps`. Called on every
        process before the micro-batches of a step are run, and again where a step is replayed. Steps are prepared
        ahead of time: what `prepare` needs to know of its step it takes from its own `ctx`."""

    def on_evaluation_start(self) -> None:
        """Called on every process before held-out text is scored, and again where that begins again with smaller
        batches, as memory did not suffice. What an adapter has gathered for `after_evaluation` is to be dropped."""

    @property
    def cost_changes(self) -> tuple[float, ...]:
        """Shares of a run behind which a step costs otherwise than before, as where windows grow: `time_budget` times
        what lies between by itself."""
        return ()

    def add_up(self, values: Tensor) -> Tensor:
        """Sum of `values` over all processes, on each of them; `values` itself where there is one process. Every
        process must call it in the same order. Set by the trainer (`World.attach`)."""
        return values

    def after_step(self, step: int, skipped: Tensor) -> None:
        """Called once per optimizer step after all parameters moved, before EMA, evaluation and checkpoints.

        `skipped` is a device-side fp32 scalar, 1.0 when the step's gradients were not finite and nothing moved;
        what this does must then be a no-op too.
        """

    def constrain(self, skipped: Tensor) -> None:
        """Put weights that must stay on a set (such as unit rows) back onto it. Called after `after_step` (of every
        `constrain_every`-th step), after averaged weights were put into the model, and after weights came from
        elsewhere; never on resume, as doing it twice may round differently. Where `skipped`, a device-side fp32 scalar,
        is 1.0, nothing may change: use `torch.where`. By default the model's own `constrain`, where it has one."""
        if self.low_rank is None and hasattr(self.model, "constrain"):  # what is adapted stays as it is
            self.model.constrain(skipped)

    @property
    def constrain_every(self) -> int:
        """n: `constrain` follows on every n-th step of a run. By default the model's own, or 1."""
        return getattr(self.model, "constrain_every", 1)

    def end_step(self, step: int, skipped: Tensor) -> None:
        """What the trainer calls after all parameters moved in `step`, from 0 on."""
        self.after_step(step, skipped)
        if (step + 1) % self.constrain_every == 0:
            self.constrain(skipped)

    @property
    def fixed_norm(self) -> bool:
        """Whether hidden states have one norm, whatever the weights: how far training moves them then says nothing of
        how fast it is."""
        return getattr(self.model, "fixed_norm", False)

    def after_evaluation(self, step: int) -> None:
        """Called on every process after `step` steps, when all held-out rows have gone through `likelihood`. A score
        of its own, outside of training, is followed by no such call."""

    # -- scoring and sampling ------------------------------------------------------------------------------

    def likelihood(self, batch: Batch, ctx: Context) -> Likelihood:
        """Score held-out rows. `batch.weights` marks text positions, `batch.end_weights` document ends."""
        raise NotImplementedError(f"{type(self).__name__} must define likelihood")

    @property
    def scored_together(self) -> int | None:
        """How many targets of a row, counted from its first, are scored as one, each such group given all that stands
        before it: 1 of a model that predicts one token after the other. None: the whole row, in no order."""
        return 1

    @property
    def reserved_ids(self) -> frozenset[int]:
        """Ids of the model's vocabulary that no text may have, such as a mask's."""
        return frozenset()

    @property
    def bound_window(self) -> int:
        """The most targets of a row, 6 or fewer, for which `bound_otherwise` takes no longer than a person waits."""
        return 6

    def bound_otherwise(self, batch: Batch, ctx: Context) -> Otherwise | None:
        """The mean of what `likelihood` estimates of short rows, by code and means of its own, such as the sum over all
        that may be drawn: what `eval --certify` compares the estimate with. None where a model that has a bound
        knows no such means, and then its bound cannot be certified."""
        return None

    def clean_states(self, batch: Batch, ctx: Context) -> Tensor:
        """Last hidden states (B, S, D) of the rows' first S tokens as they stand, nothing noised or hidden: what one
        sees who looks into the model. `ctx` is that of evaluation. ValueError where a network cannot read text so."""
        raise ValueError(
            f"{type(self).__name__} does not say what its network makes of clean text: it defines no clean_states"
        )

    def annotate(self, text: str | bytes) -> Annotation:
        """What the network did with a text as it stands: what of it was routed where, what it was cut into, which parts
        looked at which. For people to see: reports and `eval` draw whatever this returns, by default nothing. Called in
        evaluation, without gradients; the same text gives the same."""
        return Annotation()

    def one_row(self, text: str | bytes) -> Batch:
        """A text as one document in one window: the start token and its L tokens are read, and its end comes last."""
        store = encode_documents([Document("text", as_bytes(text))], self.tokenizer)
        seq_len = len(store.tokens) + 1
        rows = HeldoutRows(store, self.tokenizer.eot, seq_len, lookahead=self.data_spec().lookahead)
        return rows.batch(np.zeros(1))

    def logits(self, states: Tensor) -> Tensor:
        """(..., D) of `clean_states` -> (..., V), without the columns of padding."""
        return self.model.logits(states)

    def generate(
        self,
        prompts: list[list[int]],
        options: GenerateOptions,
        on_tokens: OnTokens | None = None,
        on_state: OnState | None = None,
    ) -> Generation:
        """Continue each prompt. `on_state` is for models that draw positions in any order; others leave it alone."""
        raise NotImplementedError(f"{type(self).__name__} must define generate")

    def shaping(self, options: GenerateOptions) -> Shaping:
        """What each predicted distribution goes through before a token is drawn from it: `options`, and nothing but
        ids that the tokenizer has, as the model's vocabulary may be larger. Every sampler draws through it."""
        return Shaping(
            temperature=self.default_temperature if options.temperature is None else options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            tokens=self.tokenizer.vocab_size,
        )

    def openings(self, prompts: list[list[int]], options: GenerateOptions) -> list[int]:
        """Tokens before the first answer of each chat, its start token among them; none of text, and where the model is
        not told. ValueError where `options.openings` are not those of the prompts."""
        given = options.openings
        if given and len(given) != len(prompts):
            raise ValueError(f"openings: one for each of {len(prompts)} prompts, got {len(given)}")
        for number, (opening, prompt) in enumerate(zip(given, prompts, strict=False)):
            if not 0 <= opening <= len(prompt):
                raise ValueError(f"openings: prompt {number} has {len(prompt)} tokens, got {opening}")
        return [opening + 1 for opening in given] if self.reads_openings else []

    def drafts(self, options: GenerateOptions) -> int:
        """Tokens to draft in each round of generation: 0 unless it is `speculative`. ValueError where the model has no
        such drafts."""
        if not options.speculative:
            return 0
        most = getattr(self.model, "max_drafts", 0)
        if most == 0:
            able = [name for name, row in ARCHITECTURES.items() if hasattr(load(row.model), "init_drafter")]
            why = getattr(self.model, "no_drafts", "")
            raise ValueError(
                f"speculative: {type(self.model).__name__}, as it is configured, has nothing to draft tokens with"
                f"{why and f' ({why})'}. Architectures that can have: {', '.join(able) or 'none'}"
            )
        if options.draft is not None and options.draft > most:
            raise ValueError(f"draft: this model can draft 1 to {most}, got {options.draft}; nearest {most}")
        return options.draft or most

    def stop_tokens(self, options: GenerateOptions) -> set[int]:
        """Token ids that end a text."""
        ends = self.tokenizer.ends if options.stop_at_document_end else set()
        return {*ends, *options.stop_ids}

    def infill(
        self, texts: list[list[int | None]], options: GenerateOptions, on_state: OnState | None = None
    ) -> Generation:
        """Replace every None of each text by a token; `tokens` of the result are whole texts."""
        raise ValueError(
            "this architecture writes from left to right and cannot fill gaps; use a prompt instead"
        )

    @property
    def infill_notes(self) -> tuple[str, ...]:
        """What a reader of filled gaps should know."""
        return ()

    # -- what the trainer must know of the parameters --------------------------------------------------------

    def external(self) -> list[str]:
        """Paths of modules inside `model` whose parameters and buffers come from elsewhere, such as a pretrained base:
        `init_weights` loads them, nothing trains, averages, exchanges or saves them."""
        return self.model.external() if hasattr(self.model, "external") else []

    def provenance(self) -> dict[str, str]:
        """What identifies the external parts, such as a digest of their files. Kept in config.json; a checkpoint is
        only loaded where it is the same."""
        own = self.model.provenance() if hasattr(self.model, "provenance") else {}
        return {**own, "base": self.base} if self.low_rank and self.base else own

    def init_weights(self, generator: torch.Generator) -> None:
        self.model.init_weights(generator)

    def param_roles(self) -> list[Rule]:
        """Rules over the MODEL's parameter names; first match wins, every trainable parameter must match."""
        adapters = [Rule(LOW_RANK, "adapter")] if self.low_rank else []
        return [*adapters, *self.model.param_roles()]

    @property
    def lora_targets(self) -> Sequence[str]:
        """What LoRA adapts where a run does not say it, as `models.layers.lora.targets_of` takes it."""
        return getattr(self.model, "lora_targets", ())

    def blocks(self) -> list[str]:
        """Module paths inside `model`: the units of compilation and activation recompute."""
        return self.model.blocks()

    @property
    def kept_passes(self) -> float:
        """Passes through a block of which a training step keeps activations: one of each, unless the model says
        otherwise, as where some run several times, or are of a part of the tokens."""
        return getattr(self.model, "kept_passes", len(self.blocks()))

    def kernel_calls(self, rows: int, seq_len: int) -> dict[str, dict[str, Any]]:
        """Operations of `kernels/` that a training micro-batch calls -> what the rule of choice may know of it
        (`kernels.choose.Call`): `rows` and `columns` of the logits at most, `facts`. What is said of a run before it
        starts; nothing depends on it. Here: those of the model's layers."""
        found: dict[str, dict[str, Any]] = {}
        for module in self.model.modules():
            if isinstance(module, UsesKernels):
                found |= module.kernel_calls(seq_len)
        return found

    def flops(self, seq_len: int) -> Flops:
        """Floating-point operations per token at this row length, by the documented formula: the plan."""
        return self.model.flops(seq_len)

    def passes(self, path: str) -> float:
        """How often a module of the model acts on a token, on average: 1, unless it runs several times or for a part of
        the tokens."""
        return self.model.passes(path) if hasattr(self.model, "passes") else 1.0

    @property
    def _has_still_weights(self) -> bool:
        return bool(self.low_rank or self.still or self.external())

    def cost(self, seq_len: int) -> Flops:
        """`flops`, with what adapters add, and without the gradients of weights that have none."""
        if not self._has_still_weights:
            return self.flops(seq_len)
        with torch.no_grad():  # sizes of matrices are read
            planned = self.flops(seq_len)
        moves = {n: p.requires_grad for n, p in self.model.named_parameters(remove_duplicate=False)}
        weights = {True: 0.0, False: 0.0}  # that multiply a token, with gradients and without
        for matrix in matrices(self.model):
            weights[moves[matrix.name]] += math.prod(matrix.sides) * self.passes(matrix.path)
        held = weights[False]
        if self.low_rank or self.external() or any(role not in COMPONENTS for role in self.still):
            # Output layers too, which may be no matrix of a module but rows of the embedding.
            held = planned.weights - weights[True]
        added, rank = Flops(0.0, 0.0), self.low_rank.rank if self.low_rank else 0
        for target in self.adapted:
            added = added + matmul_flops(rank * sum(target.sides)) * self.passes(target.path)
        return planned.without_gradients(held) + added

    def realised(self, flops: float | Tensor, seq_len: int) -> float | Tensor:
        """Of operations that a step really took (`StepOutput.flops`), which know nothing of adapters, what they come to
        with these: as much more or less as the plan does."""
        if not self._has_still_weights:
            return flops
        with torch.no_grad():
            planned = self.flops(seq_len).training_per_token
        return flops * (self.cost(seq_len).training_per_token / planned)

    def active_parameters(self) -> int | None:
        """Parameters that act on one token; None where that is all of them."""
        return self.model.active_parameters() if hasattr(self.model, "active_parameters") else None

    @property
    def depends_on_split(self) -> str:
        """What of the objective depends on how a step is cut into micro-batches and processes, where an option says
        so, as some are published; "" as it should be: nothing. Said at the start of a run, and kept in its manifest."""
        return ""

    @property
    def non_causal_routing(self) -> bool:
        """Whether what is predicted may look at later tokens by way of a choice, as an option of some models has it: no
        score of such a model is one of text that is yet to come. Kept beside every score."""
        return getattr(self.model, "non_causal_routing", False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is said of the model at the start of a run, and by `show`: what its fields do not tell."""
        return ()

    @property
    def width(self) -> int:
        """The width that learning rates scale with."""
        return self.model_cfg.d_model

    @property
    def waits(self) -> tuple[str, ...]:
        """`host_syncs`, and those that implementations of kernels/ declare which were used so far."""
        return self.host_syncs + self.kernels.host_syncs

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def named_model_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names that roles, checkpoints and optimizer state use. Shared ones once."""
        return self.model.named_parameters()

    def counted_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Those that counts are of: of a pair that is one matrix for now (`twins` of the model) the first alone."""
        twins = getattr(self.model, "twins", ())
        return [(name, p) for name, p in self.named_model_parameters() if name not in twins]

    @property
    def parameter_count(self) -> int:
        """Numbers in `counted_parameters`."""
        return sum(p.numel() for _, p in self.counted_parameters())

    def is_external(self, name: str) -> bool:
        """Whether a parameter or buffer of the model belongs to a part that comes from elsewhere. What adapters add to
        one does not."""
        if self.low_rank and re.fullmatch(LOW_RANK, name):
            return False
        return any(name.startswith(f"{path}.") for path in self.external())

    def beside(self) -> set[str]:
        """Names of the parameters that train, and are kept, where LoRA leaves all others as they are."""
        patterns = [(re.compile(rule.pattern), rule.role in BESIDE) for rule in self.param_roles()]
        names = [name for name, _ in self.named_model_parameters()]
        return {n for n in names if next((own for pattern, own in patterns if pattern.fullmatch(n)), False)}

    def freeze_external(self) -> None:
        """Have nothing train what comes from elsewhere."""
        for path in self.external():
            self.model.get_submodule(path).requires_grad_(False)

    def trained_state(self) -> dict[str, Tensor]:
        """What checkpoints hold of the model: its state without external parts, and without what adapters change.
        Live tensors, not copies."""
        frozen = set()
        if self.low_rank:
            named = self.model.named_parameters(remove_duplicate=False)
            kept = self.beside()
            frozen = {n for n, p in named if not (p.requires_grad or n in kept or re.fullmatch(LOW_RANK, n))}
        state = self.model.state_dict()
        return {n: value for n, value in state.items() if n not in frozen and not self.is_external(n)}

    def added(self, name: str) -> bool:
        """Whether a tensor of the model is of a part that stands beside another architecture, whose weights may begin
        a run of this one: the part then is as it is initialised. By default the model's own, if there is one."""
        return self.model.added(name) if hasattr(self.model, "added") else False

    def with_added(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of another model, with the parts that are `added`, as they are here; unchanged where they have any of
        these."""
        own = {name: value.detach() for name, value in self.trained_state().items() if self.added(name)}
        return state if state.keys() & own.keys() else {**own, **state}
