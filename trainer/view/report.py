"""report.html: a run on one page that needs no network, no script library and no running server.

Curves come from metrics.jsonl alone; score and yardsticks from summary.json; the rest is config.yaml,
manifest.json, annotation.json and samples.txt. What is absent (a run that was cut off) is left out.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

import yaml

from trainer.run.files import write_atomically
from trainer.run.metrics import read_metrics
from trainer.view.annotation import drawn
from trainer.view.curves import curves
from trainer.view.format import (
    YARDSTICK_NOTES,
    bits_per_byte,
    duration,
    printable,
    quantity,
    ranking,
    ranking_notes,
    score_lines,
)
from trainer.view.template import filled

__all__ = ["write_picture", "write_report"]

MAX_SAMPLES = 6
SAMPLE_CHARACTERS = 3000


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` and return its path.

    Raises FileNotFoundError without a metrics.jsonl, ValueError where a file of the run is damaged,
    OSError where the report cannot be written.
    """
    run_dir = Path(run_dir)
    summary, manifest = _read_json(run_dir / "summary.json"), _read_json(run_dir / "manifest.json")
    config = _read_yaml(run_dir / "config.yaml")
    metrics = read_metrics(run_dir)
    kind = summary.get("type") or config.get("type") or run_dir.resolve().name
    score = summary.get("score")
    title = f"{kind}: {bits_per_byte(score)} bits per byte" if score else str(kind)
    path = run_dir / "report.html"
    write_atomically(
        path,
        _page(
            title,
            FACTS=_facts(run_dir, summary, manifest),
            SCORE=_score(score, summary.get("yardsticks") or {}, summary.get("best")) if score else "",
            OVERLAP=_overlap(manifest.get("data", {}).get("overlap") or {}),
            CURVES=curves(metrics),
            ANNOTATION=drawn(_read_json(run_dir / "annotation.json"), "annotation.json"),
            SAMPLES=_samples(run_dir / "samples.txt"),
            SETTINGS=_table("Settings", "config.yaml", config),
            MANIFEST=_table("Manifest", "manifest.json", manifest),
        ),
    )
    return path


def write_picture(path: Path, title: str, annotation: dict[str, Any]) -> None:
    """Write a page that has nothing but what `trainer.annotate.annotation_of` made."""
    write_atomically(path, _page(title, ANNOTATION=drawn(annotation)))


def _page(title: str, **parts: str) -> str:
    """The template with its parts; those that are not given are empty."""
    return filled("report", title, ("report",), "report", **parts)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


# --- what was run ---------------------------------------------------------------------------------------


def _facts(run_dir: Path, summary: dict[str, Any], manifest: dict[str, Any]) -> str:
    """One row of cards: what the score cost."""
    counts = manifest.get("parameters", {})
    plan = manifest.get("flops_per_token", {}).get("training", 0.0) * summary.get("tokens", 0)
    # Counted along the way: what the data or a draw decided may not be what was planned.
    planned = plan if plan and abs(summary.get("flops", plan) / plan - 1) > 1e-3 else None
    # That of a GPU is the device's, beside which stands the host's.
    on_gpu = manifest.get("execution", {}).get("device") == "cuda"
    values = [
        ("parameters", quantity(counts["total"]) if "total" in counts else None),
        ("active per token", quantity(counts["active"]) if "active" in counts else None),
        ("steps", f"{summary['steps']:,}" if summary.get("steps") is not None else None),
        ("tokens", quantity(summary["tokens"]) if summary.get("tokens") is not None else None),
        ("training time", duration(summary["seconds"]) if summary.get("seconds") is not None else None),
        ("tokens/s", quantity(summary["tokens_per_second"]) if summary.get("tokens_per_second") else None),
        (
            "peak memory, device" if on_gpu else "peak memory",
            f"{quantity(summary['peak_memory_bytes'])}B" if summary.get("peak_memory_bytes") else None,
        ),
        (
            "memory, host" if on_gpu else "of no file",
            f"{quantity(summary['anonymous_memory_bytes'])}B"
            if summary.get("anonymous_memory_bytes")
            else None,
        ),
        ("FLOPs", quantity(summary["flops"]) if summary.get("flops") else None),
        ("FLOPs planned", quantity(planned) if planned else None),
        ("device", manifest.get("environment", {}).get("device")),
    ]
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in values if value
    )
    return f'<p class="where">{escape(str(run_dir))}</p><dl class="facts">{cards}</dl>'


