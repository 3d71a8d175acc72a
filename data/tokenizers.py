"""Tokenizers: text to ids and back.

`data.TOKENIZERS` is the table of kinds; single bytes are here. Our own are lossless for arbitrary bytes and have
`<|endoftext|>` as their last id; those of others (`data/huggingface/`) have their special tokens anywhere, and some
lose text. All are saved as one JSON file. Text never produces a special token: a literal one is encoded as ordinary
characters.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data import TOKENIZERS
from data.cache import write_atomic
from data.errors import DataError
from data.huggingface.written import byte_level_json
from naming import not_one_of

END_OF_TEXT = "<|endoftext|>"
FORMAT_VERSION = 1
AT_A_TIME = 1 << 20  # ids that are decoded at a time: some arrays of numbers by byte
RANKS = (".tiktoken", ".bpe")  # how files end that hold the ranks of a tokenizer known by name


@runtime_checkable
class Tokenizer(Protocol):
    """`vocab_size` is the highest id + 1. `eot` is the id that stands before a document and behind it; `ends` are those
    that end a text which is being generated, `eot` among them; `special_tokens` are all that text never produces.
    `token_bytes` (V,) are lengths, 0 for those. `lead`: bytes that `encode` puts before a text and that are none of it.
    `huggingface_config`: what tokenizer_config.json says of the tokenizer beside its class.
    """

    name: str
    vocab_size: int
    eot: int
    ends: frozenset[int]
    special_tokens: dict[str, int]
    lead: bytes
    digest: str
    token_bytes: np.ndarray
    dtype: np.dtype
    huggingface_config: dict[str, Any]

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids (L,) of a whole text, or of its beginning; never contains a special token."""
        ...

    def encode_inside(self, text: str | bytes) -> np.ndarray:
        """Ids (L,) of text that stands behind other text: without `lead`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that ids stand for one behind the other, a `lead` among them; special tokens are empty. DataError
        names an id outside the vocabulary."""
        ...

    def spans(self, text: str | bytes) -> np.ndarray:
        """(L, 2) int64: where the bytes of each token of `encode(text)` begin and end in the text."""
        ...

    def to_huggingface(self) -> dict[str, Any] | None:
        """The content of a tokenizer.json that transformers opens; None where there is no such form. Ids are equal,
        those of text that spells a special token by `split_special_tokens` alone: the file has no place for it, and
        `huggingface_config` of our own kinds says it."""
        ...

    def save(self, path: str | Path) -> None:
        """Write the JSON file that `load_tokenizer` reads."""
        ...

    def to_json(self) -> str:
        """The text of that file."""
        ...


class TableTokenizer:
    """What kinds share that are a table of byte strings with end-of-text behind it, or with the tokens of `special`."""

    kind: str
    lead = b""
    # Of text there too: what is spelled like a special token is ordinary characters.
    huggingface_config: dict[str, Any] = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "split_special_tokens": True,
    }

    def __init__(self, name: str, tokens: list[bytes], special: Mapping[str, int] | None = None):
        self.name = name
        self.special_tokens = {END_OF_TEXT: len(tokens)} if special is None else dict(special)
        self.eot = self.special_tokens[END_OF_TEXT]
        self.ends = frozenset({self.eot})
        self.vocab_size = max(self.special_tokens.values()) + 1
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        self._tokens = [*tokens, *[b""] * (self.vocab_size - len(tokens))]
        self.token_bytes = np.array([len(token) for token in self._tokens], dtype=np.int64)
        self._spelled = np.frombuffer(b"".join(self._tokens), dtype=np.uint8)  # token by token
        self._places = np.cumsum(self.token_bytes) - self.token_bytes  # (V,) where each begins there
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str | bytes) -> np.ndarray:
        raise NotImplementedError(f"{type(self).__name__} must define encode")

    def encode_inside(self, text: str | bytes) -> np.ndarray:
        return self.encode(text)

    def spans(self, text: str | bytes) -> np.ndarray:
        return spans_of(self, self.encode(text))

    def to_huggingface(self) -> dict[str, Any] | None:
        return None

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        check_ids(array, self.vocab_size)
        return b"".join(
            self._say(array[start : start + AT_A_TIME]) for start in range(0, len(array), AT_A_TIME)
        )

    def _say(self, array: np.ndarray) -> bytes:
        sizes = self.token_bytes[array]
        ends = np.cumsum(sizes)
        begins = np.repeat(
            self._places[array] - (ends - sizes), sizes
        )  # of each byte's token, less what is before it
        return self._spelled[begins + np.arange(len(begins))].tobytes()

    def save(self, path: str | Path) -> None:
        write_atomic(Path(path), lambda file: file.write(self.to_json().encode()))

    def to_json(self) -> str:
        return json.dumps({**self._content(), "digest": self.digest}, indent=1)

    def _content(self) -> dict[str, Any]:
        """What is saved; a kind that is more than its name adds what it was made from."""
        return {
            "format_version": FORMAT_VERSION,
            "type": self.kind,
            "special_tokens": self.special_tokens,
        }


