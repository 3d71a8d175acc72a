"""A run's folder on disk. Process 0 alone touches it, one run at a time.

config.yaml manifest.json metrics.jsonl samples.txt summary.json report.html
checkpoint-<step>/  best_model/  final_model/  and links to the newest checkpoint's files
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import filelock

from trainer.errors import TrainingError
from trainer.run.checkpoint import link_files, link_folder, prune, save_checkpoint, write_atomically

__all__ = ["RunFolder"]


class RunFolder:
    """Files are replaced in one go or left as they were; what cannot be written is a TrainingError."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.sampled_at = -1  # step of the last text in samples.txt
        self._lock = filelock.FileLock(str(self.path / ".lock"))

    def lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise TrainingError(
                f"another run is writing to {self.path}. Wait for it, or choose another output_dir"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.path}: {error.strerror or error}. Choose another output_dir"
            ) from error

    def unlock(self, failed: bool) -> None:
        self._lock.release()
        if failed and {p.name for p in self.path.glob("*")} <= {".lock"}:
            shutil.rmtree(self.path, ignore_errors=True)  # a mistake leaves no folder behind

    def refuse_to_overwrite(self) -> None:
        """A new run into a folder that holds another's results would mix or lose them."""
        there = [name for name in ("metrics.jsonl", "summary.json") if (self.path / name).exists()]
        if there:
            raise ValueError(
                f"{self.path} already holds a run ({', '.join(there)}). Add resume=auto to go on with it, or choose "
                f"another output_dir"
            )

    # -- small files -------------------------------------------------------------------------------------------

    def write(self, name: str, text: str) -> None:
        write_atomically(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """{} where there is no such file."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else {}

    # -- samples -----------------------------------------------------------------------------------------------

    def add_sample(self, step: int, text: str) -> None:
        path = self.path / "samples.txt"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"--- step {step} ---\n{text}\n\n")
        except OSError as error:
            raise TrainingError(f"could not write {path}: {error.strerror or error}") from error
        self.sampled_at = step

    def drop_samples_after(self, step: int) -> None:
        """Forget the samples of a life cut short after its last checkpoint."""
        text = self._samples()
        starts = [(int(m[1]), m.start()) for m in re.finditer(r"^--- step (\d+) ---$", text, re.MULTILINE)]
        late = [start for number, start in starts if number > step]
        if late:
            self.write("samples.txt", text[: late[0]])
        self.sampled_at = max((number for number, _ in starts if number <= step), default=-1)

    def last_sample(self) -> str:
        return self._samples().rsplit("--- step ", 1)[-1].partition("\n")[2].strip("\n")

    def _samples(self) -> str:
        path = self.path / "samples.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    # -- checkpoints -------------------------------------------------------------------------------------------

    def save(
        self, step: int, tensors: dict[str, Any], texts: dict[str, str], *, best: bool, keep: int | None
    ) -> None:
        """Write `checkpoint-<step>/`, point the links to it, delete the oldest beyond `keep`."""
        checkpoint = save_checkpoint(self.path, step, tensors, texts)
        if best:
            link_folder(checkpoint, self.path / "best_model")
        link_files(checkpoint, self.path)
        prune(self.path, keep)

    def has_checkpoint(self, step: int) -> bool:
        return (self.path / f"checkpoint-{step}").exists()

    def link_final(self, step: int) -> None:
        link_folder(self.path / f"checkpoint-{step}", self.path / "final_model")
