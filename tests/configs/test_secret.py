"""Secrets: they reach the environment of a run, and neither Hydra nor a file."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from configs.compose import prepare, tree_of
from configs.messages import REDACTED, is_secret
from tests.configs.formats.composed import refused


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((n, True) for n in ("MY_PASS", "API_KEY", "hf_token", "X_SECRET", "BASIC_AUTH", "AWS_CREDENTIALS")),
        ("DATABASE_URL", True),
        *((n, False) for n in ("TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "HOME", "WANDB_MODE")),
    ],
)
def test_names_say_what_is_secret(name, secret):
    assert is_secret(name) == secret


@pytest.fixture
def variables(monkeypatch):
    monkeypatch.setenv("LOGIN", "from the shell")
    monkeypatch.setenv("MY_PASS", "hunter2")


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("API_KEY", "${oc.env:LOGIN}", "from the shell"),  # by its own name
        ("PLAIN", "a-${oc.env:MY_PASS}", "a-hunter2"),  # by what it is made of
        ("API_KEY", "${oc.env:NOT_THERE,other}", "other"),
    ],
)
def test_a_secret_may_be_a_variables_value(work, write, variables, name, given, value):
    write("s.yaml", f"defaults: [mine, _self_]\nenv: {{{name}: '{given}'}}\n")
    for plan in (prepare(["s.yaml"]), prepare(["mine.yaml", f"env.{name}='{given}'"])):
        assert plan.secrets == {name: value}
        assert tree_of(plan)["env"] == {name: REDACTED}


def test_a_variable_that_is_not_there_is_told(work, write):
    write("s.yaml", "defaults: [mine, _self_]\nenv: {API_KEY: '${oc.env:NOT_THERE}'}\n")
    (problem,) = refused("s.yaml")
    assert problem.startswith("env.API_KEY: '${oc.env:NOT_THERE}' cannot be read: ")


@pytest.mark.parametrize("text", ["${oc.env:MY_PASS}", "a ${oc.env:${tokenizer}}"])
def test_no_other_field_takes_a_secret(work, write, variables, text):
    write("s.yaml", f"defaults: [mine, _self_]\ntokenizer: MY_PASS\nsample_prompt: '{text}'\n")
    (problem,) = refused("s.yaml")
    assert "sample_prompt: the value of MY_PASS, a secret by its name" in problem and "hunter2" not in problem
    assert OmegaConf.create({"a": "${oc.env:MY_PASS}"}).a == "hunter2"  # as it was before


def test_any_other_is_taken(work, write, variables):
    write("s.yaml", "defaults: [mine, _self_]\nsample_prompt: '${oc.env:LOGIN}'\n")
    assert tree_of(prepare(["s.yaml"]))["sample_prompt"] == "from the shell"
