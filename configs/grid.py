"""A sweep over a grid, composed and checked whole before its first job starts."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from configs.compose import Checked, Plan, check, tree_of
from configs.hydra_app import MODEL_GROUP, compose_hydra
from configs.messages import ConfigError


def check_grid(plan: Plan) -> list[Checked] | None:
    """Compose and check every point of a grid before the first starts; `None` for other sweepers, whose
    trials do not exist yet. One bad point stops all, and the message lists every bad one."""
    parser = OverridesParser.create()
    parsed = parser.parse_overrides(plan.overrides)
    fixed = [o.input_line for o in parsed if not o.is_sweep_override() and o.input_line]
    settings = compose_hydra([*fixed, f"{MODEL_GROUP}='{next(iter(plan.models))}'"]).hydra.sweeper
    if not str(settings.get("_target_", "")).endswith(".BasicSweeper"):
        return None
    extra = [f"{k}={v}" for k, v in (settings.get("params") or {}).items()]
    try:
        (points,) = BasicSweeper.split_arguments(parser.parse_overrides([*extra, *plan.overrides]), None)
    except HydraException as error:
        raise ConfigError(
            f"command line: {error}: a grid takes lists (a,b), choice, range and glob. Others need a sweeper that "
            "searches, hydra/sweeper=optuna for one"
        ) from None
    varied = {
        o.get_key_element()
        for o in parser.parse_overrides([*extra, *plan.overrides])
        if o.is_sweep_override()
    }
    problems: list[str] = []
    checked: list[Checked] = []
    for number, point in enumerate(points):
        label = " ".join(p.replace(MODEL_GROUP, "model") for p in point if p.split("=")[0] in varied)
        option = next(p.partition("=")[2].strip("'") for p in point if p.startswith(f"{MODEL_GROUP}="))
        try:
            checked.append(check(plan, tree_of(plan, point, option), option))
        except ConfigError as error:
            problems += [f"job {number} ({label}): {p}" for p in error.problems]
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
