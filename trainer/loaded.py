"""A trained model to look into: what it says of a text, what it makes of it inside, what it writes.

`load` opens what `eval` and `generate` open, and computes as they do: the same rows, batch and number format.

Shapes: L tokens of a text, T = L + 1 with the start token before them, D width, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from adapters.base import Annotation, Context, GenerateOptions, Likelihood, ModelAdapter
from configs.trust import trusting
from data.corpus import Document
from data.rows import Batch, HeldoutRows
from data.store import encode_documents
from data.tokenizers import StreamDecoder, as_bytes
from naming import expand_path, not_one_of
from trainer.annotate import annotate
from trainer.evaluate import Score, evaluating
from trainer.precision import autocast, tune_host
from trainer.run.folder import BEST
from trainer.run.restore import Restored, restore, say

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer

__all__ = ["Loaded", "TextScore", "load"]

WEIGHTS = ("ema", "raw")
LOGIT_ROWS = 256  # computed at once, so that a device never holds those of a long text


def load(
    path: str | Path,
    best: bool = False,
    weights: str = "ema",
    device: str | torch.device = "auto",
    *,
    overrides: Sequence[str] = (),
    val_seq_len: int | None = None,
    mixed_precision: str | None = None,
    trust: str | Sequence[str] = (),
    note: Callable[[str], None] = say,
) -> Loaded:
    """What `mytrainer.load` says. `note` hears what was passed over and what has no effect; by default it goes to
    stderr."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights: {not_one_of(weights, WEIGHTS)}")
    if not isinstance(best, bool):
        raise ValueError(f"best: must be True or False, got {best!r}")
    if isinstance(overrides, str):
        raise ValueError(f"overrides: a list of words is meant, got the text {overrides!r}")
    asked = {"val_seq_len": val_seq_len, "mixed_precision": mixed_precision}
    changes = {name: value for name, value in asked.items() if value is not None}
    given = _best_of(expand_path(path)) if best else path
    raw = weights == "raw"
    with trusting(trust):
        return Loaded(
            restore(given, raw=raw, device=str(device), overrides=overrides, changes=changes, note=note)
        )


def _best_of(run: Path) -> Path:
    if run.is_dir() and not (run / BEST).is_dir():
        raise ValueError(
            f"{run} keeps no {BEST}/. A run keeps one with save_best_model=true; best=False takes its newest checkpoint"
        )
    return run / BEST if run.is_dir() else run


@dataclass(frozen=True, eq=False)
class TextScore:
    """How likely a text is to a model.

    `text`: its UTF-8 bytes; `ids` (L,) int64: its tokens; `spans` (L, 2) int64: token i stands for
    `text[spans[i, 0]:spans[i, 1]]`. `nats` (L,) fp64: -log p of each token given those before it in its window; None
    where the likelihood is a bound, which has no parts by token. `seed`: what a bound's noise is drawn from. `score`:
    all that `eval` says of a file with this text, such as `comparable`, False where the tokenizer does not give the
    text back.
    """

    text: bytes
    ids: np.ndarray
    spans: np.ndarray
    nats: np.ndarray | None
    seed: int
    score: Score

    @property
    def kind(self) -> str:
        """`exact`, or `bound` for an upper bound."""
        return self.score.kind

    @property
    def estimator(self) -> str:
        """How a bound is estimated; `exact` where it is none."""
        return self.score.estimator

    @property
    def total(self) -> float:
        """Nats of the whole text."""
        return self.score.nats_per_token * self.score.tokens

    @property
    def standard_error(self) -> float:
        """Of `total`, by the noise that a bound is estimated from; 0 where it is exact."""
        return self.score.standard_error * math.log(2) * len(self.text)

    @property
    def bits_per_byte(self) -> float:
        return self.score.bits_per_byte

    def __repr__(self) -> str:
        sign, error = ("<= ", f" +- {self.standard_error:.2f}") if self.kind == "bound" else ("", "")
        return (
            f"TextScore({sign}{self.total:.2f}{error} nats, {sign}{self.bits_per_byte:.3f} bits per byte: "
            f"{len(self.ids)} tokens, {len(self.text)} bytes)"
        )


