"""Code that files of runs name: an architecture or adapter outside of the table is imported by name, and a run folder
may bring the module of that name with it. So one that a file of a run names is imported once the user has said so.

What is trusted belongs to a command and is written nowhere. Processes of a run hear of it by a variable.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import models
from configs.messages import TRUSTED, ConfigError
from naming import module_name, module_of

__all__ = [
    "NAMES_CODE",
    "WORD",
    "foreign_modules",
    "modules_of",
    "of_one_command",
    "option",
    "pass_on",
    "passed_on",
    "refuse",
    "repeated",
    "trusted",
    "trusting",
    "words",
]

WORD = "trust"  # of a command, no field of a run
NAMES_CODE = ("type", "model_adapter")

_trusted: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())


def modules_of(given: str | Iterable[str]) -> frozenset[str]:
    """The modules of `a,b.c`, or of several such texts. ValueError for what names none."""
    texts = [given] if isinstance(given, str) else list(given)
    try:
        return frozenset(module_name(name) for text in texts for name in text.split(",") if name)
    except ValueError as error:
        raise ValueError(f"{WORD}: {error}") from None


def trusted() -> frozenset[str]:
    """What this process may import though only a file of a run names it."""
    return _trusted.get() | modules_of(os.environ.get(TRUSTED, ""))


@contextmanager
def trusting(given: str | Iterable[str]) -> Iterator[None]:
    """Trust these modules too while open."""
    token = _trusted.set(_trusted.get() | modules_of(given))
    try:
        yield
    finally:
        _trusted.reset(token)


@contextmanager
def of_one_command() -> Iterator[None]:
    """At its end nothing is trusted that was not at its begin."""
    before = os.environ.get(TRUSTED)
    try:
        yield
    finally:
        os.environ.pop(TRUSTED, None)
        if before is not None:
            os.environ[TRUSTED] = before


def pass_on(modules: frozenset[str]) -> None:
    """Trust these in this process and in those that it starts."""
    if modules:
        os.environ[TRUSTED] = ",".join(sorted(modules))


def passed_on() -> dict[str, str]:
    """The variable that says so, for processes that do not inherit it."""
    return {TRUSTED: os.environ[TRUSTED]} if TRUSTED in os.environ else {}


def foreign(field: str, spec: Any) -> bool:
    """Whether a value of `type` or `model_adapter` is no name or class of the table."""
    if spec in (None, "", "???"):
        return False
    if field == "type":
        known = {*models.ARCHITECTURES, *(row.model for row in models.ARCHITECTURES.values())}
        return spec not in known and models.alias(spec) is None
    return spec not in {models.Architecture.adapter, *(row.adapter for row in models.ARCHITECTURES.values())}


def foreign_modules(field: str, specs: Iterable[Any]) -> Iterator[str]:
    """The modules of those among the values of a field that are outside of the table."""
    for spec in specs:
        if isinstance(spec, str) and foreign(field, spec):
            yield spec.partition(":")[0]


def refuse(said: Mapping[str, Any], place: str, folder: Path, more: frozenset[str] = frozenset()) -> None:
    """ConfigError where a file of a run names code that nobody has said to trust. `said`: its fields; `place`: the
    file, for the message; `folder`: the run's; `more`: what is trusted besides."""
    problems = []
    for field in NAMES_CODE:
        spec = said.get(field)
        if not isinstance(spec, str) or not foreign(field, spec):
            continue  # what is no text has a message of its own
        try:
            module = module_of(spec)
        except ValueError as error:
            problems.append(f"{place}: {field}: {error}")
            continue
        if not _covers(trusted() | more, module):
            problems.append(_refusal(field, spec, module, place, folder))
    if problems:
        raise ConfigError(problems)


def _covers(modules: frozenset[str], module: str) -> bool:
    """Whether it, or a package around it, is among those: importing a module runs the packages around it."""
    parts = module.split(".")
    return any(".".join(parts[:n]) in modules for n in range(1, len(parts) + 1))


def _refusal(field: str, spec: str, module: str, place: str, folder: Path) -> str:
    where = _found(module)
    look = f"Look at it: less {where}" if where else "No module of that name is found from here"
    inside = where and Path(where).is_relative_to(folder.resolve())
    came = f"which lies in {folder}" if inside else f"which a file of a run names, in {folder}"
    return (
        f"{place}: {field}: {spec} would run the code of module {module}, {came}; nothing there is executed unasked. "
        f"{look}. To trust it: {WORD}={module} on the command line of a run or sweep, --{WORD} {module} of generate, "
        f"eval and export, load(..., {WORD}={module!r}) in Python"
    )


def _found(module: str) -> str:
    """The file of a module, "" where there is none. Imports nothing."""
    places: Any = None
    origin, name = "", ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        found = PathFinder.find_spec(name, places)
        if found is None:
            return ""
        places = found.submodule_search_locations
        origin = found.origin or next(iter(places or ()), "")
        if places is None:
            break
    return str(Path(origin).resolve()) if origin else ""


# -- in commands that are printed --------------------------------------------------------------------------


def repeated(modules: frozenset[str]) -> list[str]:
    """The word that trusts these."""
    return [f"{WORD}={','.join(sorted(modules))}"] if modules else []


def _named(type_: str, adapter: str | None) -> str:
    fields = zip(NAMES_CODE, (type_, adapter), strict=True)
    return ",".join(sorted({module for field, spec in fields for module in foreign_modules(field, [spec])}))


def words(type_: str, adapter: str | None) -> list[str]:
    """`trust=<module>`, where a command that goes on with a run of these needs it."""
    return [f"{WORD}={modules}"] if (modules := _named(type_, adapter)) else []


def option(type_: str, adapter: str | None) -> list[str]:
    """The same for generate, eval and export."""
    return [f"--{WORD}", modules] if (modules := _named(type_, adapter)) else []
