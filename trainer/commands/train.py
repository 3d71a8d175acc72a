"""The `train` command: one run, composed and started here; a sweep of them, by Hydra."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.completion import asked_of, complete
from configs.compose import Checked, Plan, check, prepare, tree_of, two_rates
from configs.dump import job_text
from configs.files import CONFIGS, ROOT, digest
from configs.formats.yaml_text import literal
from configs.grid import check_grid
from configs.hardware import require_meeting_place
from configs.help import help_text
from configs.hydra_app import APP, compose_hydra, sweep_folder
from configs.hydra_words import is_setting
from configs.messages import ConfigError
from configs.runs import checkpoints, named_folder
from configs.schema import env_strings, no_variable
from configs.secret import kept_secret
from configs.validate import validate
from configs.weights import take_sizes
from trainer import clock
from trainer.commands import launch
from trainer.errors import TrainingError


def main(argv: list[str]) -> int:
    """Train what the command line says. Raises ConfigError for the user's mistakes (exit status 2)."""
    require_meeting_place()
    if launch.launched() and launch.rank() > 0:
        return launch.follow()
    with launch.leading():
        return _lead(argv)


def _lead(argv: list[str]) -> int:
    plan = prepare(argv)
    if plan.request.mode != "run":
        return _show(plan)
    if plan.request.multirun:
        launch.apply_env({}, plan.secrets)
        return _sweep(plan)
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
        raise KeyboardInterrupt(_how_to_go_on(folder)) from None
    if problem is not None:
        raise problem  # out here it does not become its own cause
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "folder": str(folder.absolute())}


def _how_to_go_on(folder: Path) -> str:
    if not checkpoints(folder):
        return "stopped; nothing was saved"
    return f"stopped; go on with: train({[f'resume={folder.absolute()}']})"


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
    _hydra(plan, lambda cfg: None)
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


def _sweep(plan: Plan) -> int:
    if launch.launched():
        raise ConfigError(
            "a sweep starts its own processes. Instead of torchrun use: python mytrainer.py ... num_gpus=N -m"
        )
    check_grid(plan)
    model = f"configs@_global_='{next(iter(plan.models))}'"
    settings = [o for o in plan.overrides if is_setting(o.lstrip("+~"))]
    folder = sweep_folder([*settings, model], plan.where(None, plan.request.values))
    launch.require_writable(Path(folder).absolute().parent)
    _say(plan)
    _hydra(plan, sweep_job)
    return 0


def sweep_job(cfg: DictConfig) -> float:
    """One job of a sweep, wherever a Hydra launcher runs it; the training has a process of its own."""
    clock.start()
    values = _resolved(cfg)
    assert isinstance(values, dict)
    job = HydraConfig.get()
    try:
        explicit = {o.partition("=")[0].lstrip("+") for o in job.overrides.task}
        tree = {str(k): v for k, v in values.items()}
        where = take_sizes(tree, explicit, [], lambda key: "command line" if key in explicit else "")
        run_cfg, model_cfg = validate(tree, where)
        folder = named_folder(run_cfg.model_dump(), explicit) or Path(job.runtime.output_dir)
        return launch.start(run_cfg, model_cfg, folder, isolated=True, origin=_origin(job))
    except ConfigError as error:
        raise CompactHydraException(error.report()) from None
    except launch.JobFailed as failed:
        failed.say()
        raise CompactHydraException(f"job {job.job.num}: {failed}") from None


def _resolved(cfg: DictConfig) -> Any:
    try:
        with kept_secret():
            return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise CompactHydraException(str(error).partition("\n")[0]) from None


def _origin(job: HydraConf) -> str:
    """The model file of a sweep job and its digest."""
    option = job.runtime.choices["configs@_global_"]
    path = CONFIGS / f"{option}.yaml"
    if not path.is_file():
        path = Path(ConfigStore.instance().load(f"configs/{option}.yaml").provider or "")
    return f"{path} (sha256 {digest(path)})" if path.is_file() else option


def _hydra(plan: Plan, task: object) -> None:
    """Hand over to `hydra.main`: sweeps, --cfg and --info. Its parser wants the flags first."""
    _guard_argparse()
    # The run folder's config.yaml says more than Hydra's own record, which a second run would write over.
    sys.argv = [sys.argv[0], *plan.request.flags, "hydra.output_subdir=null", *plan.overrides]
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(version_base="1.3", config_path=str(ROOT), config_name=APP)(task)()  # type: ignore[arg-type]


def _guard_argparse() -> None:
    """Python 3.14 checks help texts when an option is added; one of Hydra 1.3 is not a string."""
    if hasattr(argparse.ArgumentParser, "_check_help"):
        argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
