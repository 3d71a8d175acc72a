"""A model and an adapter that live in somebody else's folder train without an edit to the project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mytrainer

ROOT = Path(__file__).resolve().parents[1]

# A convolution over the last few tokens: no attention, no cache that grows, nothing from models/layers.
MODEL = '''
import torch
from torch import nn

from configs.schema import DefaultModelConfig
from models.layers.flops import Flops
from models.layers.roles import Rule


class Config(DefaultModelConfig):
    width: int = 4


class Window:
    """The cache: the tokens so far."""

    def __init__(self):
        self.tokens = None

    @property
    def length(self):
        return 0 if self.tokens is None else self.tokens.shape[1]

    def select(self, rows):
        self.tokens = self.tokens[rows]


class Convolution(nn.Module):
    Config = Config

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers = nn.ModuleList(nn.Conv1d(cfg.d_model, cfg.d_model, cfg.width) for _ in range(cfg.n_layers))
        self.head = nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def init_weights(self, generator):
        for parameter in self.parameters():
            parameter.data.normal_(std=0.05, generator=generator)

    @property
    def max_context(self):
        return self.cfg.n_ctx

    @property
    def head_weight(self):
        return self.head.weight

    def logits(self, hidden):
        return self.head(hidden)

    def init_cache(self, rows):
        return Window()

    def forward(self, tokens, doc_ids=None, cache=None):
        if cache is not None:
            tokens = cache.tokens = tokens if cache.tokens is None else torch.cat([cache.tokens, tokens], 1)
        x = self.embedding(tokens).transpose(1, 2)  # (B, D, T)
        for layer in self.layers:
            x = x + torch.tanh(layer(nn.functional.pad(x, (self.cfg.width - 1, 0))))
        return x.transpose(1, 2)

    def blocks(self):
        return [f"layers.{i}" for i in range(len(self.layers))]

    def param_roles(self):
        return [Rule("embedding.*", "embedding"), Rule("head.*", "head"), Rule("layers.*weight", "matrix"),
                Rule(".*bias", "scalar")]

    def flops(self, seq_len):
        weights = sum(p.numel() for name, p in self.named_parameters() if "embedding" not in name)
        return Flops(2.0 * weights, 6.0 * weights)
'''

# Next-token prediction that also learns to say the last token again, with a weight of its own.
ADAPTER = """
from adapters.base import LossTerm
from adapters.default import DefaultModelAdapter
from kernels.linear_cross_entropy import linear_cross_entropy
from my_pkg.my_mod import Config


class Cfg(Config):
    echo_weight: float = 0.1


class EchoAdapter(DefaultModelAdapter):
    Cfg = Cfg

    def prepare(self, batch, ctx):
        prepared = super().prepare(batch, ctx)
        prepared.denominators["rows"] = float(len(batch.rows))
        return prepared

    def forward(self, prepared):
        output = super().forward(prepared)
        t = prepared.tensors
        hidden = self.model(t["inputs"], doc_ids=t["doc_ids"])
        echo, _, _ = linear_cross_entropy(
            hidden.flatten(0, 1), self.model.head_weight, t["inputs"].flatten(), None,
            vocab_size=self.model_cfg.vocab_size,
        )
        output.terms["echo"] = LossTerm(echo / t["inputs"].shape[1], "rows", self.model_cfg.echo_weight)
        return output
