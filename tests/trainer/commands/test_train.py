"""The `train` command in this process: what is composed, and by whom."""

from __future__ import annotations

import sys

import hydra
import pytest

from configs.messages import ConfigError
from trainer.commands import train as command


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Training is replaced by a list of what it was given."""
    calls: list = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mytrainer.py"])
    monkeypatch.setattr("trainer.loop.train", lambda *args: calls.append(args) or 1.0)
    return calls


def ended(started: list):
    """Stands for `launch.start`: a run that comes to its end at once."""

    def start(cfg, model_cfg, folder, **options):
        started.append((cfg, model_cfg, folder))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text('{"score": {"bits_per_byte": 1.0}}')
        return 1.0

    return start


def test_a_single_run_is_composed_once_and_never_by_hydra_main(trained, monkeypatch):
    composed: list = []
    once = hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *a, **k: composed.append(a) or once(*a, **k))
    monkeypatch.setattr(hydra, "main", lambda **kwargs: pytest.fail("hydra.main was asked"))
    assert command.main(["model=gpt2", "preset=tiny", "seed=3", "output_dir=out"]) == 0
    ((cfg, model_cfg, folder, text),) = trained
    assert (cfg.seed, model_cfg.d_model, str(folder), len(composed)) == (3, 192, "out", 1)
    assert "seed: 3" in text(cfg) and "output_dir=out" in sys.argv


def test_what_only_a_sweep_reads_is_refused(trained):
    for word in ("hydra.sweep.dir=x", "hydra.nope=1"):
        with pytest.raises(ConfigError, match=f"{word.partition('=')[0]}: a run does not read it"):
            command.main(["model=gpt2", "preset=tiny", word, "output_dir=out"])
    assert not trained


def test_a_mode_of_hydra_starts_a_sweep_and_the_last_of_a_field_counts_in_it(
    trained, in_process, monkeypatch, capsys
):
    started: list = []
    monkeypatch.setattr(command.launch, "start", ended(started))
    words = ["model=gpt2", "preset=tiny", "env={FOO: 1}", "learning_rate=0.1", "learning_rate=0.2,0.3"]
    assert command.main([*words, "hydra.mode=MULTIRUN"]) == 0
    assert [(c.learning_rate, c.env) for c, _, _ in started] == [(0.2, {"FOO": "1"}), (0.3, {"FOO": "1"})]
    assert "note: learning_rate is given more than once; the last value counts" in capsys.readouterr().err


def test_jobs_of_a_sweep_that_begin_from_a_folder_of_transformers_have_its_sizes(
    trained, tmp_path, in_process, monkeypatch
):
    started: list = []
    monkeypatch.setattr(command.launch, "start", ended(started))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "gpt2", "n_embd": 24, "vocab_size": 77}')
    (tmp_path / "hf/model.safetensors").touch()
    assert command.main(["init_from_checkpoint=hf", "learning_rate=1e-5,2e-5", "-m"]) == 0
    sizes = [(cfg.type, cfg.learning_rate, m.d_model, m.vocab_size) for cfg, m, _ in started]
    assert sizes == [("gpt2", 1e-5, 24, 77), ("gpt2", 2e-5, 24, 77)]
