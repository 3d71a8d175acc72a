"""The documents of token shards: their text is what their ids say, and their ids are those of the shards."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from data.arrays import map_array
from data.corpus import Document, Texts
from data.kept import KeptText
from data.shards import ShardFiles, ShardTokens
from data.stream import Part
from data.tokenizers import Tokenizer, text_of

if TYPE_CHECKING:
    from data.bin import ShardPart

__all__ = ["InShards", "ShardText"]


class InShards(Texts):
    """Documents whose ids are those of one tokenizer and lie in shards, which must stay as they are."""

    _tokenizer: Tokenizer
    lossy: np.ndarray | None = None  # (n,) bool: those that their ids do not give back; None: none

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether the ids of the shards are those of a tokenizer."""
        return self._tokenizer.digest == tokenizer.digest

    @property
    @abstractmethod
    def tokens(self) -> ShardTokens:
        """Ids of the documents (L,)."""

    @property
    def raw(self) -> ShardTokens | None:
        """Their text (sum of sizes,) uint8, where some are lossy."""
        return None

    @property
    def key(self) -> str:
        """What tells these documents in these files from the same ones elsewhere."""
        told = json.dumps(self.tokens.to_json(), sort_keys=True)
        return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:8]


class ShardText(KeptText, InShards):
    """One side of the documents of shards. Kept is where each is, how long it is in
    ids and bytes, and the digest of its text; ids are read from the shards, which must stay as they are."""

    holds = "lengths"

    def _open(self, folder: Path, side: str, read: Sequence[Part]) -> None:
        shards = [cast("ShardPart", part) for part in read]
        self._lengths = map_array(folder / f"{side}.{self.holds}.npy")
        if len(self._lengths) != len(self.sizes) or len(shards) != len(self._parts):
            raise ValueError(f"{folder} is not of these shards")
        self._tokenizer = shards[0].chain.tokenizer
        self._files = ShardFiles([part.shard for part in shards], self._tokenizer.dtype)
        first = np.array([first for _, first in self._parts], dtype=np.int64)
        part_of = np.searchsorted(first, np.arange(len(self._places)), side="right") - 1
        self._begins = self._files.bases[part_of] + self._places - 1

    def _text(self, document: int, size: int) -> bytes:
        begin = int(self._begins[document])
        return text_of(self._tokenizer, self._files.read(begin, begin + int(self._lengths[document])))

    def __iter__(self) -> Iterator[Document]:
        yield from (self[index] for index in range(len(self)))

    @property
    def begins(self) -> np.ndarray:
        """Where each document begins in the shards together (n,) int64."""
        return self._begins if self._chosen is None else self._begins[self._chosen]

    @property
    def offsets(self) -> np.ndarray:
        """Where its ids begin and end in those of all (n + 1,) int64."""
        lengths = self._lengths if self._chosen is None else self._lengths[self._chosen]
        return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @property
    def tokens(self) -> ShardTokens:
        """Ids of the documents (L,)."""
        return ShardTokens(self._files, self.begins, self.offsets)