class ByteTokenizer(TableTokenizer):
    """The 256 bytes and end-of-text: 257 ids."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__("byte", [bytes([value]) for value in range(256)])

    @staticmethod
    def vocabulary_size(size: None = None) -> int:
        return 257

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> ByteTokenizer:
        return cls()

    def encode(self, text: str | bytes) -> np.ndarray:
        return np.frombuffer(as_bytes(text), dtype=np.uint8).astype(self.dtype)

    def _say(self, array: np.ndarray) -> bytes:
        return array[array != self.eot].astype(np.uint8).tobytes()

    def to_huggingface(self) -> dict[str, Any]:
        return byte_level_json(self._tokens[:-1], self.special_tokens)


class StreamDecoder:
    """Decode ids as they are generated: text comes out as soon as its UTF-8 sequence is complete.

    `begins`: the first ids are the beginning of a text, not what follows a prompt. Bytes that can never become UTF-8
    come out as U+FFFD. Call `flush` at the end for an incomplete sequence.
    """

    def __init__(self, tokenizer: Tokenizer, begins: bool = False):
        self._tokenizer = tokenizer
        self._lead = tokenizer.lead if begins else b""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that these ids complete."""
        raw = self._tokenizer.decode(ids)
        if raw:
            raw, self._lead = raw.removeprefix(self._lead), b""
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """What is left of an unfinished sequence, as U+FFFD; the decoder starts afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def text_of(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> bytes:
    """The text whose ids from its beginning these are."""
    return tokenizer.decode(ids).removeprefix(tokenizer.lead)


def spans_of(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """(L, 2) int64: where each token's bytes begin and end in `text_of` these ids. A lead belongs to no token."""
    ends = np.cumsum(tokenizer.token_bytes[ids])
    lead = len(tokenizer.decode(ids)) - len(text_of(tokenizer, ids))
    return np.maximum(np.stack([ends - tokenizer.token_bytes[ids], ends], axis=1) - lead, 0)


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """DataError at the first id outside 0..vocab_size-1, naming id and position."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        position = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
        raise DataError(
            f"token id {int(ids[position])} at position {position} is beyond the vocabulary: "
            f"ids are 0 to {vocab_size - 1} (vocab_size {vocab_size})."
        )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer JSON written by `save`, or that of a folder of transformers, whose other files say which token
    starts a document, or the ranks of one that is known by name; DataError says what is wrong with any other file."""
    path = Path(path)
    if path.suffix in RANKS:
        from data.published import read_ranks

        return read_ranks(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"tokenizer {str(path)!r} is not a JSON file: {error}.") from error
    if isinstance(content, dict) and "format_version" not in content and "model" in content:
        return _of_transformers(path)
    try:
        return _from_content(content)
    except DataError as error:
        raise DataError(f"tokenizer {str(path)!r}: {error}") from error


def _of_transformers(path: Path) -> Tokenizer:
    from data.huggingface.folder import read_huggingface_tokenizer

    if path.name != "tokenizer.json":
        raise DataError(
            f"tokenizer {str(path)!r} is one of transformers: other files of its folder say which token starts a "
            f"document, and there it is called tokenizer.json."
        )
    return read_huggingface_tokenizer(path.parent)


def _from_content(content: Any) -> Tokenizer:
    if not isinstance(content, dict) or "format_version" not in content:
        raise DataError(
            'no tokenizer of this project (no "format_version") or of transformers (no "model"): a run folder holds '
            "its own as tokenizer.json."
        )
    if content["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"format_version {content['format_version']!r} is not known; this is {FORMAT_VERSION}."
        )
    kind = content.get("type")
    if kind not in TOKENIZERS:
        raise DataError(f"type: {not_one_of(kind, TOKENIZERS)}")
    tokenizer = TOKENIZERS[kind].load().from_content(content)
    if content.get("special_tokens") != tokenizer.special_tokens:
        raise DataError(f"special_tokens must be {tokenizer.special_tokens}, as its tokens say.")
    if content.get("digest") != tokenizer.digest:
        raise DataError("the content does not match its digest: the file is damaged or was edited.")
    return tokenizer


def as_bytes(text: str | bytes) -> bytes:
    # Surrogate escapes are how Python hands over bytes of the command line that are not UTF-8.
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise DataError(f"text with a lone surrogate at character {error.start} has no bytes.") from error
