"""Schedules against values worked out by hand."""

import math

import pytest

from configs.schema import RunConfig
from trainer.optim import SCHEDULES
from trainer.optim.schedules import jump, momentum_at, require_room_for_warmup, schedule_factor


def factors(steps, total=100, **overrides):
    fields = {"scheduler": "cooldown", "cooldown_frac": 0.4, "learning_rate": 0.01}
    cfg = RunConfig(type="none", **(fields | overrides))
    return [schedule_factor(step, total, cfg) for step in steps]


ROOT = math.sqrt(0.5)
GOLDEN = {
    # 40 steps of cooldown from 1 to 0.1: 0.0225 each
    "cooldown": ({}, {0: 1, 59: 1, 60: 1, 61: 0.9775, 80: 0.55, 99: 0.1225, 100: 0.1, 250: 0.1}),
    "whole cooldown": ({"cooldown_frac": 1.0}, {0: 1, 50: 0.55, 99: 0.109}),
    "no cooldown": ({"cooldown_frac": 0.0}, {0: 1, 99: 1}),
    # the cooldown cannot begin inside the warm-up
    "warm cooldown": ({"cooldown_frac": 1.0, "warmup_steps": 20}, {19: 1, 20: 1, 60: 0.55, 100: 0.1}),
    "linear": ({"scheduler": "linear"}, {0: 1, 50: 0.55, 99: 0.109, 100: 0.1}),
    "cosine": (
        {"scheduler": "cosine"},
        {0: 1, 25: 0.55 + 0.45 * ROOT, 50: 0.55, 75: 0.55 - 0.45 * ROOT, 100: 0.1, 101: 0.1},
    ),
    # half of the fall behind 40 % is (1 - 1 / sqrt(6)) / (1 - 1 / sqrt(11)) of all of it
    "cooldown as an inverse square root": (
        {"scheduler": "cooldown_inverse_sqrt"},
        {0: 1, 60: 1, 80: 1 - 0.9 * (1 - 6**-0.5) / (1 - 11**-0.5), 100: 0.1, 250: 0.1},
    ),
    # after a quarter of it a third is left, of a fall by 1 - sqrt(x) half would be
    "inverse square root to zero": (
        {"scheduler": "cooldown_inverse_sqrt", "min_lr_ratio": 0.0},
        {60: 1, 70: (3.5**-0.5 - 11**-0.5) / (1 - 11**-0.5), 100: 0},
    ),
    "constant": ({"scheduler": "constant"}, {0: 1, 99: 1, 500: 1}),
    "inverse square root": (
        {"scheduler": "inverse_sqrt", "warmup_steps": 4},
        {0: 0.25, 3: 1, 4: 1, 16: 0.5, 64: 0.25, 99: math.sqrt(4 / 99), 100: 0.2, 500: 0.2},
    ),
    "inverse square root with a floor": (
        {"scheduler": "inverse_sqrt", "min_lr_ratio": 0.5},
        {0: 1, 1: 1, 2: ROOT, 4: 0.5, 9: 0.5},
    ),
    "warm-up": ({"scheduler": "constant", "warmup_steps": 4}, {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1}),
    "ratio wins": (
        {"scheduler": "linear", "warmup_steps": 50, "warmup_ratio": 0.2},
        {0: 0.05, 19: 1, 20: 1, 60: 0.55, 100: 0.1},
    ),
    "warm cosine": ({"scheduler": "cosine", "warmup_steps": 20}, {9: 0.5, 20: 1, 60: 0.55, 100: 0.1}),
    "absolute floor wins": ({"scheduler": "linear", "min_lr": 0.005}, {50: 0.75, 100: 0.5}),
    "floor of zero": ({"scheduler": "linear", "min_lr_ratio": 0.0}, {75: 0.25, 99: 0.01, 100: 0}),
    "short decay": ({"scheduler": "linear", "lr_decay_steps": 50}, {25: 0.55, 50: 0.1, 99: 0.1}),
    "short cooldown": ({"lr_decay_steps": 50}, {30: 1, 40: 0.55, 50: 0.1, 99: 0.1}),
    "short cosine": ({"scheduler": "cosine", "lr_decay_steps": 50}, {25: 0.55, 50: 0.1}),
    "long decay": ({"scheduler": "linear", "lr_decay_steps": 200}, {100: 0.55, 99: 0.5545}),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_values(case):
    overrides, golden = GOLDEN[case]
    assert factors(golden, **overrides) == pytest.approx(list(golden.values()), abs=1e-12)


def test_run_shorter_than_its_warm_up():
    assert factors([0, 9], total=10, warmup_steps=20) == [0.05, 0.5]


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_every_schedule_stays_between_floor_and_peak_and_stands_still_behind_its_end(scheduler):
    of_the_run = factors(range(300), scheduler=scheduler, warmup_steps=10)
    assert of_the_run[9:11] == [1, 1] and all(0.1 - 1e-12 <= factor <= 1 for factor in of_the_run[10:])
    assert len(set(of_the_run[100:])) == 1


def test_decay_that_ends_in_the_warm_up():
    with pytest.raises(
        ValueError, match=r"lr_decay_steps \(20\) must exceed the warm-up of 20 steps; nearest: 21"
    ):
        factors([0], warmup_steps=20, lr_decay_steps=20)


def part(total, **overrides):
    return total, RunConfig(type="none", **({"scheduler": "cooldown", "cooldown_frac": 0.4} | overrides))


def test_a_rate_that_jumps_where_a_run_goes_on_is_announced_with_what_keeps_it():
    told = jump(100, part(100), part(200))
    assert told.startswith(
        "the learning rate jumps from 0.12 to 1 of its peak at step 100: its schedule now spans 200"
    )
    assert "lr_decay_steps=100 keeps the rates" in told
    assert not jump(100, part(100), part(200, lr_decay_steps=100))
    assert not jump(50, part(100), part(200)), "flat in both"
    assert not jump(80, part(100), part(100))
    assert not jump(0, part(100), part(200, scheduler="linear"))
    assert "from 1 to 0.51 of its peak" in jump(50, part(100), part(60))
    assert "lr_decay" not in jump(80, part(100), part(100, scheduler="constant"))


def test_a_warmup_that_takes_the_whole_run():
    require_room_for_warmup(10, part(10, warmup_steps=9)[1])
    with pytest.raises(
        ValueError, match=r"warmup_steps \(10\).* there are 10\. Set warmup_ratio=0\.1.*warmup_steps=9"
    ):
        require_room_for_warmup(10, part(10, warmup_steps=10)[1])
    require_room_for_warmup(10, part(10, warmup_steps=10, warmup_ratio=0.9)[1])
    require_room_for_warmup(10, part(10, warmup_steps=10, lr_decay_steps=40)[1])


def momenta(steps, total=100, **overrides):
    return [momentum_at(step, *part(total, muon_momentum_ends=0.85, **overrides)) for step in steps]


def test_momentum_rises_and_falls_back():
    given = {"muon_momentum_rise": 0.2, "muon_momentum_fall": 0.1}
    steps = [0, 5, 10, 20, 50, 90, 95, 99, 100, 150]
    wanted = [0.85, 0.875, 0.9, 0.95, 0.95, 0.95, 0.9, 0.86, 0.85, 0.85]
    assert momenta(steps, **given) == pytest.approx(wanted)
    assert momenta([0, 500, 1000], 1000, muon_momentum_rise=1.0, muon_momentum_fall=0.0) == pytest.approx(
        [0.85, 0.9, 0.95]
    )
    assert momenta([0, 99], muon_momentum_rise=0.0, muon_momentum_fall=0.5) == pytest.approx([0.95, 0.852])
    assert momenta([0, 10, 30], lr_decay_steps=20, **given) == pytest.approx([0.85, 0.95, 0.85]), (
        "the schedule's end"
    )
    assert momenta([0, 10], scheduler="constant", lr_decay_steps=20, **given) == pytest.approx([0.85, 0.9])


def test_momentum_is_constant_unless_its_ends_are_given():
    assert {momentum_at(step, *part(100, muon_momentum=0.9)) for step in range(120)} == {0.9}
