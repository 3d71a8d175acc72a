"""`bench generate`: which figures it gives for which architecture, and the bound beside them."""

import json

import pytest
import torch

from tests.contract.tiny import adapter_of
from trainer.commands.bench import generate as bench
from trainer.run.restore import Restored

SIZES = ["preset=none", "data=synthetic", "synthetic_bytes=20000", "mixed_precision=no"]
SMALL = ["model_cfg.d_model=32", "model_cfg.n_layers=2", "model_cfg.n_heads=2", "model_cfg.n_ctx=32"]
TIMES = ["--device", "cpu", "--turns", 1, "--max_new_tokens", 3, "--prompt", 5, "--batch"]


@pytest.fixture
def figures(command, tmp_path, monkeypatch):
    """A function from words to (the JSON, what was printed, the notes)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        bench, "ceilings", lambda device, dtype: {"bytes_per_second": 1e9, "flops_per_second": 1e12}
    )

    def run(*words):
        out, err = command("bench", "generate", *words, "--output", "found.json")
        return json.loads((tmp_path / "found.json").read_text()), out, err

    return run


def test_a_decoder_is_measured_against_a_plain_loop_and_its_bound(figures):
    words = [*SIZES, "train_seq_len=32", *SMALL]
    found, out, _ = figures(*TIMES, "1,2", "--prompt", "5,40", *words)
    one, two, long, _ = found["rows"]
    assert (one["prompt"], one["batch"], two["batch"], long["prompt"]) == (5, 1, 2, 40)  # n_ctx was raised
    assert one["network_calls"] == 3 and one["times_batch_1"] == 1.0
    assert min(two["times_batch_1"], two["times_plain_loop"], two["percent_of_bound"]) > 0
    assert one["tokens_per_second"] < one["bound_tokens_per_second"]
    assert found["model"]["cached"] and "x plain" in out and "GB/s" in out


def test_a_model_without_such_a_cache_is_measured_alone(figures):
    words = ["--hydra_model_cfg=configs/mdl.yaml", *SIZES, "train_seq_len=32", *SMALL]
    found, out, _ = figures(*words, *TIMES, 2)
    (row,) = found["rows"]
    assert row["tokens_per_second"] > 0 and row["network_calls"] > 0
    assert row["times_plain_loop"] is row["bound_tokens_per_second"] is row["times_batch_1"] is None
    assert found["ceilings"] == {} and "no plain loop and no bound" in out


def test_drafts_stand_beside_plain_generation(figures):
    words = ["--hydra_model_cfg=configs/mtp.yaml", *SIZES, "train_seq_len=32", *SMALL, "model_cfg.n_layers=4"]
    words += ["model_cfg.n_mtp_tokens=3", "--speculative", "--draft", 1, "--max_new_tokens", 6]
    found, out, _ = figures(*TIMES, "1,2", *words)
    assert [row["batch"] for row in found["rows"]] == [1, 2]
    for row in found["rows"]:
        assert row["speculative_tokens_per_second"] > 0 and row["times_generate"] > 0
        assert 1 <= row["tokens_per_pass"] <= 2 and len(row["accepted"]) == 1
    assert "tokens a pass" in out


def test_what_does_not_fit_the_context_of_a_checkpoint_is_left_out(figures, monkeypatch):
    monkeypatch.setattr(bench, "restore_named", lambda args: restored("gpt2"))
    found, _, err = figures("--checkpoint", "some", *TIMES, 1, "--prompt", "5,90")
    assert [row["prompt"] for row in found["rows"]] == [5]
    assert "prompt 90 is left out: 94 tokens with the start are more than n_ctx" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--prompt", "90,91"],
            "prompt: 90 with the start and 3 new tokens are more than n_ctx (32) of this model; at ",
        ),
        (["--prompt", "90,91"], "at most 28 fit"),
        (
            ["--max_new_tokens", "40"],
            "max_new_tokens: 40 with the start and a prompt are more than n_ctx (32) of this",
        ),
    ],
)
def test_nothing_that_fits_the_context_of_a_checkpoint_is_refused(command, monkeypatch, words, said):
    monkeypatch.setattr(bench, "restore_named", lambda args: restored("gpt2"))
    _, err = command("bench", "generate", "--checkpoint", "some", *TIMES, 1, *words, status=2)
    assert said in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "1,x"], "argument --batch: numbers are meant, such as 1,8,64, got '1,x'"),
        (["--batch", "0"], "batch: must be at least 1, got 0"),
        (["--prompt", "-1"], "prompt: must be at least 1, got -1"),
        (["--max_new_tokens", "1"], "max_new_tokens: must be at least 2, got 1"),
        (["--turns", "0"], "turns: must be at least 1, got 0"),
        (["--draft", "2"], "draft: 2 is read with speculative alone"),
        (
            ["--speculative", *SIZES, "train_seq_len=32", *SMALL],
            "GPT2, as it is configured, has nothing to draft",
        ),
    ],
)
def test_numbers_that_measure_nothing_are_refused(command, words, said):
    _, err = command("bench", "generate", *words, status=2)
    assert said in err


def restored(type_, *overrides):
    adapter = adapter_of(type_, *overrides)
    cfg = type("Cfg", (), {"type": type_})
    return Restored(cfg, adapter.eval(), adapter.tokenizer, adapter.device, "no", None, "untrained", 1)


def test_the_bound_is_what_must_be_read_or_multiplied():
    found = restored("vanilla")
    cfg = found.adapter.model_cfg
    keys_and_values = 2 * cfg.n_layers * cfg.d_model * cfg.kv_heads // cfg.n_heads * 4
    assert bench._cache_bytes(found) == (0, keys_and_values)
    weights = found.adapter.flops(1).forward_per_token / 2
    # Prompt and start, 8 tokens, then one pass at a length of 8 + 1.
    read = 2 * 4 * weights + 3 * keys_and_values * (8 + 9)
    slow_memory = {"bytes_per_second": 1e9, "flops_per_second": 1e99}
    assert bench._bound(found, 7, 3, 2, slow_memory) == pytest.approx(3 * 2 * 1e9 / read)
    operations = 3 * (
        8 * found.adapter.flops(8).forward_per_token + found.adapter.flops(17).forward_per_token
    )
    slow_products = {"bytes_per_second": 1e99, "flops_per_second": 1e9}
    assert bench._bound(found, 7, 3, 2, slow_products) == pytest.approx(3 * 2 * 1e9 / operations)


def test_both_sides_continue_the_same_prompts_equally_far():
    found = restored("gpt2")
    prompts = bench._prompts(found, 3, 6)
    assert {len(row) for row in prompts} == {6} and all(
        i != found.tokenizer.eot for row in prompts for i in row
    )
    torch.manual_seed(0)
    assert [len(row) for row in bench._plain(found, prompts, 4)(0)] == [4, 4, 4]
    ours = bench._Ours(found, prompts, 4)
    ours(0)
    assert ours.calls == 4 and ours.first[0] > 0
