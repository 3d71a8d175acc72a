"""compare.html and compare.md.

The page is under 500 KB whatever it compares: tables and texts are cut to what a reader gets through, and curves get
the room that is left. It says what it leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.run.files import write_atomically
from trainer.view.charts import style
from trainer.view.comparison.markdown import markdown
from trainer.view.comparison.runs import Run
from trainer.view.comparison.table import (
    CONTEXT,
    OF_TIME,
    SCORE,
    Group,
    cells,
    columns,
    columns_of,
    fields,
    groups_of,
    remarks,
    short,
    shorten,
    value,
)
from trainer.view.comparison.thinning import LEAST, packed, thinned
from trainer.view.format import printable, quantity
from trainer.view.template import filled

__all__ = ["by_score", "write_pages"]

ROOM = 490_000  # bytes of a page
MOST_RUNS = 200  # of a page
MOST_FIELDS = 60
MOST_GROUPS = 40  # with a bar of parameters
MOST_SAMPLES = 60
ROOM_OF_SAMPLES = 40_000  # characters
LONGEST_SAMPLE = 2_000
POINTS = 2_000  # of a curve, at most
A_POINT, HEAD = 2.7 * 5, 160  # bytes of a point, and of a curve beside them
COLOURS = 18  # of groups that are told apart


def write_pages(path: Path, title: str, runs: Sequence[Run], where: str) -> None:
    """Write the page to `path`, and Markdown beside it. `runs`: as `set_apart` has left them; `where`: a line on where
    they are from."""
    title, where, ordered = printable(title), printable(where), by_score(runs)
    groups = groups_of(ordered)
    write_atomically(path, _page(title, ordered[:MOST_RUNS], groups, where, len(ordered)))
    write_atomically(path.with_suffix(".md"), markdown(title, ordered, groups, where))


def by_score(runs: Sequence[Run]) -> list[Run]:
    """The best first, then those that are set apart, then those without a score."""
    return sorted(runs, key=lambda run: (not run.score, bool(run.apart), run.score.get("bits_per_byte", 0.0)))


def _page(title: str, runs: list[Run], groups: list[Group], where: str, of: int) -> str:
    styles = {id(run): number for number, group in enumerate(groups) for run in group.runs}
    together = [run for run in runs if not run.apart]
    apart = [run for run in runs if run.apart]
    left_out = (
        f" The best {len(runs)} of {of} runs are on this page; compare --json has all."
        if of > len(runs)
        else ""
    )
    parts = {
        "FACTS": f'<p class="where">{escape(where)}{left_out}</p>',
        "CURVES": _chart(runs),
        "RUNS": _runs("Runs", _believed(together), together, runs, styles),
        "APART": _runs("Set apart", APART, apart, runs, styles),
        "ROLES": _roles(groups),
        "FIELDS": _fields(runs),
        "SAMPLES": _samples(runs),
    }
    texts = {"template": "compare", "styles": ("report", "compare"), "script": "compare"}
    rest = len(filled(title=title, **texts, **parts).encode())  # type: ignore[arg-type]
    data = _data(runs, groups, styles, ROOM - rest)
    return filled(title=title, **texts, **parts, DATA=data)  # type: ignore[arg-type]


# --- curves ---------------------------------------------------------------------------------------------

APART = "not comparable with the runs above"
AXES = {"tokens": "tokens", "bytes": "bytes", "flops": "FLOPs", "seconds": "time"}
TURNS = {"logx": "log x", "logy": "log y"}


def _chart(runs: list[Run]) -> str:
    lengths = [len(curve) for run in runs for curve in (run.held_out, run.training) if curve]
    if not lengths:
        return ""
    axes = "".join(
        f'<button type="button" data-set="axis" data-value="{k}">{v}</button>' for k, v in AXES.items()
    )
    which = "".join(
        f'<button type="button" data-set="curve" data-value="{name}">{text}</button>'
        for name, text in (("held_out", "held-out text"), ("training", "training"))
    )
    turns = "".join(f'<button type="button" data-turn="{k}">{v}</button>' for k, v in TURNS.items())
    if any(run.apart or run.slow or run.aside for run in runs):
        turns += '<button type="button" data-turn="apart">those set apart</button>'
    slider = '<label>smoothing <input type="range" id="smooth" min="0" max="1" step="0.02" value="0"></label>'
    switches = (
        f'<div class="bar-of-switches"><div>{which}</div><div>over {axes}</div><div>{turns}</div>{slider}'
        '<button type="button" id="whole" disabled>whole</button></div>'
    )
    svg = '<svg role="img" aria-label="bits per byte against what was spent" viewBox="0 0 900 420"></svg>'
    hint = (
        '<p class="hint"><span class="how">Drag over the chart to look closer, double-click to see the whole. '
        "Click a name to hide its curve.</span> Hollow points and ≤ mark upper bounds: the model may be better. "
        "Scores on the way may be of fewer documents "
        'than those in the table. <span id="thinned"></span></p><p class="hint" id="told"></p>'
    )
    return (
        f"<section><h2>Bits per byte <small>lower is better</small></h2>{switches}"
        f'<figure id="chart">{svg}<div id="tip" hidden></div><div class="keys" id="keys"></div></figure>'
        f"{hint}</section>"
    )


def _data(runs: list[Run], groups: list[Group], styles: dict[int, int], room: int) -> str:
    """For the script. No text in it ends the element that it stands in."""
    curves = [curve for run in runs for curve in (run.held_out, run.training) if curve]
    shown = {styles[id(run)] for run in runs}
    found: dict[str, Any] = {
        "start": "held_out" if any(run.held_out and len(run.held_out) > 1 for run in runs) else "training",
        "entropy": _entropies(runs),
        "groups": [{"name": group.name} for number, group in enumerate(groups) if number in shown],
        "runs": [
            {
                "name": shorten(run.name),
                "group": styles[id(run)],
                "apart": bool(run.apart),
                "slow": bool(run.slow),
                "aside": bool(run.aside),
                "bound": run.score.get("kind") == "bound",
            }
            for run in runs
        ],
    }
    room -= len(_json(found).encode()) + 200
    lengths = sorted(len(curve) for curve in curves)
    points = _points(lengths, room - HEAD * len(curves), A_POINT)
    drawn = _drawn(runs, points)
    if lengths and lengths[-1] > points:  # what is in proportion to something else took no room: once more
        of_a_point = (len(_json(drawn)) - HEAD * len(curves)) / sum(min(one, points) for one in lengths)
        more = _points(lengths, 0.97 * room - HEAD * len(curves), max(of_a_point, 1.0))
        if len(_json(again := _drawn(runs, more))) <= room:
            points, drawn = more, again
    thinner = [one for one in lengths if one > points]
    found["thinned"] = (
        f"Of {len(thinner)} curves of up to {max(thinner):,} points, {points:,} each are drawn, the lowest and the "
        "highest of every stretch among them; compare --json has all."
        if thinner
        else ""
    )
    found["runs"] = [told | own for told, own in zip(found["runs"], drawn, strict=True)]
    return _json(found)


def _points(lengths: list[int], room: float, of_a_point: float) -> int:
    """Of a curve, at most: shorter ones leave their share to the longer ones. `lengths`: the shortest first."""
    points, left = POINTS, room / of_a_point
    for done, length in enumerate(lengths):
        points = max(LEAST, min(POINTS, int(left / (len(lengths) - done))))
        if length > points:
            break
        left -= length
    return points


def _drawn(runs: list[Run], points: int) -> list[dict[str, Any]]:
    return [
        {
            name: packed(thinned(curve, points))
            for name, curve in (("held_out", run.held_out), ("training", run.training))
            if curve
        }
        for run in runs
    ]


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _entropies(runs: list[Run]) -> list[float]:
    """Of the texts of the runs that compare."""
    return sorted({run.entropy for run in runs if run.entropy is not None and not run.apart})


# --- tables ---------------------------------------------------------------------------------------------


def _believed(runs: list[Run]) -> str:
    """How much a score may be believed, in a heading."""
    told = "best first"
    if spreads := [s for run in runs if (s := run.score.get("documents_standard_error"))]:
        told += f"; other documents of the kind would move a score by about {max(spreads):.3f}"
    if len({cells(run)[CONTEXT] for run in runs}) > 1:
        told += "; not all see as much of the text before, see context"
    return told


def _runs(title: str, about: str, shown: list[Run], runs: list[Run], styles: dict[int, int]) -> str:
    if not shown:
        return ""
    varied = columns(runs)
    places = {id(run): place for place, run in enumerate(runs)}
    of_all = [cells(run, varied) for run in shown]
    names = columns_of(of_all)
    # Why they are set apart is what to know of them first.
    first = about == APART
    head = "<th>run</th>" + "<th>why</th>" * first
    head += "".join(
        f"<th>{escape(short(name))}</th>" if name in varied else f'<th class="n">{escape(name)}</th>'
        for name in names
    )
    head += "<th></th>" * (not first)
    body = "".join(
        _row(run, places[id(run)], styles[id(run)], varied, {name: one[name] for name in names}, first)
        for run, one in zip(shown, of_all, strict=True)
    )
    heading = f"<h2>{escape(title)} <small>{escape(about)}</small></h2>"
    css = ' class="apart"' if about == APART else ""
    table = f'<table class="runs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<section{css}>{heading}<div class="wide">{table}</div></section>'


def _row(run: Run, place: int, number: int, varied: list[str], shown: dict[str, str], first: bool) -> str:
    why = f'<td class="hint">{escape("; ".join(remarks(run)))}</td>'
    row = f'<td><i class="{_style(number)}"></i>{escape(shorten(run.name))}</td>' + why * first
    for name, text in shown.items():
        css = "" if name in varied else "n score" if name == SCORE else "n"
        css += " less" if name in OF_TIME and run.slow else ""
        row += f'<td class="{css}">{escape(text)}</td>' if css else f"<td>{escape(text)}</td>"
    return f'<tr data-run="{place}">{row}{"" if first else why}</tr>'


def _style(number: int) -> str:
    return style(number) if number < COLOURS else "rest"


def _roles(groups: list[Group]) -> str:
    """A bar for each group, as long as its runs have parameters."""
    counted = [(group, group.runs[0].parameters) for group in groups]
    counted = [(group, counts) for group, counts in counted if counts.get("by_role") and counts.get("total")]
    if not counted:
        return ""
    roles = list(dict.fromkeys(role for _, counts in counted for role in counts["by_role"]))
    styles = {role: f"s{index}" if index < 6 else "r6" for index, role in enumerate(roles)}
    most = max(counts["total"] for _, counts in counted)
    rows = ""
    for group, counts in counted[:MOST_GROUPS]:
        shares = [(role, n) for role, n in counts["by_role"].items() if n]
        parts = "".join(
            f'<i class="{styles[role]}" style="width:{100 * n / counts["total"]:.2f}%" '
            f'title="{escape(role)} {n:,}"></i>'
            for role, n in shares
        )
        told = " · ".join(f"{escape(role)} {quantity(n)}" for role, n in shares)
        rows += (
            f'<div class="name">{escape(group.name)}</div><div><div class="stack" '
            f'style="width:{max(1.0, 100 * counts["total"] / most):.1f}%">{parts}</div>'
            f'<div class="total">{quantity(counts["total"])}: {told}</div></div>'
        )
    legend = "".join(
        f'<span class="hint"><i class="{css}" style="display:inline-block;height:10px"></i> {escape(role)}</span>'
        for role, css in styles.items()
    )
    more = (
        f'<p class="hint">{MOST_GROUPS} of {len(counted)} are drawn</p>' if len(counted) > MOST_GROUPS else ""
    )
    return (
        f'<section><h2>Parameters by role</h2><div class="keys" style="gap:4px 16px">{legend}</div>'
        f'<div class="roles">{rows}</div>{more}</section>'
    )


def _fields(runs: list[Run]) -> str:
    """Few runs have a column each; of many it is listed who has which value."""
    found = fields(runs)
    if not found:
        return ""
    heading = "<h2>What differs in the settings <small>config.yaml</small></h2>"
    more = (
        f'<p class="hint">{MOST_FIELDS} of {len(found)} fields are shown</p>'
        if len(found) > MOST_FIELDS
        else ""
    )
    if len(runs) <= 6:
        head = "".join(f"<th>{escape(shorten(run.name))}</th>" for run in runs)
        rows = "".join(
            f"<tr><th>{escape(name)}</th>"
            + "".join(
                f"<td>{escape(value(run.config[name]) if name in run.config else '–')}</td>" for run in runs
            )
            + "</tr>"
            for name, _ in found[:MOST_FIELDS]
        )
    else:
        head = "<th>value: runs</th>"
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape('; '.join(_holders(values)))}</td></tr>"
            for name, values in found[:MOST_FIELDS]
        )
    table = f'<table class="fields"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<section>{heading}<div class="wide">{table}</div>{more}</section>'


def _holders(values: list[tuple[str, list[str]]]) -> list[str]:
    told = [
        f"{given}: {', '.join(shorten(name, 30) for name in names[:3])}"
        + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for given, names in values[:8]
    ]
    return [*told, f"{len(values) - 8} more values"] if len(values) > 8 else told


# --- samples --------------------------------------------------------------------------------------------


def _samples(runs: list[Run]) -> str:
    """The last text of each."""
    written = [run for run in runs if run.sample]
    if not written:
        return ""
    shown = written[:MOST_SAMPLES]
    room = min(LONGEST_SAMPLE, ROOM_OF_SAMPLES // len(shown))
    parts = ""
    for place, run in enumerate(shown):
        text = printable(run.sample[: room + 1])
        cut = text if len(text) <= room else text[:room] + " [...]"
        told = escape(f"{shorten(run.name, 120)} · {score_of(run)}")
        parts += f"<details{' open' if place < 2 else ''}><summary>{told}</summary><pre>{escape(cut)}</pre></details>"
    more = f'<p class="hint">of {len(shown)} of {len(written)} runs</p>' if len(shown) < len(written) else ""
    return f"<section><h2>Samples <small>the last of each run</small></h2>{more}{parts}</section>"


def score_of(run: Run) -> str:
    return cells(run)[SCORE] or "no score"
