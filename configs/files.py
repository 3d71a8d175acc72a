"""Model files: finding them, reading them with line numbers, following `defaults`."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import models
from configs.defaults_list import parse_entry, placed
from configs.formats import directives, gpt_keys, json_preset, legacy_py, memory_sections, yaml_text
from configs.formats.text import require_file
from configs.messages import ARCHITECTURE_ALIASES, RENAMED, ConfigError, own_words
from configs.schema import CHOICES
from configs.shape import misshapen
from naming import did_you_mean, expand_path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
BASE = CONFIGS / "training.yaml"
PRESETS = CONFIGS / "preset"
EXTENSIONS = (".yaml", ".yml")
DATA_FORMATS = (*EXTENSIONS, ".json", ".config")  # which no program is written in
FORMATS = (*DATA_FORMATS, ".py")  # of a model file
SELF = "_self_"
ANY_TYPE = "vanilla"  # of files that say none in formats of other projects
_HEADER = re.compile(r"\A(?:#.*\n|\s*\n)*?#\s*@package\s+(?P<package>\S+)")
_PLAIN = re.compile(r"(?!optional )[^@]*(?<!\.yaml)(?<!\.yml)")  # an entry that Hydra reads as we do


def options(folder: str = "") -> list[str]:
    """Names of the YAML files in `configs/<folder>`; the shared base is not among them. Sizes in JSON are presets."""
    found = {p.stem for p in (CONFIGS / folder).iterdir() if p.suffix in EXTENSIONS and p != BASE}
    return sorted(found | (sizes() if folder == PRESETS.name else set()))


def sizes() -> set[str]:
    """Names of the JSON files in `configs/`."""
    return {path.stem for path in CONFIGS.glob("*.json")}


def option_path(group: str, name: str) -> Path:
    """Where an option of a group is. A preset may also be any JSON file, by its path."""
    if group == PRESETS.name and Path(name).suffix == ".json":
        return Path(name)
    path = CONFIGS / group / f"{name}.yaml"
    return CONFIGS / f"{name}.json" if group == PRESETS.name and name in sizes() else path


def read_option(group: str, name: str) -> Node:
    """An option of a group. Raises ConfigError."""
    path = option_path(group, name)
    return _size(path, name) if path.suffix == ".json" else read(path)


def choices(group: str) -> list[str]:
    """What may stand behind `<group>=`: the files of `configs/<group>/`, and the table's rows where there is one."""
    return sorted({*options(group), *(CHOICES[group].table if group in CHOICES else ())})


def description(path: Path) -> str:
    """First comment line of a YAML file that says something; what is wrong with one that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"invalid: not UTF-8 text ({error.reason} at byte {error.start})"
    except OSError as error:
        return f"invalid: {error.strerror or error}"
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line and "yaml-language-server:" not in line:
            return line.lstrip("# ").strip()
    return ""


def describe(group: str, name: str) -> str:
    """One line about an option: what its file says, else the table's row."""
    path = option_path(group, name)
    if path.suffix == ".json":
        return json_preset.description(path)
    return description(path) if path.is_file() else CHOICES[group].table[name].description


def shown(path: Path) -> str:
    """A path as people write it: relative to where they are or to the project, else in full."""
    for base in (Path.cwd(), ROOT):
        if path.is_relative_to(base) and base != Path(base.anchor):
            return str(path.relative_to(base))
    return str(path)


