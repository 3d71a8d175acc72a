"""Sizes, and what a size means for one type besides."""

from __future__ import annotations

import json

import pytest
import yaml

from configs import compose
from configs.compose import compose_tree, prepare
from configs.files import CONFIGS, options, read_option
from configs.formats import json_preset
from configs.grid import check_grid
from configs.messages import ConfigError
from configs.schema import redacted
from models import ARCHITECTURES
from trainer.commands import train

# What any architecture may have.
SIZES = {"n_layers", "d_model", "n_heads", "n_ctx", "dropout", "bias", "vocab_size"}
AMENDMENT = """
model_cfg: {tag: small}
num_iterations: 77
seed: 5
"""


def quiet(*words: str):
    return compose(list(words), notify=lambda text: None)


@pytest.fixture
def amended(write):
    """`nano` means more for the type of mine.yaml."""
    return write("preset/for/Model-nano.yaml", AMENDMENT)


@pytest.mark.parametrize("preset", options("preset"))
def test_presets_set_sizes_and_never_learning_rates(preset):
    stated = read_option("preset", preset).values
    batch = {
        "train_seq_len",
        "batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
        "batch_stages",
    }
    steps = {"num_iterations", "time_budget", "val_loss_every", "val_bytes", "val_bytes_interim"}
    allowed = {"preset", "model_cfg"} | batch | (steps if preset == "nano" else set())
    assert set(stated) <= allowed and stated["preset"] == preset
    if "global_batch_size" in stated:  # a file's stages are of its own
        assert stated["batch_stages"] is None
    assert set(stated.get("model_cfg", {})) <= SIZES


@pytest.mark.parametrize(
    "amendment", sorted((CONFIGS / "preset" / "for").glob("*.yaml")), ids=lambda p: p.stem
)
def test_amendments_name_a_type_and_a_preset(amendment):
    type_, preset = amendment.stem.rsplit("-", 1)
    assert type_ in ARCHITECTURES and preset in options("preset")


def test_a_size_may_mean_something_more_for_one_type():
    cfg, model_cfg = quiet("model=bd3lm", "preset=nano")
    assert (cfg.global_batch_size, model_cfg.num_sampling_steps, model_cfg.clip_search) == (8, 100, False)
    assert quiet("model=bd3lm", "preset=nano", "global_batch_size=7")[0].global_batch_size == 7
    assert quiet("model=bd3lm", "preset=none")[0].global_batch_size == 512
    assert quiet("model=gpt2", "preset=nano")[0].global_batch_size == 16


def test_a_size_in_json_is_one_of_any_architecture():
    cfg, model_cfg = quiet("model=vanilla", "preset=150M")
    sizes = {"n_layers": 16, "d_model": 768, "n_heads": 12, "n_ctx": 256, "vocab_size": 50304}
    assert sizes.items() <= model_cfg.model_dump().items() and (model_cfg.dropout, model_cfg.bias) == (
        0.2,
        False,
    )
    assert (cfg.preset, cfg.train_seq_len, cfg.global_batch_size) == ("150M", 256, 32)
    assert quiet("model=vanilla", "preset=150M", "model_cfg.n_layers=8")[1].n_layers == 8


@pytest.mark.parametrize("type_", ["megabyte", "hnet"])
def test_the_vocabulary_of_a_size_is_none_of_bytes(type_):
    notes: list[str] = []
    _, model_cfg = compose([f"model={type_}", "preset=code"], notes.append)
    assert model_cfg.vocab_size is None and model_cfg.n_ctx == 1024
    assert f"preset code: {type_} reads bytes, whose vocabulary is its own; vocab_size left out" in notes
    with pytest.raises(ConfigError, match="is that of a tokenizer, and this model reads bytes"):
        quiet(f"model={type_}", "preset=code", "model_cfg.vocab_size=50304")


