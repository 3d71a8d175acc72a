"""Texts become ids in several processes: one reads and writes, the others encode.

`Encoders` gives documents to them in batches and takes the ids in the order of the documents, so that nothing depends
on how many there are. A process is `python -m data.encoder <tokenizer.json> <file of places>`: batches come in on its
standard input, what they became goes out on its standard output, and before each document it writes which one it is
about, so that it is known of which one it died.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import numpy as np

from data.corpus import Document
from data.errors import DataError
from data.files import shown
from data.tokenizers import TableTokenizer, Tokenizer, load_tokenizer, text_of

__all__ = ["Encoded", "Encoders"]

BATCH = 1 << 20  # bytes of text that are given together, or one document
ROOT = Path(__file__).resolve().parents[1]
PLACE = struct.Struct("<q")


class Encoded(NamedTuple):
    """Of a document: its ids (L,), and whether they do not give its text back."""

    document: Document
    ids: np.ndarray
    lossy: bool


class Encoders:
    """Processes that encode by the tokenizer of a file, as many as there is work for; as a context they end with it."""

    def __init__(self, tokenizer_file: Path, processes: int):
        self._file, self._to_start = tokenizer_file, processes
        self._started = ExitStack()
        self._idle: deque[_Worker] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def encoded(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """The documents in their order.

        Raises:
            DataError: one cannot be encoded, or the process that was about it died: it is named.
        """
        batches = _batches(documents)
        busy: deque[_Worker] = deque()
        for batch in islice(batches, len(self._idle) + self._to_start):
            busy.append(self._idle.popleft() if self._idle else self._start())
            busy[-1].send(batch)
        while busy:
            worker = busy.popleft()
            done = worker.receive()
            # It goes on with the next batch while these documents are written.
            if (following := next(batches, None)) is not None:
                worker.send(following)
                busy.append(worker)
            else:
                self._idle.append(worker)
            yield from done

    def _start(self) -> _Worker:
        self._to_start -= 1
        return self._started.enter_context(_Worker(self._file))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Worker:
    """One process, from the side of the one that reads and writes."""

    def __init__(self, tokenizer_file: Path):
        self._places = tempfile.NamedTemporaryFile(prefix="mytrainer-place-")  # noqa: SIM115 (`__exit__` closes it)
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "data.encoder", str(tokenizer_file.absolute()), self._places.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,  # where `data` is this package
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))},
        )
        self._batch: list[Document] = []

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(OSError):  # what could not be sent any more
            self._in.close()
        self._out.close()
        self._process.wait()
        self._places.close()

    @property
    def _in(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def send(self, batch: list[Document]) -> None:
        self._batch = batch
        with suppress(BrokenPipeError):  # it has died: `receive` says so
            pickle.dump([document.text for document in batch], self._in, protocol=5)
            self._in.flush()

    def receive(self) -> list[Encoded]:
        try:
            answer: Any = pickle.load(self._out)
        except (EOFError, pickle.UnpicklingError):
            raise DataError(self._died(f"the process that encoded it {self._how_it_ended()}")) from None
        if isinstance(answer, str):
            raise DataError(self._died(answer))
        ids, lengths, lossy = answer
        ends = np.cumsum(lengths)
        return [
            Encoded(document, ids[end - length : end], bool(lost))
            for document, length, end, lost in zip(self._batch, lengths, ends, lossy, strict=True)
        ]

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "was killed (as the system does where memory runs out)"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def _died(self, how: str) -> str:
        self._places.seek(0)
        place = self._places.read(PLACE.size)
        name = self._batch[PLACE.unpack(place)[0] if len(place) == PLACE.size else 0].name
        return f"{shown(name)} could not be encoded: {how}. Leave that document out, or mend it"


# -- the process itself --------------------------------------------------------------------------------------------


def main(tokenizer_file: str, places: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    tokenizer = load_tokenizer(tokenizer_file)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed is no answer
    # Where the one that started it is gone nobody gives and takes any more.
    with open(places, "wb", buffering=0) as file, suppress(EOFError, BrokenPipeError):
        while True:
            texts = pickle.load(sys.stdin.buffer)
            pickle.dump(_encode(tokenizer, texts, file.fileno()), out, protocol=5)
            out.flush()


def _encode(tokenizer: Tokenizer, texts: list[bytes], places: int) -> Any:
    """Ids of all texts, how many each has, and which come back otherwise; of one that fails, what it says."""
    ids, lossy = [], []
    for place, text in enumerate(texts):
        os.pwrite(places, PLACE.pack(place), 0)
        try:
            found = tokenizer.encode(text)
            lossy.append(_is_lost(tokenizer, found, text))
        except BaseException as error:  # a panic of Rust is no Exception
            return f"{type(error).__name__}: {error}"
        ids.append(found)
    lengths = np.array([len(found) for found in ids], dtype=np.int64)
    return np.concatenate(ids), lengths, np.array(lossy, dtype=bool)


def _is_lost(tokenizer: Tokenizer, ids: np.ndarray, text: bytes) -> bool:
    """Ours give every byte back, in order: of them lengths are enough, which take a tenth of the time."""
    if isinstance(tokenizer, TableTokenizer):
        return int(tokenizer.token_bytes[ids].sum()) != len(text)
    return text_of(tokenizer, ids) != text


if __name__ == "__main__":
    main(*sys.argv[1:])
