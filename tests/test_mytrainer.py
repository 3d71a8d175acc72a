"""The front door."""

import importlib.util

import mytrainer


def test_before_installation_it_says_how_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hydra" else find(name))
    assert mytrainer.main(["--help"]) == 2
    out, err = capsys.readouterr()
    assert not out and "has no hydra" in err and "pip install -e ." in err
