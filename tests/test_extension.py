"""Each section of CONTRIBUTING.md, tried: a toy of each kind is a file and a row, and a whole run knows it.

Here the file lies in a folder of the test's and the row is put into the table for its time. A field of its own is a
line of `RunConfig`, which cannot be added to a class that exists: the last test edits a copy of the project for that.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import data
import models
from configs.compose import check, compose_tree, prepare
from configs.grid import check_grid
from configs.messages import ConfigError
from configs.schema import CHOICES, GENERIC_FIELDS
from data import Source
from kernels import KERNELS, Implementation, Kernel
from models import Architecture
from naming import Entry
from tests.contract.tiny import overrides, session_of
from tests.house_copy import Edit, edited_copy
from trainer import optim
from trainer.export import FORMS
from trainer.optim import OptimizerEntry
from trainer.run import TRACKERS
from trainer.run.checkpoint import load_tensors, save_checkpoint
from trainer.run.facts import checkpoint_contents
from trainer.run.progress import Progress
from trainer.run.tensor_files import read_tensors

SHORT = ["num_iterations=4", "val_loss_every=0", "val_bytes=500", "logging_steps=1", "sample_tokens=2"]

SCHEDULE = """
from trainer.optim.schedules import progress


def square(step, warmup, end, floor, cfg):
    return 1 - (1 - floor) * progress(step, warmup, end) ** 2
"""

OPTIMIZER = '''
import torch


class Sign(torch.optim.Optimizer):
    """The sign of a running mean."""

    def __init__(self, groups, beta):
        super().__init__(groups, {})
        self.beta = beta
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        skip = self.found_inf > 0
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p]["mean"]
                mean.lerp_(torch.where(skip, mean, p.grad), 1 - self.beta)
                p.sub_(torch.where(skip, 0, group["lr"] * (mean.sign() + group["weight_decay"] * p)))


def sign(groups, cfg):
    return Sign(groups, cfg.adam_beta1)
'''

SOURCE = """
from data.corpus import Corpus, Document, fingerprint


def load(cfg):
    numbers = [" ".join(str(n) for n in range(start, start + 100)).encode() for start in range(0, 6000, 100)]
    documents = [Document(str(i), text) for i, text in enumerate(numbers)]
    train, heldout = documents[:-6], documents[-6:]
    return Corpus("counting", train, heldout, fingerprint(train, heldout))
