"""From the command line to one typed configuration."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from configs import compose
from configs.compose import compose_tree, prepare
from configs.files import CONFIGS, ROOT
from configs.grid import check_grid
from configs.messages import ConfigError
from configs.schema import RunConfig
from configs.validate import validate
from models import ARCHITECTURES


def quiet(*words: str):
    return compose(list(words), notify=lambda text: None)


@pytest.mark.parametrize(
    "words",
    [
        ["--hydra_model_cfg=mine.yaml"],
        ["--hydra_model_cfg", "mine.yaml"],
        ["hydra_model_cfg=mine.yaml"],
        ["model=mine.yaml"],
        ["--config", "mine.yaml"],
        ["--config=./mine.yaml"],
        ["mine.yaml"],
        ["--config-path=.", "--config-name=mine"],
        ["-cp", ".", "-cn", "mine"],
        ["--hydra_model_cfg=m?ne.yaml"],
        ["--hydra_model_cfg='mine.yaml'"],
    ],
)
def test_every_spelling_of_the_flag_names_the_same_file(work, words):
    cfg, model_cfg = quiet(*words)
    assert (cfg.type, cfg.learning_rate, model_cfg.d_model) == ("fake_arch:Model", 0.001, 96)


@pytest.mark.parametrize(
    "value", ["gpt2", "configs/gpt2.yaml", f"{CONFIGS}/gpt2.yaml", "choice(gpt2)", "glob(gpt*)"]
)
def test_shipped_files_are_found_from_any_directory(work, value):
    tree = compose_tree(prepare([f"--hydra_model_cfg={value}", "preset=none"]).overrides)
    assert tree["type"] == "gpt2" and tree["scheduler"] == "cooldown"


def test_priority_class_then_base_then_file_then_preset_then_command_line(work):
    cfg, model_cfg = quiet("model=mine.yaml", "preset=tiny", "model_cfg.n_layers=7", "seed=3")
    assert model_cfg.tag is None  # the class
    assert cfg.logging_steps == 10  # training.yaml
    assert cfg.learning_rate == 0.001  # the file
    assert (model_cfg.d_model, cfg.train_seq_len, cfg.preset) == (192, 128, "tiny")
    assert (model_cfg.n_layers, cfg.seed) == (7, 3)
    assert cfg.model_cfg == model_cfg.model_dump()


def test_fields_are_overridden_without_plus_also_where_the_file_is_silent(work):
    _, model_cfg = quiet(
        "model=mine.yaml", "model_cfg.tag=x", "+model_cfg.dropout=0.5", "++model_cfg.bias=false"
    )
    assert (model_cfg.tag, model_cfg.dropout, model_cfg.bias) == ("x", 0.5, False)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--num_iterations", "20"], "num_iterations", 20),
        (["--num-iterations=20"], "num_iterations", 20),
        (["--deterministic"], "deterministic", True),
        (["--deterministic", "seed=4"], "deterministic", True),
        (["--deterministic=false"], "deterministic", False),
        (["mixed_precision=no"], "mixed_precision", "no"),
        (["learning_rate=1"], "learning_rate", 1.0),
        (["sample_prompt=def f(x):"], "sample_prompt", "def f(x):"),
        (["sample_prompt=it's"], "sample_prompt", "it's"),
        (["--model_name", "2024"], "model_name", "2024"),
        (["seq_len=64"], "train_seq_len", 64),
        (["env.OMP_NUM_THREADS=3"], "env", {"OMP_NUM_THREADS": "3"}),
        (["resume=null"], "resume", "none"),
        (["val_loss_every=0"], "val_loss_every", 0),
        ([], "kernels", {"default": "auto"}),
        (["kernels=reference"], "kernels", {"default": "reference"}),
        (["--kernels", "reference"], "kernels", {"default": "reference"}),
        (["kernels={default: reference}"], "kernels", {"default": "reference"}),
        (
            ["--kernels.linear_cross_entropy=chunked"],
            "kernels",
            {"default": "auto", "linear_cross_entropy": "chunked"},
        ),
        (
            ["kernels.linear_cross_entropy=auto", "kernels=chunked"],
            "kernels",
            {"default": "chunked", "linear_cross_entropy": "auto"},
        ),
    ],
)
def test_spellings_of_generic_fields(work, words, field, value):
    found = getattr(quiet("model=mine.yaml", *words)[0], field)
    assert found == value and type(found) is type(value)


def test_one_word_for_all_kernels_in_a_file_leaves_room_for_others(write):
    write("plain.yaml", "defaults: [mine, _self_]\nkernels: reference\n")
    write("child.yaml", "defaults: [plain, _self_]\nkernels: {linear_diffusion_loss: chunked}\n")
    assert quiet("plain.yaml")[0].kernels == {"default": "reference"}
    cfg, _ = quiet("child.yaml", "kernels.linear_cross_entropy=auto")
    assert cfg.kernels == {
        "default": "reference",
        "linear_diffusion_loss": "chunked",
        "linear_cross_entropy": "auto",
    }
    points = check_grid(prepare(["plain.yaml", "kernels=auto,chunked", "-m"]))
    assert points is not None and [p.cfg.kernels["default"] for p in points] == ["auto", "chunked"]


def test_aliases_are_folded_in_files_and_overrides(work, write):
    write(
        "aliased.yaml",
        """
        defaults: [mine, _self_]
        seq_len: 32
        model_cfg: {model_dim: 48, num_layers: 5, block_size: 64}
        """,
    )
    cfg, model_cfg = quiet("aliased.yaml", "model_cfg.num_heads=4")
    assert (model_cfg.d_model, model_cfg.n_layers, model_cfg.n_ctx, model_cfg.n_heads) == (48, 5, 64, 4)
    assert cfg.train_seq_len == 32


def test_a_file_is_read_as_it_stands_now(write):
    """What was read of it before shows neither in the values nor in the line numbers."""
    text = "defaults: [mine, _self_]\nseq_len: 32\nmodel_cfg: {model_dim: 48}\n"
    for first in ("", "\n\n", ""):
        write("x.yaml", first + text)
        cfg, model_cfg = quiet("x.yaml")
        assert (cfg.train_seq_len, model_cfg.d_model, cfg.seed) == (32, 48, 1337)
        write("x.yaml", first + text + "seed: x\n")
        with pytest.raises(ConfigError, match=rf"^x.yaml:{len(first) + 4}: seed: expected int"):
            quiet("x.yaml")


def test_files_outside_configs_find_relative_parents(work, write):
    write("sub/base one.yaml", "defaults: [training, _self_]\nseed: 1\nlogging_steps: 3\n")
    write("sub/deep/child 1.yaml", "defaults: ['../base one', _self_]\ntype: 'fake_arch:Model'\nseed: 2\n")
    cfg, _ = quiet(f"--hydra_model_cfg={work}/sub/deep/child 1.yaml")
    assert (cfg.seed, cfg.logging_steps) == (2, 3)


def test_a_sibling_training_yaml_takes_the_place_of_the_shared_one(work, write):
    write("training.yaml", "defaults: [/configs/training, _self_]\nseed: 99\n")
    assert quiet("model=mine.yaml")[0].seed == 99


def test_a_parent_in_configs_and_a_preset_in_defaults(work, write):
    write("short.yaml", "defaults: [mine, {preset: tiny}, _self_]\nmodel_cfg: {n_layers: 9}\n")
    _, model_cfg = quiet("short.yaml")
    assert (model_cfg.n_layers, model_cfg.d_model) == (9, 192)


def test_a_preset_named_in_a_file_lies_under_the_files_own_values(work, write):
    write("sized.yaml", "defaults: [mine, _self_]\npreset: tiny\nmodel_cfg: {n_layers: 9}\n")
    cfg, model_cfg = quiet("sized.yaml")
    assert (cfg.preset, model_cfg.n_layers, model_cfg.d_model) == ("tiny", 9, 192)
    cfg, model_cfg = quiet("sized.yaml", "preset=small")
    assert (cfg.preset, model_cfg.n_layers, model_cfg.d_model) == ("small", 6, 384)


def test_without_self_the_file_still_wins_over_the_base(work, write):
    write("noself.yaml", "defaults: [training]\ntype: 'fake_arch:Model'\nseed: 5\n")
    assert quiet("noself.yaml")[0].seed == 5


def test_a_file_without_type_takes_its_name_or_vanilla(work, write):
    notes: list[str] = []
    write("gpt2.yaml", "defaults: [training, _self_]\n")
    write("other.yaml", "defaults: [training, _self_]\n")
    for name, type_ in (("gpt2", "gpt2"), ("other", "vanilla")):
        plan = prepare([f"./{name}.yaml"])
        notes += plan.notices
        assert compose_tree(plan.overrides)["type"] == type_
    assert any("states no type" in n for n in notes)


def test_sizes_an_architecture_does_not_have(write):
    notes: list[str] = []
    write("headless.yaml", "defaults: [training, _self_]\ntype: 'fake_arch:Headless'\n")
    _, model_cfg = compose(["headless.yaml", "preset=tiny"], notes.append)
    assert model_cfg.d_model == 192
    assert any("preset tiny" in n and "n_heads" in n for n in notes)
    for number in (3, 4):  # 4 is what the preset says
        with pytest.raises(ConfigError, match=r"command line: unknown key 'model_cfg.n_heads'"):
            quiet("headless.yaml", "preset=tiny", f"model_cfg.n_heads={number}")


@pytest.mark.parametrize(
    ("words", "preset"),
    [
        (["gpt2"], "nano"),
        (["gpt2", "num_iterations=5"], "nano"),
        (["gpt2", "preset=auto"], "nano"),
        (["gpt2", "model_cfg.d_model=96"], "none"),
        (["gpt2", "data=synthetic"], "none"),
        (["gpt2", "preset=tiny"], "tiny"),
        (["./mine.yaml"], "none"),
    ],
)
def test_auto_preset_on_a_machine_without_cuda(work, words, preset):
    model, *rest = words
    assert compose_tree(prepare([f"model={model}", *rest]).overrides)["preset"] == preset


def test_auto_preset_says_what_it_chose_and_how_to_get_the_full_size(work, monkeypatch):
    (note,) = prepare(["model=gpt2"]).notices
    assert "nano" in note and "preset=none" in note and "gpt2.yaml" in note
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 1)
    assert compose_tree(prepare(["model=gpt2"]).overrides)["preset"] == "small"
    assert compose_tree(prepare(["model=gpt2", "device=cpu"]).overrides)["preset"] == "nano"


PAPERS = {  # rate, schedule, warm-up, steps, tokens of a row
    "bd3lm_blocks": (3e-4, "constant", 2500, 150_000, 1024),
    "d3pm_absorb": (5e-4, "inverse_sqrt", 10_000, 1_000_000, 128),
    "mdlm": (3e-4, "constant", 2500, 1_000_000, 1024),
    "sedd_absorb": (3e-4, "constant", 2500, 1_300_000, 1024),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_recipes_of_the_papers_on_diffusion(work, paper):
    cfg, model_cfg = quiet(str(CONFIGS / "papers" / f"{paper}.yaml"))
    assert cfg.preset == "none" and cfg.optimizer == "adamw" and cfg.global_batch_size == 512
    assert (cfg.adam_beta1, cfg.adam_beta2, cfg.weight_decay, cfg.ema_decay) == (0.9, 0.999, 0.0, 0.9999)
    found = (cfg.learning_rate, cfg.scheduler, cfg.warmup_steps, cfg.num_iterations, cfg.train_seq_len)
    assert found == PAPERS[paper] and cfg.warmup_ratio is None and model_cfg.n_ctx == cfg.train_seq_len


def test_training_yaml_states_every_field_with_the_default_of_the_schema():
    stated = OmegaConf.to_container(OmegaConf.load(CONFIGS / "training.yaml"))
    assert set(stated) == set(RunConfig.model_fields)
    defaults = RunConfig(type="x").model_dump()
    stated["global_batch_size"] = 48  # null there: derived
    assert {k: v for k, v in stated.items() if k != "type"} == {
        k: v for k, v in defaults.items() if k != "type"
    }


def test_every_line_of_training_yaml_that_needs_a_word_has_one():
    obvious = {"adam_beta1", "adam_beta2", "adam_epsilon"}
    for line in (CONFIGS / "training.yaml").read_text().splitlines():
        if line and line[0].isalpha() and line.split(":")[0] not in obvious:
            assert "#" in line, line


@pytest.mark.parametrize(
    ("stated", "rows"),
    [
        ({}, 48),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 12),
        ({"batch_size": 4, "gradient_accumulation_steps": 3, "num_gpus": 2, "device": "cpu"}, 24),
        ({"global_batch_size": 6, "batch_size": 2}, 6),
    ],
)
def test_rows_per_step(work, stated, rows):
    tree = {"type": "fake_arch:Model", "global_batch_size": None, **stated}
    assert validate(tree)[0].global_batch_size == rows


def test_micro_batch_and_accumulation_on_the_command_line_decide_the_batch(work):
    cfg, _ = quiet("mine.yaml", "preset=tiny", "batch_size=5", "gradient_accumulation_steps=3")
    assert cfg.global_batch_size == 15


def test_a_warm_up_and_a_floor_on_the_command_line_win_over_a_file(write):
    write("warm.yaml", "defaults: [mine, _self_]\nwarmup_ratio: 0.1\nmin_lr: 0.0001\n")
    cfg, _ = quiet("warm.yaml")
    assert (cfg.warmup_ratio, cfg.min_lr) == (0.1, 1e-4)
    cfg, _ = quiet("warm.yaml", "warmup_steps=5", "min_lr_ratio=0.2")
    assert (cfg.warmup_steps, cfg.warmup_ratio, cfg.min_lr_ratio, cfg.min_lr) == (5, None, 0.2, None)
    checked = check_grid(prepare(["warm.yaml", "warmup_steps=5,6", "-m"]))
    assert checked is not None and [c.cfg.warmup_ratio for c in checked] == [None, None]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("warmup_steps=5 warmup_ratio=0.1", "warmup_steps (because of warmup_ratio=0.1)"),
        ("min_lr_ratio=0.5 min_lr=0.0001", "min_lr_ratio (because of min_lr=0.0001)"),
        ("warmup_steps=5 warmup_ratio=null", ""),
        (
            "optimizer=sgd adam_beta1=0.8 adam_epsilon=1e-6",
            "adam_beta1, adam_epsilon (because of optimizer=sgd)",
        ),
        ("muon_momentum=0.9", "muon_momentum (because of optimizer=adamw)"),
        ("optimizer=muon muon_momentum=0.9 adam_beta2=0.9", ""),
        ("optimizer=muon normuon_beta2=0.9", "normuon_beta2 (because of optimizer=muon)"),
        ("optimizer=normuon normuon_beta2=0.9 muon_momentum=0.9 muon_weight_decay=0.1", ""),
        ("optimizer=muon muon_momentum_rise=0.1", "muon_momentum_rise (because of muon_momentum_ends=null)"),
        ("optimizer=muon muon_momentum_ends=0.8 muon_momentum_rise=0.1 muon_momentum_fall=0", ""),
        (
            "optimizer=sgd cautious_weight_decay=true weight_decay_follows_rate=true",
            "cautious_weight_decay, weight_decay_follows_rate (because of optimizer=sgd)",
        ),
        (
            "cautious_weight_decay=true weight_decay=0",
            "cautious_weight_decay (because of weight_decay=0.0)",
        ),
        ("optimizer=muon cautious_weight_decay=true weight_decay=0 muon_weight_decay=0.1", ""),
        ("scheduler=cosine cooldown_frac=0.2", "cooldown_frac (because of scheduler=cosine)"),
        ("scheduler=constant min_lr_ratio=0.2", "min_lr_ratio (because of scheduler=constant)"),
        ("data=synthetic near_copies=drop", "near_copies (because of data=synthetic)"),
        ("lr_scaling=none lr_base_width=64", "lr_base_width (because of lr_scaling=none)"),
        (
            "optimizer=sgd adam_beta1=0.8 scheduler=linear cooldown_frac=0",
            "adam_beta1 (because of optimizer=sgd); cooldown_frac (because of scheduler=linear)",
        ),
        ("optimizer=sgd scheduler=constant learning_rate=0.1", ""),
        ("scheduler=constant lr_decay_steps=9", "lr_decay_steps (because of scheduler=constant)"),
        ("scheduler=linear lr_decay_steps=9", ""),
        ("num_iterations=9 num_epochs=1", "num_iterations (because of num_epochs=1.0)"),
        ("num_iterations=9 num_epochs=null", ""),
        ("early_stopping_patience=9", "early_stopping_patience (because of early_stopping=false)"),
        ("early_stopping=true early_stopping_threshold=0.1", ""),
        (
            "save_checkpoint=false save_steps=9 save_minutes=1 save_total_limit=1 save_precision=fp16",
            "save_minutes, save_steps, save_total_limit, save_precision (because of save_checkpoint=false)",
        ),
        ("save_only_best=true save_minutes=9", "save_minutes (because of save_only_best=true)"),
        ("sample_tokens=0 sample_prompt=x", "sample_prompt (because of sample_tokens=0)"),
        ("val_loss_every=0 val_bytes_interim=9", "val_bytes_interim (because of val_loss_every=0)"),
        ("val_tokens=9 val_steps=9", "val_tokens (because of val_steps=9)"),
        ("synthetic_bytes=2000 synthetic=grammar", "synthetic, synthetic_bytes (because of data=embedded)"),
        (
            "data=synthetic synthetic=grammar synthetic_order=2",
            "synthetic_order (because of synthetic=grammar)",
        ),
        ("data=synthetic synthetic_order=2", ""),
        ("use_wandb=false wandb_project=x", "wandb_project (because of use_wandb=false)"),
        ("ddp_backend=gloo", "ddp_backend (because of one process)"),
        ("ddp_backend=gloo num_gpus=2 device=cpu", ""),
        ("model_name=a output_dir=b", "model_name (because of output_dir=b)"),
        (
            "base_model_lr=0.1 learning_rate=0.2",
            "learning_rate (because of base_model_lr=0.1)",
        ),
        ("base_model_lr=null learning_rate=0.2", ""),
        ("eval_only=true num_epochs=2 val_bytes=9", "num_epochs (because of eval_only=true)"),
        (
            "eval_only=true optimizer=sgd muon_momentum=0.5",
            "optimizer, muon_momentum (because of eval_only=true)",
        ),
    ],
)
def test_fields_that_the_run_does_not_read(work, words, told):
    notes: list[str] = []
    compose(["mine.yaml", *words.split()], notes.append)
    assert [n for n in notes if "not read" in n] == ([f"not read by this run: {told}"] if told else [])


def test_a_folder_of_text_that_a_full_path_makes_unnecessary_is_not_read(work, write):
    notes: list[str] = []
    compose(["mine.yaml", "data_root=here", f"input_file={write('a.txt', 'hello')}"], notes.append)
    assert f"not read by this run: data_root (because of input_file={work}/a.txt)" in notes


def test_a_number_of_steps_on_the_command_line_wins_over_the_passes_of_a_file(write):
    write("passes.yaml", "defaults: [mine, _self_]\nnum_epochs: 3\nval_steps: 2\n")
    cfg, _ = quiet("passes.yaml", "num_iterations=9", "val_tokens=9")
    assert (cfg.num_iterations, cfg.num_epochs, cfg.val_tokens, cfg.val_steps) == (9, None, 9, None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("muon_momentum: 0.95", "", "the recipe does not state muon_momentum"),
        ("warmup_ratio: 0.02", "", "the recipe does not state warmup_ratio"),
        ("warmup_ratio: 0.02", "warmup_steps: 20", ""),
        ("scheduler: cooldown", "scheduler: constant", "as in training.yaml, leave out: cooldown_frac"),
        ("lr_scaling: width\n", "", "the recipe does not state lr_scaling"),
        ("type: gpt2", "type: gpt2\nbatch_size: auto", "as in training.yaml, leave out: batch_size"),
        ("type: gpt2", "type: gpt2\nbatch_size: 8", ""),
    ],
)
def test_a_model_file_states_its_recipe_and_what_differs(tmp_path, old, new, message):
    from configs.test_configs import _check_recipe

    text = (CONFIGS / "gpt2.yaml").read_text()
    assert old in text
    path = tmp_path / "gpt2.yaml"
    path.write_text(text.replace(old, new))
    with nullcontext() if not message else pytest.raises(AssertionError, match=message):
        _check_recipe(path)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_shipped_configuration_passes_its_own_check(name):
    from configs.test_configs import check_model_file

    check_model_file(name, build=True, presets=["nano"], sources=["synthetic"])


def test_the_result_is_frozen_and_survives_json(work):
    cfg, _ = quiet("mine.yaml")
    assert RunConfig.model_validate(cfg.model_dump(mode="json")) == cfg
    with pytest.raises(ValueError, match="frozen"):
        cfg.seed = 1  # type: ignore[misc]


def test_secrets_never_reach_hydra(work):
    plan = prepare(["mine.yaml", "env.MY_API_KEY=abc123", "env.PLAIN=7"])
    assert plan.secrets == {"MY_API_KEY": "abc123"}
    assert compose_tree(plan.overrides)["env"] == {"PLAIN": "7", "MY_API_KEY": "<redacted>"}
    assert "abc123" not in str(plan.overrides)


def test_secrets_in_files_are_hidden_too(work, write):
    write("s.yaml", "defaults: [mine, _self_]\nenv: {HF_TOKEN: hf_x}\n")
    plan = prepare(["s.yaml"])
    assert plan.secrets == {"HF_TOKEN": "hf_x"}
    assert compose_tree(plan.overrides)["env"] == {"HF_TOKEN": "<redacted>"}


def test_a_grid_is_composed_and_checked_in_full(work):
    checked = check_grid(prepare(["mine.yaml", "seed=1,2", "model_cfg.d_model=48,96", "-m"]))
    assert checked is not None
    assert [(c.cfg.seed, c.model_cfg.d_model) for c in checked] == [(1, 48), (1, 96), (2, 48), (2, 96)]


def test_a_grid_over_models(work, write):
    write("other.yaml", "defaults: [mine, _self_]\nseed: 8\n")
    checked = check_grid(prepare(["--hydra_model_cfg=mine.yaml,other.yaml", "-m"]))
    assert checked is not None and [c.cfg.seed for c in checked] == [1337, 8]
    assert checked[1].origin.startswith(str(work / "other.yaml"))


def test_a_grid_over_models_with_fields_that_stay_the_same(work, write):
    write("other.yaml", "defaults: [mine, _self_]\n")
    words = ["model=mine.yaml,other.yaml", "device=cpu", "seed=1,2", "env.A=x", "model_cfg.d_model=48", "-m"]
    plan = prepare([*words, "batch_size=2", "gradient_accumulation_steps=3"])
    compose_tree([o for o in plan.overrides if "," not in o])  # as Hydra does, before any model is chosen
    checked = check_grid(plan)
    assert checked is not None
    assert [(c.cfg.device, c.cfg.seed, c.cfg.global_batch_size) for c in checked] == [
        ("cpu", 1, 6),
        ("cpu", 2, 6),
    ] * 2


def test_one_bad_point_stops_the_grid_and_every_bad_point_is_listed(work):
    with pytest.raises(ConfigError) as caught:
        check_grid(prepare(["mine.yaml", "model_cfg.d_model=48,49,96,97", "-m"]))
    assert [p.split(":")[0] for p in caught.value.problems] == [
        "job 1 (++model_cfg.d_model=49)",
        "job 3 (++model_cfg.d_model=97)",
    ]


def test_jobs_of_a_sweep_may_not_share_a_folder(work):
    with pytest.raises(ConfigError, match="2 jobs would share the run folder checkpoints/x"):
        check_grid(prepare(["mine.yaml", "model_name=x", "seed=1,2", "-m"]))
    assert check_grid(prepare(["mine.yaml", "model_name=x,y", "seed=1", "-m"])) is not None


@pytest.mark.slow
def test_importing_the_schema_and_composing_leave_torch_alone(work):
    import subprocess
    import sys

    code = (
        "import sys, configs; configs.compose(['mine.yaml'], notify=print); sys.exit('torch' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{work}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=work)


def test_the_default_adapter_is_re_exported_lazily():
    import configs.default_model_adapter as module
    from configs.schema import DefaultModelConfig

    assert module.DefaultModelConfig is DefaultModelConfig
    assert "DefaultModelAdapter" not in vars(module)
    from adapters.default import DefaultModelAdapter

    assert module.DefaultModelAdapter is DefaultModelAdapter


def test_paths_are_relative_to_where_the_command_was_given(work, write):
    write("texts/a.txt", "hello")
    cfg, _ = quiet("mine.yaml", "data=text", "data_root=texts", "input_file=a.txt")
    assert (cfg.data, Path(cfg.data_root or "", cfg.input_file or "").read_text()) == ("text", "hello")
