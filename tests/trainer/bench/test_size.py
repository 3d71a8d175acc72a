"""`match` and `budget`: sizes and lengths that meet a target, of every architecture."""

from __future__ import annotations

import json
import math

import pytest

from adapters import build_adapter
from configs.compose import compose, prepare
from configs.grid import check_grid
from configs.match import Budget, Match
from configs.messages import ConfigError
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import TYPES, config
from trainer.bench import size
from trainer.bench.counting import unbuilt
from trainer.bench.fit import fitted
from trainer.bench.targets import TOLERANCE, told_of_size

NANO = ["preset=nano", "data=synthetic", "tokenizer=byte", "synthetic_bytes=20000", "device=cpu"]
VOCABULARY = ByteTokenizer().vocab_size


def with_targets(cfg, match=None, budget=None):
    return cfg.model_copy(update={"match": Match(**match or {}), "budget": Budget(**budget or {})})


def fit(cfg, model_cfg, explicit=(), **targets):
    """(configuration, Config, remarks)"""
    notices: list[str] = []
    return *fitted(with_targets(cfg, **targets), model_cfg, set(explicit), notices), notices


def built(cfg, model_cfg):
    return build_adapter(cfg, model_cfg, ByteTokenizer(), "meta")


def require_met_or_marked(cfg, model_cfg, notices):
    """The target is met by the model that is built of the result, counted anew, or it is said that it is not."""
    told = told_of_size(cfg, built(cfg, model_cfg), lambda: None)["match"]
    assert told["met"] is (abs(told["error"]) <= TOLERANCE) and math.isfinite(told["error"])
    (said,) = [notice for notice in notices if notice.startswith("match.params")]
    assert ("the run is marked" in said) is not told["met"]
    assert not model_cfg.problems(cfg)
    return told


@pytest.mark.parametrize("architecture", ["vanilla", "moe", "mtm", "hnet", "megabyte", "sedd"])
def test_a_size_meets_its_target(architecture):
    cfg, model_cfg, notices = fit(*config(architecture), match={"params": 400_000})
    told = require_met_or_marked(cfg, model_cfg, notices)
    assert told["met"], notices
    assert cfg.model_cfg == model_cfg.model_dump(mode="json")
    now = {name: after for name, (_, after) in told["moved"].items()}
    assert now and all(f" -> {value}" in notices[0] for value in now.values() if isinstance(value, int))


TARGETS = [
    *({"params": 10**6 * millions} for millions in (2, 10, 60)),
    *({"params": 5 * 10**6, "counted": counted} for counted in ("active", "non_embedding")),
    *({"flops_per_byte": 10**6 * millions} for millions in (10, 100)),
]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in TYPES if name != "memory_adapter"])
def test_every_architecture_meets_targets_of_its_size(architecture):
    cfg, model_cfg = compose([f"--hydra_model_cfg={architecture}", "preset=nano"], notify=lambda text: None)
    for target in TARGETS:
        found, its, (said,) = fit(cfg, model_cfg, match=target)
        assert "the run is marked" not in said, said
        assert not its.problems(found) and found.match.given == {
            k: v for k, v in target.items() if k != "counted"
        }


def test_heads_stay_as_wide_and_widths_fill_tiles():
    cfg, model_cfg = config(
        "vanilla", "model_cfg.d_model=192", "model_cfg.n_heads=6", "model_cfg.n_kv_heads=2"
    )
    _, found, _ = fit(cfg, model_cfg, match={"params": 3_000_000})
    assert found.d_model > 192 and found.d_model % 16 == 0
    assert found.d_model // found.n_heads == 32 and found.n_heads == 3 * found.n_kv_heads


