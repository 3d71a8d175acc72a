"""The fields of a run that `data` reads. It knows nothing of `configs`: anything that has them will do."""

from __future__ import annotations

from typing import Literal, Protocol

Mode = Literal["pretraining", "instruction_finetuning"]  # `training_mode`
CHATS: Mode = "instruction_finetuning"  # rows are chats
Unit = Literal["token", "byte"]  # what an architecture reads


class DataConfig(Protocol):
    """What `load_dataset` itself reads; each source says in its own file what it reads besides."""

    data: str
    near_copies: Literal["drop", "keep"] | None  # None: as the source says
    tokenizer: str
    train_seq_len: int
    training_mode: Mode
    packing: bool
