"""The trainer's contract for diffusion: noise and masked-row lists in `prepare`, one pass and one fused loss in
`forward`, a bound in `likelihood`, windows of text in `generate` and `infill`.

A row has S + 1 tokens: the first is given, as the autoregressive models' context token is; the S others are noised and
scored. All positions of a row share one time. Attention stays within documents. A document's end is not modelled: the
text behind it is another document, so a row's text is scored given its length.

B rows, L = S + 1 positions, M positions that the loss reads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from adapters.base import (
    Context,
    Flops,
    GenerateOptions,
    Generation,
    Likelihood,
    Metric,
    ModelAdapter,
    OnState,
    OnTokens,
    Otherwise,
    Prepared,
    StepOutput,
)
from adapters.diffusion.likelihood import estimate_bound
from adapters.diffusion.network import Network, Rows
from adapters.diffusion.otherwise import bound_by_levels, largest_window
from adapters.diffusion.process import Process, Sampling
from adapters.diffusion.sampling import continue_text, fill, same_length
from adapters.documents import documents, documents_among
from adapters.randomness import Noise

if TYPE_CHECKING:
    from data.rows import Batch
    from data.store import TokenStore

__all__ = ["DiffusionAdapter"]

DECILES = 10


class DiffusionAdapter(ModelAdapter):
    """Subclasses name their process."""

    process_class: type[Process]
    default_temperature = 1.0  # the model's own distribution
    generation_notes = ("a document's end is not modelled: the text goes on to max_new_tokens",)

    def __init__(self, model: Any, model_cfg: Any, tokenizer: Any) -> None:
        super().__init__(model, model_cfg, tokenizer)
        self._process: Process | None = None
        if self.model.mask_id == tokenizer.eot:
            raise ValueError(
                f"model_cfg.absorbing_state_idx ({tokenizer.eot}) is the token between documents, which text contains. "
                f"Set it to -1 to append a mask id"
            )

    @property
    def process(self) -> Process:
        if self._process is None:
            self._process = self.make_process()
        return self._process

    def make_process(self) -> Process:
        return self.process_class(self.model_cfg, self.model.n, self.model.V, self.model.mask_id)

    def process_at(self, step: int) -> Process:
        """The process as training step `step` uses it."""
        return self.process

    def network(self) -> Network:
        return Network(self.model, self.kernels)

    def kernel_calls(self, rows: int, seq_len: int) -> dict[str, dict[str, Any]]:
        logits = {"rows": rows * seq_len, "columns": self.model.V}
        return {**super().kernel_calls(rows, seq_len), self.process.kernel: logits}

    # -- training ------------------------------------------------------------------------------------------------

    def tokens_of(self, batch: Batch, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Clean tokens (B, L), positions that are noised and scored (B, L), document ids (B, L)."""
        x0 = torch.from_numpy(batch.tokens)[:, : batch.weights.shape[1] + 1]
        scored = torch.from_numpy(batch.weights) > 0  # (B, S)
        # Held-out text is scored as an autoregressive model scores it, always given the token before it.
        first = scored.any(1, keepdim=True) & (training and not self.model_cfg.ignore_bos)
        if self.model.mask_id is not None and bool((x0 == self.model.mask_id).any()):
            raise ValueError(
                f"the text contains token {self.model.mask_id}, which model_cfg.absorbing_state_idx reserves for the "
                f"mask. Set it to -1 to append a mask id"
            )
        return x0, torch.cat([first, scored], 1), torch.from_numpy(batch.doc_ids)[:, : x0.shape[1]]

    def on_training_text(self, store: TokenStore) -> None:
        """A reserved token that occurs in the text is found before the first step, not at the step that meets it."""
        reserved = self.model_cfg.absorbing_state_idx
        if reserved >= 0 and store.counts(self.model.V)[reserved]:
            raise ValueError(
                f"model_cfg.absorbing_state_idx ({reserved}) is a token that occurs in the training text. Name one "
                f"that never does, or set it to -1 to append a mask id"
            )

    def prepare(self, batch: Batch, ctx: Context) -> Prepared:
        process = self.process_at(ctx.step)
        x0, noised, doc_ids = self.tokens_of(batch, training=True)
        noise = Noise(ctx.seed, ctx.step, ctx.phase, batch.rows)
        streams = process.time_streams(x0.shape[1])
        if process.stratified:
            r = noise.stratified("time", ctx.rows_in_step, streams)
        else:
            r = noise.uniform("time", streams)
        time = process.training_time(r)
        xt = process.corrupt(x0, noised, time, noise.uniform("mask", process.noise_width(x0.shape[1])))
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        rows = process.rows(x0, xt, noised, time).to(torch.device("cpu"), dtype)
        progress = process.per_position(process.progress(time), x0.shape[1])
        decile = ((progress * DECILES).ceil().long() - 1).clamp(0, DECILES - 1).expand(x0.shape)  # (B, L)
        counts = torch.bincount(decile[noised], minlength=DECILES).tolist()
        return Prepared(
            tensors={
                "xt": xt,
                "tau": process.network_tau(time, x0.shape[1]),
                **documents(self.model, doc_ids),
                "decile": decile.flatten()[rows.index],
                "changed": (xt != x0).sum().float(),
                **rows.tensors(),
                **{f"extra.{k}": v for k, v in process.extra(x0).items()},
            },
            denominators={
                "tokens": float(noised.sum()),
                **{f"tokens_t{d}": float(c) for d, c in enumerate(counts)},
            },
        )

    def forward(self, prepared: Prepared) -> StepOutput:
        t = prepared.tensors
        network, process, rows = self.network(), self.process, Rows.from_tensors(t)
        extra = {k.removeprefix("extra."): v for k, v in t.items() if k.startswith("extra.")}
        hidden = network.hidden(t["xt"], t["tau"], rows.index, **documents_among(t), **extra)
        loss = process.row_loss(network, hidden, rows)
        nats = process.bound_nats(loss, rows)
        by_decile = nats.new_zeros(DECILES).index_add_(0, t["decile"], nats)
        tokens = prepared.denominators["tokens"]
        metrics = {"noised_fraction": Metric(t["changed"], tokens)}
        name = "nelbo" if process.trains_on_bound else "clipped_loss"
        for d in range(DECILES):
            metrics[f"{name}_t{d}"] = Metric(by_decile[d], prepared.denominators[f"tokens_t{d}"])
        for name, total in process.statistics(network, hidden.detach(), loss, rows).items():
            metrics[name] = Metric(total, float(len(rows.index)))
        return StepOutput(process.terms(network, hidden, loss, rows), metrics)

    def flops(self, seq_len: int) -> Flops:
        """Per token of text: a row has one position more, which costs what the others do but for the head."""
        flops, positions = self.model.flops(seq_len + 1), (seq_len + 1) / seq_len
        head = 2 * self.model.head_weight.numel()
        trained = 3 * self.model_cfg.share_of_logits * head
        return replace(
            flops,
            forward_per_token=positions * (flops.forward_per_token - head) + head,
            training_per_token=positions * (flops.training_per_token - trained) + trained,
            keys=positions * flops.keys,
            reference_keys=positions * flops.reference_keys,
            weights=positions * flops.weights,
        )

    # -- scoring -------------------------------------------------------------------------------------------------

    @property
    def draws(self) -> int:
        """Noise draws per row in a likelihood evaluation."""
        return self.model_cfg.nelbo_draws

    def likelihood(self, batch: Batch, ctx: Context) -> Likelihood:
        x0, noised, doc_ids = self.tokens_of(batch, training=False)
        return self._bound(x0, noised, doc_ids, Noise(ctx.seed, 0, "likelihood", batch.rows))

    def _bound(self, x0: Tensor, noised: Tensor, doc_ids: Tensor | None, noise: Noise) -> Likelihood:
        kind, estimator = "exact", self.process.estimator
        if not self.process.exact:
            kind, estimator = "bound", f"{estimator}; {self.draws} noise draws per row"
        bound = estimate_bound(self.process, self.network(), x0, noised, doc_ids, noise, self.draws)
        return Likelihood(
            nats=bound.nats,
            end_nats=None,
            kind=kind,  # type: ignore[arg-type]
            estimator=estimator,
            variance=bound.variance,
            parts=bound.parts,
            estimates=bound.estimates,
            per_token=bound.per_token,
        )

    @property
    def scored_together(self) -> int | None:
        return None

    @property
    def reserved_ids(self) -> frozenset[int]:
        return frozenset() if self.model.mask_id is None else frozenset({self.model.mask_id})

    @property
    def bound_window(self) -> int:
        return largest_window(self.process, super().bound_window)

    @torch.no_grad()
    def bound_otherwise(self, batch: Batch, ctx: Context) -> Otherwise | None:
        x0, noised, doc_ids = self.tokens_of(batch, training=False)
        return bound_by_levels(self.process, self.network(), x0, noised, doc_ids, ctx.seed)

    def clean_states(self, batch: Batch, ctx: Context) -> Tensor:
        """As `Process.read` says."""
        x0, _, doc_ids = self.tokens_of(batch, training=False)
        return self.process.read(self.network(), x0[:, :-1], doc_ids[:, :-1])

    def gap_likelihood(self, texts: list[list[int]], unknown: list[list[bool]], seed: int = 0) -> Likelihood:
        """Bound on the nats of the `unknown` tokens of equally long texts given all others, as `infill` conditions on
        them: the known ones are never noised. Divide by the number of unknown tokens to compare."""
        x0 = torch.tensor([[self.tokenizer.eot, *text] for text in texts])
        noised = torch.tensor([[False, *row] for row in unknown])
        noise = Noise(seed, 0, "gaps", np.arange(len(texts)))
        return self._bound(x0, noised, None, noise)

    # -- text ------------------------------------------------------------------------------------------------------

    @property
    def sample_steps(self) -> int:  # type: ignore[override]
        """At most a hundred, where the sampler has steps: a look at the text should not take longer than its score."""
        return min(self.process.sampler_steps, 100)

    @property
    def window(self) -> int:
        """Positions that are generated together, with the given one before them."""
        return self.model_cfg.n_ctx + 1

    def _sampling(self, options: GenerateOptions) -> Sampling:
        self.drafts(options)
        sampling = Sampling(
            **vars(self.shaping(options)),
            steps=options.steps,
            by_confidence=options.by_confidence,
            use_cache=options.use_cache,
        )
        self.process.check(sampling)
        return sampling

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        options: GenerateOptions,
        on_tokens: OnTokens | None = None,
        on_state: OnState | None = None,
    ) -> Generation:
        """Continue each prompt, all positions of a window at once. A prompt is a document that has just begun. A row's
        text does not depend on the other prompts."""
        network, stops = self.network(), self.stop_tokens(options)
        texts = [[self.tokenizer.eot, *prompt] for prompt in prompts]
        generated: list[list[int]] = [[] for _ in prompts]
        for group in same_length(texts):
            chosen = [texts[i] for i in group]

            def show(i: int, tokens: list[int | None], group: list[int] = group) -> None:
                if on_tokens is not None and i == 0:
                    on_tokens(group[0], [])  # nothing is final yet; the caller may want to stop
                if on_state is not None:
                    on_state(group[i], tokens[1:])

            done = continue_text(
                self.process,
                network,
                chosen,
                group,
                options.max_new_tokens,
                self.window,
                self.process.chunk,
                options.seed,
                self._sampling(options),
                show,
            )
            for i, text in zip(group, done, strict=True):
                new = text[len(texts[i]) :]
                stop = next((j for j, token in enumerate(new) if token in stops), None)
                generated[i] = new[:stop]
        if on_tokens is not None:
            for i, new in enumerate(generated):
                on_tokens(i, new)
        return Generation(generated, network.calls)

    @property
    def infill_notes(self) -> tuple[str, ...]:
        return self.process.gap_notes

    @torch.no_grad()
    def infill(
        self,
        texts: list[list[int | None]],
        options: GenerateOptions,
        on_state: OnState | None = None,
    ) -> Generation:
        """Fill the None positions of each text; the others come back as they are."""
        longest = max((len(text) for text in texts), default=0)
        if longest > self.window - 1:
            raise ValueError(
                f"infill: the text has {longest} tokens with its gaps, and the model's context is {self.window - 1}. "
                f"Shorten the text or the gaps"
            )
        network = self.network()
        out: list[list[int]] = [[] for _ in texts]
        for group in same_length(texts):
            windows: list[list[int | None]] = [[self.tokenizer.eot, *texts[i]] for i in group]

            def show(i: int, tokens: list[int | None], group: list[int] = group) -> None:
                if on_state is not None:
                    on_state(group[i], tokens[1:])

            filled = fill(
                self.process, network, windows, group, options.seed, 0, self._sampling(options), show
            )
            for i, text in zip(group, filled, strict=True):
                out[i] = text[1:]
        return Generation(out, network.calls)
