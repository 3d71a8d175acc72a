"""A certificate of a score: the checks made of the model, the digests of what was scored, in one JSON file; and whether
one still holds."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters.base import Likelihood
from data.rows import Batch, HeldoutRows
from trainer.bench.certify import bounds, normalisation
from trainer.bench.certify.causality import causality
from trainer.bench.certify.checks import Check, Path
from trainer.bench.certify.counting import counting
from trainer.bench.certify.digests import digests, of_content
from trainer.bench.certify.repeats import repeats
from trainer.evaluate import Score
from trainer.run.manifest import collect_environment

if TYPE_CHECKING:
    from trainer.run.restore import Restored

__all__ = ["FORMAT", "Heard", "certify", "compare", "lines", "other_environment", "read_certificate"]

FORMAT = 1
INDENT, WIDTH = 11, 110  # of what is printed
ROWS = 4  # of text that are probed: the first of the longest windows


class Heard:
    """What a score said of each row: `nats`, without ends of documents, and `bytes`, by the row's number."""

    def __init__(self) -> None:
        self.nats: dict[int, float] = {}
        self.bytes: dict[int, int] = {}
        self.batch_rows = 0  # of a forward pass; less from one where memory did not suffice

    def hear(self, batch: Batch, found: Likelihood) -> None:
        if 0 in batch.rows:
            self.batch_rows = len(batch.rows)
        assert batch.sizes is not None
        each = zip(batch.rows.tolist(), found.nats.tolist(), batch.sizes.sum(1).tolist(), strict=True)
        for row, nats, bytes_ in each:
            if row >= 0:
                self.nats[row], self.bytes[row] = nats, bytes_


