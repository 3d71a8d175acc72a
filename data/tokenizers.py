"""Tokenizers: text to ids and back, byte for byte, whatever the bytes.

Two kinds: single bytes, and byte-level BPE trained on the training split. Both are lossless for arbitrary
bytes, end with `<|endoftext|>` as the last id, and are saved as one JSON file. Text never produces
`<|endoftext|>`: a literal one is encoded as ordinary characters.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data.bpe import SPLIT_PATTERN, count_words, train_ranks
from data.cache import write_atomic
from data.corpus import Document, path_hash
from data.errors import DataError

END_OF_TEXT = "<|endoftext|>"
FORMAT_VERSION = 1
SMALLEST_BPE = 257  # the bytes and end-of-text: no merge at all
LARGEST_BPE = 131_072
SAMPLE_BYTES_PER_TOKEN = 4096  # BPE statistics come from this much text per vocabulary entry (4 MB for 1,024)
# Longer texts are encoded in pieces cut behind a line end: some inputs (runs of blanks) cost tiktoken
# quadratic time.
PIECE_BYTES = 256 * 1024

_NOT_UTF8 = re.compile("[\udc80-\udcff]+")


@runtime_checkable
class Tokenizer(Protocol):
    """`vocab_size` counts end-of-text, whose id is `eot`; `token_bytes` (V,) are lengths, 0 for that one."""

    name: str
    vocab_size: int
    eot: int
    digest: str
    token_bytes: np.ndarray
    dtype: np.dtype

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids (L,) of any text; never contains `eot`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The exact bytes of ids; `eot` is empty. DataError names an id outside the vocabulary."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the JSON file that `load_tokenizer` reads."""
        ...

    def to_json(self) -> str:
        """The text of that file."""
        ...


class _TableTokenizer:
    """What both kinds share: a table of byte strings with end-of-text behind it."""

    kind: str
    pattern: str | None

    def __init__(self, name: str, tokens: list[bytes]):
        self.name = name
        self.eot = len(tokens)
        self.vocab_size = len(tokens) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._tokens = [*tokens, b""]
        self.token_bytes = np.array([len(token) for token in self._tokens], dtype=np.int64)
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        check_ids(array, self.vocab_size)
        table = self._tokens
        return b"".join([table[index] for index in array.tolist()])

    def save(self, path: str | Path) -> None:
        write_atomic(Path(path), lambda file: file.write(self.to_json().encode()))

    def to_json(self) -> str:
        return json.dumps({**self._content(), "digest": self.digest}, indent=1)

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, "type": self.kind}
        if self.pattern is not None:
            content["pat_str"] = self.pattern
        content["special_tokens"] = {END_OF_TEXT: self.eot}
        if self.pattern is not None:
            content["ranks"] = [base64.b64encode(token).decode() for token in self._tokens[:-1]]
        return content


class ByteTokenizer(_TableTokenizer):
    """The 256 bytes and end-of-text: 257 ids."""

    kind = "byte"
    pattern = None

    def __init__(self) -> None:
        super().__init__("byte", [bytes([value]) for value in range(256)])

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(_as_bytes(text), dtype=np.uint8).astype(self.dtype)


class BpeTokenizer(_TableTokenizer):
    """Byte-level BPE over `ranks` (id = merge priority), run by tiktoken.

    Bytes that are not UTF-8 become single-byte tokens, so decoding returns them unchanged.
    """

    kind = "bpe"

    def __init__(self, ranks: list[bytes], pattern: str = SPLIT_PATTERN):
        import tiktoken

        self.pattern = pattern
        super().__init__(f"bpe-{len(ranks) + 1}", ranks)
        by_token = {token: index for index, token in enumerate(ranks)}
        if len(by_token) != len(ranks):
            raise DataError("a BPE tokenizer cannot hold the same bytes twice.")
        missing = [value for value in range(256) if bytes([value]) not in by_token]
        if missing:
            raise DataError(f"a byte-level BPE needs all 256 single bytes; {len(missing)} are missing.")
        self._byte_ids = np.array([by_token[bytes([value])] for value in range(256)], dtype=self.dtype)
        try:
            self._encoding = tiktoken.Encoding(
                self.name, pat_str=pattern, mergeable_ranks=by_token, special_tokens={END_OF_TEXT: self.eot}
            )
        except ValueError as error:
            raise DataError(f"tiktoken does not accept pat_str {pattern!r}: {error}.") from error

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = _as_bytes(text)
        parts: list[np.ndarray] = []
        for start, stop in _pieces(raw):
            parts.extend(self._encode_piece(raw[start:stop]))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def _encode_piece(self, raw: bytes) -> Iterable[np.ndarray]:
        text = raw.decode("utf-8", "surrogateescape")
        position = 0
        for bad in _NOT_UTF8.finditer(text):
            yield self._encode_text(text[position : bad.start()])
            yield self._byte_ids[np.frombuffer(bad[0].encode("utf-8", "surrogateescape"), dtype=np.uint8)]
            position = bad.end()
        yield self._encode_text(text[position:])

    def _encode_text(self, text: str) -> np.ndarray:
        # No special token is allowed and none is refused: "<|endoftext|>" in a text stays text.
        ids = self._encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        return ids.astype(self.dtype)