OWN = """{"n_layer": 3, "n_head": 2, "n_embd": 64, "block_size": 32, "dropout": 0.0, "bias": false, "batch_size": 8}"""


def test_any_json_file_is_a_size_by_its_path(write):
    path = write("my sizes/tiny.json", OWN)
    notes: list[str] = []
    cfg, model_cfg = compose(["mine.yaml", "preset='my sizes/tiny.json'"], notes.append)
    assert (model_cfg.n_layers, model_cfg.d_model, cfg.global_batch_size) == (3, 64, 8)
    assert cfg.preset == str(path) and "my sizes/tiny.json: vocab_size not given: 50304" in notes
    plan = prepare(["mine.yaml", "preset=tiny,'my sizes/tiny.json'", "-m"])
    assert [point.model_cfg.n_layers for point in check_grid(plan)] == [4, 3]
    with pytest.raises(
        ConfigError, match=r"^my sizes/tiny.json:1: model_cfg.d_model \(64\) must be divisible"
    ):
        quiet("mine.yaml", "preset='my sizes/tiny.json'", "model_cfg.n_heads=5")
    with pytest.raises(ConfigError, match=r"preset: no such file: smal.json \(tried .* Did you mean 'small'"):
        quiet("mine.yaml", "preset=smal.json")
    path.write_text("{}")
    with pytest.raises(ConfigError, match="required key 'block_size' has no value"):
        quiet("mine.yaml", "preset='my sizes/tiny.json'")


def test_a_file_may_name_a_size_of_its_own(write):
    """By a path from where it is said."""
    path = write("lab/own.json", OWN)
    write("lab/base.yaml", "defaults: [../mine, _self_]\npreset: own.json\n")
    write("child.yaml", "defaults: [lab/base, _self_]\nseed: 2\n")
    cfg, model_cfg = quiet("child.yaml")
    assert (model_cfg.n_layers, model_cfg.d_model, cfg.preset) == (3, 64, str(path))
    assert quiet("child.yaml", "preset=nano")[0].preset == "nano"
    assert [c.cfg.preset for c in check_grid(prepare(["child.yaml", "seed=1,2", "-m"]))] == [str(path)] * 2
    write("lab/base.yaml", "defaults: [../mine, _self_]\npreset: other.json\n")
    with pytest.raises(
        ConfigError, match=r"^lab/base.yaml:2: preset: no such file: other.json \(tried .*/lab/"
    ):
        quiet("child.yaml")


def test_a_composition_reads_no_size_but_the_one_that_is_asked_for(write, monkeypatch):
    read, load = [], json_preset.load
    monkeypatch.setattr(json_preset, "load", lambda path, where: read.append(path.stem) or load(path, where))
    quiet("mine.yaml")
    assert read == []
    quiet("mine.yaml", "preset=tiny")
    assert {*read} == {"tiny"}


def test_a_run_goes_on_without_the_file_of_its_size(write):
    """As its config.yaml states all of it."""
    cfg, _ = quiet("mine.yaml", f"preset={write('own.json', OWN)}", "model_name=dante")
    write("own.json", "gone")
    write(
        "checkpoints/dante/config.yaml", yaml.safe_dump({"defaults": ["training", "_self_"], **redacted(cfg)})
    )
    saved = {
        "format": 1,
        "type": cfg.type,
        "model_cfg": cfg.model_cfg,
        "train_seq_len": 32,
        "preset": cfg.preset,
    }
    write("checkpoints/dante/config.json", json.dumps(saved))
    write("checkpoints/dante/checkpoint-5/config.json", json.dumps(saved))
    again, model_cfg = quiet("--model_name", "dante", "num_iterations=9")
    assert model_cfg.n_layers == 3 and again.resume == "auto"


