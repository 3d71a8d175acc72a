"""Files that people add to configs/: they run, and the check of the folder passes them or names what is wrong."""

from __future__ import annotations

import os

import pytest

from configs import files, help, test_configs
from configs.compose import compose
from configs.messages import ConfigError


@pytest.fixture
def folder(work, monkeypatch):
    """A folder of configurations with files of the user's beside a shipped one."""
    place = work / "configs"
    (place / "lab").mkdir(parents=True)
    (place / "preset").mkdir()
    (place / "data").mkdir()
    (place / "gpt2.yaml").write_text("# The shipped one.\n")
    recipe = "defaults: [training]\nmodel_cfg: {d_model: 96, n_heads: 6, n_layers: 2}\nlearning_rate: 0.001\n"
    (place / "new_model.yaml").write_text(recipe)
    (place / "typed.yaml").write_text(f"type: gpt2\n{recipe}")
    (place / "lab" / "deep.yml").write_text("defaults: [../new_model, _self_]\nmodel_cfg: {n_layers: 3}\n")
    (place / "wrong.yaml").write_text("defaults: [training]\nmodel_cfg: {n_layrs: 3}\n")
    (place / "broken.yaml").write_text("# Not yet.\n[1, 2\n")
    (place / "latin.yaml").write_bytes(b"# caf\xe9\ndefaults: [training]\n")
    (place / "preset" / "big.yaml").write_text("preset: big\n")
    return place


def test_every_file_is_found_and_options_are_none(folder):
    found = [str(p.relative_to(folder)) for p in test_configs.other_files(folder)]
    assert found == [
        "broken.yaml",
        "lab/deep.yml",
        "latin.yaml",
        "new_model.yaml",
        "typed.yaml",
        "wrong.yaml",
    ]


@pytest.mark.parametrize("name", ["new_model.yaml", "typed.yaml", "lab/deep.yml"])
def test_a_short_recipe_passes_without_a_word(folder, name, recwarn):
    test_configs.check_own_file(folder / name, build=True)
    assert not [w for w in recwarn if "hydra" in str(w.message).lower() or "_self_" in str(w.message)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong.yaml", r"configs/wrong.yaml:2: unknown key 'model_cfg.n_layrs'"),
        ("broken.yaml", r"configs/broken.yaml:\d: line \d"),
        ("latin.yaml", r"configs/latin.yaml: not UTF-8 text"),
    ],
)
def test_what_is_wrong_is_told_by_name(folder, name, message):
    with pytest.raises(ConfigError, match=message):
        test_configs.check_own_file(folder / name, build=False)


def test_lists_name_every_file(folder, monkeypatch):
    for module in (files, help):
        monkeypatch.setattr(module, "CONFIGS", folder)
    listed = dict(help.list_configs())
    assert listed.keys() == {"broken", "gpt2", "latin", "new_model", "typed", "wrong"}
    assert listed["latin"].startswith("invalid: not UTF-8 text") and listed["broken"] == "Not yet."
    text = help.help_text()
    assert all(name in text for name in listed) and "invalid: not UTF-8" in text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["a pipe", "a device"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("it.yaml", ["--hydra_model_cfg=it.yaml"]),
        ("it.json", ["it.json"]),
        ("it.config", ["it.config"]),
        ("it.py", ["it.py"]),
        ("it.json", ["mine.yaml", "preset=it.json"]),
        ("it.json", ["--config_file", "it.json"]),
        ("it.json", ["sized.yaml"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_no_file_is_refused_and_not_waited_for(write, name, words, kind):
    write("sized.yaml", "defaults: [mine, _self_]\npreset: it.json\n")
    path = write(name, "")
    path.unlink()
    os.mkfifo(path) if kind == "a pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=f"is {kind}, and a configuration is a file"):
        compose(words, notify=lambda text: None)
