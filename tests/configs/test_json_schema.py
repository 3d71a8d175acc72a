"""What editors are told of our YAML files says what a run says of them."""

from __future__ import annotations

import json

import jsonschema
import pytest

from configs import json_schema
from configs.files import CONFIGS, description
from configs.formats import yaml_text
from trainer.commands.schema import main


@pytest.fixture(scope="module")
def stored():
    return json_schema.FILE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def check(stored):
    validator = jsonschema.Draft7Validator(json.loads(stored))
    return lambda text: [error.message for error in validator.iter_errors(yaml_text.parse(text)[0])]


def test_the_stored_one_is_that_of_the_classes(stored):
    assert stored == json_schema.text(), "python mytrainer.py schema writes it anew"
    jsonschema.Draft7Validator.check_schema(json.loads(stored))


def test_the_command_writes_it_where_one_says(tmp_path, stored, capsys):
    out = tmp_path / "my.schema"
    assert main([str(out)]) == 0
    assert out.read_text(encoding="utf-8") == stored
    assert f"# yaml-language-server: $schema={out}" in capsys.readouterr().out


def test_every_file_of_ours_names_it_and_keeps_to_it(check):
    files = json_schema.shipped()
    for path in files:
        text = path.read_text(encoding="utf-8")
        first = [line for line in text.splitlines()[:2] if "@package" not in line][0]
        assert first == json_schema.header(path), path
        assert (path.parent / first.partition("=")[2]).resolve() == json_schema.FILE
        assert check(text) == [], path
        assert "yaml-language-server" not in description(path)
    assert {CONFIGS / "gpt2.yaml", CONFIGS / "training.yaml"} < set(files)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [training, _self_]\nmodel_cfg: {n_layers: 6, d_model: 384, n_heads: 6}\nlearning_rate: 1\n",
        "defaults: [gpt2, {preset: tiny}, _self_]\nmodel_cfg: {n_layers: 6, dropout: 0, block_size: 64}\n",
        "type: mamba2\nmodel_cfg:\n  d_state: ${seed}\n  version: ???\n",
        "type: my_pkg.my_mod:MyModel\nmodel_cfg: {anything: 1}\n",
        "seed: ${oc.env:SEED}\nresume: null\nuse_wandb: true\nkernels: reference\nenv: {A: 1}\n",
        "global_batch_size: null\n",
        "type: gpt2\nmodel_cfg: null\nseq_len: 64\n",
        "type: d3pm\nmodel_cfg: {noise_schedule: null}\n",
    ],
)
def test_what_a_run_takes_passes(check, text):
    assert check(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "num_iteration: 3",
        "num_iterations: '3'",
        "num_iterations: 010",
        "seed: 12:30",
        "packing: on",
        "seed: null",
        "optimizer: adamm",
        "preset: huge",
        "learning_rate: 0",
        "learning_rate: [1]",
        "type: gtp2",
        "defaults: gpt2",
        "type: gpt2\nmodel_cfg: {n_layer: 3}",
        "type: gpt2\nmodel_cfg: {n_layers: '3'}",
        "type: gpt2\nmodel_cfg: {n_layers: null}",
        "type: gpt2\nmodel_cfg: {num_experts: 8}",  # another type's
        "defaults: [gpt2, _self_]\nmodel_cfg: {num_experts: 8}",
        "defaults: [gpt2.yaml]\nmodel_cfg: {dropout: 1.5}",
        "type: bd3lm\nmodel_cfg: {block_size: 8}",
        "kernels: 3",
        "env: {A: [1]}",
    ],
)
def test_what_a_run_refuses_fails(check, text):
    assert check(text) != []
