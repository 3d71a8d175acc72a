"""Options of GPT trainers on the command line."""

from __future__ import annotations

import json

import pytest

from configs import compose
from configs.files import CONFIGS
from configs.gpt_flags import SIZES
from tests.configs.formats.composed import quiet, refused

TINY = str(CONFIGS / "tiny.json")


def told(*words: str):
    """(run, architecture, remarks) of a command line."""
    notes: list[str] = []
    return *compose(list(words), notes.append), notes


def test_a_config_file_alone_is_the_model():
    (cfg, model_cfg), (file, file_cfg) = quiet("--config_file", TINY), quiet(TINY)
    assert (cfg, model_cfg) == (file, file_cfg)
    directives, _ = quiet(f"--config_file={CONFIGS / 'small.config'}")
    assert (directives.type, directives.num_iterations) == ("vanilla", 1000)


def test_beside_a_model_it_is_the_size_of_that_one(work):
    cfg, model_cfg = quiet("mine.yaml", "--config_file", TINY)
    assert (cfg, model_cfg) == quiet("mine.yaml", "preset=tiny")
    assert (
        "is a model file, and --hydra_model_cfg names one"
        in refused("mine.yaml", "--config_file", "mine.yaml")[0]
    )
    (problem,) = refused("mine.yaml", "--config_file", TINY, "preset=small")
    assert "preset and --config_file name the same field" in problem


def test_sizes_of_a_config_file_stay_and_the_rest_is_used():
    given = {
        "n_layer": 8,
        "n_head": 3,
        "n_embd": 96,
        "block_size": 64,
        "batch_size": 4,
        "dropout": 0.3,
        "bias": "true",
    }
    given["vocab_size"] = 300
    assert given.keys() == SIZES.keys()
    words = [w for key, value in given.items() for w in (f"--{key}", str(value))]
    trained = ["--max_iters", "7", "--eval_interval=3", "--eval_iters", "2", "--learning_rate", "1e-3"]
    cfg, model_cfg, notes = told("--config_file", TINY, *words, *trained)
    assert model_cfg == quiet(TINY)[1] and (cfg.global_batch_size, cfg.batch_size, cfg.train_seq_len) == (
        16,
        "auto",
        128,
    )
    ignored = [n for n in notes if n.startswith("ignored")]
    assert f"ignored --n_layer 8: the architecture comes from {TINY}" in ignored and len(ignored) == len(
        SIZES
    )
    assert (cfg.num_iterations, cfg.val_loss_every, cfg.val_steps, cfg.learning_rate) == (7, 3, 2, 1e-3)


def test_sizes_without_a_model_are_those_of_a_gpt2():
    cfg, model_cfg, notes = told("--n_layer", "2", "--n_embd=96", "--batch_size", "4", "--max_iters", "9")
    assert (cfg.type, cfg.preset, cfg.num_iterations) == ("gpt2", "none", 9)
    assert (model_cfg.n_layers, model_cfg.d_model, model_cfg.n_heads) == (2, 96, 6)
    assert (model_cfg.n_ctx, cfg.train_seq_len, model_cfg.dropout, model_cfg.bias) == (256, 256, 0.2, False)
    assert (cfg.global_batch_size, cfg.batch_size, model_cfg.vocab_size) == (4, "auto", None)
    (note,) = [n for n in notes if n.startswith("no model chosen: gpt2 of these sizes")]
    assert note.endswith("with --n_head 6, --block_size 256, --dropout 0.2, --bias false")
    assert quiet("--bias", "--n_head=4", "--model_name", "new")[0].global_batch_size == 32
    assert "no model chosen" in refused("--batch_size", "4", "--max_iters", "9")[0]  # no size of a model


def test_with_a_model_they_are_fields_of_it(work):
    cfg, model_cfg = quiet(
        "mine.yaml", "--n_layer", "3", "--block_size", "64", "--batch_size", "4", "--dropout=0.1"
    )
    assert (model_cfg.n_layers, model_cfg.n_ctx, cfg.train_seq_len, model_cfg.dropout) == (3, 64, 64, 0.1)
    assert (cfg.batch_size, cfg.global_batch_size, model_cfg.n_heads) == (4, 48, 6)
    with_preset = quiet("preset=tiny", "--n_layer", "3")
    assert (with_preset[0].type, with_preset[1].n_layers, with_preset[1].n_heads) == ("gpt2", 3, 4)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--max_iters 5", "num_iterations", 5),
        ("--grad-clip 0", "max_grad_norm", 0),
        ("--beta2 0.99", "adam_beta2", 0.99),
        ("--decay_lr", "scheduler", "cosine"),
        ("--decay_lr=False", "scheduler", "constant"),
        ("--compile=false", "torch_compile", False),
        ("--dtype float16", "mixed_precision", "fp16"),
        ("--out_dir runs/one", "output_dir", "runs/one"),
        ("--log_interval 3", "logging_steps", 3),
        ("--always_save_checkpoint false", "save_only_best", True),
        ("--tokenization char", "tokenizer", "char"),
        ("--min_lr 1e-5", "min_lr", 1e-5),
        ("--backend gloo", "ddp_backend", "gloo"),
        ("--wandb_log false", "use_wandb", False),
    ],
)
def test_options_of_training(work, words, field, value):
    assert getattr(quiet("mine.yaml", *words.split())[0], field) == value


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--max_iters", "3e3"], "num_iterations: expected int, got 3000.0 (float). Write 3000"),
        (["--max_iters", "007"], "command line: --max_iters: 007 begins with a zero"),
        (["--tokenization", "bpe"], "command line: --tokenization: 'bpe' is not one of gpt2, char"),
        (["--dtype", "int8"], "command line: --dtype: 'int8' is not one of float32, bfloat16, float16"),
        (["--max_iters", "5", "num_iterations=5"], "--max_iters and num_iterations name the same field"),
        (["--config_file"], "--config_file needs a value"),
        (["--config_file="], "--config_file needs a value"),
        (["--n_layer"], "--n_layer needs a value"),
        (["--init_from_model", "nobody"], "checkpoints/nobody"),
    ],
)
def test_mistakes(work, words, part):
    assert part in "\n".join(refused("mine.yaml", *words))


def test_a_run_that_goes_on_keeps_its_sizes(write):
    saved = {"format": 1, "type": "fake_arch:Model", "model_cfg": {"n_layers": 2}, "train_seq_len": 32}
    write("checkpoints/dante/config.yaml", "defaults: [../../mine, _self_]\nmodel_name: dante\n")
    for folder in ("", "checkpoint-5/"):
        write(f"checkpoints/dante/{folder}config.json", json.dumps(saved))
    assert quiet("--model_name", "dante", "--max_iters", "2000")[0].num_iterations == 2000
    assert "n_layers is 2, 3 was asked" in refused("--model_name", "dante", "--n_layer", "3")[0]
