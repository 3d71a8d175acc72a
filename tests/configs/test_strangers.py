"""Files of somebody else's runs, and YAML of every day that is wrong: one message, and nothing is obeyed."""

from __future__ import annotations

import json
import re

import pytest

from configs.compose import compose, prepare, tree_of
from configs.strangers import resolver
from tests.configs.formats.composed import refused

MINE = "defaults: [training, _self_]\ntype: gpt2\n"


@pytest.fixture
def run(work, write):
    """A function that writes a run folder whose config.yaml ends in these lines."""

    def make(more: str = "", folder: str = "run") -> str:
        write(f"{folder}/config.yaml", f"{MINE}model_cfg: {{n_ctx: 32}}\ntrain_seq_len: 32\n{more}")
        write(
            f"{folder}/checkpoint-1/config.json", json.dumps({"format": 1, "type": "gpt2", "model_cfg": {}})
        )
        return folder

    return make


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample_prompt: '${HOME'", r"f.yaml:3: '\$\{HOME' cannot be read"),
        ("env: A=1", r"f.yaml:3: env: expected mapping, got 'A=1' \(str\)"),
        ("output_dir: 20261126", r"f.yaml:3: output_dir: expected text, got 20261126 .*'20261126'"),
        ("resume: 5", r"f.yaml:3: resume: expected text, got 5 \(int\)"),
        ("preset: {}", r"f.yaml:3: preset: expected one value, got \{\} \(dict\)"),
        ("data: [text]", r"f.yaml:3: data: expected one value"),
        ("model_cfg: 5", r"f.yaml:3: model_cfg: expected mapping"),
        ("model_cfg: '${type}'", r"model_cfg: expected mapping"),
        ("model_cfg: '\\${type}'", r"f.yaml:3: model_cfg: expected mapping, got '\$"),
        ("env: {'': x}", r"env: '': the name of a variable is not empty"),
        ('env: {A: "\\0"}', r"env: 'A': .* neither has a NUL"),
        ("output_dir: ~nosuchuser/x", r"no home folder for '~nosuchuser'"),
    ],
)
def test_a_file_that_is_wrong_has_one_message(work, write, line, message):
    write("f.yaml", f"{MINE}{line}\n")
    (problem,) = refused("f.yaml")
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["type=:b"], "':b': expected package.module:Name"),
        (["~nosuchuser"], "unknown key 'nosuchuser'"),
        (["seed=range(1,3,0)", "-m"], r"seed: range\(1,3,0\) has no end of values.*step that is not 0"),
        (["seed=range(1,1e9)", "-m"], r"seed: range\(1,1e9\) has about 1e\+09 values; 1,000,000 at most"),
        (["learning_rate=range(0,inf)", "-m"], "has no end of values"),
        ([f"seed={'9' * 5000}"], "too many digits"),
        (["hydra.sweep.dir=a{", "-m"], "hydra.sweep.dir: cannot read the value"),
    ],
)
def test_a_command_line_that_is_wrong_has_one_message(command, words, message):
    _, err = command("model=gpt2", *words, status=2)
    assert err.count("config error: ") == 1
    assert re.search(message, err)


@pytest.mark.parametrize("entry", ["evil@hydra.job", "{sub@hydra: evil}"])
def test_settings_of_hydra_reach_it_by_no_file(work, write, entry):
    for name in ("evil.yaml", "sub/evil.yaml"):
        write(name, "callbacks: {x: {_target_: os.system}}\n")
    write("f.yaml", f"defaults: [training, {entry}, _self_]\ntype: gpt2\n")
    (problem,) = refused("f.yaml")
    assert "hydra" in problem and "command line" in problem


def test_a_runs_file_cannot_set_hydra(run):
    (problem,) = refused(f"resume={run('hydra: {callbacks: {x: {_target_: os.system}}}')}")
    assert problem.startswith("run/config.yaml:5: settings of Hydra cannot stand in a model file")


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${oc.env:NO,x}", "${hydra:runtime.cwd}", "${now:%Y}"])
def test_a_runs_file_looks_nowhere_else(run, write, text):
    folder = run(f"sample_prompt: '{text}'")
    (problem,) = refused(f"resume={folder}")
    assert problem.startswith("run/config.yaml:5: sample_prompt: ${") and "no file of a run may" in problem
    write(f"{folder}/manifest.json", "{}")  # known by it whatever the file is called
    own = write(f"{folder}/mine.yaml", f"{MINE}sample_prompt: '{text}'\n")
    (problem,) = refused(f"--hydra_model_cfg={own}")
    assert "no file of a run may" in problem


def test_a_file_of_ones_own_may(work, write, monkeypatch):
    monkeypatch.setenv("WHERE", "there")
    write("f.yaml", f"{MINE}sample_prompt: ${{oc.env:WHERE}}\n")
    cfg, _ = compose(["f.yaml"], notify=lambda text: None)
    assert cfg.sample_prompt == "there"


def test_what_a_runs_file_sets_in_the_environment_is_told_and_not_set(run):
    folder = run("env: {HTTPS_PROXY: /tmp/x, OMP_NUM_THREADS: '3', API_KEY: <redacted>}")
    plan = prepare([f"resume={folder}"])
    assert tree_of(plan)["env"] == {"OMP_NUM_THREADS": "3", "API_KEY": "<redacted>"}
    assert [n for n in plan.notices if "env.HTTPS_PROXY='/tmp/x' comes with a run and is not set" in n]
    plan = prepare([f"resume={folder}", "env.HTTPS_PROXY=/tmp/y"])
    assert tree_of(plan)["env"]["HTTPS_PROXY"] == "/tmp/y"


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD",
        "GIT_CONFIG_GLOBAL",
        "HF_DATASETS_TRUST_REMOTE_CODE",
        "HOME",  # modules of its user
        "PYTHONPYCACHEPREFIX",  # compiled modules
        "TORCHINDUCTOR_CACHE_DIR",
        "OMP_TOOL_LIBRARIES",
        "MYTRAINER_CACHE",  # compiled kernels
    ],
)
def test_what_loads_code_is_refused_in_every_file(run, work, write, name):
    write("f.yaml", f"{MINE}env: {{{name}: x}}\n")
    for words in ([f"resume={run(f'env: {{{name}: x}}')}"], ["f.yaml"]):
        (problem,) = refused(*words)
        assert f"env.{name} changes what programs load" in problem


@pytest.mark.parametrize("wrong", [{"type": 5}, {"model_cfg": "x"}, {"preset": []}, {"train_seq_len": "a"}])
def test_a_damaged_record_of_a_run_is_named(run, write, wrong):
    record = {"format": 1, "type": "gpt2", "model_cfg": {}} | wrong
    write(f"{run()}/checkpoint-1/config.json", json.dumps(record))
    (problem,) = refused("resume=run")
    assert problem.startswith(
        "run/checkpoint-1/config.json is not as this trainer writes it: " + next(iter(wrong))
    )


def test_the_function_that_a_text_calls():
    calls = {
        "${a}": None,
        "${oc.env:A}": "oc.env",
        "x${b}${ now:%Y}": "now",
        "${a.${oc.env:X}}": "oc.env",
        "\\${oc.env:A}": None,
        "${oc.env": None,
    }
    assert {text: resolver(text) for text in calls} == calls
