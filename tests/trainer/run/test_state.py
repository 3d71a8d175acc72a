"""What of a run's state is gone on with, or taken along into another, and what is said where it is not."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal

import pytest
import torch

from data.tokenizers import load_tokenizer
from models.gpt2 import GPT2
from models.layers.roles import Rule
from tests.contract.tiny import config
from tests.trainer.forged import forge, tensor_file
from trainer import loop
from trainer.commands.show import describe
from trainer.errors import TrainingError
from trainer.loop import train
from trainer.precision import LossScaler
from trainer.run.checkpoint import checkpoints_in, load_json, load_tensors
from trainer.run.folder import RunFolder
from trainer.run.progress import Progress

# A rate that ruins the model after its first evaluation: the best model is not the last.
RUIN = ["optimizer=sgd", "learning_rate=6.0", "max_grad_norm=0", "scheduler=constant", "val_loss_every=1"]
STOPS = [
    "val_loss_every=1",
    "early_stopping=true",
    "early_stopping_patience=2",
    "early_stopping_threshold=5.0",
]


def run(path, *more):
    return train(*config("gpt2", f"output_dir={path}", *more), path)


def lines(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def summary(path):
    return json.loads((path / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps that nothing happened to, a checkpoint at each."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, "save_steps=1", "save_total_limit=null")
    return path


def cut_back(trained, path, step):
    """A copy of that run, of which a life was cut short with `step` as its last checkpoint."""
    shutil.copytree(trained, path)
    for checkpoint in checkpoints_in(path):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    return path


# -- the tokenizer of given weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts, and a run of a tokenizer of the first."""
    folder = tmp_path_factory.mktemp("texts")
    for name, words in (
        ("one", "the cat sat on the mat and the hat "),
        ("two", "zwölf Boxkämpfer jagen Viktor quer "),
    ):
        (folder / name).write_text("".join(f"{words} {n}\n" for n in range(400)))
    run(folder / "run", "data=text", f"input_file={folder}/one", "tokenizer=bpe-280", "num_iterations=1")
    return folder


@pytest.mark.parametrize("named", ["auto", "bpe-280"])
def test_weights_bring_their_tokenizer(texts, tmp_path, capsys, named):
    words = [
        "data=text",
        f"input_file={texts}/two",
        f"tokenizer={named}",
        f"init_from_checkpoint={texts}/run",
    ]
    run(tmp_path, *words, "num_iterations=1")
    theirs, ours = (
        load_tokenizer(path / "checkpoint-1" / "tokenizer.json") for path in (texts / "run", tmp_path)
    )
    assert ours.digest == theirs.digest
    assert f"weights and tokenizer (bpe-280) from {texts}/run/checkpoint-1" in capsys.readouterr().out


def test_show_knows_that_weights_bring_their_tokenizer(texts):
    words = ["data=text", f"input_file={texts}/two", f"init_from_checkpoint={texts}/run"]
    assert describe(*config("gpt2", *words))["vocab_size"] == 280


@pytest.mark.parametrize("other", ["byte", "bpe-270", "bpe-290"])
def test_weights_are_not_read_in_another_tokenizer(texts, tmp_path, other):
    words = ["data=text", f"input_file={texts}/one", f"tokenizer={other}"]
    said = f"tokenizer: '{other}' is another than the bpe-280 of .*checkpoint-1.* Leave it at tokenizer=auto"
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "new", *words, f"init_from_checkpoint={texts}/run")
    shutil.copytree(texts / "run", tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "run", *words, "resume=auto", "num_iterations=2")


