"""A text from the present weights, along a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from adapters.base import GenerateOptions
from data.tokenizers import text_of
from trainer.errors import StopRequested
from trainer.evaluate import evaluating

if TYPE_CHECKING:
    from trainer.session import Session

__all__ = ["sample_text"]


def sample_text(s: Session, should_stop: Callable[[], bool]) -> str | None:
    """`sample_tokens` new tokens behind `sample_prompt`; None when a stop was asked for meanwhile."""

    def check(row: int, tokens: list[int]) -> None:
        if should_stop():
            raise StopRequested

    tokenizer = s.dataset.tokenizer
    prompt = tokenizer.encode(s.cfg.sample_prompt).tolist()
    options = GenerateOptions(
        max_new_tokens=s.cfg.sample_tokens,
        seed=s.cfg.seed,
        stop_at_document_end=False,
        steps=s.adapter.sample_steps,
    )
    try:
        with evaluating(s.adapter), torch.random.fork_rng(devices=[]):
            new = s.adapter.generate([prompt], options, check).tokens[0]
    except StopRequested:
        return None
    return text_of(tokenizer, prompt + new).decode("utf-8", errors="replace")
