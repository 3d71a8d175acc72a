"""The `convert` command: which format it writes, and where."""

from __future__ import annotations

import pytest


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "mine.config").write_text("MODEL n_layer=2\n")
    (tmp_path / "mine.yaml").write_text("defaults: [gpt2]\nlearning_rate: 0.5\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_prints_or_writes_the_other_format(place, command):
    as_yaml = "defaults:\n- vanilla\n- _self_\ntype: vanilla\nmodel_cfg:\n  n_layers: 2\n"
    assert command("convert", "mine.config")[0] == as_yaml
    assert command("convert", "mine.yaml")[0] == "MODEL type=gpt2\nTRAIN learning_rate=0.5\n"
    assert command("convert", "mine.config", "--to", "config")[0] == "MODEL type=vanilla n_layer=2\n"
    assert "mine.config -> new.yaml" in command("convert", "mine.config", "new.yaml")[0]
    command("convert", "mine.config", "--to", "yaml", "-o", "other.yml")
    assert (place / "new.yaml").read_text() == (place / "other.yml").read_text() == as_yaml


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["mine.config", "mine.yaml"], "mine.yaml is there already"),
        (["mine.config", "new.toml"], "new.toml: a file of yaml ends in .yaml or .yml. Nearest: new.yaml"),
        (["mine.config", "new.yaml", "--to", "config"], "a file of config ends in .config"),
        (["mine.config", "there/new.yaml"], "there is no folder there"),
        (["mine.config", "a.yaml", "-o", "b.yaml"], "OUT is given twice"),
        (["none.config"], "no such file: none.config"),
        (["mine.config", "--to", "json"], "invalid choice: 'json'"),
    ],
)
def test_mistakes_write_nothing(place, command, words, part):
    before = sorted(place.iterdir())
    assert part in command("convert", *words, status=2)[1]
    assert sorted(place.iterdir()) == before