def test_a_run_begun_from_weights_goes_on_from_its_own(trained, tmp_path):
    begun = [f"init_from_checkpoint={trained}", "num_iterations=4", "val_loss_every=0"]
    run(tmp_path / "whole", *begun)
    run(tmp_path / "cut", *begun, "save_steps=2")
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    cfg, model_cfg = config("gpt2", *begun[1:])
    train(cfg.model_copy(update={"resume": "auto"}), model_cfg, tmp_path / "cut")
    kept = load_json(tmp_path / "cut/checkpoint-4", "training_state.json")["training_config"]
    assert kept["init_from_checkpoint"] == str(trained), "what it began from belongs to it"
    whole, cut = (load_tensors(tmp_path / name / "checkpoint-4", "model.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


# -- averages, scales, totals --------------------------------------------------------------------------------


def test_an_average_that_is_turned_on_begins_at_the_weights(trained, tmp_path, capsys):
    path = cut_back(trained, tmp_path / "run", 6)
    run(path, "resume=auto", "ema_decay=0.99", "num_iterations=7")
    assert "checkpoint-6 keeps no average of the weights: ema_decay begins one" in capsys.readouterr().out
    before = load_tensors(trained / "checkpoint-6", "model.pt")
    after = load_tensors(path / "checkpoint-7", "model.pt")
    shadow = load_tensors(path / "checkpoint-7", "ema.pt")["shadow"]
    for name, value in shadow.items():  # 1 - d = 9/11 in the first update
        torch.testing.assert_close(value, before[name] + (after[name] - before[name]) * 9 / 11)


def test_a_loss_scale_is_that_of_its_precision():
    device = torch.device("cpu")
    fp16, other = LossScaler(True, device), LossScaler(False, device)
    fp16.scale.fill_(1024.0)
    other.load_state_dict(fp16.state_dict())
    assert other.scale == 1.0, "nothing would divide by it"
    again = LossScaler(True, device)
    again.load_state_dict(other.state_dict())
    assert again.scale == 2.0**16
    again.load_state_dict({"scale": 512.0, "good_steps": 3.0})  # before a state said whose it is
    assert (again.scale, again.good_steps) == (512.0, 3.0)


def test_precision_is_announced_where_it_is_the_machine_that_changed_it(trained, tmp_path, capsys):
    path = cut_back(trained, tmp_path / "run", 6)
    run(path, "resume=auto", "num_iterations=7", "mixed_precision=bf16")
    assert "precision was no and is bf16: equal to rounding from here" in capsys.readouterr().out


def test_totals_are_of_all_lives(trained, tmp_path):
    path = cut_back(trained, tmp_path / "run", 3)
    place = path / "checkpoint-3" / "training_state.json"
    saved = json.loads(place.read_text())
    saved["progress"] |= {"seconds_total": 1000.0, "peak_memory_bytes": 2**50}
    place.write_text(json.dumps(saved))
    digests = load_json(path / "checkpoint-3", "digests.json")
    digests["training_state.json"] = hashlib.sha256(place.read_bytes()).hexdigest()
    (path / "checkpoint-3" / "digests.json").write_text(json.dumps(digests))
    run(path, "resume=auto")
    found = summary(path)
    assert 1000 < found["seconds_total"] < 1100 and found["peak_memory_bytes"] == 2**50
    assert found["flops"] == pytest.approx(summary(trained)["flops"])


def test_progress_of_before_a_field_was_there():
    saved = {
        k: v
        for k, v in Progress(step=3).to_json().items()
        if k != "seconds_total" and not k.endswith("memory_bytes")
    }
    assert Progress.from_json(saved, 1.0) == Progress(step=3)


# -- early stopping and the best model -----------------------------------------------------------------------


def test_a_run_that_stopped_early_has_no_step_left(tmp_path, capsys):
    score = run(tmp_path, *STOPS)
    out = capsys.readouterr().out
    assert f"resume={tmp_path} early_stopping=false" in out, "what is printed goes on"
    assert summary(tmp_path)["stopped_early"]
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.name in ("metrics.jsonl", "summary.json")}
    assert run(tmp_path, *STOPS, "resume=auto") == score
    assert (
        "nothing to do: the run stopped early, at step 3. Set early_stopping=false" in capsys.readouterr().out
    )
    assert {p: p.read_bytes() for p in before} == before and len(checkpoints_in(tmp_path)) == 1
    run(tmp_path, "val_loss_every=1", "resume=auto")
    assert lines(tmp_path)[-1]["step"] == 6 and not summary(tmp_path)["stopped_early"]


def test_a_run_of_best_checkpoints_is_not_made_again(tmp_path, capsys):
    """Its last checkpoint lies before its end."""
    words = [*RUIN, "save_only_best=true", "num_iterations=4"]
    score = run(tmp_path, *words)
    assert [c.name for c in checkpoints_in(tmp_path)] != ["checkpoint-4"]
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(tmp_path, *words, "resume=auto") == score
    assert "nothing to do: step 4 >= num_iterations 4" in capsys.readouterr().out
    stops = ["early_stopping=true", "early_stopping_patience=2", "resume=auto"]
    assert run(tmp_path, *words, *stops, "num_iterations=9") == score
    assert "nothing to do: the run stopped early, at step 4" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(tmp_path, *words, "num_iterations=5", "resume=auto")
    assert lines(tmp_path)[-1]["step"] == 5


def test_a_last_score_that_was_cut_short_costs_no_step(tmp_path):
    run(tmp_path, *STOPS)
    (tmp_path / "summary.json").unlink()
    run(tmp_path, *STOPS, "resume=auto")
    assert summary(tmp_path)["steps"] == 3


def test_the_best_score_stands_beside_the_last(tmp_path, capsys):
    score = run(tmp_path, *RUIN, "save_best_model=true", "num_iterations=4")
    found = summary(tmp_path)
    evaluated = {
        line["step"]: line["val_bits_per_byte"] for line in lines(tmp_path) if "val_bits_per_byte" in line
    }
    step = min(evaluated, key=evaluated.get)
    assert found["score"]["bits_per_byte"] == evaluated[4] > evaluated[step]
    assert (found["best"]["step"], found["best"]["bits_per_byte"]) == (step, evaluated[step])
    assert score == evaluated[step]
    table = capsys.readouterr().out.partition("lower is better")[2]
    assert f"> best model, of step {step} " in table and "> this model " in table
    assert f"best model, of step {step}" in (tmp_path / "report.html").read_text()
    assert run(tmp_path, *RUIN, "save_best_model=true", "num_iterations=4", "resume=auto") == score


def test_a_best_score_that_is_an_estimate_keeps_its_error(tmp_path, monkeypatch):
    evaluate, worse = loop.evaluate, iter([(5.0, 0.25), (6.0, 0.5)])

    def estimated(*args, **kwargs):
        bits, error = next(worse)
        found = evaluate(*args, **kwargs)
        return dataclasses.replace(found, bits_per_byte=bits, standard_error=error, kind="bound")

    monkeypatch.setattr(loop, "evaluate", estimated)
    run(tmp_path, "num_iterations=2", "val_loss_every=1", "save_best_model=true")
    expected = {"step": 1, "bits_per_byte": 5.0, "standard_error": 0.25, "kind": "bound"}
    assert summary(tmp_path)["best"] == expected


def test_the_best_model_is_scored_on_the_text_of_the_last_score(tmp_path):
    """Evaluations along the way are of a part: their score is not one to set beside the last."""
    keep = ["save_best_model=true", "num_iterations=4", "synthetic_bytes=60000", "val_bytes=null"]
    score = run(tmp_path, *RUIN, *keep, "val_bytes_interim=1000")
    best = summary(tmp_path)["best"]
    assert best["bytes"] == summary(tmp_path)["score"]["bytes"] > 1000 and best["bits_per_byte"] == score
    whole = ["synthetic_bytes=60000", "val_bytes=null", "eval_only=true"]
    given = run(tmp_path / "eval", *whole, f"init_from_checkpoint={tmp_path}/best_model")
    assert given == pytest.approx(score, rel=1e-6)
    last = load_tensors(tmp_path / "checkpoint-4", "model.pt")
    assert not all(
        torch.equal(v, last[k]) for k, v in load_tensors(tmp_path / "best_model", "model.pt").items()
    )


def test_a_branch_takes_the_best_model_along(tmp_path):
    keep = [*RUIN, "save_best_model=true", "save_steps=1"]
    run(tmp_path / "a", *keep, "num_iterations=3", "save_total_limit=1")
    step = summary(tmp_path / "a")["best"]["step"]
    run(tmp_path / "b", *keep, f"resume={tmp_path}/a", "num_iterations=5")
    assert load_json(tmp_path / "b/best_model", "training_state.json")["step"] == step
    assert summary(tmp_path / "b")["best"]["step"] == step


def test_a_best_model_that_is_gone_is_no_best_score(tmp_path, capsys):
    keep = [*RUIN, "save_best_model=true", "save_total_limit=1"]
    run(tmp_path, *keep, "num_iterations=3")
    step = summary(tmp_path)["best"]["step"]
    shutil.rmtree(tmp_path / "best_model")
    run(tmp_path, *keep, "num_iterations=4", "resume=auto")
    assert (
        f"at step {step}, is forgotten: the model of step {step} is no longer there"
        in capsys.readouterr().out
    )
    assert summary(tmp_path)["best"]["step"] == 4 and (tmp_path / "best_model").is_dir()


def test_scores_of_other_text_are_not_compared(trained, tmp_path, capsys):
    path = cut_back(trained, tmp_path / "run", 6)
    run(path, "resume=auto", "num_iterations=7", "val_bytes=200")
    assert "is forgotten: evaluations score other text" in capsys.readouterr().out
    progress = load_json(path / "checkpoint-7", "training_state.json")["progress"]
    assert progress["best_step"] == 7


def test_another_optimizer_says_how_to_go_on(trained):
    with pytest.raises(
        ValueError, match="Go on with optimizer=muon, or .*optimizer=sgd init_from_checkpoint=.*-6"
    ):
        cfg, model_cfg = config("gpt2", "num_iterations=9", "optimizer=sgd")
        train(cfg.model_copy(update={"resume": "auto"}), model_cfg, trained)


def test_an_architecture_with_other_roles_says_how_to_go_on(trained, tmp_path, monkeypatch):
    path = cut_back(trained, tmp_path / "run", 6)
    monkeypatch.setattr(GPT2, "param_roles", lambda self: [Rule(".*", "scalar")])
    with pytest.raises(
        ValueError, match="checkpoint-6: the optimizer state .* init_from_checkpoint=.*checkpoint-6"
    ):
        run(path, "resume=auto", "num_iterations=7")


# -- what a life cut short had written -----------------------------------------------------------------------


def test_lines_beyond_the_checkpoint_are_kept_beside(trained, tmp_path, capsys):
    path = cut_back(trained, tmp_path / "run", 3)
    late = [line for line in lines(path) if line["step"] > 3]
    run(path, "resume=auto")
    said = f"metrics.jsonl had {len(late)} lines beyond step 3, of a life cut short: moved to metrics.dropped.jsonl"
    assert said in capsys.readouterr().out
    assert lines(path, "metrics.dropped.jsonl") == late
    assert (path / "samples.dropped.txt").read_text().startswith("--- step 6 ---\n")
    assert [line["step"] for line in lines(path)] == [line["step"] for line in lines(trained)]


def test_a_run_that_ended_before_its_first_checkpoint_starts_over_and_says_so(trained, tmp_path, capsys):
    path = cut_back(trained, tmp_path / "run", 0)
    before = lines(path)
    run(path, "resume=auto")
    out = capsys.readouterr().out
    assert "holds no checkpoint: its run ended before the first one, and starts over at step 0" in out
    assert lines(path, "metrics.dropped.jsonl") == before, "nothing is wiped"
    assert len(lines(path)) == len(before)


def test_a_first_start_has_nothing_to_say(tmp_path, capsys):
    run(tmp_path, "resume=auto", "num_iterations=1")
    assert "starts over" not in capsys.readouterr().out and not (tmp_path / "metrics.dropped.jsonl").exists()


def test_a_path_without_a_checkpoint_says_how_to_start_over(trained, tmp_path):
    path = cut_back(trained, tmp_path / "my run", 0)
    (path / "config.yaml").touch()
    again = rf"python mytrainer.py '{path}/config.yaml' 'output_dir={path}' resume=auto"
    with pytest.raises(ValueError, match=f"holds no complete checkpoint. .*: {again}"):
        loop.checkpoint_to_resume(
            config("gpt2")[0].model_copy(update={"resume": str(path)}), RunFolder(path), print
        )


def test_a_score_behind_the_checkpoint_of_its_step_stands_once(tmp_path, monkeypatch):
    """Stopped in the middle of an evaluation, gone on with, killed after it: the evaluation is made a second time."""
    evaluate = loop.evaluate

    def stopping(*args, should_stop, **kwargs):
        return None

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        assert math.isnan(run(tmp_path))
    assert [c.name for c in checkpoints_in(tmp_path)] == ["checkpoint-3"]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "_train_step", killed)
        run(tmp_path, "resume=auto")
    assert loop.evaluate is evaluate
    run(tmp_path, "resume=auto")
    assert [line["step"] for line in lines(tmp_path) if "val_bits_per_byte" in line] == [3, 6]


