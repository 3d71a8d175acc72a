"""A sweep: checked whole, handed over to Hydra, and what its folder holds in the end."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from configs import trust
from configs.compose import Checked, Plan
from configs.files import CONFIGS, ROOT, digest
from configs.grammar import word
from configs.grid import check_grid, hydra_settings
from configs.hardware import available_cores, uses_cuda
from configs.heads import keep_widths
from configs.hydra_app import APP, register, resolved, sweep_folder
from configs.hydra_words import is_setting
from configs.messages import ConfigError
from configs.runs import named_folder
from configs.schema import ModelConfig, RunConfig, redacted
from configs.secret import field_of, kept_secret
from configs.sweeps import CALLBACK, on_one_gpu, recorded_words, side_by_side, working_folder
from configs.validate import met, validate
from configs.weights import take_sizes
from naming import command_line
from trainer import clock
from trainer.commands import launch
from trainer.sweep import jobs as kept
from trainer.sweep import study
from trainer.sweep.gpus import own_gpus
from trainer.sweep.jobs import Job, jobs_in
from trainer.view.console import Console

BATCH = "hydra.sweeper.max_batch_size"
STOPPED = "stopped before its end"
CHECKING = "checking the points of the sweep"


def go_to_where_it_began(words: list[str], sweep: Path) -> list[str]:
    """Relative paths of the command of a sweep mean the folder that it was given in. Returns the words."""
    there = working_folder(sweep)
    if there.absolute() != Path.cwd():
        if not there.is_dir():
            raise ConfigError(f"command line: the sweep was started in {there}, which is no folder here")
        print(f"note: relative paths mean {there}, where the sweep was started", file=sys.stderr)
        os.chdir(there)
    return words


def start_sweep(plan: Plan, earlier: Path | None = None) -> int:
    """Train every job; the exit status. `earlier`: the folder of a sweep that goes on."""
    if launch.launched():
        raise ConfigError(
            "a sweep starts its own processes. Instead of torchrun use: python mytrainer.py ... num_gpus=N -m"
        )
    began = time.time()
    with Console().doing(CHECKING) as tell:
        checked = check_grid(
            plan, lambda done, of: tell(f"{CHECKING}, {done:,} of {of:,}"), again=bool(earlier)
        )
    model = f"configs@_global_='{next(iter(plan.models))}'"
    settings = [o for o in plan.overrides if is_setting(o.lstrip("+~"))]
    folder = Path(sweep_folder([*settings, model], plan.where(None, plan.request.values))).absolute()
    jobs = _there(folder, earlier, trust.repeated(plan.trusted))
    numbers = _numbers(checked, jobs, plan.request.sweeps) if checked is not None else []
    searched = hydra_settings(plan) if checked is None else None  # a grid asks nothing more of Hydra
    own = study.settings(searched, plan.request.settings, folder) if searched else []
    if own is not None:
        own += _no_more_than_cores(plan)
    launch.require_writable(folder.parent)
    for text in dict.fromkeys(plan.notices):
        print(f"note: {text}", file=sys.stderr)
    told = {
        "_target_": "trainer.sweep.callback.Sweep",
        **recorded_words(plan.request, plan.secrets),
        "varied": sorted(plan.request.sweeps),
        "began": began,
        "numbers": numbers,
        "first": kept.next_number(jobs),
        "heads": plan.told_of_heads(),
    }
    register({}, {CALLBACK: told})  # presets are there, from the command's own composition
    try:
        # The folder is the same though Hydra composes once more, at another time.
        with study.counted_by_hydra(searched):
            status = _status(plan, [*own, word("hydra.sweep.dir", folder)]) if own is not None else 0
    finally:
        from trainer.sweep.table import write_tables  # now: torch comes with it, and jobs set its environment

        found = write_tables(folder) if folder.is_dir() else []
        _say_what_came_of_it(folder, found, len(numbers), trust.repeated(plan.trusted))
    begun = [job for job in found if job.lives[-1]["begin"] >= began]
    return status or int(any(job.state == "failed" for job in begun))


def _no_more_than_cores(plan: Plan) -> list[str]:
    """Bounds the jobs of a grid that a launcher would start all at once on the cores of this machine. On GPUs they wait
    for one by themselves."""
    asked = plan.request.settings
    bounded = BATCH in asked or asked.get("hydra/sweeper", "basic") != "basic"
    on_gpus = uses_cuda(str(plan.request.values.get("device", "auto")))
    if asked.get("hydra/launcher") != "submitit_local" or bounded or on_gpus:
        return []
    cores = available_cores()
    plan.notices.append(f"jobs start {cores} at a time, as many as there are cores. Others: {BATCH}=<jobs>")
    return [f"{BATCH}={cores}"]


def _say_what_came_of_it(folder: Path, jobs: list[Job], points: int, trusting: list[str]) -> None:
    """`points`: how many jobs a grid has; `trusting`: what the next command trusts as this one did."""
    if not jobs:
        return
    ended = Counter("killed" if job.state == "running" else job.state for job in jobs)
    ended["not begun"] = max(0, points - len(jobs))
    counts = ", ".join(f"{count} {state}" for state, count in ended.items() if count)
    print(f"sweep folder {folder}: {counts}; summary.csv, summary.json, compare.html")
    if ended.total() > ended["ok"]:
        print(f"go on with: {command_line(word('resume', folder), '-m', *trusting)}")


def _there(folder: Path, earlier: Path | None, trusting: list[str]) -> list[Job]:
    """The jobs that a folder has already. ConfigError where they are another sweep's."""
    try:
        jobs = jobs_in(folder) if folder.is_dir() else []
    except ValueError as error:
        raise ConfigError(f"resume: {error}. Move its folder away") from None
    if jobs and earlier is None:
        again = command_line(word("resume", folder), "-m", *trusting)
        raise ConfigError(
            f"{folder} already holds a sweep. Choose another hydra.sweep.dir, or go on with it: {again}"
        )
    return jobs


