"""The curves of a report: which charts a run has, from the lines of its metrics.jsonl alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from trainer.run.lines import is_own_name
from trainer.view.charts import MAX_SERIES, Chart, Series, style

__all__ = ["axis_buttons", "curves", "figure"]

Line = dict[str, Any]
Curve = tuple[str, str, bool]  # key of a line, name in the legend, whether points are marked
Wanted = tuple[str, list[Curve]]  # title of a chart, its curves
AXES = {"step": "steps", "tokens": "tokens", "seconds": "time"}


def curves(metrics: list[Line]) -> str:
    """Charts, each drawn once per x axis; the page shows one axis at a time. Nothing where nothing was logged."""
    figures = []
    for title, wanted in [*_charts_of_the_trainer(metrics), *_charts_of_the_adapter(metrics)]:
        drawn = {
            axis: [
                s for key, name, marked in wanted if (s := _series(metrics, axis, key, name, marked)).points
            ]
            for axis in AXES
        }
        if any(drawn.values()):
            figures.append(figure(title, drawn))
    if not figures:
        return ""
    heading = f'<h2>Curves <span class="axes">over {axis_buttons(AXES)}</span></h2>'
    return f'<section>{heading}<div class="charts">{"".join(figures)}</div></section>'


def axis_buttons(axes: Mapping[str, str]) -> str:
    """A button for each x axis: the one pressed is shown in all charts. `axes`: names on them."""
    return "".join(f'<button type="button" data-axis="{axis}">{name}</button>' for axis, name in axes.items())


# --- which ----------------------------------------------------------------------------------------------


def _charts_of_the_trainer(metrics: list[Line]) -> list[Wanted]:
    terms = [key for key in _keys(metrics, "loss_") if key != "loss_scale"]
    return [
        ("Bits per byte", [("bits_per_byte", "training", False), ("val_bits_per_byte", "held out", True)]),
        ("Loss", [("loss", "training, nats per token", False), ("val_nats_per_token", "held out", True)]),
        # A single term is the loss.
        ("Loss terms", [(k, k.removeprefix("loss_"), False) for k in terms] if len(terms) > 1 else []),
        (
            "Learning rate",
            [(ks[0], ", ".join(k.removeprefix("lr/") for k in ks), False) for ks in _equal_rates(metrics)],
        ),
        ("Gradient norm", [("grad_norm", "before clipping", False)]),
        ("Loss scale", [("loss_scale", "of fp16", False)]),
        ("Tokens per second", [("tokens_per_second", "over the log interval", False)]),
        ("Share of the device's peak", [("mfu", "over the log interval", False)]),
    ]


def _equal_rates(metrics: list[Line]) -> list[list[str]]:
    """Keys of the learning rates, those that never differ together: one curve would hide the other."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key in sorted(_keys(metrics, "lr/")):
        groups.setdefault(tuple(line.get(key) for line in metrics), []).append(key)
    return list(groups.values())


def _charts_of_the_adapter(metrics: list[Line]) -> Iterator[Wanted]:
    """Every metric, in training and on held-out text. Those that differ in a number at their end (`load_0`, `load_1`)
    share a chart, and have another for held-out text."""
    keys = [key for key in _keys(metrics) if is_own_name(key)]
    families: dict[str, list[str]] = {}  # what stands before the number -> names
    for name in dict.fromkeys(key.removeprefix("val_") for key in keys):
        families.setdefault(re.sub(r"\d+$", "", name), []).append(name)
    for stem, names in families.items():
        if len(names) == 1:
            both: list[Curve] = [(names[0], "training", False), (f"val_{names[0]}", "held out", True)]
            yield names[0], [curve for curve in both if curve[0] in keys]
            continue
        title = stem.rstrip("_/. ") or "Metrics"
        for before, where, marked in (("", "training", False), ("val_", "held out", True)):
            found = [
                (before + name, name.removeprefix(stem), marked) for name in names if before + name in keys
            ]
            yield from ((f"{title}, {where}", part) for part in _equal_parts(found))


def _equal_parts(curves: list[Curve]) -> Iterator[list[Curve]]:
    """As few as a chart has room for."""
    size = math.ceil(len(curves) / max(1, math.ceil(len(curves) / MAX_SERIES)))
    return (curves[start : start + size] for start in range(0, len(curves), max(1, size)))


def _keys(metrics: list[Line], beginning: str = "") -> list[str]:
    """Names of numbers, in the order in which they first appear."""
    return list(
        dict.fromkeys(k for line in metrics for k in line if k.startswith(beginning) and _number(line, k))
    )


# --- how ------------------------------------------------------------------------------------------------


def _series(metrics: list[Line], axis: str, key: str, name: str, marked: bool) -> Series:
    points = [
        (float(line[axis]), float(line[key]))
        for line in metrics
        if _number(line, axis) and _number(line, key)
    ]
    return Series(name, points, marked)


def _number(line: Line, key: str) -> bool:
    return isinstance(line.get(key), int | float)


def figure(title: str, drawn: Mapping[str, list[Series]]) -> str:
    """A chart once per x axis (the keys), with one legend."""
    some = next(series for series in drawn.values() if series)
    legend = "".join(f'<span><i class="{style(i)}"></i>{escape(s.name)}</span>' for i, s in enumerate(some))
    charts = "".join(
        f'<div class="over-{axis}">{Chart(axis, series).svg()}</div>'
        for axis, series in drawn.items()
        if series
    )
    caption = f"<figcaption><b>{escape(title)}</b> {legend}<output></output></figcaption>"
    return f"<figure>{caption}{charts}</figure>"
