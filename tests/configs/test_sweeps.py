"""Commands of sweeps: how many points they may have, what is recorded of them, how they are repeated."""

from __future__ import annotations

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from configs import hydra_app, sweeps
from configs.compose import prepare, tree_of
from configs.frontend import parse
from configs.grid import check_grid
from configs.hydra_app import Composer, job_number
from configs.messages import ConfigError


def points(plan) -> list[list[str]]:
    return BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(plan.overrides), None)[0]


def test_a_grid_composed_once_is_what_hydra_composes_of_each_point():
    words = [
        "preset=nano,tiny",
        "learning_rate=1e-3,2",
        "model_cfg.d_model=96",
        "env={A: 1}",
        "val_steps=null,3",
    ]
    plan = prepare(["--hydra_model_cfg=gpt2,configs/small.config", *words, "sample_prompt='a, b'", "-m"])
    composer, found = Composer(), points(plan)
    assert len(found) == 16
    for point in found[::5]:
        assert composer.tree(point) == tree_of(plan, point)


@pytest.mark.parametrize(
    "word", ["val_tokens=${num_iterations}", "~model_cfg.dropout", "model_cfg.d_model=64"]
)
def test_what_refers_to_other_fields_or_deletes_them_is_composed_by_hydra(word, monkeypatch):
    plan = prepare(["--hydra_model_cfg=gpt2", "preset=nano", "num_iterations=7,8", word, "-m"])
    whole: list = []
    compose = hydra_app.compose_tree
    monkeypatch.setattr(hydra_app, "compose_tree", lambda *args: whole.append(args) or compose(*args))
    composer = Composer()
    trees = [composer.tree(point) for point in points(plan)]
    assert trees == [compose(point) for point in points(plan)]
    assert len(whole) == (0 if word == "model_cfg.d_model=64" else 2)


def test_a_large_grid_is_meant_only_where_it_is_said():
    words = ["--hydra_model_cfg=gpt2", "preset=nano", "seed=range(0,5000)"]
    with pytest.raises(ConfigError, match=r"more than 1,000 points.* sweep_limit=<points>"):
        check_grid(prepare([*words, "-m"]))
    few = ["--hydra_model_cfg=gpt2", "preset=nano", "seed=1,2,3"]
    with pytest.raises(ConfigError, match="more than 2 points"):
        check_grid(prepare([*few, "--sweep_limit", "2", "-m"]))
    done: list = []
    assert len(check_grid(prepare([*few, "sweep_limit=3", "-m"]), lambda *told: done.append(told))) == 3
    assert done == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep_limit=0", "-m"], "1 or more, got 0"),
        (["sweep_limit=x", "-m"], "got x"),
        (["sweep_limit=9"], "add -m"),
    ],
)
def test_a_limit_is_a_number_of_points_of_a_sweep(words, told):
    assert told in "".join(parse(["--hydra_model_cfg=gpt2", *words]).problems)


def record(folder, argv, secrets=None):
    """What a sweep with these words leaves."""
    told = {"_target_": "x", **sweeps.recorded_words(parse(argv), secrets or {})}
    folder.mkdir()
    tree = {"hydra": {"callbacks": {"sweep": told}, "runtime": {"cwd": str(folder.parent)}}}
    OmegaConf.save(OmegaConf.create(tree), folder / "multirun.yaml")


