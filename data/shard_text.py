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


TOGETHER = 4096  # documents that are looked up at once
READ = 1 << 20  # ids that are read at once, where no document has more


class InShards(Texts):
    """Documents whose ids are those of one tokenizer and lie in shards (`files`), which must stay as they are.

    `lossy` (n,) bool: those that their ids do not give back; None: none. `raw`: then the text of all, (sum of sizes,)
    uint8.
    """

    files: ShardFiles
    _tokenizer: Tokenizer

    @abstractmethod
    def begins_of(self, documents: np.ndarray) -> np.ndarray:
        """Where documents (k,) begin in the shards together (k,) int64."""

    @abstractmethod
    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        """Ids of documents (k,): (k,) int64."""

    @property
    def lossy(self) -> np.ndarray | None:
        return None

    @property
    def raw(self) -> ShardTokens | None:
        return None

    def is_of(self, tokenizer: Tokenizer) -> bool:
        """Whether the ids of the shards are those of a tokenizer."""
        return self._tokenizer.digest == tokenizer.digest

    @property
    def key(self) -> str:
        """What tells these documents in these files from the same ones elsewhere."""
        told = json.dumps(self.files.to_json(), sort_keys=True)
        return hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:8]


class ShardText(KeptText, InShards):
    """One side of the documents of shards. Kept is where each is, how long it is in
    ids and bytes, and the digest of its text; ids are read from the shards, which must stay as they are."""

    holds = "lengths"

    def _open(self, folder: Path, side: str, read: Sequence[Part]) -> None:
        shards = [cast("ShardPart", part) for part in read]
        self._lengths = map_array(folder / f"{side}.{self.holds}.npy")
        if len(self._lengths) != len(self._ends) or len(shards) != len(self._parts):
            raise ValueError(f"{folder} is not of these shards")
        self._tokenizer = shards[0].chain.tokenizer
        self.files = ShardFiles([part.shard for part in shards], self._tokenizer.dtype)
        self._firsts = np.array([first for _, first in self._parts], dtype=np.int64)

    def _text(self, document: int, size: int) -> bytes:
        one = np.array([document])
        begin, length = int(self._begins(one)[0]), int(self._lengths[document])
        return text_of(self._tokenizer, self.files.read(begin, begin + length))

    def _begins(self, documents: np.ndarray) -> np.ndarray:
        """Of some of all documents."""
        part = np.searchsorted(self._firsts, documents, side="right") - 1
        return self.files.bases[part] + self._places[documents] - 1

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self), TOGETHER):
            documents = self._of_all(np.arange(start, min(start + TOGETHER, len(self))))
            begins, lengths = self._begins(documents), self._lengths[documents]
            for low, high in _near(begins, begins + lengths):
                base = int(begins[low])
                ids = self.files.read(base, int(begins[high - 1] + lengths[high - 1]))
                some = slice(low, high)
                places = zip(
                    documents[some].tolist(),
                    (begins[some] - base).tolist(),
                    lengths[some].tolist(),
                    strict=True,
                )
                for document, begin, length in places:
                    text = text_of(self._tokenizer, ids[begin : begin + length])
                    yield Document(self._name(document), text)

    def begins_of(self, documents: np.ndarray) -> np.ndarray:
        return self._begins(self._of_all(documents))

    def lengths_of(self, documents: np.ndarray) -> np.ndarray:
        return self._lengths[self._of_all(documents)]


def _near(begins: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs (first, behind) of documents that lie in order within `READ` ids."""
    breaks = np.flatnonzero(begins[1:] < ends[:-1]) + 1
    for first, behind in zip([0, *breaks.tolist()], [*breaks.tolist(), len(begins)], strict=True):
        while first < behind:
            fitting = int(np.searchsorted(ends[first:behind], begins[first] + READ, side="right"))
            yield first, first + max(fitting, 1)
            first += max(fitting, 1)
