"""Going on with a run: which folder, which config, and the lock on its architecture."""

from __future__ import annotations

import json
import os

import pytest

from configs import compose, runs
from configs.compose import check, compose_tree, prepare
from configs.hydra_app import MODEL_GROUP, compose_hydra
from configs.messages import ConfigError
from configs.validate import read_saved
from trainer.commands.launch import config_text, read_config

ASKED = ["mine.yaml", "model_name=dante", "model_cfg.n_layers=5", "preset=tiny"]


@pytest.fixture
def dante(work):
    """A run called dante, with one checkpoint, as the trainer leaves it."""
    cfg, model_cfg = compose(ASKED, notify=lambda text: None)
    folder = work / "checkpoints" / "dante"
    (folder / "checkpoint-20").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(cfg))
    saved = {
        "format": 1,
        "type": cfg.type,
        "model_adapter": None,
        "model_cfg": model_cfg.model_dump(),
        "train_seq_len": cfg.train_seq_len,
        "batch_size": 4,
        "preset": cfg.preset,
    }
    for path in (folder, folder / "checkpoint-20"):
        (path / "config.json").write_text(json.dumps(saved))
    return folder


def planned(*words):
    plan = prepare(list(words))
    return check(plan, compose_tree(plan.overrides)), plan


def test_the_saved_config_reproduces_the_run(dante, work):
    first, _ = compose([*ASKED, "eval_only=true"], notify=lambda text: None)
    first = first.model_copy(update={"eval_only": False})
    again, _ = compose([f"{dante}/config.yaml", "model_name=virgil"], notify=lambda text: None)
    assert again == first.model_copy(update={"model_name": "virgil"})
    assert read_config(dante / "config.yaml")[0] == first


def test_a_name_alone_goes_on_with_the_run(dante):
    checked, _ = planned("--model_name", "dante", "--num_iterations", "2000")
    assert (checked.cfg.resume, checked.cfg.num_iterations, checked.model_cfg.n_layers) == ("auto", 2000, 5)
    assert checked.cfg.preset == "tiny" and str(checked.folder) == "checkpoints/dante"