def test_what_is_near_enough_stays_and_a_search_begins_where_the_first_did():
    cfg, model_cfg = config("vanilla")
    here = sum(p.numel() for p in built(cfg, model_cfg).parameters())
    same, _, notices = fit(cfg, model_cfg, match={"params": round(here * 1.015)})
    assert same.model_cfg == cfg.model_cfg and same.match.start is None
    assert "nothing had to change" in notices[0]
    once, found, _ = fit(cfg, model_cfg, match={"params": 400_000})
    assert {k: cfg.model_cfg[k] for k in once.match.start} == once.match.start
    again, _, _ = fit(once, found, match=once.match.model_dump())
    assert again == once
    other, _, _ = fit(once, found, match={**once.match.model_dump(), "params": 900_000})
    assert other.model_cfg == fit(cfg, model_cfg, match={"params": 900_000})[0].model_cfg
    anew, _, _ = fit(once, found, {"preset"}, match=once.match.model_dump())
    assert anew.model_cfg == once.model_cfg and anew.match.start is None


def test_what_counts_is_said():
    cfg, model_cfg = config("moe")
    adapter = built(cfg, model_cfg)
    for counted in ("total", "active", "non_embedding"):
        cfg = with_targets(cfg, {"params": 1, "counted": counted})
        found = told_of_size(cfg, adapter, lambda: None)["match"]["found"]
        every = {name: p.numel() for name, p in adapter.model.named_parameters()}
        assert (
            found
            == {
                "total": sum(every.values()),
                "active": adapter.active_parameters(),
                "non_embedding": sum(n for name, n in every.items() if "embed" not in name),
            }[counted]
        )


def test_what_cannot_be_met_is_met_as_nearly_as_can_be_and_marked():
    cfg, model_cfg, notices = fit(*config("vanilla"), match={"params": 5_000})
    told = require_met_or_marked(cfg, model_cfg, notices)
    assert not told["met"] and told["found"] < 12_000, notices


@pytest.mark.slow
def test_a_base_is_as_large_as_it_is():
    cfg, model_cfg, notices = fit(*config("memory_adapter"), match={"params": 10_000_000})
    told = require_met_or_marked(cfg, model_cfg, notices)
    assert not told["met"] and set(told["moved"]) == {"model_cfg.num_memory_tokens"}


def test_points_of_a_sweep_share_what_was_counted(monkeypatch):
    cfg, model_cfg = config("gpt2")
    fit(cfg, model_cfg, match={"params": 300_000})
    monkeypatch.setattr(size, "unbuilt", None)  # nothing is built again
    for change in ({"learning_rate": 0.1}, {"seed": 3}):
        other, _, _ = fit(cfg.model_copy(update=change), model_cfg, match={"params": 300_000})
        assert other.match.start


def test_each_point_of_a_sweep_has_a_size_of_its_own():
    words = ["--hydra_model_cfg=vanilla,mamba", "preset=nano", "match.params=3M", "budget.tokens=1M", "-m"]
    one, other = check_grid(prepare(words))
    for point in (one, other):
        counted = told_of_size(point.cfg, unbuilt(point.cfg, point.model_cfg, 1024), lambda: None)
        assert counted["match"]["met"]
    assert one.cfg.num_iterations == other.cfg.num_iterations == 244
    assert one.cfg.time_budget is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["match.params=1M", "model_cfg.d_model=384"], "model_cfg.d_model: match.params decides it"),
        (
            ["match.params=1M", "match.flops_per_byte=1M"],
            "match.params and match.flops_per_byte are two targets",
        ),
        (["match.params=10Q"], "match.params: expected a number, such as 10M"),
        (["match.params=0"], "match.params: must satisfy 1 <= match.params, got 0"),
        (["match.parms=1M"], "unknown key 'match.parms'. Did you mean 'params'"),
        (["match.counted=all"], "match.counted: 'all' is not one of total, active, non_embedding"),
        (["match=10M"], "match: one mapping is meant, or match.<name>=<value>"),
        (["budget.tokens=1M", "num_iterations=5"], "num_iterations: budget.tokens decides it"),
        (["budget.tokens=1M", "global_batch_size=8", "time_budget=1"], "budget.tokens decides them"),
        (["budget.tokens=1M", "budget.flops=1T"], "budget.flops and budget.tokens are two targets"),
    ],
)
def test_what_contradicts_a_target_is_refused(words, message):
    with pytest.raises(ConfigError) as error:
        compose(["--hydra_model_cfg=vanilla", "preset=nano", *words], notify=lambda text: None)
    assert message in str(error.value)


