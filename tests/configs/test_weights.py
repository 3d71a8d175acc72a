"""Sizes that come with weights: a run that begins from a folder of transformers has those of its config.json."""

from __future__ import annotations

import json

import pytest

from configs.compose import check, compose_tree, prepare
from configs.dump import job_text
from configs.grid import check_grid
from configs.messages import ConfigError
from trainer.commands.launch import config_text

SIZES = {"vocab_size": 300, "n_ctx": 64, "d_model": 32, "n_layers": 3, "n_heads": 4, "tie_embeddings": True}
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
LLAMA = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4}
SHORT = "train_seq_len=64"


def folder(path, config):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").touch()
    return path


@pytest.fixture
def gpt2(work):
    return folder(work / "gpt2-small", GPT2)


def planned(*words):
    plan = prepare(["init_from_checkpoint=gpt2-small", *words])
    return check(plan, compose_tree(plan.overrides)), plan.notices


def problems(*words):
    with pytest.raises(ConfigError) as caught:
        planned(*words)
    return caught.value.problems


def test_the_folder_alone_is_a_model(gpt2):
    checked, notices = planned(SHORT)
    assert (checked.cfg.type, checked.cfg.preset) == ("gpt2", "none")
    assert {name: getattr(checked.model_cfg, name) for name in SIZES} == SIZES
    assert checked.cfg.optimizer == "muon", "the recipe is that of configs/gpt2.yaml"
    assert notices == [
        "preset auto: none, as gpt2-small/config.json gives the sizes",
        "the architecture is that of gpt2-small/config.json: n_ctx 64 (not 1024), d_model 32 (not 768), "
        "n_layers 3 (not 12), n_heads 4 (not 12)",
    ]


def test_rows_are_no_longer_than_the_context(gpt2):
    checked, notices = planned()
    assert checked.cfg.train_seq_len == 64 and notices[-1].endswith(", train_seq_len 64 (not 1024)")
    checked, notices = planned("train_seq_len=20")
    assert checked.cfg.train_seq_len == 20 and "train_seq_len" not in notices[-1]


def test_a_model_file_gives_way_and_keeps_what_is_no_size(gpt2, work):
    (work / "own.yaml").write_text(
        f"defaults: [gpt2, _self_]\nmodel_cfg: {{d_model: 96, dropout: 0.3, n_layers: 3}}\ntrain_seq_len: 64\n"
        f"init_from_checkpoint: {gpt2}\n"
    )
    plan = prepare(["own.yaml"])
    checked = check(plan, compose_tree(plan.overrides))
    assert (checked.model_cfg.d_model, checked.model_cfg.dropout, checked.cfg.preset) == (32, 0.3, "none")
    (told,) = (text for text in plan.notices if "is that of" in text)
    assert "d_model 32 (not 96)" in told and "n_layers" not in told and "dropout" not in told


def test_a_named_preset_gives_its_other_fields(gpt2):
    checked, notices = planned("preset=nano", SHORT)
    assert (checked.model_cfg.d_model, checked.cfg.preset, checked.cfg.num_iterations) == (32, "nano", 300)
    assert any("d_model 32 (not " in text and "n_heads 4 (not " in text for text in notices)


def test_what_the_command_line_says_otherwise_is_an_error(gpt2):
    planned(SHORT, "model_cfg.d_model=32", "model_cfg.dropout=0.1")
    lock = "command line: the sizes of gpt2-small are fixed by gpt2-small/config.json"
    assert problems(SHORT, "model_cfg.d_model=64", "model_cfg.tie_embeddings=false") == [
        f"{lock}: d_model is 32, 64 was asked",
        f"{lock}: tie_embeddings is True, False was asked",
    ]


@pytest.mark.parametrize("words", [["model=vanilla"], ["type=vanilla"], ["mine.yaml"]])
def test_another_architecture_is_named_with_the_right_file(gpt2, words):
    (told,) = problems(SHORT, *words)
    assert "gpt2-small holds a GPT-2, type gpt2, and this run is type " in told
    assert told.endswith("Give --hydra_model_cfg=configs/gpt2.yaml, or leave the model file out")


def test_a_row_longer_than_the_table_can_only_be_shorter(gpt2):
    (told,) = problems("train_seq_len=100")
    assert told.endswith(
        "train_seq_len (100) must not exceed model_cfg.n_ctx (64): positions are learned. Nearest: train_seq_len=64"
    )


