"""Python files of assignments, as GPT trainers are configured by: read, and never run.

Values are literals, lists, tuples and dicts of them, arithmetic on numbers, texts joined by `+`, names that are
assigned above, and f-strings of such names. Keys: `gpt_keys.TABLE`; a name that begins with `_` is for the file alone.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.formats.gpt_keys import Stated
from configs.formats.text import read_text
from configs.messages import ConfigError
from naming import shorten_text

_MOST_BYTES = 2**20  # of a file
_MOST_NESTED = 50
_MOST_ITEMS = 10_000  # in one value, letters and entries at any depth
_MOST_PROBLEMS = 5  # that are told
_MOST_POWER = 64
_LARGEST = 10**18
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_HINTS = {
    "time": ". A name that changes with the time: set wandb_run_name on the command line",
    "open": ". A configuration opens nothing",
}


class _Refused(ValueError):
    """A part of a file that is more than an assignment of values."""

    def __init__(self, node: ast.AST, reason: str = "") -> None:
        super().__init__(reason)
        self.node = node


def load(path: Path, where: str) -> list[Stated]:
    """The assignments of a file; a name that is assigned twice counts as assigned last, as in Python. `where`: the path
    as people know it. Raises ConfigError with the problems of all statements."""
    text = read_text(path, where)
    if len(text) > _MOST_BYTES:
        raise ConfigError(
            f"{where}: has {len(text)} characters, and a file of settings {_MOST_BYTES} at most"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            body = ast.parse(text).body
    except SyntaxError as error:
        raise ConfigError(f"{where}:{error.lineno or 1}: not Python: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(f"{where}: cannot be read: {str(error) or type(error).__name__}") from None
    names: dict[str, Any] = {}
    lines: dict[str, int] = {}
    problems: list[str] = []
    for statement in body:
        try:
            for name in _assign(statement, names):
                lines[name] = statement.lineno
        except _Refused as refused:
            problems.append(_problem(where, text, statement, refused))
        if len(problems) == _MOST_PROBLEMS:  # a program: the rest says no more
            break
    if problems:
        raise ConfigError(problems)
    return [Stated("", name, value, lines[name]) for name, value in names.items() if not name.startswith("_")]


def _assign(statement: ast.stmt, names: dict[str, Any]) -> list[str]:
    """Do what one statement says to `names`; the names that it assigns. Raises _Refused."""
    if isinstance(statement, ast.Expr) and _is_text(statement.value):
        return []  # a docstring
    if isinstance(statement, ast.Assign):
        targets, expression = statement.targets, statement.value
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        targets, expression = [statement.target], statement.value
    else:
        raise _Refused(statement)
    if not all(isinstance(target, ast.Name) for target in targets):
        raise _Refused(statement)
    value = _value(expression, names, 1)
    assigned = [target.id for target in targets if isinstance(target, ast.Name)]
    names.update(dict.fromkeys(assigned, value))
    return assigned


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _value(node: ast.expr, names: dict[str, Any], depth: int) -> Any:
    """What an expression is. Raises _Refused for all but the few that are allowed."""
    if depth > _MOST_NESTED:
        raise _Refused(node, f"values are nested {_MOST_NESTED} deep at most")

    def inner(part: ast.expr) -> Any:
        return _value(part, names, depth + 1)

    value: Any
    if isinstance(node, ast.Constant):
        value = node.value
        if not (value is None or isinstance(value, bool | int | float | str)):
            raise _Refused(node, f"{type(value).__name__} is no value of a setting")
    elif isinstance(node, ast.Name):
        if node.id not in names:
            raise _Refused(node, f"{node.id} is not assigned above")
        value = names[node.id]
    elif isinstance(node, ast.List | ast.Tuple):
        value = [inner(part) for part in node.elts]
    elif isinstance(node, ast.Dict):
        value = _mapping(node, inner)
    elif isinstance(node, ast.UnaryOp):
        value = _unary(node, inner(node.operand))
    elif isinstance(node, ast.BinOp):
        value = _binary(node, inner(node.left), inner(node.right))
    elif isinstance(node, ast.JoinedStr):
        value = "".join(_part(part, inner) for part in node.values)
    else:
        raise _Refused(node)
    if isinstance(value, int | float) and not abs(value) <= _LARGEST:  # nan too
        raise _Refused(node, f"a number is finite and at most {_LARGEST:.0e}")
    if _items(value) > _MOST_ITEMS:
        raise _Refused(node, f"a value has {_MOST_ITEMS} letters and entries at most")
    return value


def _items(value: Any) -> int:
    """How much a value holds, counted no further than is allowed: a list may stand in another one many times."""
    if isinstance(value, str):
        return len(value)
    count = 1
    for item in (
        [*value.keys(), *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    ):
        count += _items(item)
        if count > _MOST_ITEMS:
            break
    return count


def _mapping(node: ast.Dict, inner: Callable[[ast.expr], Any]) -> dict[str, Any]:
    found = {}
    for key, value in zip(node.keys, node.values, strict=True):
        name = inner(key) if key is not None else None  # None: **other
        if not isinstance(name, str):
            raise _Refused(node, "keys of a dict are texts")
        found[name] = inner(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unary(node: ast.UnaryOp, value: Any) -> Any:
    if isinstance(node.op, ast.Not):
        return not value
    if isinstance(node.op, ast.Invert) or not _is_number(value):
        raise _Refused(node)
    return -value if isinstance(node.op, ast.USub) else value


def _binary(node: ast.BinOp, left: Any, right: Any) -> Any:
    if isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str):
        return left + right
    if type(node.op) not in _BINARY or not (_is_number(left) and _is_number(right)):
        raise _Refused(node)
    if isinstance(node.op, ast.Pow) and abs(right) > _MOST_POWER:
        raise _Refused(node, f"an exponent is at most {_MOST_POWER}")
    try:
        value = _BINARY[type(node.op)](left, right)
    except ArithmeticError as error:
        raise _Refused(node, str(error)) from None
    if isinstance(value, complex):
        raise _Refused(node, "complex is no value of a setting")
    return value


def _part(node: ast.expr, inner: Callable[[ast.expr], Any]) -> str:
    """A piece of an f-string: text, or a name alone."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.FormattedValue) or not isinstance(node.value, ast.Name):
        raise _Refused(node, "an f-string holds names alone")
    if node.conversion != -1 or node.format_spec is not None:
        raise _Refused(node, "an f-string holds names without a format")
    value = inner(node.value)
    if isinstance(value, list | dict):
        raise _Refused(node, "an f-string holds names of texts and numbers")
    return str(value)


def _problem(where: str, text: str, statement: ast.stmt, refused: _Refused) -> str:
    """The message for a statement that is more than an assignment."""
    node = refused.node
    line = getattr(node, "lineno", statement.lineno)
    source = shorten_text((ast.get_source_segment(text, statement) or "").partition("\n")[0].strip(), 80)
    reason = f" ({refused})" if str(refused) else ""
    hint = next((said for word, said in _HINTS.items() if f"{word}." in source or f"{word}(" in source), "")
    return f"{where}:{line}: '{source}' is not allowed{reason}: such files may only assign literals{hint}"