"""

YAML = """
defaults: [training, _self_]
type: "my_pkg.my_mod:Convolution"
model_cfg: {n_ctx: 32, d_model: 48, n_layers: 2, n_heads: 1, width: 3}
data: synthetic
synthetic_bytes: 60000
train_seq_len: 32
global_batch_size: 8
num_iterations: 60
val_loss_every: 30
val_bytes: 4000
logging_steps: 10
sample_tokens: 10
learning_rate: 0.02
device: cpu
"""


@pytest.fixture
def elsewhere(tmp_path, in_process, monkeypatch):
    """A working directory with a package, a model file that uses the model, and one that adds the adapter."""
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "my_mod.py").write_text(MODEL)
    (package / "my_adapter.py").write_text(ADAPTER)
    (tmp_path / "mine.yaml").write_text(YAML)
    (tmp_path / "echo.yaml").write_text(
        'defaults: [mine, _self_]\nmodel_adapter: "my_pkg.my_adapter:EchoAdapter"\nmodel_cfg: {echo_weight: 0.5}\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        del sys.modules[name]


def test_a_model_of_somebody_else(elsewhere, command):
    """Trained, resumed, generated from, scored and shown."""
    command("--hydra_model_cfg=mine.yaml", "output_dir=out", "num_iterations=30")
    first = json.loads((elsewhere / "out/summary.json").read_text())
    assert first["type"] == "my_pkg.my_mod:Convolution"
    _, err = command("resume=out", "num_iterations=60", status=2)
    assert "trust=my_pkg.my_mod" in err, "what a run names is imported once one says so"
    told, _ = command("resume=out", "num_iterations=60", "trust=my_pkg.my_mod")
    assert (
        "num_iterations=120 trust=my_pkg.my_mod" in told and "--prompt 'def ' --trust my_pkg.my_mod" in told
    )
    stored = [p for p in (elsewhere / "out").rglob("*") if p.is_file() and b"trust" in p.read_bytes()]
    assert not stored and "MYTRAINER_TRUST" not in (elsewhere / "out/manifest.json").read_text()
    summary = json.loads((elsewhere / "out/summary.json").read_text())
    assert summary["score"]["bits_per_byte"] < min(first["score"]["bits_per_byte"], 5.2), (
        "it has learnt something"
    )
    manifest = json.loads((elsewhere / "out/manifest.json").read_text())
    parameters = {"embedding": 257 * 48, "matrix": 2 * 48 * 48 * 3, "scalar": 2 * 48, "head": 257 * 48}
    assert manifest["parameters"]["by_role"] == parameters

    trust = ["--trust", "my_pkg"]
    _, err = command("generate", "--checkpoint", "out", status=2)
    assert "--trust my_pkg.my_mod" in err
    with pytest.raises(ValueError, match=r"load\(..., trust='my_pkg.my_mod'\)"):
        mytrainer.load("out")
    assert mytrainer.load("out", device="cpu", trust="my_pkg.my_mod").score("01").nats is not None
    text = [
        "generate",
        "--checkpoint",
        "out",
        "--device",
        "cpu",
        "--prompt",
        "01",
        "--max_new_tokens",
        "40",
        *trust,
    ]
    (out, _), (plain, _) = command(*text), command(*text, "--no_cache")
    assert out.startswith("01") and out == plain
    out, _ = command("eval", "--checkpoint", "out", "--device", "cpu", *trust)
    assert json.loads(out)["score"] == summary["score"]
    told, _ = command("export", "--checkpoint", "out", "--to", "safetensors", "--output", "exported", *trust)
    assert "--trust my_pkg.my_mod" in told and "trust='my_pkg.my_mod'" in told
    out, _ = command("show", "--hydra_model_cfg=mine.yaml", "--json")
    assert json.loads(out)["parameters"]["total"] == sum(parameters.values())


def test_an_adapter_of_somebody_else(elsewhere, command):
    """Its own term is trained, its own field of `model_cfg` counts, and a checkpoint brings it back."""
    command("--hydra_model_cfg=echo.yaml", "output_dir=out")
    lines = [json.loads(line) for line in (elsewhere / "out/metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    echo = next(key for key in trained[0] if "echo" in key)
    assert trained[-1][echo] < trained[0][echo] < 6
    saved = json.loads((elsewhere / "out/config.json").read_text())
    assert (
        saved["model_cfg"]["echo_weight"] == 0.5 and saved["model_adapter"] == "my_pkg.my_adapter:EchoAdapter"
    )
    out, _ = command("eval", "--checkpoint", "out", "--device", "cpu", "--trust", "my_pkg.my_adapter,my_pkg")
    score = json.loads((elsewhere / "out/summary.json").read_text())["score"]
    assert json.loads(out)["score"] == score
    command("--hydra_model_cfg=echo.yaml", "output_dir=without", "model_cfg.echo_weight=0.0")
    without = json.loads((elsewhere / "without/summary.json").read_text())["score"]
    assert without["bits_per_byte"] < score["bits_per_byte"], "saying the last token again costs the next one"


def test_its_mistakes_are_explained(elsewhere, capsys):
    for words, text in (
        (["model_cfg.widht=2"], "Did you mean 'model_cfg.width'"),
        (["type=my_pkg.my_mod:Convolutions"], "Convolutions"),
        (["type=my_pkg.nothing:Model"], "my_pkg.nothing"),
        (["model_adapter=my_pkg.my_mod:Window"], "not a subclass of adapters.base.ModelAdapter"),
    ):
        capsys.readouterr()
        try:
            status = mytrainer.main(["--hydra_model_cfg=mine.yaml", "output_dir=out", *words])
        except SystemExit as leaving:
            status = leaving.code
        err = capsys.readouterr().err
        assert status in (1, 2) and text in err and "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_from_a_shell_and_on_two_processes(elsewhere, processes):
    """The package is found in the working directory by the command and by the workers that it starts."""
    words = ["--hydra_model_cfg=echo.yaml", "output_dir=out", "num_iterations=4", f"num_gpus={processes}"]
    done = subprocess.run(
        [sys.executable, ROOT / "mytrainer.py", *words],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((elsewhere / "out/manifest.json").read_text())
    assert manifest["execution"]["world_size"] == processes