@dataclasses.dataclass
class Node:
    """One YAML file, spellings folded, its parents loaded."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]  # dotted key -> line
    parents: list[Node | str]  # in order, SELF among them
    plain: bool  # Hydra's loader would read the same: nothing folded, every entry a plain name
    notices: list[str] = dataclasses.field(default_factory=list)
    rows: dict[str, Any] = dataclasses.field(default_factory=dict)  # see `gpt_keys.ROWS`; {} in our own files
    size: str = ""  # the preset that it is

    def place(self, key: str) -> str:
        """Where a key stands, for messages."""
        return f"{shown(self.path)}:{self.lines.get(key, 1)}"

    def chain(self) -> Iterator[Node]:
        """This file and its parents in the order in which they apply."""
        for parent in self.parents:
            if isinstance(parent, Node):
                yield from parent.chain()
            else:
                yield self

    def stated(self, key: str, *, presets: bool = True) -> Any:
        """The value that the chain gives to a top-level key, `None` where it is missing or `???`. `presets`: whether
        those in the chain count."""
        chain = [n for n in self.chain() if presets or not n.size]
        values = [n.values[key] for n in chain if n.values.get(key) not in (None, "???")]
        return values[-1] if values else None

    def native(self) -> bool:
        """Whether Hydra may load file and parents by itself."""
        parents = (p for p in self.parents if isinstance(p, Node))
        return self.plain and self.path.is_relative_to(CONFIGS) and all(p.native() for p in parents)


def read(path: Path, stack: tuple[Path, ...] = (), package: str = "", type_: str | None = None) -> Node:
    """A file and, recursively, the files of its `defaults`. Its fields stand under `package`. `type_`: the architecture
    that a file which builds on it says; of directives that changes which fields they mean. Raises ConfigError."""
    path = path.resolve()
    if path in stack:
        cycle = (*stack[stack.index(path) :], path)
        raise ConfigError(f"{shown(path)}: inheritance cycle: {' -> '.join(shown(p) for p in cycle)}")
    if path.suffix == ".json":
        return _preset(path)
    if path.suffix == ".config":
        return _directives(path, stack, type_)
    if path.suffix == ".py":
        return _assignments(path, type_)
    values, lines, otherwise = _parse(path)
    if memory_sections.is_sections(values):
        return _sections(path, values, lines)
    entries = values.pop("defaults", [])
    if not isinstance(entries, list):
        raise ConfigError(
            f"{shown(path)}:{lines['defaults']}: defaults must be a list, e.g. [training, _self_]"
        )
    at = lines.get("defaults", 1)
    values, lines = placed(values, lines, package)
    if "hydra" in values:
        raise ConfigError(
            f"{shown(path)}:{lines.get('hydra', at)}: settings of Hydra cannot stand in a model file. Give them on the "
            "command line, e.g. hydra.sweep.dir=<folder>; folders of further files by --config-dir=<folder>"
        )
    folded, notices = _fold(path, values, lines)
    plain = not (folded or package or otherwise) and all(
        isinstance(e, str) and _PLAIN.fullmatch(e) for e in entries
    )
    parents: list[Node | str] = []
    for entry in entries:
        parents += _parents(path, at, entry, (*stack, path), package)
    if SELF not in parents:
        parents.append(SELF)
    size = path.stem if path.parent == PRESETS else ""
    node = Node(path, values, lines, parents, plain, notices, size=size)
    _fold_of_type(node)
    return node


def read_model(path: Path) -> Node:
    """Load a file as the model of a run: it must build on `training`, in the right order."""
    node = read(path)
    bases = [i for i, p in enumerate(node.parents) if isinstance(p, Node) and _has_base(p)]
    if not bases:
        raise ConfigError(
            f"{shown(path)}: defaults must contain 'training'. "
            "Begin the file with: defaults: [training, _self_]"
        )
    if node.parents.index(SELF) < bases[-1]:
        raise ConfigError(
            f"{shown(path)}:{node.lines['defaults']}: defaults lists _self_ before training, "
            "so training.yaml would override this file. Put _self_ last"
        )
    if problems := [p for n in node.chain() for p in misshapen(n.values, n.place, resolved=False)]:
        raise ConfigError(problems)
    return node


def _preset(path: Path) -> Node:
    """A JSON file of sizes: the file of its architecture, and these."""
    values, lines, notices = json_preset.load(path, shown(path))
    base = read(CONFIGS / f"{json_preset.ARCHITECTURE}.yaml")
    rows = {"batch_size": values["global_batch_size"]}
    return Node(path, values, lines, [base, SELF], plain=False, notices=notices, rows=rows)


def _size(path: Path, name: str) -> Node:
    """The same file as a preset of this name: its sizes, whatever the architecture."""
    values, lines, notices = json_preset.load(path, shown(path))
    del values["type"]
    values = {"preset": name, **values, **gpt_keys.WHOLE_STEPS}
    return Node(path, values, lines, [SELF], plain=False, notices=notices, size=name)


def _sections(path: Path, values: dict[str, Any], lines: dict[str, int]) -> Node:
    """A file of three sections: the file of its architecture, and these."""
    base = read(CONFIGS / f"{memory_sections.type_of(values)}.yaml")
    own = frozenset(base.values["model_cfg"])
    turned, places, notices = memory_sections.turn(values, lines, own, shown(path))
    return Node(path, turned, places, [base, SELF], plain=False, notices=notices)


def _directives(path: Path, stack: tuple[Path, ...], type_: str | None) -> Node:
    """A file of directives: that of its FROM, else the file of its architecture, and what it says."""
    parent, entries = directives.load(path, shown(path))
    wanted = type_ or _known_type(entries, "MODEL", shown(path))
    base = _from(path, parent, (*stack, path), wanted) if parent else None
    return _turned(path, entries, base, wanted, "MODEL type=gpt2")


def _assignments(path: Path, type_: str | None) -> Node:
    """A Python file of settings: the file of its architecture, and what it says."""
    entries = legacy_py.load(path, shown(path))
    return _turned(path, entries, None, type_ or _known_type(entries, "", shown(path)), "type = 'gpt2'")


def _known_type(entries: list[gpt_keys.Stated], section: str, where: str) -> str | None:
    """The architecture that a file names, if it does. ConfigError where there is no such one."""
    stated = next((e for e in entries if (e.section, e.key) == (section, "type")), None)
    if stated is None:
        return None
    if not isinstance(stated.value, str):
        raise ConfigError(f"{where}:{stated.line}: type: expected a name, got {stated.value!r}")
    try:
        models.resolve((models.alias(stated.value) or (stated.value,))[0])
    except ValueError as error:
        raise ConfigError(f"{where}:{stated.line}: {error}") from None
    return stated.value


def _turned(
    path: Path, entries: list[gpt_keys.Stated], base: Node | None, wanted: str | None, example: str
) -> Node:
    """A file with the keys of GPT trainers over what it builds on, for an architecture that it or a file over it names.
    `example`: how a file of the format names one."""
    notices = []
    stated = base.stated("type") if base else None
    word = wanted or stated
    if word is None:
        word = ANY_TYPE
        notices.append(f"{shown(path)} states no type: taken as {word} (gpt2: {example})")
    type_, meant = models.alias(word) or (word, {})
    if stated not in (None, type_):
        assert base
        raise ConfigError(
            f"{shown(path)}: it is to be of type {type_}, and {shown(base.path)}, on which it builds, is of type "
            f"{stated}. Leave one of them out"
        )
    home = CONFIGS / f"{type_}.yaml" if type_ in models.ARCHITECTURES else BASE
    own = frozenset(read(home).values["model_cfg"]) if home != BASE else None
    turned = gpt_keys.turn(entries, type_, own, base.rows if base else {}, shown(path))
    for name, value in meant.items():
        turned.values["model_cfg"].setdefault(name, value)
    if isinstance(turned.values.get("kernels"), str):
        turned.values["kernels"] = {"default": turned.values["kernels"]}
    notices += turned.notices
    parents: list[Node | str] = [base or read(home), SELF]
    return Node(path, turned.values, turned.lines, parents, False, notices, turned.rows)


def _from(path: Path, wanted: gpt_keys.Stated, stack: tuple[Path, ...], type_: str | None) -> Node:
    """The file behind FROM: one beside the other or below it, else one in configs/."""
    where = f"{shown(path)}:{wanted.line}"
    try:
        given = expand_path(wanted.value)
    except ValueError as error:
        raise ConfigError(f"{where}: FROM {error}") from None
    tried = [folder / f"{given}{end}" for folder in (path.parent, CONFIGS) for end in ("", ".config")]
    found = next((t for t in tried if t.is_file()), None)
    if found is None:
        places = ", ".join(dict.fromkeys(shown(t) for t in tried))
        raise ConfigError(f"{where}: FROM {wanted.value!r}: no such config (tried {places})")
    home = path.parent.resolve()
    if not any(found.resolve().is_relative_to(folder) for folder in (home, CONFIGS)):
        raise ConfigError(
            f"{where}: FROM {wanted.value!r} leads to {found.resolve()}, out of {shown(home)}. A file builds on those "
            "beside it and on configs/ alone: copy it there"
        )
    if found.suffix not in FORMATS:
        raise ConfigError(
            f"{where}: FROM {wanted.value!r}: cannot read {found.suffix!r}. Accepted: {' '.join(FORMATS)}"
        )
    node = read(found, stack, type_=type_)
    if given.is_absolute() or ".." in given.parts:
        node.notices.insert(0, f"{where}: FROM leads to {found.resolve()}")
    return node


def _has_base(node: Node) -> bool:
    return any(n.path.name == BASE.name for n in node.chain())


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, int], bool]:
    """Values of a file, their lines, and whether Hydra's loader would read others."""
    require_file(path, shown(path))
    try:
        text = path.read_text(encoding="utf-8")
        values, tree, otherwise = yaml_text.parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{shown(path)}{line}: {place}{error.problem}") from None
    except yaml_text.Unreadable as error:
        raise ConfigError(f"{shown(path)}{f':{error.line}' if error.line else ''}: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown(path)}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{shown(path)}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{shown(path)}: a model file is a mapping of keys to values")
    # A file of bare words is read by OmegaConf as keys without values; nobody means that.
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise ConfigError(
            f"{shown(path)}:1: expected 'key: value' lines, got {text.strip().splitlines()[0]!r}"
        )
    if (header := _HEADER.search(text)) and header["package"] != "_global_":
        number = text.count("\n", 0, header.start("package")) + 1
        raise ConfigError(
            f"{shown(path)}:{number}: '# @package {header['package']}' is not read here: fields stand where they are "
            f"written. Leave it out; the list that names a file can place it: {path.stem}@{header['package']}"
        )
    own = {str(k): copy.deepcopy(v) for k, v in values.items()}
    return own, dict(_lines(tree, "")) if tree is not None else {}, otherwise


