"""The `train` command: one run, composed and started here; a sweep of them, by Hydra."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from configs import trust
from configs.completion import asked_of, complete
from configs.compose import Checked, Plan, check, prepare, tree_of, two_rates
from configs.dump import job_text
from configs.formats.yaml_text import literal
from configs.hardware import require_meeting_place
from configs.help import help_text
from configs.hydra_app import compose_hydra
from configs.messages import ConfigError
from configs.runs import checkpoints
from configs.schema import RunConfig, env_strings, no_variable
from configs.sweeps import MULTIRUN, repeated
from trainer.commands import launch
from trainer.commands.sweep import go_to_where_it_began, hand_over, start_sweep
from trainer.errors import TrainingError


def main(argv: list[str]) -> int:
    """Train what the command line says. Raises ConfigError for the user's mistakes (exit status 2)."""
    require_meeting_place()
    if launch.launched() and launch.rank() > 0:
        return launch.follow()
    with launch.leading(), trust.of_one_command():
        return _lead(argv)


def _lead(argv: list[str]) -> int:
    if again := repeated(argv):
        argv = go_to_where_it_began(*again)
    plan = prepare(argv, again[1] / MULTIRUN if again else None)
    if plan.request.mode != "run":
        return _show(plan)
    if plan.request.multirun:
        launch.apply_env({}, plan.secrets)
        trust.pass_on(plan.trusted)
        return start_sweep(plan, again[1] if again else None)
    ready = _checked(plan, composed(plan))
    try:
        _start(plan, *ready)
    except launch.JobFailed as failed:
        return failed.say()
    return 0


def composed(plan: Plan) -> dict[str, Any]:
    """The composition of one run, whose environment is set from now on: before the model file, hence torch, is
    imported."""
    launch.apply_env({}, plan.secrets)
    trust.pass_on(plan.trusted)
    tree = tree_of(plan)
    launch.apply_env(_env(tree["env"]))
    return tree


def call(plan: Plan, tree: dict[str, Any]) -> dict[str, Any]:
    """Train one run for a caller in Python: its summary, and its `folder`. Raises what the command line prints."""
    checked, folder = _checked(plan, tree)
    problem: Exception | None = None
    try:
        _start(plan, checked, folder)
    except launch.JobFailed as failed:
        problem = failed.error or TrainingError(f"{failed}; its traceback is on standard error")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(folder, checked.cfg)) from None
    if problem is not None:
        raise problem  # out here it does not become its own cause
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "folder": str(folder.absolute())}


def _how_to_go_on(folder: Path, cfg: RunConfig) -> str:
    if not checkpoints(folder):
        return "stopped; nothing was saved"
    return f"stopped; go on with: train({[f'resume={folder.absolute()}', *trust.words(cfg.type, cfg.model_adapter)]})"


def _env(value: object) -> dict[str, str]:
    """The variables of a tree that is not checked yet; what is none is refused later."""
    given = env_strings(value) if isinstance(value, dict) else {}
    return {k: v for k, v in given.items() if isinstance(v, str) and not no_variable(k, v)}


def _say(plan: Plan) -> None:
    for text in dict.fromkeys(plan.notices):
        print(f"note: {text}", file=sys.stderr)


def _show(plan: Plan) -> int:
    """--help, --cfg, --info: what is shown goes to stdout, then what is wrong to stderr."""
    request = plan.request
    if (
        request.mode == "help"
    ):  # not Hydra's, which walks every folder of the project in search of option groups
        print(help_text())
        if len(plan.models) == 1 and not request.sweeps:
            print("This configuration; override anything in it (key=value):\n")
            print(OmegaConf.to_yaml(OmegaConf.create(literal(tree_of(plan)))))
        return 0
    if request.completes and asked_of(request.overrides)[0] == "query":
        print("\n".join(complete(os.environ.get("COMP_LINE", ""))))
        return 0
    if request.shows_job:
        print(job_text(plan), end="", flush=True)
        try:
            check(plan, tree_of(plan))  # imports the model file
        finally:
            _say(plan)
        return 0
    _say(plan)
    if request.mode in ("cfg", "info"):
        compose_hydra(plan.overrides, plan.where(None, request.values))  # its mistakes in our words
    hand_over(plan, lambda cfg: None)
    if request.mode == "cfg" and len(plan.models) == 1:
        check(plan, tree_of(plan))
    return 0


def _checked(plan: Plan, tree: dict[str, Any]) -> tuple[Checked, Path]:
    """One run, ready to start, and its folder, which is there. Raises ConfigError."""
    checked = check(plan, tree)
    if why := checked.model_cfg.lacking():
        raise ConfigError(why)
    plan.notices += two_rates(plan, checked.cfg)
    _say(plan)
    folder = launch.run_folder(checked.cfg, checked.folder)
    launch.require_writable(folder)
    return checked, folder


def _start(plan: Plan, checked: Checked, folder: Path) -> None:
    sys.argv = [sys.argv[0], *plan.overrides]  # the manifest keeps these words; no secret is among them
    launch.start(checked.cfg, checked.model_cfg, folder, origin=checked.origin)
