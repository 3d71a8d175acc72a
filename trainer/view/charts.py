"""Line charts as SVG text: no plotting library, so that a report opens anywhere and stays small."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from trainer.view.format import duration, quantity

__all__ = ["MAX_SERIES", "Chart", "Series", "style", "thin"]

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 30
MAX_POINTS = 400  # of a curve
MAX_SERIES = 18  # of a chart: six colours times three dashes

Point = tuple[float, float]


@dataclass
class Series:
    """A named curve; `marked` shows its points, for values that are few."""

    name: str
    points: list[Point]
    marked: bool = False


@dataclass
class Chart:
    """Curves over one x axis (`step`, `tokens` or `seconds`)."""

    axis: str
    series: list[Series] = field(default_factory=list)

    def svg(self) -> str:
        """An <svg> element whose colours and dashes are the page's classes (`style`)."""
        # Many curves share the points of three, so that a page with dozens of them stays small.
        limit = MAX_POINTS if len(self.series) <= 6 else 3 * MAX_POINTS // len(self.series)
        series = [Series(s.name, thin(s.points, limit), s.marked) for s in self.series if s.points]
        x_low, x_high = _extent([x for s in series for x, _ in s.points])
        y_ticks = ticks(*_y_range(series))
        y_low, y_high = y_ticks[0], y_ticks[-1]

        def x_at(x: float) -> float:
            return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

        def y_at(y: float) -> float:
            return TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-x0="{x_low:g}" data-x1="{x_high:g}" '
            f'data-y0="{y_low:g}" data-y1="{y_high:g}" data-frame="{LEFT} {RIGHT} {TOP} {BOTTOM}" '
            f'data-axis="{self.axis}">'
        ]
        for y in y_ticks:
            parts.append(f'<path class="grid" d="M{LEFT} {y_at(y):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(
                f'<text class="y" x="{LEFT - 8}" y="{y_at(y) + 4:.1f}">{tick_label(y, y_ticks)}</text>'
            )
        for x in ticks(x_low, x_high, 6):
            if x_low <= x <= x_high:
                label = duration(x) if self.axis == "seconds" else round_quantity(x)
                parts.append(f'<text class="x" x="{x_at(x):.1f}" y="{HEIGHT - 8}">{label}</text>')
        for index, s in enumerate(series):
            xy = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in s.points)
            parts.append(f'<polyline class="{style(index)}" data-name="{escape(s.name)}" points="{xy}"/>')
            if s.marked:
                parts += [
                    f'<circle class="{style(index)}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"/>'
                    for x, y in s.points
                ]
        return "".join(parts) + "</svg>"


def style(index: int) -> str:
    """Classes of the page for a chart's curve number `index`: a colour, and a dash for the seventh and later."""
    return f"s{index % 6}" + (f" d{index // 6}" if index >= 6 else "")


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: means of equal runs of neighbours. Non-finite points are left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(finite) / limit)
    if size <= 1:
        return finite
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(value: float, all_ticks: Sequence[float]) -> str:
    """Enough digits to tell the ticks apart, the same for all of them."""
    if value and (abs(all_ticks[-1]) < 1e-2):
        return f"{value:.1e}"
    if abs(all_ticks[-1]) >= 10_000:
        return round_quantity(value)
    digits = max(0, -math.floor(math.log10(all_ticks[1] - all_ticks[0]) + 1e-9))
    return f"{value:.{digits}f}"


def round_quantity(value: float) -> str:
    """`1k`, `1.5k`: without the zeros that keep a column of numbers aligned."""
    return re.sub(r"\.?0+(?=[kMGTPE])", "", quantity(value)) if "." in quantity(value) else quantity(value)


def _extent(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _y_range(series: list[Series]) -> tuple[float, float]:
    """All of the marked points, but of a dense curve only what is left without its highest 3 %.

    The first few losses of a run are several times the last ones and would press everything else flat.
    """
    low, high = [], []
    for s in series:
        values = sorted(y for _, y in s.points)
        low.append(values[0])
        high.append(values[-1] if s.marked or len(values) < 30 else values[int(0.97 * (len(values) - 1))])
    bottom, top = min(low), max(high)
    return (bottom, top) if top > bottom else (bottom, bottom + (abs(bottom) or 1.0))
