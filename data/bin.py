"""`data=bin`: token shards as others have them (`data/shards.py` says which kinds).

A document is what stands between two separators, the end-of-text of the shards' tokenizer, wherever these stand: in
front of documents or behind them. A shard that does not begin with one goes on with the last document of the shard
before it, as public shards end inside documents; the first one does not, nor one for validation, nor one whose number
does not follow. Megatron's index says besides where documents begin. Shards that hold no separator at all are read as
sections of about 64 KiB, as one file of text is.

Where the tokenizer of the run is that of the shards ids are taken as they are. Any other, and models that read bytes,
have the same documents as the text that the ids say.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data import TOKENIZERS, named
from data.cache import cache_root
from data.config import DataConfig
from data.corpus import Corpus
from data.cuts import SECTION_BYTES
from data.errors import DataError
from data.named import KINDS, FilesConfig, Named, named_files
from data.prepared import open_prepared, prepared_folder
from data.shard_text import ShardText
from data.shards import (
    GPT2_HEADER,
    Shard,
    ShardFiles,
    blocks,
    document_starts,
    index_of,
    open_shard,
    stamps,
)
from data.stream import Row, Stamp, Stream
from data.tokenizer_choice import AUTO, BYTE, choose, tokenizer_of
from data.tokenizers import Tokenizer, text_of
from naming import expand_path

__all__ = ["Chain", "ShardPart", "absolute", "load"]

WIDTH = np.dtype(np.uint16)  # of ids in files that do not say it, before there is a tokenizer
PUBLIC = {"fineweb10B": "fineweb", "finewebedu10B": "finewebedu"}  # how the names of their shards begin
# Steps of a normalizer that other text than was there comes back from.
_NORMALIZES = re.compile(r'"type": "(NF[CDK]+|Lowercase|StripAccents|BertNormalizer|Strip|Nmt|Precompiled)"')


class PublicConfig(DataConfig, Protocol):
    data_root: str | None
    shards_tokenizer: str | None


class BinConfig(FilesConfig, PublicConfig, Protocol):
    """Of `data=bin`."""


def load(cfg: BinConfig) -> Stream | Corpus:
    """The shards that `train_files` or `input_file`, and `val_files`, name: files, or a folder of `prepare`.

    Raises:
        DataError: no such files, nothing says which of them are held out, they are damaged or of several kinds, or
            their tokenizer is not known or not here.
    """
    if folder := prepared_folder(cfg):
        return open_prepared(folder, cfg)
    return stream_of(cfg, named_files(cfg, KINDS["bin"]))


def stream_of(cfg: PublicConfig, files: Named) -> Stream:
    """The documents of the shards that were found."""
    kind = _require_alike([open_shard(path, WIDTH) for _, path in _all(files)])
    tokenizer = _tokenizer(cfg, kind)
    sides: list[list[ShardPart] | None] = []
    for side, joined in ((files.train, True), (files.heldout, False)):
        if side is None:
            sides.append(None)
            continue
        chain = Chain([open_shard(path, tokenizer.dtype) for _, path in side], tokenizer, joined)
        sides.append([ShardPart(name, chain, number) for number, (name, _) in enumerate(side)])
    read_as = {"source": cfg.data, "tokenizer": tokenizer.digest}
    train, heldout = sides
    notes = (*files.notes, f"shards of {tokenizer.name} ({kind})")
    return Stream(files.name, train or [], heldout, read_as, files.by_hash, notes, ShardText)


def absolute(cfg: BinConfig) -> dict[str, Any]:
    """As `data.named.absolute`."""
    if folder := prepared_folder(cfg):
        return {
            **({"train_files": [os.path.abspath(folder)]} if cfg.train_files else {}),
            **tokenizer_path(cfg),
        }
    return {**named.absolute(cfg, KINDS["bin"]), **tokenizer_path(cfg)}


def load_public(cfg: PublicConfig) -> Stream:
    """FineWeb's shards under the names that `data` and modded-nanogpt give them, in `data_root`, or a folder
    `<data>` of it; without one in data/<data>.

    Raises:
        DataError: as `load`; where they are not there it says how to have them.
    """
    start = PUBLIC[cfg.data]
    folder = _public_folder(cfg)
    there = {side: glob.glob(f"{glob.escape(str(folder))}/{start}_{side}_*.bin") for side in ("train", "val")}
    if lacking := [side for side, found in there.items() if not found]:
        missing = " and ".join(f"{start}_{side}_*.bin" for side in lacking)
        raise DataError(
            f"data={cfg.data}: there is no {missing} in {str(folder)!r}. Fetch them where there is a network: "
            f"python mytrainer.py prepare {cfg.data} --shards <N>, or hf download kjj0/{cfg.data}-gpt2 "
            f"--repo-type dataset --local-dir <folder>; then set data_root=<folder>. With other shards: "
            f"data=bin train_files=<files> val_files=<files>"
        )
    train, heldout = (KINDS["bin"].in_order(map(Path, there[side])) for side in ("train", "val"))
    named_ = [[(path.name, path) for path in side] for side in (train, heldout)]
    return stream_of(cfg, Named(named_[0], named_[1], cfg.data, (), KINDS["bin"], False))


def absolute_public(cfg: PublicConfig) -> dict[str, str]:
    """The folder of the shards, from anywhere."""
    return {"data_root": os.path.abspath(_public_folder(cfg)), **tokenizer_path(cfg)}


def _public_folder(cfg: PublicConfig) -> Path:
    root = expand_path(cfg.data_root or "data")
    below = root / cfg.data
    return below if below.is_dir() or cfg.data_root is None else root


def tokenizer_path(cfg: PublicConfig) -> dict[str, str]:
    """`shards_tokenizer` as it means the same from any folder, where it is a path."""
    path = expand_path(cfg.shards_tokenizer or "")
    return {"shards_tokenizer": os.path.abspath(path)} if cfg.shards_tokenizer and path.exists() else {}


def _all(files: Named) -> list[tuple[str, Path]]:
    return [*files.train, *(files.heldout or ())]


def _require_alike(shards: Sequence[Shard]) -> str:
    """The kind of all shards."""
    first = shards[0]
    for shard in shards:
        if shard.written != first.written:
            raise DataError(
                f"shards of one run are of one kind: {first.path!r} is {first.written}, and {shard.path!r} is "
                f"{shard.written}. Name those of one kind"
            )
    return first.kind


# -- their tokenizer -----------------------------------------------------------------------------------------------


def _spec(cfg: PublicConfig, kind: str) -> str:
    """What names the tokenizer of the shards."""
    if cfg.shards_tokenizer:
        return cfg.shards_tokenizer
    if kind == GPT2_HEADER:
        return "gpt2"
    own, _ = choose(cfg) if cfg.tokenizer != AUTO else (None, "")
    if own is None or own.kind == BYTE or (own.kind is not None and TOKENIZERS[own.kind].trained):
        raise DataError(
            f"nothing in the shards ({kind}) says which tokenizer their ids are of. Set shards_tokenizer=<gpt2, "
            f"another name, or the file or folder of one>"
        )
    return own.spec


def _tokenizer(cfg: PublicConfig, kind: str) -> Tokenizer:
    spec = _spec(cfg, kind)
    try:
        tokenizer = tokenizer_of(spec, cache_root())
    except DataError as error:
        raise DataError(re.sub(r"\btokenizer(?=[=:])", "shards_tokenizer", str(error))) from error
    normalizer = json.loads(tokenizer.to_json()).get("tokenizer", {}).get("normalizer")
    if found := _NORMALIZES.search(json.dumps(normalizer)):
        raise DataError(
            f"shards_tokenizer: {spec!r} changes text before it becomes ids ({found[1]}), and of shards there is no "
            f"text but what the ids say: bits per byte would be of other bytes. Train on the text itself "
            f"(data=jsonl, parquet or hf)"
        )
    return tokenizer


# -- documents -----------------------------------------------------------------------------------------------------


class Chain:
    """Shards of one side in their order, whose ids are one text where they are `joined`."""

    def __init__(self, shards: Sequence[Shard], tokenizer: Tokenizer, joined: bool):
        self.shards, self.tokenizer, self._joined = shards, tokenizer, joined
        self.files = ShardFiles(shards, np.int64)

    def goes_on(self, number: int) -> bool:
        """Whether a shard begins inside the last document of the one before it."""
        if not self._joined or number == 0:
            return False
        before, shard = (Path(self.shards[place].path) for place in (number - 1, number))
        if index_of(shard).exists() or not _follows(before, shard):
            return False
        base = int(self.files.bases[number])
        return int(self.files.read(base - 1, base)[0]) != self.tokenizer.eot

    @cached_property
    def is_cut(self) -> bool:
        """Whether anything says where documents begin."""
        if any(index_of(Path(shard.path)).exists() for shard in self.shards):
            return True
        numbers = range(len(self.shards))
        return any((ids == self.tokenizer.eot).any() for number in numbers for _, ids in self.blocks(number))

    def blocks(self, number: int) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first, ids (k,)) of a shard. DataError at an id that the tokenizer does not have."""
        vocab_size = self.tokenizer.vocab_size
        for start, ids in blocks(self.files, number):
            if ids.min() < 0 or ids.max() >= vocab_size:
                place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
                raise DataError(
                    f"{self.shards[number].path!r}, token {start + place + 1:,} is {ids[place]:,}, and ids of "
                    f"{self.tokenizer.name} are 0 to {vocab_size - 1:,}. The shards are of another tokenizer "
                    f"(shards_tokenizer=<its name or file>), or the file is damaged or holds no tokens"
                )
            yield start, ids

    def stretches(self, number: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """(place of the first, ids (k,), whether a document ends behind them) of a shard, without separators."""
        path = Path(self.shards[number].path)
        starts = document_starts(path) if index_of(path).exists() else np.zeros(0, dtype=np.int64)
        for first, ids in self.blocks(number):
            separators = np.flatnonzero(ids == self.tokenizer.eot)
            here = starts[np.searchsorted(starts, first) : np.searchsorted(starts, first + len(ids))] - first
            ends, nexts = np.concatenate([separators, here]), np.concatenate([separators + 1, here])
            begin = 0
            for cut in np.lexsort([nexts, ends]):
                yield first + begin, ids[begin : ends[cut]], True
                begin = int(nexts[cut])
            yield first + begin, ids[begin:], False


def _follows(before: Path, shard: Path) -> bool:
    """Whether a shard is the next one: by the numbers at the end of their names, where both have one."""
    numbers = [re.search(r"(\d+)$", path.stem) for path in (before, shard)]
    if before.parent != shard.parent:
        return False
    if numbers[0] is None or numbers[1] is None:
        return True
    return int(numbers[1][0]) == int(numbers[0][0]) + 1


@dataclass(frozen=True)
class ShardPart:
    """One shard: the documents that begin in it, to their ends in those behind it."""

    name: str
    chain: Chain
    number: int

    @property
    def shard(self) -> Shard:
        return self.chain.shards[self.number]

    def stamps(self) -> list[Stamp]:
        return stamps(self.shard)

    def rows(self) -> Iterator[Row]:
        return self._documents() if self.chain.is_cut else self._sections()

    def _row(self, begin: int, ids: Sequence[np.ndarray]) -> Row:
        whole = ids[0] if len(ids) == 1 else np.concatenate(ids)
        return Row(begin + 1, text_of(self.chain.tokenizer, whole), len(whole))

    def _documents(self) -> Iterator[Row]:
        before = self.chain.goes_on(self.number)  # of a document that began in another shard
        begin = 0
        pieces: list[np.ndarray] = []
        for place, ids, ended in self.chain.stretches(self.number):
            if len(ids) and not before:
                begin = begin if pieces else place
                pieces.append(ids)
            if ended:
                if pieces:
                    yield self._row(begin, pieces)
                before, pieces = False, []
        if pieces:
            yield self._row(begin, [*pieces, *self._rest()])

    def _rest(self) -> Iterator[np.ndarray]:
        """What the shards behind this one have of its last document."""
        number = self.number + 1
        while number < len(self.chain.shards) and self.chain.goes_on(number):
            for _, ids, ended in self.chain.stretches(number):
                yield ids
                if ended:
                    return
            number += 1

    def _sections(self) -> Iterator[Row]:
        begin, rest = 0, np.zeros(0, dtype=np.int64)
        for _, ids in self.chain.blocks(self.number):
            rest = np.concatenate([rest, ids])
            while (cut := _section(self.chain.tokenizer, rest)) < len(rest):
                yield self._row(begin, [rest[:cut]])
                begin, rest = begin + cut, rest[cut:]
        if len(rest):
            yield self._row(begin, [rest])


def _section(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """How many ids are a section: up to a line end in the second half of SECTION_BYTES, else between characters; all
    where they say no more than that."""
    ids = ids[: SECTION_BYTES + 1]
    ends = np.cumsum(tokenizer.token_bytes[ids])
    fitting = int(np.searchsorted(ends, SECTION_BYTES, side="right"))
    if fitting == len(ids):
        return fitting
    text = np.frombuffer(tokenizer.decode(ids), dtype=np.uint8)
    last = text[np.maximum(ends[:fitting] - 1, 0)]
    lines = np.flatnonzero((last == ord("\n")) & (ends[:fitting] > SECTION_BYTES // 2))
    if len(lines):
        return int(lines[-1]) + 1
    characters = np.flatnonzero(text[ends[:fitting]] & 0xC0 != 0x80)
    return int(characters[-1]) + 1 if len(characters) else max(fitting, 1)
