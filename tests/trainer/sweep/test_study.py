"""Optuna's study of a sweep."""

from types import SimpleNamespace

import pytest

from trainer.sweep.study import counted_by_hydra


def test_a_grid_whose_last_trial_fails_ends_without_an_error() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def last_one_fails() -> None:
        study = optuna.create_study(sampler=optuna.samplers.GridSampler({"x": [1, 2]}))
        for state, values in (("COMPLETE", [0.5]), ("FAIL", None)):
            trial = study.ask()
            trial.suggest_categorical("x", [1, 2])
            study.tell(trial, state=optuna.trial.TrialState[state], values=values)

    with pytest.raises(RuntimeError, match="supposed to be invoked inside an objective"):
        last_one_fails()  # as in Hydra's plugin
    with counted_by_hydra(SimpleNamespace(sweeper={"_target_": "its.OptunaSweeper"})):
        last_one_fails()
