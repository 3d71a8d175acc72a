"""A device that has no memory left: the step, the score or the timing begins again with fewer rows at a time."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.contract.pair import Pair
from tests.contract.test_run import assert_same_state, losses
from tests.contract.tiny import config, session_of
from tests.trainer import short_of_memory
from tests.trainer.short_of_memory import SAID, refused, run_out, short, train_short
from trainer.budget import decide
from trainer.errors import TrainingError
from trainer.loop import train
from trainer.memory import NoRoom, largest_that_fits, shortage, work_of_all
from trainer.run.checkpoint import load_json
from trainer.run.restore import restore

# What could keep something of a step: an average, dropout, sums between log lines, loads of experts.
WORDS = ["ema_decay=0.9", "save_steps=1", "save_total_limit=null", "logging_steps=3", "sample_tokens=0"]
DEEPSEEK = [
    "model_cfg.gate_type=deepseek_v3",
    "model_cfg.top_k=2",
    "model_cfg.bias_update_speed=0.1",
]
CASES = {"gpt2": ["model_cfg.dropout=0.1"], "moe": DEEPSEEK}


def trained(path, *more, architecture="gpt2"):
    words = [*CASES[architecture], *WORDS, *more, f"output_dir={path}"]
    return train(*config(architecture, *words), path)


def go_on(run, step, to, *more, architecture="gpt2"):
    """The run as it was after `step`, in another folder, gone on with."""
    to.mkdir()
    shutil.copytree(run / f"checkpoint-{step}", to / f"checkpoint-{step}")
    shutil.copy(run / "metrics.jsonl", to / "metrics.jsonl")
    return trained(to, "resume=auto", *more, architecture=architecture)


def micro_rows(run):
    return json.loads((run / "manifest.json").read_text())["execution"]["micro_rows"]


# -- noticing ------------------------------------------------------------------------------------------------------


def test_only_a_devices_memory_is_meant():
    assert shortage(run_out) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert shortage(lambda: None) == ""
    with pytest.raises(ZeroDivisionError):
        shortage(lambda: 1 / 0)

    def compiled():
        try:
            run_out()
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the compiler's") from error

    assert "2.00 GiB" in shortage(compiled)


def test_nothing_holds_on_to_what_did_not_fit():
    import weakref

    kept = []

    def work():
        tensor = torch.zeros(3)
        kept.append(weakref.ref(tensor))
        run_out()

    assert shortage(work) and kept[0]() is None


def test_the_largest_that_fits():
    tried = []

    def fits(rows):
        tried.append(rows)
        if rows > 5:
            run_out()

    assert largest_that_fits([1, 2, 3, 4, 6, 12], fits) == 4 and tried == [12, 6, 4]
    assert largest_that_fits([1, 2], lambda rows: run_out()) == 0


def test_what_one_process_has_no_memory_for_all_begin_again():
    others = SimpleNamespace(agree=lambda flag: True, gather=lambda told: [told, "of the other", ""])
    with pytest.raises(NoRoom, match="of the other"):
        work_of_all(others, lambda: None)


# -- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", pytest.param("moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_begins_again_as_if_it_had_begun_so(tmp_path, capsys, architecture, where):
    """Bit for bit, and so do its figures."""
    again, smaller = tmp_path / "again", tmp_path / "smaller"
    trained(smaller, "batch_size=2", architecture=architecture)
    capsys.readouterr()
    with short(where, {0: 2}) as failed:
        trained(again, architecture=architecture)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert failed == [4] and len(said) == 1
    assert "step 0: out of memory with 4 rows at a time (OutOfMemoryError: CUDA" in said[0]
    assert "begun again with 2" in said[0]
    assert_same_state(again / "checkpoint-6", smaller / "checkpoint-6")
    assert losses(again) == losses(smaller)
    assert micro_rows(again) == 2


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_so_does_a_step_later_on_and_a_resumed_run_stays_there(tmp_path, capsys, where):
    again, smaller, resumed = tmp_path / "again", tmp_path / "smaller", tmp_path / "resumed"
    with short(where, {4: 3}) as failed:
        trained(again)
    assert failed == [4]
    assert load_json(again / "checkpoint-4", "training_state.json")["execution"]["micro_rows"] == 4
    go_on(again, 4, smaller, "batch_size=2")
    assert_same_state(again / "checkpoint-6", smaller / "checkpoint-6")
    assert losses(again) == losses(smaller)
    with short(where, {0: 3}) as failed:
        go_on(again, 5, resumed)
    assert not failed and micro_rows(resumed) == 2
    assert_same_state(again / "checkpoint-6", resumed / "checkpoint-6")


def test_as_often_as_it_takes(tmp_path, capsys):
    with short("forward", {1: 1}) as failed:
        trained(tmp_path / "run", "num_iterations=2")
    assert failed == [4, 2] and micro_rows(tmp_path / "run") == 1


def test_stages_of_other_batch_sizes(tmp_path, capsys):
    """A stage's first step; micro-batches stay such that those of all stages divide."""
    again, smaller = tmp_path / "again", tmp_path / "smaller"
    stages = "batch_stages=[{until:0.5,rows:2},{until:1,rows:4}]"
    with short("backward", {3: 1}) as failed:
        trained(again, stages)
    assert failed == [2] and micro_rows(again) == 1
    assert capsys.readouterr().out.count("4 rows, 128 tokens a step from here") == 1
    go_on(again, 3, smaller, stages, "batch_size=1")
    assert_same_state(again / "checkpoint-6", smaller / "checkpoint-6")