def test_half_a_character_in_the_samples_stops_nothing(trained, tmp_path):
    path = cut_back(trained, tmp_path / "run", 3)
    with open(path / "samples.txt", "ab") as file:
        file.write("--- step 7 ---\n€".encode()[:-1])
    run(path, "resume=auto")
    assert (path / "samples.txt").read_bytes() == (trained / "samples.txt").read_bytes()


def test_a_report_that_was_not_written_any_more_is(trained, tmp_path):
    path = cut_back(trained, tmp_path / "run", 6)
    (path / "report.html").unlink()
    run(path, "resume=auto")
    assert (path / "report.html").exists()


# -- stopped between two things that belong together ---------------------------------------------------------


def asked_to_stop(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)


def test_what_an_evaluation_found_is_saved_though_its_step_had_been(tmp_path, monkeypatch):
    """Stopped in the evaluation of step 3, which is made in the next life: that its score is the best is known to the
    checkpoint of that step from then on."""
    keep = ["save_best_model=true", "save_total_limit=1", "val_loss_every=1"]
    evaluate, asked = loop.evaluate, []

    def stopping(*args, **kwargs):
        asked.append(1)
        return None if len(asked) == 3 else evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        run(tmp_path, *keep)
    assert load_json(tmp_path / "checkpoint-3", "training_state.json")["progress"]["best_step"] == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop.Trainer, "_train_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path, *keep, "resume=auto")
    for name in ("checkpoint-3", "best_model"):
        progress = load_json(tmp_path / name, "training_state.json")["progress"]
        assert (progress["best_step"], progress["evaluated_at"]) == (3, 3)
    assert [c.name for c in checkpoints_in(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("step", [3, 6])
def test_a_text_that_was_interrupted_is_written_by_the_next_life(trained, tmp_path, monkeypatch, step):
    keep = ["save_steps=1", "save_total_limit=null"]

    def interrupted(s, should_stop):
        if loop_step(tmp_path) == step:
            asked_to_stop()
            return None
        return sample_text(s, should_stop)

    sample_text = loop.sample_text
    with monkeypatch.context() as patch:
        patch.setattr(loop, "sample_text", interrupted)
        run(tmp_path, *keep)
    assert not (tmp_path / "summary.json").exists()
    assert f"--- step {step} ---" not in RunFolder(tmp_path)._samples().decode()
    run(tmp_path, *keep, "resume=auto")
    assert (tmp_path / "samples.txt").read_bytes() == (trained / "samples.txt").read_bytes()
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path)] == [
        (line["step"], line.get("loss")) for line in lines(trained)
    ]


