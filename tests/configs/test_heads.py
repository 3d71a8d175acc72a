"""A width on the command line, and the heads that lie in it."""

from __future__ import annotations

import pytest

from configs.compose import check, compose, prepare, tree_of
from configs.dump import job_text
from configs.grid import check_grid
from configs.heads import keep_widths, told
from configs.messages import ConfigError


def composed(*words: str):
    notes: list[str] = []
    _, model_cfg = compose([*words, "device=cpu"], notify=notes.append)
    return model_cfg, [note for note in notes if "as wide as" in note]


def test_heads_keep_their_width_where_the_width_alone_is_given():
    model_cfg, (note,) = composed("model=sedd", "model_cfg.d_model=256")
    assert (model_cfg.d_model, model_cfg.n_heads) == (256, 4)
    assert note == (
        "model_cfg.d_model 256: n_heads 4, heads as wide as in the files (768 with n_heads 12). Another number: "
        "model_cfg.n_heads=<heads>"
    )


@pytest.mark.parametrize(
    ("words", "heads"),
    [
        (["model=gpt2", "model_cfg.d_model=768"], 12),  # as it was
        (["model=gpt2", "model_cfg.d_model=256", "model_cfg.n_heads=8"], 8),  # somebody says
        (["model=gpt2", "preset=tiny", "model_cfg.d_model=240"], 5),  # 48 wide, as the preset has them
        (["model=gpt2", "preset=tiny", "model_cfg.model_dim=96"], 2),  # in another spelling
        (["model=configs/small.config", "model_cfg.d_model=64"], 2),  # 32 wide
        (["model=configs/150M.json", "model_cfg.d_model=64"], 1),
        (["model=nsa", "preset=nano", "model_cfg.d_model=64"], 6),  # whose heads have a width of their own
    ],
    ids=lambda words: " ".join(words).replace("model_cfg.", "") if isinstance(words, list) else None,
)
def test_the_number_of_heads(words, heads):
    model_cfg, notes = composed(*words)
    assert model_cfg.n_heads == heads
    assert len(notes) == int(heads in (1, 2, 5))


def test_groups_of_queries_keep_their_size(work, write):
    write("mine.yaml", "defaults: [vanilla, _self_]\nmodel_cfg: {d_model: 512, n_heads: 8, n_kv_heads: 2}\n")
    model_cfg, (note,) = composed("mine.yaml", "model_cfg.d_model=256")
    assert (model_cfg.n_heads, model_cfg.n_kv_heads) == (4, 1) and "n_heads 4, n_kv_heads 1" in note
    with pytest.raises(ConfigError, match=r"\(128\) must be a multiple of 256, .* nearest: 256\. Another"):
        composed("mine.yaml", "model_cfg.d_model=128")
    model_cfg, _ = composed("mine.yaml", "model_cfg.d_model=128", "model_cfg.n_kv_heads=2")
    assert (model_cfg.n_heads, model_cfg.n_kv_heads) == (2, 2)


def test_a_width_without_a_whole_number_of_heads_is_refused_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        composed("model=sedd", "model_cfg.d_model=100")
    assert caught.value.problems == [
        "command line: model_cfg.d_model (100) must be a multiple of 64, so that heads are as wide as in the files "
        "(768 with n_heads 12); nearest: 64, 128. Another number of heads: model_cfg.n_heads=<heads>"
    ]


def test_other_problems_of_the_architecture_come_first():
    with pytest.raises(ConfigError, match="unknown key 'model_cfg.tag'"):
        composed("model=sedd", "model_cfg.d_model=100", "model_cfg.tag=1")


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"d_model": 96, "n_heads": 6, "memory_num_heads": 3}, {"n_heads": 2, "memory_num_heads": 1}),
        (
            {
                "d_model": 96,
                "n_heads": 6,
                "memory_num_heads": 3,
                "use_low_rank_memory": True,
                "low_rank_mode": "reduced_dim",
            },
            {"n_heads": 2, "memory_num_heads": 3},
        ),
        ({"d_model": 96, "n_heads": "${x}"}, {"n_heads": "${x}"}),
        ({"d_model": 96, "n_heads": [2, 3]}, {"n_heads": [2, 3]}),
    ],
    ids=["memory", "memory in a rank", "reference", "list"],
)
def test_which_numbers_follow(work, write, fields, kept):
    from configs.files import read

    node = read(work / "mine.yaml")
    node.values["model_cfg"] = fields
    tree = {"type": "fake_arch:Model", "model_cfg": {**fields, "d_model": 32}}
    assert keep_widths(tree, told([node]), {"model_cfg.d_model"})[1] == []
    assert {name: tree["model_cfg"][name] for name in kept} == kept


def test_what_a_preset_alone_states_is_no_field_of_an_architecture(work, write):
    write("headless.yaml", 'defaults: [training, _self_]\ntype: "fake_arch:Headless"\nlearning_rate: 1.0\n')
    model_cfg, notes = composed("headless.yaml", "preset=nano", "model_cfg.d_model=32")
    assert model_cfg.d_model == 32 and notes == []


def test_the_text_of_a_job_has_the_heads_that_it_trains(work, write):
    plan = prepare(["--hydra_model_cfg=sedd", "model_cfg.d_model=256", "--cfg=job"])
    write("again.yaml", job_text(plan))
    model_cfg, notes = composed("again.yaml")
    assert (model_cfg, notes) == (check(plan, tree_of(plan)).model_cfg, [])


def test_a_sweep_over_widths_and_models():
    words = ["--hydra_model_cfg=configs/sedd.yaml,configs/gpt2.yaml", "preset=none,tiny"]
    plan = prepare([*words, "model_cfg.d_model=192,384", "-m"])
    checked = check_grid(plan)
    assert checked is not None
    assert {(c.cfg.preset, c.model_cfg.d_model, c.model_cfg.n_heads) for c in checked} == {
        ("none", 192, 3),
        ("none", 384, 6),
        ("tiny", 192, 4),
        ("tiny", 384, 8),
    }
    of_jobs = [(told["model"], told["preset"], told["values"]["n_heads"]) for told in plan.told_of_heads()]
    assert of_jobs == [(m, p, h) for m in ("sedd", "gpt2") for p, h in (("none", 12), ("tiny", 4))]
