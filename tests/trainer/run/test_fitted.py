"""Buffers that are no weights, in a run that begins with the weights of another."""

import torch

from tests.contract.tiny import config, session_of
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.facts import checkpoint_contents
from trainer.run.fitted import with_own_fits
from trainer.run.progress import Progress
from trainer.run.source import Checkpoint

UNIFORM = ["model_cfg.transition_type=uniform", "model_cfg.noise_schedule=mutual_info"]


def taken(source, target, folder):
    """What `target` would load of `source`, both sessions, and what is said of it."""
    _, texts = checkpoint_contents(source, Progress(), {})
    for name, text in texts.items():
        (folder / name).write_text(text)
    notes: list[str] = []
    state = with_own_fits(target, Checkpoint(folder), source.adapter.trained_state(), notes.append)
    assert set(state) == set(target.adapter.trained_state())
    weights = dict(target.adapter.named_model_parameters())
    assert all(torch.equal(state[name], source.adapter.trained_state()[name]) for name in weights)
    return state, notes


def test_blocks_take_no_range_from_other_blocks_and_hand_none_on(tmp_path):
    old, new, masked = (
        session_of("bd3lm"),
        session_of("bd3lm", "model_cfg.block_length=16"),
        session_of("mdl"),
    )
    old.adapter.model.clip_plan.copy_(torch.tensor([2, 12, 9, 19, 5]))
    for source in (old, masked):
        state, notes = taken(source, new, tmp_path)
        assert state["clip_plan"].tolist() == [-1, -1, -1, -1, 0]
        assert notes == ["clip_plan starts anew: it is fitted to a run"]
    state, notes = taken(old, masked, tmp_path)
    assert "clip_plan" not in state and notes == []


def test_frequencies_come_with_the_weights_to_the_same_text_alone(tmp_path):
    source = session_of("d3pm", *UNIFORM)
    source.adapter.model.unigram.copy_(torch.arange(1.0, 258) / sum(range(1, 258)))
    theirs = source.adapter.model.unigram
    same, other = session_of("d3pm", *UNIFORM), session_of("d3pm", *UNIFORM, "synthetic_symbols=20")
    own = other.adapter.model.unigram.clone()
    state, notes = taken(source, same, tmp_path)
    assert torch.equal(state["unigram"], theirs) and notes == ["unigram comes with the weights"]
    state, notes = taken(source, other, tmp_path)
    assert torch.equal(state["unigram"], own) and notes == ["unigram is fitted anew, to the text of this run"]
    other.cfg = other.cfg.model_copy(update={"eval_only": True})  # a score is that of what was trained
    assert torch.equal(taken(source, other, tmp_path)[0]["unigram"], theirs)
    without = session_of("d3pm", UNIFORM[0], "model_cfg.noise_schedule=cosine")
    assert "unigram" not in taken(source, without, tmp_path)[0]
    assert torch.equal(taken(without, same, tmp_path)[0]["unigram"], same.adapter.model.unigram)


def test_a_text_that_nothing_is_known_of_is_another(tmp_path):
    source, target = session_of("d3pm", *UNIFORM), session_of("d3pm", *UNIFORM)
    taken(source, target, tmp_path)
    unknown = Checkpoint(tmp_path)
    unknown.data = None
    notes: list[str] = []
    with_own_fits(target, unknown, source.adapter.trained_state(), notes.append)
    assert notes == ["unigram is fitted anew, to the text of this run"]


def test_a_schedule_follows_the_frequencies_that_weights_bring():
    adapter = session_of("d3pm", *UNIFORM).adapter
    before = adapter.process.chain.alpha_bar
    flat = torch.full_like(adapter.model.unigram, 1 / len(adapter.model.unigram))
    adapter.model.load_state_dict({**adapter.model.state_dict(), "unigram": flat})
    assert not torch.equal(adapter.process.chain.alpha_bar, before)


def test_block_diffusion_begins_with_a_run_of_masked_diffusion(tmp_path, capsys):
    """The recipe of its paper."""
    short = ["num_iterations=1", "val_loss_every=0", "val_bytes=64", "sample_tokens=0"]
    still = ["learning_rate=1e-30", "muon_learning_rate=1e-30"]
    train(*config("mdl", *short), tmp_path / "mdl")
    train(*config("bd3lm", *short, *still, f"init_from_checkpoint={tmp_path / 'mdl'}"), tmp_path / "blocks")
    given, found = (load_tensors(tmp_path / run / "final_model", "model.pt") for run in ("mdl", "blocks"))
    assert all(torch.allclose(found[name], value, atol=1e-20) for name, value in given.items())
    assert "clip_plan starts anew" in capsys.readouterr().out
