"""The figures of `bench kernels` as a picture: shares of the ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.run.files import output_file

__all__ = ["draw", "picture_file"]

FORMATS = (".png", ".svg")


def picture_file(given: str) -> Path:
    """Where it goes. ValueError if it cannot be drawn: now, not when the work is done."""
    path = output_file(given)
    if path.suffix not in FORMATS:
        raise ValueError(f"plot: a file that ends in {' or '.join(FORMATS)}, got {given}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "plot: matplotlib is not installed. pip install matplotlib, or take the figures (--output)"
        ) from None
    return path


def draw(result: dict[str, Any], path: Path) -> None:
    """One group of bars for each operation and size, one bar for each side, the longest possible is 100 %."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = result["operations"]
    names = list(dict.fromkeys(name for each in groups for name in each["sides"]))
    figure = Figure(
        figsize=(9, 1.2 + sum(0.25 * len(each["sides"]) + 0.35 for each in groups)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    at, middles = 0.0, []
    for each in groups:
        first = at
        for name, side in each["sides"].items():
            share, seconds = 100 * side["both"]["share_of_ceiling"], side["both"]["seconds"]
            axes.barh(at, share, 0.9, color=f"C{names.index(name)}", label=name)
            axes.text(share + 0.5, at, f"{1e3 * seconds:.2f} ms", va="center", fontsize=7)
            at += 1
        middles.append(((first + at - 1) / 2, f"{each['op']}\n{each['size']}, {each['dtype']}"))
        at += 1.2
    axes.set_yticks([middle for middle, _ in middles], [text for _, text in middles], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel("% of the measured ceiling, forward and backward")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique.keys(), loc="outside upper center", ncols=min(6, len(unique)), fontsize=8
    )
    axes.set_title(result["environment"]["device"], fontsize=9, loc="left")
    figure.savefig(path, dpi=150)