"""

TOKENIZER = '''
import numpy as np

from data.tokenizers import TableTokenizer, as_bytes

PAIRS = [b"00", b"11"]


class Pairs(TableTokenizer):
    """Bytes, and a few pairs of them."""

    kind = "pairs"

    def __init__(self):
        super().__init__("pairs", [*(bytes([b]) for b in range(256)), *PAIRS])

    @staticmethod
    def vocabulary_size(size=None):
        return 257 + len(PAIRS)

    @classmethod
    def from_content(cls, content):
        return cls()

    def encode(self, text):
        ids, rest = [], as_bytes(text)
        while rest:
            pair = rest[:2] in PAIRS
            ids.append(256 + PAIRS.index(rest[:2]) if pair else rest[0])
            rest = rest[1 + pair :]
        return np.array(ids, dtype=self.dtype)
'''

FORM = '''
from trainer.export.form import Contents, Form


class Halves(Form):
    """Every tensor cut in two."""

    def check(self, cfg, model_cfg):
        if cfg.type != "gpt2":
            raise ValueError("to: halves are made of gpt2 alone")

    def contents(self, restored, rounding):
        state = restored.adapter.trained_state().items()
        halves = {f"{name}.{i}": half for name, t in state for i, half in enumerate(rounding(name, t).chunk(2))}
        return Contents({name: half.clone() for name, half in halves.items()}, {"names.txt": "\\n".join(halves)})

    def opened_by(self, folder, contents):
        return [f"glue {folder}"]
'''

OBJECTIVE = '''
from adapters.base import LossTerm
from adapters.default import DefaultModelAdapter
from models.gpt2 import GPT2Config


class Cfg(GPT2Config):
    small_weight: float = 0.5


class SmallStates(DefaultModelAdapter):
    """The next token, from states that are kept small."""

    Cfg = Cfg

    def step_output(self, hidden, prepared):
        output = super().step_output(hidden, prepared)
        size = (hidden.states.square().mean(-1) * prepared.tensors["weights"]).sum()
        output.terms["small"] = LossTerm(size, "tokens", self.model_cfg.small_weight)
        return output
'''

IMPLEMENTATION = '''
from kernels.linear_cross_entropy.reference import reference


def halves(hidden, weight, targets, weights, **kind):
    """The even rows, then the odd ones."""
    parts = [
        reference(hidden[k::2], weight, targets[k::2], None if weights is None else weights[k::2], **kind)
        for k in (0, 1)
    ]
    nats = hidden.new_empty(len(hidden), dtype=parts[0][1].dtype)
    nats[0::2], nats[1::2] = parts[0][1], parts[1][1]
    return parts[0][0] + parts[1][0], nats, None
'''

OPERATION = '''
from adapters.base import LossTerm
from adapters.default import DefaultModelAdapter


def reference(states, weights):
    return (states.square().mean(-1) * weights).sum()


def state_size(states, weights, kernels):
    """Weighted sum of the mean squares of states (N, D), ()."""
    rows, columns = states.shape
    run = kernels.implementation(
        "state_size", rows=rows, columns=columns, device=states.device, dtype=states.dtype
    )
    return run(states, weights)


class SmallStates(DefaultModelAdapter):
    def kernel_calls(self, rows, seq_len):
        return {**super().kernel_calls(rows, seq_len), "state_size": {"rows": rows * seq_len}}

    def step_output(self, hidden, prepared):
        output = super().step_output(hidden, prepared)
        weights = prepared.tensors["weights"].flatten()
        size = state_size(hidden.states.flatten(0, 1), weights, self.kernels)
        output.terms["small"] = LossTerm(size, "tokens", 0.1)
        return output
'''

PROCESS = '''
import torch

from adapters.diffusion import masked
from adapters.diffusion.adapter import DiffusionAdapter
from adapters.diffusion.network import Rows
from adapters.diffusion.process import Process
from models.dit import DiT, DiTConfig


class Config(DiTConfig):
    sampling_steps: int = 4


class Model(DiT):
    Config = Config


class Masked(Process):
    """A token is masked with probability t; masked ones are scored with weight 1/t (Nie et al. 2025)."""

    estimator = "the masked bound over t in (0, 1]"

    @property
    def sampler_steps(self):
        return self.cfg.sampling_steps

    def training_time(self, r):
        return r.clamp_min(1e-3)

    def corrupt(self, x0, noised, time, u):
        return x0.masked_fill(noised & (u < time), self.mask)

    def tau(self, time):
        return time.float().squeeze(1)

    def rows(self, x0, xt, noised, time):
        return Rows.of(noised & (xt == self.mask), x0, xt, {"weights": 1 / time})

    def row_loss(self, network, hidden, rows):
        return network.loss(hidden, rows, "subs")

    def estimate(self, draw):
        t = self.training_time(draw.r)
        xt = self.corrupt(draw.x0, draw.noised, t, draw.u)
        rows = self.rows(draw.x0, xt, draw.noised, t).to(draw.network.device, draw.network.dtype)
        loss = self.row_loss(draw.network, draw.hidden(xt, self.tau(t), rows), rows)
        nats = draw.by_row(rows, self.bound_nats(loss, rows))
        return {"diffusion": nats, "paper": nats}

    def resolve(self, network, window):
        def denoise(t, x, index):
            return network.hidden(x, self.tau(t.unsqueeze(1)), index)

        return masked.reveal_by_confidence(self, network, window, window.sampling.steps or self.sampler_steps, denoise)


class Adapter(DiffusionAdapter):
    process_class = Masked
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that writes `toy_<name>.py` into a folder of its own, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name, text: (tmp_path / f"toy_{name}.py").write_text(text)
    for name in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[name]


def tried(command, *words, model="gpt2"):
    """Train; go on from the middle to the same score; show. Gives (lines of metrics.jsonl, what `show` found)."""
    arguments = [word for word in overrides(model, *SHORT, *words) if not word.startswith("synthetic_bytes")]
    _, said = command(*arguments, "output_dir=whole", "save_steps=2")
    assert "not read" not in said
    command(*arguments, "output_dir=branch", "resume=whole/checkpoint-2")
    whole, branch = (json.loads(Path(f"{folder}/summary.json").read_text()) for folder in ("whole", "branch"))
    assert whole["score"] == branch["score"] and math.isfinite(whole["score"]["bits_per_byte"])
    out, _ = command("show", *arguments, "--json")
    return [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()], json.loads(
        out
    )


def test_a_schedule(toy, command, monkeypatch):
    toy("schedule", SCHEDULE)
    monkeypatch.setitem(optim.SCHEDULES, "square", Entry("toy_schedule:square", ("min_lr_ratio", "min_lr")))
    lines, _ = tried(command, "scheduler=square", "min_lr_ratio=0.2", "warmup_steps=1", "learning_rate=0.01")
    rates = [line["lr/scalar"] for line in lines if "loss" in line]
    assert rates == pytest.approx([0.01, 0.01, 0.01 * (1 - 0.8 / 9), 0.01 * (1 - 0.8 * 4 / 9)])
    _, said = command(*overrides("gpt2", *SHORT, "scheduler=square", "cooldown_frac=0.3", "output_dir=other"))
    assert "not read by this run: cooldown_frac (because of scheduler=square)" in said


def test_an_optimizer(toy, command, monkeypatch):
    toy("optimizer", OPTIMIZER)
    monkeypatch.setitem(optim.OPTIMIZERS, "sign", OptimizerEntry("toy_optimizer:sign", ("adam_beta1",)))
    lines, found = tried(command, "optimizer=sign", "adam_beta1=0.5", "learning_rate=0.001")
    assert {row["optimizer"] for row in found["roles"]} == {"sign"}
    assert found["memory_bytes"]["optimizer"] == found["memory_bytes"]["weights"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    monkeypatch.setitem(
        optim.OPTIMIZERS, "sign", OptimizerEntry("toy_optimizer:sign", ("adam_beta1",), roles=("matrix",))
    )
    out, _ = command("show", *overrides("gpt2", "optimizer=sign"), "--json")
    assert {row["role"]: row["optimizer"] for row in json.loads(out)["roles"]} == {
        "embedding": "adamw",
        "scalar": "adamw",
        "matrix": "sign",
    }


def test_a_source_of_text(toy, command, monkeypatch):
    toy("source", SOURCE)
    monkeypatch.setitem(data.SOURCES, "counting", Source("toy_source:load", (), "numbers", tokenizer="byte"))
    _, found = tried(command, "data=counting")
    assert found["vocab_size"] == 257
    assert json.loads(Path("whole/manifest.json").read_text())["data"]["name"] == "counting"
    out, _ = command("eval", "--checkpoint", "whole", "--device", "cpu", "--data", "counting")
    assert json.loads(out)["data"] == "counting"
    out, _ = command("--help")
    assert "counting     numbers" in out
    jobs = check_grid(prepare([*overrides("gpt2", "data=counting,synthetic"), "-m"]))
    assert [job.cfg.data for job in jobs or ()] == ["counting", "synthetic"]


def test_a_form_of_export(toy, command, monkeypatch):
    toy("form", FORM)
    monkeypatch.setitem(FORMS, "halves", Entry("toy_form:Halves", description="for scissors"))
    run = save_checkpoint(Path("run"), 1, *checkpoint_contents(session_of("gpt2"), Progress(), {}))
    words = ["export", "--checkpoint", run, "--to", "halves", "--save_precision", "bf16", "--output", "out"]
    assert "glue out" in command(*words)[0]
    halves = read_tensors(Path("out/model.safetensors"))
    assert Path("out/names.txt").read_text().split() == [*load_tensors_halved(run)]
    assert all(half.shape == halves[name].shape for name, half in load_tensors_halved(run).items())
    assert "for scissors" in command("export", "--help")[0]


def load_tensors_halved(checkpoint):
    state = load_tensors(checkpoint, "model.pt").items()
    return {f"{name}.{i}": half for name, tensor in state for i, half in enumerate(tensor.chunk(2))}


def test_an_objective(toy, command, monkeypatch):
    toy("objective", OBJECTIVE)
    monkeypatch.setitem(
        models.ARCHITECTURES, "small", Architecture("models.gpt2:GPT2", "toy_objective:SmallStates")
    )
    Path("small.yaml").write_text("defaults: [gpt2, _self_]\ntype: small\nmodel_cfg: {small_weight: 2.0}\n")
    lines, _ = tried(command, "learning_rate=0.01", model="small.yaml")
    sizes = [line["loss_small"] for line in lines if "loss" in line]
    assert sizes[-1] < sizes[0]
    assert json.loads(Path("whole/config.json").read_text())["model_cfg"]["small_weight"] == 2.0


def test_a_diffusion_process(toy, command, monkeypatch):
    toy("process", PROCESS)
    monkeypatch.setitem(
        models.ARCHITECTURES, "masked", Architecture("toy_process:Model", "toy_process:Adapter")
    )
    Path("masked.yaml").write_text(
        "defaults: [training, _self_]\ntype: masked\nmodel_cfg: {nelbo_draws: 4}\n"
    )
    lines, _ = tried(command, model="masked.yaml")
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    out, _ = command("generate", "--checkpoint", "whole", "--device", "cpu", "--max_new_tokens", "5")
    assert len(out.strip()) > 0


def test_a_way_to_compute_an_operation(toy, command, monkeypatch):
    toy("kernel", IMPLEMENTATION)
    row = KERNELS["linear_cross_entropy"]
    more = replace(
        row, implementations={**row.implementations, "halves": Implementation("toy_kernel:halves")}
    )
    monkeypatch.setitem(KERNELS, "linear_cross_entropy", more)
    tried(command, "kernels.linear_cross_entropy=halves")
    taken = json.loads(Path("whole/manifest.json").read_text())["kernels"]
    assert taken["linear_cross_entropy"] == {"halves": "kernels.linear_cross_entropy"}
    with pytest.raises(
        ConfigError,
        match="'halve' is not one of auto, reference, chunked, .*halves, .*Did you mean 'hal",
    ):
        prepare_and_check("gpt2", "kernels=halve")
    prepare_and_check("gpt2", "kernels=halves")  # by the operations that have it


def test_an_operation(toy, command, monkeypatch):
    toy("operation", OPERATION)
    plain = {"reference": Implementation("toy_operation:reference")}
    monkeypatch.setitem(KERNELS, "state_size", Kernel("toy_operation:state_size", implementations=plain))
    adapter = "model_adapter='toy_operation:SmallStates'"
    command(*overrides("gpt2", *SHORT, adapter, "kernels=chunked", "output_dir=out"))
    taken = json.loads(Path("out/manifest.json").read_text())["kernels"]
    assert taken["linear_cross_entropy"] == {"chunked": "kernels.default"}
    assert taken["state_size"] == {
        "reference": "auto: the plain definition; kernels.default=chunked: there is none"
    }
    tried(command, adapter, "kernels.state_size=reference")
    with pytest.raises(ConfigError, match="kernels.state_size: 'chunked' is not one of auto, reference"):
        prepare_and_check("gpt2", "kernels.state_size=chunked")


def prepare_and_check(model, *words):
    plan = prepare(overrides(model, *words))
    return check(plan, compose_tree(plan.overrides))


TABLES = {
    "kernels": KERNELS,
    **{field: choice.table for field, choice in CHOICES.items()},
    "trackers": TRACKERS,
    "tokenizer": data.TOKENIZERS,
    "to": FORMS,
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_every_row_names_what_exists(table, name):
    row = TABLES[table][name]
    assert callable(row.load()) and row.description
    assert set(row.reads) <= set(GENERIC_FIELDS)
    assert {need.partition("=")[0] for need in getattr(row, "needs", ()) if table == "data"} <= set(row.reads)


# -- with fields of their own ------------------------------------------------------------------------------------------

# What the sections say to write.
EDITS: list[Edit] = [
    ("trainer/optim/square.py", None, SCHEDULE.replace("** 2", "** cfg.square_power")),
    (
        "trainer/optim/__init__.py",
        "SCHEDULES: dict[str, Entry] = {\n",
        '    "square": Entry("trainer.optim.square:square", ("square_power", *_FALL)),\n',
    ),
    ("trainer/optim/sign.py", None, OPTIMIZER.replace("cfg.adam_beta1", "cfg.sign_beta")),
    (
        "trainer/optim/__init__.py",
        "OPTIMIZERS: dict[str, OptimizerEntry] = {\n",
        '    "sign": OptimizerEntry("trainer.optim.sign:sign", ("sign_beta",)),\n',
    ),
    ("data/counting.py", None, SOURCE.replace("6000", "cfg.counting_to")),
    (
        "data/__init__.py",
        "SOURCES: dict[str, Source] = {\n",
        '    "counting": Source("data.counting:load", ("counting_to",), tokenizer="byte"),\n',
    ),
    ("data/pairs.py", None, TOKENIZER),
    (
        "data/__init__.py",
        "TOKENIZERS: dict[str, TokenizerKind] = {\n",
        '    "pairs": TokenizerKind("data.pairs:Pairs"),\n',
    ),
    (
        "configs/schema.py",
        "    # learning-rate schedule\n",
        "    square_power: Positive = 2\n    sign_beta: OpenFraction = 0.9\n    counting_to: Positive = 6000\n",
    ),
    (
        "configs/training.yaml",
        "# --- learning-rate schedule",
        "square_power: 2\nsign_beta: 0.9\ncounting_to: 6000\n",
    ),
]


@pytest.mark.slow
def test_fields_of_their_own_are_a_line_in_the_schema_and_one_in_the_yaml(tmp_path):
    house = edited_copy(tmp_path, EDITS)

    def command(status, *words):
        done = subprocess.run(
            [sys.executable, "mytrainer.py", *words], cwd=house, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    new = ["scheduler=square", "optimizer=sign", "data=counting", "tokenizer=pairs"]
    fields = ["square_power=1", "sign_beta=0.5", "counting_to=4000"]
    train = [w for w in overrides("gpt2", *SHORT, *new, *fields) if not w.startswith("synthetic_bytes")]
    assert "not read" not in command(0, *train, "output_dir=out", "save_steps=2")
    rates = [
        json.loads(line)["lr/scalar"] for line in (house / "out/metrics.jsonl").read_text().splitlines()[:3]
    ]
    assert rates[0] - rates[1] == pytest.approx(rates[1] - rates[2]) and rates[0] > rates[1]
    command(0, *train, "output_dir=branch", "resume=out/checkpoint-2")
    assert "vocabulary 259" in command(0, "show", *train)
    command(0, "eval", "--checkpoint", "branch", "--device", "cpu")
    assert json.loads((house / "out/checkpoint-4/tokenizer.json").read_text())["type"] == "pairs"
    said = command(0, *overrides("gpt2", *SHORT, *fields, "output_dir=other"))
    for field, choice in (("counting_to", "data=synthetic"), ("sign_beta", "optimizer=muon")):
        assert f"{field} (because of {choice})" in said
    assert "square_power (because of scheduler=cooldown)" in said and "not read by this run" in said
    assert "square_power: must satisfy 1 <= square_power, got 0" in command(2, *train, "square_power=0")
    assert "Did you mean 'sign_beta'" in command(2, *train, "sign_bet=0.1")
