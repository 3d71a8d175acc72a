"""Runs on a pretrained base: what they keep, how they go on, what is written of them and read again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.models.test_memory_adapter import IDS, logits, theirs_of
from tests.pretrained import base_of, save_base
from trainer.run.checkpoint import load_json, load_tensors
from trainer.run.restore import restore

pytestmark = pytest.mark.xdist_group("transformers")

WORDS = [
    *("--hydra_model_cfg=configs/memory_adapter.yaml", "preset=none", "data=synthetic", "device=cpu"),
    *(
        "synthetic_bytes=20000",
        "train_seq_len=32",
        "global_batch_size=4",
        "val_tokens=128",
        "val_loss_every=2",
    ),
    *("num_iterations=4", "warmup_ratio=0", "lora_rank=2", "lora_lr=0.05", "sample_tokens=4"),
    *("batch_size=2", "mixed_precision=no", "ema_decay=0.5", "save_steps=2", "save_minutes=null"),
]


def begin(command, base, out, *more, status=0):
    return command(*WORDS, f"model_cfg.base_model_name={base}", f"output_dir={out}", *more, status=status)


@pytest.fixture(scope="module", params=[pytest.param("gpt2", marks=pytest.mark.slow), "qwen2"])
def trained(request, tmp_path_factory):
    """(base, run): a base of its own, and adapters trained beside it."""
    import mytrainer

    folder = tmp_path_factory.mktemp(request.param)
    base = shutil.copytree(base_of(request.param), folder / "base")
    words = [*WORDS, f"model_cfg.base_model_name={base}", f"output_dir={folder / 'run'}"]
    assert mytrainer.main(words) == 0
    return base, folder / "run"


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_checkpoints_hold_adapters_alone_and_bind_them_to_the_base(trained):
    base, run = trained
    checkpoint = run / "checkpoint-4"
    held = load_tensors(checkpoint, "model.pt")
    assert held and all("lora_" in name for name in held)
    assert set(load_tensors(checkpoint, "ema.pt")["shadow"]) == set(held)
    config = load_json(run, "config.json")
    assert config["model_cfg"]["d_model"] == 64 and config["model_cfg"]["vocab_size"] == 300
    assert set(config["provenance"]) == {"base_model"}
    small = sum((checkpoint / name).stat().st_size for name in ("model.pt", "optimizer.pt", "ema.pt"))
    assert small < 0.3 * (base / "model.safetensors").stat().st_size
    assert restore(run, device="cpu").tokenizer.kind == "huggingface", "the base's own"
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] == 4


def test_a_run_goes_on_to_the_bit(trained, tmp_path, command):
    base, run = trained
    shutil.copytree(run / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    shutil.copy(run / "config.yaml", tmp_path / "run" / "config.yaml")
    begin(command, base, tmp_path / "run", "resume=auto")
    for name in ("model.pt",):
        same(load_tensors(run / "checkpoint-4", name), load_tensors(tmp_path / "run" / "checkpoint-4", name))
    assert (run / "summary.json").exists()
    scores = [
        json.loads((folder / "summary.json").read_text())["score"] for folder in (run, tmp_path / "run")
    ]
    assert scores[0] == scores[1]


def test_another_base_is_refused_and_the_same_one_may_move(trained, tmp_path, command):
    base, run = trained
    moved = shutil.copytree(base, tmp_path / "moved")
    words = ["eval", "--checkpoint", run, "--device", "cpu"]
    there, _ = command(*words)
    here, _ = command(*words, f"model_cfg.base_model_name={moved}")
    assert json.loads(here)["score"] == json.loads(there)["score"]
    other = save_base(
        tmp_path / "other",
        "gpt2" if "c_attn" in str(list(load_tensors(run, "model.pt"))) else "qwen2",
        seed=1,
    )
    _, err = command(*words, f"model_cfg.base_model_name={other}", status=2)
    assert "was trained on another base: base_model was" in err and "Traceback" not in err
    _, err = command(*words, "model_cfg.base_model_name=no/where", status=2)
    assert "'no/where' is not on this machine" in err and "Traceback" not in err


def test_transformers_opens_it_added_up_and_peft_beside_the_base(trained, tmp_path, command):
    peft = pytest.importorskip("peft")
    base, run = trained
    ours = logits(restore(run, device="cpu").adapter, IDS)
    for form in ("hf", "peft"):
        command("export", "--checkpoint", run, "--to", form, "--output", tmp_path / form)
    torch.testing.assert_close(theirs_of(tmp_path / "hf")(IDS).logits, ours, rtol=1e-4, atol=1e-4)
    beside = peft.PeftModel.from_pretrained(theirs_of(base), tmp_path / "peft").eval()
    with torch.no_grad():
        torch.testing.assert_close(beside(IDS).logits, ours, rtol=1e-4, atol=1e-4)
        assert (theirs_of(base)(IDS).logits - ours).abs().max() > 1e-2
    named = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == base
    # A run takes either: as a base of its own, and as adapters that are added to the base first.
    begin(command, tmp_path / "hf", tmp_path / "on-whole", "eval_only=true", "use_lora=false")
    begin(
        command,
        base,
        tmp_path / "from-peft",
        f"init_from_checkpoint={tmp_path / 'peft'}",
        "num_iterations=2",
        "lora_lr=1e-12",
    )
    found = restore(tmp_path / "from-peft", device="cpu").adapter
    torch.testing.assert_close(logits(found, IDS), ours, rtol=1e-4, atol=1e-4)
    assert set(found.provenance()) == {"base_model", "base"}


def test_adapters_of_another_base_of_the_same_shapes_are_refused(trained, tmp_path, command):
    base, run = trained
    command("export", "--checkpoint", run, "--to", "peft", "--output", tmp_path / "peft")
    entries = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert entries["revision"] is None
    kind = json.loads((base / "config.json").read_text())["model_type"]
    other = save_base(tmp_path / "other", kind, seed=5)
    words = [f"init_from_checkpoint={tmp_path / 'peft'}", "num_iterations=1"]
    _, err = begin(command, other, tmp_path / "a", *words, status=2)
    assert f"adapts {base}, and model_cfg.base_model_name={other} is another model" in err
    moved = json.dumps(entries | {"base_model_name_or_path": "somebody/model"})
    (tmp_path / "peft/adapter_config.json").write_text(moved)
    out, err = begin(command, base, tmp_path / "b", *words)
    assert "adapts somebody/model, which is not on this machine" in out + err


def test_its_model_file_leaves_open_what_the_base_says(trained, command):
    _, run = trained
    words = ["eval", "--config", "configs/memory_adapter.yaml", "--checkpoint", run, "--device", "cpu"]
    assert json.loads(command(*words)[0])["type"] == "memory_adapter"


def test_it_writes_text_from_many_prompts(trained, command):
    _, run = trained
    words = ["--max_new_tokens", 5, "--device", "cpu", "--temperature", 0]
    out, _ = command("generate", "--checkpoint", run, *words, "--prompt", "01")
    again, _ = command("generate", "--checkpoint", run, *words, "--prompt", "01", "--no_cache")
    assert out == again and out.startswith("01")


def test_a_base_that_is_trained_is_in_its_checkpoints(tmp_path, command):
    words = ["use_lora=false", "model_cfg.freeze_base_model=false", "num_iterations=2"]
    begin(command, base_of("qwen2"), tmp_path / "run", *words)
    held = load_tensors(tmp_path / "run", "model.pt")
    assert "base.layers.0.self_attn.q_proj.weight" in held and not any("lora_" in name for name in held)
    assert set(load_json(tmp_path / "run", "config.json")["provenance"]) == {"base_config"}


@pytest.mark.parametrize("words", [["show"], ["--cfg", "job"]])
def test_what_needs_no_base_is_checked_without_it(words, command):
    named = ["--hydra_model_cfg=configs/memory_adapter.yaml", "model_cfg.base_model_name=no/where"]
    command_words = [*words, *named] if words == ["show"] else [*named, *words]
    out, err = command(*command_words)
    assert "memory_adapter" in out and "'no/where' is not on this machine" in out + err
    assert "What depends on the base was not checked" in err


def test_training_without_the_base_is_refused_before_anything(tmp_path, command):
    _, err = begin(command, "no/where", tmp_path / "run", status=2)
    assert "'no/where' is not on this machine. Give a local folder, or download it once" in err
    assert not (tmp_path / "run").exists()


def test_show_counts_what_is_trained(command):
    out, _ = command(
        "show", *WORDS[:4], "train_seq_len=64", f"model_cfg.base_model_name={base_of('qwen2')}", "--json"
    )
    found = json.loads(out)
    # rank 16: A (16, 64) and B (64, 16) of queries, B (32, 16) of values, in two layers
    assert found["parameters"]["trainable"] == 2 * 16 * (64 + 64 + 64 + 32)
    assert found["vocab_size"] == 300 and "base" in found["notes"][0]
