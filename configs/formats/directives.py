"""`.config` files: a directive and its `key=value` pairs on each line, and `FROM` another file.

    FROM standard.config
    MODEL n_layer=8 n_embd=512        # what differs
    ENV WANDB_MODE="offline"

Bare values are true/false, null, numbers and lists in brackets where they look like it, and text otherwise; in quotes
they are text, with \\\\ \\" \\' \\n \\t. A `\\` at the end of a line goes on with the next one. Keys: `gpt_keys.TABLE`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from configs.formats.gpt_keys import TABLE, Stated
from configs.formats.text import read_text
from configs.messages import ConfigError
from naming import did_you_mean

DIRECTIVES = (*TABLE, "ADVANCED", "ENV")
WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_MOST_NESTED = 50
_KEY = re.compile(r"([A-Za-z][A-Za-z0-9_.]*)=")
_ENV_KEY = re.compile(r"([A-Z_][A-Z0-9_]*)=")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"|\'((?:[^\'\\]|\\.)*)\'')
_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t"}
_BARE = re.compile(r"(?:(?!\\\Z)\S)+")  # a backslash that ends the line is no part of it
_IN_LIST = re.compile(r"[^\s,\[\]]+")
_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LEADING_ZEROS = re.compile(r"[+-]?0_?[0-9]")
_MOST_DIGITS = 300
_NOT_FINITE = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)


def load(path: Path, where: str) -> tuple[Stated | None, list[Stated]]:
    """What stands behind FROM, if it does, and the pairs of a file. `where`: the path as people know it. Raises
    ConfigError with the problems of all lines."""
    parent: Stated | None = None
    entries: list[Stated] = []
    problems: list[str] = []
    directive = ""  # that goes on from the line before
    for number, line in enumerate(read_text(path, where).replace("\r\n", "\n").split("\n"), 1):
        try:
            began, pairs, goes_on = _line(line, directive)
            if began == "FROM" and (parent or entries):
                raise ValueError("FROM is the first directive, and the only one of its name")
            if began == "FROM":
                parent = Stated("FROM", "FROM", pairs[0][1], number)
            else:
                entries += [Stated(began, key, value, number) for key, value in pairs]
            directive = began if goes_on else ""
        except ValueError as error:
            problems.append(f"{where}:{number}: {error}")
            directive = ""
    if problems:
        raise ConfigError(problems)
    return parent, entries


def _line(line: str, directive: str) -> tuple[str, list[tuple[str, Any]], bool]:
    """Directive and pairs of one line, and whether the next one goes on with it. `directive`: that of the line before
    which goes on here, else ""."""
    at = _blanks(line, 0)
    if not directive:
        if _ends(line, at):
            return "", [], False
        (directive,) = re.findall(r"^\S+", line[at:])
        at += len(directive)
        if directive == "FROM":
            value, at = _value(line, _blanks(line, at)) if line[at:].strip() else (None, at)
            if not isinstance(value, str) or not _ends(line, _blanks(line, at)):
                raise ValueError(f"FROM takes the name of one file, got {line[4:].strip() or 'nothing'}")
            return directive, [("FROM", value)], False
        if directive not in DIRECTIVES:
            raise ValueError(_no_directive(directive))
    pairs = []
    while not _ends(line, at := _blanks(line, at)) and line[at:] != "\\":
        key = (_ENV_KEY if directive == "ENV" else _KEY).match(line, at)
        if key is None or _blanks(line, key.end()) != key.end() or key.end() == len(line):
            raise ValueError(f"expected key=value, got {line[at:].split()[0]!r}" + _key_hint(directive))
        value, at = _value(line, key.end(), as_text=directive == "ENV")
        pairs.append((key[1], value))
    goes_on = line[at:] == "\\"
    if not pairs and not goes_on:
        raise ValueError(f"expected key=value behind {directive}, got nothing")
    return directive, pairs, goes_on


def _blanks(line: str, at: int) -> int:
    """The first place from `at` on that is no blank."""
    while at < len(line) and line[at].isspace():
        at += 1
    return at


def _ends(line: str, at: int) -> bool:
    """Whether nothing but a comment is left. `at` is behind a blank, or where a line begins."""
    return at == len(line) or line[at] == "#"


def _value(line: str, at: int, *, as_text: bool = False) -> tuple[Any, int]:
    """The value that begins at a place, and where it ends: at a blank, or the line's end. `as_text`: whatever it looks
    like."""
    word = _BARE.match(line, at) if as_text and line[at] not in "\"'" else None
    value, end = (word[0], word.end()) if word else _scan(line, at, _BARE)
    if end < len(line) and not line[end].isspace() and line[end:] != "\\":
        raise ValueError(f"expected a blank behind {line[at:end]}, got {line[end:].split()[0]!r}")
    return value, end


def _scan(line: str, at: int, bare: re.Pattern[str], depth: int = 0) -> tuple[Any, int]:
    if line[at] in "\"'":
        if (quoted := _QUOTED.match(line, at)) is None:
            raise ValueError(f"the quote is not closed: {line[at:]}")
        return _unescaped(quoted[0][1:-1]), quoted.end()
    if line[at] == "[":
        return _list(line, at, depth + 1)
    word = bare.match(line, at)
    if word is None:
        raise ValueError(f"expected a value, got {line[at:]!r}")
    return typed(word[0]), word.end()


def _list(line: str, at: int, depth: int) -> tuple[list[Any], int]:
    if depth > _MOST_NESTED:
        raise ValueError(f"lists are nested {_MOST_NESTED} deep at most")
    items, begin = [], at
    at = _blanks(line, at + 1)
    while at < len(line):
        item, at = _scan(line, at, _IN_LIST, depth)
        items.append(item)
        at = _blanks(line, at)
        if line[at : at + 1] == "]":
            return items, at + 1
        if line[at : at + 1] != ",":
            break
        at = _blanks(line, at + 1)
    raise ValueError(f"the list is not closed, or has no comma between its values: {line[begin:]}")


def _unescaped(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        if found[1] not in _ESCAPES:
            raise ValueError(f"{found[0]} stands for nothing. For a backslash write two")
        return _ESCAPES[found[1]]

    return re.sub(r"\\(.)", one, text)


def typed(word: str) -> Any:
    """What a bare word stands for. ValueError for numbers that are none, or that look like others."""
    if word in WORDS:
        return WORDS[word]
    if _NOT_FINITE.fullmatch(word):
        raise ValueError(f'expected a finite number, got {word}. As text: "{word}"')
    number = _INTEGER.fullmatch(word) or _FLOAT.fullmatch(word)
    if number is None:
        return word
    if _LEADING_ZEROS.match(word):
        raise ValueError(f'{word} begins with a zero. Write {word.lstrip("+-0_")}, or "{word}" for text')
    if _INTEGER.fullmatch(word):
        if len(word) > _MOST_DIGITS:
            raise ValueError(f"a number has {_MOST_DIGITS} digits at most, got {len(word)}")
        return int(word)
    if not math.isfinite(float(word)):
        raise ValueError(f"expected a finite number, got {word}")
    return float(word)


def _no_directive(word: str) -> str:
    if "=" in word:
        return f"expected a directive before {word!r}: one of {', '.join(DIRECTIVES)}"
    known = ("FROM", *DIRECTIVES)
    return f"unknown directive {word!r}.{did_you_mean(word, known)} Known: {', '.join(known)}"


def _key_hint(directive: str) -> str:
    return ". Names of ENV are of A-Z, 0-9 and _" if directive == "ENV" else ""
