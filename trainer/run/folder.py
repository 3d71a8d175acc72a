"""A run's folder on disk. Process 0 alone touches it, one run at a time.

config.yaml manifest.json metrics.jsonl samples.txt summary.json annotation.json document_scores.npy report.html
checkpoint-<step>/  best_model/  final_model/  and links to the newest checkpoint's files
metrics.dropped.jsonl  samples.dropped.txt  what lives cut short had written beyond the checkpoint that was gone on with
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import yaml

from configs.concealed import conceal
from trainer.bench.documents import FILE as DOCUMENTS
from trainer.errors import TrainingError
from trainer.run.checkpoint import (
    STATE,
    link_files,
    link_folder,
    load_json,
    prune,
    save_checkpoint,
)
from trainer.run.files import append, could_not_write, settle_leftovers, write_atomically
from trainer.run.metrics import MetricsWriter
from trainer.run.progress import cannot_go_on_from

__all__ = ["BEST", "RunFolder"]

BEST = "best_model"
# Written along the run, each whole in itself: no state is read from them.
SIDE = (
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "metrics.dropped.jsonl",
    "samples.txt",
    "samples.dropped.txt",
    "summary.json",
    "annotation.json",
    DOCUMENTS,
    "report.html",
)


class RunFolder:
    """Files are replaced in one go or left as they were; what cannot be written is a TrainingError."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.sampled_at = -1  # step of the last text in samples.txt
        self._sound: set[Path] = set()  # checkpoints that were looked through in this life, or written
        self._passed_over: dict[Path, str] = {}  # checkpoints, resolved, and what is wrong with them
        self._told: set[str] = set()
        self._lock = filelock.FileLock(str(self.path / ".lock"))

    def lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            settle_leftovers(self.path)
        except filelock.Timeout:
            raise TrainingError(
                f"another run is writing to {self.path}. Wait for it, or choose another output_dir"
            ) from None
        except (OSError, NotImplementedError) as error:  # the second: a file system without locks
            raise TrainingError(
                f"cannot write to {self.path}: {getattr(error, 'strerror', None) or error}. Choose another output_dir"
            ) from error

    def unlock(self, failed: bool) -> None:
        self._lock.release()
        if failed and {p.name for p in self.path.glob("*")} <= {".lock"}:
            shutil.rmtree(self.path, ignore_errors=True)  # a mistake leaves no folder behind

    def holds_a_run(self) -> list[str]:
        """What of a run's results is there."""
        return [name for name in ("metrics.jsonl", "summary.json") if (self.path / name).exists()]

    def refuse_to_overwrite(self) -> None:
        """A new run into a folder that holds another's results would mix or lose them."""
        if there := self.holds_a_run():
            raise ValueError(
                f"{self.path} already holds a run ({', '.join(there)}). Add resume=auto to go on with it, or choose "
                f"another output_dir"
            )

    # -- small files -------------------------------------------------------------------------------------------

    def write(self, name: str, content: str | bytes) -> None:
        write_atomically(self.path / name, content)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """{} where there is no such file. ValueError where it holds no JSON object."""
        path = self.path / name
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
        return found

    # -- what a life cut short left ------------------------------------------------------------------------------

    def drop_later(self, step: int, scored: bool) -> str:
        """Take lines and samples beyond `step`, where the run goes on, out of metrics.jsonl and samples.txt; `scored`:
        whether the score of `step` is in what is gone on with. They are made anew, as before or, with other settings,
        otherwise: the old ones are kept beside. A sentence on them, "" where there are none."""
        dropped = self.path / "metrics.dropped.jsonl"
        lines, strange = MetricsWriter(self.path, repair=False).truncate_after(
            step, scored=scored, aside=dropped
        )
        self._drop_samples_after(step)
        told = []
        if lines:
            told.append(f"{lines} lines beyond step {step}, of a life cut short: moved to {dropped.name}")
        if strange:
            told.append(f"{strange} lines that are none of a run: left out")
        return f"metrics.jsonl had {' and '.join(told)}" if told else ""

    def read_config(self) -> dict[str, Any]:
        """The generic fields in config.yaml; {} where there is none that can be read."""
        try:
            found = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    def read_summary(self, note: Callable[[str], None]) -> dict[str, Any]:
        """summary.json; {} where there is none, or none that is as it was written, which is set aside."""
        try:
            found = self.read_json("summary.json")
            if found:
                best = found.get("best", found["score"])
                whole = [found["steps"], best["bits_per_byte"], found["score"]["bits_per_byte"]]
                whole.append(found.get("evaluations_without_improvement", 0))
                if not all(isinstance(number, int | float) for number in whole):
                    raise TypeError
        except (ValueError, KeyError, TypeError):
            note(self.set_aside("summary.json", "is not as it was written"))
            return {}
        return found

    def set_aside(self, name: str, why: str) -> str:
        """Give a file that stands in the way another name; a sentence on that."""
        path = self.path / name
        aside = path.with_name(f"{name}.damaged-{secrets.token_hex(4)}")
        with self._explained():
            os.rename(path, aside)
        return f"{name} {why}: it is called {aside.name} now, and made anew"

    def make_way(self) -> list[str]:
        """Set aside what has the name of a file that is written along the run and is none, such as a FIFO, which would
        be waited for. Sentences on that."""
        there = [name for name in SIDE if os.path.lexists(self.path / name)]
        return [self.set_aside(name, "is no file") for name in there if not (self.path / name).is_file()]

    def keep_documents(self, content: bytes | None) -> None:
        """Of the score that counts: `content`, or what best_model/ was saved with, or none where neither is there."""
        kept = self.path / BEST / DOCUMENTS
        if content is None and kept.is_file():
            content = kept.read_bytes()
        if content is None:
            (self.path / DOCUMENTS).unlink(missing_ok=True)
        else:
            self.write(DOCUMENTS, content)

    # -- samples -----------------------------------------------------------------------------------------------

    def add_sample(self, step: int, text: str) -> None:
        append(self.path / "samples.txt", f"--- step {step} ---\n{text}\n\n")
        self.sampled_at = step

    def _drop_samples_after(self, step: int) -> None:
        text = self._samples()
        starts = [
            (int(m[1]), m.start()) for m in re.finditer(rb"^--- step (\d{1,18}) ---$", text, re.MULTILINE)
        ]
        if starts and not text.endswith(b"\n\n"):  # cut in the middle: that text is drawn again
            starts[-1] = (step + 1, starts[-1][1])
        late = [start for number, start in starts if number > step]
        if late:
            append(self.path / "samples.dropped.txt", text[late[0] :])
            self.write("samples.txt", text[: late[0]])
        self.sampled_at = max((number for number, _ in starts if number <= step), default=-1)

    def last_sample(self) -> str:
        text = self._samples().decode(errors="backslashreplace")
        return text.rsplit("--- step ", 1)[-1].partition("\n")[2].strip("\n")

    def _samples(self) -> bytes:
        """Bytes: a process killed while it wrote may have left half a character."""
        path = self.path / "samples.txt"
        return path.read_bytes() if path.exists() else b""

    # -- checkpoints -------------------------------------------------------------------------------------------

    def wrong_with(self, checkpoint: Path) -> str | None:
        """Why a run cannot go on from a checkpoint, of this folder or another. None where it can, as far as is known
        before its tensors are read."""
        there = checkpoint.resolve()
        if there not in self._passed_over and (problem := cannot_go_on_from(checkpoint)):
            self._passed_over[there] = problem
        return self._passed_over.get(there)

    def pass_over(self, checkpoint: Path, why: str) -> None:
        """Go on from no checkpoint of which the tensors turned out to be wrong."""
        self._passed_over[checkpoint.resolve()] = why

    def say_once(self, text: str, say: Callable[[str], None]) -> None:
        if text not in self._told:
            self._told.add(text)
            say(text)

    def save(
        self,
        step: int,
        tensors: dict[str, Any],
        texts: Mapping[str, str | bytes],
        *,
        best: bool,
        keep: int | None,
    ) -> None:
        """Write `checkpoint-<step>/`, point the links to it, delete the oldest beyond `keep`."""
        state = texts[STATE]
        assert isinstance(state, str)
        texts = {**texts, STATE: conceal(state)}
        there = (self.path / f"checkpoint-{step}").resolve()
        checkpoint = save_checkpoint(self.path, step, tensors, texts, anew=there in self._passed_over)
        self._passed_over.pop(there, None)
        self._sound.add(checkpoint)
        with self._explained():
            if best:
                link_folder(checkpoint, self.path / BEST)
            link_files(checkpoint, self.path)
            prune(self.path, keep, checkpoint, self._is_sound)

    def _is_sound(self, checkpoint: Path) -> bool:
        """Whether all of it can be read, which is found out once."""
        if checkpoint not in self._sound and self.wrong_with(checkpoint) is None:
            self._sound.add(checkpoint)
        return checkpoint in self._sound

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = Path(error.filename2 or error.filename or self.path)
            raise could_not_write(path, error, self.path) from error

    def has_checkpoint(self, step: int) -> bool:
        return (self.path / f"checkpoint-{step}").exists()

    def link_final(self, step: int) -> None:
        with self._explained():
            link_folder(self.path / f"checkpoint-{step}", self.path / "final_model")

    def have_best(self, step: int, source: Path) -> bool:
        """Whether best_model/ is that of `step`, having made it so where that step can still be found: in this run or
        in that of `source`, the checkpoint that is gone on with. A life may have been cut short just before it made
        the link, a branch begins without one, and `save_best_model` may have been off until now."""
        for run in (self.path, source.parent):
            for found in (run / BEST, run / f"checkpoint-{step}"):
                if cannot_go_on_from(found) is None and load_json(found, STATE)["progress"]["step"] == step:
                    if found != self.path / BEST:
                        with self._explained():
                            link_folder(found, self.path / BEST)
                    return True
        return False
