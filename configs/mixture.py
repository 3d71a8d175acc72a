"""The entries of `mix`, each checked as if it were all the text of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from configs.explain import explain
from configs.schema import RunConfig
from naming import did_you_mean

__all__ = ["problems_alone", "stated"]


def stated(run: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with every field of each entry's source, those that it leaves out at their defaults; and what is wrong
    with entries, each told with its place in the list."""
    from data import DataError
    from data.mix import OWN, fields_of

    problems: list[str] = []
    entries = []
    for place, entry in enumerate(run.mix or []):
        prefix = f"mix.{place}."
        try:
            known = fields_of(str(entry.get("data", "")))
        except DataError as error:
            problems.append(
                f"{prefix}data: {error}" if "data" in entry else f"required key '{prefix}data' has no value"
            )
            continue
        given = {name: value for name, value in entry.items() if name in known}
        problems += [
            f"unknown key '{prefix}{name}' of data={entry['data']}.{did_you_mean(name, known) or _these(known)}"
            for name in entry
            if name not in known
        ]
        fields = {name: value for name, value in given.items() if name not in OWN}
        checked, wrong = _checked(run, fields, prefix)
        problems += wrong
        if checked is not None:
            of_source = {name: getattr(checked, name) for name in known if name not in OWN}
            entries.append({**{name: given[name] for name in OWN if name in given}, **of_source})
    if problems:
        return run, problems
    return run.model_copy(update={"mix": entries}) if entries else run, []


def _these(known: tuple[str, ...]) -> str:
    return f" It takes {', '.join(known)}"


def _checked(run: RunConfig, fields: Mapping[str, Any], prefix: str) -> tuple[RunConfig | None, list[str]]:
    try:
        return RunConfig.model_validate({"type": run.type, **fields}), []
    except ValidationError as error:
        return None, [message for _, message in explain(error, RunConfig, fields, lambda key: "", prefix)]


def problems_alone(run: RunConfig, look: Callable[[RunConfig], list[str]]) -> list[str]:
    """What a look finds in the entries, each as a run of its own."""
    from data import SOURCES

    fields = {name for source in SOURCES.values() for name in source.reads}
    defaults = {name: RunConfig.model_fields[name].get_default() for name in fields}
    return [
        f"mix.{place}: {problem}"
        for place, entry in enumerate(run.mix or [])
        for problem in look(run.model_copy(update={**defaults, **entry}))
    ]
