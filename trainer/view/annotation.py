"""What a model did with a text, drawn: stretches as marked text, maps as SVG, from the plain values that were kept.

Every mark and cell is told apart by more than its colour: marks by their lines and labels, cells by lightness alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

from trainer.view.charts import style
from trainer.view.format import printable

__all__ = ["drawn"]

MAX_DRAWN = 12  # of the stretches, and of the maps; of more the first, the last, and some evenly between
LEVELS = 8  # of a map's values that the eye is to tell apart
WIDTH, LEFT, BOTTOM = 720, 96, 34  # of a map, with room for labels
LEAST, MOST, TALLEST = 3.0, 18.0, 360.0  # heights: of a row, and of all rows where they fit
LABEL = 15  # pixels that a label takes in height, and
WIDE = 58  # in width
CUT = 12  # characters of a label


def drawn(found: dict[str, Any]) -> str:
    """A <section> of what `trainer.annotate.annotation_of` made; "" of nothing."""
    if not found:
        return ""
    text = found["text"].encode()
    starts = [start for start, _ in found["tokens"]]
    tokens = [text[start:end] for start, end in found["tokens"]]
    pictures = [
        _group(found["spans"], lambda one: _marked(one, text, [*starts, len(text)])),
        _group(found["maps"], lambda of: _map(of, tokens)),
    ]
    heading = "<h2>What the model did with a text <small>annotation.json</small></h2>"
    about = f"the beginning of a held-out document: {len(tokens):,} tokens, {len(text):,} bytes"
    return f'<section>{heading}<p class="hint">{about}</p>{"".join(pictures)}</section>'


def _group(pictures: list[dict[str, Any]], draw: Callable[[dict[str, Any]], str]) -> str:
    """The first is open; where some are left out it is said."""
    count = min(MAX_DRAWN, len(pictures))
    places = [i * (len(pictures) - 1) // max(1, count - 1) for i in range(count)]
    shown = "".join(
        f"<details{' open' if place == 0 else ''}><summary>{_line(pictures[place]['name'])}</summary>"
        f"{draw(pictures[place])}</details>"
        for place in places
    )
    left_out = f'<p class="hint">{count} of {len(pictures)} are drawn; annotation.json has all</p>'
    return shown + (left_out if count < len(pictures) else "")


def _line(text: str | bytes) -> str:
    return escape(printable(text).replace("\n", "↵"))


# --- stretches ------------------------------------------------------------------------------------------


def _marked(one: dict[str, Any], text: bytes, starts: list[int]) -> str:
    """The text with its spans marked: a label's are of one style, spans without labels take turns. `starts`: of tokens,
    and the end of the text."""
    labels = sorted({label for _, _, label in one["spans"] if label}, key=_by_number)
    styles = {label: style(index) for index, label in enumerate(labels)}
    parts, before = [], 0
    for index, (start, end, label) in enumerate(one["spans"]):
        first, last = starts[start], starts[end]
        parts.append(escape(printable(text[before:first])))
        # A line's end has no width of its own.
        marked = escape(printable(text[first:last]).replace("\n", "↵\n"))
        title = f' title="{_line(label)}"' if label else ""
        parts.append(f'<mark class="{styles.get(label) or style(index % 2)}"{title}>{marked}</mark>')
        before = last
    parts.append(escape(printable(text[before:])))
    legend = "".join(f'<span><mark class="{styles[label]}">{_line(label)}</mark></span>' for label in labels)
    share = sum(starts[end] - starts[start] for start, end, _ in one["spans"]) / max(1, len(text))
    told = f"{len(one['spans']):,} marked, {share:.0%} of the bytes"
    return f'<p class="hint legend"><span>{told}</span>{legend}</p><pre class="marked">{"".join(parts)}</pre>'


def _by_number(label: str) -> tuple[bool, int, str]:
    return (False, int(label), "") if label.isdecimal() else (True, 0, label)


# --- maps -----------------------------------------------------------------------------------------------


def _map(of: dict[str, Any], tokens: list[bytes]) -> str:
    """Cells of one lightness are one path, and neighbours in a row one rectangle, so that a page with many stays
    small."""
    values = of["values"]
    most = max(max(row) for row in values)
    rows, columns = len(values), len(values[0])
    height = min(MOST, max(LEAST, TALLEST / rows))
    width = (WIDTH - LEFT) / columns
    paths: dict[int, list[str]] = {}
    for r, row in enumerate(values):
        levels = [math.ceil(LEVELS * value / most) if most else 0 for value in row]
        c = 0
        while c < columns:
            end = c
            while end < columns and levels[end] == levels[c]:
                end += 1
            if levels[c]:
                paths.setdefault(levels[c], []).append(f"M{c} {r}h{end - c}v1h{c - end}z")
            c = end
    cells = "".join(
        f'<path fill-opacity="{level / LEVELS:g}" d="{"".join(paths[level])}"/>' for level in sorted(paths)
    )
    tall = rows * height
    names = [of["row_labels"] or tokens, of["column_labels"] or tokens]
    parts = [
        f'<svg class="map" viewBox="0 0 {WIDTH} {tall + BOTTOM:.1f}" role="img" '
        f'aria-label="{_line(of["name"])}: {_line(of["rows"])} by {_line(of["columns"])}">',
        f'<rect class="grid" x="{LEFT}" y="0" width="{WIDTH - LEFT}" height="{tall:.1f}"/>',
        f'<g class="s0 cells" transform="translate({LEFT} 0) scale({width:.4f} {height:.4f})">{cells}</g>',
    ]
    for r in _places(rows, height, LABEL):
        parts.append(
            f'<text class="y" x="{LEFT - 8}" y="{(r + 0.5) * height + 4:.1f}">{_label(names[0], r)}</text>'
        )
    for c in _places(columns, width, WIDE):
        at = LEFT + (c + 0.5) * width
        parts.append(f'<text class="x" x="{at:.1f}" y="{tall + 16:.1f}">{_label(names[1], c)}</text>')
    parts.append("</svg>")
    told = (
        f"{rows:,} rows: {_line(of['rows'])}; {columns:,} columns: {_line(of['columns'])}; "
        f"from 0 (empty) to {most:g} (full)"
    )
    return f'<figure><p class="hint">{told}</p>{"".join(parts)}</figure>'


def _places(count: int, size: float, room: float) -> range:
    """Which of `count` rows or columns of that size are named, so that labels have room."""
    return range(0, count, max(1, -int(-room // size)))


def _label(names: list[Any], place: int) -> str:
    name = printable(names[place]).replace("\n", "↵")
    if isinstance(names[place], bytes):
        name = name.strip() or "␣"
    return escape(name if len(name) <= CUT else name[: CUT - 1] + "…")