def loop_step(path):
    """The step of the last line of a run that goes on."""
    return lines(path)[-1]["step"]


def test_a_score_without_averaging_that_was_interrupted_is_made_again(tmp_path, monkeypatch):
    words, evaluate, asked = ["ema_decay=0.9", "val_loss_every=0"], loop.evaluate, []

    def stopping(*args, **kwargs):
        asked.append(1)
        return None if len(asked) == 2 else evaluate(*args, **kwargs)

    run(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)
        run(tmp_path / "cut", *words)
    run(tmp_path / "cut", *words, "resume=auto")
    assert [sorted(line) for line in lines(tmp_path / "cut")] == [
        sorted(line) for line in lines(tmp_path / "whole")
    ]


# -- content that is other than was saved, with digests that say it is not -----------------------------------


def test_a_state_that_lacks_what_a_run_needs_is_passed_over(trained, tmp_path, capsys):
    path = cut_back(trained, tmp_path / "run", 6)
    saved = load_json(path / "checkpoint-6", "training_state.json")
    saved["progress"] |= {"tokens": None, "luck": 1}
    forge(path / "checkpoint-6", "training_state.json", json.dumps(saved).encode())
    saved = load_json(path / "checkpoint-5", "training_state.json")
    forge(path / "checkpoint-5", "training_state.json", json.dumps(saved | {"position": "x"}).encode())
    (path / "summary.json").unlink()
    run(path, "resume=auto")
    said = capsys.readouterr().out
    for told in ("position: Input should be a valid integer", "tokens: Input should", "luck: Extra inputs"):
        assert told in said
    assert "checkpoint-6 is damaged (" in said and "resumed checkpoint-4 at step 4" in said
    assert summary(path)["score"] == summary(trained)["score"]


