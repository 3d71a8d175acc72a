"""A tokenizer of Hugging Face's `tokenizers` library, of any kind: its own tokenizer.json, run by that library."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import regex

from data.bpe import character_start
from data.cache import write_atomic
from data.errors import DataError
from data.huggingface.library import Vocabulary, backends
from data.tokenizers import FORMAT_VERSION, as_bytes, check_ids, spans_of, text_of

__all__ = ["HuggingFaceTokenizer"]

# Texts are encoded in pieces: to a tokenizer that does not cut at blanks a text is one word.
PIECE_BYTES = 256 * 1024
_NOT_UTF8 = re.compile("[\udc80-\udcff]+")


class HuggingFaceTokenizer:
    """`tokenizer`: the content of a tokenizer.json. `eot`: the id that starts documents; `ends`: those that end a text.
    `config`: what tokenizer_config.json says besides.

    Bytes that are not UTF-8 become tokens of single bytes where the vocabulary has these, else U+FFFD. What its
    normalizer changes and its vocabulary cannot write is lost; `spans` are then where the library found each token.

    Raises:
        DataError: the library is missing or cannot read the content, or there is no such id.
    """

    kind = "huggingface"

    def __init__(self, tokenizer: dict[str, Any], eot: int, ends: Iterable[int], config: dict[str, Any]):
        self.eot, self.ends, self.huggingface_config = eot, frozenset(ends) | {eot}, config
        self._json = tokenizer
        self._whole, self._inside = backends(tokenizer, self.ends)
        vocabulary = Vocabulary.of(self._whole, tokenizer["model"], self.ends)
        self._tokens, self.lead, self.special_tokens = vocabulary.spelled, vocabulary.lead, vocabulary.special
        self.vocab_size = len(self._tokens)
        self.name = f"{self.kind}-{self.vocab_size}"
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self.token_bytes = np.array([len(token) for token in self._tokens], dtype=np.int64)
        self._byte_ids = vocabulary.byte_ids()
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[list(self.special_tokens.values())] = True
        self._literals = regex.compile("|".join(map(regex.escape, self.special_tokens)))
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> HuggingFaceTokenizer:
        kinds = {"tokenizer": dict, "eot": int, "ends": list, "config": dict}
        for name, kind in kinds.items():
            if not isinstance(content.get(name), kind):
                raise DataError(f"{name} must be of type {kind.__name__}.")
        return cls(*(content[name] for name in kinds))

    def __reduce__(
        self,
    ) -> tuple[Any, ...]:  # the library's own copies forget what is text and what is special
        return type(self), (self._json, self.eot, sorted(self.ends), self.huggingface_config)

    def encode(self, text: str | bytes) -> np.ndarray:
        return self._ids(self._stretches(as_bytes(text), begins=True))

    def encode_inside(self, text: str | bytes) -> np.ndarray:
        return self._ids(self._stretches(as_bytes(text), begins=False))

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        check_ids(array, self.vocab_size)
        return b"".join([self._tokens[index] for index in array.tolist()])

    def spans(self, text: str | bytes) -> np.ndarray:
        raw = as_bytes(text)
        stretches = list(self._stretches(raw, begins=True))
        ids = self._ids(stretches)
        if text_of(self, ids) == raw:
            return spans_of(self, ids)
        starts = np.cumsum([0, *(len(as_bytes(stretch.text)) for stretch in stretches)])
        parts = (start + stretch.spans() for start, stretch in zip(starts, stretches, strict=False))
        found = np.concatenate([np.zeros((0, 2), dtype=np.int64), *parts])
        if len(ids) and self.decode(ids[:1]) == self.lead and not raw.startswith(self.lead):
            found[0] = 0  # the library counts a blank that is none of the text to the first character
        return found

    def save(self, path: str | Path) -> None:
        write_atomic(Path(path), lambda file: file.write(self.to_json().encode()))

    def to_json(self) -> str:
        return json.dumps({**self._content(), "digest": self.digest})

    def to_huggingface(self) -> dict[str, Any]:
        return self._json

    def _content(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "type": self.kind,
            "special_tokens": self.special_tokens,
            "eot": self.eot,
            "ends": sorted(self.ends),
            "config": self.huggingface_config,
            "tokenizer": self._json,
        }

    # -- text to ids, a stretch at a time ------------------------------------------------------------------------------

    def _ids(self, stretches: Iterable[_Stretch]) -> np.ndarray:
        return np.concatenate([np.zeros(0, self.dtype), *(part.ids.astype(self.dtype) for part in stretches)])

    def _stretches(self, raw: bytes, begins: bool) -> Iterator[_Stretch]:
        for start, stop in pieces(raw):
            text, position = raw[start:stop].decode("utf-8", "surrogateescape"), 0
            for bad in _NOT_UTF8.finditer(text) if self._byte_ids is not None else ():
                yield from self._words(text[position : bad.start()], begins and start + position == 0)
                yield self._single_bytes(bad[0])
                position = bad.end()
            yield from self._words(text[position:], begins and start + position == 0)

    def _single_bytes(self, text: str) -> _Stretch:
        assert self._byte_ids is not None
        ids = self._byte_ids[np.frombuffer(as_bytes(text), dtype=np.uint8)]
        return _Stretch(text, ids, lambda: [(place, place + 1) for place in range(len(ids))])

    def _words(self, text: str, begins: bool) -> Iterator[_Stretch]:
        """Text as it is, without special tokens. Where a vocabulary found a literal one, the text is cut behind its
        first character; what is a special token even then is left out."""
        found = self._run(text, begins)
        if not self._is_special[found.ids].any():
            yield found
            return
        cuts = [0, *(literal.start() + 1 for literal in self._literals.finditer(text)), len(text)]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            found = self._run(text[start:stop], begins and start == 0)
            yield found.only(~self._is_special[found.ids])

    def _run(self, text: str, begins: bool) -> _Stretch:
        backend = self._whole if begins else self._inside
        found = backend.encode(
            re.sub("[\udc80-\udcff]", "\ufffd", text) if self._byte_ids is None else text,
            add_special_tokens=False,
        )
        return _Stretch(text, np.array(found.ids, dtype=np.int64), lambda: found.offsets)


@dataclass(frozen=True)
class _Stretch:
    """Part of a text (bytes that are not UTF-8 as surrogate escapes), its ids (L,), and where they stand, in
    characters."""

    text: str
    ids: np.ndarray
    places: Callable[[], list[tuple[int, int]]]

    def only(self, keep: np.ndarray) -> _Stretch:
        """Without the tokens that are not to be kept; keep (L,) bool."""
        places = self.places
        return _Stretch(
            self.text, self.ids[keep], lambda: [p for p, k in zip(places(), keep, strict=True) if k]
        )

    def spans(self) -> np.ndarray:
        """(L, 2) int64, in bytes from the start of the stretch."""
        widths = [len(as_bytes(character)) for character in self.text]
        return np.cumsum([0, *widths])[np.array(self.places(), dtype=np.int64).reshape(-1, 2)]


def pieces(raw: bytes) -> Iterator[tuple[int, int]]:
    """Cuts between two lines that neither end nor begin with a blank, where nearly no tokenizer joins anything; where
    there are none, behind any line, and in the middle of a line behind any character."""
    start = 0
    while start < len(raw):
        stop = min(start + PIECE_BYTES, len(raw))
        if stop < len(raw):
            lines = list(re.finditer(rb"[!-~]\n(?=[!-~])", raw[start + PIECE_BYTES // 2 : stop]))
            if lines:
                stop = start + PIECE_BYTES // 2 + lines[-1].end()
            else:
                stop = raw.rfind(b"\n", start + PIECE_BYTES // 2, stop) + 1 or character_start(raw, stop)
        yield start, stop
        start = stop
