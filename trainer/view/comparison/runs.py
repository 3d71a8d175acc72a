"""A run as a comparison sees it: what its folder says, and its curves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trainer.run.metrics import read_metrics

__all__ = ["AXES", "Curve", "Run", "differing", "flat", "read_run"]

AXES = ("tokens", "bytes", "flops", "seconds")
# Of summary.json: what a score cost.
MEASURES = (
    *("steps", "tokens", "bytes", "flops", "seconds", "seconds_total", "tokens_per_second"),
    *("peak_memory_bytes", "generation_tokens_per_second"),
)
TARGETS = ("match", "budget")
_NUMBERS = ("standard_error", "documents_standard_error", "context_bytes")  # of a score, or null
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where it was built
# Of summary.json and manifest.json.
_OBJECTS = (
    *("score", "best", "yardsticks", "parameters", *TARGETS),
    *("data", "environment", "execution", "flops_per_token"),
)
# Where a run lies: no part of what it is.
PLACES = ("output_dir", "model_name", "resume", "data_root")


@dataclass(frozen=True)
class Curve:
    """Bits per byte (n,) against what had been spent until then, in the order of the lines: float64 (n,) by axis, NaN
    where it is not known."""

    bits: np.ndarray
    spent: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.bits)


@dataclass
class Run:
    """`config`: by dotted name. `score`: {} where there is none; its `step` where it is not the last. `lives`: when it
    was at work, as (host, first second, last second). `along_of`: what the scores on the way are of, as (text or
    answers, documents, bytes). `apart`: why its score does not compare with the others', `slow`: why its seconds do
    not, `aside`: why its scores on the way do not; "" where they do."""

    path: Path
    name: str
    type: str
    config: dict[str, Any]
    summary: dict[str, Any]
    manifest: dict[str, Any]
    score: dict[str, Any]
    lives: list[tuple[str, float, float]]
    state: str = "ok"
    why: str = ""
    held_out: Curve | None = None
    training: Curve | None = None
    along_of: tuple[Any, ...] = ()
    sample: str = ""
    apart: str = ""
    slow: str = ""
    aside: str = ""

    @property
    def parameters(self) -> dict[str, Any]:
        """`total`, `active` and `by_role`, as far as the run says them."""
        counts = {**(self.manifest.get("parameters") or {}), **(self.summary.get("parameters") or {})}
        by_role = counts.get("by_role")
        shares = by_role.items() if isinstance(by_role, dict) else ()
        return {
            "active": counts.get("total"),
            **counts,
            "by_role": {role: count for role, count in shares if _is_number(count)},
        }

    @property
    def measures(self) -> dict[str, Any]:
        """What the score cost; None where the run does not say it."""
        found = {name: one if _is_number(one := self.summary.get(name)) else None for name in MEASURES}
        flops, size = found["flops"], found["bytes"]
        return found | {"flops_per_byte": flops / size if flops and size else None}

    @property
    def missed(self) -> dict[str, float]:
        """By how much of it a target is missed that sizes (`match`) or length (`budget`) were chosen to meet."""
        told = {name: self.summary.get(name) or self.manifest.get(name) or {} for name in TARGETS}
        return {name: float(one["error"]) for name, one in told.items() if _is_number(one.get("error"))}

    @property
    def entropy(self) -> float | None:
        """Of the text, in bits per byte, where it is known."""
        found = (self.summary.get("yardsticks") or {}).get("true entropy")
        return found if _is_number(found) else None


def read_run(
    path: Path,
    name: str,
    *,
    curves: bool = True,
    config: Mapping[str, Any] | None = None,
    lives: Iterable[tuple[str, float, float]] = (),
) -> Run:
    """`config` and `lives`: where a sweep knows them better than the run's own folder. Without `curves` and the sample,
    what is in its small files alone.

    Raises ValueError where a file is damaged.
    """
    summary, manifest = _object(path / "summary.json"), _object(path / "manifest.json")
    config = _settings(path / "config.yaml") if config is None else config
    run = Run(
        path=path,
        name=name,
        type=str(summary.get("type") or manifest.get("type") or config.get("type") or path.name),
        config=flat({key: value for key, value in config.items() if key != "defaults"}),
        summary=summary,
        manifest=manifest,
        score=_score(path, summary),
        lives=[*lives] or _lives(summary, manifest),
    )
    if curves:
        run.held_out, run.training, last = _curves(path, manifest)
        run.along_of = (last.get("of", "text"), last.get("documents"), last.get("bytes")) if last else ()
        run.sample = _last_sample(path)
        if not run.score and last:
            run.score, run.state = last, "unfinished"
            run.why = f"unfinished: this is the score of step {last['step']:,}"
    return run


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def differing(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The fields of flat configurations that differ. Architectures have fields of their own: what only some have does
    not differ between those."""
    known = [*configs]
    names = dict.fromkeys(name for one in known for name in one)
    return [
        name
        for name in names
        if name not in PLACES
        and len({json.dumps(one[name], default=str) for one in known if name in one}) > 1
    ]