@pytest.mark.parametrize("type_", sorted(ARCHITECTURES))
def test_nano_is_as_many_of_300_steps_as_fit_into_two_and_a_half_minutes(type_):
    cfg, _ = quiet(f"model={type_}", "preset=nano")
    assert (cfg.num_iterations, cfg.time_budget) == (300, 2.5)


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        (["preset=nano", "num_iterations=20"], None),
        (["preset=nano", "num_epochs=1"], None),
        (["preset=nano", "num_iterations=20", "time_budget=7"], 7),
        (["preset=nano", "time_budget=7"], 7),
        (["preset=nano", "time_budget=null"], None),
        (["preset=none"], None),
    ],
)
def test_who_asks_for_a_number_of_steps_means_it(words, budget):
    assert quiet("model=gpt2", *words)[0].time_budget == budget


@pytest.mark.parametrize(
    ("text", "words", "budget"),
    [
        ("time_budget: 5", ["num_iterations=20"], 5),  # not a preset's
        ("time_budget: 5", ["preset=nano", "num_iterations=20"], 5),
        ("preset: nano", [], 2.5),
        ("preset: nano", ["num_iterations=20"], None),
        ("preset: nano\nnum_iterations: 20", [], None),  # the file lies over the preset
        ("preset: nano\ntime_budget: 5\nnum_iterations: 20", ["num_iterations=30"], 5),
        ("preset: nano\ntime_budget: null", [], None),
    ],
)
def test_a_budget_of_a_file_stays_and_that_of_a_preset_goes_with_its_steps(write, text, words, budget):
    write("sized.yaml", f"defaults: [mine, _self_]\n{text}\n")
    assert quiet("sized.yaml", *words)[0].time_budget == budget


def test_a_sweep_has_equal_numbers_of_steps(write):
    def budgets(*words):
        points = check_grid(prepare([*words, "-m"]))
        return {point.cfg.time_budget for point in points}

    assert budgets("model=gpt2,mdl", "preset=nano") == {None}
    assert budgets("model=gpt2", "seed=1,2", "preset=nano") == {None}
    assert budgets("model=gpt2,mdl", "preset=nano", "time_budget=7") == {7}
    write("quick.yaml", "defaults: [mine, _self_]\ntime_budget: 5\n")
    assert budgets("model=quick.yaml", "preset=nano,tiny") == {5}
    with pytest.raises(ConfigError, match=r"different time budgets.*Add time_budget="):
        budgets("model=quick.yaml,mine.yaml")


@pytest.mark.parametrize("type_", ["d3pm", "mdl", "sedd", "bd3lm"])
def test_the_type_counts_and_not_the_name_of_the_file(write, type_):
    write("mine2.yaml", f"defaults: [{type_}, _self_]\nnum_iterations: 9\nmodel_cfg: {{nelbo_draws: 16}}\n")
    own, shipped = (quiet(f"model={name}", "preset=nano") for name in ("mine2.yaml", type_))
    assert own == shipped and own[1].nelbo_draws == 4
    assert quiet("mine2.yaml")[1].nelbo_draws == 16


def test_a_file_of_that_name_with_another_type_is_not_amended(write):
    write("mdl.yaml", "defaults: [mine, _self_]\n")
    assert quiet("./mdl.yaml", "preset=nano")[0].num_iterations == 300


@pytest.mark.parametrize("text", ["preset: nano", "defaults: [mine, {preset: nano}, _self_]"])
def test_a_preset_named_in_a_file_lies_under_the_file_with_what_amends_it(write, amended, text):
    parents = "" if "defaults" in text else "defaults: [mine, _self_]\n"
    write("sized.yaml", f"{parents}{text}\nseed: 6\n")
    cfg, model_cfg = quiet("sized.yaml")
    assert (cfg.num_iterations, cfg.seed, model_cfg.tag, model_cfg.d_model) == (77, 6, "small", 192)
    cfg, model_cfg = quiet("sized.yaml", "preset=tiny")
    assert cfg.seed == 6 and model_cfg.tag == ("small" if "defaults" in text else None)