def test_sizes_that_no_model_can_have_are_said_at_their_place(work):
    folder(work / "gpt2-small", {**GPT2, "n_head": 5})
    assert problems(SHORT)[0].startswith(
        "gpt2-small/config.json: model_cfg.d_model (32) must be divisible by"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gpt3", "no such checkpoint or run folder: gpt3. In .: empty, gpt2-small. If that is a name on Hugging Face"),
        ("a/gpt2", "If that is a name on Hugging Face: hf download a/gpt2 --local-dir DIR, then give DIR"),
        ("gpt2-small/model.safetensors", "is a file of weights, and the folder that it lies in is needed: gpt2-small"),
        ("~nobody-here/gpt2", "init_from_checkpoint: '~nobody-here/gpt2': there is no home folder for '~nobody-here'"),
        ("empty", "empty holds no weights that are read: neither a run of ours"),
        ("odd", 'odd/config.json: sliding_window is 4: this is not computed here'),
        ("pickle", "the weights are in pytorch_model.bin, and model.safetensors alone is read"),
    ],
)  # fmt: skip
def test_what_cannot_be_begun_from_is_said_before_anything_starts(gpt2, work, given, message):
    (work / "empty").mkdir()
    if given == "odd":
        folder(work / "odd", {**GPT2, "sliding_window": 4})
    if given == "pickle":
        (folder(work / "pickle", GPT2) / "model.safetensors").rename(work / "pickle" / "pytorch_model.bin")
    (told,) = problems(f"init_from_checkpoint={given}")
    assert message in told


def test_it_is_said_beside_a_model_file_too(gpt2):
    (told,) = problems("init_from_checkpoint=gpt3", "model=gpt2", "preset=nano")
    assert "init_from_checkpoint: no such checkpoint or run folder: gpt3." in told


def test_the_run_again_and_gone_on_with_after_the_folder_is_gone(gpt2, work):
    first, _ = planned(SHORT, "output_dir=run")
    run = work / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config_text(first.cfg))
    plan = prepare(["run/config.yaml", "output_dir=other"])
    again = check(plan, compose_tree(plan.overrides))
    assert again.cfg == first.cfg.model_copy(update={"output_dir": "other"})
    assert not [text for text in plan.notices if "is that of" in text]

    saved = {"format": 1, "type": "gpt2", "model_adapter": None, "train_seq_len": 64, "preset": "none"}
    saved["model_cfg"] = first.model_cfg.model_dump()
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "config.json").write_text(json.dumps(saved))
    gpt2.rename(work / "elsewhere")
    plan = prepare(["resume=run", "num_iterations=9"])
    assert check(plan, compose_tree(plan.overrides)).model_cfg == first.model_cfg


def test_what_is_no_run_is_begun_from(gpt2):
    with pytest.raises(
        ConfigError, match="holds no run to go on with .*, or begin one .*: init_from_checkpoint=gpt2-small"
    ):
        prepare(["resume=gpt2-small"])


def test_a_first_start_with_resume_auto_takes_the_sizes(gpt2, work):
    (work / "own.yaml").write_text(f"defaults: [gpt2]\ntrain_seq_len: 64\ninit_from_checkpoint: {gpt2}\n")
    plan = prepare(["own.yaml", "model_name=new", "resume=auto"])
    assert check(plan, compose_tree(plan.overrides)).model_cfg.d_model == 32


def test_a_sweep_takes_the_sizes_in_every_job(gpt2, work):
    checked = check_grid(prepare(["init_from_checkpoint=gpt2-small", SHORT, "learning_rate=1e-5,2e-5", "-m"]))
    assert [(c.model_cfg.d_model, c.cfg.preset) for c in checked] == [(32, "none")] * 2
    folder(work / "wide", {**GPT2, "n_embd": 64})
    checked = check_grid(prepare(["init_from_checkpoint=gpt2-small,wide", SHORT, "-m"]))
    assert [c.model_cfg.d_model for c in checked] == [32, 64]
    folder(work / "llama", LLAMA)
    with pytest.raises(ConfigError, match="folders differ. Give configs/gpt2.yaml or configs/vanilla.yaml"):
        prepare(["init_from_checkpoint=gpt2-small,llama", "-m"])


def test_what_is_shown_runs_as_a_file_of_its_own(gpt2, work):
    text = job_text(prepare(["init_from_checkpoint=gpt2-small", SHORT]))
    (work / "shown.yaml").write_text(text)
    plan = prepare(["shown.yaml"])
    assert check(plan, compose_tree(plan.overrides)).cfg == planned(SHORT)[0].cfg
