"""Fields of training that every architecture has: the default of each, and a value that there is not, refused by name.
What a field changes is shown where that happens."""

import re

import pytest

from configs.messages import ConfigError, suggest_key
from configs.schema import GENERIC_FIELDS, RunConfig
from configs.unread import unread
from tests.contract.tiny import config

# field -> (default, a value that is refused)
FIELDS = {
    "memory_lr": (1e-4, "-1"),
    "memory_bank_lr": (None, "-1"),
    "lora_lr": (1e-4, "-1"),
    "base_model_lr": (None, "-1"),
    "use_lora": (False, "7"),
    "lora_rank": (16, "0"),
    "lora_alpha": (32.0, "0"),
    "lora_dropout": (0.05, "1.0"),
    "lora_targets": (None, "[]"),
    "dataset_name": (None, "7"),
    "dataset_split": ("train", "null"),
    "train_seq_len": (1024, "0"),
    "val_seq_len": (None, "0"),
    "num_gpus": ("auto", "0"),
    "batch_size": ("auto", "0"),
    "gradient_accumulation_steps": (None, "0"),
    "num_epochs": (None, "0"),
    "num_iterations": (1750, "0"),
    "warmup_steps": (0, "-1"),
    "warmup_ratio": (None, "1.5"),
    "optimizer": ("adamw", "adamx"),
    "weight_decay": (0.1, "-0.1"),
    "adam_beta1": (0.9, "1.0"),
    "adam_beta2": (0.95, "1.0"),
    "adam_epsilon": (1e-8, "0"),
    "max_grad_norm": (1.0, "-1"),
    "scheduler": ("cooldown", "cosin"),
    "min_lr_ratio": (0.1, "1.5"),
    "mixed_precision": ("auto", "fp8"),
    "save_precision": (None, "fp8"),
    "gradient_checkpointing": (False, "7"),
    "save_steps": (None, "0"),
    "val_loss_every": (125, "-1"),
    "save_total_limit": (3, "0"),
    "save_best_model": (False, "7"),
    "early_stopping": (False, "7"),
    "early_stopping_patience": (3, "0"),
    "early_stopping_threshold": (0.0, "-0.1"),
    "logging_steps": (10, "0"),
    "use_wandb": (False, "sometimes"),
    "wandb_project": ("mytrainer", "''"),
    "wandb_run_name": (None, "''"),
    "output_dir": (None, "''"),
    "resume": ("none", "''"),
}


@pytest.mark.parametrize(("field", "default", "refused"), [(f, *row) for f, row in FIELDS.items()])
def test_a_field_has_its_default_and_refuses_what_it_is_not(field, default, refused):
    assert getattr(RunConfig(type="x"), field) == default
    with pytest.raises(ConfigError, match=rf"\b{field}\b"):
        config("gpt2", f"{field}={refused}")


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("max_steps", "num_iterations"),
        ("max_length", "train_seq_len"),
        ("eval_steps", "val_loss_every"),
    ],
)
def test_words_of_other_projects_lead_to_ours(word, field):
    assert re.search(rf"\b{field}\b", suggest_key(word, GENERIC_FIELDS))


def test_the_rate_of_a_base_that_adapters_leave_alone_is_not_read():
    run, architecture = config("gpt2")
    run = run.model_copy(update={"use_lora": True, "base_model_lr": 0.1})
    told = "not read by this run: base_model_lr (because of use_lora=true)"
    assert unread(run, architecture, {"base_model_lr"}) == told
