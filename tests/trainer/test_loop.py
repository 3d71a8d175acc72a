"""Training end to end, in process, tiny: what each field changes and what goes wrong well."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import threading
import time

import filelock
import pytest
import torch

from tests.contract.tiny import config
from trainer import loop, session
from trainer.errors import TrainingError
from trainer.loop import train
from trainer.run import record
from trainer.run.checkpoint import checkpoints_in, load_json, load_tensors


def run(path, *more):
    return train(*config("gpt2", f"output_dir={path}", *more), path)


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights(path):
    return load_tensors(path, "model.pt")


def same(left, right):
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps that nothing happened to, to compare with and to copy."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path)
    return path


def score_of(path):
    return json.loads((path / "summary.json").read_text())["score"]["bits_per_byte"]


# -- fields ------------------------------------------------------------------------------------------------------


def test_accumulation_and_recompute_change_nothing(tmp_path):
    whole, split, recomputed = tmp_path / "whole", tmp_path / "split", tmp_path / "recomputed"
    run(whole, "batch_size=4")
    run(split, "batch_size=1")
    run(recomputed, "batch_size=4", "gradient_checkpointing=true")
    for left, right in zip(lines(whole), lines(split), strict=True):
        if "loss" in left:
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    assert same(weights(whole / "final_model"), weights(recomputed / "final_model"))


def test_recompute_calls_the_blocks_again(tmp_path, monkeypatch):
    from tests.contract.tiny import adapter_of

    adapter = adapter_of("gpt2")
    block = type(adapter.model.get_submodule(adapter.blocks()[0]))
    calls = []
    original = block.forward

    def counted(self, *args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(block, "forward", counted)
    run(tmp_path / "a", "num_iterations=1", "val_loss_every=0", "sample_tokens=0")
    plain = len(calls)
    run(
        tmp_path / "b",
        "num_iterations=1",
        "val_loss_every=0",
        "sample_tokens=0",
        "gradient_checkpointing=true",
    )
    assert len(calls) - plain == plain + 2, "two blocks run once more in backward"


def test_ema_is_what_is_evaluated_and_saved_beside(tmp_path, trained):
    run(tmp_path / "ema", "ema_decay=0.9")
    assert same(weights(trained / "final_model"), weights(tmp_path / "ema/final_model"))
    shadow = load_tensors(tmp_path / "ema/final_model", "ema.pt")["shadow"]
    assert not same(shadow, weights(tmp_path / "ema/final_model"))
    assert score_of(trained) != score_of(tmp_path / "ema")


def test_precisions(tmp_path):
    results = {p: run(tmp_path / p, f"mixed_precision={p}") for p in ('"no"', "bf16", "fp16")}
    assert len(set(results.values())) == 3, "each computes in its own format"
    assert max(results.values()) - min(results.values()) < 0.05
    scales = [line["loss_scale"] for line in lines(tmp_path / "fp16") if "loss_scale" in line]
    assert scales and all(s > 1 for s in scales)


def test_seed_changes_weights_and_order(tmp_path, trained):
    assert score_of(trained) != run(tmp_path, "seed=7")


def test_normuon_with_all_its_options_goes_on_bit_for_bit(tmp_path):
    """Momentum, decay and coefficients of a step are functions of the step, the second moment is saved."""
    options = ["optimizer=normuon", "muon_coefficients=polar_express_nanogpt", "muon_momentum_ends=0.5"]
    options += ["muon_momentum_rise=0.6", "muon_momentum_fall=0.3", "cautious_weight_decay=true"]
    options += ["weight_decay_follows_rate=true", "save_steps=2", "save_total_limit=null"]
    whole, resumed, constant = tmp_path / "whole", tmp_path / "resumed", tmp_path / "constant"
    run(whole, *options)
    run(resumed, *options, f"resume={whole / 'checkpoint-2'}")
    run(constant, *options, "muon_momentum_ends=null")
    assert same(weights(whole / "final_model"), weights(resumed / "final_model"))
    assert not same(weights(whole / "final_model"), weights(constant / "final_model"))


STAGES = "batch_stages=[{until:0.4,rows:2},{until:0.8,rows:4,rate:0.5},{until:1}]"


def test_stages_of_the_batch_go_on_bit_for_bit(tmp_path, capsys):
    """Of 6 steps 2 have 2 rows, 3 have 4 and one has 8; the log tells what was served, the rate is the stated one."""
    options = ["global_batch_size=8", STAGES, "scheduler=constant", "save_steps=1", "save_total_limit=null"]
    whole = tmp_path / "whole"
    run(whole, *options, "logging_steps=1")
    said = capsys.readouterr().out
    assert "6 steps of 2 rows (4 from step 2, 8 from step 5) x 32 tokens = 768 tokens" in said
    assert "step 5: 8 rows, 256 tokens a step from here, scheduled rates x 1" in said
    log = [line for line in lines(whole) if "loss" in line]
    assert [line["tokens"] // 32 for line in log] == [2, 4, 8, 12, 16, 24]
    rates = [line["lr/matrix"] / log[0]["lr/matrix"] for line in log]
    assert rates == [1, 1, 0.5, 0.5, 0.5, 1]
    for step in (1, 3, 5):
        state = load_json(whole / f"checkpoint-{step}", "training_state.json")
        assert state["position"] == log[step - 1]["tokens"]
    again = tmp_path / "again"
    run(again, *options, f"resume={whole / 'checkpoint-3'}")
    assert same(weights(whole / "final_model"), weights(again / "final_model"))


def test_a_prolonged_run_says_that_its_stages_are_others(tmp_path, capsys):
    options = ["global_batch_size=8", STAGES, "scheduler=linear"]
    run(tmp_path / "run", *options)
    run(tmp_path / "long", *options, "num_iterations=9", f"resume={tmp_path / 'run'}")
    assert "a step has 4 rows from here, and would have had 8" in capsys.readouterr().out
    run(tmp_path / "kept", *options, "num_iterations=8", "lr_decay_steps=6", f"resume={tmp_path / 'run'}")
    assert "rows from here, and" not in capsys.readouterr().out
    assert load_json(tmp_path / "kept/checkpoint-8", "training_state.json")["position"] == 40 * 32


def test_epochs_replace_steps(tmp_path):
    run(tmp_path, "num_epochs=0.05", "val_loss_every=0")
    assert lines(tmp_path)[-1]["step"] == math.floor(0.05 * (20_000 // 32) / 4)


def test_less_text_than_a_step_takes(tmp_path):
    """20,000 bytes are 593 rows of 32 to train on."""
    with pytest.raises(
        ValueError, match=r"num_epochs=0\.005 is less than one step.*global_batch_size=\d, a shorter"
    ):
        run(tmp_path / "a", "num_epochs=0.005")
    with pytest.raises(
        ValueError, match=r"a step of global_batch_size 8000 passes over it 1\d times.*num_iterations"
    ):
        run(tmp_path / "b", "num_epochs=1", "global_batch_size=8000")
    assert not list(tmp_path.iterdir()), "a mistake leaves no folder behind"


def test_a_warmup_longer_than_the_epochs(tmp_path):
    with pytest.raises(ValueError, match=r"warmup_steps \(100\) must be less than the steps of this run"):
        run(tmp_path / "a", "num_epochs=0.05", "warmup_steps=100", "warmup_ratio=null")


def test_evaluation_only_changes_no_weight(tmp_path, trained, capsys):
    score = run(tmp_path / "scored", "eval_only=true", f"init_from_checkpoint={trained}")
    assert score == score_of(trained)
    assert not checkpoints_in(tmp_path / "scored")
    assert (
        "python mytrainer.py" not in capsys.readouterr().out.split("scored/report.html")[-1]
    )  # nothing to go on with


def test_given_weights_are_scored_with_their_average(tmp_path):
    trained = run(tmp_path / "trained", "ema_decay=0.99")
    averaged = run(
        tmp_path / "averaged",
        "ema_decay=0.99",
        "eval_only=true",
        f"init_from_checkpoint={tmp_path / 'trained'}",
    )
    raw = run(
        tmp_path / "raw", "ema_decay=0.0", "eval_only=true", f"init_from_checkpoint={tmp_path / 'trained'}"
    )
    assert averaged == trained != raw
    (last,) = [line for line in lines(tmp_path / "trained") if "val_raw_bits_per_byte" in line]
    assert last["step"] == 6
    assert last["val_raw_bits_per_byte"] == pytest.approx(raw, rel=1e-6)
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text())
    assert summary["weights"] == "averaged (EMA)"
    assert json.loads((tmp_path / "raw" / "summary.json").read_text())["weights"] == "raw"


def test_weights_of_another_architecture_are_not_scored_as_this_one(tmp_path):
    short = ["num_iterations=1", "val_bytes=64", "sample_tokens=0"]
    train(*config("mdl", *short), tmp_path / "mdl")
    words = [f"init_from_checkpoint={tmp_path / 'mdl'}", "ema_decay=0.9", *short]
    with pytest.raises(ValueError, match="holds a mdl, and this run would score it as a sedd"):
        train(*config("sedd", "eval_only=true", *words), tmp_path / "scored")
    train(*config("sedd", *words), tmp_path / "trained")


def test_a_start_from_weights_without_an_average_begins_one(tmp_path, trained):
    given = run(tmp_path, "ema_decay=0.9", "eval_only=true", f"init_from_checkpoint={trained}")
    assert given == score_of(trained)


def test_limits_on_tokens_mark_the_score_as_not_comparable(tmp_path, trained):
    run(tmp_path, "val_steps=1", "val_bytes=null")
    flags = [
        json.loads((path / "summary.json").read_text())["score"]["comparable"] for path in (tmp_path, trained)
    ]
    assert flags == [False, True]


def test_interim_evaluations_may_cover_less_than_the_final_one(tmp_path):
    run(tmp_path, "synthetic_bytes=60000", "val_bytes=null", "val_bytes_interim=2000")
    interim = [line["val_bytes"] for line in lines(tmp_path) if "val_bytes" in line]
    final = json.loads((tmp_path / "summary.json").read_text())["score"]["bytes"]
    assert len(interim) == 2 and max(interim) <= 2000 < final


def test_best_model_retention_and_only_best(tmp_path):
    # A rate that ruins the model after the first evaluation: the best one is not the last.
    ruin = ["optimizer=sgd", "learning_rate=6.0", "max_grad_norm=0", "scheduler=constant", "val_loss_every=1"]
    best = run(
        tmp_path / "best",
        *ruin,
        "save_best_model=true",
        "save_steps=1",
        "save_total_limit=2",
        "num_iterations=5",
    )
    summary = json.loads((tmp_path / "best/summary.json").read_text())
    assert best < summary["score"]["bits_per_byte"], "the best score is returned"
    assert len(checkpoints_in(tmp_path / "best")) == 2
    state = load_json(tmp_path / "best/best_model", "training_state.json")
    assert state["progress"]["best_bits_per_byte"] == best and state["step"] < 5
    run(tmp_path / "only", *ruin, "save_only_best=true", "num_iterations=5", "save_total_limit=null")
    improved, low = [], math.inf
    for line in lines(tmp_path / "only"):
        if line.get("val_bits_per_byte", math.inf) < low:
            low = line["val_bits_per_byte"]
            improved.append(f"checkpoint-{line['step']}")
    assert [c.name for c in checkpoints_in(tmp_path / "only")] == improved


def test_early_stopping(tmp_path):
    args = [
        "val_loss_every=1",
        "early_stopping=true",
        "early_stopping_patience=2",
        "early_stopping_threshold=5.0",
    ]
    run(tmp_path, *args)
    # The first evaluation improves on nothing; the next two by less than the threshold.
    assert lines(tmp_path)[-1]["step"] == 3


# -- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def again(trained, tmp_path):
    """A copy of the finished run, to go on with."""
    return shutil.copytree(trained, tmp_path / "run")


def test_nothing_to_do(again, capsys):
    run(again, "resume=auto", "num_iterations=4")
    assert "nothing to do: step 6 >= num_iterations 4" in capsys.readouterr().out


def test_damaged_newest_checkpoint_is_skipped_and_replaced(tmp_path, capsys):
    run(tmp_path / "whole", "save_steps=3")
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    (tmp_path / "hurt/checkpoint-6/optimizer.pt").unlink()
    (tmp_path / "hurt/checkpoint-6/optimizer.pt").write_bytes(b"short")
    run(tmp_path / "hurt", "resume=auto", "save_steps=3")
    assert "checkpoint-6 is damaged (optimizer.pt" in capsys.readouterr().out
    assert same(weights(tmp_path / "whole/checkpoint-6"), weights(tmp_path / "hurt/checkpoint-6"))


def test_other_architecture_data_or_optimizer_is_refused(again):
    for change, words in (
        ("model_cfg.n_layers=3", "n_layers 2 -> 3"),
        ("synthetic_bytes=30000", "the data is not what.* Set what it had: synthetic_bytes=20000"),
        ("optimizer=sgd", "another optimizer"),
    ):
        with pytest.raises(ValueError, match=words):
            cfg, model_cfg = config("gpt2", "num_iterations=9", change)
            train(cfg.model_copy(update={"resume": "auto"}), model_cfg, again)


def test_text_that_was_renamed_goes_on_and_other_text_does_not(tmp_path, capsys):
    text = "".join(f"line {n} of a book\n" for n in range(300))
    (tmp_path / "a.txt").write_text(text)
    words = ["data=text", "num_iterations=2", "val_loss_every=0", "val_bytes=64", "sample_tokens=0"]
    run(tmp_path / "run", *words, f"input_file={tmp_path / 'a.txt'}")
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    words += ["resume=auto", f"input_file={tmp_path / 'b.txt'}"]
    run(tmp_path / "run", *words, "num_iterations=3")
    assert "files of the text have other names than before" in capsys.readouterr().out
    (tmp_path / "b.txt").write_text(text.replace("line 7", "line seven"))
    with pytest.raises(ValueError, match=r"Restore the data \(bytes \d+ then, \d+ now"):
        run(tmp_path / "run", *words, "num_iterations=4")


def test_a_field_that_is_younger_than_the_checkpoint_has_its_default(tmp_path, capsys):
    run(tmp_path, "num_iterations=3")
    place = tmp_path / "checkpoint-3"
    saved = load_json(place, "config.json")
    del saved["model_cfg"]["pad_vocab"]
    (place / "config.json").write_text(json.dumps(saved))
    digests = load_json(place, "digests.json")
    digests["config.json"] = hashlib.sha256((place / "config.json").read_bytes()).hexdigest()
    (place / "digests.json").write_text(json.dumps(digests))
    run(tmp_path, "num_iterations=4", "resume=auto")
    assert "pad_vocab" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="pad_vocab is True, False was asked"):
        run(tmp_path, "num_iterations=5", "resume=auto", "model_cfg.pad_vocab=false")


def test_changed_fields_are_announced(again, capsys):
    run(again, "resume=auto", "num_iterations=8", "learning_rate=0.002")
    out = capsys.readouterr().out
    assert "learning_rate 0.001 -> 0.002" in out and "num_iterations 6 -> 8" in out


def test_an_older_checkpoint_is_not_gone_on_with_in_place(tmp_path):
    run(tmp_path / "a", "save_steps=3")
    with pytest.raises(ValueError, match="branch off"):
        run(tmp_path / "a", f"resume={tmp_path / 'a/checkpoint-3'}", "num_iterations=9")
    run(tmp_path / "b", f"resume={tmp_path / 'a/checkpoint-3'}")
    assert same(weights(tmp_path / "a/checkpoint-6"), weights(tmp_path / "b/checkpoint-6"))


def test_a_run_is_not_written_over(tmp_path):
    run(tmp_path, "save_checkpoint=false")
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run"):
        cfg, model_cfg = config("gpt2")
        train(cfg, model_cfg, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


# -- faults ----------------------------------------------------------------------------------------------------------


def test_two_runs_on_one_folder(tmp_path):
    with (
        filelock.FileLock(str(tmp_path / ".lock")),
        pytest.raises(TrainingError, match="another run is writing"),
    ):
        run(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("where", "words"), [("module", "mlp"), ("loss", "loss term 'ce'")])
def test_not_finite_stops_with_the_place_and_keeps_what_was(tmp_path, monkeypatch, where, words):
    """Step 3 turns bad. Nothing of it, nor of the step already under way behind it, reaches the weights."""
    from adapters.default import DefaultModelAdapter

    bad_step: list[bool] = []
    forward = DefaultModelAdapter.forward
    original = loop.Trainer._train_step

    def stepping(self, batch, denominators):
        bad_step[:] = [batch.step == 3]
        original(self, batch, denominators)
        stepping.snapshots.append({k: v.clone() for k, v in self.s.adapter.model.state_dict().items()})

    def poisoned(self, prepared):
        hooks = []
        if not bad_step or not bad_step[0]:
            return forward(self, prepared)
        if where == "module":
            target = next(m for n, m in self.model.named_modules() if "mlp" in n and not list(m.children()))
            hooks.append(target.register_forward_hook(lambda m, i, o: o * float("nan")))
            # before the replay's own hooks, so that they see it
            target._forward_hooks.move_to_end(hooks[0].id, last=False)
        output = forward(self, prepared)
        if where == "loss":
            output.terms["ce"].sum = output.terms["ce"].sum * float("inf")
        for hook in hooks:
            hook.remove()
        return output

    stepping.snapshots = []
    replay = loop.explain_non_finite

    def replaying(*args):
        bad_step[:] = [True]
        return replay(*args)

    monkeypatch.setattr(loop, "explain_non_finite", replaying)
    monkeypatch.setattr(loop.Trainer, "_train_step", stepping)
    monkeypatch.setattr(DefaultModelAdapter, "forward", poisoned)
    with pytest.raises(TrainingError) as error:
        run(tmp_path, "save_steps=2", "val_loss_every=0")
    assert "step 3 is not finite" in str(error.value) and words in str(error.value)
    assert "checkpoint-2 is untouched" in str(error.value)
    good = stepping.snapshots[2]
    assert all(same(good, later) for later in stepping.snapshots[3:]), "no update after the bad step"
    assert [c.name for c in checkpoints_in(tmp_path)] == ["checkpoint-2"]


def test_a_learning_rate_that_explodes(tmp_path):
    args = [
        "optimizer=sgd",
        "learning_rate=1.0e30",
        "max_grad_norm=0",
        "num_iterations=20",
        "val_loss_every=0",
    ]
    with pytest.raises(TrainingError, match=r"step \d+ is not finite.*Learning rates: .*e\+"):
        run(tmp_path, *args)


def test_full_disk_at_a_checkpoint(again, monkeypatch):
    import trainer.run.checkpoint as ck

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ck.os, "fsync", full)
    with pytest.raises(TrainingError, match="disk is full.*checkpoint-6"):
        cfg, model_cfg = config(
            "gpt2", f"output_dir={again}", "resume=auto", "num_iterations=9", "save_steps=1"
        )
        train(cfg, model_cfg, again)
    assert ck.damage(again / "checkpoint-6") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_go_on(tmp_path, trained, monkeypatch, capsys, number):
    train_step = loop.Trainer._train_step

    def interrupted(self, batch, denominators):
        if batch.step == 3:
            os.kill(os.getpid(), number)
        train_step(self, batch, denominators)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_train_step", interrupted)
        run(tmp_path)
    assert f"python mytrainer.py resume={tmp_path}" in capsys.readouterr().out
    assert load_json(checkpoints_in(tmp_path)[-1], "training_state.json")["step"] == 4
    assert not (tmp_path / "summary.json").exists()
    run(tmp_path, "resume=auto")
    assert same(weights(trained / "checkpoint-6"), weights(tmp_path / "checkpoint-6"))


@pytest.mark.slow
def test_a_signal_at_any_time(tmp_path):
    """From a thread, in whatever the run is doing then."""
    run(tmp_path / "whole", "num_iterations=40")
    path = tmp_path / "stopped"

    def interrupt():
        while not (path / "metrics.jsonl").exists() or len(lines(path)) < 3:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    run(path, "num_iterations=40")
    thread.join()
    assert 0 < load_json(checkpoints_in(path)[-1], "training_state.json")["step"] < 40
    run(path, "num_iterations=40", "resume=auto")
    assert same(weights(tmp_path / "whole/checkpoint-40"), weights(path / "checkpoint-40"))


def test_a_signal_during_an_evaluation_repeats_it_after_the_resume(tmp_path, trained, monkeypatch):
    evaluate = loop.evaluate
    calls = []

    def interrupted(*args, should_stop, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, should_stop=should_stop, **kwargs)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    assert math.isnan(run(tmp_path / "stopped"))
    run(tmp_path / "stopped", "resume=auto")

    def scores(path):
        return [
            (line["step"], line["val_bits_per_byte"]) for line in lines(path) if "val_bits_per_byte" in line
        ]

    assert scores(tmp_path / "stopped") == scores(trained)


def test_a_signal_while_the_text_is_read_leaves_at_once_and_nothing_behind(tmp_path, monkeypatch, capsys):
    def reading(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGHUP)
        raise AssertionError("it went on")

    monkeypatch.setattr(session, "load_dataset", reading)
    with pytest.raises(SystemExit) as left:
        run(tmp_path / "run")
    assert left.value.code == 128 + signal.SIGHUP
    assert "SIGHUP received: nothing was saved" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


class Unready:
    """Yardsticks that take longer than anybody waits."""

    def done(self):
        os.kill(os.getpid(), signal.SIGINT)
        return False

    def close(self):
        pass


class Dead(Unready):
    def done(self):
        return True

    def result(self):
        raise RuntimeError("their process ended with status -9")


@pytest.mark.parametrize(
    ("yardsticks", "words"), [(Unready, "were not waited for"), (Dead, "no yardsticks: .*status -9")]
)
def test_without_yardsticks_a_run_ends_as_it_should(tmp_path, monkeypatch, capsys, yardsticks, words):
    monkeypatch.setattr(record, "start_background", lambda *args: yardsticks())
    score = run(tmp_path)
    out = capsys.readouterr().out
    assert re.search(f"^warning: .*{words}", out, re.MULTILINE) and "> this model" in out
    assert score_of(tmp_path) == score and (tmp_path / "report.html").exists()


def test_yardsticks_that_cannot_be_started_are_done_without(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record, "start_background", full)
    run(tmp_path)
    assert "warning: no yardsticks: [Errno 28]" in capsys.readouterr().out


def test_a_final_evaluation_that_was_cut_short_is_made_up_for(tmp_path, monkeypatch):
    evaluate = loop.evaluate

    def interrupted(*args, should_stop, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, should_stop=should_stop, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        run(tmp_path / "cut", "val_loss_every=0")
    assert not (tmp_path / "cut/summary.json").exists()
    score = run(tmp_path / "cut", "val_loss_every=0", "resume=auto")
    assert score == run(tmp_path / "whole", "val_loss_every=0")
    assert (tmp_path / "cut/final_model").exists() and (tmp_path / "cut/report.html").exists()


@pytest.mark.parametrize("field", ["save_only_best", "save_best_model"])
def test_with_no_evaluation_but_the_last_that_one_counts(tmp_path, field):
    run(tmp_path, "val_loss_every=0", f"{field}=true")
    assert [c.name for c in checkpoints_in(tmp_path)] == ["checkpoint-6"]
    assert (tmp_path / "best_model").exists() == (field == "save_best_model")


def test_another_batch_size_goes_on_where_the_text_was_left(again, monkeypatch):
    from data.rows import TrainingRows

    seen, batch = [], TrainingRows.batch
    monkeypatch.setattr(
        TrainingRows, "batch", lambda self, rows: seen.extend(rows.tolist()) or batch(self, rows)
    )
    run(again, "resume=auto", "global_batch_size=6", "num_iterations=8")
    assert seen == list(range(24, 36)), "six steps of four rows came before"
    run(again, "resume=auto", "global_batch_size=2", "num_iterations=9")
    assert seen[12:] == [36, 37]


def test_samples_of_a_life_cut_short_are_dropped(tmp_path):
    run(tmp_path, "save_steps=3")
    whole = (tmp_path / "samples.txt").read_text()
    shutil.rmtree(tmp_path / "checkpoint-6")
    run(tmp_path, "resume=auto", "save_steps=3")
    assert (tmp_path / "samples.txt").read_text() == whole
