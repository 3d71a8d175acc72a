"""What a model did with a text, drawn: stretches as marked text, maps as SVG, from the plain values that were kept.

Every mark and cell is told apart by more than its colour: marks by their lines and labels, cells by lightness alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from html import escape
from itertools import groupby
from typing import Any

from trainer.view.charts import MAX_SERIES, style
from trainer.view.format import printable

__all__ = ["drawn"]

MAX_DRAWN = 12  # of the stretches, and of the maps; of more the first, the last, and some evenly between
LEVELS = 8  # of a map's values that the eye is to tell apart
WIDTH, BOTTOM = 1000, 22  # of a map, and of the room for labels of columns
CHARACTER = 8  # pixels of a character, at most
LEAST, MOST, TALLEST = 1.5, 18.0, 360.0  # heights: of a row, and of all rows where they fit
LABEL = 15  # pixels that a label takes in height, and
WIDE = 58  # in width
CUT = 14  # characters of a label, of a row; of a column as many as have room


def drawn(found: dict[str, Any], source: str = "") -> str:
    """A <section> of what `trainer.annotate.annotation_of` made; "" of nothing. `source`: the file that it is in."""
    if not found:
        return ""
    text = found["text"].encode()
    starts = [start for start, _ in found["tokens"]]
    # A token alone says little of where it stands.
    tokens = [text[start : start + 4 * CUT].decode("utf-8", errors="ignore") for start in starts]
    pictures = [
        _group(found["spans"], lambda one: _marked(one, text, [*starts, len(text)])),
        _group(found["maps"], lambda of: _map(of, tokens)),
    ]
    heading = f"<h2>What the model did with a text <small>{escape(source)}</small></h2>"
    about = f"the beginning of a document of the scored text: {len(tokens):,} tokens, {len(text):,} bytes"
    shown = f'{heading}<p class="hint">{about}</p>{"".join(pictures)}'
    return (
        f"<section data-tokens='{_names(tokens)}'>{shown}</section>"
        if found["maps"]
        else f"<section>{shown}</section>"
    )


def _names(names: list[str]) -> str:
    """For the page's script, within single quotes."""
    return escape(json.dumps([_label(name, CUT) for name in names], ensure_ascii=False))


