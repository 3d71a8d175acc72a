"""Whether modules can be imported: `python -m trainer.doctor.importing RESULTS MODULE ...`, a process of its own, as a
module that is broken may print, hang, or end the process that imports it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.doctor.lines import ROOT, said_by

__all__ = ["broken"]

SECONDS = 60.0  # for one process


def broken(modules: Sequence[str]) -> dict[str, str]:
    """Of those that cannot be imported: why."""
    found: dict[str, str] = {}
    left = list(modules)
    with tempfile.TemporaryDirectory() as folder:
        while left:
            results = Path(folder) / f"{len(left)}.jsonl"
            results.touch()
            ended = _run(results, left)
            tried = dict(json.loads(line) for line in results.read_text(encoding="utf-8").splitlines())
            found |= {module: why for module, why in tried.items() if why}
            left = [module for module in left if module not in tried]
            if left and ended:
                found[left.pop(0)] = ended
    return found


def _run(results: Path, modules: list[str]) -> str:
    """How it ended where that was no end."""
    command = [sys.executable, "-m", "trainer.doctor.importing", str(results), *modules]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {SECONDS:.0f} s"
    return f"importing it ends the process (exit status {done.returncode})" if done.returncode else ""


def main(results: str, modules: list[str]) -> None:
    began = time.monotonic()
    with open(results, "a", encoding="utf-8") as file:
        for module in modules:
            try:
                importlib.import_module(module)
                why = ""
            except (Exception, SystemExit) as error:
                why = said_by(error)
            file.write(json.dumps([module, why]) + "\n")
            file.flush()
            if time.monotonic() - began > SECONDS / 2:
                break  # the rest is another process's, with time of its own


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
