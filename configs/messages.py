"""Errors for people: one line per problem, where it is, what to do, the nearest legal value."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from naming import suggestion

# Spellings that mean the same field everywhere: applied to the command line and to every file.
RENAMED = {
    "seq_len": "train_seq_len",
    "resume_from_checkpoint": "resume",
    "log_to_wandb": "use_wandb",
    "wandb_log": "use_wandb",
}
ARCHITECTURE_ALIASES = {
    "model_dim": "d_model",
    "num_layers": "n_layers",
    "num_main_layers": "n_layers",  # of H-Net: those of the innermost stage
    "block_size": "n_ctx",
    "num_heads": "n_heads",
    "num_kv_heads": "n_kv_heads",
}
# Names that other projects use. They are not accepted, but lead the suggestions.
SYNONYMS = {
    "n_layer": "model_cfg.n_layers",
    "n_embd": "model_cfg.d_model",
    "hidden_dim": "model_cfg.d_model",
    "hidden_size": "model_cfg.d_model",
    "n_head": "model_cfg.n_heads",
    "max_seq_len": "train_seq_len",
    "max_length": "train_seq_len",
    "max_iters": "num_iterations",
    "max_steps": "num_iterations",
    "epochs": "num_epochs",
    "eval_interval": "val_loss_every",
    "eval_steps": "val_loss_every",
    "eval_iters": "val_steps",
    "log_interval": "logging_steps",
    "compile": "torch_compile",
    "grad_clip": "max_grad_norm",
    "lr": "learning_rate",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "wd": "weight_decay",
    "warmup_iters": "warmup_steps",
    "lr_decay_iters": "lr_decay_steps",
    "out_dir": "output_dir",
    "dataset": "data",
    "dtype": "mixed_precision",
    "precision": "mixed_precision",
    "grad_accum": "gradient_accumulation_steps",
    "micro_batch_size": "batch_size",
    "nproc": "num_gpus",
    "init_from": "init_from_checkpoint",
    "wandb": "use_wandb",
    "wandb_mode": "use_wandb",
    "wandb_name": "wandb_run_name",
    "tensorboard": "use_tensorboard",
}
# Fields of a model that other projects have beside the generic ones -> what an architecture calls them.
MOVED = {
    "n_mtp_tokens": "n_mtp_tokens",
    "use_deepseek_mtp": "use_deepseek_mtp",
    "sliding_window_size": "sliding_window",
    "num_selected_blocks": "num_selected_blocks",
    "compress_block_size": "compress_block_size",
    "selection_block_size": "selection_block_size",
}
_NO_SHARDS = (
    "every process of num_gpus holds all weights, and gradients are averaged; weights are not sharded. What does not "
    "fit takes gradient_checkpointing=true, or fewer rows at a time (batch_size)"
)
_OTHER_TEXT = (
    "text is data=<source> with its files (input_file, train_files), and data_root leads relative paths"
)
_NO_FP8 = "products in FP8 are not offered, mixed_precision=bf16 is the narrowest format here"
# Fields of other code that are none here, by the last part of their name -> what to use, or why there is nothing.
NO_FIELDS = {
    "BLOCK_SIZE": "tiles of kernels follow from shape and GPU (bench kernels --tune finds them). How attention is "
    "computed is a choice of the run: kernels.attention",
    "IS_MODAL": _OTHER_TEXT,
    "bfloat16": "weights are fp32, and what is computed in 16 bits is a choice of the run: mixed_precision=bf16. "
    "Weights in files: save_precision=bf16",
    "dispatch": "how experts are computed is a choice of the run: kernels.grouped_linear=reference loops over them, "
    "auto takes what suits the device",
    "decode": "how text is written is said where it is: generate --speculative",
    "distributed_strategy": _NO_SHARDS,
    "dummy": "in the code that hnet_x_nsa follows it put plain attention in the place of a GPU's, to try shapes out "
    "on a CPU. Here every model runs on either, and kernels.attention chooses",
    "eos_id": "the token that ends a document is the tokenizer's; of bytes it is 256, and begins the next one too",
    "fp8_mlp": _NO_FP8,
    "fsdp_sharding_strategy": _NO_SHARDS,
    "local_data_path": _OTHER_TEXT,
    "memory_efficient": "logits of one head exist at a time in any case. How its loss is computed is a choice of the "
    "run: kernels.linear_cross_entropy",
    "modal_data_path": _OTHER_TEXT,
    "pad_id": "what fills a row or a patch up stands for no id, and nothing sees it",
    "proj_fp8": _NO_FP8,
    "spec_heads": "how many tokens are drafted is said where text is written: generate --speculative --draft N",
    "use_adam_mini": "Adam-mini is not offered. optimizer=muon keeps half of Adam's state for matrices, optimizer=sgd "
    "for everything",
    "use_fp8": _NO_FP8,
    "use_liger": "how the loss of a head is computed is a choice of the run: kernels.linear_cross_entropy",
}
_SECRET = re.compile(r"KEY|TOKEN(?!IZERS_)|SECRET|PASS|AUTH|CREDENTIAL|DATABASE_URL", re.IGNORECASE)
# Of a language's own variables all but those that say how it prints and counts: further ones come with every version.
_LOADS = re.compile(
    r"(LD|DYLD|GLIBC|GIT|XDG)_\w+|PERL5\w+|RUBY(OPT|LIB)|NODE_(OPTIONS|PATH)|OMP_TOOL\w*"
    r"|PYTHON(?!(UNBUFFERED|HASHSEED|UTF8|IOENCODING|FAULTHANDLER)$)\w*"
    r"|PATH|HOME|BASH_ENV|ENV|SHELL|GCONV_PATH|CC|CXX|GCC_EXEC_PREFIX|COMPILER_PATH|LIBRARY_PATH|CPATH|NVCC_\w+_FLAGS"
    r"|OPENSSL_CONF|HF_MODULES_CACHE|MYTRAINER_CACHE|CUDA_(HOME|PATH|CACHE_PATH|INJECTION\w*)|TRITON_\w*(PATH|DIR|HOME)"
    r"|TORCH(_EXTENSIONS_DIR|INDUCTOR_\w+|_HOME|_LOGS_OUT|DYNAMO_\w+)|NCCL_\w*PLUGIN|\w*TRUST_REMOTE_CODE",
    re.IGNORECASE,
)
REDACTED = "<redacted>"
TRUSTED = "MYTRAINER_TRUST"  # by which processes of a run hear whose code they may import


def own_words(spelled: Iterable[str]) -> str:
    """What to say besides where keys are taken for another spelling that some architecture has as a word of its own."""
    import models

    return "".join(
        f"; of type {type_}, {row.own_words[word]}"
        for type_, row in models.ARCHITECTURES.items()
        for word in row.own_words
        if f"model_cfg.{word}" in spelled
    )


class ConfigError(ValueError):
    """The user's mistakes, all of one stage together. Each problem is `<where>: <what>. <what to do>`."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:  # survives the way back from a sweep worker
        return type(self), (self.problems,)

    def report(self) -> str:
        """The text for stderr."""
        count = len(self.problems)
        lines = [f"config error: {p}" for p in self.problems]
        return "\n".join([*lines, f"{count} problem{'s' * (count != 1)}; nothing was started"])


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name must never be written or printed."""
    return bool(_SECRET.search(name))


def loads_code(name: str) -> bool:
    """Whether an environment variable of this name decides what code a program loads, or where it looks for it."""
    return name == TRUSTED or bool(_LOADS.fullmatch(name))


def suggest_key(key: str, siblings: Iterable[str], paths: Iterable[str] = ()) -> str:
    """Up to three suggestions for an unknown key, for use behind a sentence; or why it is none here.

    `key` may be dotted. Sources, best first: what other projects call it, the keys beside it, and every
    full path whose last part is similar.
    """
    prefix, _, leaf = key.rpartition(".")
    if leaf in NO_FIELDS:
        return f" It is no field here: {NO_FIELDS[leaf]}"
    prefix = prefix + "." if prefix else ""
    by_leaf: dict[str, list[str]] = {}
    for path in paths:
        by_leaf.setdefault(path.rpartition(".")[2], []).append(path)
    found: list[str] = []
    if leaf in SYNONYMS:
        found.append(SYNONYMS[leaf])
    if leaf in ARCHITECTURE_ALIASES:
        found.append(f"model_cfg.{ARCHITECTURE_ALIASES[leaf]}")
    found += [SYNONYMS[s] for s in difflib.get_close_matches(leaf, SYNONYMS, n=1, cutoff=0.8)]
    found += by_leaf.get(leaf, [])
    found += [prefix + s for s in difflib.get_close_matches(leaf, list(siblings), n=3, cutoff=0.6)]
    for name in difflib.get_close_matches(leaf, list(by_leaf), n=3, cutoff=0.6):
        found += by_leaf[name]
    return suggestion([f for f in dict.fromkeys(found) if f != key][:3])


def differences(asked: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """Names whose values differ; a name missing on either side is no difference."""
    return [k for k in fixed if k in asked and asked[k] != fixed[k]]
