"""Code that a file of a run names is not imported unasked."""

from __future__ import annotations

import json
import os
import sys

import pytest

from configs import trust
from configs.compose import check, compose, prepare, tree_of
from configs.messages import ConfigError
from configs.sweeps import recorded_words
from tests.configs.formats.composed import refused

TYPE, ADAPTER = "type: 'evil:Model'\n", "type: gpt2\nmodel_adapter: 'evil:Model'\n"
EVIL = """
import pathlib
from configs.schema import DefaultModelConfig
pathlib.Path(__file__).with_name("executed").touch()
class Model:
    class Config(DefaultModelConfig):
        pass
"""


@pytest.fixture
def run(work, write, monkeypatch):
    """A function that writes a run folder with a module, in which one is, and what this module did there."""

    def make(config: str, saved: str = "gpt2", adapter: str | None = None, config_name: str = "config.yaml"):
        write("run/evil.py", EVIL)
        write("run/manifest.json", "{}")
        write(f"run/{config_name}", f"defaults: [training, _self_]\n{config}")
        record = {"format": 1, "type": saved, "model_cfg": {}, "model_adapter": adapter}
        write("run/checkpoint-1/config.json", json.dumps(record))
        monkeypatch.syspath_prepend(work / "run")
        return work / "run" / "executed"

    yield make
    sys.modules.pop("evil", None)


def told(problem: str) -> bool:
    """Whether it says which module, where, and what to do."""
    parts = ("evil:Model", "module evil", "run", "less ", "evil.py", "trust=evil", "--trust evil", "load(")
    return all(part in problem for part in parts)


@pytest.mark.parametrize("config", [TYPE, ADAPTER])
@pytest.mark.parametrize("words", [["resume=run"], ["--hydra_model_cfg=run/config.yaml"]])
def test_what_a_runs_configuration_names_is_not_imported(run, config, words):
    executed = run(config)
    (problem,) = refused(*words)
    assert told(problem) and problem.startswith("run/config.yaml: ")
    assert not executed.exists()


def test_a_file_of_a_run_is_one_whatever_it_is_called(run, work, write):
    executed = run(TYPE, config_name="model.yaml")
    assert told(*refused("--hydra_model_cfg=run/model.yaml"))
    write("mine.yaml", "defaults: [run/model, _self_]\n")
    assert told(*refused("mine.yaml")), "what a file of one's own builds on is a run's all the same"
    assert not executed.exists()


@pytest.mark.parametrize(("saved", "adapter"), [("evil:Model", None), ("gpt2", "evil:Model")])
def test_what_a_checkpoint_names_is_not_imported(run, saved, adapter):
    executed = run("type: gpt2\n", saved, adapter)
    for words in (["resume=run"], ["model=gpt2", "resume=run/checkpoint-1"]):
        (problem,) = refused(*words)
        assert told(problem) and "checkpoint-1/config.json: " in problem
    assert not executed.exists()


def test_showing_a_job_imports_nothing_of_a_run(run, command):
    executed = run(TYPE)
    _, err = command("--cfg", "job", "resume=run", status=2)
    assert told(err) and not executed.exists()


def test_what_a_reference_comes_to_counts(run):
    executed = run("type: '${sample_prompt}'\nsample_prompt: 'evil:Model'\n")
    (problem,) = refused("resume=run")
    assert "type" in problem and "expected package.module:Name" in problem
    assert not executed.exists()


@pytest.mark.parametrize("words", [["trust=evil"], ["--trust", "other,evil"], ["type=evil:Model"]])
def test_the_command_line_may_trust_it(run, words):
    executed = run(TYPE, "evil:Model")
    cfg, _ = compose(["resume=run", *words], notify=lambda text: None)
    assert cfg.type == "evil:Model" and executed.exists()


def test_a_file_of_ones_own_and_words_need_nothing(run, write):
    run("type: gpt2\n", "evil:Model")
    own = write("mine.yaml", f"defaults: [training, _self_]\n{TYPE}")
    for words in ([f"--hydra_model_cfg={own}"], [f"--hydra_model_cfg={own}", "resume=run"]):
        assert compose(words, notify=lambda text: None)[0].type == "evil:Model"
    other = write("other.yaml", "defaults: [training, _self_]\ntype: vanilla\n")
    words = [f"--hydra_model_cfg={other}", "type=evil:Model"]
    assert compose(words, notify=lambda text: None)[0].type == "evil:Model"


