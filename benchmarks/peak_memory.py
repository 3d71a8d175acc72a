"""Does a run take more memory for more text? `python -m benchmarks.peak_memory OUTPUT.json [SIZE ...] [overrides]`

Files of JSON lines of so many megabytes each (200 and 2000, unless told otherwise) are written to a temporary folder
(`TMPDIR`), and trained on for a few steps, twice: the first run keeps text, trains the tokenizer, encodes, compares
held-out text and computes yardsticks; the second one finds all of that in the cache. What counts is the peak of the
anonymous memory of all processes of a run together, looked at fifty times a second: 10 % more for ten times the text is
too much.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sessions import write

__all__ = ["main"]

SIZES = ("200", "2000")
RUN = [
    "preset=nano",
    "num_iterations=4",
    "val_loss_every=0",
    "val_bytes=100000",
    "time_budget=null",
    "device=cpu",
]


def main(output: str, *words: str) -> int:
    sizes = [word for word in words if word.isdecimal()] or SIZES
    more = [word for word in words if not word.isdecimal()]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = Path(scratch, size)
            folder.mkdir()
            _write_text(folder / "text.jsonl", int(size) * 1_000_000)
            for start in ("first", "cached"):
                figures[f"{size} MB, {start}"] = found = _run(folder, start, more)
                print(f"{size} MB, {start}: {found['peak_megabytes']:,.0f} MB, {found['by']}", flush=True)
                write(output, figures)
    return 0


def _write_text(path: Path, size: int) -> None:
    """Documents of up to 40 lines of ten words, of which a few are frequent and many are rare, as in prose."""
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(draw.choice(letters, draw.integers(2, 10))) for _ in range(30_000)]
    frequent = np.cumsum(1 / (np.arange(len(words)) + 10))
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            said = np.searchsorted(frequent, draw.uniform(0, frequent[-1], (20_000, 10)))
            lines = [
                " ".join([words[place] for place in line])
                for line in np.minimum(said, len(words) - 1).tolist()
            ]
            begin = 0
            while begin < len(lines):
                end = begin + int(draw.integers(1, 41))
                file.write(json.dumps({"text": "\n".join(lines[begin:end])}) + "\n")
                begin = end
    os.utime(path, (1e9, 1e9))


def _run(folder: Path, start: str, words: list[str]) -> dict[str, Any]:
    """The peak in megabytes, what each process had then, and when it was."""
    project = Path(__file__).resolve().parent.parent
    command = [
        sys.executable,
        str(project / "mytrainer.py"),
        *(word if word.startswith("--") else word for word in words),
        f"input_file={folder / 'text.jsonl'}",
        f"output_dir={folder / start}",
        *RUN,
    ]
    if not any(word.startswith("--hydra_model_cfg") for word in words):
        command.insert(2, f"--hydra_model_cfg={project / 'configs/gpt2.yaml'}")
    environment = {**os.environ, "MYTRAINER_CACHE": str(folder / "cache")}
    log = open(folder / f"{start}.log", "wb")  # noqa: SIM115 (closed with this process)
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    peak: dict[str, Any] = {"peak_megabytes": 0.0, "by": {}}
    while process.poll() is None:
        by = {name: size for pid in _family(process.pid) for name, size in [_anonymous(pid)] if size}
        if sum(by.values()) > peak["peak_megabytes"]:
            seconds = time.monotonic() - began
            peak = {"peak_megabytes": sum(by.values()), "by": by, "after_seconds": seconds}
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(Path(log.name).read_text())
    return {**peak, "seconds": time.monotonic() - began}


def _family(pid: int) -> list[int]:
    """A process and all that came of it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _anonymous(pid: int) -> tuple[str, float]:
    """What a process is, and its anonymous memory in megabytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "", 0.0
    size = sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    return ("yardsticks" if b"data.yardsticks" in words else f"process {pid}"), size / 1000


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
