"""Next-token prediction: the objective of every plain autoregressive language model.

Shapes: B rows, S positions, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.base import (
    Context,
    GenerateOptions,
    Generation,
    Likelihood,
    LossTerm,
    ModelAdapter,
    OnState,
    OnTokens,
    Prepared,
    StepOutput,
)
from adapters.choice import Choice
from configs.schema import DefaultModelConfig
from kernels.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from data.rows import Batch

__all__ = ["DefaultModelAdapter", "DefaultModelConfig", "sample_next"]


class DefaultModelAdapter(ModelAdapter):
    """Cross-entropy of the next token; exact likelihood by the chain rule; sampling over the model's cache."""

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        tokens = torch.from_numpy(batch.tokens)  # (B, S+1)
        weights = torch.from_numpy(batch.weights)  # (B, S)
        return Prepared(
            tensors={
                "inputs": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "doc_ids": torch.from_numpy(batch.doc_ids)[:, :-1],
                "weights": weights,
            },
            denominators={"tokens": float(weights.sum())},
        )

    def forward(self, prepared: Prepared) -> StepOutput:
        t = prepared.tensors
        total, _ = self._cross_entropy(t["inputs"], t["doc_ids"], t["targets"], t["weights"])
        return StepOutput(terms={"ce": LossTerm(total, "tokens")})

    def _cross_entropy(
        self, inputs: Tensor, doc_ids: Tensor, targets: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of nats, (), and nats of every position, (B, S)."""
        hidden = self.model(inputs, doc_ids=doc_ids)  # (B, S, D)
        total, nats = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.model.head_weight,
            targets.flatten(),
            None if weights is None else weights.flatten(),
            vocab_size=self.model_cfg.vocab_size,
        )
        return total, nats.view_as(targets)

    def likelihood(self, batch: Batch, ctx: Context) -> Likelihood:
        prepared = self.prepare(batch, ctx).to(self.device)
        t = prepared.tensors
        _, nats = self._cross_entropy(t["inputs"], t["doc_ids"], t["targets"], None)  # (B, S)
        nats = nats.cpu().double()
        ends = torch.from_numpy(batch.end_weights).double()
        return Likelihood(nats=(nats * t["weights"].cpu().double()).sum(1), end_nats=(nats * ends).sum(1))

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        options: GenerateOptions,
        on_tokens: OnTokens | None = None,
        on_state: OnState | None = None,
    ) -> Generation:
        """Continue each prompt token by token. A prompt is a document that has just begun, so the document
        token stands before it, as in training. Rows are independent: each has its own generator, and a row's
        text does not depend on the other prompts."""
        if options.steps or options.by_confidence:
            raise ValueError(
                "steps and by_confidence are for models that draw many positions at once; leave them out"
            )
        if options.temperature is None:
            options = replace(options, temperature=self.default_temperature)
        eot = self.tokenizer.eot
        stops = self.stop_tokens(options)
        generated: list[list[int]] = []
        calls = 0
        for row, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed((options.seed * 1_000_003 + row) % 2**63)
            stepper = _Stepper(self.model, self.device, options.use_cache)
            text, new = [eot, *prompt], []
            for _ in range(options.max_new_tokens):
                token = sample_next(stepper.next_logits(text), options, generator)
                if token in stops:
                    break
                text.append(token)
                new.append(token)
                if on_tokens is not None:
                    on_tokens(row, [token])
            generated.append(new)
            calls += stepper.calls
        return Generation(generated, calls)


class _Stepper:
    """Logits of the next token, feeding the model only what its cache has not seen.

    When the text outgrows the model's context, the window slides: positions may be absolute, so the last half
    is recomputed from scratch and grows again.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device, use_cache: bool) -> None:
        self.model, self.device, self.use_cache = model, device, use_cache
        self.limit: int = model.max_context  # type: ignore[assignment]
        self.start = 0  # index in the text of the first token the model sees
        self.calls = 0
        self.cache = None

    def next_logits(self, text: list[int]) -> Tensor:
        """(V,) fp32 on the CPU."""
        if len(text) - self.start > self.limit:
            self.start = len(text) - max(1, self.limit // 2)
            self.cache = None
        self.calls += 1
        if not self.use_cache:
            hidden = self.model(self._row(text[self.start :]))
        else:
            if self.cache is None:
                self.cache = self.model.init_cache(1, self.limit, device=self.device, dtype=None)  # type: ignore
            fresh = text[self.start + self.cache.length :]  # type: ignore[attr-defined]
            hidden = self.model(self._row(fresh), cache=self.cache)
        return self.model.logits(hidden[0, -1]).float().cpu()  # type: ignore[operator]

    def _row(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.int64, device=self.device)


def sample_next(logits: Tensor, options: GenerateOptions, generator: torch.Generator) -> int:
    """Draw a token id from (V,) logits; a temperature must be set. In fp64: fp32 Gumbel noise truncates the tails."""
    assert options.temperature is not None
    if options.temperature == 0:
        return int(logits.argmax())
    choice = Choice(options.temperature, options.top_k, options.top_p, options.min_p)
    return int(torch.multinomial(choice(logits.unsqueeze(0))[0].exp(), 1, generator=generator))
