"""`time_budget`: what fits is found without a trace, once, and kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml

from tests.contract.pair import Pair
from tests.contract.tiny import adapter_of, config, session_of
from tests.trainer.one_of_two import steps_that_fit
from trainer import budget
from trainer.budget import Costs
from trainer.commands.launch import config_text
from trainer.loop import Trainer, train
from trainer.run.checkpoint import load_tensors

COSTS = Costs(spent=10.0, step=2.0, interim=5.0, end=20.0, every=3)


def run(path, *more, architecture="gpt2"):
    cfg, model_cfg = config(architecture, f"output_dir={path}", *more)
    train(cfg, model_cfg, path, config_text)
    return yaml.safe_load((path / "config.yaml").read_text())


def lines(path):
    timed = {"seconds", "tokens_per_second", "eta_seconds"}
    read = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in read]


def equal(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(v, right[k]) for k, v in left.items())
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.fixture
def costs(monkeypatch):
    """Stand for what would be measured; how often it was asked for."""
    asked = []

    def measure(s, should_stop):
        asked.append(s)
        return COSTS

    monkeypatch.setattr(budget, "measure", measure)
    return asked


def test_what_fits_counts_evaluations_on_the_way():
    assert [COSTS.total(n) for n in (1, 3, 4, 6, 7)] == [32, 36, 43, 47, 54]
    assert [COSTS.fitting(seconds, 100) for seconds in (31.9, 32, 36, 42.9, 43, 54)] == [0, 1, 3, 3, 4, 7]
    assert COSTS.fitting(1e6, 100) == 100
    assert replace(COSTS, every=0).total(7) == 44


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("gpt2", ["model_cfg.dropout=0.1", "ema_decay=0.9", "batch_size=2", "optimizer=muon"]),
        ("gpt2", ["mixed_precision=fp16", "optimizer=sgd"]),
        (
            "bd3lm",
            ["model_cfg.clip_search=true", "num_iterations=3", "sample_tokens=1"],
        ),
        pytest.param("current_best_gpt", ["num_iterations=3"], marks=pytest.mark.slow),  # stages of windows
    ],
)
def test_timing_leaves_no_trace(tmp_path, monkeypatch, architecture, more):
    monkeypatch.setattr(budget, "TIMED", (1, 1))
    run(tmp_path / "plain", *more, architecture=architecture)
    config_ = run(tmp_path / "timed", *more, "time_budget=10", architecture=architecture)
    assert config_["time_budget"] is None
    assert lines(tmp_path / "plain") == lines(tmp_path / "timed")
    for name in ("model.pt", "optimizer.pt", *(["ema.pt"] if "ema_decay=0.9" in more else [])):
        plain, timed = (load_tensors(tmp_path / where / "final_model", name) for where in ("plain", "timed"))
        assert equal(plain, timed), name
    assert (tmp_path / "plain/samples.txt").read_text() == (tmp_path / "timed/samples.txt").read_text()
    manifests = [json.loads((tmp_path / where / "manifest.json").read_text()) for where in ("plain", "timed")]
    assert manifests[0]["kernels"] == manifests[1]["kernels"]


def test_throw_away_steps_call_no_hook(tmp_path, monkeypatch):
    from adapters.default import DefaultModelAdapter

    called = []
    for hook in ("after_step", "constrain"):
        monkeypatch.setattr(DefaultModelAdapter, hook, lambda self, *a, hook=hook: called.append(hook))
    run(tmp_path / "run", "time_budget=10")
    assert called == ["after_step", "constrain"] * 6


def test_what_a_step_draws_is_planned_where_it_is_timed_or_probed(monkeypatch):
    """A depth, say: the mean where steps are timed, the most where memory is, the draw in training."""
    from adapters.default import DefaultModelAdapter
    from trainer.session import _probe

    asked = []
    prepare = DefaultModelAdapter.prepare

    def heard(self, batch, ctx):
        asked.append(ctx.of_draws)
        return prepare(self, batch, ctx)

    monkeypatch.setattr(DefaultModelAdapter, "prepare", heard)
    s = session_of("gpt2")
    budget._seconds_per_step(s, lambda: True)
    assert set(asked) == {"mean"}
    asked.clear()
    _probe(s.cfg, s.world, s.rows, s.adapter, s.optimizers, s.precision)
    assert set(asked) == {"most"}
    asked.clear()
    s.loader.load(0)
    assert set(asked) == {"drawn"}


def test_every_stage_weighs_as_much_as_its_part_of_the_run(monkeypatch):
    s = session_of("gpt2", "num_iterations=10", "batch_stages=[{until:0.3,rows:2},{until:1}]")
    monkeypatch.setattr(budget, "_seconds_of", lambda s, step, stages, stop: {0: 1.0, 3: 10.0}[step] / stages)
    assert budget._seconds_per_step(s, lambda: False) == pytest.approx((0.3 * 1 + 0.7 * 10) / 2)
    monkeypatch.undo()
    timed = []
    monkeypatch.setattr(budget, "_throw_away_step", lambda s, batch, denominators: timed.append(batch.tokens))
    budget._seconds_per_step(s, lambda: False)
    tokens = s.cfg.train_seq_len
    assert set(timed) == {2 * tokens, 4 * tokens} and timed == sorted(timed)


def test_every_stage_of_windows_weighs_as_much_as_its_part_of_the_run(monkeypatch):
    """Each is timed as it is; stages that a context makes the same are one."""
    words = ["num_iterations=100", "batch_stages=[{until:0.5,rows:2},{until:1}]"]
    s = session_of("current_best_gpt", *words)
    timed = {}

    def seen(s, batch, denominators):
        s.adapter.on_step_start(batch.ctx, s.total_steps)
        timed.setdefault(batch.step, set()).add((batch.ctx.rows_in_step, s.adapter.model.windows))

    monkeypatch.setattr(budget, "_throw_away_step", seen)
    budget._seconds_per_step(s, lambda: True)
    assert timed == {
        0: {(2, (5, 13))},
        33: {(2, (13, 29))},
        50: {(4, (13, 29))},
        66: {(4, (21, 33))},
        99: {(4, (25, 33))},
    }
    seconds = {0: 1.0, 33: 10.0, 50: 100.0, 66: 1000.0, 99: 10000.0}
    monkeypatch.setattr(budget, "_seconds_of", lambda s, step, stages, stop: seconds[step])
    assert budget._seconds_per_step(s, lambda: True) == pytest.approx(0.33 + 1.7 + 16 + 330 + 100)
    short = adapter_of("current_best_gpt", "model_cfg.n_ctx=16").cost_changes
    assert short == s.adapter.cost_changes[:2], "(4, 12), (12, 16), (16, 16) twice"
    assert adapter_of("gpt2").cost_changes == ()


def test_stages_are_parts_of_the_steps_that_fit(tmp_path, costs, capsys):
    run(
        tmp_path / "run",
        "num_iterations=500",
        f"time_budget={70 / 60}",
        "batch_stages=[{until:0.25,rows:2},{until:1}]",
    )
    assert "12 steps of 2 rows (4 from step 3) x 32 tokens" in capsys.readouterr().out


def test_the_steps_that_fit_are_the_runs(tmp_path, costs, capsys):
    kept = run(tmp_path / "run", "num_iterations=500", "warmup_ratio=0.5", f"time_budget={70 / 60}")
    # 10 + 2 n + 5 floor((n - 1) / 3) + 20 <= 70 holds up to n = 12, of which half are warm-up
    assert (kept["num_iterations"], kept["time_budget"]) == (12, None)
    rates = {line["step"]: line["lr/matrix"] for line in lines(tmp_path / "run") if "loss" in line}
    assert rates[4] < rates[6] and rates[12] < rates[6], "the schedule is that of 12 steps"
    said = capsys.readouterr().out
    assert "time_budget: 12 of 500 steps fit into 1.17 minutes (2 s a step, 10 s until here, 35 s for" in said
    assert "12 steps of 4 rows" in said


def test_epochs_are_cut_too(tmp_path, costs):
    kept = run(tmp_path / "run", "num_epochs=3", f"time_budget={70 / 60}")
    assert (kept["num_iterations"], kept["num_epochs"]) == (12, None)


def test_all_fit(tmp_path, costs, capsys):
    kept = run(tmp_path / "run", "time_budget=9")
    assert (kept["num_iterations"], kept["time_budget"]) == (6, None)
    assert "time_budget: all 6 steps fit into 9 minutes" in capsys.readouterr().out


def test_a_budget_that_cannot_be_kept_says_so(tmp_path, costs, capsys):
    kept = run(tmp_path / "run", "num_iterations=500", "time_budget=0.1")
    assert kept["num_iterations"] == budget.FEWEST_STEPS
    assert "0.1 minutes are not enough; 10 steps take about 1.1 (2 s a step, 10 s" in capsys.readouterr().out


def test_a_tenth_of_the_budget_goes_to_training_whatever_the_rest_takes(costs, monkeypatch):
    monkeypatch.setattr(budget, "measure", lambda s, should_stop: replace(COSTS, spent=400.0))
    s = session_of("gpt2", "num_iterations=500", "time_budget=5")
    assert "not enough; 15 steps take about 7.8" in budget.decide(
        s, lambda: False, print
    )  # of 2 s: 30 of 300
    assert s.total_steps == 15


def test_it_is_decided_once(tmp_path, costs, monkeypatch):
    """Killed before its first checkpoint, started again, gone on with: the same number of steps."""
    words = ["num_iterations=500", f"time_budget={70 / 60}", "val_loss_every=0", "sample_tokens=0"]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", lambda self, *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", *words)
    assert run(tmp_path / "run", *words, "resume=auto")["num_iterations"] == 12
    assert run(tmp_path / "run", *words, "resume=auto")["num_iterations"] == 12
    assert len(costs) == 1
    assert run(tmp_path / "run", "resume=auto", "num_iterations=14")["num_iterations"] == 14, "said anew"


def test_another_run_in_that_folder_decides_for_itself(tmp_path, costs, monkeypatch):
    words = ["num_iterations=500", f"time_budget={70 / 60}", "val_loss_every=0", "sample_tokens=0"]
    monkeypatch.setattr(Trainer, "_train_step", lambda self, *a: 1 / 0)
    for seed in (1, 2):
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "run", *words, f"seed={seed}", "resume=auto")
    assert len(costs) == 2


def test_a_stop_while_timing_leaves_the_budget_to_the_next_start(costs):
    s = session_of("gpt2", "num_iterations=500", "time_budget=1")
    assert budget.decide(s, lambda: True, print) == "time_budget: nothing decided yet"
    assert (s.cfg.time_budget, s.cfg.num_iterations, s.total_steps) == (1, 500, 500)


def test_scoring_alone_decides_nothing(tmp_path, costs):
    run(tmp_path / "run", "time_budget=1", "eval_only=true")
    assert not costs


@pytest.mark.slow
def test_of_two_processes_the_slower_one_counts():
    with Pair() as pair:
        # 10 n seconds on process 1, beside the end's
        assert pair.ask(steps_that_fit, 3) == [15, 15]