def _numbers(checked: list[Checked], jobs: list[Job], varied: set[str]) -> list[int]:
    """The number of each point: that of the job which it is already, else the next that is free."""
    known = {kept.digest(job.config, varied): job.number for job in jobs if job.number is not None}
    points: dict[str, int] = {}
    numbers: list[int] = []
    free = kept.next_number(jobs)
    for point, one in enumerate(checked):
        name = kept.digest(redacted(one.cfg), varied)
        if points.setdefault(name, point) != point:
            raise ConfigError(
                f"command line: jobs {points[name]} and {point} of this sweep are the same run. Leave one of them out"
            )
        numbers.append(free if (number := known.get(name)) is None else number)
        free += number is None
    return numbers


def _status(plan: Plan, settings: list[str]) -> int:
    try:
        hand_over(plan, sweep_job, settings)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0


# -- one job -----------------------------------------------------------------------------------------------


def sweep_job(cfg: DictConfig) -> float | None:
    """One job of a sweep, wherever a Hydra launcher runs it; the training has a process of its own. Its score, bits per
    byte. Raises for a job that does not come to its end, so that no sweeper takes what it left for a score."""
    clock.start()
    values = _resolved(cfg)
    assert isinstance(values, dict)
    tree = {str(k): v for k, v in values.items()}
    settings = HydraConfig.get()
    place = Path(settings.runtime.output_dir)
    try:
        run_cfg, model_cfg, named = _checked(tree, settings)
    except ConfigError as error:
        job = Job(place, place, tree)
        job.begin()
        _fail(settings, job, "; ".join(error.problems), error.report())
        return None
    job = _job(place, named, run_cfg, settings)
    if (score := job.done()) is not None:
        return score
    if job.lives:
        run_cfg = run_cfg.model_copy(update={"resume": "auto", "output_dir": str(job.run)})
    job.begin()
    try:
        score = _trained(job, run_cfg, model_cfg, settings)
    except launch.JobFailed as failed:
        failed.say()
        _fail(settings, job, str(failed.error or failed), str(failed))
        return None
    except BaseException as error:  # a signal, or a fault: the record says how far it came
        job.end("stopped", type(error).__name__ if not isinstance(error, SystemExit) else "asked to stop")
        raise
    if not job.summary():
        _fail(settings, job, STOPPED, STOPPED, "stopped")
        return None
    if not math.isfinite(score):
        _fail(settings, job, f"its score is {score}", f"its score is {score}")
        return None
    job.end("ok")
    return score


def _resolved(cfg: DictConfig) -> Any:
    try:
        with kept_secret():
            return {str(k): field_of(str(k), partial(resolved, cfg, k)) for k in cfg}
    except OmegaConfBaseException as error:
        raise CompactHydraException(str(error).partition("\n")[0]) from None


