"""Which runs do not compare with the others, and why.

A score compares with scores of the same documents, made at the same precision, by an estimator of the same kind. The
larger group stays; every other run is set apart with a reason. Seconds compare on one kind of machine that did nothing
else meanwhile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from trainer.view.comparison.runs import Run

__all__ = ["at_the_same_time", "set_apart"]


def set_apart(runs: Sequence[Run]) -> None:
    """Fill in `apart`, `slow` and `aside` of every run."""
    for run in runs:
        run.apart = _of_itself(run)
        run.slow = run.aside = ""
    scored = [run for run in runs if not run.apart]
    # Earlier runs have no digest that compares over forms of files, but that of the text and its split.
    digest = (
        "content" if all((run.manifest.get("data") or {}).get("content") for run in scored) else "fingerprint"
    )
    for why in (partial(_text, digest), _scored, _precision):
        _leave_most([run for run in runs if not run.apart], why)
    for type_ in {run.type for run in runs}:
        bounds = [r for r in runs if not r.apart and r.type == type_ and r.score.get("kind") == "bound"]
        _leave_most(bounds, _estimator)
    _mark_slow(runs)
    along = Counter(repr(run.along_of) for run in runs if run.along_of and not run.apart)
    for run in runs:
        if run.along_of and not run.apart and repr(run.along_of) != along.most_common(1)[0][0]:
            run.aside = "scores on the way are of other documents"


def _of_itself(run: Run) -> str:
    """What whoever scored it says of the score."""
    score = run.score
    if not score:
        return "no score"
    if score.get("lossy_documents"):
        return "tokens do not give the text back"
    if score.get("non_causal_routing"):
        return "choices saw later tokens"
    if score.get("comparable") is False:
        return "scored on a part chosen by tokens"
    return ""


def _leave_most(runs: Sequence[Run], key_and_words: Callable[[Run], tuple[Any, str]]) -> None:
    """Set apart those whose key is not the most frequent one; of equally frequent ones the first stays."""
    keys = [repr(key_and_words(run)[0]) for run in runs]
    if len(set(keys)) < 2:
        return
    (common, _), *_ = Counter(keys).most_common(1)
    stays = key_and_words(runs[keys.index(common)])[1]
    for run, key in zip(runs, keys, strict=True):
        if key != common:
            words = key_and_words(run)[1]
            run.apart = words if words == stays else f"{words}, the others {stays}"


def _text(digest: str, run: Run) -> tuple[Any, str]:
    data = run.manifest.get("data") or {}
    return (data.get(digest), data.get("heldout_bytes")), "another held-out text"


def _scored(run: Run) -> tuple[Any, str]:
    score = run.score
    of, documents, size = score.get("of", "text"), score.get("documents"), score.get("bytes")
    words = f"scored on {_count(documents)} documents of {_count(size)} bytes"
    return (of, documents, size), words if of == "text" else f"{words}, of chats the answers alone"


def _precision(run: Run) -> tuple[Any, str]:
    found = run.summary.get("precision") or run.manifest.get("precision")
    return found, f"scored in {'fp32' if found == 'no' else found or 'unknown precision'}"


def _estimator(run: Run) -> tuple[Any, str]:
    """Without its numbers: how many steps or blocks a bound has is the model's, how often it is drawn only noise."""
    words = str(run.score.get("estimator")).partition(";")[0]
    return re.sub(r"\d+", "#", words), f"estimated by {words}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


# --- seconds --------------------------------------------------------------------------------------------


def _mark_slow(runs: Sequence[Run]) -> None:
    shared = {id(run): others for run in runs if (others := at_the_same_time(run, runs))}
    for run in runs:
        if beside := shared.get(id(run)):
            more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
            run.slow = f"shared the machine with {beside[0]}{more}"
    alone = [run for run in runs if not run.slow and run.summary]
    kinds = Counter(repr(_machine(run)) for run in alone)
    if len(kinds) > 1:
        common = kinds.most_common(1)[0][0]
        for run in alone:
            if repr(_machine(run)) != common:
                run.slow = f"ran on {_machine_in_words(run)}"


def at_the_same_time(run: Run, runs: Sequence[Run]) -> list[str]:
    """Names of those that ran on the same host meanwhile."""
    return [
        other.name
        for other in runs
        if other is not run
        and any(
            host == there and begin < until and since < end
            for host, begin, end in run.lives
            for there, since, until in other.lives
        )
    ]


def _machine(run: Run) -> tuple[Any, ...]:
    environment, execution = run.manifest.get("environment") or {}, run.manifest.get("execution") or {}
    return (
        environment.get("device"),
        environment.get("cpu_capability"),
        execution.get("threads"),
        execution.get("world_size"),
    )


def _machine_in_words(run: Run) -> str:
    device, capability, threads, processes = _machine(run)
    if not device:
        return "an unknown machine"
    kind = f" {capability}" if device == "cpu" and capability else ""
    return f"{device}{kind}, {threads or '?'} threads, {processes or 1} processes"
