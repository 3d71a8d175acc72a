"""Next-token prediction: the objective of every plain autoregressive language model, and what others start from.

An architecture with further targets, loss terms or metrics overrides `step_output` (and `heldout_metrics`); one whose
network is called in another way overrides `hidden` and `next_hidden`. Nothing has to be copied from here.

Shapes: B rows, S positions, n look-ahead, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.base import (
    Context,
    GenerateOptions,
    Generation,
    Likelihood,
    LossTerm,
    Metric,
    ModelAdapter,
    OnState,
    OnTokens,
    Prepared,
    StepOutput,
)
from adapters.decoding import Endings, LanguageModel, decode
from adapters.documents import documents, documents_among
from adapters.speculative import DraftingModel, speculate
from configs.schema import DefaultModelConfig
from kernels.choose import SPARING
from kernels.linear_cross_entropy import linear_cross_entropy
from models.layers.cache import Cache
from models.layers.decoder import Hidden
from models.layers.drafter import Drafter

if TYPE_CHECKING:
    from data.rows import Batch

__all__ = ["DefaultModelAdapter", "DefaultModelConfig", "as_hidden", "nth"]


class DefaultModelAdapter(ModelAdapter):
    """Cross-entropy of the next token; exact likelihood by the chain rule; sampling over the model's cache.

    The model is called as `model(tokens, doc_ids=...)` and `model(tokens, cache=...)`, and returns hidden states
    (B, T, D) or a `Hidden`. If its `forward` has `cu_seqlens`, it is given these beside doc_ids (`data/offsets.py`). It
    has `head_weight` (V_p, D), `logits(hidden)`, `max_context` (None = no window), and `init_cache(rows)`; without one,
    or with None in its place, generation reads the whole window for each token. One that can draft tokens has what
    `models/layers/drafter.py` says.
    """

    takes_z_loss = True
    no_masks = ""

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        """Tensors `inputs`, `doc_ids`, `targets`, `weights`, all (B, S), `cu_seqlens` for models that read them, and
        the denominator `tokens`. With a look-ahead of n also `targets_k`, `weights_k` and `tokens_k` for k = 2 to n:
        the k-th token after each input, which counts where it belongs to the input's document or ends it, and is a
        target that counts. What `batch.weights` says of a row's last target holds for those behind it too."""
        length, lookahead = batch.weights.shape[1], self.data_spec().lookahead
        tokens = torch.from_numpy(batch.tokens)  # (B, S + n)
        doc_ids = torch.from_numpy(batch.doc_ids)  # (B, S + n)
        given = F.pad(torch.from_numpy(batch.weights), (0, lookahead - 1), mode="replicate")  # (B, S + n - 1)
        tensors = {"inputs": tokens[:, :length], **documents(self.model, doc_ids[:, :length])}
        denominators = {}
        for k in range(1, lookahead + 1):
            last = slice(k - 1, k - 1 + length)  # the token in front of the target
            weights = given[:, last] * (doc_ids[:, last] == doc_ids[:, :length])
            tensors[nth("targets", k)] = tokens[:, k : k + length]
            tensors[nth("weights", k)] = weights
            denominators[nth("tokens", k)] = float(weights.sum())
        return Prepared(tensors, denominators)

    def forward(self, prepared: Prepared) -> StepOutput:
        output = self.step_output(self.hidden(prepared), prepared)
        if self.z_loss:
            output.terms |= self._z_losses(output.terms)
        return output

    def hidden(self, prepared: Prepared) -> Hidden:
        """Run the network over a batch, in training and in scoring."""
        t = prepared.tensors
        return as_hidden(self.model(t["inputs"], **documents_among(t), **self.drawn(prepared)))

    def drawn(self, prepared: Prepared) -> dict[str, Any]:
        """What the network is given of a prepared batch besides, such as seeds of what its layers draw."""
        return {}

    def step_output(self, hidden: Hidden, prepared: Prepared) -> StepOutput:
        """The loss terms of a batch, and what is to be reported. Override to add to it."""
        return StepOutput(terms={"ce": self.cross_entropy(hidden.states, prepared)})

    def cross_entropy(
        self, states: Tensor, prepared: Prepared, k: int = 1, weight: float = 1.0, head: Tensor | None = None
    ) -> LossTerm:
        """The term of the k-th token after each position, predicted from states (B, S, D) by the model's head or by
        `head` (V_p, D). Only the next token's is the text's likelihood."""
        targets, weights = prepared.tensors[nth("targets", k)], prepared.tensors[nth("weights", k)]
        # The backward begins with the last head: it alone may keep its logits, and those of one exist at a time.
        sparing = k < self.data_spec().lookahead
        total, nats, z = self.head_loss(states, targets, weights, head, self.z_loss, sparing)
        term = LossTerm(total, nth("tokens", k), weight, likelihood=k == 1)
        if z is not None:
            term.z_loss = self.z_loss * (z * weights).sum()
            term.sum = (nats * weights).sum() + (
                total - total.detach()
            )  # the nats' value, the gradient of both
        return term

    def _z_losses(self, terms: dict[str, LossTerm]) -> dict[str, LossTerm]:
        """What `z_loss` adds to each term, to be reported: `z_loss` of the first, `<name>_z_loss` of others."""
        found = {name: term for name, term in terms.items() if term.z_loss is not None}
        if not found:
            raise ValueError(
                f"z_loss={self.z_loss}: no loss term of {type(self).__name__} is a `cross_entropy` of its head. Set "
                f"z_loss=0, and takes_z_loss = False in that class"
            )
        first = next(iter(terms))
        return {
            "z_loss" if name == first else f"{name}_z_loss": LossTerm(
                term.z_loss, term.denominator, weight=0.0, likelihood=False
            )
            for name, term in found.items()
            if term.z_loss is not None
        }

    def head_loss(
        self,
        states: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        head: Tensor | None = None,
        z_loss: float = 0.0,
        sparing: bool = False,
        padding: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weighted sum of nats + z_loss * z, (), nats of every position, (B, S), and z, (B, S), the square of its
        log-normaliser (None without `z_loss`), both unweighted and detached. Targets and weights of (B, S, n) are n for
        each position, predicted by the same logits, and so are their nats. `sparing` keeps no logits until the
        backward; with `padding` columns beyond the vocabulary take part too. Logits are capped as the model's are
        (`logit_softcap`, where it has one)."""
        total, nats, z = linear_cross_entropy(
            states.flatten(0, 1),
            self.model.head_weight if head is None else head,
            targets.flatten(0, 1),
            None if weights is None else weights.flatten(0, 1),
            vocab_size=None if padding else self.model_cfg.vocab_size,
            kernels=self.kernels,
            softcap=getattr(self.model, "logit_softcap", None),
            z_loss=z_loss,
            sparing=sparing,
        )
        return total, nats.view_as(targets), None if z is None else z.view(targets.shape[:2])

    def likelihood(self, batch: Batch, ctx: Context) -> Likelihood:
        prepared = self.prepare(batch, ctx).to(self.device)
        hidden = self.hidden(prepared)
        _, nats, _ = self.head_loss(hidden.states, prepared.tensors["targets"], None)  # (B, S)
        nats = nats.cpu().double()
        text, ends = (torch.from_numpy(w).double() for w in (batch.weights, batch.end_weights))
        others = self.other_nats(hidden, prepared)
        return Likelihood(
            nats=(nats * text).sum(1),
            end_nats=(nats * ends).sum(1),
            estimates={name: (other.cpu().double() * text).sum(1) for name, other in others.items()},
            per_token=nats,
            metrics=self.heldout_metrics(hidden, prepared) | self.accuracy_on_marks(hidden, batch),
        )

    def accuracy_on_marks(self, hidden: Hidden, batch: Batch) -> dict[str, Metric]:
        """How often the likeliest token is the right one, of the targets that the text marks."""
        found = {}
        for name, where in batch.marked.items():
            rows, places = (torch.from_numpy(i).to(self.device) for i in where.nonzero())
            targets = torch.from_numpy(batch.tokens[:, 1 : where.shape[1] + 1][where]).to(self.device)
            right = self.logits(hidden.states[rows, places]).argmax(-1) == targets  # (marked,)
            found[f"{name}_accuracy"] = Metric(right.sum(), len(targets))
        return found

    def clean_states(self, batch: Batch, ctx: Context) -> Tensor:
        return self.hidden(self.prepare(batch, ctx).to(self.device)).states

    def kernel_calls(self, rows: int, seq_len: int) -> dict[str, dict[str, Any]]:
        logits: dict[str, Any] = {"rows": rows * seq_len, "columns": self.model.head_weight.shape[0]}
        if self.data_spec().lookahead > 1:
            logits["facts"] = (SPARING,)
        return {**super().kernel_calls(rows, seq_len), "linear_cross_entropy": logits}

    def other_nats(self, hidden: Hidden, prepared: Prepared) -> dict[str, Tensor]:
        """Of every position, (B, S), under other settings than the score's, by the names that people read: what
        `Context.estimates` asked for in `prepare`."""
        return {}

    def heldout_metrics(self, hidden: Hidden, prepared: Prepared) -> dict[str, Metric]:
        """What evaluations report beside the score."""
        return {}

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        options: GenerateOptions,
        on_tokens: OnTokens | None = None,
        on_state: OnState | None = None,
    ) -> Generation:
        """Continue all prompts token by token. A prompt is a document that has just begun, so the document token stands
        before it, as in training. Beyond the rounding of products of another shape, a row's text does not depend on the
        other prompts. `on_tokens` hears the rows in turn."""
        if options.steps or options.by_confidence:
            raise ValueError(
                "steps and by_confidence are for models that draw many positions at once; leave them out"
            )
        texts = [[self.tokenizer.eot, *prompt] for prompt in prompts]
        endings = Endings(options.max_new_tokens, self.stop_tokens(options), on_tokens)
        how = self.shaping(options), endings, options.seed
        openings = self.openings(prompts, options)
        told = _Means()

        def hear(output: Tensor | Hidden) -> Tensor:
            hidden = as_hidden(output)
            told.add(self.text_metrics(hidden))
            return hidden.states

        if drafts := self.drafts(options):
            found = speculate(self.drafting_model(drafts, hear), texts, *how)
        else:

            def next_logits(tokens: Tensor, cache: Cache | None, given: Tensor | None) -> Tensor:
                more = {} if given is None else {"openings": given}
                return self.model.logits(hear(self.next_hidden(tokens, cache, **more))[:, -1])

            init_cache = getattr(self.model, "init_cache", None) if options.use_cache else None
            model = LanguageModel(next_logits, init_cache, self.model.max_context, self.device)
            found = decode(model, texts, *how, openings)
        found.metrics = told.read()
        return found

    def drafting_model(self, drafts: int, hear: Callable[[Tensor | Hidden], Tensor]) -> DraftingModel:
        def init_drafter(rows: int) -> Drafter:
            return self.model.init_drafter(rows, drafts)

        return DraftingModel(
            init_drafter, hear, self.model.logits, drafts, self.model.max_context, self.device
        )

    def next_hidden(self, tokens: Tensor, cache: Cache | None, **more: Tensor) -> Hidden:
        """What the network makes of tokens (B, T), which continue what `cache` holds, or stand alone. `more`:
        `openings` (B, 1) of chats, where it reads them."""
        return as_hidden(self.model(tokens, cache=cache, **more))

    def next_logits(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        """Logits (B, V) of what follows them."""
        return self.model.logits(self.next_hidden(tokens, cache).states[:, -1])

    def text_metrics(self, hidden: Hidden) -> dict[str, Metric]:
        """What is reported of each pass in which text is written or a prompt is read; means alone."""
        return {}


class _Means:
    """Of metrics over several passes."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, Metric]) -> None:
        for name, metric in metrics.items():
            assert metric.reduce == "mean" and metric.figures is None, f"{name}: of text means alone are told"
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + _number(metric.sum), count + _number(metric.count)

    def read(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items() if count}


def _number(value: float | Tensor) -> float:
    return float(value.cpu()) if isinstance(value, Tensor) else value


def nth(name: str, k: int) -> str:
    """The name of a tensor or denominator that belongs to the k-th token after each position."""
    return name if k == 1 else f"{name}_{k}"


def as_hidden(output: Tensor | Hidden) -> Hidden:
    return output if isinstance(output, Hidden) else Hidden(output)