def test_a_budget_is_met_by_steps_and_where_they_are_few_by_rows_too():
    cfg, model_cfg = config("vanilla", "global_batch_size=4", "num_epochs=2")  # 128 tokens a step
    many, _, notices = fit(cfg, model_cfg, budget={"tokens": 12_800})
    assert (many.num_iterations, many.global_batch_size, many.num_epochs) == (100, 4, None)
    assert many.budget.start == {"num_iterations": 6, "num_epochs": 2.0}
    assert "num_iterations 6 -> 100, num_epochs 2 -> null" in notices[0]
    few, _, notices = fit(cfg, model_cfg, budget={"tokens": 290})
    assert few.num_iterations * few.global_batch_size * 32 == pytest.approx(290, rel=TOLERANCE)
    assert few.global_batch_size == 3 and "global_batch_size 4 -> 3" in notices[0]
    in_pairs = cfg.model_copy(update={"batch_size": 2})
    near, _, notices = fit(in_pairs, model_cfg, budget={"tokens": 290})
    assert near.global_batch_size % 2 == 0 and "the run is marked" in notices[0]


def test_bytes_are_those_of_the_text_whatever_reads_them():
    """Of one text, a model of tokens and one of bytes read as much of it."""
    words = ("data=text", f"input_file={__file__}")
    steps = {}
    for architecture, tokenizer in (("vanilla", "bpe-300"), ("hnet", "byte")):
        cfg, model_cfg = config(
            architecture, *words, f"tokenizer={tokenizer}", "val_seq_len=8", "train_seq_len=8"
        )
        for quantity in ("bytes", "tokens"):
            found, _, _ = fit(cfg, model_cfg, budget={quantity: 100_000})
            steps[architecture, quantity] = (
                found.num_iterations * found.global_batch_size * found.train_seq_len
            )
    assert steps["vanilla", "tokens"] == pytest.approx(steps["hnet", "tokens"], rel=TOLERANCE)
    assert steps["hnet", "bytes"] == pytest.approx(100_000, rel=0.03)
    assert steps["vanilla", "bytes"] < 0.8 * steps["hnet", "bytes"]


def test_operations_are_those_of_the_model_that_is_found():
    cfg, model_cfg, notices = fit(*config("vanilla"), match={"params": 400_000}, budget={"flops": 10**11})
    per_token = built(cfg, model_cfg).cost(cfg.train_seq_len).training_per_token
    tokens = cfg.num_iterations * cfg.global_batch_size * cfg.train_seq_len
    assert tokens * per_token == pytest.approx(1e11, rel=TOLERANCE)
    assert [notice.partition("=")[0] for notice in notices] == ["match.params (total)", "budget.flops"]


@pytest.mark.slow
def test_a_run_says_what_it_was_given_and_goes_on_with_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = [
        *NANO,
        "val_bytes=500",
        "sample_tokens=0",
        "val_loss_every=0",
        "train_seq_len=64",
        "model_cfg.n_ctx=64",
    ]
    words = ["--hydra_model_cfg=vanilla", *short, "match.params=120K", "budget.bytes=20K", "save_steps=3"]
    _, err = command(*words, "output_dir=a")
    assert "note: match.params (total)=120k: " in err and "note: budget.bytes=20.0k: " in err
    manifest, summary = (
        json.loads((tmp_path / "a" / f"{name}.json").read_text()) for name in ("manifest", "summary")
    )
    assert summary["match"] == manifest["match"] and summary["match"]["met"]
    assert summary["match"]["found"] == summary["parameters"]["total"]
    assert summary["match"]["moved"]["model_cfg.d_model"][0] == 192
    assert summary["budget"]["found"] == summary["bytes"] and summary["budget"]["met"]
    command("resume=a", f"num_iterations={summary['steps'] + 2}")
    longer = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert longer["steps"] == summary["steps"] + 2 and longer["match"] == summary["match"]
    assert "budget" not in longer
    command("--hydra_model_cfg=a/config.yaml", "match.params=200K", "budget.bytes=10K", "output_dir=b")
    other = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert other["match"]["met"] and other["match"]["moved"]["model_cfg.d_model"][0] == 192
