"""Runs whose frozen base reads a memory: what they keep, how they go on, who writes them, and what they learn."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from adapters.lora import attach
from tests.contract.tiny import config
from tests.models.memory.test_on_a_base import logits, reading
from tests.models.test_memory_adapter import IDS
from tests.pretrained import save_base
from trainer.loop import train
from trainer.run.checkpoint import load_json, load_tensors
from trainer.run.restore import restore

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("transformers")
RUN = [
    *(
        "preset=none",
        "device=cpu",
        "data=jsonl",
        "dataset_name=null",
        "train_seq_len=200",
        "val_loss_every=2",
    ),
    *("val_bytes=400", "num_iterations=4", "warmup_steps=1", "global_batch_size=4", "batch_size=2"),
    *(
        "gradient_accumulation_steps=2",
        "mixed_precision=no",
        "save_steps=2",
        "save_minutes=null",
        "sample_tokens=4",
        "logging_steps=1",
    ),
    *("memory_lr=0.02", "lora_lr=0.02", "model_cfg.num_memory_tokens=16", "model_cfg.memory_rank=8"),
]
FILES = {
    "adapter_qwen2.5_1.5b": ["model_cfg.memory_layer_indices=[0, 1]", "model_cfg.projection_rank=8"],
    "memory_lora_combined": ["model_cfg.memory_layer_n=1", "lora_rank=2"],
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Generated ones, and a base that has places for them."""
    folder = tmp_path_factory.mktemp("chats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_chats.py", str(folder / "chats.jsonl"), "60"])
        runpy.run_path(str(ROOT / "examples/make_chats.py"), run_name="__main__")
    return folder / "chats.jsonl", save_base(folder / "base", "qwen2", max_position_embeddings=256)


