"""A text from the present weights, along a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from adapters.base import GenerateOptions
from data.chats.messages import Message
from data.chats.store import ChatStore
from data.chats.template import UNLEARNED, ChatTemplate
from data.tokenizers import text_of
from trainer.errors import StopRequested
from trainer.evaluate import evaluating

if TYPE_CHECKING:
    from trainer.session import Session

__all__ = ["Sample", "sample_text"]


@dataclass(frozen=True)
class Sample:
    text: str  # with its prompt
    tokens: int  # new ones
    seconds: float  # that they took, the prompt read


def sample_text(s: Session, should_stop: Callable[[], bool]) -> Sample | None:
    """`sample_tokens` new tokens behind `sample_prompt`, of a model of chats an answer to it; None when a stop was
    asked for meanwhile."""

    def check(row: int, tokens: list[int]) -> None:
        if should_stop():
            raise StopRequested

    tokenizer, chats = s.dataset.tokenizer, s.dataset.chats
    prompt = _asked(s) if chats else tokenizer.encode(s.cfg.sample_prompt).tolist()
    options = GenerateOptions(
        max_new_tokens=s.cfg.sample_tokens,
        seed=s.cfg.seed,
        stop_at_document_end=chats,
        stop_ids=ChatTemplate(tokenizer).stop_ids if chats else (),
        steps=s.adapter.sample_steps,
        openings=(len(prompt),) if chats else (),
    )
    try:
        with evaluating(s.adapter), torch.random.fork_rng(devices=[]):
            started = time.perf_counter()
            new = s.adapter.generate([prompt], options, check).tokens[0]
            seconds = time.perf_counter() - started
    except StopRequested:
        return None
    text = text_of(tokenizer, prompt + new).decode("utf-8", errors="replace")
    return Sample(text, len(new), max(seconds, 1e-9))


def _asked(s: Session) -> list[int]:
    """`sample_prompt` as a question; without one, the first held-out chat up to its first answer."""
    if s.cfg.sample_prompt:
        return ChatTemplate(s.dataset.tokenizer).prompt([Message("user", s.cfg.sample_prompt)])
    store = s.dataset.heldout
    assert isinstance(store, ChatStore)
    learned = store.learned_in(np.arange(store.n_docs), int(store.offsets[-1]))[0]
    first = int(np.flatnonzero(learned)[0])
    ids = np.asarray(store.tokens[store.offsets[first] : store.offsets[first + 1]])
    answers = store.answers[store.offsets[first] : store.offsets[first + 1]]
    return ids[: int(np.flatnonzero(answers != UNLEARNED)[0])].tolist()
