"""Runs on a mixture: what they train on, how they go on, and how scores are told by source."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from data import load_dataset
from tests.contract.pair import Pair, train_here
from tests.contract.tiny import config, session_of
from tests.data.conftest import prose
from trainer.loop import train
from trainer.run.checkpoint import load_json, load_tensors

CAPITALS = {n: ord("A") + n % 26 for n in range(256)}
OFF = ["val_loss_every=0", "sample_tokens=0"]
SAVED = ["save_steps=1", "save_total_limit=null", *OFF]


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """A function of both weights that gives the words of a mixture: words, and what is all capitals."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "words").mkdir()
    for n in range(120):
        (folder / f"words/{n}.txt").write_bytes(prose(f"words{n}", 5 + n % 9))
    rows = [{"text": prose(f"capitals{n}", 9).decode().translate(CAPITALS)} for n in range(160)]
    (folder / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def words(first="[0.8, 0.1]", second="[0.2, 0.9]"):
        entries = [
            f"{{data: text, input_file: '{folder / 'words'}', val_files: [], weight: {first}, name: words}}",
            f"{{data: jsonl, train_files: '{folder / 'capitals.jsonl'}', weight: {second}, name: capitals}}",
        ]
        return ["data=mix", f"mix=[{','.join(entries)}]", "tokenizer=byte"]

    return words


def run(path, *more):
    train(*config("gpt2", f"output_dir={path}", *more), path)
    return path


def weights(path):
    return load_tensors(path, "model.pt")


def same(left, right):
    return all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.fixture(scope="module")
def whole(mix, tmp_path_factory):
    """Six steps in two stages; every step is kept."""
    return run(tmp_path_factory.mktemp("whole") / "run", *mix(), *SAVED, "scheduler=constant")


def test_stages_are_halves_of_what_is_read(mix):
    """Of a run of 200 steps: the shares of bytes in either half of its steps."""
    s = session_of("gpt2", *mix(), "num_iterations=200")
    shares = []
    for first in (0, 100):
        tokens = s.rows.batch(np.arange(first * 4, (first + 100) * 4)).tokens
        shares.append(np.mean(np.isin(tokens[tokens < 256], list(CAPITALS.values()))))
    assert shares == pytest.approx([0.2, 0.9], abs=0.04)


@pytest.mark.parametrize("at", [1, 4])
def test_resume_is_exact_in_either_stage(whole, mix, tmp_path, at, capsys):
    options = [*mix(), *SAVED, "scheduler=constant"]
    run(tmp_path / "again", *options, f"resume={whole / f'checkpoint-{at}'}")
    assert same(weights(whole / "final_model"), weights(tmp_path / "again/final_model"))
    assert "stages of the mixture" not in capsys.readouterr().out
    state = load_json(whole / "checkpoint-4", "training_state.json")
    assert state["mix"]["stage_ends"] == [pytest.approx(6 * 4 * 32 / 2, rel=0.02)]
    before = load_json(whole / "checkpoint-2", "training_state.json")
    assert before["progress"]["bytes"] < state["mix"]["stage_ends"][0] < state["progress"]["bytes"]


def test_a_prolonged_run_keeps_its_stages_and_says_so(whole, mix, tmp_path, capsys):
    options = [*mix(), *SAVED, "scheduler=constant", "num_iterations=9"]
    long, other = tmp_path / "long", tmp_path / "other"
    run(long, *options, f"resume={whole / 'checkpoint-2'}")
    said = capsys.readouterr().out
    ends = load_json(whole / "checkpoint-2", "training_state.json")["mix"]["stage_ends"]
    assert f"the stages of the mixture end after {ends[0]:,.0f} bytes, as when the run began" in said
    assert load_json(long / "checkpoint-9", "training_state.json")["mix"]["stage_ends"] == ends
    assert same(weights(whole / "checkpoint-6"), weights(long / "checkpoint-6"))
    run(other, *options)
    assert not same(weights(long / "checkpoint-9"), weights(other / "checkpoint-9"))


def test_a_prolonged_run_of_one_stage_is_the_run_that_was_long_from_the_start(mix, tmp_path):
    options = [*mix("0.8", "0.2"), *SAVED, "scheduler=constant"]
    run(tmp_path / "short", *options)
    run(tmp_path / "short", *options, "num_iterations=9", "resume=auto")
    run(tmp_path / "long", *options, "num_iterations=9")
    assert same(weights(tmp_path / "short/final_model"), weights(tmp_path / "long/final_model"))


def test_other_weights_are_other_data(whole, mix, tmp_path):
    with pytest.raises(
        ValueError, match="the data is not what .* Leave its mix .* as its config.yaml has it"
    ):
        run(tmp_path / "other", *mix("0.5", "0.5"), *OFF, f"resume={whole / 'checkpoint-4'}")


def test_a_renamed_source_goes_on(whole, mix, tmp_path, capsys):
    words = [word.replace("name: capitals", "name: large") for word in mix()]
    run(tmp_path / "again", *words, *OFF, "scheduler=constant", f"resume={whole / 'checkpoint-4'}")
    assert "other names than before" in capsys.readouterr().out
    assert same(weights(whole / "final_model"), weights(tmp_path / "again/final_model"))


def test_scores_by_source_add_up_and_are_told_everywhere(mix, tmp_path, capsys, command):
    out = run(tmp_path / "run", *mix(), "val_bytes=null", "val_loss_every=3", "num_iterations=6")
    said = capsys.readouterr().out
    score = json.loads((out / "summary.json").read_text())["score"]
    sources = score["sources"]
    assert list(sources) == ["words", "capitals"]
    for count in ("bytes", "documents"):
        assert sum(one[count] for one in sources.values()) == score[count]
    bits = sum(one["bits_per_byte"] * one["bytes"] for one in sources.values())
    assert bits == pytest.approx(score["bits_per_byte"] * score["bytes"], rel=1e-9)
    assert sources["words"]["bits_per_byte"] != pytest.approx(sources["capitals"]["bits_per_byte"], rel=0.01)
    dataset = load_dataset(config("gpt2", *mix())[0])
    ends = np.cumsum([0, *dataset.mixture.heldout])
    sizes = [int(dataset.heldout.doc_bytes[a:b].sum()) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    assert [one["bytes"] for one in sources.values()] == sizes
    words, capitals = (f"{one['bits_per_byte']:.3f}" for one in sources.values())
    assert (
        f"step 6  held out {score['bits_per_byte']:.3f} bits/byte (words {words}, capitals {capitals})"
        in said
    )
    assert f"by source: words {words}, capitals {capitals}" in said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scored = [line["val_sources"] for line in lines if "val_sources" in line]
    assert len(scored) == 2 and scored[-1] == sources
    told = f"of capitals: {capitals} bits per byte, {sources['capitals']['documents']} documents"
    assert told in (out / "report.html").read_text()
    printed, aside = command("eval", "--checkpoint", out, "--device", "cpu")
    again = json.loads(printed)["score"]["sources"]
    assert again["words"]["bytes"] == sizes[0]
    assert again["capitals"]["bits_per_byte"] == pytest.approx(sources["capitals"]["bits_per_byte"], rel=1e-6)
    assert "of words" in aside and f"{capitals} bits per byte" in aside


def test_a_source_of_which_nothing_is_scored_is_said(mix, tmp_path, capsys):
    out = run(tmp_path, *mix(), "val_bytes=100", "num_iterations=1", *OFF)
    sources = json.loads((out / "summary.json").read_text())["score"]["sources"]
    without = [name for name, one in sources.items() if one["bits_per_byte"] is None]
    assert len(without) == 1 and sources[without[0]]["documents"] == 0
    assert f"{without[0]} none scored" in capsys.readouterr().out
    assert f"of {without[0]}: no document scored" in (out / "report.html").read_text()


@pytest.mark.parametrize("architecture", ["megabyte", "hnet", "mdl"])
def test_any_unit_trains_on_it(mix, tmp_path, architecture):
    cfg, model_cfg = config(architecture, *mix(), "num_iterations=2", "val_loss_every=0", "sample_tokens=0")
    assert math.isfinite(train(cfg, model_cfg, tmp_path))
    assert len(json.loads((tmp_path / "summary.json").read_text())["score"]["sources"]) == 2


def test_passes_over_the_text_are_counted_in_bytes(mix):
    s = session_of("gpt2", *mix(), "num_epochs=1.5")
    total = s.dataset.train.total_bytes
    assert s.rows.stage_ends == (round(0.75 * total),)
    read = s.rows.batch(np.arange(s.total_steps * 4)).bytes
    assert read == pytest.approx(1.5 * total, rel=0.02)


def test_a_run_that_is_cut_to_its_time_has_its_stages_then(mix):
    s = session_of("gpt2", *mix(), "num_iterations=100")
    ends = s.rows.stage_ends
    s.last(50)
    assert s.rows.stage_ends == (pytest.approx(ends[0] / 2, abs=1),)


@pytest.mark.slow
def test_two_processes_equal_one(mix, tmp_path):
    words = [
        *mix(),
        "global_batch_size=4",
        "batch_size=1",
        "num_iterations=6",
        "optimizer=sgd",  # others would magnify rounding
        "learning_rate=0.1",
        "model_cfg.dropout=0.0",
        "val_loss_every=0",
        "val_bytes=null",
    ]
    _, alone = train_here("gpt2", words, tmp_path / "one")
    with Pair() as pair:
        (_, first), (_, second) = pair.ask(train_here, "gpt2", words, tmp_path / "two")
    for name, value in alone.items():
        np.testing.assert_allclose(first[name], value, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(first[name], second[name])
    one, two = (json.loads((tmp_path / n / "summary.json").read_text())["score"] for n in ("one", "two"))
    for name, found in one["sources"].items():
        assert two["sources"][name] == pytest.approx(found, rel=1e-4)