# --- files ----------------------------------------------------------------------------------------------


def _object(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    for name in _OBJECTS:
        if not isinstance(found.get(name) or {}, dict):
            raise ValueError(f"{path} is damaged: its {name} is no object")
    return found


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no fields")
    return found


def _score(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Of the best model where one is kept. What its score leaves out, it has in common with that of the last. {} of a
    run that diverged."""
    last, best = summary.get("score") or {}, summary.get("best") or {}
    found = {**last, **best}
    if isinstance(bits := found.get("bits_per_byte"), float) and not math.isfinite(bits):
        return {}
    if found and not _is_number(found.get("bits_per_byte")):
        raise ValueError(f"{path / 'summary.json'} is damaged: its score has no bits_per_byte")
    strange = [name for name in _NUMBERS if not _is_number(found.get(name, 0.0)) and found[name] is not None]
    if strange:
        raise ValueError(f"{path / 'summary.json'} is damaged: its {strange[0]} is no number")
    return found


def _lives(summary: dict[str, Any], manifest: dict[str, Any]) -> list[tuple[str, float, float]]:
    """The last alone: nothing says when earlier ones were."""
    host: Any = manifest.get("host")
    began: Any = manifest.get("began")
    ended: Any = summary.get("ended")
    return [(str(host), began, ended)] if host and _is_number(began) and _is_number(ended) else []


def _last_sample(path: Path) -> str:
    """Bytes: a process killed while it wrote may have left half a character."""
    if not (path / "samples.txt").is_file():
        return ""
    text = (path / "samples.txt").read_bytes().decode(errors="backslashreplace")
    return text.rsplit("--- step ", 1)[-1].partition("\n")[2].strip("\n")


# --- curves ---------------------------------------------------------------------------------------------


def _curves(path: Path, manifest: dict[str, Any]) -> tuple[Curve | None, Curve | None, dict[str, Any]]:
    """Of the held-out text and of training, and the last score on the way."""
    try:
        lines = read_metrics(path)
    except FileNotFoundError:
        return None, None, {}
    planned = (manifest.get("flops_per_token") or {}).get("training")
    trained = [line for line in lines if _is_number(line.get("loss")) and _is_number(line.get("tokens"))]
    scored = [line for line in lines if _is_number(line.get("val_bits_per_byte"))]
    spent = {axis: _column(trained, axis) for axis in AXES}
    if planned is not None and np.isnan(spent["flops"]).all():  # of a run from before they were counted
        spent["flops"] = spent["tokens"] * planned
    training = Curve(_column(trained, "bits_per_byte"), spent)
    held_out = Curve(_column(scored, "val_bits_per_byte"), _spent_on_scores(scored, spent))
    last = {}
    if scored:
        last = {key[4:]: value for key, value in scored[-1].items() if key.startswith("val_")}
        last["step"] = scored[-1].get("step", 0)
    return _known(held_out), _known(training), last


def _spent_on_scores(
    scored: list[dict[str, Any]], trained: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What a score does not say itself, as in earlier runs, lies in a straight line between the lines of training."""
    spent = {axis: _column(scored, axis) for axis in AXES}
    for axis in ("bytes", "flops"):
        missing = np.isnan(spent[axis])
        known = ~np.isnan(trained[axis])
        if missing.any() and known.any():
            xs, ys = np.append(0.0, trained["tokens"][known]), np.append(0.0, trained[axis][known])
            spent[axis][missing] = np.interp(spent["tokens"][missing], xs, ys, right=np.nan)
    return spent


def _known(curve: Curve) -> Curve | None:
    """Its points that are numbers and stand somewhere; None where there are none."""
    kept = np.isfinite(curve.bits) & (curve.spent["tokens"] > 0)
    if not kept.any():
        return None
    return Curve(curve.bits[kept], {axis: values[kept] for axis, values in curve.spent.items()})


def _column(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    return np.array(
        [value if _is_number(value := line.get(key)) else np.nan for line in lines], dtype=np.float64
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
