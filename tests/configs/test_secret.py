"""Secrets: they reach the environment of a run, and neither Hydra nor a file."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from configs import concealed
from configs.compose import prepare, tree_of
from configs.concealed import conceal
from configs.messages import REDACTED, is_secret
from configs.schema import RunConfig, redacted
from tests.configs.formats.composed import quiet, refused


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
    monkeypatch.setattr(concealed, "_values", {})
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


@pytest.mark.parametrize(
    "text", ["${oc.env:MY_PASS}", "a ${oc.env:MY_PASS}", "${oc.env:${tokenizer}}", "${text_field}"]
)
def test_a_field_that_takes_a_secret_is_stored_without_it(work, write, variables, text):
    """Directly, within a text, by a name that another field says, or from another field."""
    others = "tokenizer: MY_PASS\ntext_field: '${oc.env:MY_PASS}'\n"
    write("s.yaml", f"defaults: [mine, _self_]\n{others}sample_prompt: '{text}'\n")
    prompt = tree_of(prepare(["s.yaml"]))["sample_prompt"]
    assert prompt == text.partition("$")[0] + "hunter2"
    saved = redacted(RunConfig.model_validate({"type": "gpt2", "sample_prompt": prompt, "seed": 7}))
    assert saved["sample_prompt"] == REDACTED and saved["seed"] == 7
    assert conceal("the hunter2 of hunter") == "the <redacted> of hunter"
    assert OmegaConf.create({"a": "${oc.env:MY_PASS}"}).a == "hunter2"  # as it was before


def test_what_was_redacted_is_asked_for(work, write, variables):
    write("s.yaml", f"defaults: [mine, _self_]\nsample_prompt: '{REDACTED}'\n")
    (problem,) = refused("s.yaml")
    assert (
        "s.yaml:2: sample_prompt is <redacted>" in problem and "sample_prompt='${oc.env:<NAME>}'" in problem
    )
    assert quiet("s.yaml", "sample_prompt='${oc.env:MY_PASS}'")[0].sample_prompt == "hunter2"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed: ${oc.env:PIN_KEY}", "it cannot be left out of the run's files"),
        ("model_cfg: {tag: '${oc.env:MY_PASS}'}", "it cannot be left out of the run's files"),
        ("output_dir: '${oc.env:MY_PASS}'", "it cannot be left out of the run's files"),
        ("optimizer: '${oc.env:MY_PASS}'", "it cannot be left out of the run's files"),
        ("sample_prompt: '${oc.env:SHORT_KEY}'", "it has less than 6 characters"),
    ],
)
def test_a_secret_that_would_show_is_refused(work, write, variables, monkeypatch, text, why):
    monkeypatch.setenv("PIN_KEY", "1234567")
    monkeypatch.setenv("SHORT_KEY", "abc")
    write("s.yaml", f"defaults: [mine, _self_]\n{text}\n")
    (problem,) = refused("s.yaml")
    assert why in problem and text.partition(":")[0] in problem
    assert not any(value in problem for value in ("1234567", "hunter2", "'abc'"))


def test_any_other_is_taken(work, write, variables):
    write("s.yaml", "defaults: [mine, _self_]\nsample_prompt: '${oc.env:LOGIN}'\n")
    assert tree_of(prepare(["s.yaml"]))["sample_prompt"] == "from the shell"
