"""compare.html: the runs of a sweep on one page, which needs no network, no script library and no running server.

Bits per byte of the held-out text against what was spent on them: tokens, bytes, FLOPs and seconds, one curve a run
from its metrics.jsonl; and a table of the runs with the fields in which they differ.
"""

from __future__ import annotations

import bisect
import json
from html import escape
from pathlib import Path
from typing import Any

from trainer.run.files import write_atomically
from trainer.run.metrics import read_metrics
from trainer.view.charts import MAX_SERIES, Series
from trainer.view.curves import axis_buttons, figure
from trainer.view.format import duration, quantity
from trainer.view.report import page

__all__ = ["write_page"]

AXES = {"tokens": "tokens", "bytes": "bytes", "flops": "FLOPs", "seconds": "time"}
COLUMNS = {
    "parameters": quantity,
    "steps": "{:,}".format,
    "tokens": quantity,
    "bytes": quantity,
    "flops": quantity,
}


def write_page(folder: Path, varied: list[str], rows: list[dict[str, Any]]) -> Path:
    """Write `<folder>/compare.html` and return its path. `rows`: as `trainer.sweep.table.rows_of` gives them, best
    first."""
    path = folder / "compare.html"
    best = next((row for row in rows if row["comparable"]), None)
    title = f"Sweep of {len(rows)} runs" + (
        f": {best['bits_per_byte']:.3f} bits per byte at best" if best else ""
    )
    parts = {
        "AXIS": "tokens",
        "FACTS": f'<p class="where">{escape(str(folder))}</p>',
        "CURVES": _curves(folder, varied, rows),
        "SCORE": _table(varied, rows),
    }
    write_atomically(path, page(title, **parts))
    return path


# --- curves ---------------------------------------------------------------------------------------------


def _curves(folder: Path, varied: list[str], rows: list[dict[str, Any]]) -> str:
    """Of the best runs, as many as a chart has room for."""
    shown: list[tuple[str, list[dict[str, float]]]] = []
    for row in rows:
        if row["comparable"] and len(shown) < MAX_SERIES and (points := _points(folder / row["run"])):
            shown.append((_name(row, varied), points))
    if not shown:
        return ""
    drawn = {
        axis: [
            Series(name, [(p[axis], p["bits_per_byte"]) for p in points if axis in p], marked=True)
            for name, points in shown
        ]
        for axis in AXES
    }
    left = sum(row["comparable"] for row in rows) - len(shown)
    note = f'<p class="hint">The best {len(shown)} runs; {left} more are in the table.</p>' if left else ""
    heading = f'<h2>Held-out text <span class="axes">over {axis_buttons(AXES)}</span></h2>'
    hint = '<p class="hint">Scores along the way may be of less text than those in the table.</p>'
    return f"<section>{heading}{figure('Bits per byte', drawn)}{hint}{note}</section>"


def _name(row: dict[str, Any], varied: list[str]) -> str:
    given = [_field(row["fields"][name]) for name in varied if row["fields"][name] is not None]
    return f"{row['job']}: {' '.join(given)}" if given else row["job"]


def _points(run: Path) -> list[dict[str, float]]:
    """Scores along the way, each with what had been spent until then. FLOPs and bytes stand in the lines of training,
    which are read between."""
    try:
        lines = read_metrics(run)
    except (OSError, ValueError):
        return []
    trained = [line for line in lines if {"tokens", "bytes", "flops"} <= line.keys()]
    known = [{"tokens": 0, "bytes": 0, "flops": 0}, *trained]
    points = []
    for line in lines:
        if isinstance(line.get("val_bits_per_byte"), float):
            tokens = line["tokens"]
            point = {"tokens": tokens, "seconds": line["seconds"], "bits_per_byte": line["val_bits_per_byte"]}
            if tokens <= known[-1]["tokens"]:
                point |= {name: _between(known, tokens, name) for name in ("bytes", "flops")}
            points.append(point)
    return points


def _between(known: list[dict[str, float]], tokens: float, name: str) -> float:
    """The value at a number of tokens, in a straight line between the two nearest."""
    right = bisect.bisect_left([line["tokens"] for line in known], tokens)
    b, a = known[right], known[max(right - 1, 0)]
    share = (tokens - a["tokens"]) / ((b["tokens"] - a["tokens"]) or 1)
    return a[name] + share * (b[name] - a[name])


# --- the table ------------------------------------------------------------------------------------------


def _table(varied: list[str], rows: list[dict[str, Any]]) -> str:
    heads = [
        "job",
        *varied,
        "bits per byte",
        *(name.replace("flops", "FLOPs") for name in COLUMNS),
        "time",
        "",
    ]
    head = "".join(f"<th>{escape(name.removeprefix('model_cfg.'))}</th>" for name in heads)
    body = "".join(_line(row, varied) for row in rows)
    heading = "<h2>Runs <small>summary.csv, best first, lower is better</small></h2>"
    return f'<section>{heading}<div class="wide"><table class="runs"><tr>{head}</tr>{body}</table></div></section>'


def _line(row: dict[str, Any], varied: list[str]) -> str:
    cells = [row["job"], *(_field(row["fields"][name]) for name in varied)]
    bits = row["bits_per_byte"]
    cells.append("" if bits is None else ("<= " if row["kind"] == "bound" else "") + f"{bits:.3f}")
    cells += [form(row[name]) if row[name] is not None else "" for name, form in COLUMNS.items()]
    cells.append(duration(row["seconds"]) if row["seconds"] is not None else "")
    remarks = [f"{row['state']}: {row['why']}"] if row["state"] != "ok" else []
    remarks += [f"not comparable: {row['differs']}"] if bits is not None and not row["comparable"] else []
    remarks += ["shared the machine"] if row["shared"] else []
    inner = "".join(f"<td>{escape(text)}</td>" for text in cells)
    css = "" if row["comparable"] else ' class="other"'
    return f'<tr{css}>{inner}<td class="hint">{escape("; ".join(remarks))}</td></tr>'


def _field(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
