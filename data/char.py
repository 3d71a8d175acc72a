"""The characters of a text: the 256 bytes, and behind them every character that is several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data.bpe import character_start
from data.corpus import Document
from data.errors import DataError
from data.huggingface.written import byte_level_json
from data.tokenizers import TableTokenizer, as_bytes

PIECE_BYTES = 1 << 20  # of a text at a time: its characters take four bytes each, and their ids some more
CHARACTERS = 0x110000
SURROGATES = range(0xDC80, 0xDD00)  # what Python decodes bytes to that are not UTF-8


class CharTokenizer(TableTokenizer):
    """Ids 0 to 255 are the bytes, so ASCII is its own ids; then `characters`, those of several bytes in the order of
    Unicode, and end-of-text. What is no character, or none of these, is single bytes."""

    kind = "char"

    def __init__(self, characters: str):
        if sorted(set(characters)) != list(characters) or not all(map(_is_beyond_ascii, characters)):
            raise DataError("characters must be those beyond ASCII, each once, in the order of Unicode.")
        self.characters = characters
        super().__init__(
            self.kind,
            [*(bytes([value]) for value in range(256)), *(character.encode() for character in characters)],
        )
        self._ids = np.full(CHARACTERS, -1, dtype=np.int32)
        self._ids[:128] = range(128)
        self._ids[SURROGATES] = range(128, 256)
        self._ids[[ord(character) for character in characters]] = range(256, 256 + len(characters))

    @staticmethod
    def vocabulary_size(size: None = None) -> int:
        raise DataError(
            "tokenizer=char has as many ids as the text has characters, and the text is not read here: "
            "say how many with --vocab_size"
        )

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> CharTokenizer:
        characters = content.get("characters")
        if not isinstance(characters, str):
            raise DataError("characters must be a string.")
        return cls(characters)

    @classmethod
    def train(cls, documents: Iterable[Document], size: None = None) -> CharTokenizer:
        """The characters of all the documents."""
        seen = np.zeros(CHARACTERS, dtype=bool)
        for document in documents:
            for piece in _pieces(document.text):
                seen[_code_points(piece)] = True
        seen[:128] = seen[SURROGATES] = False
        return cls("".join(map(chr, np.flatnonzero(seen))))

    def encode(self, text: str | bytes) -> np.ndarray:
        parts = [self._encode(piece) for piece in _pieces(as_bytes(text))]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def _encode(self, piece: bytes) -> np.ndarray:
        points = _code_points(piece)
        ids = self._ids[points]
        unknown = ids < 0
        if not unknown.any():
            return ids.astype(self.dtype)
        sizes = np.ones(len(ids), dtype=np.int64)
        sizes[unknown] = 2 + (points[unknown] >= 0x800) + (points[unknown] >= 0x10000)
        single = "".join(map(chr, points[unknown].tolist())).encode()
        ids = np.repeat(ids, sizes)
        ids[ids < 0] = np.frombuffer(single, dtype=np.uint8)
        return ids.astype(self.dtype)

    def _content(self) -> dict[str, Any]:
        return {**super()._content(), "characters": self.characters}

    def to_huggingface(self) -> dict[str, Any]:
        return byte_level_json(self._tokens[: self.eot], self.special_tokens, r"[\s\S]")


def _is_beyond_ascii(character: str) -> bool:
    return character > "\x7f" and not "\ud800" <= character <= "\udfff"  # surrogates alone are no characters


def _code_points(raw: bytes) -> np.ndarray:
    """(L,) uint32: the characters, and bytes that are none as surrogate escapes."""
    text = raw.decode("utf-8", "surrogateescape")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _pieces(raw: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(raw):
        stop = min(start + PIECE_BYTES, len(raw))
        if stop < len(raw):
            stop = character_start(raw, stop)
        yield raw[start:stop]
        start = stop
