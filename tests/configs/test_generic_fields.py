"""Every generic field that a configuration of another project states is one of ours, a spelling of one, or refused with
what to use."""

from __future__ import annotations

import pytest

from configs import compose
from configs.files import read
from configs.frontend import parse
from configs.messages import RENAMED, ConfigError
from configs.schema import GENERIC_FIELDS
from tests.configs.formats.composed import quiet, refused

REAL = """
type model_cfg model_adapter model_name output_dir seed deterministic train_files val_files data_root
input_file dataset_name dataset_subset dataset_split eval_split text_field tokenizer training_mode packing
train_seq_len val_seq_len global_batch_size batch_size gradient_accumulation_steps num_iterations num_epochs
val_loss_every val_bytes val_tokens val_steps optimizer learning_rate memory_lr memory_bank_lr lora_lr
base_model_lr weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm ema_decay scheduler cooldown_frac
warmup_steps warmup_ratio min_lr_ratio min_lr lr_decay_steps device mixed_precision save_precision
torch_compile gradient_checkpointing num_gpus ddp_backend save_checkpoint save_minutes save_steps
save_total_limit save_best_model save_only_best early_stopping early_stopping_patience
early_stopping_threshold resume init_from_checkpoint eval_only logging_steps use_wandb wandb_project
wandb_run_name use_tensorboard use_lora lora_rank lora_alpha lora_dropout lora_targets env
"""
SPELLED = {
    "seq_len": "train_seq_len",
    "resume_from_checkpoint": "resume",
    "log_to_wandb": "use_wandb",
    "wandb_log": "use_wandb",
}
# What is said of the others.
REFUSED = {
    "bfloat16": ["It is no field here", "mixed_precision=bf16", "save_precision=bf16"],
    "use_adam_mini": ["It is no field here", "Adam-mini is not offered", "optimizer=muon"],
    "use_liger": ["It is no field here", "kernels.linear_cross_entropy"],
    "proj_fp8": ["It is no field here", "FP8 are not offered", "mixed_precision=bf16"],
    "BLOCK_SIZE": ["It is no field here", "bench kernels --tune", "kernels.attention"],
    "distributed_strategy": ["It is no field here", "num_gpus", "gradient_checkpointing=true"],
    "fsdp_sharding_strategy": ["It is no field here", "weights are not sharded"],
    "IS_MODAL": ["It is no field here", "data_root"],
    "modal_data_path": ["It is no field here", "data_root"],
    "local_data_path": ["It is no field here", "data_root"],
    "num_layers": ["'num_layers' is an architecture field here: set model_cfg.n_layers"],
    "model_dim": ["'model_dim' is an architecture field here: set model_cfg.d_model"],
    "n_mtp_tokens": ["'n_mtp_tokens' is an architecture field here: set model_cfg.n_mtp_tokens"],
    "use_deepseek_mtp": ["is an architecture field here: set model_cfg.use_deepseek_mtp"],
    "sliding_window_size": ["is an architecture field here: set model_cfg.sliding_window"],
    "num_selected_blocks": ["is an architecture field here: set model_cfg.num_selected_blocks"],
    "compress_block_size": ["is an architecture field here: set model_cfg.compress_block_size"],
    "selection_block_size": ["is an architecture field here: set model_cfg.selection_block_size"],
}


def test_fields_that_are_ours():
    assert set(REAL.split()) <= set(GENERIC_FIELDS)
    assert SPELLED.items() <= RENAMED.items()


@pytest.mark.parametrize("field", REFUSED)
def test_others_are_refused_with_what_to_use(field):
    for words in ([f"{field}=true"], [f"--{field}", "true"]):
        (problem,) = parse(words).problems
        assert problem.startswith("command line: ") and all(part in problem for part in REFUSED[field])


def test_in_a_file_they_are_refused_with_their_line(write):
    write("x.yaml", "defaults: [mine, _self_]\nbfloat16: true\nmodel_dim: 3\n")
    of_16, width = refused("x.yaml")
    assert of_16.startswith("x.yaml:2: ") and REFUSED["bfloat16"][0] in of_16
    assert width == f"x.yaml:3: {REFUSED['model_dim'][0]}"


def test_who_sets_the_learning_rate_is_told_what_it_moves():
    def notes(*words: str) -> list[str]:
        said: list[str] = []
        compose(["model=gpt2", "preset=nano", *words], said.append)
        return [n for n in said if n.startswith("learning_rate ")]

    (note,) = notes("--learning_rate=1e-3", "optimizer=muon")
    assert "is the rate of everything but the matrices" in note and "muon_learning_rate (" in note
    assert not notes("learning_rate=1e-3", "optimizer=adamw") and not notes("optimizer=muon")
    assert not notes("learning_rate=1e-3", "optimizer=muon", "muon_learning_rate=0.01")


# -- words that YAML 1.1 reads in its own way --------------------------------------------------------------------------

OTHERWISE = ["010", "-012", "12:30", "1:30:45.5", "0x10", "0b11", "00.5", "yes", "No", "ON", "off"]


@pytest.mark.parametrize("word", [*OTHERWISE, "1e3", "true", "3", "0.10", "1_000"])
def test_a_word_means_the_same_in_yaml_and_on_the_command_line(write, word):
    path = write("x.yaml", f"seed: {word}\nlearning_rate: {word}\nenv: {{FOO: {word}}}\n")
    in_file = read(path).values
    on_line = parse([f"seed={word}", f"learning_rate={word}", f"env.FOO={word}"]).values
    assert in_file.pop("env") == {"FOO": on_line.pop("env.FOO")} == {"FOO": word}
    assert in_file == on_line and {type(v) for v in in_file.values()} == {type(v) for v in on_line.values()}
    assert word not in OTHERWISE or set(in_file.values()) == {word}


def test_as_text_it_is_kept_and_where_a_number_or_a_truth_value_belongs_refused(write):
    write("x.yaml", "defaults: [mine, _self_]\nsample_prompt: 12:30\n")
    assert quiet("x.yaml")[0].sample_prompt == "12:30"
    write("x.yaml", "defaults: [mine, _self_]\nseed: 010\npacking: on\nlearning_rate: 0x10\n")
    seed, packing, rate = sorted(refused("x.yaml"))
    assert seed == "x.yaml:2: seed: expected int, got '010' (str). Write 10"
    assert packing == "x.yaml:3: packing: expected bool, got 'on' (str). Write true"
    assert rate == "x.yaml:4: learning_rate: expected float, got '0x10' (str)"


def test_a_shipped_file_is_read_by_hydra_unless_it_would_read_another_value(write):
    assert read(write("one.yaml", "defaults: [mine]\nseed: 10\n")).plain
    assert not read(write("two.yaml", "defaults: [mine]\nsample_prompt: 12:30\n")).plain


def test_marks_and_line_ends_of_editors_change_nothing(work):
    plain = "# Mine.\ndefaults: [mine, _self_]\nseed: 3\nsample_prompt: a\n"
    (work / "plain.yaml").write_text(plain)
    (work / "edited.yaml").write_bytes(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())
    assert quiet("plain.yaml") == quiet("edited.yaml")


@pytest.mark.parametrize("value", [".nan", "-.inf"])
def test_numbers_that_are_none_are_refused_with_their_line(write, value):
    write("x.yaml", f"defaults: [mine, _self_]\nmodel_cfg:\n  dropout: {value}\n")
    with pytest.raises(ConfigError, match=r"^x.yaml:3: model_cfg.dropout: "):
        quiet("x.yaml")
