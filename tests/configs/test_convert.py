"""Model files as YAML and as directives: what is written composes to the same, and so on for ever."""

from __future__ import annotations

import random

import pytest

from configs.compose import prepare, tree_of
from configs.convert import to_directives, to_yaml
from configs.files import CONFIGS, read_model
from configs.messages import ConfigError

WRITERS = {"yaml": to_yaml, "config": to_directives}
LETTERS = "ab \\\"'#=[],:{}&*!%@`\n\t.é-0"


def tree(path):
    """What a file composes to."""
    return tree_of(prepare([str(path), "preset=none"]))


def converted(path, to, name):
    new = path.parent / f"{name}.{to}"
    new.write_text(WRITERS[to](read_model(path), new), encoding="utf-8")
    return new


def some_file(rng, path, parent="", own="use_rope=false n_kv_heads=null"):
    """A file of directives that is valid in its form, with whatever values. `own`: fields of its type."""
    text = "".join(rng.choices(LETTERS, k=rng.randrange(1, 12)))
    quoted = text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n").replace("\t", r"\t")
    lines = [
        "MODEL n_layer={} bias={}",
        f"MODEL {own}",
        "DATA batch_size=3 gradient_accumulation_steps={}",
        "DATA block_size={}",
        "TRAIN learning_rate={float} grad_clip=0",
        "LR_SCHEDULE warmup_iters={} decay_lr={bool}",
        "SYSTEM dtype=float32 compile={bool}",
        f'LOGGING wandb_run_name="{quoted}" always_save_checkpoint={{bool}}',
        f'ENV A{{}}={{}} B="{quoted}"',
        f'ADVANCED sample_prompt="{quoted}" ema_decay={{float}}',
        'ADVANCED lora_targets=[q_proj, "1e-4", "no"] kernels.attention=sdpa',
        'ADVANCED dataset_split="1e-4" eval_split="12:30" text_field="no"',
    ]
    lines = [
        line.replace("bias={}", "bias={bool}") for line in rng.sample(lines, rng.randrange(1, len(lines)))
    ]
    body = "\n".join(_filled(rng, line) for line in lines)
    path.write_text(f"{f'FROM {parent}' if parent else ''}\n{body}\n", encoding="utf-8")
    return path


def _filled(rng, line):
    line = line.replace("{bool}", rng.choice(["true", "False"]))
    line = line.replace("{float}", repr(rng.choice([1e-5, 0.5, 3e-4, 1e22])))
    while "{}" in line:
        line = line.replace("{}", str(rng.randrange(1, 9)), 1)
    return line


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 30))])
def test_both_formats_say_the_same_and_after_one_round_nothing_changes(tmp_path, seed):
    rng = random.Random(seed)
    parent = rng.choice(["", "small.config", "tiny.json", "gpt2.yaml"])
    own = {"own": "wpe_init_std=0.5 pad_vocab=false"} if parent in ("tiny.json", "gpt2.yaml") else {}
    some_file(rng, tmp_path / "root.config", parent, **own)
    file = some_file(rng, tmp_path / "file.config", "root", **own)
    yaml = converted(file, "yaml", "one")
    directives = converted(yaml, "config", "two")
    assert tree(yaml) == tree(file) == tree(directives)
    again = converted(directives, "yaml", "three")
    assert converted(again, "config", "four").read_text() == directives.read_text()
    assert tree(again) == tree(file)


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("150M.json", "config"),
        ("mine.py", "yaml"),
        pytest.param("150M.json", "yaml", marks=pytest.mark.slow),
        pytest.param("mine.py", "config", marks=pytest.mark.slow),
        pytest.param("inheritance-test.config", "config", marks=pytest.mark.slow),
        pytest.param("inheritance-test.config", "yaml", marks=pytest.mark.slow),
    ],
)
def test_every_format_is_read(tmp_path, name, to):
    (tmp_path / "mine.py").write_text("type = 'gpt2'\nn_layer = 2\nbatch_size = 3\nwandb_run_name = '007'\n")
    path = tmp_path / name if name == "mine.py" else CONFIGS / name
    new = tmp_path / f"new.{to}"
    new.write_text(WRITERS[to](read_model(path), new))
    assert tree(new) == tree(path)


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "papers/mamba_paper",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("hnet", "moe", "bd3lm", "sedd")),
    ],
)
def test_shipped_yaml_files_can_be_directives(tmp_path, name):
    new = tmp_path / "new.config"
    new.write_text(to_directives(read_model(CONFIGS / f"{name}.yaml"), new))
    assert tree(new) == tree(CONFIGS / f"{name}.yaml")


def test_a_yaml_file_builds_on_what_it_built_on(tmp_path):
    (tmp_path / "base.yaml").write_text("defaults: [gpt2]\nmodel_cfg: {n_layers: 3}\n")
    (tmp_path / "mine.yaml").write_text("defaults: [base]\nlearning_rate: 0.5\n")
    new = converted(tmp_path / "mine.yaml", "config", "new")
    assert new.read_text() == "FROM base.yaml\nMODEL type=gpt2\nTRAIN learning_rate=0.5\n"
    assert tree(new) == tree(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("val_files: []", "val_files: an empty list"),
        (
            "wandb_run_name: ${oc.env:HOME}",
            "wandb_run_name: '${oc.env:HOME}' has a meaning in YAML files alone",
        ),
        ("mix: [{data: embedded}]", "mix: {'data': 'embedded'} cannot be written"),
        ("batch_size: 3", "batch_size: batch_size means something else in a file of directives"),
        ("env: {A: null}", "env.A: expected text, got None"),
        ("env: {lower: x}", "env.lower: names of ENV"),
        ("env: {HF_TOKEN: x}", "env.HF_TOKEN is a secret, which is written to no file"),
        ('sample_prompt: "a\\rb"', "sample_prompt: '\\r' cannot be written"),
    ],
)
def test_what_directives_cannot_say_is_refused_by_name(tmp_path, text, part):
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [gpt2]\n{text}\n")
    with pytest.raises(ConfigError) as error:
        to_directives(read_model(path), tmp_path / "new.config")
    assert "mine.yaml: " in str(error.value) and part in str(error.value)


def test_what_builds_on_several_files_or_elsewhere_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [gpt2, preset/tiny]\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:1: defaults: what is converted builds on one file"):
        to_directives(read_model(tmp_path / "mine.yaml"), tmp_path / "new.config")
    (tmp_path / "base.yaml").write_text("defaults: [gpt2]\n")
    (tmp_path / "over.yaml").write_text("defaults: [base]\n")
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="and FROM names files in"):
        to_directives(read_model(tmp_path / "over.yaml"), tmp_path / "there" / "new")
    assert str(tmp_path / "base.yaml") in to_yaml(
        read_model(tmp_path / "over.yaml"), tmp_path / "there" / "new"
    )


def test_a_file_that_is_called_like_its_parent_is_no_cycle(tmp_path):
    (tmp_path / "mine.config").write_text("MODEL n_layer=2\n")
    new = tmp_path / "vanilla.yaml"
    new.write_text(to_yaml(read_model(tmp_path / "mine.config"), new))
    assert tree(new) == tree(tmp_path / "mine.config")
    beside = tmp_path / "beside.yaml"  # now there is another vanilla.yaml
    beside.write_text(to_yaml(read_model(tmp_path / "mine.config"), beside))
    assert str(CONFIGS / "vanilla") in beside.read_text() and tree(beside) == tree(new)