class Loaded:
    """A trained model, ready to be looked into, from `load`.

    Nothing here takes gradients, draws from torch's or numpy's global generators or leaves a mode changed. Texts are
    str or bytes; a text is one document, which begins at the start token. Models that read bytes have these as tokens.

    Attributes:
        adapter: how the architecture is scored and writes (`adapters.base.ModelAdapter`).
        model: the network (`torch.nn.Module`), in evaluation mode; its parameters take gradients if you let them.
        tokenizer: `encode(text)` gives ids (L,), `decode(ids)` bytes.
        config: all generic fields of the run; `model_cfg` are those of the architecture.
        path: the folder that the weights are from.
        weights: "ema" or "raw", what they are; "raw" where the run kept no average, "hugging face" of transformers.
        device, precision: where and in which number format ("no" is fp32) it computes, as `eval` does.
    """

    adapter: ModelAdapter
    model: nn.Module
    tokenizer: Tokenizer
    config: RunConfig
    model_cfg: ModelConfig
    path: Path
    weights: str
    device: torch.device
    precision: str

    def __init__(self, restored: Restored) -> None:
        assert restored.checkpoint is not None
        self._restored = restored
        self._one_at_a_time = threading.Lock()
        self.adapter, self.tokenizer, self.config = restored.adapter, restored.tokenizer, restored.cfg
        self.model, self.model_cfg = restored.adapter.model, restored.adapter.model_cfg
        self.path, self.weights = restored.checkpoint.absolute(), restored.weights.lower()
        self.device, self.precision = restored.device, restored.precision

    def __repr__(self) -> str:
        return (
            f"Loaded({self.config.type}, {self.adapter.parameter_count:,} parameters, {self.weights} weights of "
            f"{str(self.path)!r}, tokenizer {self.tokenizer.name}, {self.device}, precision {self.precision})"
        )

    def score(self, text: str | bytes) -> TextScore:
        """How likely the text is as one whole document, as `eval` scores a file with it: from the start token, in
        windows of the run's context (`val_seq_len` or `train_seq_len`), each beginning with the last token of the one
        before. A byte order mark, which is not part of a file's text, is part of a text here; and bytes that are not
        UTF-8, which `eval` refuses in a file, are scored.

        Exact for next-token models, with nats per token. Diffusion models give an upper bound of the text's nats given
        its length, estimated from noise that is the same at every call. ValueError if the text has no tokens.
        """
        document = _document(text)
        rows = self._restored.rows(encode_documents([document], self.tokenizer))
        by_token = _ByToken(rows)
        with self._computing():
            score = self._restored.score(rows, hear=by_token.hear)
        assert score is not None
        return TextScore(
            document.text,
            ids=rows.store.tokens[:].astype(np.int64),
            spans=self.tokenizer.spans(document.text),
            nats=by_token.nats,
            seed=self.config.seed,
            score=score,
        )

    def ids(self, text: str | bytes) -> Tensor:
        """(T,) int64: the tokens that the rows of `hidden` and `logits` belong to, the start token and the text's."""
        batch = self._one_row(text)
        return torch.from_numpy(batch.tokens[0, : batch.weights.shape[1]])

    def hidden(self, text: str | bytes, layer: int | None = None) -> Tensor:
        """Hidden states (T, D) of the text read in one piece, fp32 on the CPU: row t is that of token `ids(text)[t]`.

        `layer` None: the last ones, which the output layer reads; k: what block k gives, from 0, negative ones counted
        from the last. A block that runs several times: its last turn. ValueError for a block that there is not, or that
        has no row for each token (a hierarchy), and for a text beyond learned positions. Other positions go on beyond
        the context that the model was trained on, where it may not know what to make of them.

        Next-token models: a row knows its token and those before it. Diffusion models read the text without noise, at
        the smallest time that training draws: `d3pm`, `mdl` and `sedd` see all of it, `bd3lm` a token's own block and
        those before it. Where noise is a mask, training asks for no prediction at a token that is seen (but for the
        auxiliary cross-entropy of `d3pm`): no loss has shaped what the last block makes of it, and those before it only
        what masked tokens need.
        """
        batch = self._one_row(text)
        with self._reading():
            states = self._clean_states(batch) if layer is None else self._after_block(layer, batch)
        return states[0].float().cpu()  # (T, D)

    def logits(self, text: str | bytes) -> Tensor:
        """Logits (T, V) of the text read in one piece, fp32 on the CPU, without columns of padding.

        Next-token models: row t says what follows `ids(text)[t]`. With p = log_softmax, -p[t, ids[t + 1]] is
        `score(text).nats[t]` for texts within one window.

        Diffusion models: row t says what the network, told of the smallest time, would have token t be; with a mask
        among the states the mask has a column too. `d3pm` without a mask: p(x_0 | x_t) of a token that noise may have
        changed. `sedd`: log-scores, without a mask of the ratios p_t(y) / p_t(x) to the token that stands there. Where
        noise is a mask (`mdl`, `bd3lm`, absorbing chains) a token that is seen is known, and nothing reads its logits:
        they are what the output layer makes of its state, no more (under the auxiliary cross-entropy of `d3pm`, a guess
        at the token itself).
        """
        batch = self._one_row(text)
        with self._reading():
            states = self._clean_states(batch)[0]  # (T, D)
            return torch.cat([self.adapter.logits(part).float().cpu() for part in states.split(LOGIT_ROWS)])

    def annotate(self, text: str | bytes) -> Annotation:
        """What the model did with a text, where its architecture has something to show: marked stretches of its tokens,
        and maps (`adapters.base.Annotation`), the start token left out. Others give an empty one."""
        with self._computing():
            return annotate(self.adapter, _document(text).text, self.precision)

    def generate(self, prompts: str | bytes | Sequence[str | bytes], **options: Any) -> list[str]:
        """Continuations of the prompts ("" is the start of a document), without these, in their order.

        `options` are those of `adapters.base.GenerateOptions`: max_new_tokens=100, temperature=None (the
        architecture's own), top_k=0, top_p=1.0, min_p=0.0, seed=0, stop_at_document_end=True, stop_ids=(),
        use_cache=True; diffusion models also steps=0 and by_confidence=False, those that can draft tokens for
        themselves to verify speculative=False and draft=None. The first text is the one that `generate` prints for that
        prompt and seed; one prompt n times gives those of `--num_samples n`.

        ValueError for an option that there is not, or that is of another type or out of its range.
        """
        checked = GenerateOptions(**_typed(options))
        if strange := [i for i in checked.stop_ids if not 0 <= i < self.tokenizer.vocab_size]:
            raise ValueError(
                f"stop_ids: {strange[0]} is no token: ids are 0 to {self.tokenizer.vocab_size - 1}"
            )
        if not isinstance(prompts, str | bytes | Sequence):
            raise ValueError(f"prompts: a text or a list of texts is meant, got {prompts!r:.40}")
        texts = [prompts] if isinstance(prompts, str | bytes) else list(prompts)
        ids = [self.tokenizer.encode(_document(text).text).tolist() for text in texts]
        with self._reading():
            generated = self.adapter.generate(ids, checked)
        return [self._decode(*pair) for pair in zip(texts, generated.tokens, strict=True)]

    def _decode(self, prompt: str | bytes, tokens: list[int]) -> str:
        decoder = StreamDecoder(self.tokenizer, begins=not prompt)
        return decoder.push(tokens) + decoder.flush()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """One thread at a time: modes and hooks belong to the network, which all of them share."""
        with self._one_at_a_time:
            tune_host(self.config, self.device)  # the process may be somebody else's
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with (
            self._computing(),
            torch.no_grad(),
            evaluating(self.adapter),
            autocast(self.precision, self.device),
        ):
            yield

    def _one_row(self, text: str | bytes) -> Batch:
        return self.adapter.one_row(_document(text).text)

    def _clean_states(self, batch: Batch) -> Tensor:
        ctx = Context(seed=self.config.seed, step=0, phase="eval", rows_in_step=1)
        return self.adapter.clean_states(batch, ctx)

    def _after_block(self, layer: int, batch: Batch) -> Tensor:
        """(1, T, D)"""
        blocks, length = self.adapter.blocks(), batch.weights.shape[1]
        if type(layer) is not int or layer not in range(-len(blocks), len(blocks)):
            raise ValueError(
                f"layer: must be 0 to {len(blocks) - 1}, or -{len(blocks)} to -1 from the last, got {layer!r}"
            )
        latest: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            latest[:] = [output[0] if isinstance(output, tuple) else output]

        handle = self.model.get_submodule(blocks[layer]).register_forward_hook(keep)
        try:
            self._clean_states(batch)
        finally:
            handle.remove()
        if not latest:
            raise ValueError(f"layer: block {blocks[layer]} did not run on this text")
        if latest[0].shape[:2] != (1, length):
            raise ValueError(
                f"layer: block {blocks[layer]} gives {tuple(latest[0].shape)} for {length} tokens: it has no row for "
                f"each of them"
            )
        return latest[0]