def certify(
    restored: Restored,
    rows: HeldoutRows,
    score: Score,
    heard: Heard,
    request: Mapping[str, Any],
    windows: Callable[[int], HeldoutRows],
    told: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The content of a certificate. `request`: what repeats the score; `windows`: the same text in windows of so many
    targets; `told` hears what is being checked."""
    checks = _checks(restored, rows, score, heard, windows, told)
    told("digests")
    content = {
        "certificate": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "certified": all(check.result != "failed" for check in checks),
        "request": dict(request),
        "type": restored.cfg.type,
        "weights": restored.weights,
        "precision": restored.precision,
        "score": _plain(score.as_dict()),
        "checks": [_plain(check.as_dict()) for check in checks],
        "digests": digests(restored, rows),
        "environment": collect_environment(restored.device),
    }
    return {**content, "digest": of_content(content)}


def _checks(
    restored: Restored,
    rows: HeldoutRows,
    score: Score,
    heard: Heard,
    windows: Callable[[int], HeldoutRows],
    told: Callable[[str], None],
) -> Sequence[Check]:
    adapter, found = restored.adapter, []
    batch = rows.batch(np.arange(min(ROWS, rows.n_rows)))
    ids = _ids_of(rows, adapter.tokenizer.vocab_size)
    batch_rows = heard.batch_rows
    if rows.scores == "answers":  # which may begin anywhere
        windows = lambda targets: rows  # noqa: E731
    short = windows(normalisation.WINDOW if score.kind == "exact" else adapter.bound_window)
    short_batch = short.batch(np.arange(min(ROWS, short.n_rows)))
    # Leaks and missing normalisers are no matter of number formats: in fp32 less of them hides behind rounding.
    for precision in dict.fromkeys((restored.precision, "no")):
        path = Path(restored, rows, batch_rows, precision)
        told(f"normalisation ({path.precision_name})")
        normalised = normalisation.normalisation(path, short_batch)
        told(f"causality ({path.precision_name})")
        found += [causality(path, batch, ids, normalised.own), normalised.check]
    path = Path(restored, rows, batch_rows, restored.precision)
    if score.kind == "bound":
        told("bound")
        tiny = windows(adapter.bound_window)
        precise = Path(restored, rows, batch_rows, "no")
        found += bounds.agreement(precise, tiny.batch(np.arange(min(bounds.WINDOWS, tiny.n_rows))))
    told("bytes")
    found.append(counting(rows, restored.tokenizer, sorted(heard.bytes.items()), score.bytes))
    told("repeatability")
    found += repeats(path, rows, heard.nats)
    return found


def _ids_of(rows: HeldoutRows, vocabulary: int) -> np.ndarray:
    """Ids that the text has, in order; all where it has one alone."""
    found = np.unique(rows.store.tokens[: 1 << 20])
    return found.astype(np.int64) if len(found) > 1 else np.arange(min(vocabulary, 256))


def _plain(value: Any) -> Any:
    """As JSON says it, which has no numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_certificate(file: File) -> dict[str, Any]:
    """What a file says. ValueError where it is no certificate, or none that this version reads."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"verify: {file} cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"verify: {file} is no JSON file: {error}") from None
    wanted = {"certificate", "certified", "request", "score", "checks", "digests", "digest"}
    if not isinstance(found, dict) or "certificate" not in found:
        raise ValueError(f"verify: {file} is no certificate. eval --certify {file.name} writes one")
    if found["certificate"] != FORMAT:
        raise ValueError(
            f"verify: {file} is a certificate of format {found['certificate']!r}, and this version reads {FORMAT}"
        )
    if missing := sorted(wanted - found.keys()):
        raise ValueError(f"verify: {file} is no whole certificate: it has no {', '.join(missing)}")
    return found


def compare(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a certificate no longer holds, in words; `now`: one made of the same request."""
    gone = []
    if of_content({name: value for name, value in kept.items() if name != "digest"}) != kept["digest"]:
        gone.append("file: it was changed after it was written")
    for name, digest in kept["digests"].items():
        if (found := now["digests"].get(name)) != digest:
            what = "is not here" if found is None else f"was {digest[:12]}, and is {found[:12]}"
            gone.append(f"{name}: {what}")
    gone += [f"{name}: there was none" for name in now["digests"] if name not in kept["digests"]]
    gone += _scores(kept, now)
    results = {check["name"]: check for check in now["checks"]}
    for check in kept["checks"]:
        other = results.get(check["name"])
        if other is None or other["result"] != check["result"]:
            found = "was not made" if other is None else f"{other['result']}: {other['found']}"
            gone.append(f"{check['name']}: it had {check['result']}, and now {found}")
        elif other["result"] == "failed":
            gone.append(f"{check['name']}: failed, as it had: {other['found']}")
    return gone


def _scores(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Of the score, to the rounding of its number format."""
    gone, most = [], 1e-3 if now["precision"] != "no" else 1e-5
    for name in ("kind", "estimator", "bytes", "tokens", "documents", "context_tokens", "comparable", "of"):
        one, other = kept["score"].get(name), now["score"][name]
        if one != other:
            gone.append(f"score.{name}: was {one}, and is {other}")
    for name in ("bits_per_byte", "nats_per_token", "end_nats_per_document"):
        one, other = kept["score"].get(name), now["score"][name]
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        if one != other and not (numbers and math.isclose(one, other, rel_tol=most)):
            gone.append(f"score.{name}: was {one}, and is {other} (may differ by {most:g} of it)")
    return gone


def other_environment(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the certificate was made with that is another here. Numbers may then differ by rounding."""
    then, here = kept.get("environment") or {}, now["environment"]
    return [
        f"{name} was {then.get(name)}, and is {here[name]}"
        for name in ("python", "torch", "numpy", "platform", "device", "cpu_capability")
        if then.get(name) != here[name]
    ]


def lines(content: dict[str, Any]) -> list[str]:
    """What people read: each check, what was asked, what would pass and what came out."""
    found = []
    for check in content["checks"]:
        result = "FAILED" if check["result"] == "failed" else check["result"]
        found.append(f"{result:<{INDENT}}{check['name']}")
        told = (check["asked"], check["tolerance"] and f"tolerance: {check['tolerance']}", check["found"])
        for text in told:
            found += textwrap.wrap(text, WIDTH, initial_indent=INDENT * " ", subsequent_indent=INDENT * " ")
    return found