def _fail(settings: HydraConf, job: Job, why: str, told: str, state: str = "failed") -> None:
    """Record it, and raise. Where a grid is started in batches, an error would keep Hydra from the later ones."""
    job.end(state, why)
    if settings.sweeper.get("max_batch_size"):
        print(f"job {job.place.name}: {told}", file=sys.stderr)
        return
    raise CompactHydraException(f"job {job.place.name}: {told}")


def _checked(tree: dict[str, Any], settings: HydraConf) -> tuple[RunConfig, ModelConfig, Path | None]:
    """What a job trains, and the folder that it names."""
    explicit = {o.partition("=")[0].lstrip("+") for o in settings.overrides.task}

    def of_line(key: str) -> str:
        return "command line" if key in explicit else ""

    where = take_sizes(tree, explicit, [], of_line)
    unfit = _keep_heads(tree, explicit, settings) if where is of_line else []
    on_one_gpu(tree, settings.launcher)
    run_cfg, model_cfg = met(*validate(tree, where, unfit=unfit), where, [], explicit)
    return run_cfg, model_cfg, named_folder(run_cfg.model_dump(), explicit)


def _keep_heads(tree: dict[str, Any], explicit: set[str], settings: HydraConf) -> list[str]:
    """Have heads keep their width, as the check of a grid does. Problems where they cannot."""
    model = settings.runtime.choices["configs@_global_"]
    for files in settings.callbacks[CALLBACK].heads:
        if files.model == model and files.preset in ("", tree.get("preset")):
            return keep_widths(tree, files, explicit)[1]
    return []


def _job(place: Path, named: Path | None, cfg: RunConfig, settings: HydraConf) -> Job:
    """The job of this configuration that the sweep has already, unless it is running; else a new one at `place`."""
    told = settings.callbacks[CALLBACK]
    name = kept.digest(redacted(cfg), told.varied)
    for job in jobs_in(Path(settings.sweep.dir)):
        running = job.state == "running" and job.lives[-1]["begin"] >= told.began
        if not running and kept.digest(job.config, told.varied) == name:
            if job.place != place and not any(place.iterdir()):
                place.rmdir()  # Hydra made it
            return job
    return Job.new(place, named or place, cfg)


def _trained(job: Job, cfg: RunConfig, model_cfg: ModelConfig, settings: HydraConf) -> float:
    shares = side_by_side(settings.launcher) and uses_cuda(cfg.device) and cfg.num_gpus != "auto"
    with own_gpus(int(cfg.num_gpus) if shares else 0) as gpus:
        job.lives[-1]["gpus"] = gpus
        return launch.start(cfg, model_cfg, job.run, isolated=True, origin=_origin(settings))


def _origin(settings: HydraConf) -> str:
    """The model file of a sweep job and its digest."""
    option = settings.runtime.choices["configs@_global_"]
    path = CONFIGS / f"{option}.yaml"
    if not path.is_file():
        path = Path(ConfigStore.instance().load(f"configs/{option}.yaml").provider or "")
    return f"{path} (sha256 {digest(path)})" if path.is_file() else option


# -- Hydra -------------------------------------------------------------------------------------------------


def hand_over(plan: Plan, task: object, settings: list[str] | None = None) -> None:
    """Hand over to `hydra.main`: sweeps, --cfg and --info. Its parser wants the flags first. `settings`: more of
    Hydra's own."""
    _guard_argparse()
    # It would compose every point of a grid once more, slowly, before the first starts.
    BasicSweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]
    # The run folder's config.yaml says more than Hydra's own record, which a second run would write over.
    own = [*plan.overrides, *(settings or [])]
    sys.argv = [sys.argv[0], *plan.request.flags, "hydra.output_subdir=null", *own]
    os.environ.setdefault("HYDRA_FULL_ERROR", "0")
    hydra.main(version_base="1.3", config_path=str(ROOT), config_name=APP)(task)()  # type: ignore[arg-type]


def _guard_argparse() -> None:
    """Python 3.14 checks help texts when an option is added; one of Hydra 1.3 is not a string."""
    if hasattr(argparse.ArgumentParser, "_check_help"):
        argparse.ArgumentParser._check_help = lambda self, action: None  # type: ignore[attr-defined]
