"""Fields that are gone: read past in what was saved, refused on the command line."""

from __future__ import annotations

import json

import pytest

from configs import compose
from configs.compose import prepare
from configs.grid import check_grid
from configs.messages import ConfigError
from configs.removed import REMOVED
from configs.validate import read_saved
from trainer.commands import sweep, train

OLD = "defaults: [mine, _self_]\nold_way: 3\nmodel_cfg: {old_size: 4}\n"


@pytest.fixture(autouse=True)
def removed(monkeypatch):
    monkeypatch.setitem(REMOVED, "old_way", "use seed instead")
    monkeypatch.setitem(REMOVED, "model_cfg.old_size", "use model_cfg.d_model instead")


def test_a_file_that_still_has_them_is_read_without(write):
    write("old.yaml", OLD)
    notes: list[str] = []
    cfg, model_cfg = compose(["old.yaml"], notes.append)
    assert notes == [
        "old.yaml:2: 'old_way' is no longer a field: use seed instead. Left out (it was 3)",
        "old.yaml:3: 'model_cfg.old_size' is no longer a field: use model_cfg.d_model instead. "
        "Left out (it was 4)",
    ]
    assert "old_size" not in cfg.model_cfg and model_cfg.d_model == 96


@pytest.mark.parametrize(
    "word", ["old_way=3", "--old_way=3", "model_cfg.old_size=3", "--model_cfg.old_size=3"]
)
def test_the_command_line_is_told_what_to_use(write, word):
    write("old.yaml", OLD)
    name = word.lstrip("-").partition("=")[0]
    with pytest.raises(ConfigError) as error:
        compose(["old.yaml", word], lambda text: None)
    assert error.value.problems == [f"command line: '{name}' is no longer a field: {REMOVED[name]}"]


def test_an_architecture_may_have_a_field_of_that_name(work, monkeypatch):
    monkeypatch.setitem(REMOVED, "model_cfg.tag", "there is none")
    assert compose(["mine.yaml", "model_cfg.tag=x"], lambda text: None)[1].tag == "x"


def test_the_architecture_of_a_saved_run_is_read_without(work):
    notes: list[str] = []
    cfg, model_cfg = compose(["mine.yaml"], notes.append)
    run = work / "checkpoints" / "dante"
    (run / "checkpoint-2").mkdir(parents=True)
    saved = {"format": 1, "type": cfg.type, "model_cfg": {**model_cfg.model_dump(), "old_size": 4}}
    (run / "config.json").write_text(json.dumps(saved))
    words = ["mine.yaml", "model_name=dante", "resume=auto"]
    assert compose(words, notes.append)[1] == model_cfg
    assert any("'model_cfg.old_size' is no longer a field" in n for n in notes)
    with pytest.raises(ConfigError, match="command line: 'model_cfg.old_size' is no longer a field"):
        compose([*words, "model_cfg.old_size=5"], notes.append)


def test_a_checkpoint_is_read_without(work):
    cfg, model_cfg = compose(["mine.yaml"], lambda text: None)
    generic = {**cfg.model_dump(mode="json"), "old_way": 3}
    notes: list[str] = []
    found = read_saved(generic, {**model_cfg.model_dump(), "old_size": 4}, "checkpoint-2", notes)
    assert found == (cfg, model_cfg) and [n.split(":")[0] for n in notes] == ["checkpoint-2"] * 2


def test_a_sweep_is_refused_whatever_its_sweeper_checks(work, in_process, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="'model_cfg.old_size' is no longer a field"):
        check_grid(prepare(["mine.yaml", "model_cfg.old_size=1,2", "-m"]))
    monkeypatch.setattr(
        sweep, "check_grid", lambda *args, **kwargs: None
    )  # as for trials that do not exist yet
    assert train.main(["mine.yaml", "model_cfg.old_size=1,2", "-m"]) == 1
    assert "command line: 'model_cfg.old_size' is no longer a field" in capsys.readouterr().err
