"""Numbers and text as people read them: shared by the console and the report."""

import math
from typing import Any


def duration(seconds: float) -> str:
    """At most six characters: `42s`, `12m03s`, `5h07m`, `3d04h`."""
    if not math.isfinite(seconds):
        return "?"
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def quantity(value: float) -> str:
    """At most five characters below 10^21: `950`, `12.3k`, `4.56M`."""
    if not math.isfinite(value):
        return "?"
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * scale:
            scaled = value / scale
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f}{unit}"
    return f"{value:.0f}"


def bits_per_byte(score: dict[str, Any], prefix: str = "") -> str:
    """`1.234`, or `<= 1.234 ± 0.005` where the number is an upper bound; `1.234 (answers)` where it is of chats."""
    value = f"{score[prefix + 'bits_per_byte']:.3f}"
    if score.get(prefix + "of") == "answers":
        value += " (answers)"
    if score.get(prefix + "kind") != "bound":
        return value
    error = score.get(prefix + "standard_error")
    return f"<= {value}" + (f" ± {error:.3f}" if error else "")


def of_sources(score: dict[str, Any], prefix: str = "") -> str:
    """`notes 1.234, code <= 0.987` of a mixture, nothing where there is none."""
    at_most = "<= " if score.get(prefix + "kind") == "bound" else ""
    found = score.get(prefix + "sources") or {}
    return ", ".join(
        f"{name} none scored"
        if one["bits_per_byte"] is None
        else f"{name} {at_most}{one['bits_per_byte']:.3f}"
        for name, one in found.items()
    )


def score_lines(score: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what a score says beside the number and its estimator; what it does not hold is left out."""
    at_most = "<= " if score.get("kind") == "bound" else ""
    spread, parts = score.get("documents_standard_error"), score.get("parts") or {}
    lines = {
        "nats per token": "{at_most}{nats_per_token:.4f}",
        "perplexity": "{at_most}{perplexity:.2f} per token",
        "made of": " + ".join(f"{name} {nats:.4f}" for name, nats in parts.items()) + " nats per token"
        if parts
        else "",
        **_estimates(score, at_most),
        "measured": ", ".join(f"{name} {value:.4g}" for name, value in (score.get("metrics") or {}).items()),
        **_sources(score, at_most),
        "text": "{documents:,} documents, {bytes:,} bytes",
        "other documents": f"of the kind would move the score by about {spread:.3f}"
        if spread is not None
        else "",
        "context": "{context_tokens} tokens, about {context_bytes:.0f} bytes",
    }
    found = []
    for name, template in lines.items():
        try:
            found.append((name, template.format(at_most=at_most, **score)))
        except KeyError:
            continue
    return [(name, text) for name, text in found if text]


def _sources(score: dict[str, Any], at_most: str) -> dict[str, str]:
    """A line for each source of a mixture, by its name."""
    return {
        f"of {name}": f"{at_most}{one['bits_per_byte']:.3f} bits per byte, {one['documents']:,} documents, "
        f"{one['bytes']:,} bytes"
        if one["bytes"]
        else "no document scored"
        for name, one in (score.get("sources") or {}).items()
    }


def _estimates(score: dict[str, Any], at_most: str) -> dict[str, str]:
    """Other scores of the same text. Old ones do not say how many tokens and bytes it has."""
    found = score.get("estimates") or {}
    lines = {ESTIMATE_NAMES.get(name, name): f"{nats:.4f} nats per token" for name, nats in found.items()}
    if not {"tokens", "bytes"} <= score.keys():
        return lines
    bits = score["tokens"] / score["bytes"] / math.log(2)
    return {
        label: f"{line}, {at_most}{nats * bits:.3f} bits per byte"
        for (label, line), nats in zip(lines.items(), found.values(), strict=True)
    }


def printable(text: str | bytes) -> str:
    """`text` with every character escaped that could move a cursor or reorder a line.

    Newlines stay, tabs are expanded; bytes that are not UTF-8 appear as `\\xff`.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="backslashreplace")
    text = text.expandtabs(4)
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# What an estimate is called, where its own name does not say it.
ESTIMATE_NAMES = {"paper": "as in the paper"}
# What a yardstick is, where its name does not say it.
YARDSTICK_NOTES = {
    "uniform": "every byte equally likely",
    "unigram": "token frequencies",
    "3-gram": "bytes, Witten-Bell",
    "6-gram": "bytes, Witten-Bell",
    "xz": "sees the whole file",
    "bz2": "sees the whole file",
    "true entropy": "of the source: nothing can do better",
}


def ranking(
    score: dict[str, Any], yardsticks: dict[str, float], best: dict[str, Any] | None = None
) -> list[tuple[str, float, str, bool]]:
    """(name, bits per byte, printed number, is ours), best first; ours before an equal yardstick. `best`: the score of
    best_model/ and its `step`."""
    rows = [
        (name, value, f"{value:.3f}", False)
        for name, value in yardsticks.items()
        if name != "ngram_training_bytes" and value is not None
    ]
    rows.append(("this model", score["bits_per_byte"], bits_per_byte(score), True))
    if best:
        name = f"best model, of step {best['step']}"
        rows.append((name, best["bits_per_byte"], bits_per_byte(best), True))
    return sorted(rows, key=lambda row: (row[1], not row[3]))


def ranking_notes(score: dict[str, Any], yardsticks: dict[str, float]) -> list[str]:
    """Sentences without which the ranking would mislead."""
    notes = []
    if non_causal := score.get("non_causal_routing"):
        notes.append(
            "non-causal routing: choices saw later tokens, so this is no score of text to come, and not comparable"
        )
    if score.get("of") == "answers":
        notes.append(
            "of the answers of chats, given what comes before them, and of the tokens that end them: another score "
            "than that of text, and not to be compared with one"
        )
        if score.get("comparable") is False and not non_causal:
            notes.append("chats longer than a row were cut: a longer val_seq_len scores more of them")
        return notes
    if score.get("kind") == "bound":
        notes.append(
            f"an upper bound ({score.get('estimator', 'unnamed estimator')}): the model may be better"
        )
    notes += [
        f"no {name}_accuracy: this model does not predict one token after the other"
        for name in score.get("no_accuracy") or []
    ]
    if lossy := score.get("lossy_documents"):
        notes.append(
            f"of {lossy:,} of {score['documents']:,} documents the tokens do not give the text back: what is lost "
            f"costs nothing, so this score does not compare with those of other tokenizers"
        )
    elif score.get("comparable") is False and not non_causal:
        notes.append("scored on a part chosen by tokens: not comparable with other runs")
    if sampled := yardsticks.get("ngram_training_bytes"):
        notes.append(f"the n-grams were trained on {quantity(sampled)}B of the training text")
    return notes