def _group(pictures: list[dict[str, Any]], draw: Callable[[dict[str, Any]], str]) -> str:
    """The first is open; where some are left out it is said."""
    count = min(MAX_DRAWN, len(pictures))
    places = [i * (len(pictures) - 1) // max(1, count - 1) for i in range(count)]
    shown = "".join(
        f"<details{' open' if place == 0 else ''}><summary>{_line(pictures[place]['name'])}</summary>"
        f"{draw(pictures[place])}</details>"
        for place in places
    )
    left_out = f'<p class="hint">{count} of {len(pictures)} are drawn</p>'
    return shown + (left_out if count < len(pictures) else "")


def _line(text: str | bytes) -> str:
    return escape(printable(text).replace("\n", "↵"))


# --- stretches ------------------------------------------------------------------------------------------


def _marked(one: dict[str, Any], text: bytes, starts: list[int]) -> str:
    """The text with its spans marked: a label's are of one style, spans without labels take turns. `starts`: of tokens,
    and the end of the text."""
    labels = sorted({label for _, _, label in one["spans"] if label}, key=_by_number)
    styles = {label: style(index) for index, label in enumerate(labels)}
    written = len(labels) > MAX_SERIES  # no two of fewer look alike
    parts, before = [], 0
    for index, (start, end, label) in enumerate(one["spans"]):
        first, last = starts[start], starts[end]
        parts.append(escape(printable(text[before:first])))
        # A line's end has no width of its own.
        marked = escape(printable(text[first:last]).replace("\n", "↵\n"))
        title = f' title="{_line(label)}"' if label else ""
        number = f"<sup>{_line(label)}</sup>" if written and label else ""
        parts.append(f'<mark class="{styles.get(label) or style(index % 2)}"{title}>{number}{marked}</mark>')
        before = last
    parts.append(escape(printable(text[before:])))
    legend = "".join(f'<span><mark class="{styles[label]}">{_line(label)}</mark></span>' for label in labels)
    share = sum(starts[end] - starts[start] for start, end, _ in one["spans"]) / max(1, len(text))
    told = f"{len(one['spans']):,} marked, {share:.0%} of the bytes"
    return f'<p class="hint legend"><span>{told}</span>{legend}</p><pre class="marked">{"".join(parts)}</pre>'


def _by_number(label: str) -> tuple[bool, int, str]:
    return (False, int(label), "") if label.isdecimal() else (True, 0, label)


# --- maps -----------------------------------------------------------------------------------------------


def _map(of: dict[str, Any], tokens: list[str]) -> str:
    """The values as cells, with as many names of rows and columns as have room; the page's script tells the others."""
    values = of["values"]
    most = max(max(row) for row in values)
    rows, columns = len(values), len(values[0])
    height = min(MOST, max(LEAST, TALLEST / rows))
    row_names, column_names = of["row_labels"] or tokens, of["column_labels"] or tokens
    named = {r: _label(row_names[r], CUT) for r in _places(rows, height, LABEL)}
    left = 8 + CHARACTER * max(len(name) for name in named.values())
    width = (WIDTH - left) / columns
    tall = rows * height
    own = "".join(
        f" data-{what}='{_names(of[labels])}'"
        for what, labels in (("rows", "row_labels"), ("columns", "column_labels"))
        if of[labels]
    )
    parts = [
        f'<svg class="map" viewBox="0 0 {WIDTH} {tall + BOTTOM:.1f}" role="img" '
        f'aria-label="{_line(of["name"])}: {_line(of["rows"])} by {_line(of["columns"])}" '
        f'data-frame="{left} {tall:.1f}" data-size="{rows} {columns}"{own}>',
        f'<rect class="grid" x="{left}" y="0" width="{WIDTH - left}" height="{tall:.1f}"/>',
        f'<g class="s0 cells" transform="translate({left} 0) scale({width:.4f} {height:.4f})">'
        f"{_cells(values, most)}</g>",
    ]
    parts += [
        f'<text class="y" x="{left - 8}" y="{(r + 0.5) * height + 4:.1f}">{escape(name)}</text>'
        for r, name in named.items()
    ]
    for c in _places(columns, width, WIDE):
        name, at = _label(column_names[c], WIDE // CHARACTER), left + (c + 0.5) * width
        parts.append(f'<text class="x" x="{at:.1f}" y="{tall + 16:.1f}">{escape(name)}</text>')
    parts.append("</svg>")
    told = (
        f"{rows:,} rows: {_line(of['rows'])}; {columns:,} columns: {_line(of['columns'])}; "
        f"from 0 (empty) to {most:g} (full)"
    )
    return f'<figure><p class="hint">{told}</p><output></output>{"".join(parts)}</figure>'


def _cells(values: list[list[float]], most: float) -> str:
    """Cells of one lightness are one path, and neighbours in a row one rectangle, so that a page with many stays
    small."""
    paths: dict[int, list[str]] = {}
    for r, row in enumerate(values):
        levels = [math.ceil(LEVELS * value / most) if most else 0 for value in row]
        c = 0
        for level, run in groupby(levels):
            length = len([*run])
            if level:
                paths.setdefault(level, []).append(f"M{c} {r}h{length}v1h{-length}z")
            c += length
    return "".join(
        f'<path fill-opacity="{level / LEVELS:g}" d="{"".join(paths[level])}"/>' for level in sorted(paths)
    )


def _places(count: int, size: float, room: float) -> range:
    """Which of `count` rows or columns of that size are named, so that labels have room."""
    return range(0, count, max(1, -int(-room // size)))


def _label(name: str, length: int) -> str:
    """Of a row or a column: its own, or the text that begins with its token."""
    shown = printable(name).replace("\n", "↵")
    return shown if len(shown) <= length else shown[: length - 1] + "…"
