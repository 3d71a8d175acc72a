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

from configs.files import CONFIGS, Node
from configs.messages import REDACTED, ConfigError, loads_code

__all__ = ["is_of_a_run", "resolver", "tame"]

# Variables that change how a run goes, and neither what is loaded nor where something is sent.
_HARMLESS = re.compile(
    r"(OMP|MKL|OPENBLAS|NUMEXPR)_\w+|TOKENIZERS_PARALLELISM|PYTHONUNBUFFERED|PYTHONHASHSEED|NO_COLOR|COLUMNS|TZ"
    r"|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING)|CUBLAS_WORKSPACE_CONFIG|NVIDIA_TF32_OVERRIDE"
    r"|PYTORCH_(CUDA_)?ALLOC_CONF|NCCL_(DEBUG|P2P_DISABLE|IB_DISABLE)|(HF_HUB|HF_DATASETS|TRANSFORMERS)_OFFLINE"
    r"|WANDB_(MODE|PROJECT|SILENT)"
)


def is_of_a_run(path: Path) -> bool:
    """Whether a file lies in a run folder, beside what a run writes there."""
    return (path.parent / "manifest.json").exists()


def tame(nodes: Iterable[Node], implied: Path | None, typed: set[str], notices: list[str]) -> None:
    """Take out of the files of runs, in place, what they set in the environment. `implied`: one that is known to be of
    a run; `typed`: keys of the command line. ConfigError for what looks there."""
    problems: list[str] = []
    for node in nodes:
        if node.path != implied and not is_of_a_run(node.path):
            continue
        for inner in node.chain():
            if not inner.path.is_relative_to(CONFIGS):
                problems += _resolvers(inner)
                notices += _drop_env(inner, typed)
    if problems:
        raise ConfigError(problems)


def _drop_env(node: Node, typed: set[str]) -> Iterator[str]:
    """Take out variables that nobody asked for; what is said of each."""
    env: Any = node.values.get("env")
    for name, value in list(env.items()) if isinstance(env, dict) else ():
        harmless = _HARMLESS.fullmatch(str(name)) or value == REDACTED  # which asks for it
        if not harmless and f"env.{name}" not in typed and not loads_code(str(name)):  # that is refused
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
