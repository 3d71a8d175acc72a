"""Files of three sections: every key in our names, what is left out, and what is refused."""

from pathlib import Path

import pytest
import yaml

from configs.files import read_model
from configs.formats import memory_sections
from tests.configs.formats.composed import quiet, refused
from tests.pretrained import base_of

SMALL = """
model:
  hidden_dim: 64
  num_heads: 4
  num_layers: 2
  intermediate_dim: 128
  vocab_size: 1024
  max_seq_len: 64
memory:
  num_memory_tokens: 32
  use_chapters: true
  num_chapters: 4
  top_k_chapters: 2
training:
  training_mode: pretraining
  dataset_name: allenai/c4
  dataset_subset: en
  text_field: text
  max_length: 32
  max_steps: 300
"""
EMBEDDED = ["data=embedded", "dataset_name=null", "training_mode=pretraining"]
# Every key -> (a value that is no default, our field, its value).
MODEL = {
    "hidden_dim": (32, "d_model", 32),
    "num_heads": (2, "n_heads", 2),
    "num_kv_heads": (2, "n_kv_heads", 2),
    "num_layers": (3, "n_layers", 3),
    "intermediate_dim": (96, "ffn_hidden", 96),
    "vocab_size": (2048, "vocab_size", 2048),
    "max_seq_len": (128, "n_ctx", 128),
    "use_rope": (False, "use_rope", False),
    "rope_theta": (500.0, "rope_theta", 500.0),
    "dropout": (0.1, "dropout", 0.1),
    "attention_dropout": (0.1, "attention_dropout", 0.1),
    "norm_eps": (1e-5, "norm_eps", 1e-5),
    "use_rms_norm": (False, "use_rmsnorm", False),
    "use_flash_attention": (False, "use_flash_attention", False),
    "tie_embeddings": (False, "tie_embeddings", False),
    "initializer_range": (0.01, "initializer_range", 0.01),
    "tokenizer_name": ("byte", "tokenizer", "byte"),
}
MEMORY = {
    "num_memory_tokens": 64,
    "memory_dim": 16,
    "memory_num_heads": 2,
    "memory_num_kv_heads": 1,
    "memory_layer_placement": "none",
    "memory_layer_k": 1,
    "memory_layer_n": 2,
    "memory_sharing": "per_layer",
    "memory_sharing_k": 3,
    "memory_block_variant": "B",
    "use_low_rank_memory": True,
    "memory_rank": 8,
    "low_rank_mode": "reduced_dim",
    "use_low_rank_projections": True,
    "projection_rank": 8,
    "num_chapters": 8,
    "tokens_per_chapter": 8,
    "top_k_chapters": 1,
    "num_shared_chapters": 1,
    "routed_scaling_factor": 2.0,
    "routing_strategy_train": "token",
    "routing_strategy_inference": "rolling",
    "routing_window_size": 4,
    "routing_causality": "lookahead",
    "chapter_weighting": "none",
    "use_load_balance_loss": False,
    "load_balance_coefficient": 0.5,
    "use_auxiliary_loss": True,
    "auxiliary_loss_coefficient": 0.5,
    "use_z_loss": True,
    "z_loss_coefficient": 0.5,
    "quantize_memory": True,
    "memory_quant_bits": 4,
    "wo_init_zero": False,
    "memory_init_std": 0.1,
}
TRAINING = {
    "memory_lr": (2e-4, "memory_lr", 2e-4),
    "memory_bank_lr": (2e-4, "memory_bank_lr", 2e-4),
    "lora_lr": (2e-4, "lora_lr", 2e-4),
    "base_model_lr": (2e-4, "base_model_lr", 2e-4),
    "dataset_name": ("any/other", "dataset_name", "any/other"),
    "dataset_subset": ("de", "dataset_subset", "de"),
    "dataset_split": ("dev", "dataset_split", "dev"),
    "eval_split": ("dev", "eval_split", "dev"),
    "text_field": (["a", "b"], "text_field", ["a", "b"]),
    "max_length": (16, "train_seq_len", 16),
    "batch_size": (2, "batch_size", 2),
    "gradient_accumulation_steps": (2, "gradient_accumulation_steps", 2),
    "num_epochs": (1.5, "num_epochs", 1.5),
    "max_steps": (400, "num_iterations", 400),
    "warmup_steps": (7, "warmup_steps", 7),
    "warmup_ratio": (0.1, "warmup_ratio", 0.1),
    "optimizer": ("sgd", "optimizer", "sgd"),
    "weight_decay": (0.2, "weight_decay", 0.2),
    "adam_beta1": (0.8, "adam_beta1", 0.8),
    "adam_beta2": (0.99, "adam_beta2", 0.99),
    "adam_epsilon": (1e-7, "adam_epsilon", 1e-7),
    "max_grad_norm": (0.5, "max_grad_norm", 0.5),
    "scheduler": ("linear", "scheduler", "linear"),
    "min_lr_ratio": (0.2, "min_lr_ratio", 0.2),
    "mixed_precision": ("no", "mixed_precision", "no"),
    "save_precision": ("bf16", "save_precision", "bf16"),
    "gradient_checkpointing": (False, "gradient_checkpointing", False),
    "save_steps": (50, "save_steps", 50),
    "eval_steps": (50, "val_loss_every", 50),
    "save_total_limit": (2, "save_total_limit", 2),
    "save_best_model": (False, "save_best_model", False),
    "early_stopping": (True, "early_stopping", True),
    "early_stopping_patience": (5, "early_stopping_patience", 5),
    "early_stopping_threshold": (0.1, "early_stopping_threshold", 0.1),
    "logging_steps": (5, "logging_steps", 5),
    "log_to_wandb": ("offline", "use_wandb", "offline"),
    "wandb_project": ("mine", "wandb_project", "mine"),
    "wandb_run_name": ("mine", "wandb_run_name", "mine"),
    "output_dir": ("here", "output_dir", "here"),
    "seed": (3, "seed", 3),  # ours
}
# What a machine, a folder or other sections decide besides, with tests of their own.
ELSEWHERE = {
    "model": {"base_model_name", "base_model_revision", "freeze_base_model"},
    "memory": {
        *("vanilla_mode", "use_memory_adapter", "use_lora", "use_both_memory_and_lora", "use_chapters"),
        *("memory_layer_indices", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
    },
    "training": {
        *("training_mode", "num_gpus", "distributed_strategy", "fsdp_sharding_strategy", "lr_scaling"),
        *("resume_from_checkpoint", "init_from_checkpoint"),
    },
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function (section, key, value, ...) -> path of the small file with these."""
    monkeypatch.chdir(tmp_path)

    def made(*entries):
        sections = yaml.safe_load(SMALL)
        for section, key, value in entries:
            sections[section][key] = value
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))
        return str(tmp_path / "mine.yaml")

    return made


def test_tables_name_every_key():
    tested = {"model": MODEL.keys(), "memory": MEMORY.keys(), "training": TRAINING.keys() - {"seed"}}
    for section, keys in memory_sections.defaults().items():
        assert keys.keys() == tested[section] | ELSEWHERE[section]


@pytest.mark.parametrize("section", ["model", "memory", "training"])
def test_every_key_is_a_field(file, section):
    """Which has that value, and another one where the key is not given. What the field does is tested where it is."""
    own = {key: (value, key, value) for key, value in MEMORY.items()}
    cases = {"model": MODEL, "memory": own, "training": TRAINING}[section]
    for key, (value, field, meant) in cases.items():
        before, after = (
            flat(read_model(Path(file(*given))).values) for given in ([], [(section, key, value)])
        )
        assert after.pop(field) == meant != before.pop(field, None), key
        assert key == "dataset_name" or after == before, key


def flat(values):
    return {**values, **values["model_cfg"], "model_cfg": None}


def test_all_of_it_composes(file):
    together = {"low_rank_mode": "factorized", "tokens_per_chapter": 8, "memory_layer_placement": "first_k"}
    path = file(
        *(
            ("model", key, value)
            for key, (value, *_) in MODEL.items()
            if key not in ("num_heads", "tokenizer_name")
        ),
        *(("memory", key, value) for key, value in {**MEMORY, **together}.items()),
        *(("training", key, value) for key, (value, *_) in TRAINING.items()),
    )
    cfg, model_cfg = quiet(path)
    assert (cfg.batch_size, cfg.gradient_accumulation_steps, cfg.global_batch_size) == (2, 2, 4)
    assert (cfg.train_seq_len, model_cfg.n_ctx, model_cfg.memory_heads) == (16, 128, (2, 1))
    assert cfg.num_gpus == 1 and not cfg.use_lora


def test_what_is_left_out_is_the_original_s(file):
    cfg, model_cfg = quiet(str(memory_sections.DEFAULTS))
    assert cfg.type == "memory" and (cfg.data, cfg.dataset_split) == ("hf", "train_sft")
    assert (model_cfg.d_model, model_cfg.ffn_hidden, model_cfg.norm_eps) == (768, 3072, 1e-6)
    assert (cfg.optimizer, cfg.scheduler, cfg.warmup_ratio, cfg.lr_scaling) == (
        "adamw",
        "cosine",
        None,
        "none",
    )
    assert (cfg.global_batch_size, cfg.num_iterations, cfg.base_model_lr) == (16, 10000, 1e-5)
    of_mine, _ = quiet(file())
    assert (of_mine.dataset_split, of_mine.eval_split) == ("train", "test"), "of another data set"
    assert of_mine.val_seq_len is None and of_mine.batch_stages is None


def test_the_command_line_wins_in_either_spelling(file):
    path = file()
    cfg, model_cfg = quiet(
        path, *EMBEDDED, "model_cfg.hidden_dim=32", "model_cfg.max_seq_len=48", "num_iterations=200"
    )
    assert (model_cfg.d_model, model_cfg.n_ctx, cfg.num_iterations, cfg.data) == (32, 48, 200, "embedded")
    (problem,) = refused(path, *EMBEDDED, "model_cfg.hidden_dim=32", "model_cfg.d_model=64")
    assert "name the same field. Keep model_cfg.d_model" in problem
    _, model_cfg = quiet("model=memory", "preset=none", "model_cfg.use_rms_norm=false")
    assert not model_cfg.use_rmsnorm
    (problem,) = refused("model=gpt2", "preset=none", "model_cfg.hidden_dim=64")
    assert "unknown key 'model_cfg.hidden_dim' for type 'gpt2'" in problem


def test_our_own_files_of_these_types_have_the_spellings_too(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("defaults: [memory, _self_]\nmodel_cfg: {hidden_dim: 96}\n")
    assert quiet(str(path), "preset=none")[1].d_model == 96
    path.write_text("defaults: [memory, _self_]\nmodel_cfg: {hidden_dim: 96, d_model: 48}\n")
    (problem,) = refused(str(path), "preset=none")
    assert "model_cfg.d_model (48) and model_cfg.hidden_dim (96) name the same field" in problem


MODES = [
    ({"vanilla_mode": True}, (True, False)),
    ({"vanilla_mode": True, "use_memory_adapter": False}, (True, False)),
    ({}, (False, False)),
    ({"use_memory_adapter": False, "use_lora": True}, (True, True)),
    ({"use_both_memory_and_lora": True}, (False, True)),
    ({"use_both_memory_and_lora": True, "use_lora": True}, (False, True)),
    ({"vanilla_mode": True, "use_lora": True}, (True, True)),
]


@pytest.mark.parametrize(("switches", "meant"), MODES, ids=str)
def test_switches_together(switches, meant, file):
    node = read_model(Path(file(*(("memory", key, value) for key, value in switches.items()))))
    assert (node.values["model_cfg"]["vanilla_mode"], node.values["use_lora"]) == meant


WRONG = [
    ("memory", {"vanilla_mode": True, "use_both_memory_and_lora": True}, "contradict each other"),
    ("memory", {"use_memory_adapter": False, "use_both_memory_and_lora": True}, "needs the memory"),
    ("memory", {"use_lora": True}, "adapters alone, and there is a memory besides"),
    ("memory", {"use_lora": "yes"}, "use_lora: expected true or false, got 'yes'"),
    (
        "model",
        {"hidden_dim": 64, "d_model": 64},
        "'d_model' sets model_cfg.d_model, as 'hidden_dim' does on line",
    ),
    ("training", {"max_steps": 3, "num_iterations": 4}, "sets num_iterations, as 'max_steps' does on line"),
    ("training", {"distributed_strategy": "fsdp"}, "distributed_strategy: fsdp is not offered"),
    ("training", {"distributed_strategy": "dpp"}, "Did you mean 'ddp'"),
    ("training", {"fsdp_sharding_strategy": "FULL"}, "'FULL' is not one of FULL_SHARD"),
    ("training", {"hidden_dim": 64}, "training.hidden_dim: it belongs under model"),
    ("memory", {"hidden_dim": 64}, "memory.hidden_dim: it belongs under model"),
    ("memory", {"d_model": 64}, "memory.d_model: it belongs under model"),
    ("model", {"use_chapters": False}, "model.use_chapters: it belongs under memory"),
    ("model", {"use_lora": True}, "model.use_lora: it belongs under memory"),
    ("training", {"lora_rank": 4}, "training.lora_rank: it belongs under memory"),
    ("memory", {"num_iterations": 4}, "memory.num_iterations: it belongs under training"),
    (
        "model",
        {"freeze_base_model": "banana"},
        "freeze_base_model: input should be a valid boolean, got 'banana'",
    ),
    ("model", {"dropout": 1.0}, "model_cfg.dropout: must satisfy 0 <= dropout < 1"),
    (
        "model",
        {"attention_dropout": 1.0},
        "model_cfg.attention_dropout: must satisfy 0 <= attention_dropout < 1",
    ),
    (
        "memory",
        {"num_memory_token": 64},
        "memory.num_memory_token: unknown key. Did you mean 'num_memory_tokens'",
    ),
    ("training", {"type": "gpt2"}, "training.type: unknown key"),
    ("model", {"hidden_dim": "${x}"}, "have a meaning in our YAML files"),
    ("memory", {"top_k_chapters": 9}, "must not exceed num_chapters (4)"),
    ("training", {"max_length": 128}, "train_seq_len (128) must not exceed model_cfg.n_ctx (64)"),
    ("model", {"num_layers": 0}, "model_cfg.n_layers"),
]


@pytest.mark.parametrize(("section", "entries", "message"), WRONG, ids=[w[2][:50] for w in WRONG])
def test_what_is_wrong_is_told_with_its_line(section, entries, message, file):
    path = file(*((section, key, value) for key, value in entries.items()))
    problem = next(p for p in refused(path) if message in p)
    assert "mine.yaml:" in problem.partition(": ")[0]


def test_sections_alone(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL + "seed: 3\ntrainin: {}\n")
    seed, typo = refused(str(path))
    assert ": seed is no section" in seed and "Did you mean 'training'" in typo
    path.write_text(SMALL.replace("memory:", "memory: 3\nold:"))
    assert any("memory: keys and their values are meant, got 3" in p for p in refused(str(path)))


def test_a_base_of_no_use_is_dropped(file):
    assert (
        "freeze_base_model"
        not in read_model(Path(file(("model", "freeze_base_model", True)))).values["model_cfg"]
    )


def on_a_base(tmp_path, base, model="", training="max_length: 32"):
    """Path of a file of three sections on a base, with these entries."""
    path = tmp_path / "on_a_base.yaml"
    path.write_text(
        f"model: {{base_model_name: {base}, {model}}}\nmemory: {{num_memory_tokens: 8}}\n"
        f"training: {{training_mode: pretraining, {training}}}\n"
    )
    return str(path)


@pytest.mark.xdist_group("transformers")
def test_sizes_beside_a_base_are_the_base_s(tmp_path):
    base = base_of("qwen2")
    _, model_cfg = quiet(on_a_base(tmp_path, base), *EMBEDDED)
    full = model_cfg.completed()
    assert (full.vocab_size, full.d_model, full.n_heads, full.n_layers) == (300, 64, 4, 2)
    assert (full.n_kv_heads, full.ffn_hidden, full.n_ctx) == (2, 96, 128)
    same = (
        "vocab_size: 300, hidden_dim: 64, num_heads: 4, num_kv_heads: 2, num_layers: 2, intermediate_dim: 96"
    )
    same += ", use_rope: true, rope_theta: 10000, tie_embeddings: false, attention_dropout: 0.0"
    stated = quiet(on_a_base(tmp_path, base, f"{same}, max_seq_len: 64, tokenizer_name: {base}"), *EMBEDDED)
    assert stated[1].completed() == full.model_copy(update={"n_ctx": 64}) and stated[0].tokenizer == "auto"
    assert quiet(on_a_base(tmp_path, base, "tokenizer_name: byte"), *EMBEDDED)[0].tokenizer == "byte"


@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hidden_dim: 32", "model_cfg.d_model (32) must be that of"),
        ("intermediate_dim: 32", "model_cfg.ffn_hidden (32) must be that of"),
        ("num_kv_heads: 1", "model_cfg.n_kv_heads (1) must be that of"),
        ("max_seq_len: 256", "model_cfg.n_ctx (256) must not exceed the 128 positions of"),
        (
            "max_seq_len: 16",
            "train_seq_len (32) must not exceed model_cfg.n_ctx (16). Nearest: train_seq_len=16",
        ),
        ("max_seq_len: many", "model_cfg.n_ctx"),
        ("hiden_dim: 64", "model.hiden_dim: unknown key. Did you mean 'hidden_dim'"),
        ("rope_theta: -1", "model.rope_theta: input should be greater than 0, got -1"),
        ("use_rope: often", "model.use_rope: input should be a valid boolean, got 'often'"),
        ("attention_dropout: 1.0", "model.attention_dropout: input should be less than 1, got 1.0"),
        ("rope_theta: 500.0", "model.rope_theta: it must be that of "),
        ("rope_theta: 500.0", ", 10000.0, got 500.0: leave it out"),
        ("use_rope: false", ", true, got False: leave it out"),
        ("tie_embeddings: true", ", false, got True: leave it out"),
        ("attention_dropout: 0.5", ", 0.0, got 0.5: leave it out"),
        ("freeze_base_model: banana", "freeze_base_model"),
        ("initializer_range: 0", "initializer_range"),
    ],
)
def test_what_is_wrong_beside_a_base_is_told(model, message, tmp_path):
    (problem,) = refused(on_a_base(tmp_path, base_of("qwen2"), model), *EMBEDDED)
    assert message in problem


BASE_SMALL = """
model: {hidden_dim: 768, num_heads: 12, num_layers: 12, intermediate_dim: 3072, vocab_size: 32000, max_seq_len: 8192,
        use_rope: true, tokenizer_name: bpe-32000}
memory: {vanilla_mode: false, num_memory_tokens: 4096, memory_layer_placement: all, memory_sharing: shared,
         memory_block_variant: A, use_chapters: true, num_chapters: 16, top_k_chapters: 4, use_load_balance_loss: true,
         load_balance_coefficient: 0.01}
training: {memory_lr: 1.0e-4, lora_lr: 1.0e-4, base_model_lr: 1.0e-4, training_mode: pretraining,
           dataset_name: allenai/c4, dataset_subset: en, dataset_split: train, eval_split: validation, text_field: text,
           max_length: 2048, batch_size: 8, gradient_accumulation_steps: 8, max_steps: 50000, warmup_steps: 1000,
           weight_decay: 0.1, scheduler: cosine, mixed_precision: bf16, save_steps: 2000, eval_steps: 1000,
           save_total_limit: 3, output_dir: outputs/base_small}
"""
ADAPTER = """
model: {base_model_name: Qwen/Qwen2.5-1.5B, freeze_base_model: true}
memory: {vanilla_mode: false, num_memory_tokens: 2048,
         memory_layer_placement: custom, memory_layer_indices: [0, 1, 2, 3, 4, 23, 24, 25, 26, 27],
         memory_sharing: shared, memory_block_variant: A, use_chapters: true, num_chapters: 8, top_k_chapters: 2,
         use_low_rank_memory: true, memory_rank: 256, low_rank_mode: factorized,
         use_low_rank_projections: true, projection_rank: 128}
training: {memory_lr: 2.0e-4, lora_lr: 1.0e-4, base_model_lr: 0.0, training_mode: instruction_finetuning,
           dataset_name: HuggingFaceH4/ultrachat_200k, dataset_split: train_sft, eval_split: test_sft,
           text_field: messages, max_length: 4096, batch_size: 2, gradient_accumulation_steps: 16, max_steps: 5000,
           warmup_steps: 100, weight_decay: 0.01, output_dir: outputs/adapter_qwen2.5_1.5b}
"""
SHIPPED = {
    "base_small": BASE_SMALL,
    "vanilla_control": BASE_SMALL.replace(
        "vanilla_mode: false", "vanilla_mode: true, use_memory_adapter: false"
    )
    .replace("use_chapters: true", "use_chapters: false")
    .replace("base_small", "vanilla_control"),
    "adapter_qwen2.5_1.5b": ADAPTER,
    "memory_lora_combined": ADAPTER.replace("num_memory_tokens: 2048", "num_memory_tokens: 1024")
    .replace(
        "custom, memory_layer_indices: [0, 1, 2, 3, 4, 23, 24, 25, 26, 27]",
        "every_n, memory_layer_n: 4, use_both_memory_and_lora: true",
    )
    .replace("num_chapters: 8, top_k_chapters: 2", "num_chapters: 4, top_k_chapters: 1")
    .replace("memory_rank: 256", "memory_rank: 128")
    .replace("use_low_rank_projections: true, projection_rank: 128", "use_low_rank_projections: false")
    .replace("outputs/adapter_qwen2.5_1.5b", "outputs/memory_lora_combined"),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_what_their_sections_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sections.yaml").write_text(SHIPPED[name])
    ours, theirs = quiet(f"model={name}"), quiet(str(tmp_path / "sections.yaml"))
    assert ours == theirs