class StreamDecoder:
    """Decode ids as they are generated: text comes out as soon as its UTF-8 sequence is complete.

    Bytes that can never become UTF-8 come out as U+FFFD. Call `flush` at the end for an incomplete sequence.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that these ids complete."""
        return self._decoder.decode(self._tokenizer.decode(ids))

    def flush(self) -> str:
        """What is left of an unfinished sequence, as U+FFFD; the decoder starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """DataError at the first id outside 0..vocab_size-1, naming id and position."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        position = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise DataError(
            f"token id {int(ids[position])} at position {position} is beyond the vocabulary: "
            f"ids are 0 to {vocab_size - 1} (vocab_size {vocab_size})."
        )


def train_bpe(documents: Sequence[Document], vocab_size: int) -> BpeTokenizer:
    """A BPE of exactly `vocab_size` ids, end-of-text included, from a sample of the documents.

    The sample is whole documents in hash order until 4 KB per vocabulary entry is reached (4 MB for 1,024).
    A text with too few repeated pairs is a DataError that names the largest size it supports.
    """
    budget = SAMPLE_BYTES_PER_TOKEN * vocab_size
    sample, size = [], 0
    for document in sorted(documents, key=lambda document: (path_hash(document.name), document.name)):
        if size >= budget:
            break
        sample.append(document.text)
        size += len(document.text)
    ranks = train_ranks(count_words(sample), vocab_size - 1)
    if len(ranks) < vocab_size - 1:
        raise DataError(
            f"tokenizer=bpe-{vocab_size} needs more text: {size:,} bytes support at most "
            f"bpe-{len(ranks) + 1}. Use that, or tokenizer=byte."
        )
    return BpeTokenizer(ranks)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer JSON written by `save`; DataError says what is wrong with any other file."""
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"tokenizer {str(path)!r} is not a JSON file: {error}.") from error
    try:
        return _from_content(content)
    except DataError as error:
        raise DataError(f"tokenizer {str(path)!r}: {error}") from error


def _from_content(content: Any) -> Tokenizer:
    if not isinstance(content, dict) or "format_version" not in content:
        raise DataError(
            'not a tokenizer of this project (no "format_version"): other programs\' are not read; '
            "a run folder holds its own as tokenizer.json."
        )
    if content["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"format_version {content['format_version']!r} is not known; this is {FORMAT_VERSION}."
        )
    kind = content.get("type")
    if kind == "byte":
        tokenizer: ByteTokenizer | BpeTokenizer = ByteTokenizer()
    elif kind == "bpe":
        tokenizer = BpeTokenizer(_ranks(content), _pattern(content))
    else:
        raise DataError(f"type {kind!r} is not known; allowed are 'byte' and 'bpe'.")
    if content.get("special_tokens") != {END_OF_TEXT: tokenizer.eot}:
        raise DataError(f"special_tokens must be {{{END_OF_TEXT!r}: {tokenizer.eot}}}, the last id.")
    if content.get("digest") != tokenizer.digest:
        raise DataError("the content does not match its digest: the file is damaged or was edited.")
    return tokenizer


def _pattern(content: dict[str, Any]) -> str:
    pattern = content.get("pat_str")
    if not isinstance(pattern, str):
        raise DataError("pat_str must be a string: the pattern that splits text into words.")
    return pattern


def _ranks(content: dict[str, Any]) -> list[bytes]:
    ranks = content.get("ranks")
    if not isinstance(ranks, list):
        raise DataError("ranks must be a list of base64 strings.")
    try:
        return [base64.b64decode(rank, validate=True) for rank in ranks]
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"ranks must be a list of base64 strings: {error}.") from error


def _as_bytes(text: str | bytes) -> bytes:
    # Surrogate escapes are how Python hands over bytes of the command line that are not UTF-8.
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(f"text with a lone surrogate at character {error.start} has no bytes.") from error


def _pieces(raw: bytes) -> Iterable[tuple[int, int]]:
    start = 0
    while start < len(raw):
        stop = min(start + PIECE_BYTES, len(raw))
        if stop < len(raw):
            stop = raw.rfind(b"\n", start + PIECE_BYTES // 2, stop) + 1 or _character_start(raw, stop)
        yield start, stop
        start = stop


def _character_start(raw: bytes, position: int) -> int:
    """The start of the UTF-8 sequence that `position` lies in (which is at most four bytes long)."""
    for back in range(4):
        if raw[position - back] & 0xC0 != 0x80:
            return position - back
    return position
