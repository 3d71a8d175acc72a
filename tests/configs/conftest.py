"""A model outside the project, without torch: configuration can be tested in milliseconds."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from configs.messages import TRUSTED

ARCHITECTURE = '''
from configs.schema import DefaultModelConfig, Dropout, in_whole, within_context


class Config(DefaultModelConfig):
    dropout: Dropout = 0.0
    bias: bool = True
    tag: str | None = None

    def problems(self, run):
        return super().problems(run) + within_context(run, self.n_ctx)


class Model:
    Config = Config


class Patches:
    """An architecture that reads patches of bytes."""

    class Config(DefaultModelConfig):
        unit = "byte"

        def problems(self, run):
            return super().problems(run) + in_whole(run, "patch", 8)


class Headless:
    """An architecture without heads, as Mamba is."""

    from configs.schema import ModelConfig

    class Config(ModelConfig):
        d_model: int = 64
        n_layers: int = 2
        n_ctx: int = 1024
'''
MODEL = """
defaults: [training, _self_]
type: "fake_arch:Model"
model_cfg:
  n_ctx: 1024
  d_model: 96
  n_heads: 6
  n_layers: 2
learning_rate: 0.001
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: empty but for mine.yaml and the module it names."""
    (tmp_path / "fake_arch.py").write_text(ARCHITECTURE)
    (tmp_path / "mine.yaml").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_arch", raising=False)
    monkeypatch.setenv(TRUSTED, "fake_arch")  # runs of it are ours
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 0)
    return tmp_path


@pytest.fixture
def write(work: Path):
    def write_file(name: str, text: str) -> Path:
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write_file