def test_an_out_of_tree_type_goes_by_its_class_beside_the_file_or_its_parents(write, amended):
    write("sub/child.yaml", "defaults: [../mine, _self_]\nlogging_steps: 2\n")
    cfg, model_cfg = quiet("sub/child.yaml", "preset=nano", "seed=8")
    assert (cfg.num_iterations, cfg.seed, model_cfg.tag, model_cfg.n_layers) == (77, 8, "small", 4)
    write("sub/preset/for/Model-nano.yaml", "num_iterations: 78\n")
    cfg, model_cfg = quiet("sub/child.yaml", "preset=nano")
    assert (cfg.num_iterations, model_cfg.tag) == (78, None)  # the nearest one alone


def test_the_type_of_the_command_line_counts(amended):
    """Also after another type was composed under the same option."""
    assert quiet("mine.yaml", "preset=nano")[0].num_iterations == 77
    assert (
        quiet("mine.yaml", "preset=nano", "type='fake_arch:Headless'", "~model_cfg.n_heads")[0].num_iterations
        == 300
    )


def test_a_mistake_in_an_amendment_is_found_there(write, amended):
    amended.write_text("model_cfg:\n  tag: 3\n")
    with pytest.raises(ConfigError, match=r"^preset/for/Model-nano.yaml:2: model_cfg.tag: expected str"):
        quiet("mine.yaml", "preset=nano")
    write("sized.yaml", "defaults: [mine, _self_]\npreset: nano\n")
    with pytest.raises(ConfigError, match=r"^preset/for/Model-nano.yaml:2: model_cfg.tag: expected str"):
        quiet("sized.yaml")
    amended.write_text("defaults: [training]\n")
    with pytest.raises(ConfigError, match="Model-nano.yaml: what amends a preset is one file"):
        quiet("mine.yaml")


def test_a_grid_over_models_and_sizes_amends_each_by_its_type(write, amended):
    write("other.yaml", "defaults: [mdl, _self_]\n")
    points = check_grid(prepare(["model=mine.yaml,other.yaml", "preset=nano,tiny", "-m"]))
    assert points is not None and [p.cfg.num_iterations for p in points] == [77, 1750, 300, 1750]


def test_jobs_of_a_sweep_are_amended_as_they_were_checked(write, amended, in_process, monkeypatch):
    started: list = []

    def start(cfg, model_cfg, folder, **kwargs) -> float:
        started.append(cfg)
        (folder / "summary.json").write_text('{"score": {"bits_per_byte": 1.0}}')
        return 1.0

    monkeypatch.setattr(train.launch, "start", start)
    write("other.yaml", "defaults: [mdl, _self_]\n")
    assert train.main(["model=mine.yaml,other.yaml", "preset=nano", "-m"]) == 0
    assert [c.num_iterations for c in started] == [77, 300]


def test_a_composed_amendment_is_shown(amended, in_process, capsys):
    assert train.main(["mine.yaml", "preset=nano", "--cfg", "job"]) == 0
    assert "num_iterations: 77" in capsys.readouterr().out


def test_a_sweep_over_types_cannot_be_amended(amended):
    words = ["mine.yaml", "type='fake_arch:Model','fake_arch:Headless'", "-m"]
    with pytest.raises(ConfigError, match="preset nano means something of its own for type fake_arch:Model"):
        prepare([*words, "preset=nano,tiny"])
    plan = prepare([*words, "preset=tiny"])
    assert len(plan.models) == 1


def test_sizes_an_architecture_does_not_have_are_told(write):
    notes: list[str] = []
    write("headless.yaml", "defaults: [training, _self_]\ntype: 'fake_arch:Headless'\n")
    compose(["headless.yaml", "preset=nano"], notes.append)
    assert any("preset nano: fake_arch:Headless has no n_heads; left out" in n for n in notes)
    assert compose_tree(prepare(["headless.yaml", "preset=tiny"]).overrides)["model_cfg"]["n_heads"] == 4