def test_a_command_is_repeated_with_what_is_said_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [
        "gpt2.yaml",
        "--learning_rate",
        "1e-3,2e-3",
        "sample_prompt=a\\${b}",
        "seed=1",
        "hydra.sweep.dir=old",
        "-m",
    ]
    record(tmp_path / "s", given)
    place = f"hydra.sweep.dir={tmp_path / 's'}"
    plain = ["--hydra_model_cfg=gpt2.yaml", "--learning_rate=1e-3,2e-3", "sample_prompt=a\\${b}"]
    words, folder = sweeps.repeated(["resume=s", "-m"])
    assert (words, folder) == ([*plain, "seed=1", "-m", place], tmp_path / "s")
    words, _ = sweeps.repeated(["--resume", "./s", "seed=1,2", "model=vanilla", "-m"])
    assert words == ["--hydra_model_cfg=vanilla", *plain[1:], "seed=1,2", "-m", place]
    assert sweeps.working_folder(folder) == tmp_path
    words, _ = sweeps.repeated(["resume=s", "learning_rate=1e-3,5e-3", "-m"])
    assert words == [plain[0], plain[2], "seed=1", "learning_rate=1e-3,5e-3", "-m", place]


def test_no_secret_is_recorded_and_other_references_stay_text(tmp_path):
    record(
        tmp_path / "s", ["gpt2.yaml", "env.MY_KEY=k3y", "data_root=${oc.env:HOME}", "-m"], {"MY_KEY": "k3y"}
    )
    text = (tmp_path / "s" / "multirun.yaml").read_text()
    assert "k3y" not in text
    words, _ = sweeps.repeated([f"resume={tmp_path / 's'}", "-m"])
    assert words[1:3] == ["env.MY_KEY=<redacted>", "data_root=${oc.env:HOME}"]
    assert parse(words).values["env.MY_KEY"] == "<redacted>"


def test_variables_of_a_record_are_set_where_they_are_harmless_or_given_again(tmp_path):
    record(tmp_path / "s", ["gpt2.yaml", "env.LD_PRELOAD=x.so", "env.OMP_NUM_THREADS=2", "-m"])
    with pytest.raises(ConfigError, match=r"sets env\.LD_PRELOAD=x\.so in the environment.*give it again"):
        sweeps.repeated([f"resume={tmp_path / 's'}", "-m"])
    words, _ = sweeps.repeated([f"resume={tmp_path / 's'}", "env.LD_PRELOAD=y.so", "-m"])
    assert "env.OMP_NUM_THREADS=2" in words and "env.LD_PRELOAD=y.so" in words
    assert "env.LD_PRELOAD=x.so" not in words


def test_only_a_sweep_is_repeated(tmp_path):
    assert sweeps.repeated(["gpt2.yaml", "-m"]) is None
    assert sweeps.repeated([f"resume={tmp_path}"]) is None  # of one run
    with pytest.raises(ConfigError, match="holds no sweep to go on with .*without -m"):
        sweeps.repeated([f"resume={tmp_path}", "-m"])
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {}}))
    with pytest.raises(ConfigError, match="says nothing of the command"):
        sweeps.repeated([f"resume={tmp_path}", "-m"])


def test_jobs_keep_their_numbers_and_new_ones_get_the_next():
    assert [job_number(n, [4, 0], 5) for n in range(4)] == [4, 0, 5, 6]


@pytest.mark.parametrize(
    ("launcher", "device", "asked", "given"),
    [
        ({"_target_": "x.JoblibLauncher", "n_jobs": 2}, "auto", "auto", 1),
        ({"_target_": "x.LocalLauncher"}, "cuda", "auto", 1),
        ({"_target_": "x.LocalLauncher"}, "auto", 2, 2),
        ({"_target_": "x.LocalLauncher"}, "cpu", "auto", "auto"),
        ({"_target_": "x.JoblibLauncher", "n_jobs": 1}, "auto", "auto", "auto"),
        ({"_target_": "x.SlurmLauncher"}, "auto", "auto", "auto"),
        ({"_target_": "x.BasicLauncher"}, "auto", "auto", "auto"),
    ],
)
def test_a_job_beside_others_has_one_gpu_unless_it_asks_for_more(launcher, device, asked, given, monkeypatch):
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 4)
    tree = {"num_gpus": asked, "device": device}
    sweeps.on_one_gpu(tree, launcher)
    assert tree["num_gpus"] == given
