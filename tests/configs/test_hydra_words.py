"""Hydra's own words on our command line, and in our files: those that work, and those that nobody would heed."""

from __future__ import annotations

import pytest

from configs import compose, hydra_words
from configs.compose import prepare, tree_of
from configs.frontend import parse
from configs.grid import check_grid
from configs.hydra_app import sweep_folder
from configs.messages import ConfigError


def quiet(*words: str):
    return compose(list(words), notify=lambda text: None)


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        quiet(*words)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["--info"], ["--info=all"]),
        (["-i"], ["--info=all"]),
        (["-i", "mine.yaml"], ["--info=all"]),
        (["--info", "defaults", "mine.yaml"], ["--info=defaults"]),
        (["--shell-completion", "install=bash"], ["--shell-completion"]),
        (["mine.yaml", "hydra.mode=MULTIRUN"], ["--multirun"]),
        (["mine.yaml", "hydra.mode=RUN"], []),
    ],
)
def test_flags_that_work(work, words, flags):
    plan = prepare(words)
    assert plan.request.flags == flags and len(plan.models) == ("mine.yaml" in words)


def test_a_sweep_by_mode(work):
    points = check_grid(prepare(["mine.yaml", "seed=1,2", "hydra.mode=MULTIRUN"]))
    assert points is not None and [p.cfg.seed for p in points] == [1, 2]
    assert "hydra.mode: 'MULTI' is not one of RUN, MULTIRUN" in refused("mine.yaml", "hydra.mode=MULTI")


def test_folders_of_model_files(work, write, monkeypatch):
    write("lab/deep.yaml", "defaults: [near, _self_]\nseed: 8\n")
    write("lab/near.yaml", "defaults: [training, _self_]\nlogging_steps: 3\n")
    for words in (
        ["--config-dir", "lab", "--hydra_model_cfg=deep"],
        ["--config-dir=lab", "model=deep.yaml"],
        ["-cd", str(work / "lab"), "-cn", "deep"],
        ["--config-path", "lab", "-cn", "deep"],
        ["--config-path", str(work / "lab"), "--config-name=deep.yaml"],
    ):
        cfg, _ = quiet(*words)
        assert (cfg.seed, cfg.logging_steps, cfg.type) == (8, 3, "vanilla"), words
    monkeypatch.chdir("/")
    assert tree_of(prepare(["--config-path", "configs/papers", "-cn", "mdlm"]))["type"] == "mdl"
    assert "--config-dir: no such folder: nowhere (looked from /" in refused(
        "--config-dir=nowhere", "model=gpt2"
    )


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("model_adapter=fake_arch.Adapter", "model_adapter", "fake_arch:Adapter"),
        ("env={FOO: 1, BAR: x y}", "env", {"FOO": "1", "BAR": "x y"}),
        ("model_cfg={model_dim: 48, tag: a}", "model_cfg", {"d_model": 48, "tag": "a"}),
        ("hydra.run.dir=here/${seed}", "output_dir", "here/1337"),
        ("hydra.run.dir=here/${hydra.job.name}", "output_dir", "here/mytrainer"),
    ],
)
def test_values_that_work(work, write, word, field, value):
    with (work / "fake_arch.py").open("a") as file:
        file.write("\n\nclass Adapter:\n    pass\n")
    found = getattr(quiet("mine.yaml", word)[0], field)
    assert found == value if not isinstance(value, dict) else value.items() <= found.items()


def test_a_secret_in_a_mapping_stays_out_of_files(work):
    plan = prepare(["mine.yaml", "env={MY_KEY: s3cret, FOO: 1}"])
    assert plan.secrets == {"MY_KEY": "s3cret"} and "s3cret" not in str(plan.overrides)


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["hydra.run.dir=x", "output_dir=y"], ["hydra.run.dir and output_dir name the same field. Keep output_dir"]),
        (["hydra.run.dir=${nope}"], ["command line: output_dir: ${nope} names no field"]),
        (["hydra.run.dir=x", "-m"], ["hydra.run.dir is the folder of one run", "hydra.sweep.dir=<folder>"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir: a run does not read it. Relative paths mean"]),
        (["hydra.job.chdir=true", "-m"], ["hydra.job.chdir: a run does not read it. Relative paths mean"]),
        (["hydra.sweep.dir=x"], ["hydra.sweep.dir: a run does not read it. It is for sweeps: add -m"]),
        (["hydra.sweeper.n_trials=3"], ["hydra.sweeper.n_trials: a run does not read it. It is for sweeps: add -m"]),
        (["hydra/launcher=basic"], ["hydra/launcher: a run does not read it. It is for sweeps: add -m"]),
        (["hydra.verbose=true"], ["hydra.verbose: a run does not read it. Leave it out"]),
        (["hydra.job.env_set={A: b}"], ["a run does not read it. Variables of a run: env.<NAME>=<value>"]),
        (["hydra.searchpath=[lab]"], ["hydra.searchpath is not read here", "--config-dir=<folder>"]),
        (["hydra.searchpath=[lab]", "-m"], ["hydra.searchpath is not read here"]),
        (["hydra={run: {dir: x}}"], ["hydra is not read here. Name the setting"]),
        (["hydra/launcher=joblob", "-m"], ["hydra/launcher: 'joblob' is not one of basic", "mean 'joblib'?"]),
        (["device=${oc.env:NOPE}"], ["command line: device: the environment variable NOPE is not set. Set it, or"]),
        (["--resolve"], ["--resolve is for --cfg, which is not given. Add --cfg job"]),
        (["-p", "model_cfg"], ["--package is for --cfg, which is not given"]),
        (["--cfg", "job", "-i"], ["one of --cfg, --info and --run at a time"]),
        (["--cfg", "job", "--cfg", "hydra"], ["one of --cfg, --info and --run at a time"]),
        (["train"], ["the command comes first: python mytrainer.py train ..."]),
    ],
)  # fmt: skip
def test_what_nobody_would_heed_is_refused(work, monkeypatch, words, texts):
    monkeypatch.delenv("NOPE", raising=False)
    problem = refused("mine.yaml", *words)
    assert problem.startswith("command line: ") and all(text in problem for text in texts)


