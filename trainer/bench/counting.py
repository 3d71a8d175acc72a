"""What a model comes to that may not be trained yet: parameters, operations, bytes of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters import build_adapter
from adapters.lora import attach
from data.errors import DataError
from models.layers.roles import parameters_by_role

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from data import Dataset

__all__ = ["Text", "counted_parameters", "size_of", "text_of_dataset", "unbuilt"]

OF_VOCABULARY = ("embedding", "head")  # roles whose size follows the tokenizer more than the architecture
SAMPLED_ROWS = 256  # of text of which not every token counts


@dataclass(frozen=True)
class Text:
    """`bytes_per_token`: bytes of training text that count, for each place of a row; NaN where nobody measured."""

    vocab_size: int
    bytes_per_token: float = math.nan


def unbuilt(cfg: RunConfig, model_cfg: ModelConfig, vocab_size: int) -> ModelAdapter:
    """The adapter of a run on the meta device, with what LoRA adds, for a tokenizer of so many ids. ValueError where
    there is no such model."""
    tokenizer: Any = SimpleNamespace(vocab_size=vocab_size, eot=vocab_size - 1, name=cfg.tokenizer)
    adapter = build_adapter(cfg, model_cfg, tokenizer, "meta")
    if cfg.use_lora:
        attach(adapter, cfg, base="")
    return adapter


def counted_parameters(adapter: ModelAdapter, counted: str) -> int:
    """Parameters as `match.counted` says: all of them (`total`), those that act on one token (`active`), or all but
    tables and output layers over the vocabulary (`non_embedding`)."""
    if counted == "active" and (active := adapter.active_parameters()) is not None:
        return active
    if counted == "non_embedding":
        roles = parameters_by_role(adapter.param_roles(), adapter.counted_parameters())
        return sum(count for role, count in roles.items() if role not in OF_VOCABULARY)
    return adapter.parameter_count


def size_of(adapter: ModelAdapter, cfg: RunConfig, text: Callable[[], Text]) -> float:
    """What `match` counts, of a model."""
    if cfg.match.params is not None:
        return counted_parameters(adapter, cfg.match.counted)
    return adapter.cost(cfg.train_seq_len).training_per_token / text().bytes_per_token


def text_of_dataset(dataset: Dataset, seq_len: int) -> Text:
    """Of text of which every token counts this is exact for a whole epoch; of chats and of rows that are padded it is
    that of the first rows."""
    rows = dataset.training_rows(seq_len)
    if dataset.chats or not dataset.packing:
        some = np.arange(min(SAMPLED_ROWS, rows.rows_per_epoch))
        rate = rows.batch(some).bytes / (len(some) * seq_len)
    else:
        rate = dataset.train.total_bytes / rows.tokens_per_epoch
    if rate <= 0:
        raise DataError(f"the training text of {dataset.name} has no bytes to learn")
    return Text(dataset.tokenizer.vocab_size, rate)
