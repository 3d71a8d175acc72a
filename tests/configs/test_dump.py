"""`--cfg job`: what it prints is a file that composes to the same run."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from configs import compose
from configs.compose import prepare
from configs.dump import job_text
from configs.messages import ConfigError
from models import ARCHITECTURES


def quiet(*words: str):
    return compose(list(words), notify=lambda text: None)


@pytest.mark.parametrize(
    "words",
    [
        *([f"model={type_}"] for type_ in ARCHITECTURES),
        ["model=gpt2", "preset=tiny", "model_cfg.n_layers=7", "optimizer=sgd"],
        ["mine.yaml", "preset=tiny", "env={FOO: 1}", "kernels=reference", "sample_prompt=a: b #c"],
        ["headless.yaml", "preset=nano"],
    ],
)
def test_the_text_runs_as_a_file(write, words):
    write("headless.yaml", "defaults: [training, _self_]\ntype: 'fake_arch:Headless'\n")
    text = job_text(prepare([*words, "--cfg", "job"]))
    write("dumped.yaml", "").write_text(text)
    assert text.startswith("defaults:\n- training\n- _self_\n")
    assert quiet("dumped.yaml") == quiet(*words)


def test_only_fields_of_the_type_are_shown(work):
    text = job_text(prepare(["model=vanilla", "preset=nano", "+model_cfg.nope=1", "--cfg", "job"]))
    stated = OmegaConf.create(text).model_cfg
    assert "nope" not in stated and stated.d_model == 192


def test_interpolations_stay_unless_they_are_to_be_resolved(write):
    write("x.yaml", "defaults: [mine, _self_]\nval_seq_len: ${train_seq_len}\n")
    assert "val_seq_len: ${train_seq_len}" in job_text(prepare(["x.yaml", "--cfg", "job"]))
    assert "val_seq_len: 1024" in job_text(prepare(["x.yaml", "--cfg", "job", "--resolve"]))


def test_a_part_is_shown_as_a_part(work):
    part = job_text(prepare(["mine.yaml", "--cfg", "job", "--package", "model_cfg"]))
    assert part.startswith("# @package model_cfg\n") and "defaults" not in part
    assert job_text(prepare(["mine.yaml", "--cfg", "job", "-p", "learning_rate"])) == "0.001\n"
    with pytest.raises(ConfigError, match="--package: no 'model_cg' here. Did you mean 'model_cfg'"):
        job_text(prepare(["mine.yaml", "--cfg", "job", "-p", "model_cg"]))
