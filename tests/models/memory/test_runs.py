"""Runs of the shipped files, shrunk: resumed bit for bit, and what is exported of a memory in few bits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from configs import compose
from models.memory.quant import rounded
from models.vanilla import VanillaConfig
from tests.contract.test_run import flat
from trainer.loop import train as train_in_process
from trainer.run.checkpoint import load_tensors

pytestmark = pytest.mark.xdist_group("runs of memories")
SIZES = {"d_model": 32, "n_heads": 2, "n_layers": 2, "ffn_hidden": 64, "vocab_size": 512, "n_ctx": 64}
SMALL = [
    *(f"model_cfg.{name}={size}" for name, size in SIZES.items()),
    *("data=embedded", "dataset_name=null", "dataset_subset=null", "tokenizer=byte", "train_seq_len=64"),
    *(
        "batch_size=2",
        "gradient_accumulation_steps=2",
        "num_iterations=4",
        "warmup_steps=1",
        "save_minutes=null",
    ),
    *("val_loss_every=0", "val_tokens=256", "save_best_model=false", "sample_tokens=0", "device=cpu"),
]
MEMORY = ["model_cfg.num_memory_tokens=32", "model_cfg.num_chapters=4", "model_cfg.top_k_chapters=2"]
ROUTED = [*MEMORY, "model_cfg.routing_window_size=8"]
SYNTHETIC = ["data=synthetic", "synthetic_bytes=20000", "mixed_precision=no"]
FILES = {
    "base_small": ROUTED,
    "vanilla_control": ["model_cfg.num_memory_tokens=32"],
    "memory": [*MEMORY[:1], "preset=none"],
}


def train(command, name, folder, *more):
    return command(f"--hydra_model_cfg={name}", f"output_dir={folder}", *SMALL, *FILES[name], *more)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_shipped_files_go_on_bit_for_bit(name, command, tmp_path):
    train(command, name, tmp_path / "whole", "save_steps=2", "save_total_limit=null")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    train(command, name, tmp_path / "again", "resume=auto", "save_steps=2", "save_total_limit=null")
    for file in ("model.pt", "optimizer.pt"):
        one, other = (
            dict(flat(load_tensors(tmp_path / run / "checkpoint-4", file))) for run in ("whole", "again")
        )
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
            assert same, f"{file}{key} differs"
    scores = [
        json.loads((tmp_path / run / "summary.json").read_text())["score"] for run in ("whole", "again")
    ]
    assert scores[0]["bits_per_byte"] == scores[1]["bits_per_byte"]


@pytest.mark.slow
def test_the_control_is_vanilla_from_the_same_seed(command, tmp_path):
    """Its weights after training are those of a run of `vanilla`, bit for bit."""
    train(command, "vanilla_control", tmp_path / "control")
    cfg, model_cfg = compose(
        ["--hydra_model_cfg=vanilla_control", *SMALL, *FILES["vanilla_control"]], notify=print
    )
    own = VanillaConfig(**{name: getattr(model_cfg, name) for name in VanillaConfig.model_fields})
    as_vanilla = {"type": "vanilla", "model_cfg": own.model_dump(mode="json"), "output_dir": None}
    train_in_process(cfg.model_copy(update=as_vanilla), own, tmp_path / "vanilla")
    control, vanilla = (
        load_tensors(tmp_path / run / "final_model", "model.pt") for run in ("control", "vanilla")
    )
    assert control.keys() == vanilla.keys() and all(torch.equal(control[n], t) for n, t in vanilla.items())


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_few_bits_are_exported_and_scored_as_they_are(bits, command, tmp_path):
    run = tmp_path / "run"
    fields = ["model_cfg.quantize_memory=true", f"model_cfg.memory_quant_bits={bits}", *SYNTHETIC]
    train(command, "base_small", run, *fields, "num_iterations=2")
    for form in ("safetensors", "memory"):
        command("export", "--checkpoint", run, "--to", form, "--output", tmp_path / form)
    masters = load_tensors(run / "final_model", "model.pt")
    bank = masters["banks.0.weight"]
    assert bank.dtype == torch.float32 and not torch.equal(bank, rounded(bank, bits)), (
        "checkpoints keep all of it"
    )
    whole = load_file(tmp_path / "safetensors" / "model.safetensors")
    alone = load_file(tmp_path / "memory" / "memory.safetensors")
    own = {name for name in whole if name.startswith("banks.") or ".memory." in name}
    assert alone.keys() == own and all(torch.equal(alone[name], whole[name]) for name in own)
    stored = [t for name, t in alone.items() if name.startswith("banks.")]
    assert sum(t.nbytes for t in stored) == 32 * 32 * bits // 8 + 4 * 32
    scores = []
    for folder in (run, tmp_path / "safetensors"):
        out = tmp_path / f"{folder.name}.json"
        command("eval", "--checkpoint", folder, "--val_bytes", "300", "--output", out)
        scores.append(json.loads(out.read_text())["avg_loss"])
    assert scores[0] == scores[1]
    _, err = command("eval", "--checkpoint", tmp_path / "memory", status=2)
    assert "holds the memory of a model of type memory alone" in err
    (tmp_path / "memory" / "memory.json").unlink()
    _, err = command("eval", "--checkpoint", tmp_path / "memory", status=2)
    assert "is damaged: it lacks memory.json" in err


@pytest.mark.slow
def test_there_must_be_a_memory_to_export(command, tmp_path):
    train(command, "vanilla_control", tmp_path / "run", "num_iterations=2", *SYNTHETIC)
    to = ["export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "out", "--to"]
    _, err = command(*to, "memory", status=2)
    assert "this one was trained without" in err
