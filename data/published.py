"""Tokenizers that are known by name: OpenAI's gpt2 (r50k_base), cl100k_base and o200k_base, run by tiktoken.

Each is a file of ranks, which is downloaded once, and what goes with it, which stands here: the pattern that splits
text, the special tokens and the digest of the file (tiktoken_ext.openai_public of tiktoken 0.14). So ids depend on no
installed version, and a file with other bytes is refused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from data.bpe import WORD_BEGINS, RankTokenizer, saved_ranks
from data.cache import write_atomic
from data.errors import DataError
from data.huggingface.alphabet import ALPHABET, byte_string
from data.huggingface.written import byte_level_json
from data.tokenizers import END_OF_TEXT

HOST = "https://openaipublic.blob.core.windows.net"
TIMEOUT = 30  # seconds without an answer


class RanksFile(NamedTuple):
    """A file that holds all ranks of a tokenizer, and the sha256 of its bytes."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def names(self) -> tuple[str, str]:
        """What it is called in a folder: as it is, or as tiktoken calls it in its cache."""
        return self.name, hashlib.sha1(self.url.encode()).hexdigest()


class PublishedTokenizer(RankTokenizer):
    """A byte-level BPE whose pattern and special tokens are known by its name; some ids are none of a token.

    `files`: those that hold its ranks, the first of them the one to download. `portable_pattern` splits as `pattern`
    does, in the words of other engines (no possessive counts of counts, no `$`).
    """

    files: ClassVar[tuple[RanksFile, ...]]
    split_pattern: ClassVar[str]
    portable_pattern: ClassVar[str]
    special: ClassVar[dict[str, int]]

    cuts = WORD_BEGINS

    def __init__(self, ranks: list[bytes]):
        super().__init__(self.kind, ranks, self.split_pattern, self.special)

    @classmethod
    def vocabulary_size(cls, size: None = None) -> int:
        return max(cls.special.values()) + 1

    @classmethod
    def from_content(cls, content: dict[str, Any]) -> PublishedTokenizer:
        # Other ranks or another pattern would be another tokenizer: the digest says so.
        return cls(saved_ranks(content))

    @classmethod
    def fetch(cls, cache: Path) -> PublishedTokenizer:
        """From a file that is here, else downloaded into `cache`.

        Looked for in the folders that tiktoken keeps its own in, TIKTOKEN_CACHE_DIR first, and in `cache`.

        Raises:
            DataError: it is not here and cannot be downloaded; the message names both ways out.
        """
        others = []
        for file in cls.files:
            for path in _places(file, cache):
                raw = path.read_bytes()
                if hashlib.sha256(raw).hexdigest() == file.sha256:
                    return cls(_ranks(raw, file))
                others.append(str(path))
        file = cls.files[0]
        try:
            raw = _download(file.url)
        except (OSError, HTTPException) as error:
            told = f" ({', '.join(others)} holds other bytes)" if others else ""
            raise DataError(cls._ways_out(f"is not on this machine{told}", error)) from error
        if hashlib.sha256(raw).hexdigest() != file.sha256:
            raise DataError(cls._ways_out("came with other bytes than are known", f"{len(raw):,} bytes"))
        target = cache / "tokenizers" / file.name
        try:
            write_atomic(target, lambda out: out.write(raw))
        except OSError as error:
            raise DataError(f"tokenizer={cls.kind}: {target} cannot be written: {error.strerror}.") from error
        return cls(_ranks(raw, file))

    @classmethod
    def _ways_out(cls, what: str, error: object) -> str:
        file = cls.files[0]
        return (
            f"tokenizer={cls.kind}: its file {file.name} {what}, and downloading it failed: {error}. Bring {file.url} "
            f"from a machine that has a network and set tokenizer=<that file>; or put it into a folder, under that "
            f"name or as tiktoken's own cache has it, and set TIKTOKEN_CACHE_DIR=<that folder>."
        )

    def to_huggingface(self) -> dict[str, Any]:
        return byte_level_json(self.ranks, self.special_tokens, self.portable_pattern)


class Gpt2(PublishedTokenizer):
    """Also r50k_base: the same tokens under the same ids."""

    kind = "gpt2"
    files = (
        RanksFile(
            f"{HOST}/encodings/r50k_base.tiktoken",
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
        ),
        RanksFile(
            f"{HOST}/gpt-2/encodings/main/vocab.bpe",
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        ),
    )
    split_pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    portable_pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    special = {END_OF_TEXT: 50256}


class Cl100kBase(PublishedTokenizer):
    kind = "cl100k_base"
    files = (
        RanksFile(
            f"{HOST}/encodings/cl100k_base.tiktoken",
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        ),
    )
    split_pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    )
    portable_pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    )
    special = {
        END_OF_TEXT: 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    }


class O200kBase(PublishedTokenizer):
    kind = "o200k_base"
    files = (
        RanksFile(
            f"{HOST}/encodings/o200k_base.tiktoken",
            "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        ),
    )
    split_pattern = portable_pattern = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    special = {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}


PUBLISHED: tuple[type[PublishedTokenizer], ...] = (Gpt2, Cl100kBase, O200kBase)


def read_ranks(path: Path) -> PublishedTokenizer:
    """The tokenizer whose file of ranks this is. DataError if it is that of none: no pattern stands in such a file."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}.") from error
    digest = hashlib.sha256(raw).hexdigest()
    for kind in PUBLISHED:
        for file in kind.files:
            if file.sha256 == digest:
                return kind(_ranks(raw, file))
    known = ", ".join(f"{file.name} ({file.sha256[:8]})" for kind in PUBLISHED for file in kind.files)
    raise DataError(
        f"tokenizer {str(path)!r} (sha256 {digest[:8]}, {len(raw):,} bytes) is none of the files whose pattern and "
        f"special tokens are known: {known}. It is damaged, or another's: ranks alone make no tokenizer."
    )


def _places(file: RanksFile, cache: Path) -> Iterator[Path]:
    """Where that file lies."""
    named = [os.environ.get(name) for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")]
    folders = [Path(name) for name in named if name]
    for folder in (*folders, Path(tempfile.gettempdir(), "data-gym-cache"), cache / "tokenizers"):
        yield from (folder / name for name in file.names if (folder / name).is_file())


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return answer.read()


def _ranks(raw: bytes, file: RanksFile) -> list[bytes]:
    """Byte strings by rank, of bytes whose digest is known."""
    if file.name.endswith(".bpe"):  # a version, then one merge a line, in GPT-2's alphabet and order of bytes
        visible = sorted(range(256), key=lambda value: ord(ALPHABET[value]))
        merges = (line.split() for line in raw.decode().split("\n")[1:-1])
        return [
            *(bytes([value]) for value in visible),
            *(byte_string(left + right) for left, right in merges),
        ]
    try:
        lines = [line.split() for line in raw.splitlines() if line]
        by_rank = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
        return [by_rank[rank] for rank in range(len(by_rank))]
    except (ValueError, KeyError, binascii.Error) as error:
        raise DataError(f"{file.name} is no file of ranks: {error}.") from error
