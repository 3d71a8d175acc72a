"""Files of runs: what somebody else's run folder may say, and what it may not do.

A run's config.yaml says everything with its values. So nothing in it has to look into the environment of who goes on
with it, and what it sets there is for that person to repeat.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from antlr4 import ParserRuleContext
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from configs import trust
from configs.files import CONFIGS, Node, shown
from configs.grammar import override_choices, parse_override
from configs.messages import REDACTED, ConfigError, loads_code
from configs.request import Request
from configs.runs import folder_of_path

__all__ = ["harmless", "is_of_a_run", "of_runs", "refuse_code", "resolver", "tame"]

# Variables that change how a run goes, and neither what is loaded nor where something is sent.
_HARMLESS = re.compile(
    r"(OMP|MKL|OPENBLAS|NUMEXPR)_\w+|TOKENIZERS_PARALLELISM|PYTHONUNBUFFERED|PYTHONHASHSEED|NO_COLOR|COLUMNS|TZ"
    r"|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING)|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE"
    r"|PYTORCH_(CUDA_)?ALLOC_CONF|NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE)|(HF_HUB|HF_DATASETS|TRANSFORMERS)_OFFLINE"
    r"|WANDB_(MODE|PROJECT|SILENT)"
)


def is_of_a_run(path: Path) -> bool:
    """Whether a file lies in a run folder, beside what a run writes there, or in one of its checkpoints."""
    return any((path.parent / name).exists() for name in ("manifest.json", "training_state.json"))


def of_runs(nodes: Iterable[Node], implied: Path | None) -> Iterator[Node]:
    """The files that are of runs: `implied`, and others that lie in a run folder, each with its parents there."""
    for node in nodes:
        whole = node.path == implied or is_of_a_run(node.path)
        for inner in node.chain():
            if (whole or is_of_a_run(inner.path)) and not inner.path.is_relative_to(CONFIGS):
                yield inner


def refuse_code(
    nodes: list[Node],
    request: Request,
    saved: tuple[dict[str, Any], Path] | None,
    recorded: Path | None = None,
) -> frozenset[str]:
    """ConfigError where a file of a run names code to import that the command line does not trust. Returns the modules
    that may be imported: those that it trusts, and those that the user's own words and files name. `recorded`: the
    record that the words were read from, which are a run's then, as are the files that they name."""
    typed = {field: _given(field, request) for field in trust.NAMES_CODE if field in request.keys}
    every = [inner for node in nodes for inner in node.chain() if not inner.path.is_relative_to(CONFIGS)]
    theirs = every if recorded else list(of_runs(nodes, request.implied))
    known = trust.trusted() | request.trust
    if recorded:
        for field, specs in typed.items():
            for spec in specs:
                trust.refuse({field: spec}, str(recorded), recorded.parent, known)
    else:
        of_others = {inner.path for inner in theirs}
        mine = [inner.values for inner in every if inner.path not in of_others]
        named = {f: [*typed.get(f, ()), *(values.get(f) for values in mine)] for f in trust.NAMES_CODE}
        known |= {module for field, specs in named.items() for module in trust.foreign_modules(field, specs)}
    for inner in theirs:
        said = {field: value for field, value in inner.values.items() if field not in typed}
        trust.refuse(said, shown(inner.path), inner.path.parent, known)
    if saved:
        trust.refuse(saved[0], str(saved[1]), folder_of_path(saved[1].parent), known)
    return known


def _given(field: str, request: Request) -> list[Any]:
    """The values of a field on the command line, several in a sweep."""
    if field in request.sweeps:
        return override_choices(parse_override(f"{field}={request.written(field)}"), [])
    return [request.values.get(field)]


def tame(nodes: Iterable[Node], implied: Path | None, typed: set[str], notices: list[str]) -> None:
    """Take out of the files of runs, in place, what they set in the environment. `implied`: one that is known to be of
    a run; `typed`: keys of the command line. ConfigError for what looks there."""
    problems: list[str] = []
    for node in of_runs(nodes, implied):
        problems += _resolvers(node)
        notices += _drop_env(node, typed)
    if problems:
        raise ConfigError(problems)


def harmless(name: str) -> bool:
    """Whether a file of a run may set this variable."""
    return bool(_HARMLESS.fullmatch(name)) and not loads_code(name)


def _drop_env(node: Node, typed: set[str]) -> Iterator[str]:
    """Take out variables that nobody asked for; what is said of each."""
    env: Any = node.values.get("env")
    for name, value in list(env.items()) if isinstance(env, dict) else ():
        kept = harmless(str(name)) or value == REDACTED  # which asks for it
        if not kept and f"env.{name}" not in typed and not loads_code(str(name)):  # that is refused
            del env[name]
            yield (
                f"{node.place(f'env.{name}')}: env.{name}={value!r} comes with a run and is not set. If you mean it, "
                f"give it on the command line"
            )


def _resolvers(node: Node) -> Iterator[str]:
    for key, value in _leaves(node.values, ""):
        if (name := resolver(value)) is not None:
            yield (
                f"{node.place(key)}: {key}: ${{{name}:...}} looks beyond the file, which no file of a run may. Give "
                f"its value there, or on the command line"
            )


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted key and text of every text within."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(key), str(name)
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    elif isinstance(value, str):
        yield key, value


def resolver(text: str) -> str | None:
    """The first function that a text calls (`oc.env` in `${oc.env:HOME}`), None where it calls none."""
    if "${" not in text:
        return None
    try:
        waiting = [parse(text)]
    except OmegaConfBaseException:
        return None  # which is told where it is resolved
    while waiting:
        context = waiting.pop()
        if isinstance(context, OmegaConfGrammarParser.InterpolationResolverContext):
            return context.resolverName().getText()
        if isinstance(context, ParserRuleContext):
            waiting += context.children or []
    return None
