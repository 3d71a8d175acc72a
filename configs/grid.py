"""A sweep over a grid, composed and checked whole before its first job starts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from configs.compose import Checked, Plan, check
from configs.frontend import SWEEP_LIMIT
from configs.hydra_app import MODEL_GROUP, Composer, compose_hydra
from configs.messages import ConfigError
from configs.runs import named_folder
from configs.sweeps import on_one_gpu

MOST = 1000  # points, where `sweep_limit` does not say otherwise


def hydra_settings(plan: Plan) -> Any:
    """What Hydra's own settings come to: `sweeper`, `launcher`, `sweep`."""
    fixed = [
        o.input_line
        for o in OverridesParser.create().parse_overrides(plan.overrides)
        if not o.is_sweep_override() and o.input_line
    ]
    return compose_hydra([*fixed, f"{MODEL_GROUP}='{next(iter(plan.models))}'"]).hydra


def check_grid(
    plan: Plan, tell: Callable[[int, int], None] = lambda done, of: None, *, again: bool = False
) -> list[Checked] | None:
    """Compose and check every point of a grid before the first starts; `None` for other sweepers, whose
    trials do not exist yet. One bad point stops all, and the message lists every bad one. `tell`: points done, of all.
    `again`: runs that have begun go on."""
    parser = OverridesParser.create()
    settings = hydra_settings(plan)
    if not str(settings.sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return None
    extra = [f"{k}={v}" for k, v in (settings.sweeper.get("params") or {}).items()]
    parsed = parser.parse_overrides([*extra, *plan.overrides])
    try:
        _refuse_many(parsed, plan.request.sweep_limit)
        (points,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise ConfigError(
            f"command line: {error}: a grid takes lists (a,b), choice, range and glob. Others need a sweeper that "
            "searches, hydra/sweeper=optuna for one"
        ) from None
    varied = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    problems: list[str] = []
    checked: list[Checked] = []
    composer = Composer()
    for number, point in enumerate(points):
        label = " ".join(p.replace(MODEL_GROUP, "model") for p in point if p.split("=")[0] in varied)
        option = next(p.partition("=")[2].strip("'") for p in point if p.startswith(f"{MODEL_GROUP}="))
        try:
            tree = composer.tree(point, plan.where(option, plan.request.values))
            on_one_gpu(tree, settings.launcher)
            if again and named_folder(tree, plan.request.keys):
                tree["resume"] = "auto"
            checked.append(check(plan, tree, option))
        except ConfigError as error:
            problems += [f"job {number} ({label}): {p}" for p in error.problems]
        tell(number + 1, len(points))
    folders = [c.folder for c in checked if c.folder]
    if len(set(folders)) < len(folders):
        shared = next(f for f in folders if folders.count(f) > 1)
        problems.append(
            f"{folders.count(shared)} jobs would share the run folder {shared}. "
            "Leave model_name and output_dir out of a sweep, or sweep over them too"
        )
    if problems:
        raise ConfigError(problems)
    return checked


def _refuse_many(parsed: list[Override], limit: int | None) -> None:
    """ConfigError for more points than anybody means to start by a slip of the hand."""
    most, points = limit or MOST, 1
    for override in parsed:
        if override.is_sweep_override() and override.is_discrete_sweep():
            points *= sum(1 for _ in itertools.islice(override.sweep_string_iterator(), most + 1))
        if points > most:
            raise ConfigError(
                f"command line: this grid has more than {most:,} points. Sweep over less, or raise the limit: "
                f"{SWEEP_LIMIT}=<points>"
            )