def test_a_package_stands_for_its_modules_and_no_other():
    said = {"type": "pkg.inner.mod:Model"}
    for module in ("pkg", "pkg.inner", "pkg.inner.mod"):
        trust.refuse(said, "file", trust.Path("run"), frozenset({module}))
    for module in ("pk", "pkg.inner.mod.deeper", "mod"):
        with pytest.raises(ConfigError, match="trust=pkg.inner.mod on the command line"):
            trust.refuse(said, "file", trust.Path("run"), frozenset({module}))


def test_what_stands_in_the_table_needs_nothing():
    for said in ({"type": "memory-adapter"}, {"type": "models.gpt2:GPT2"}, {"model_adapter": None}):
        trust.refuse(said, "file", trust.Path("run"))
    trust.refuse(
        {"type": "moe", "model_adapter": "adapters.experts:ExpertsAdapter"}, "file", trust.Path("run")
    )


@pytest.mark.parametrize("words", [["trust="], ["trust=a-b"], ["trust=../evil"], ["trust=evil:Model"]])
def test_a_name_that_no_module_has_is_refused(work, words):
    (problem,) = refused("model=gpt2", *words)
    assert problem.startswith("command line: trust: ")


@pytest.mark.parametrize("field", ["type", "model_adapter"])
def test_dashes_are_refused_wherever_a_class_is_named(run, work, write, field):
    (problem,) = refused("model=gpt2", f"{field}=my-pkg.mod:Model")
    assert "'my-pkg.mod:Model': expected package.module:Name. Nearest: 'my_pkg.mod:Model'" in problem
    run(f"{'' if field == 'type' else TYPE.replace('evil:Model', 'gpt2')}{field}: '-m:Model'\n")
    assert "'-m:Model': expected package.module:Name" in refused("resume=run", "trust=evil")[0]


def test_it_is_stored_nowhere(run):
    run(TYPE, "evil:Model")
    plan = prepare(["resume=run", "trust=evil"])
    assert "evil" in plan.trusted and not [word for word in plan.overrides if "trust" in word]
    tree = tree_of(plan)
    assert "trust" not in tree and "trust" not in check(plan, tree).cfg.model_dump()
    assert recorded_words(prepare(["model=gpt2", "--trust", "a.b", "seed=1"]).request, {})["words"] == [
        "seed=1"
    ]


def test_processes_of_a_run_inherit_it_and_files_cannot_set_it(work, write, monkeypatch):
    monkeypatch.setenv(trust.TRUSTED, "")  # nothing is yet
    trust.pass_on(frozenset({"b", "a.c"}))
    assert os.environ[trust.TRUSTED] == "a.c,b" and trust.trusted() == {"a.c", "b"}
    assert trust.passed_on() == {trust.TRUSTED: "a.c,b"}
    own = write("mine.yaml", f"defaults: [training, _self_]\ntype: gpt2\nenv: {{{trust.TRUSTED}: evil}}\n")
    assert f"env.{trust.TRUSTED} changes what programs load" in refused(str(own))[0]


def test_commands_that_are_printed_carry_it():
    assert trust.words("pkg.mod:Model", "other:Adapter") == ["trust=other,pkg.mod"]
    assert trust.option("pkg.mod:Model", None) == ["--trust", "pkg.mod"]
    assert trust.words("gpt2", "adapters.experts:ExpertsAdapter") == trust.option("moe", None) == []


@pytest.mark.parametrize("told_words", [["type=evil:Model", "seed=1,2"], ["trust=evil", "seed=1,2"]])
def test_the_record_of_a_sweep_is_a_file_of_a_run(run, write, command, told_words):
    """Its words are not the user's, and neither are the files that it names."""
    executed = run(TYPE)
    record = {"hydra": {"callbacks": {"sweep": {"models": ["mine.yaml"], "words": told_words}}}}
    record["hydra"]["runtime"] = {"cwd": str(executed.parents[1])}
    write(
        "mine.yaml", f"defaults: [training, _self_]\n{TYPE if told_words[0][:2] == 'tr' else 'type: gpt2'}\n"
    )
    write("sweep/multirun.yaml", json.dumps(record))
    _, err = command("resume=sweep", "-m", status=2)
    assert told(err) and not executed.exists()