def test_a_score_begins_again(tmp_path, capsys):
    again, smaller = tmp_path / "again", tmp_path / "smaller"
    with short("likelihood", {0: 2}) as failed:
        trained(again)
    said = capsys.readouterr().out
    assert failed == [4] and "scoring at step 3: out of memory with 4 rows" in said
    assert load_json(again / "checkpoint-3", "training_state.json")["execution"]["micro_rows"] == 2
    go_on(again, 3, smaller, "batch_size=2")
    assert_same_state(again / "checkpoint-6", smaller / "checkpoint-6")
    assert losses(again) == losses(smaller)
    scores = [line["val_bits_per_byte"] for line in losses(again) if "val_bits_per_byte" in line]
    assert len(scores) == 2 and scores == pytest.approx([7.8, 7.2], abs=0.5)


def test_the_text_that_val_steps_asks_for_stays_the_same(tmp_path):
    again, whole = tmp_path / "again", tmp_path / "whole"
    words = ["val_steps=1", "val_bytes=null"]
    trained(whole, *words)
    with short("forward", {4: 2}):
        trained(again, *words)
    scored = [json.loads((run / "summary.json").read_text())["score"]["tokens"] for run in (again, whole)]
    resumed = tmp_path / "resumed"
    go_on(again, 5, resumed, *words)
    assert [*scored, json.loads((resumed / "summary.json").read_text())["score"]["tokens"]] == [scored[1]] * 3


def test_gathered_for_an_evaluation_that_began_again():
    """bd3lm chooses its range by what was scored: once."""
    s = session_of("bd3lm", "model_cfg.clip_search=true")
    s.adapter.search.table += 1
    s.adapter.on_evaluation_start()
    assert not s.adapter.search.table.any()


def test_timing_begins_again(tmp_path):
    said = []
    for where in ("forward", "likelihood"):
        s = session_of("gpt2", "time_budget=0.2", "num_iterations=3")
        with short(where, {0: 2}) as failed:
            decide(s, lambda: False, said.append)
        assert failed == [4] and s.plan.micro_rows == s.loader.plan.micro_rows == 2
    assert len(said) == 2 and all("begun again with 2" in line for line in said)


# -- what cannot go on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, fits",
    [
        (["batch_size=4"], "batch_size=2 fits, and results do not depend on it; batch_size=auto finds"),
        (
            ["gradient_accumulation_steps=1"],
            r" gradient_accumulation_steps=2 fits, .*batch_size=auto gradient_accumulation_steps=null finds",
        ),
        (
            ["batch_size=4", "gradient_accumulation_steps=1"],
            "batch_size=2 gradient_accumulation_steps=2 fits",
        ),
    ],
)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_size_that_was_asked_for_stays_and_what_fits_is_said(tmp_path, words, fits, where):
    with short(where, {0: 3}), pytest.raises(TrainingError, match=fits):
        trained(tmp_path / "run", *words)


