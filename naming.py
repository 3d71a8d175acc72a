"""Names: what a name stands for, and what is said where a name is wrong.

Every choice of a run (an optimizer, a schedule, a source of text) is a table `name -> Entry`, kept beside what it
chooses among and made of strings, so that reading it imports nothing. This module imports nothing of the project:
`configs`, `data` and `models` know nothing of each other, and all three use it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "Entry",
    "command_line",
    "did_you_mean",
    "expand_path",
    "load",
    "look_up",
    "module_name",
    "module_of",
    "nearest",
    "not_one_of",
    "require_fit",
    "shapes",
    "shapes_and_dtypes",
    "shorten",
    "suggestion",
]


@dataclass(frozen=True)
class Entry:
    """One row of a table.

    `factory` is "package.module:name", imported on use. `reads` are the generic fields of a run that mean something
    with this choice and nothing with some other of its table; fields that every choice reads are not listed.
    """

    factory: str
    reads: tuple[str, ...] = ()
    description: str = ""

    def load(self) -> Any:
        """The object that `factory` names. ValueError if there is none."""
        return load(self.factory)


Row = TypeVar("Row")


def look_up(table: Mapping[str, Row], name: str, what: str) -> Row:
    """The row of a name; `what` is the field that gave it. ValueError lists the names and the nearest."""
    if name not in table:
        raise ValueError(f"{what}: {not_one_of(name, table)}")
    return table[name]


def module_of(spec: str) -> str:
    """The module of "package.module:Name". ValueError for what is no such name."""
    module, _, name = spec.partition(":")
    try:
        return module_name(module if name.isidentifier() else "")
    except ValueError:
        hint = f". Nearest: '{near}'" if (near := spec.replace("-", "_")) != spec and _is_spec(near) else ""
        raise ValueError(f"'{spec}': expected package.module:Name{hint}") from None


def _is_spec(text: str) -> bool:
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def module_name(text: str) -> str:
    """A dotted name of a module as it is. ValueError for what no module can be called."""
    if not all(part.isidentifier() for part in text.split(".")):
        raise ValueError(f"'{text}': expected the name of a module, package.module")
    return text


def load(spec: str) -> Any:
    """Import the object that "package.module:name" names. ValueError if either part does not exist."""
    named, name = module_of(spec), spec.partition(":")[2]
    try:
        module = importlib.import_module(named)
    except ModuleNotFoundError as error:
        # A missing dependency of an existing module is that module's error, not a wrong name.
        if error.name is None or not (named + ".").startswith(error.name + "."):
            raise
        raise ValueError(f"'{spec}': no module named '{error.name}'") from None
    if not hasattr(module, name):
        hint = did_you_mean(name, dir(module), limit=1)
        raise ValueError(f"'{spec}': module '{named}' has no '{name}'" + (f".{hint}" if hint else ""))
    return getattr(module, name)


# --- what is said --------------------------------------------------------------------------------------


def not_one_of(given: object, allowed: Iterable[object]) -> str:
    """`'cosin' is not one of linear, cosine. Did you mean 'cosine'?`, for use behind a field and a colon."""
    names = [str(name) for name in allowed]
    hint = did_you_mean(str(given), names)
    return f"{str(given)!r} is not one of {', '.join(names)}" + (f".{hint}" if hint else "")


def did_you_mean(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """` Did you mean 'a', 'b' or 'c'?` with a space in front, or nothing where no choice is close."""
    return suggestion(nearest(word, choices, limit))


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """The choices that are close to a word, the closest first."""
    return difflib.get_close_matches(word, list(choices), n=limit, cutoff=0.6)


def suggestion(names: list[str]) -> str:
    """The same sentence of names that were found otherwise."""
    if not names:
        return ""
    *others, last = (f"'{name}'" for name in names)
    return f" Did you mean {', '.join(others)} or {last}?" if others else f" Did you mean {last}?"


def command_line(*words: object) -> str:
    """`python mytrainer.py ...`, quoted so that a shell hands on these very words."""
    return shlex.join(["python", "mytrainer.py", *map(str, words)])


def shorten(names: list[str], most: int = 5) -> str:
    """`a, b, c, d, e and 7 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


# --- files ---------------------------------------------------------------------------------------------

_LONGEST = 255  # bytes of one name, on every file system in use


def expand_path(text: str | Path) -> Path:
    """A path that a person gave, `~` at its start resolved. ValueError for what no file here can be called."""
    path = str(text)
    if unfit := next((c for c in path if c in "\0\n\r"), None):
        raise ValueError(f"{path!r}: a path cannot hold {'a NUL' if unfit == chr(0) else 'a line break'}")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise ValueError(
            f"{path!r}: there is no home folder for '{user}' here. Write the path in full, or ./{path} for that name"
        )
    for name in expanded.split("/"):
        if (length := len(os.fsencode(name))) > _LONGEST:
            raise ValueError(
                f"{shorten_text(path)!r}: a name in it has {length} bytes, and a file or folder {_LONGEST} at most"
            )
    return Path(expanded)


def shorten_text(text: str, most: int = 60) -> str:
    """The beginning of a text, with dots where it goes on."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


# --- state kept by name --------------------------------------------------------------------------------


def require_fit(what: str, expected: Mapping[str, object], given: Mapping[str, object]) -> None:
    """ValueError unless both have the same names with equal values; it lists what is missing, unexpected, wrong.

    Values are what must agree besides the name (`shapes(state)`, say); `dict.fromkeys(names)` compares names alone.
    """
    wrong = [
        f"{name} is {given[name]}, needed is {expected[name]}"
        for name in sorted(expected.keys() & given.keys())
        if given[name] != expected[name]
    ]
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "wrong": wrong,
    }
    told = [f"{label} {len(names)}: {shorten(names)}" for label, names in problems.items() if names]
    if told:
        raise ValueError(f"{what} does not fit this model ({'; '.join(told)})")


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a state dict, for `require_fit`."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def shapes_and_dtypes(state: Mapping[str, Any]) -> dict[str, str]:
    """The same where a copy must not convert."""
    return {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in state.items()}
