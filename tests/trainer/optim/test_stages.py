"""Stages of the batch size: what follows from the number of a step alone."""

import pytest

from configs.schema import RunConfig
from trainer.optim.schedules import schedule_factor
from trainer.optim.stages import Stages, common_rows, stages_of, steps_of_rows

# Of modded-nanogpt's 1,270 scheduled steps of 64, 128 and 192 rows of 2,048 tokens.
RECORD = [
    {"until": 1 / 3, "rows": 64},
    {"until": 2 / 3, "rows": 128, "rate": 1.52},
    {"until": 1.0, "rate": 1.73},
]


def config(stages=RECORD, **fields):
    return RunConfig.model_validate(
        {"type": "none", "global_batch_size": 192, "scheduler": "linear", "batch_stages": stages} | fields
    )


def test_stages_are_parts_of_the_run_and_the_last_one_goes_on():
    stages = stages_of(config(), 1270)
    assert stages == Stages((423, 847, 1270), (64, 128, 192), (1.0, 1.52, 1.73))
    assert [stages.rows_at(step) for step in (0, 422, 423, 846, 847, 1269, 5000)] == [
        64,
        64,
        128,
        128,
        192,
        192,
        192,
    ]
    assert [stages.rate_at(step) for step in (0, 423, 847)] == [1.0, 1.52, 1.73]
    extended = stages_of(config(lr_decay_steps=1270), 1285)
    assert extended == stages, "15 steps behind the schedule, as the last stage's"
    assert extended.rows_before(1285) == 423 * 64 + 424 * 128 + (423 + 15) * 192
    assert extended.rows_before(1285) * 2048 == pytest.approx(338.8e6, rel=1e-3), "the record's tokens"


def test_rows_before_a_step_are_those_of_all_steps_before():
    for stages in (stages_of(config(), 30), stages_of(config(), 2), stages_of(config(None), 30)):
        for step in range(40):
            assert stages.rows_before(step) == sum(stages.rows_at(s) for s in range(step))


def test_one_stage_is_the_plain_run():
    stages = stages_of(config(None), 30)
    assert [stages.rows_before(step) for step in (0, 7, 99)] == [0, 7 * 192, 99 * 192]
    assert stages.parts(30) == [(0, 1.0)] and common_rows(config(None)) == 192
    assert [steps_of_rows(config(None), rows) for rows in (191, 192, 1000.5)] == [0, 1, 5]


def test_parts_are_those_of_steps_that_there_are():
    assert stages_of(config(), 30).parts(30) == [(0, 1 / 3), (10, 1 / 3), (20, 1 / 3)]
    assert stages_of(config(), 1).parts(1) == [(0, 1.0)], "the other two have no step"
    assert stages_of(config(), 30).parts(30, (1 / 3, 0.5, 0.51)) == [
        (0, 10 / 30),
        (10, 5 / 30),
        (15, 1 / 30),
        (16, 4 / 30),
        (20, 10 / 30),
    ]


@pytest.mark.parametrize("rows", [10, 64, 127.9, 128, 1000, 12345.6, 99999])
@pytest.mark.parametrize("more", [{}, {"lr_decay_steps": 20}])
def test_a_run_over_epochs_has_the_steps_that_fit(rows, more):
    cfg = config(**more)
    steps = steps_of_rows(cfg, rows)
    assert steps == 0 or stages_of(cfg, steps).rows_before(steps) <= rows
    assert stages_of(cfg, steps + 1).rows_before(steps + 1) > rows


def test_micro_batches_are_made_of_what_all_stages_have_in_common():
    assert common_rows(config()) == 64
    assert common_rows(config([{"until": 0.5, "rows": 36}, {"until": 1.0}])) == 12


def test_the_rate_of_a_stage_multiplies_the_schedule_and_its_warmup():
    plain, staged = (
        config(stages, warmup_steps=4, min_lr_ratio=0.0)
        for stages in (None, [{"until": 0.5, "rate": 0.5}, {"until": 1.0, "rate": 3.0}])
    )
    factors = [schedule_factor(step, 10, staged) / schedule_factor(step, 10, plain) for step in range(10)]
    assert factors == pytest.approx([0.5] * 5 + [3.0] * 5)