def _lines(tree: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(tree, yaml.MappingNode):
        for key, value in tree.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _lines(value, f"{name}.")


def fold_names(values: dict[str, Any], names: dict[str, str], prefix: str = "") -> list[tuple[str, str]]:
    """Rename keys in place; the renamed pairs. Both spellings with different values are an error."""
    folded = []
    for old, new in names.items():
        if old not in values:
            continue
        value = values.pop(old)
        if new in values and values[new] != value:
            raise ConfigError(
                f"{prefix}{new} ({values[new]}) and {prefix}{old} ({value}) name the same field and differ. "
                f"Keep {prefix}{new}{own_words([f'{prefix}{old}'])}"
            )
        values[new] = value
        folded.append((f"{prefix}{old}", f"{prefix}{new}"))
    return folded


def _fold_fields(values: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    """As `fold_names`, of an architecture's fields and those of another one within it."""
    folded = fold_names(values, ARCHITECTURE_ALIASES, prefix)
    inner = [(name, value) for name, value in values.items() if isinstance(value, dict)]
    return folded + [pair for name, value in inner for pair in _fold_fields(value, f"{prefix}{name}.")]


def words_of(fields: Mapping[str, Any]) -> list[str]:
    """Fields of `model_cfg` as a command line says them."""
    return [f"model_cfg.{name}={json.dumps(value)}" for name, value in fields.items()]


def fold_type(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Give another word for a type its own name in place, and the fields that go with the word; what was read as what.
    ConfigError where one of these fields says otherwise."""
    if (found := models.alias(values.get("type"))) is None:
        return []
    word = values["type"]
    values["type"], fields = found
    model_cfg = values["model_cfg"] = dict(values.get("model_cfg") or {})
    for name, value in fields.items():
        if model_cfg.setdefault(name, value) != value:
            raise ConfigError(
                f"type: {word} is {found[0]} with {words_of({name: value})[0]}, and model_cfg.{name} is "
                f"{json.dumps(model_cfg[name])}. Give type: {found[0]} instead"
            )
    return [(word, " ".join([found[0], *words_of(fields)]))]


def _fold(path: Path, values: dict[str, Any], lines: dict[str, int]) -> tuple[bool, list[str]]:
    """Give fields their one spelling, in place. (whether any had another, what people are told of it)"""
    accepted = []
    try:
        renamed = fold_names(values, RENAMED) + fold_type(values)
        if isinstance(values.get("model_cfg"), dict):
            accepted = _fold_fields(values["model_cfg"], "model_cfg.")
    except ConfigError as error:
        raise ConfigError([f"{_at(path, lines, p)}: {p}" for p in error.problems]) from None
    if isinstance(values.get("kernels"), str):
        values["kernels"] = {"default": values["kernels"]}
        accepted.append(("kernels", "kernels.default"))
    for old, new in renamed + accepted:
        lines.setdefault(new, lines.get(old, 1))
    return bool(renamed or accepted), [f"{shown(path)}: '{old}' is read as '{new}'" for old, new in renamed]


def _at(path: Path, lines: dict[str, int], problem: str) -> str:
    """The place in a file of the last key that a problem names."""
    named = [lines[word] for word in re.findall(r"[\w.]+\w", problem) if word in lines]
    return f"{shown(path)}:{max(named)}" if named else shown(path)


def _fold_of_type(node: Node) -> None:
    """Give fields the one spelling that the node's type alone has others for, in place."""
    row, fields = models.ARCHITECTURES.get(str(node.stated("type"))), node.values.get("model_cfg")
    if row is None or not isinstance(fields, dict):
        return
    try:
        folded = fold_names(fields, dict(row.spellings), "model_cfg.")
    except ConfigError as error:
        raise ConfigError([f"{shown(node.path)}: {p}" for p in error.problems]) from None
    for old, new in folded:
        node.lines.setdefault(new, node.lines.get(old, 1))
    node.plain = node.plain and not folded


def _parents(path: Path, line: int, entry: Any, stack: tuple[Path, ...], package: str) -> list[Node | str]:
    """The nodes of one entry of `defaults`."""
    if entry == SELF:
        return [SELF]
    where = f"{shown(path)}:{line}"
    nodes: list[Node | str] = []
    for wanted in parse_entry(entry, where):
        found, tried = _find_parent(path, where, wanted.name)
        size = wanted.name.removeprefix(f"{PRESETS.name}/")
        if found is None and size != wanted.name and size in sizes():
            nodes.append(read_option(PRESETS.name, size))
        elif found is not None:
            inner = ".".join(part for part in (package, wanted.package) if part)
            nodes.append(read(found, stack, inner))
        elif not wanted.optional:
            raise ConfigError(
                f"{where}: no such config: {wanted.name} (tried {', '.join(shown(t) for t in tried)})"
            )
    return nodes


def _find_parent(path: Path, where: str, name: str) -> tuple[Path | None, list[Path]]:
    """The file, and where it was looked for: beside the other first, then in configs/. A leading slash is Hydra's way
    to say: from the project."""
    bare = name[1:] if name.startswith("/configs/") else name
    folders = [ROOT] if bare != name else [path.parent, CONFIGS]
    endings = [""] if Path(bare).suffix in EXTENSIONS else list(EXTENSIONS)
    try:
        expanded = expand_path(bare).as_posix()
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    tried = [folder / (expanded + end) for folder in folders for end in endings]
    for candidate in tried:
        # A file called training.yaml may build on the shared one; any other self-reference is a cycle.
        if candidate.is_file() and not (bare == BASE.stem and candidate.resolve() == path):
            return candidate, tried
    return None, tried


def check_option(group: str, name: Any, where: str) -> str:
    """The name, if it is one of the group's `choices`."""
    available = choices(group)
    if name in available:
        return str(name)
    raise ConfigError(
        f"{where}: no {group} '{name}'.{did_you_mean(str(name), available)} Available: {', '.join(available)}"
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, first 16 hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Locations:
    """Where a key of the composed tree got its value, for messages."""

    def __init__(self, layers: list[Node], command_line: set[str]) -> None:
        self.layers = layers  # in the order in which they apply
        self.command_line = command_line

    def __call__(self, key: str) -> str:
        """`configs/gpt2.yaml:12`, `command line`, or the key itself where its origin is not known."""
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            name = ".".join(parts[:length])
            if name in self.command_line:
                return "command line"
            for node in reversed(self.layers):
                if name in node.lines and (length > 1 or len(parts) == 1):
                    return f"{shown(node.path)}:{node.lines[name]}"
        return ""
