"""Standings as people read them: lines for a console, and Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from naming import shorten
from trainer.view.format import printable, quantity

__all__ = ["PAIRED", "a_a_lines", "markdown", "markdown_table", "notes", "table", "table_lines", "wrapped"]

PAIRED = (
    "Pairs are runs of the same seed: the same documents in the same order (as far as contexts and batches allow), the "
    "same held-out documents, weights drawn from the same seed. A difference is the mean over the seeds that both have."
)
HEADER = (
    "rank",
    "architecture",
    "bits per byte",
    "seeds",
    "rate",
    "parameters",
    "tokens",
    "seconds",
    "FLOPs",
)
_LEFT = 2  # columns that are aligned to the left


def table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The header, and a row of words for each entry."""
    return [HEADER, *(_row(entry) for entry in result["entries"])]


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    count = (entry.get("parameters") or {}).get("total")
    factor = entry.get("rate_factor")
    return (
        _rank(entry["rank"]),
        printable(entry["label"]),
        _score(entry),
        f"{len(entry['scores'])}" + (f" of {len(entry['runs'])}" if entry["failed"] else ""),
        "" if factor is None else f"x{factor:g}",
        *(
            "" if value is None else quantity(value)
            for value in (count, entry["tokens"], entry["seconds"], entry["flops"])
        ),
    )


def _rank(rank: Sequence[int] | None) -> str:
    if rank is None:
        return "-"
    first, last = rank
    return str(first) if first == last else f"{first}-{last}"


def _score(entry: dict[str, Any]) -> str:
    """The mean, and half its interval over seeds where there are several."""
    if entry["bits_per_byte"] is None:
        return "none"
    bound = "<= " if entry["kind"] == "bound" else ""
    half = (
        None
        if entry["spread_of_seeds"] is None or len(entry["scores"]) < 2
        else entry["high"] - entry["bits_per_byte"]
    )
    return f"{bound}{entry['bits_per_byte']:.4f}" + ("" if half is None else f" ± {half:.4f}")


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """In columns, for a console."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            word.ljust(width) if column < _LEFT else word.rjust(width)
            for column, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def notes(result: dict[str, Any]) -> list[str]:
    """What has to be said beside the table, a sentence or two each."""
    entries, shows = result["entries"], result["shows"]
    found = []
    if tied := [entry for entry in entries if entry["rank"] and entry["rank"][0] != entry["rank"][1]]:
        found.append(f"A range of ranks: not told apart from others. {_like(tied)}.")
    if shows:
        among = len(result["pairs"])
        only = f"; where it is the only one among {among} pairs, {shows['first']:.4f}" if among > 1 else ""
        found.append(
            f"{shows['seeds']} seeds can show a difference of {shows['alone']:.4f} bits per byte between two of these "
            f"(differences spread by {shows['spread']:.4f} over seeds, the median of the pairs){only}."
        )
        if shows["text_error"] is not None:
            found.append(
                f"Other documents of the kind would move a difference by about {shows['text_error']:.4f}, which more "
                "seeds do not lessen (standard error, median of the pairs)."
            )
    elif len(entries) > 1:
        found.append("One seed shows no spread, so nothing is told apart: more --seeds.")
    if any(entry["kind"] == "bound" for entry in entries):
        found.append("<= is an upper bound: the model's own score may be lower.")
    found += [f"{printable(entry['label'])}: {entry['edge']}" for entry in entries if entry.get("edge")]
    for entry in entries:
        if entry["differs"]:
            found.append(f"{printable(entry['label'])} has no rank: {printable(entry['differs'])}.")
        for seed, why in entry["failed"].items():
            found.append(f"{printable(entry['label'])}, seed {seed}: {printable(why)}")
    return found


def _like(tied: Sequence[dict[str, Any]]) -> str:
    """Who is not told apart from whom, groups in which nobody is from anybody first."""
    groups: dict[frozenset[str], list[str]] = {}
    for entry in tied:
        groups.setdefault(frozenset([entry["label"], *entry["not_told_apart_from"]]), []).append(
            entry["label"]
        )
    closed = [" = ".join(map(printable, names)) for group, names in groups.items() if group == set(names)]
    rest = [
        f"{printable(name)}: not from {printable(shorten(sorted(group - {name}), 8))}"
        for group, names in groups.items()
        if group != set(names)
        for name in names
    ]
    return "; ".join([*closed, *rest])


def wrapped(lines: Sequence[str]) -> list[str]:
    """Sentences for a console, a line of 100 columns at a time."""
    return [part for line in lines for part in textwrap.wrap(line, 100, subsequent_indent="  ") or [""]]


def _pair_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    header = ("second", "first", "second less first", "interval", "p", "", "of seeds", "of text", "seeds")
    rows = []
    for pair in sorted(result["pairs"], key=lambda pair: pair["p"]):
        several = pair["seeds"] > 1
        rows.append(
            (
                printable(pair["second"]),
                printable(pair["first"]),
                f"{pair['difference']:+.4f}",
                f"{pair['low']:+.4f} to {pair['high']:+.4f}" if several else "",
                f"{pair['p']:.2g}" if several else "",
                "told apart" if pair["told_apart"] else "not told apart",
                f"{pair['error_of_seeds']:.4f}" if several else "",
                "" if pair["error_of_text"] is None else f"{pair['error_of_text']:.4f}",
                str(pair["seeds"]),
            )
        )
    return [header, *rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row is the header."""
    lines = ["| " + " | ".join(word.replace("|", "\\|") for word in row) + " |" for row in rows]
    marks = ["---" if column < _LEFT else "---:" for column in range(len(rows[0]))]
    return [lines[0], "| " + " | ".join(marks) + " |", *lines[1:]]


def markdown(title: str, lines: Sequence[str], result: dict[str, Any]) -> str:
    """The page. `lines`: how it came about."""
    parts = [f"# {title}", *lines, "\n".join(markdown_table(table(result))), *notes(result), PAIRED]
    if result["pairs"]:
        parts += [
            "## Pairs",
            f"Intervals are Student's t at {result['level']:.2%}, which is 95 % of those told apart (Benjamini and "
            "Hochberg). The last columns are standard errors of the difference: over seeds, and over documents.",
            "\n".join(markdown_table(_pair_rows(result))),
        ]
    return "\n\n".join(parts) + "\n"


def a_a_lines(found: dict[str, Any]) -> list[str]:
    """Of `trainer.bench.standings.alike`."""
    word = "told apart, which happens by chance once in 20" if found["told_apart"] else "not told apart"
    return [
        f"{printable(found['second'])} less {printable(found['first'])}: {found['difference']:+.4f} bits per byte "
        f"({found['low']:+.4f} to {found['high']:+.4f}, p {found['p']:.2g}): {word}.",
        f"Seeds spread by {found['spread_of_seeds']:.4f}. Of {found['splits']:,} splits of these runs into such halves "
        f"{found['splits_told_apart']:.1%} are told apart; 5 % are meant to be.",
    ]
