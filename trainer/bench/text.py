"""The text of a configuration that has not begun: how many ids its tokenizer has, how many bytes a token."""

from __future__ import annotations

import functools
import json
import math
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from adapters import adapter_class, own_tokenizer
from configs.messages import ConfigError
from configs.schema import RunConfig
from data import load_dataset
from data.errors import DataError
from data.tokenizer_choice import vocabulary_size
from trainer.bench.counting import Text, text_of_dataset
from trainer.run.resume import tokenizer_to_take
from trainer.run.source import open_source

if TYPE_CHECKING:
    from configs.schema import ModelConfig
    from data.config import Unit
    from data.tokenizers import Tokenizer

__all__ = ["known_vocabulary", "text_or_vocabulary"]


def text_or_vocabulary(cfg: RunConfig, model_cfg: ModelConfig, *, measured: bool) -> Text:
    """That of a run. `measured`: whether its bytes per token are asked for; else the text is read only where nothing
    else tells the vocabulary, and they are NaN. ConfigError where the text cannot be used as asked."""
    unit = adapter_class(cfg).unit(model_cfg)
    if not measured:
        with suppress(DataError):
            return Text(
                getattr(model_cfg, "vocab_size", None) or known_vocabulary(cfg, model_cfg, unit), math.nan
            )
    try:
        return _text_of(cfg, model_cfg, unit)
    except DataError as error:
        raise ConfigError(str(error)) from None


def known_vocabulary(cfg: RunConfig, model_cfg: ModelConfig, unit: Unit) -> int:
    """Ids of the tokenizer, as follows from its name, its file, or the weights that it comes with. DataError where the
    text decides."""
    given = _given_tokenizer(cfg, model_cfg)
    return vocabulary_size(cfg, unit) if given is None else given.vocab_size


def _given_tokenizer(cfg: RunConfig, model_cfg: ModelConfig) -> Tokenizer | None:
    """That of the weights which a run stands on or begins with, where it takes it."""
    own = own_tokenizer(cfg, model_cfg)
    if own is None and cfg.init_from_checkpoint:
        source = open_source(cfg.init_from_checkpoint, lambda text: print(text, file=sys.stderr))
        own = tokenizer_to_take(cfg, source)
    return own


def _text_of(cfg: RunConfig, model_cfg: ModelConfig, unit: Unit) -> Text:
    """Measured: it is read and tokenised where the cache does not hold its tokens."""
    if (given := _given_tokenizer(cfg, model_cfg)) is not None:
        return text_of_dataset(load_dataset(cfg, unit=unit, tokenizer=given), cfg.train_seq_len)
    read = {name: value for name, value in cfg.model_dump(mode="json").items() if name in _of_text()}
    return _measured(json.dumps({**read, "type": ""}, sort_keys=True), unit)


@functools.cache
def _of_text() -> frozenset[str]:
    """Generic fields that a text may depend on: those of the block of `RunConfig` about it."""
    names = list(RunConfig.model_fields)
    return frozenset({"train_seq_len", *names[names.index("data") : names.index("tokenizer") + 1]})


@functools.lru_cache(maxsize=32)
def _measured(told: str, unit: Unit) -> Text:
    """Once for all points of a sweep that read the same text. `told`: its fields, as JSON."""
    cfg = RunConfig.model_validate_json(told)
    return text_of_dataset(load_dataset(cfg, unit=unit), cfg.train_seq_len)