def test_what_is_so_already_may_be_said(work):
    assert quiet("mine.yaml", "hydra.job.chdir=false")[0].seed == 1337


@pytest.mark.parametrize("flag", ["--hydra_model_cfg=", "model=''", "--config=,"])
def test_a_model_flag_left_empty_by_a_variable_that_is_not_set(work, flag):
    assert "names no model: its value is empty, as a shell variable that is not set leaves it" in refused(
        flag
    )


def test_what_hydra_could_not_do_is_one_line_with_its_reason(work):
    with pytest.raises(
        ConfigError, match=r"INTERVAL_SWEEP: a grid takes lists .* hydra/sweeper=optuna for one"
    ):
        check_grid(prepare(["mine.yaml", "learning_rate=interval(0.1,0.2)", "-m"]))
    with pytest.raises(ConfigError) as caught:
        check_grid(prepare(["mine.yaml", "seed=1,2", "hydra.sweeper.max_batch_size=x", "-m"]))
    assert caught.value.problems[0].startswith(
        "command line: Error merging override hydra.sweeper.max_batch_size=x: "
    )
    assert "could not be converted to Integer" in caught.value.problems[0]


@pytest.mark.parametrize("name", ["dir", "subdir"])
def test_folders_of_a_sweep_that_cannot_be_named(work, name):
    def folder(*words: str) -> str:
        plan = prepare(["mine.yaml", *words, "-m"])
        return sweep_folder(plan.overrides, plan.where(None, plan.request.values))

    with pytest.raises(ConfigError, match=rf"^command line: hydra.sweep.{name}: \$\{{nope\}} names no field"):
        folder(f"hydra.sweep.{name}=${{nope}}")
    assert folder("hydra.sweep.dir=x", "hydra.sweep.subdir=${hydra.job.num}") == "x"


def test_a_launcher_without_its_machine(work, monkeypatch):
    monkeypatch.setattr(hydra_words, "check_plugin", lambda *args: None)
    monkeypatch.setattr("configs.frontend.check_plugin", lambda *args: None)
    words = ["mine.yaml", "seed=1,2", "hydra/launcher=submitit_slurm", "-m"]
    monkeypatch.setattr(hydra_words.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="hands jobs to SLURM, and there is no 'srun' on this machine"):
        prepare(words)
    monkeypatch.setattr(hydra_words.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not parse(words).problems


# -- defaults lists ----------------------------------------------------------------------------------------


def test_optional_files_and_fragments(write):
    write("part.yaml", "model_dim: 48\ndropout: 0.25\n")
    write(
        "mine2.yaml", "defaults: [mine, optional local, part@model_cfg, _self_]\nmodel_cfg: {n_layers: 3}\n"
    )
    cfg, model_cfg = quiet("mine2.yaml")
    assert (model_cfg.d_model, model_cfg.dropout, model_cfg.n_layers, cfg.seed) == (48, 0.25, 3, 1337)
    write("local.yaml", "seed: 12\n")
    assert quiet("mine2.yaml")[0].seed == 12
    write("grouped.yaml", "defaults: [mine, {optional lab: none_there}, {/lab@model_cfg: size}, _self_]\n")
    with pytest.raises(ConfigError, match="no such config: /lab/size"):
        quiet("grouped.yaml")
    write("lab/size.yaml", "defaults: [deeper@_here_]\nd_model: 24\n")
    write("lab/deeper.yaml", "d_model: 12\ntag: deep\n")
    write("grouped.yaml", "defaults: [mine, {optional lab: none_there}, {lab@model_cfg: size}, _self_]\n")
    _, model_cfg = quiet("grouped.yaml")
    assert (model_cfg.d_model, model_cfg.tag) == (24, "deep")


@pytest.mark.parametrize(
    ("name", "text", "place", "what"),
    [
        ("part.yaml", "d_model: x\n", "part.yaml:1: model_cfg.d_model", "expected int, got 'x'"),
        ("part.yaml", "\nd_modl: 3\n", "part.yaml:2: unknown key 'model_cfg.d_modl'", "model_cfg.d_model"),
        ("part.yaml", "# @package lab\nd_model: 3\n", "part.yaml:1: '# @package lab'", "part@lab"),
        ("part.yaml", "d_model: ${nope}\n", "part.yaml:1: model_cfg.d_model", "${nope} names no field"),
        ("top.yaml", "defaults: [mine]\nhydra: {searchpath: [lab]}\n", "top.yaml:2: settings of Hydra", "--config-dir"),
        ("top.yaml", "defaults: [mine, gone@model_cfg]\n", "top.yaml:1: no such config: gone ", "tried gone.yaml"),
        ("top.yaml", "defaults: [mine, 'part@0']\n", "top.yaml:1: '0' is no place for fields", "part@model_cfg"),
        ("top.yaml", "# mine\n# @package lab\ndefaults: [mine]\n", "top.yaml:2: '# @package lab'", "not read here"),
    ],
)  # fmt: skip
def test_the_right_file_is_named(write, name, text, place, what):
    write("part.yaml", "d_model: 96\n")
    write("top.yaml", "defaults: [mine, part@model_cfg, _self_]\n")
    write(name, text)
    problem = refused("top.yaml")
    assert problem.startswith(place) and what in problem