def changed(path, name, change):
    """A file of tensors whose content is another."""
    value = load_tensors(path, name)
    change(value)
    return tensor_file(value)


def ruin(value):
    for entry in (value.get("shadow") or value.get("optimizers", {}).get("state") or value).values():
        for tensor in [entry] if isinstance(entry, torch.Tensor) else entry.values():
            if tensor.is_floating_point():
                tensor.view(-1)[0] = math.nan
                return


def sparse(value):
    value["wte.weight"] = value["wte.weight"].to_sparse()


FORGED = {
    "model.pt": [b"", b"hello", tensor_file([]), tensor_file({"wte.weight": None}), sparse, ruin],
    "optimizer.pt": [tensor_file({}), tensor_file({"optimizers": [], "scaler": {}, "meter": None}), ruin],
    "tokenizer.json": [b"[" * 100_000, b"{}"],
    "config.json": [b"[" * 100_000, b"{}"],
}


@pytest.mark.parametrize("name", FORGED)
def test_a_file_that_was_not_written_here_is_named_and_passed_over(trained, tmp_path, capsys, name):
    """`resume` goes on from the one before, writes the forged one anew, and is named where there is none before."""
    path = cut_back(trained, tmp_path / "run", 6)
    there = path / "checkpoint-6"
    contents = [changed(there, name, c) if callable(c) else c for c in FORGED[name]]
    forge(there, name, contents.pop())
    shutil.copytree(there, tmp_path / "alone/checkpoint-6")
    (path / "summary.json").unlink()
    run(path, "resume=auto")
    said = capsys.readouterr().out
    assert said.count("checkpoint-6 is damaged (") == 1 and "resumed checkpoint-5 at step 5" in said
    again, whole = (load_tensors(where / "checkpoint-6", "model.pt") for where in (path, trained))
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    for content in contents:
        forge(tmp_path / "alone/checkpoint-6", name, content)
        with pytest.raises(ValueError, match="checkpoint-6") as refused:
            run(tmp_path / "alone", "resume=auto", "num_iterations=7")
        assert name in str(refused.value) + capsys.readouterr().out


