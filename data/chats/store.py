"""Chats as tokens: those of a `TokenStore`, and which of them are learned."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.arrays import ArrayWriter, map_array
from data.cache import write_atomic
from data.chats.messages import messages_of
from data.chats.template import UNLEARNED, ChatTemplate
from data.corpus import Document
from data.errors import DataError
from data.store import ARRAYS, TokenStore, check_files, write_meta

__all__ = ["ChatStore", "encode_chats", "load_chats", "spoken", "write_chats"]

SIDES = {"train": "training", "heldout": "held-out"}


@dataclass(frozen=True)
class ChatStore(TokenStore):
    """answers (L,) int32: bytes of an answer that each learned token holds, -1 for all others. `doc_bytes` are those of
    the answers."""

    answers: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    @functools.cached_property
    def _learned(self) -> np.ndarray:
        """Places of the learned tokens, rising."""
        return np.flatnonzero(self.answers != UNLEARNED)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        """Bytes of the learned tokens in front of each of these, and of all."""
        return np.concatenate([[0], np.cumsum(self.answers[self._learned], dtype=np.int64)])

    def learned_in(self, documents: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Of documents (k,) learned tokens among the first `limit`, and bytes of answers in these, each (k,) int64."""
        first = self.offsets[documents]
        behind = first + np.minimum(self.lengths_of(documents), limit)
        low, high = (np.searchsorted(self._learned, places) for places in (first, behind))
        return high - low, self._bytes[high] - self._bytes[low]


def spoken(documents: Sequence[Document], template: ChatTemplate) -> list[Document]:
    """Chats as the text that their template makes of them."""
    return [Document(name, template.text(messages_of(text)).encode()) for name, text in documents]


def encode_chats(documents: Sequence[Document], template: ChatTemplate) -> ChatStore:
    """Encode chats in the order given. DataError names one of which the template makes nothing."""
    ids, answers = [np.zeros(0, template.tokenizer.dtype)], [np.zeros(0, np.int32)]
    lengths, doc_bytes = [], []
    for chat_ids, chat_answers in _encoded(documents, template):
        ids.append(chat_ids)
        answers.append(chat_answers)
        lengths.append(len(chat_ids))
        doc_bytes.append(int(chat_answers.clip(min=0).sum()))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    sizes = np.array(doc_bytes, dtype=np.int64)
    return ChatStore(np.concatenate(ids), offsets, sizes, template.tokenizer, answers=np.concatenate(answers))


def _encoded(
    documents: Sequence[Document], template: ChatTemplate
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for name, text in documents:
        try:
            yield template.encode(messages_of(text))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error


def write_chats(folder: Path, sides: Mapping[str, Sequence[Document]], template: ChatTemplate) -> None:
    """The same, encoded one by one into files that `load_chats` reads. Raises OSError; DataError as `encode_chats`."""
    names = []
    for side, documents in sides.items():
        offsets = np.zeros(len(documents) + 1, dtype=np.int64)
        doc_bytes = np.zeros(len(documents), dtype=np.int64)
        path = folder / f"{side}.answers.npy"

        def encode(
            file: BinaryIO,
            documents: Sequence[Document] = documents,
            offsets: np.ndarray = offsets,
            doc_bytes: np.ndarray = doc_bytes,
            path: Path = path,
        ) -> None:
            tokens = ArrayWriter(file, template.tokenizer.dtype)

            def beside(other: BinaryIO) -> None:
                answers = ArrayWriter(other, np.int32)
                for place, (ids, learned) in enumerate(_encoded(documents, template)):
                    tokens.append(ids)
                    answers.append(learned)
                    offsets[place + 1], doc_bytes[place] = tokens.length, learned.clip(min=0).sum()
                answers.close()

            write_atomic(path, beside)
            tokens.close()

        write_atomic(folder / f"{side}.tokens.npy", encode)
        for name, array in (("offsets", offsets), ("doc_bytes", doc_bytes)):
            write = functools.partial(np.save, arr=array, allow_pickle=False)
            write_atomic(folder / f"{side}.{name}.npy", write)
        names += [f"{side}.{name}.npy" for name in (*ARRAYS, "answers")]
    write_meta(folder, names)


def load_chats(folder: Path, sides: Sequence[str], template: ChatTemplate) -> dict[str, TokenStore]:
    """What `write_chats` wrote, mapped. DataError where it is not what was written."""
    try:
        check_files(folder)
        return {side: _load(folder, side, template) for side in sides}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"token cache {folder} is incomplete or damaged: {error}") from error


def _load(folder: Path, side: str, template: ChatTemplate) -> ChatStore:
    tokens, offsets, doc_bytes, answers = (
        map_array(folder / f"{side}.{name}.npy") for name in (*ARRAYS, "answers")
    )
    return ChatStore(tokens, offsets, doc_bytes, template.tokenizer, answers=answers)