def _typed(options: dict[str, Any]) -> dict[str, Any]:
    """Options of generation as `GenerateOptions` takes them."""
    kinds, typed = get_type_hints(GenerateOptions), {}
    for name, value in options.items():
        if name not in kinds:
            raise ValueError(f"generate: {not_one_of(name, kinds)}")
        value = tuple(value) if isinstance(value, list) else value
        try:
            typed[name] = TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except ValidationError:
            wanted = GenerateOptions.__annotations__[name]
            raise ValueError(f"{name}: must be of type {wanted}, got {value!r}") from None
    return typed


def _document(text: str | bytes) -> Document:
    if not isinstance(text, str | bytes):
        raise ValueError(f"text: must be str or bytes, got {type(text).__name__} ({text!r:.40})")
    return Document("text", as_bytes(text))


class _ByToken:
    """Collects what `evaluate` finds of the rows of one document. `nats` (L,), None where there are none by token."""

    def __init__(self, rows: HeldoutRows) -> None:
        self.rows = rows
        self.nats: np.ndarray | None = None

    def hear(self, batch: Batch, found: Likelihood) -> None:
        if found.per_token is None:
            return
        if self.nats is None:
            self.nats = np.full(len(self.rows.store.tokens), np.nan)
        for row, nats in zip(batch.rows, found.per_token.numpy(), strict=True):
            if row >= 0:
                place = self.nats[self.rows.targets_of(row)]  # which leaves the document's end out
                place[:] = nats[: len(place)]
