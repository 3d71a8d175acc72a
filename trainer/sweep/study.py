"""Optuna's study of a sweep: kept in the sweep's folder, drawn from a seed, and as long as `n_trials` in all.

A trial that did not come to an end because the sweep was stopped is asked for once more, and its run goes on; one that
failed counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from configs.grammar import word
from configs.messages import ConfigError

__all__ = ["counted_by_hydra", "settings"]

NAME = "sweep"
FILE = "study.db"
AGAIN = "asked_again"  # an attribute of a trial that was cut short
# The releases that optuna 2.10, which Hydra's plugin pins, keeps a study with.
BELOW = {"sqlalchemy": "2", "alembic": "1.14"}


def settings(hydra: Any, given: Mapping[str, str], folder: Path) -> list[str] | None:
    """Further settings for Hydra where its sweeper is Optuna: what the command line leaves open; nothing for other
    sweepers, None where the study has all its trials. `hydra`: its settings as composed, `given`: those of the command
    line. Raises ConfigError where the study cannot be kept."""
    sweeper = hydra.sweeper
    if not _is_optuna(sweeper):
        return []
    told = {}
    if "hydra.sweeper.max_failure_rate" not in given:  # the rest of the trials finish
        told["hydra.sweeper.max_failure_rate"] = "1"
    if sweeper.storage is None:
        _require_storage()
        told["hydra.sweeper.storage"] = f"sqlite:///{folder / FILE}"
    if sweeper.study_name is None:
        told["hydra.sweeper.study_name"] = NAME
    before = 0
    storage = str(told.get("hydra.sweeper.storage", sweeper.storage))
    if sweeper.storage is not None or (folder / FILE).exists():
        before = _trials(storage, str(sweeper.study_name or NAME))
    if before >= sweeper.n_trials:
        return None
    if before:
        told["hydra.sweeper.n_trials"] = str(sweeper.n_trials - before)
    sampler = sweeper.get("sampler") or {}
    if "seed" in sampler:  # another one with every start: a sampler knows its trials, and not what it drew
        told["hydra.sweeper.sampler.seed"] = str((sampler["seed"] or 0) + before)
    folder.mkdir(parents=True, exist_ok=True)
    return [word(key, value) for key, value in told.items()]


@contextmanager
def counted_by_hydra(hydra: Any) -> Iterator[None]:
    """Have Optuna's grid, where that is the sweeper of these settings (None: of no searching one), leave it to Hydra
    meanwhile when its points are at an end. Hydra asks and tells, and a grid stops a loop that is not running then: an
    error, which the plugin hides, but not for a trial that failed."""
    if hydra is None or not _is_optuna(hydra.sweeper):
        yield
        return
    from optuna.samplers import GridSampler

    before = GridSampler.after_trial
    GridSampler.after_trial = lambda *args: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        GridSampler.after_trial = before  # type: ignore[method-assign]


def _is_optuna(sweeper: Any) -> bool:
    return str(sweeper.get("_target_", "")).endswith(".OptunaSweeper")


def _require_storage() -> None:
    for package, limit in BELOW.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue  # the plugin's own message says more
        if _numbers(found) >= _numbers(limit):
            raise ConfigError(
                f"command line: sweeper 'optuna' keeps its study with {package} below {limit}, and {found} is here: "
                'pip install "mytrainer[optuna]"'
            )


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2] if part.isdecimal()]


def _trials(storage: str, name: str) -> int:
    """How many trials of a study have ended. Those that were cut short will be asked for again."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if name not in {one.study_name for one in optuna.get_all_study_summaries(storage)}:
        return 0
    study = optuna.load_study(study_name=name, storage=storage)
    ended = 0
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished():
            ended += AGAIN not in trial.user_attrs
        elif trial.state == optuna.trial.TrialState.RUNNING:
            study._storage.set_trial_user_attr(trial._trial_id, AGAIN, True)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            if trial.params:
                study.enqueue_trial(trial.params)
    return ended
