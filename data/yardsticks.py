"""Yardsticks: what simple methods score, in bits per byte, on the very text a model is scored on.

uniform   8 bits, by definition
unigram   token frequencies of the training split, add-one, document ends left out
3-gram, 6-gram   interpolated Witten-Bell over bytes, trained on the training split
xz, bz2   compressors on the held-out text alone: they see the whole file (xz the last 16 MiB), a model does not

A few seconds of work, so a run starts it in a child process at low priority (`start_background`) and reads
the result at its end. By hand: `python -m data.yardsticks <token cache folder>`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from data.cache import write_atomic
from data.errors import DataError
from data.held import hold
from data.ngrams import Texts, by_order
from data.rows import select_heldout
from data.store import TokenStore, load_stores, save_stores
from data.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from data import Dataset

COMPRESSORS = ("xz", "bz2")
NAMES = ("uniform", "unigram", "3-gram", "6-gram", *COMPRESSORS)
# The n-gram counts take about 6 bytes of memory per byte of text; more text than this is sampled by
# document.
NGRAM_TRAINING_BYTES = 32_000_000
BLOCK = 1_000_000  # bytes of held-out text that are scored together
XZ_REACH = 16 << 20  # bytes back that xz sees at most: it takes eleven times as much memory
FORMAT = 1


def yardsticks(dataset: Dataset, max_bytes: int | None = None) -> dict[str, float]:
    """Bits per byte by name (`NAMES`), from the cache if it is there.

    `max_bytes` selects the held-out documents as `HeldoutRows` does (`val_bytes`). Where the training text
    is larger than `NGRAM_TRAINING_BYTES`, the key "ngram_training_bytes" says how much of it the n-grams
    saw.
    """
    folder = dataset.cache_path
    if folder is not None and (cached := _read_result(folder, max_bytes)) is not None:
        return cached
    result = compute(dataset.train, dataset.heldout, max_bytes)
    if folder is not None:
        _write_result(folder, max_bytes, result)
    return result


def compute(train: TokenStore, heldout: TokenStore, max_bytes: int | None = None) -> dict[str, float]:
    """As `yardsticks`, without the cache."""
    scored = select_heldout(heldout, max_bytes)
    sample = _ngram_sample(train)
    size = int(heldout.doc_bytes[scored].sum())
    ngrams = _ngram_bits(Texts([train.text(int(index)) for index in sample]), heldout, scored, (3, 6))
    result = {
        "uniform": 8.0,
        "unigram": _unigram_bits(train, heldout, scored) / size,
        **{f"{n}-gram": bits / size for n, bits in ngrams.items()},
        **{
            name: 8 * measure(_texts(heldout, scored), size) / size for name, measure in compressors().items()
        },
    }
    if len(sample) < train.n_docs:
        result["ngram_training_bytes"] = int(train.doc_bytes[sample].sum())
    return result


def _texts(store: TokenStore, documents: np.ndarray) -> Iterator[bytes]:
    return (store.text(int(index)) for index in documents)


def compressors() -> dict[str, Callable[[Iterable[bytes], int], int]]:
    """`xz` and `bz2`, those of them that this Python was built with: what a text (in pieces, and its size) comes to."""
    found: dict[str, Callable[[Iterable[bytes], int], int]] = {}
    with suppress(ImportError):
        import lzma

        extreme = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}

        def xz(text: Iterable[bytes], size: int) -> int:
            reach = min(max(1 << (size - 1).bit_length(), 4096), XZ_REACH)  # all of a shorter text
            return _compressed(lzma.LZMACompressor(filters=[{**extreme, "dict_size": reach}]), text)

        found["xz"] = xz
    with suppress(ImportError):
        import bz2

        found["bz2"] = lambda text, size: _compressed(bz2.BZ2Compressor(9), text)
    return found


def _compressed(compressor: Any, text: Iterable[bytes]) -> int:
    return sum(len(compressor.compress(piece)) for piece in text) + len(compressor.flush())


def _ngram_bits(
    train: Texts, heldout: TokenStore, scored: np.ndarray, orders: Sequence[int]
) -> dict[int, float]:
    """Bits of the scored documents under the n-grams of each order. What is known of each byte may lie in a file."""
    ends = np.cumsum(heldout.doc_bytes[scored])
    # The documents that begin in each BLOCK of the text.
    block_of = (ends - heldout.doc_bytes[scored]) // BLOCK
    groups = np.split(scored, np.flatnonzero(np.diff(block_of)) + 1)

    def blocks() -> Iterator[Texts]:
        return (Texts(list(_texts(heldout, group))) for group in groups)

    with _probabilities(int(ends[-1])) as probability:
        places = [slice(start, start + BLOCK) for start in range(0, len(probability), BLOCK)]
        for place in places:
            probability[place] = 1 / 256
        bits = {}
        for n in by_order(train, blocks, probability, max(orders)):
            if n in orders:
                bits[n] = -sum(float(np.log2(probability[place]).sum()) for place in places)
        return bits


@contextmanager
def _probabilities(size: int) -> Iterator[np.ndarray]:
    """Room for (size,) float64, in a file where that is much."""
    if size <= BLOCK:
        yield np.empty(size)
        return
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk says so here, and not by SIGBUS
            os.posix_fallocate(file.fileno(), 0, 8 * size)
        yield np.memmap(file, dtype=np.float64, mode="w+", shape=(size,))


def _ngram_sample(train: TokenStore) -> np.ndarray:
    return select_heldout(
        train, NGRAM_TRAINING_BYTES
    )  # any fixed order will do, and this one is spread evenly


def _unigram_bits(train: TokenStore, heldout: TokenStore, scored: np.ndarray) -> float:
    """Bits of the scored documents under add-one frequencies of the tokens that stand for text."""
    tokenizer = train.tokenizer
    counts = train.counts(tokenizer.vocab_size) + (tokenizer.token_bytes > 0)
    bits = math.log2(counts.sum()) - np.log2(np.maximum(counts, 1))
    spans = zip(heldout.offsets[scored], heldout.offsets[scored + 1], strict=True)
    return float(sum(bits[heldout.tokens[start:stop]].sum() for start, stop in spans))


def expected_seconds(dataset: Dataset, max_bytes: int | None = None) -> float:
    """About how long a core is busy with them, 0 where they are cached."""
    if dataset.cache_path is not None and _read_result(dataset.cache_path, max_bytes) is not None:
        return 0.0
    # 2.5 to 3.5 s for 10.7 MB, with 0.3 to 0.65 MB scored, after half a second of imports.
    counted = min(dataset.train.total_bytes, NGRAM_TRAINING_BYTES) + dataset.heldout.total_bytes
    return 1.0 + 0.35e-6 * counted


@dataclass
class Background:
    """Yardsticks on their way. `close` (or leaving a `with` block) ends the child if it still runs."""

    folder: Path
    max_bytes: int | None
    process: subprocess.Popen[bytes] | None
    output: IO[bytes] | None
    temporary: bool

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self.process is None or self.process.poll() is not None

    def result(self, timeout: float | None = None) -> dict[str, float]:
        """Wait for the result.

        Raises:
            RuntimeError: the child failed; says how.
            TimeoutError: it is not ready within `timeout` seconds (it goes on).
        """
        if self.process is not None:
            try:
                status = self.process.wait(timeout)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(f"yardsticks are not ready after {timeout} s") from error
            if status:
                said = f": {tail}" if (tail := self._output_tail()) else ""
                raise RuntimeError(f"their process ended with status {status}{said}")
        result = _read_result(self.folder, self.max_bytes)
        if result is None:
            raise RuntimeError(f"the yardsticks' process left no result in {self.folder}")
        return result

    def close(self) -> None:
        """End the child and drop what it needed."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                self.process.stdin.close()
        if self.output is not None:
            self.output.close()
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _output_tail(self) -> str:
        assert self.output is not None
        self.output.seek(0)
        return self.output.read().decode("utf-8", "replace").strip()[-500:]


