"""Which files `--hydra_model_cfg=V` means: option names, paths, patterns, lists, sweep functions."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from pathlib import Path

import models
from configs.files import BASE, CONFIGS, DATA_FORMATS, EXTENSIONS, FORMATS, ROOT, options, shown, words_of
from configs.grammar import override_choices, parse_override
from configs.messages import ConfigError
from configs.request import Request
from naming import expand_path, nearest, suggestion


def model_paths(request: Request) -> tuple[list[Path], str]:
    """The model files asked for, and the sweep function around them (`choice`, `shuffle` or nothing)."""
    paths: list[Path] = []
    function = ""
    for value in request.models:
        items, wrapped = _items(value)
        function = function or wrapped
        for item in items:
            paths += _resolve(item, request)
    unique = list(dict.fromkeys(paths))
    if len(unique) > 1 and not request.multirun:
        raise ConfigError(
            f"command line: --hydra_model_cfg: {len(unique)} configs given for one run. "
            "Add -m to run them as a sweep"
        )
    return unique, function


def _items(value: str) -> tuple[list[str], str]:
    """Split one value of the flag at top-level commas, or take Hydra's sweep functions apart."""
    if "," in value and Path(value).suffix in FORMATS and os.path.isfile(os.path.expanduser(value)):
        return [value], ""  # a comma in its name
    for name in ("choice", "glob", "sort", "shuffle"):
        if value.startswith(f"{name}("):
            parsed = parse_override(f"configs@_global_={value}")
            items = override_choices(parsed, options())
            if name == "glob" and not items:
                raise ConfigError(f"command line: the pattern '{value}' matches no config")
            return items, name if name in ("choice", "shuffle") else ""
    items, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(value):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "[(":
            depth += 1
        elif char in ")]":
            depth -= 1
        elif char == "," and depth == 0:
            items.append(value[start:i])
            start = i + 1
    items = [i.strip().strip("'\"") for i in [*items, value[start:]]]
    return [i for i in items if i], ""


def _resolve(item: str, request: Request) -> list[Path]:
    """One item of the flag: an option name, a path or a file pattern."""
    path = _expanded(item, "--hydra_model_cfg")
    bases, is_name = _bases(item, path, request)
    if any(c in item for c in "*?[") and not any((b / path).exists() for b in bases):
        return _glob(item, path, bases)
    endings = [""] if path.suffix in FORMATS else [*EXTENSIONS, ""] if is_name else ["", *EXTENSIONS]
    tried = [Path(os.path.abspath(f"{base / path}{end}")) for base in bases for end in endings]
    found = next((t for t in tried if t.exists() and (t != CONFIGS or "/" not in item)), None)
    if path == Path("configs") or (found and found.is_dir()):
        raise ConfigError(
            f"command line: '{item}' is a directory. "
            f"Use --hydra_model_cfg='{item.rstrip('/')}/*.yaml' -m to sweep over it"
        )
    if found is None:
        raise ConfigError(_not_found(item, path, tried))
    if found.resolve() == BASE:
        raise ConfigError(
            f"command line: {shown(BASE)} is the shared base, not a model. "
            f"Choose one of: {', '.join(options())}"
        )
    if found.suffix not in FORMATS:
        raise ConfigError(f"command line: cannot read '{found.suffix}'. Accepted: {' '.join(FORMATS)}")
    return [found]


def _bases(item: str, path: Path, request: Request) -> tuple[list[Path], bool]:
    """The folders in which an item is looked for, in order, and whether it is a name rather than a path."""
    extra = [_folder("--config-dir", request.config_dir)] if request.config_dir else []
    if request.config_path:
        return [_folder("--config-path", request.config_path), *extra], False
    if path.suffix in FORMATS or "/" in item:
        return [Path.cwd(), ROOT, *extra], False
    return [CONFIGS, *extra], True


def _folder(flag: str, given: str) -> Path:
    """A folder that a flag names: from here, or from the project."""
    path = _expanded(given, flag)
    found = next((base / path for base in (Path.cwd(), ROOT) if (base / path).is_dir()), None)
    if found is None:
        raise ConfigError(
            f"command line: {flag}: no such folder: {given} (looked from {Path.cwd()} and {ROOT})"
        )
    return found


def _expanded(given: str, flag: str) -> Path:
    try:
        return expand_path(given)
    except ValueError as error:
        raise ConfigError(f"command line: {flag}: {error}") from None


def _glob(item: str, path: Path, bases: list[Path]) -> list[Path]:
    for base in bases:
        pattern = str(base / path)
        if base == CONFIGS and path.suffix not in FORMATS:
            matches = [CONFIGS / f"{n}.yaml" for n in fnmatch.filter(options(), item)]
        else:
            matches = [Path(m) for m in sorted(glob.glob(pattern, recursive=True))]
        # Python files are configurations where they are asked for; beside others they are mostly programs.
        fits = FORMATS if path.suffix == ".py" else DATA_FORMATS
        found = [m for m in matches if m.suffix in fits and m.resolve() != BASE and m.is_file()]
        if found:
            return found
    raise ConfigError(f"command line: the pattern '{item}' matches no config")


def _not_found(item: str, path: Path, tried: list[Path]) -> str:
    if re.match(r"[\w.]+=", item):
        return f"command line: --hydra_model_cfg has no value of its own: '{item}' stands where a model file belongs"
    if path.suffix and path.suffix not in FORMATS:
        return f"command line: cannot read '{path.suffix}'. Accepted: {' '.join(FORMATS)}"
    if item.startswith("$"):
        return f"command line: no such file: {item}. A variable of the shell that is not set, or within '' quotes"
    if (found := models.alias(item)) is not None:
        words = " ".join([shown(CONFIGS / f"{found[0]}.yaml"), *words_of(found[1])])
        return f"command line: no such file: {item}. It is type {found[0]} here: --hydra_model_cfg={words}"
    names = nearest(path.stem, options())
    if path.stem == item and item in options():
        return (
            f"command line: no such file: {item} in {tried[0].parent}. It is in configs/, whose place --config-path "
            f"takes; --config-dir adds a folder to it"
        )
    if path.suffix or "/" in item:
        names = [f"{path.parent.as_posix()}/{name}{path.suffix or EXTENSIONS[0]}" for name in names]
    near = suggestion(names)
    places = " and ".join(dict.fromkeys(str(t) for t in tried if t.suffix in FORMATS))
    return f"command line: no such file: {item} (tried {places}).{near}"