# -- weights that are not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["save", "score"])
def test_what_an_update_ruins_is_not_saved(tmp_path, monkeypatch, then):
    """Gradients are finite, and so is the loss of that step: only the weights say it."""
    step = loop.Trainer._train_step

    def ruining(self, batch, denominators):
        step(self, batch, denominators)
        if batch.step == 3:
            with torch.no_grad():
                next(iter(self.s.adapter.parameters())).view(-1)[0] = math.nan

    monkeypatch.setattr(loop.Trainer, "_train_step", ruining)
    words = ["save_steps=1"] if then == "save" else ["save_steps=3", "val_loss_every=4"]
    said = "the update of step 3 left weights that are not finite: .*They were not saved; .*checkpoint-3 is from before"
    with pytest.raises(TrainingError, match=said):
        run(tmp_path, "val_loss_every=0", *words)
    assert checkpoints_in(tmp_path)[-1].name == "checkpoint-3"


# -- files beside checkpoints --------------------------------------------------------------------------------

STRANGE = {
    "metrics.jsonl": [b"[1]\n", b"null\n", b'{"step": "x"}\n', b"[" * 100_000 + b"\n", b"\xff\xfe\n"],
    "samples.txt": ["--- step 2 ---\n€".encode()[:-1]],
    "summary.json": [b"", b"[]", b'{"steps": 6}', b'{"steps": 6, "score": 1}', b"[" * 100_000],
    "manifest.json": [b"", b"[]", b'{"kernels": []}', b'{"kernels": {"x": 1}}'],
    "annotation.json": [b"\xff"],
    "config.yaml": [b"\xff", b"[", b"- 1\n"],
    "report.html": [b""],
}


