"""What a shell may complete."""

from __future__ import annotations

import pytest

from configs.completion import asked_of, complete
from configs.messages import ConfigError
from trainer.commands import train


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("python mytrainer.py sho", ["show"]),
        ("python mytrainer.py --hydra_model_cfg=gp", ["--hydra_model_cfg=gpt2"]),
        ("python /some/where/mytrainer.py --hydra_model_cfg ngp", ["ngpt"]),
        ("python mytrainer.py model=mi", ["model=mine.yaml"]),
        ("python mytrainer.py model=gpt2 preset=t", ["preset=tiny"]),
        ("python mytrainer.py model=gpt2 data=m", ["data=mix"]),
        ("python mytrainer.py model=gpt2 mix", ["mix=", "mixed_precision="]),
        ("python mytrainer.py model=gpt2 optimizer=m", ["optimizer=muon"]),
        ("python mytrainer.py model=gpt2 muon_scale=", ["muon_scale=rms", "muon_scale=spectral"]),
        ("python mytrainer.py model=gpt2 deterministic=", ["deterministic=false", "deterministic=true"]),
        ("python mytrainer.py model=gpt2 muon_l", ["muon_learning_rate="]),
        ("python mytrainer.py model=gpt2 --mult", ["--multirun"]),
        ("python mytrainer.py mine.yaml model_cfg.n_l", ["model_cfg.n_layers="]),
        ("python mytrainer.py model_cfg.n_l", []),
        ("python mytrainer.py model=gpt2 nothing_", []),
    ],
)
def test_words(work, line, words):
    assert complete(line) == words


def test_the_command_line_asks(work, in_process, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", "python mytrainer.py model=gpt2 preset=na")
    assert train.main(["-sc", "query=bash"]) == 0
    assert capsys.readouterr().out == "preset=nano\n"
    assert train.main(["--shell-completion", "install=bash"]) == 0
    assert "complete -o nospace" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes install=<shell>, uninstall=<shell> or query=<shell>"),
        (["instal=bash"], "takes install=<shell>"),
        (["install=bsh"], "install: 'bsh' is not one of bash, fish, zsh. Did you mean 'bash'"),
    ],
)
def test_what_is_asked_wrongly(words, message):
    with pytest.raises(ConfigError, match=message):
        asked_of(words)
