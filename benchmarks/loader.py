"""What does text of many documents cost? `python -m benchmarks.loader OUTPUT.json [documents=N] [shards=N] [tokens=N]`

Token shards of N documents (10 million in 1,000 shards, of 20 tokens on average, unless told otherwise) are written to
a temporary folder (`TMPDIR`), and started on twice, each time by a process of its own: the first start counts bytes,
compares held-out text and fills the cache, the second one finds it full. Seconds are those of the data part, imports
left out; memory is anonymous, as mapped pages are not the process's. The loader's share is that of the time which a
step takes at a million tokens a second: less than 1 % is the aim. It depends on how long documents are, as each is a
read: of 700 tokens, as those of FineWeb, `documents=1_500_000 shards=15 tokens=700` writes 2 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from data import load_dataset
from data.rows import HeldoutRows, TrainingRows
from data.tokenizers import ByteTokenizer, load_tokenizer

__all__ = ["main"]

SEQ_LEN, ROWS = 1024, 512  # of a step
STEPS = 20
TOKENS_PER_SECOND = 1_000_000


def main(output: str, *words: str) -> int:
    sizes = {"documents": 10_000_000, "shards": 1000, "tokens": 20}
    for word in words:
        name, _, value = word.partition("=")
        if name not in sizes or not value.replace("_", "").isdecimal():
            print(f"{word}: say {', '.join(f'{known}=<number>' for known in sizes)}", file=sys.stderr)
            return 2
        sizes[name] = int(value)
    figures: dict[str, Any] = {"sizes": sizes}
    with tempfile.TemporaryDirectory() as scratch:
        write_shards(Path(scratch), **sizes)
        for start in ("first", "second"):
            command = [sys.executable, "-c", f"from benchmarks import loader; loader.report({scratch!r})"]
            figures[start] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            told = ", ".join(f"{name} {value:,.4g}" for name, value in figures[start].items())
            print(f"{start} start: {told}", flush=True)
            Path(output).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def write_shards(folder: Path, documents: int, shards: int, tokens: int) -> None:
    """Documents of letters and blanks, of 1 to 2 N - 1 bytes, each behind a separator; one shard more is held out."""
    ByteTokenizer().save(folder / "bytes.json")
    draw = np.random.default_rng(0)
    for number in range(shards + 1):
        lengths = draw.integers(1, 2 * tokens, documents // shards)
        ids = draw.choice(np.frombuffer(b"abcdefgh \n", dtype=np.uint8), lengths.sum() + len(lengths)).astype(
            "<u2"
        )
        ids[np.cumsum(lengths + 1) - lengths - 1] = ByteTokenizer().eot
        name = f"train_{number:06}.bin" if number < shards else "val_000000.bin"
        ids.tofile(folder / name)
        os.utime(folder / name, (1e9, 1e9))


def report(folder: str) -> None:
    """Print as JSON what a start and some steps of one process of eight take."""
    tokenizer = f"{folder}/bytes.json"
    cfg = SimpleNamespace(
        data="bin",
        data_root=folder,
        train_files="train_*.bin",
        val_files="val_*.bin",
        input_file=None,
        shards_tokenizer=tokenizer,
        tokenizer=tokenizer,
        near_copies=None,
        train_seq_len=SEQ_LEN,
        training_mode="pretraining",
        packing=True,
    )
    load_tokenizer(Path(tokenizer))  # imports what is needed
    before, began = anonymous(), _clocks()
    dataset = load_dataset(cfg, cache_dir=f"{folder}/cache")
    rows = TrainingRows(dataset.train, dataset.tokenizer.eot, SEQ_LEN, seed=1)
    HeldoutRows(dataset.heldout, dataset.tokenizer.eot, SEQ_LEN, max_bytes=1_000_000)
    found = {**_since("start", began), "start_megabytes": anonymous() - before}
    began = _clocks()
    rows.batch(np.arange(ROWS))
    found |= _since("first_step", began)
    seconds = []
    for step in range(1, STEPS + 1):
        began = _clocks()
        batch = rows.batch(np.arange(step * ROWS, (step + 1) * ROWS) % rows.rows_per_epoch)
        seconds.append(_clocks() - began)
    of_a_step = np.median(seconds, axis=0) / (ROWS * SEQ_LEN / TOKENS_PER_SECOND)
    found |= {"loaders_share": of_a_step[0], "loaders_share_cpu": of_a_step[1]}
    found["documents_per_row"] = 1 + float(batch.doc_ids[:, -1].mean())
    found["megabytes"] = anonymous() - before
    json.dump(found, sys.stdout)


def _clocks() -> np.ndarray:
    """Seconds of the day and of a processor, which differ where others take their turns."""
    return np.array([time.perf_counter(), time.process_time()])


def _since(name: str, began: np.ndarray) -> dict[str, float]:
    seconds, cpu_seconds = _clocks() - began
    return {f"{name}_seconds": seconds, f"{name}_cpu_seconds": cpu_seconds}


def anonymous() -> float:
    """Megabytes of memory that is no page of a file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
