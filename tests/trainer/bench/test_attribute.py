"""From one configuration to another, field by field. Runs are made up (board.py)."""

import json
import re
import sys

import pytest

import mytrainer
from tests.trainer.bench.board import leave
from trainer.commands import launch
from trainer.commands.launch import JobFailed
from trainer.errors import TrainingError

SIZES = [
    "preset=none",
    "model_cfg.d_model=64",
    "model_cfg.n_layers=2",
    "model_cfg.n_ctx=64",
    "train_seq_len=64",
]
BASE = "gpt2 model_cfg.n_heads=4"
OTHER = "gpt2 model_cfg.d_model=66 model_cfg.n_heads=6 weight_decay=0.2 z_loss=0.01"


class Trainer:
    """A score in which weight decay and the z loss help each other, and width by itself."""

    def __init__(self, fails=lambda cfg: False):
        self.configs, self.fails = [], fails

    def __call__(self, cfg, model_cfg, folder, *, isolated, origin, said):
        self.configs.append(cfg)
        if self.fails(cfg):
            raise JobFailed(1, TrainingError("no memory"))
        decay, z = cfg.weight_decay == 0.2, cfg.z_loss > 0
        own = 1e-4 * ((len(self.configs) * 7) % 5)
        score = 2.0 + cfg.seed - 0.1 * (cfg.model_cfg["d_model"] == 66) - 0.2 * decay * z + 0.05 * z + own
        leave(folder, score)
        return score


@pytest.fixture
def attribute(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(trainer, *words):
        monkeypatch.setattr(launch, "start", trainer)
        capsys.readouterr()
        status = mytrainer.main(["attribute", *words, "--output", "path"])
        told = capsys.readouterr()
        path = tmp_path / "path/attribution.json"
        return (
            status,
            re.sub(r"\s+", " ", told.out + told.err),
            json.loads(path.read_text()) if path.exists() else None,
        )

    return run


def test_each_step_has_its_share_and_interactions_are_named(attribute, tmp_path):
    trainer = Trainer()
    status, told, found = attribute(trainer, BASE, OTHER, *SIZES)
    assert status == 0
    steps = {tuple(step["fields"]): step for step in found["steps"]}
    width, decay, z = ("model_cfg.d_model", "model_cfg.n_heads"), ("weight_decay",), ("z_loss",)
    assert set(steps) == {width, decay, z}  # width and heads are refused without each other
    assert len(trainer.configs) == 3 * 2 * 3
    near = {"abs": 0.002}
    assert steps[width]["forward"]["mean"] == pytest.approx(-0.1, **near)
    assert steps[width]["backward"]["mean"] == pytest.approx(-0.1, **near)
    assert not steps[width]["told_apart"]["interaction"] and steps[width]["told_apart"]["forward"]
    assert steps[decay]["forward"]["mean"] == pytest.approx(0, **near)  # before the z loss is there
    assert steps[decay]["backward"]["mean"] == pytest.approx(-0.2, **near)
    assert steps[decay]["interaction"]["mean"] == pytest.approx(-0.2, **near)
    assert steps[z]["interaction"]["mean"] == pytest.approx(0.2, **near)
    assert steps[decay]["told_apart"]["interaction"]
    assert found["whole"]["mean"] == pytest.approx(-0.25, **near)
    for order in ("forward", "backward"):
        total = sum(step[order]["mean"] for step in found["steps"])
        assert total == pytest.approx(found["whole"]["mean"], abs=1e-9)
    assert re.search(
        r"Interaction: weight_decay makes [+-]0\.00\d+ on top of .*, and -0\.\d+ on top of", told
    )
    assert "refused without each other" in told and "3 steps from A to B, 6 configurations" in told
    assert "| weight_decay 0.1 -> 0.2 |" in (tmp_path / "path/attribution.md").read_text()


def test_it_goes_on_and_what_fails_is_named(attribute):
    one = [f"{BASE}", f"{BASE} weight_decay=0.2 z_loss=0.01", *SIZES, "--seeds", "2"]
    status, told, found = attribute(Trainer(lambda cfg: cfg.seed == 2 and cfg.z_loss > 0), *one)
    assert status == 1 and "A+2, seed 2: no memory" in told
    assert found["steps"][0]["interaction"]["low"] is None  # of one seed
    again = Trainer()
    status, told, found = attribute(again, *one)
    assert status == 0 and len(again.configs) == 2 and found["steps"][0]["interaction"]["low"] is not None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([BASE, BASE], "are the same run"),
        ([BASE, f"{BASE} logging_steps=3"], "are the same run"),
        ([BASE, "vanilla model_cfg.n_heads=4"], "of different types, gpt2 and vanilla"),
        ([BASE], "two configurations are compared, and 1 are given"),
        ([BASE, "gpt2 weight_decay=x"], r"B \(gpt2 weight_decay=x\): .*weight_decay"),
        ([BASE, OTHER, "--seeds", "1"], "--seeds: must be at least 2, got 1"),
        ([BASE, "gpt2 'model_cfg.bias=false"], "No closing quotation"),
        ([BASE, f"{OTHER} seed=3"], "seed: this command decides it"),
    ],
)
def test_mistakes_are_told_before_anything_starts(attribute, tmp_path, words, told):
    trainer = Trainer()
    status, said, _ = attribute(trainer, *words, *SIZES)
    assert status == 2 and re.search(told, said), said
    assert not trainer.configs and not (tmp_path / "path").exists()