@pytest.mark.parametrize(
    "content", [b"", b"defaults: [training, _self_]\nenv: {", b"- a\n", b"\0" * 99, b"\xff\xfe", None]
)
def test_a_damaged_config_says_how_to_go_on_without_it(dante, content):
    """One message; the run is gone on with as soon as a model file is named."""
    (dante / "config.yaml").unlink()
    if content is None:
        os.mkfifo(dante / "config.yaml")  # never opened
    else:
        (dante / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        prepare(["resume=checkpoints/dante"])
    (problem,) = refused.value.problems
    assert "config.yaml" in problem and "--hydra_model_cfg=FILE resume=" in problem
    checked, _ = planned("mine.yaml", "resume=checkpoints/dante", "preset=tiny")
    assert checked.model_cfg.n_layers == 5 and str(checked.folder) == "checkpoints/dante"


@pytest.mark.parametrize("path", ["checkpoints/dante", "checkpoints/dante/checkpoint-20"])
def test_a_path_alone_goes_on_with_its_run(dante, path):
    checked, _ = planned(f"resume={path}", "num_iterations=30")
    assert (checked.model_cfg.n_layers, str(checked.folder)) == (5, "checkpoints/dante")


def test_a_moved_run_goes_on_where_it_lies(dante, work):
    dante.rename(work / "elsewhere")
    checked, _ = planned("resume=elsewhere")
    assert str(checked.folder) == "elsewhere"


def test_a_new_folder_branches_off(dante):
    checked, _ = planned("resume=checkpoints/dante/checkpoint-20", "output_dir=new", "model=mine.yaml")
    assert (str(checked.folder), checked.model_cfg.n_layers) == ("new", 5)


@pytest.mark.parametrize("place", ["checkpoints/dante", "checkpoints/dante/best_model"])
@pytest.mark.parametrize(
    ("words", "folder"), [("output_dir=new", "new"), ("model_name=new", "checkpoints/new")]
)
def test_branching_off_takes_the_model_of_the_run_it_leaves(dante, place, words, folder):
    (dante / "best_model").mkdir()
    saved = (dante / "config.yaml").read_text()
    (dante / "config.yaml").write_text(saved.replace("output_dir: null", f"output_dir: {dante}"))
    checked, _ = planned(f"resume={place}", words)
    assert (str(checked.folder), checked.model_cfg.n_layers, checked.cfg.resume) == (folder, 5, place)


@pytest.mark.parametrize("more", [[], ["model=mine.yaml"], ["output_dir=new"]])
def test_a_file_is_no_run_to_go_on_with(dante, more):
    (dante / "checkpoint-20" / "model.pt").touch()
    said = "resume: .*model.pt is a file; .* Go on with its run: resume=checkpoints/dante$"
    with pytest.raises(ConfigError, match=said):
        planned("resume=checkpoints/dante/checkpoint-20/model.pt", *more)


def test_a_run_that_is_not_there_is_named_though_another_folder_is_given(work):
    with pytest.raises(ConfigError, match="old holds no run to go on with"):
        planned("resume=old/checkpoint-3", "model_name=new")


def test_a_file_that_differs_gives_way_and_says_so(dante, write):
    write("other.yaml", "defaults: [mine, _self_]\nmodel_cfg: {n_layers: 3}\n")
    checked, plan = planned("other.yaml", "model_name=dante", "resume=auto", "preset=small")
    assert (checked.model_cfg.n_layers, checked.model_cfg.d_model) == (5, 192)
    (note,) = [n for n in plan.notices if "architecture" in n]
    assert checked.cfg.train_seq_len == 128 and "train_seq_len 128 (not 256)" in note
    assert "n_layers 5 (not 6)" in note and "d_model 192 (not 384)" in note


def test_an_explicit_override_that_differs_is_refused(dante):
    with pytest.raises(ConfigError, match="fixed by .*config.json: n_layers is 5, 8 was asked"):
        planned("--model_name", "dante", "model_cfg.n_layers=8")
    planned("--model_name", "dante", "model_cfg.n_layers=5")
    with pytest.raises(ConfigError, match="type is fake_arch:Model, fake_arch:Headless was asked"):
        planned("--model_name", "dante", "type=fake_arch:Headless")


def test_a_field_the_saved_model_does_not_have_is_still_refused(dante):
    with pytest.raises(ConfigError, match="unknown key 'model_cfg.nope'"):
        planned("--model_name", "dante", "model_cfg.nope=8")


def test_auto_preset_of_a_resumed_run_is_the_one_it_began_with(dante):
    saved = json.loads((dante / "config.json").read_text()) | {"preset": "small"}
    (dante / "config.json").write_text(json.dumps(saved))
    plan = prepare(["model=gpt2", "model_name=dante", "resume=auto"])
    assert compose_tree(plan.overrides)["preset"] == "small"


def test_a_run_is_never_overwritten(dante):
    with pytest.raises(ConfigError, match="already holds checkpoint-20. Add resume=auto"):
        planned("mine.yaml", "model_name=dante", "preset=tiny")
    planned("mine.yaml", "model_name=dante", "preset=tiny", "resume=auto")


def test_a_run_begun_from_weights_goes_on_though_they_are_gone(dante, work):
    """By the command that is printed; what it began from stays in its configuration."""
    saved = (dante / "config.yaml").read_text()
    (dante / "config.yaml").write_text(
        saved.replace("init_from_checkpoint: null", "init_from_checkpoint: /no/run")
    )
    checked, _ = planned("resume=checkpoints/dante")
    assert (checked.cfg.init_from_checkpoint, checked.cfg.resume) == ("/no/run", "checkpoints/dante")
    with pytest.raises(ConfigError, match="init_from_checkpoint: no such checkpoint or run folder: /no/run"):
        planned(str(dante / "config.yaml"), "output_dir=new", "model_name=null")


def test_going_on_and_beginning_exclude_each_other_on_one_command_line(dante):
    with pytest.raises(ConfigError, match="command line: resume and init_from_checkpoint exclude each other"):
        prepare(["resume=checkpoints/dante", "init_from_checkpoint=checkpoints/dante"])
    planned("resume=checkpoints/dante", "init_from_checkpoint=null")
    planned("mine.yaml", "output_dir=new", "init_from_checkpoint=checkpoints/dante", "resume=none")


def test_two_sweeps_of_one_second_have_folders_of_their_own(work):
    def folder():
        plan = prepare(["mine.yaml", "seed=1,2", "-m"])
        return compose_hydra([f"{MODEL_GROUP}='{next(iter(plan.models))}'"]).hydra.sweep.dir

    one, other = folder(), folder()
    assert one != other and one.startswith("multirun/")


def test_a_mistyped_name_lists_the_runs(dante):
    with pytest.raises(ConfigError, match="no run called 'dnate'.*Did you mean 'dante'.* Runs: dante"):
        prepare(["--model_name", "dnate"])


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert [p.name for p in runs.checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_a_run_older_than_a_field_goes_on_as_it_was(dante):
    config = dante / "config.yaml"
    assert planned("resume=checkpoints/dante")[0].cfg.near_copies is None  # of today: what the source says
    config.write_text(config.read_text().replace("near_copies: null\n", "").replace("val_files: null\n", ""))
    cfg = planned("resume=checkpoints/dante")[0].cfg
    assert (cfg.near_copies, cfg.val_files) == ("keep", [])
    kept = {
        name: value for name, value in cfg.model_dump().items() if name not in ("near_copies", "val_files")
    }
    scored, _ = read_saved(kept, cfg.model_cfg, "checkpoint-20", [])  # what eval and generate read
    assert (scored.near_copies, scored.val_files) == ("keep", [])
    assert planned("--model_name", "dante")[0].cfg.near_copies == "keep"
    assert planned("resume=checkpoints/dante", "near_copies=drop")[0].cfg.near_copies == "drop"
