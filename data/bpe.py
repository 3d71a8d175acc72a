"""Byte-level BPE (Sennrich et al., arXiv:1508.07909, on bytes as in GPT-2): trained here, run by tiktoken.

Words are counted first and every distinct word is merged once, weighted by its count (`data/merges.py`). Seconds for a
few megabytes of any text, and deterministic: ties go to the smaller bytes.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import regex

from data.corpus import Document, in_hash_order
from data.errors import DataError
from data.huggingface.written import byte_level_json
from data.merges import learn_merges
from data.tokenizers import TableTokenizer, as_bytes

SMALLEST = 257  # the bytes and end-of-text: no merge at all
LARGEST = 131_072
SAMPLE_BYTES_PER_TOKEN = 4096  # statistics come from this much text per vocabulary entry (4 MB for 1,024)
# Longer texts are encoded in pieces cut behind a line end: some inputs (runs of blanks) cost tiktoken
# quadratic time.
PIECE_BYTES = 256 * 1024

# GPT-4's split pattern with digits in groups of at most two, which suits small vocabularies (nanochat).
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Behind each match a word begins, in this pattern and in those of tokenizers that are known by name: a blank behind
# what is none begins one, and so does what follows the end of a line, but for a slash. Of bytes beyond ASCII those that
# no blank ends with.
WORD_BEGINS = re.compile(rb"[!-~\x8b-\x9e\xa1-\xa7\xaa-\xae\xb0-\xbf](?= )|[!-~]\n(?=[!-.0-~])")
STRETCH_BYTES, LONGEST_STRETCH = 4 << 20, 16 << 20  # of a text whose words are counted at a time
WORDS_AT_A_TIME = 1 << 16
# What distinct words may take while merges are learned, and what they take: arrays by byte (`data/merges.py`), objects.
# Prose and source code stay below it in all of a sample; of text without blanks, 16 MiB are read.
WORD_MEMORY, PER_BYTE, PER_WORD = 500 << 20, 32, 160
_NOT_UTF8 = re.compile("[\udc80-\udcff]+")


class RankTokenizer(TableTokenizer):
    """A byte-level BPE over `ranks` (id = merge priority), run by tiktoken.

    Bytes that are not UTF-8 become single-byte tokens, so decoding returns them unchanged.
    """

    cuts: re.Pattern[bytes] | None = None  # a piece of a long text ends behind a match, where there is one

    def __init__(self, name: str, ranks: list[bytes], pattern: str, special: Mapping[str, int] | None = None):
        import tiktoken

        self.pattern = pattern
        self.ranks = ranks
        super().__init__(name, ranks, special)
        by_token = {token: index for index, token in enumerate(ranks)}
        if len(by_token) != len(ranks):
            raise DataError("a BPE tokenizer cannot hold the same bytes twice.")
        missing = [value for value in range(256) if bytes([value]) not in by_token]
        if missing:
            raise DataError(f"a byte-level BPE needs all 256 single bytes; {len(missing)} are missing.")
        self._byte_ids = np.array([by_token[bytes([value])] for value in range(256)], dtype=self.dtype)
        try:
            self._encoding = tiktoken.Encoding(
                self.name, pat_str=pattern, mergeable_ranks=by_token, special_tokens=self.special_tokens
            )
        except ValueError as error:
            raise DataError(f"tiktoken does not accept pat_str {pattern!r}: {error}.") from error

    def _content(self) -> dict[str, Any]:
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        return {**super()._content(), "pat_str": self.pattern, "ranks": ranks}

    def to_huggingface(self) -> dict[str, Any]:
        return byte_level_json(self.ranks, self.special_tokens, self.pattern)

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = as_bytes(text)
        parts: list[np.ndarray] = []
        for start, stop in _pieces(raw, self.cuts):
            parts.extend(self._encode_piece(raw[start:stop]))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def _encode_piece(self, raw: bytes) -> Iterable[np.ndarray]:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("utf-8", "surrogateescape")
        else:  # nearly always: looking for bytes that are not UTF-8 takes a tenth of the time
            yield self._encode_text(text)
            return
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


class BpeTokenizer(RankTokenizer):
    """One that is trained here, or was."""

    kind = "bpe"

    def __init__(self, ranks: list[bytes], pattern: str = SPLIT_PATTERN):
        super().__init__(f"bpe-{len(ranks) + 1}", ranks, pattern)

    @staticmethod
    def vocabulary_size(size: int) -> int:
        if not SMALLEST <= size <= LARGEST:
            raise DataError(
                f"tokenizer: 'bpe-{size}' is too {'small' if size < SMALLEST else 'large'}: N counts the 256 bytes and "
                f"end-of-text, so it is {SMALLEST} to {LARGEST}. Nearest: bpe-{min(max(size, SMALLEST), LARGEST)}."
            )
        return size

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> BpeTokenizer:
        return cls(saved_ranks(content), _pattern(content))

    @classmethod
    def train(cls, documents: Sequence[Document], size: int) -> BpeTokenizer:
        """A BPE of exactly `size` ids, end-of-text included, from a sample of the documents.

        The sample is whole documents in hash order until 4 KB per vocabulary entry is reached (4 MB for 1,024); of one
        that is longer than that, so much from its start. It ends where the distinct words take `WORD_MEMORY`.
        A text with too few repeated pairs is a DataError that names the largest size it supports.
        """
        sample, read, enough = [], 0, SAMPLE_BYTES_PER_TOKEN * size
        for document in in_hash_order(documents):
            if read >= enough:
                break
            sample.append(_beginning(document.text, enough))
            read += len(sample[-1])
        ranks = learn_merges(count_words(sample), size - 1)
        if len(ranks) < size - 1:
            raise DataError(
                f"tokenizer=bpe-{size} needs more text: {read:,} bytes support at most "
                f"bpe-{len(ranks) + 1}. Use that, or tokenizer=byte."
            )
        return cls(ranks)


def _pattern(content: dict[str, Any]) -> str:
    pattern = content.get("pat_str")
    if not isinstance(pattern, str):
        raise DataError("pat_str must be a string: the pattern that splits text into words.")
    return pattern


def saved_ranks(content: dict[str, Any]) -> list[bytes]:
    """The byte strings by rank that a saved tokenizer holds."""
    ranks = content.get("ranks")
    if not isinstance(ranks, list):
        raise DataError("ranks must be a list of base64 strings.")
    try:
        return [base64.b64decode(rank, validate=True) for rank in ranks]
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"ranks must be a list of base64 strings: {error}.") from error


def _pieces(raw: bytes, cuts: re.Pattern[bytes] | None = None) -> Iterable[tuple[int, int]]:
    start = 0
    while start < len(raw):
        stop = min(start + PIECE_BYTES, len(raw))
        if stop < len(raw) and cuts is not None and (cut := _last_cut(raw, start, stop, cuts)):
            stop = cut
        elif stop < len(raw):
            stop = raw.rfind(b"\n", start + PIECE_BYTES // 2, stop) + 1 or character_start(raw, stop)
        yield start, stop
        start = stop


def _last_cut(raw: bytes, start: int, stop: int, cuts: re.Pattern[bytes]) -> int:
    """Behind the last match between `start` and `stop`, 0 where there is none. Text is looked at from its end on."""
    reach = 64
    while start < stop:
        found = [match.end() for match in cuts.finditer(raw, max(start, stop - reach), stop)]
        if found:
            return found[-1]
        if stop - reach <= start:
            break
        reach *= 16
    return 0


def character_start(raw: bytes, position: int) -> int:
    """The start of the UTF-8 sequence that `position` lies in (which is at most four bytes long)."""
    for back in range(4):
        if raw[position - back] & 0xC0 != 0x80:
            return position - back
    return position


def _beginning(text: bytes, length: int) -> bytes:
    """At most `length` bytes, up to a line end if there is one in the second half of them."""
    if len(text) <= length:
        return text
    return text[: text.rfind(b"\n", length // 2, length) + 1 or character_start(text, length)]


def count_words(texts: Iterable[bytes]) -> Counter[str]:
    """How often each piece of the split pattern occurs (pieces are what BPE never merges across), up to where the
    distinct ones take `WORD_MEMORY`."""
    pattern = regex.compile(SPLIT_PATTERN)
    words: Counter[str] = Counter()
    memory = 0
    for stretch in _stretches(texts):
        # One by one: a list of all words of a long text would take many times its memory.
        found = (match[0] for match in pattern.finditer(stretch.decode("utf-8")))
        while some := list(islice(found, WORDS_AT_A_TIME)):
            # Asked one by one: what a set less the keys takes grows with all words there are, for every document.
            new = (word for word in set(some) if word not in words)
            memory += sum(PER_BYTE * len(word.encode()) + PER_WORD for word in new)
            words.update(some)
            if memory > WORD_MEMORY:
                return words
    return words


def _stretches(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Texts cut where words begin, in about `STRETCH_BYTES`: together they have the words of the whole. Text in which
    none begins for long is cut all the same."""
    for text in texts:
        start = 0
        while start < len(text):
            stop = min(start + LONGEST_STRETCH, len(text))
            if cut := WORD_BEGINS.search(text, start + STRETCH_BYTES, stop):
                stop = cut.end()
            elif stop < len(text):
                stop = character_start(text, stop)
            yield text[start:stop]
            start = stop