def test_files_that_are_none_of_a_run_are_told_of(tmp_path):
    folder, notes = RunFolder(tmp_path), []
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*STRANGE["metrics.jsonl"], b'{"step": 1}\n{"st']))
    assert folder.drop_later(1, scored=True) == "metrics.jsonl had 5 lines that are none of a run: left out"
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    for content in STRANGE["summary.json"]:
        (tmp_path / "summary.json").write_bytes(content)
        assert folder.read_summary(notes.append) == {} and not (tmp_path / "summary.json").exists()
    assert all(re.match("summary.json is not as it was written.* summary.json.damaged-", n) for n in notes)
    assert len(list(tmp_path.glob("summary.json.damaged-*"))) == len(notes) == len(STRANGE["summary.json"])
    os.mkfifo(tmp_path / "samples.txt")
    (tmp_path / "report.html").mkdir()
    assert [told.split()[0] for told in folder.make_way()] == ["samples.txt", "report.html"]
    for more in ("", "--- step 2 ---\nb"):
        (tmp_path / "samples.txt").write_text(f"--- step 1 ---\na\n\n{more}")
        folder.drop_later(2, scored=True)
        assert folder.sampled_at == 1
        assert (tmp_path / "samples.txt").read_text() == "--- step 1 ---\na\n\n", "the other is drawn again"


@pytest.mark.slow
@pytest.mark.parametrize("name", STRANGE)
def test_no_file_beside_the_checkpoints_blocks_a_run(trained, tmp_path, capsys, name):
    for number, content in enumerate([*STRANGE[name], None]):
        path = cut_back(trained, tmp_path / str(number), 4)
        if name in ("summary.json", "report.html"):  # where a run has ended
            shutil.copytree(trained, path, dirs_exist_ok=True)
        if content is None:
            (path / name).unlink(missing_ok=True)
            os.mkfifo(path / name)
        elif name == "metrics.jsonl":  # beside whole lines
            (path / name).write_bytes(content + (path / name).read_bytes())
        else:
            (path / name).write_bytes(content)
        capsys.readouterr()
        run(path, "resume=auto", "save_steps=1", "save_total_limit=null")
        said = capsys.readouterr().out
        if content is None:
            assert f"{name} is no file: it is called {name}.damaged-" in said
        elif name == "metrics.jsonl":
            assert "1 lines that are none of a run: left out" in said
        elif name == "summary.json":
            assert "summary.json is not as it was written: it is called summary.json.damaged-" in said
        if name != "metrics.jsonl" or content is not None:
            assert [line["step"] for line in lines(path)] == [line["step"] for line in lines(trained)]
        assert summary(path)["score"] == summary(trained)["score"]
