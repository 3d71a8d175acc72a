"""Adapters on a text that the base has not seen."""

import json

import pytest

from benchmarks import lora

SMALL = ["train_seq_len=64", "global_batch_size=4", "num_iterations=3", "val_bytes=2000", "device=cpu"]


@pytest.mark.slow
def test_figures_of_an_architecture(tmp_path):
    """At a high rate, as there are three steps: it reads the other text better than its base, and is as good merged."""
    text = tmp_path / "notes"
    text.mkdir()
    for n in range(40):
        (text / f"{n}.txt").write_text(f"note {n}: " + "la la la " * 50)
    output = tmp_path / "found.json"
    assert lora.main(str(output), str(text), "gpt2", *SMALL, "lora_rank=4", "lora_lr=0.02") == 0
    found = json.loads(output.read_text())["architectures"]["gpt2"]
    assert found["targets"] == ["c_attn", "c_proj"] and found["matrices"] == 4 * 2
    sides = (192 + 3 * 192) + (192 + 192)
    assert found["trained"] == 4 * 4 * sides and found["share"] == found["trained"] / found["parameters"]
    sizes = found["checkpoint_bytes"]
    for name, adapted in sizes["adapted"].items():
        assert adapted < sizes["base"][name] / 10, name
    assert found["after"] < found["before"] and found["merged_off"] < 1e-5