def test_sizes_are_tried_beside_the_optimizers_state():
    s = session_of("gpt2")
    s.try_rows(2)
    assert s.optimizers._members and all(p.grad is None for p in s.parameters)


def test_so_it_is_where_scoring_takes_more(tmp_path):
    with short("likelihood", {0: 1}), pytest.raises(TrainingError, match="batch_size=1 fits"):
        trained(tmp_path / "run", "batch_size=4")


@pytest.mark.parametrize("size", ["auto", "1", "4"])
def test_not_even_one_row(tmp_path, size):
    with short("forward", {0: 0}), pytest.raises(TrainingError) as error:
        trained(tmp_path / "run", f"batch_size={size}")
    told = "single row of 32 tokens .*2.00 GiB.* gradient_checkpointing=true, a train_seq_len below 32, or a smaller"
    error.match(told)
    assert "fits" not in str(error.value)


def test_eval_takes_fewer_rows_too(tmp_path, capsys):
    run = tmp_path / "run"
    trained(run, "num_iterations=1")
    restored = restore(str(run))
    rows = restored.rows(session_of("gpt2").dataset.heldout, max_bytes=500)
    expected = restored.score(rows, 2)
    with short("likelihood", {0: 2}):
        assert restored.score(rows) == expected
        assert "begun again with 2" in capsys.readouterr().err
        with pytest.raises(TrainingError, match="batch_size=2 fits"):
            restored.score(rows, 4)
    with short("likelihood", {0: 0}), pytest.raises(TrainingError, match="single row"):
        restored.score(rows)


@pytest.mark.gpu
def test_a_gpu_that_runs_out(tmp_path, monkeypatch, capsys):
    """What torch itself raises there, at a petabyte."""

    def too_much(gradient=None):
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(short_of_memory, "run_out", too_much)
    for where in ("forward", "backward"):
        again, smaller = tmp_path / where, tmp_path / f"{where} smaller"
        words = ["device=cuda", "torch_compile=false", "deterministic=true"]
        with short(where, {4: 2}) as failed:
            trained(again, *words)
        assert failed == [4] and micro_rows(again) == 2
        go_on(again, 4, smaller, *words, "batch_size=2")
        assert_same_state(again / "checkpoint-6", smaller / "checkpoint-6")


# -- two processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    with Pair() as both:
        yield both


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, block", [("forward", 0), ("backward", 0), ("backward", 1), ("likelihood", 0)]
)
def test_one_of_two_processes_runs_out(tmp_path, pair, where, block):
    """First in the exchange of gradients, then two steps on, in the first of two micro-batches."""
    again, smaller, mixed = (tmp_path / name for name in ("again", "smaller", "mixed"))
    words = ["global_batch_size=8", "model_cfg.dropout=0.1", *WORDS]
    limits = {0: 2} if where == "likelihood" else {0: 2, 2: 1}
    (said, one), (_, two) = pair.ask(train_short, "gpt2", words, again, where, limits, 1, block)
    assert one.pop("failed") == [] and two.pop("failed") == ([4] if where == "likelihood" else [4, 2])
    assert said.count("begun again") == len(limits)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    begun = 3 if where == "likelihood" else 2
    if where != "likelihood":
        pair.ask(train_short, "gpt2", [*words, "batch_size=2"], smaller, where, {}, 1)
        assert_same_state(again / f"checkpoint-{begun}", smaller / f"checkpoint-{begun}")
    mixed.mkdir()
    shutil.copytree(again / f"checkpoint-{begun}", mixed / f"checkpoint-{begun}")
    shutil.copy(again / "metrics.jsonl", mixed / "metrics.jsonl")
    goes_on = [*words, f"batch_size={min(limits.values())}", "resume=auto", f"output_dir={mixed}"]
    pair.ask(train_short, "gpt2", goes_on, mixed, where, {}, 1)
    assert_same_state(again / "checkpoint-6", mixed / "checkpoint-6")
    assert losses(again) == losses(mixed)


@pytest.mark.slow
def test_two_processes_say_what_fits_both(tmp_path, pair):
    words = ["global_batch_size=8", "batch_size=4"]
    first, second = pair.ask(refused, "gpt2", words, tmp_path / "run", "backward", {0: 2}, 1)
    assert first == second and "batch_size=2 fits" in first and SAID.partition(". GPU")[0] in first