# --- the score ------------------------------------------------------------------------------------------


def _score(score: dict[str, Any], yardsticks: dict[str, float], best: dict[str, Any] | None) -> str:
    """Bars from zero, best on top, ours marked."""
    rows = ranking(score, yardsticks, best)
    longest = max(value for _, value, _, _ in rows)
    bars = "".join(
        f'<tr class="{"ours" if ours else ""}"><th>{escape(name)}</th>'
        f'<td class="bar"><i style="width:{100 * value / longest:.1f}%"></i></td>'
        f'<td class="number">{escape(number)}</td>'
        f'<td class="hint">{escape(YARDSTICK_NOTES.get(name, ""))}</td></tr>'
        for name, value, number, ours in rows
    )
    notes = [*ranking_notes(score, yardsticks), *(f"{name}: {text}" for name, text in score_lines(score))]
    text = "".join(f'<p class="hint">{escape(note)}</p>' for note in notes)
    heading = "<h2>Score <small>bits per byte of the held-out text, lower is better</small></h2>"
    return f'<section>{heading}<table class="bars">{bars}</table>{text}</section>'


def _overlap(found: dict[str, Any]) -> str:
    """How much of the held-out text stands in training, and the worst documents."""
    if not found:
        return ""
    dropped, about = found["dropped"], "about " if found["estimate"] else ""
    text = f"{about}{found['share_in_training']:.1%} of the held-out bytes"
    if dropped["documents"]:
        text += (
            f", after {dropped['documents']:,} near copies ({dropped['bytes']:,} bytes) were dropped; "
            f"{found['share_in_training_before_dropping']:.1%} with them"
        )
    rows = "".join(
        f"<tr><th>{escape(one['document'])}</th><td>{one['share']:.0%} of {one['bytes']:,} bytes"
        f"{', dropped' if one['dropped'] else ''}</td></tr>"
        for one in found["worst"]
    )
    heading = "<h2>Held-out text that also stands in training <small>near_copies</small></h2>"
    return f'<section>{heading}<p class="hint">{escape(text)}</p><table>{rows}</table></section>'


# --- samples and tables ---------------------------------------------------------------------------------


def _samples(path: Path) -> str:
    """The newest samples, newest first."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    chunks = ["--- step " + chunk for chunk in text.split("--- step ") if chunk.strip()]
    shown = []
    for index, chunk in enumerate(reversed(chunks[-MAX_SAMPLES:])):
        head, _, body = chunk.partition("\n")
        body = printable(body.strip("\n"))
        cut = body[:SAMPLE_CHARACTERS] + (" [...]" if len(body) > SAMPLE_CHARACTERS else "")
        shown.append(
            f"<details{' open' if index == 0 else ''}><summary>{escape(head.strip('- '))}</summary>"
            f"<pre>{escape(cut)}</pre></details>"
        )
    return f"<section><h2>Samples <small>samples.txt</small></h2>{''.join(shown)}</section>" if shown else ""


def _table(title: str, source: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(text)}</td></tr>"
        for key, text in _flatten(values)
        if text != ""
    )
    if not rows:
        return ""
    heading = f"<summary><h2>{title} <small>{source}</small></h2></summary>"
    return f"<section><details>{heading}<table>{rows}</table></details></section>"


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys; lists of mappings by index; other lists as JSON."""
    if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        value = {str(index): entry for index, entry in enumerate(value)}
    if isinstance(value, dict):
        return [
            row
            for key, entry in value.items()
            for row in _flatten(entry, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, value if isinstance(value, str) else json.dumps(value))]