def start_background(
    dataset: Dataset, max_bytes: int | None = None, workspace: Path | None = None
) -> Background:
    """Compute yardsticks beside the run; a cached result starts no process. Where no cache holds the tokens, they go to
    the folder `workspace` (default: a temporary one) until the end.

    The child ends with its parent, however that ends: it holds a pipe from it and leaves when the pipe
    closes. A signal from the keyboard does not reach it, so that it cannot spoil the output of a run that
    is saving its state.
    """
    folder = dataset.cache_path
    if folder is not None and _read_result(folder, max_bytes) is not None:
        return Background(folder, max_bytes, None, None, temporary=False)
    temporary = folder is None
    if folder is None:
        folder = workspace or Path(tempfile.mkdtemp(prefix="mytrainer-yardsticks-"))
        dataset.tokenizer.save(folder / "tokenizer.json")
        save_stores(folder, {"train": dataset.train, "heldout": dataset.heldout})
    command = [sys.executable, "-m", "data.yardsticks", str(folder.absolute()), "--background"]
    if max_bytes is not None:
        command += ["--max-bytes", str(max_bytes)]
    project = str(Path(__file__).resolve().parent.parent)
    paths = [project, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    output = tempfile.TemporaryFile()  # noqa: SIM115 (Background closes it)
    process = subprocess.Popen(
        command,
        cwd=project,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Background(folder, max_bytes, process, output, temporary)


def main(argv: list[str] | None = None) -> int:
    """Print the yardsticks of a token cache folder as JSON and leave them in that folder."""
    parser = argparse.ArgumentParser(prog="python -m data.yardsticks", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder under <cache>/tokens")
    parser.add_argument(
        "--max-bytes", type=int, default=None, help="held-out bytes to score (whole documents)"
    )
    parser.add_argument(
        "--background", action="store_true", help="run at low priority, end when stdin closes"
    )
    options = parser.parse_args(argv)
    if options.background:
        if hasattr(os, "nice"):
            os.nice(10)
        threading.Thread(target=_leave_when_stdin_closes, daemon=True).start()
    try:
        _held = hold(options.folder)  # until the result is written there
        tokenizer = load_tokenizer(options.folder / "tokenizer.json")
        stores = load_stores(options.folder, ["train", "heldout"], tokenizer)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    result = _read_result(options.folder, options.max_bytes)
    if result is None:
        result = compute(stores["train"], stores["heldout"], options.max_bytes)
        _write_result(options.folder, options.max_bytes, result)
    print(json.dumps(result, indent=1))
    return 0


def _leave_when_stdin_closes() -> None:
    # os.read, not sys.stdin: a thread inside a buffered reader can block the interpreter's exit.
    while os.read(0, 1):
        pass
    os._exit(1)


def _result_path(folder: Path, max_bytes: int | None) -> Path:
    return folder / f"yardsticks-{'all' if max_bytes is None else max_bytes}-v{FORMAT}.json"


def _read_result(folder: Path, max_bytes: int | None) -> dict[str, float] | None:
    """The cached result, or None if it is missing or not what we write."""
    try:
        result = json.loads(_result_path(folder, max_bytes).read_bytes())
    except (OSError, ValueError):
        return None
    possible = [name for name in NAMES if name not in COMPRESSORS or name in compressors()]
    complete = isinstance(result, dict) and all(isinstance(result.get(name), float) for name in possible)
    return result if complete else None


def _write_result(folder: Path, max_bytes: int | None, result: dict[str, float]) -> None:
    text = json.dumps(result, indent=1)
    write_atomic(_result_path(folder, max_bytes), lambda file: file.write(text.encode()))


if __name__ == "__main__":
    sys.exit(main())
