"""metrics.jsonl: one JSON object per log line, the only source of plots and reports.

Every line is strict JSON. What JSON cannot hold (NaN, infinities) is written as a string and read back as a
float. A line is in the file once `write` has returned, so a killed process loses at most the line it was
writing.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.runs import OUTPUTS, RUNS, folder_of_path
from naming import expand_path, nearest, shorten
from trainer.run.files import append, write_atomically

__all__ = ["MetricsWriter", "columns", "read_metrics", "to_json"]

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends to `<run_dir>/metrics.jsonl`. A line that an earlier process left half-written is removed."""

    def __init__(self, run_dir: Path, *, repair: bool = True) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        if repair:
            self.truncate_after(math.inf)

    def write(self, line: dict[str, Any]) -> None:
        """Append one object: numbers (of Python, numpy or one-element tensors), strings, lists, mappings."""
        append(self.path, json.dumps(to_json(line), allow_nan=False) + "\n")

    def truncate_after(
        self, step: float, *, scored: bool = True, aside: Path | None = None
    ) -> tuple[int, int]:
        """Drop lines of steps beyond `step`, the score of `step` itself unless `scored`, and unreadable lines; the file
        is replaced in one go. Before that what can be read of them goes to the end of the file `aside`, if there is to
        be one. Returns how many lines these are, and how many are whole and none of a run."""
        if not self.path.exists():
            return 0, 0
        lines = [(line, _parse(line)) for line in self.path.read_bytes().splitlines(keepends=True)]
        readable = [(line, record) for line, record in lines if record is not None]
        late = [line for line, record in readable if _is_later(record, step, scored)]
        if len(lines) == len(readable) and not late:
            return 0, 0
        if aside is not None and late:
            append(aside, b"".join(late))
        kept = [line for line, record in readable if not _is_later(record, step, scored)]
        write_atomically(self.path, b"".join(kept))
        strange = sum(record is None and line.endswith(b"\n") for line, record in lines)
        return len(late), strange


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl (or of the one in a run folder); a half-written last line is left out.

    Raises ValueError naming the line where anything else is not a JSON object.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise ValueError(
                f"{path}:{number}: not a JSON object: {line[:60].decode(errors='replace').strip()}"
            )
    return records


def columns(run: str | Path) -> dict[str, list[Any]]:
    """metrics.jsonl by field: columns of equal length, None where a line has no such field; the entries of a mapping
    are columns with a dot in their name. `run`: a run folder, one of its checkpoints, or the file.

    Raises ValueError where there is none, and for what `read_metrics` refuses.
    """
    file = _metrics_file(expand_path(run))
    lines = [dict(_flat(line)) for line in read_metrics(file)] if file else []
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [line.get(name) for line in lines] for name in names}


def _flat(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _metrics_file(given: Path) -> Path | None:
    """None where a run has not logged a line yet."""
    for path in (given, given / "metrics.jsonl", folder_of_path(given) / "metrics.jsonl"):
        if path.is_file():
            return path
    if (given / "manifest.json").is_file():
        return None
    if given.is_dir():
        raise ValueError(
            f"{given} holds no metrics.jsonl, so it is no run folder.{_runs_near(given / 'any')}"
        )
    raise ValueError(f"no such run: {given}.{_runs_near(given)}")


def _runs_near(given: Path) -> str:
    """Runs that may have been meant, the nearest names first, behind a space; "" where there are none."""
    folders = dict.fromkeys((given.parent, OUTPUTS, RUNS))
    runs = {path.parent.name: path.parent for folder in folders for path in folder.glob("*/metrics.jsonl")}
    names = dict.fromkeys([*nearest(given.name, runs), *sorted(runs, reverse=True)])
    return f" Runs nearby: {shorten([str(runs[name]) for name in names])}" if runs else ""


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the first: also what is not UTF-8
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step", 0), int | float):
        return None
    return _restore(record)


def _is_later(record: dict[str, Any], step: float, scored: bool) -> bool:
    at = record.get("step", 0)
    return at > step or (at == step and not scored and any(key.startswith("val_") for key in record))


def to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): to_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(entry) for entry in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restore(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restore(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_restore(entry) for entry in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