@pytest.fixture(scope="module", params=["memory_lora_combined", pytest.param("adapter_qwen2.5_1.5b")])
def trained(request, chats, tmp_path_factory):
    """(file, words, run) of a shipped file, shrunk."""
    import mytrainer

    text, base = chats
    run = tmp_path_factory.mktemp(request.param) / "run"
    words = [f"--hydra_model_cfg=configs/{request.param}.yaml", *RUN, *FILES[request.param]]
    words += [f"train_files={text}", f"model_cfg.base_model_name={base}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert mytrainer.main([*words, f"output_dir={run}"]) == 0
    return request.param, words, run


@pytest.mark.slow
def test_a_shipped_file_trains_on_chats_and_goes_on_to_the_bit(trained, tmp_path, command, monkeypatch):
    _, words, run = trained
    monkeypatch.chdir(ROOT)
    again = tmp_path / "run"
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2")
    shutil.copy(run / "config.yaml", again / "config.yaml")
    command(*words, f"output_dir={again}", "resume=auto")
    for name in ("model.pt", "optimizer.pt"):
        one, other = (load_tensors(folder / "checkpoint-4", name) for folder in (run, again))
        assert _same(one, other), name
    assert load_json(run, "summary.json")["score"] == load_json(again, "summary.json")["score"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_load_balance" in line and "router_max_share" in line for line in lines)


def _same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


@pytest.mark.slow
def test_checkpoints_and_optimizers_hold_what_is_trained_alone(trained, chats):
    file, _, run = trained
    held = load_tensors(run / "checkpoint-4", "model.pt")
    found = restore(run, device="cpu").adapter
    beside = found.beside()
    assert beside <= set(held) and all(n in beside or "lora_" in n for n in held)
    assert any("lora_" in n for n in held) == (file == "memory_lora_combined")
    numbers = sum(value.numel() for value in held.values())
    sizes = {name: (run / "checkpoint-4" / name).stat().st_size for name in ("model.pt", "optimizer.pt")}
    assert 4 * numbers < sizes["model.pt"] < 4 * numbers + 20_000
    assert 8 * numbers < sizes["optimizer.pt"] < 8 * numbers + 40_000, "two moments"
    assert set(load_json(run, "config.json")["provenance"]) == {"base_model"}
    base = (chats[1] / "model.safetensors").stat().st_size
    assert sizes["model.pt"] < base


@pytest.mark.slow
def test_forms_of_others_refuse_a_memory_and_our_own_keeps_it(trained, tmp_path, command, monkeypatch):
    file, words, run = trained
    ours = logits(restore(run, device="cpu").adapter, IDS)
    for form in ("hf", "peft"):
        _, err = command("export", "--checkpoint", run, "--to", form, "--output", tmp_path / form, status=2)
        assert "have no place for a memory" in err or "adapters, and this run has none" in err
        assert not (tmp_path / form).exists()
    command("export", "--checkpoint", run, "--to", "safetensors", "--output", tmp_path / "own")
    torch.testing.assert_close(
        logits(restore(tmp_path / "own", device="cpu").adapter, IDS), ours, rtol=1e-4, atol=1e-4
    )
    alone = tmp_path / "alone"
    out, _ = command("export", "--checkpoint", run, "--to", "memory", "--output", alone)
    if file == "memory_lora_combined":
        assert "load_file" in out
        with pytest.raises(ValueError, match="what else was trained is not there"):
            restore(alone, device="cpu")
    else:
        assert f"generate --checkpoint {alone}" in out
        found = restore(alone, device="cpu")
        assert torch.equal(
            logits(found.adapter, IDS), logits(restore(tmp_path / "own", device="cpu").adapter, IDS)
        )
        begun = [
            word for word in words if not word.startswith(("memory_lr", "num_iterations", "warmup", "save_"))
        ]
        begun += [
            f"init_from_checkpoint={alone}",
            "num_iterations=1",
            "memory_lr=0",
            "memory_bank_lr=0.02",
            "warmup_steps=0",
        ]
        monkeypatch.chdir(ROOT)
        command(*begun, f"output_dir={tmp_path / 'begun'}")
        kept = load_tensors(tmp_path / "begun" / "final_model", "model.pt")
        before = found.adapter.trained_state()
        assert {n for n, t in before.items() if not torch.equal(kept[n], t)} == {
            n for n in before if n.startswith("banks.")
        }
    text, _ = command(
        "generate",
        "--checkpoint",
        run,
        "--prompt",
        "What",
        "--max_new_tokens",
        5,
        "--temperature",
        0,
        "--device",
        "cpu",
    )
    plain, _ = command(
        *("generate", "--checkpoint", run, "--prompt", "What", "--max_new_tokens", 5, "--temperature", 0),
        *("--device", "cpu", "--no_cache"),
    )
    assert text == plain


@pytest.mark.slow
def test_a_memory_of_our_own_trains_on_beside_adapters_and_goes_on_to_the_bit(tmp_path):
    """Type memory: from a run of vanilla, whose memory begins anew, and from one with a memory."""
    short = ["num_iterations=4", "save_steps=2", "val_loss_every=0", "sample_tokens=0", "ema_decay=0.9"]
    for kind in ("vanilla", "memory"):
        base, run, again = (tmp_path / f"{kind}-{name}" for name in ("base", "run", "again"))
        train(*config(kind, *short, "num_iterations=1"), base)
        words = [*short, "use_lora=true", f"init_from_checkpoint={base}", "lora_rank=2", "memory_lr=0.01"]
        cfg, model_cfg = config("memory", *words)
        score = train(cfg, model_cfg, run)
        shutil.copytree(run / "checkpoint-2", again / "checkpoint-2")
        assert train(cfg.model_copy(update={"resume": "auto"}), model_cfg, again) == score
        one, other = (load_tensors(folder / "checkpoint-4", "model.pt") for folder in (run, again))
        assert _same(one, other)
        assert any(".memory." in n for n in one) and any("lora_" in n for n in one)
        assert not any(n.endswith("self_attn.q_proj.weight") for n in one)
        begun = load_tensors(run / "checkpoint-2", "model.pt")
        assert all(
            not torch.equal(value, one[n]) for n, value in begun.items() if "o_proj" in n or "lora_B" in n
        )


def test_adapters_of_a_run_go_where_the_run_says(tmp_path):
    """Memory and adapters beside one base, of which neither is adapted."""
    base = save_base(tmp_path / "base", "gpt2")
    adapter = reading(base)
    cfg, _ = config("memory_adapter", f"model_cfg.base_model_name={base}", "lora_targets=all-linear")
    attach(adapter, cfg.model_copy(update={"lora_rank": 2}), base="")
    assert adapter.adapted and all(target.path.startswith("base.") for target in adapter.adapted)
