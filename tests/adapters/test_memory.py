"""What a model with a memory is trained by, and what it tells of its chapters."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adapters import build_adapter
from adapters.base import GenerateOptions, weighted_loss
from adapters.memory import chapter_figures
from configs.compose import compose
from configs.messages import ConfigError
from data.tokenizers import ByteTokenizer
from models.memory.router import auxiliary, balance, squared_normaliser
from tests.contract.pair import Pair, train_here
from tests.contract.test_run import after_steps, assert_equal_states
from tests.contract.tiny import (
    adapter_of,
    batch_for,
    batch_of,
    config,
    context,
    loss_and_gradients,
    move_away_from_uniform,
    session_of,
)
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.resume import start_from_weights
from trainer.run.source import open_source

CHAPTERS = "model_cfg.use_chapters=true"
ALL_LOSSES = (CHAPTERS, "model_cfg.use_auxiliary_loss=true", "model_cfg.use_z_loss=true")


def told(adapter, phase="train", length=32):
    prepared = adapter.prepare(batch_for(adapter, length=length), context(phase=phase))
    return adapter(prepared), prepared


# -- losses -----------------------------------------------------------------------------------------------------------


def test_losses_of_routers_are_means_over_layers_and_are_reported_apart():
    adapter = adapter_of("memory", *ALL_LOSSES, "model_cfg.z_loss_coefficient=0.5", dtype=torch.float64)
    move_away_from_uniform(adapter)
    output, prepared = told(adapter)
    told_ = adapter.hidden(prepared).extra
    extra = {
        "load_balance": balance(told_["load"], told_["importance"]),
        "aux": auxiliary(told_["importance"]),
        "z": squared_normaliser(told_["squares"], told_["importance"]),
    }
    assert [*output.terms] == ["ce", "load_balance", "aux", "z"]
    assert [term.weight for term in output.terms.values()] == [1.0, 0.01, 0.01, 0.5]
    assert [name for name, term in output.terms.items() if term.likelihood] == ["ce"]
    for name in ("load_balance", "aux", "z"):
        assert extra[name].shape == (2,), "of each layer"
        assert float(output.terms[name].sum.detach() / 4) == pytest.approx(float(extra[name].detach().mean()))
    expected = output.terms["ce"].sum / 128 + 0.01 * (extra["load_balance"] + extra["aux"]).mean()
    expected = expected + 0.5 * extra["z"].mean()
    torch.testing.assert_close(weighted_loss(output.terms, prepared.denominators), expected)


@pytest.mark.parametrize("name", ["load_balance", "auxiliary", "z"])
def test_a_weight_of_zero_is_the_loss_switched_off(name):
    def found(*more):
        adapter = adapter_of("memory", *ALL_LOSSES, *more)
        return [*told(adapter)[0].terms]

    off = found(f"model_cfg.use_{name}_loss=false")
    assert off == found(f"model_cfg.{name}_loss_coefficient=0.0".replace("load_balance_loss", "load_balance"))
    assert len(off) == 3


def test_what_depends_on_the_split_is_said():
    assert "load_balance" in adapter_of("memory", CHAPTERS).depends_on_split
    assert not adapter_of("memory", CHAPTERS, "model_cfg.load_balance_coefficient=0.0").depends_on_split
    assert not adapter_of("memory").depends_on_split


def test_every_parameter_has_a_gradient_in_every_step():
    """Where no document is long enough for a decision, too."""
    for more in ([], ["model_cfg.routing_window_size=64"]):
        adapter = adapter_of("memory", *ALL_LOSSES, *more)
        _, gradients = loss_and_gradients(adapter, [batch_for(adapter)])
        assert set(gradients) == {name for name, _ in adapter.named_model_parameters()}
        assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("more", [[], [CHAPTERS, "model_cfg.routing_strategy_train=rolling"]], ids=str)
def test_recomputing_activations_under_autocast_changes_nothing(more):
    """Banks are shared by blocks, and autocast converts what they share once: as often in backward as before it."""
    words = [*more, "mixed_precision=bf16"]
    plain, again = (
        after_steps("memory", *words, f"gradient_checkpointing={how}", steps=2) for how in ("false", "true")
    )
    assert again[0] == plain[0]
    assert_equal_states(again[1], plain[1])


@pytest.mark.slow
def test_two_processes_balance_their_chapters_as_one(tmp_path):
    """Losses of routers, and their gradients, are of all decisions of a step, however few a process has."""
    words = [
        *(*ALL_LOSSES, "model_cfg.routing_strategy_train=token", "model_cfg.wo_init_zero=false"),
        *("model_cfg.load_balance_coefficient=3.0", "model_cfg.auxiliary_loss_coefficient=3.0"),
        *("model_cfg.z_loss_coefficient=1.0", "optimizer=sgd", "learning_rate=0.1", "num_iterations=4"),
        *("logging_steps=1", "val_loss_every=0", "sample_tokens=0", "max_grad_norm=0"),
    ]
    train(*config("memory", *words, "batch_size=4"), tmp_path / "one")
    with Pair() as pair:
        pair.ask(train_here, "memory", [*words, "batch_size=2"], tmp_path / "two")
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    one, two = ([line for line in lines if "loss" in line] for lines in (one, two))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3, 4]
    for left, right in zip(one, two, strict=True):
        for key in ("loss", "loss_load_balance", "loss_aux", "loss_z", "grad_norm"):
            assert math.isclose(left[key], right[key], rel_tol=2e-5), (left["step"], key)
    weights, others = (load_tensors(tmp_path / name, "model.pt") for name in ("one", "two"))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_padding_is_in_no_decision_of_training():
    """Rows with room behind them have the losses and loads of rows without (`chapters`), whatever decides."""
    for strategy in ("sequence", "rolling", "token"):
        words = (*ALL_LOSSES, f"model_cfg.routing_strategy_train={strategy}")
        adapter = adapter_of("memory", *words, dtype=torch.float64)
        move_away_from_uniform(adapter)
        padded = batch_for(adapter, length=32)
        whole = batch_of(padded.tokens[:, :21])
        padded.weights[:, 20:] = 0
        padded.doc_ids[:, 21:] = 1 + np.arange(12)
        one, other = (adapter(adapter.prepare(batch, context())) for batch in (whole, padded))
        for name, term in one.terms.items():
            torch.testing.assert_close(other.terms[name].sum, term.sum, rtol=1e-9, atol=1e-9, msg=name)
        assert torch.equal(one.metrics["chapters"].sum, other.metrics["chapters"].sum)
        assert int(one.metrics["chapters"].sum.sum()) > 0


# -- what is told -----------------------------------------------------------------------------------------------------


def test_shares_of_chapters_and_dead_ones():
    load = torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]])
    found = chapter_figures(load)
    assert (
        found["router_max_share"] == pytest.approx((0.75 + 0.25) / 2) and found["router_dead_chapters"] == 2
    )
    assert [found[f"chapter_{c}"] for c in range(4)] == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert chapter_figures(torch.zeros(2, 4, dtype=torch.int64))["router_max_share"] == 0


def test_metrics_of_a_step():
    adapter = adapter_of("memory", CHAPTERS, "model_cfg.routing_strategy_train=token", dtype=torch.float64)
    with torch.no_grad():
        for layer in adapter.model.memories:
            layer.router.weight.zero_()
    output, _ = told(adapter)
    entropy = output.metrics["router_entropy"]
    assert float(entropy.sum / entropy.count) == pytest.approx(math.log(4))
    assert output.metrics["chapters"].sum.tolist() == [[128, 128, 0, 0]] * 2


def test_a_text_is_shown_by_the_chapters_that_it_reads():
    words = (CHAPTERS, "model_cfg.num_shared_chapters=1", "model_cfg.vocab_size=null")
    adapter = build_adapter(*config("memory", *words), ByteTokenizer()).eval()
    spans = adapter.annotate("abcdefghijkl").spans
    assert [s.name for s in spans] == ["layer 0: chapters", "layer 1: chapters"]
    extra = adapter.hidden(adapter.prepare(adapter.one_row("abcdefghijkl"), context(phase="eval"))).extra
    labels = [" ".join(str(int(c) + 1) for c in chosen) for chosen in extra["chosen"][0, 0, 1:]]
    assert [span.label for span in spans[0].spans for _ in range(span.start, span.end)] == labels


def test_text_of_a_model_that_looks_ahead_is_read_anew_for_each_token():
    adapter = adapter_of(
        "memory", CHAPTERS, "model_cfg.routing_causality=lookahead", dtype=torch.float64
    ).eval()
    move_away_from_uniform(adapter)
    options = GenerateOptions(max_new_tokens=6, temperature=0.0, stop_at_document_end=False)
    assert adapter.non_causal_routing
    (text,) = adapter.generate([[1, 2]], options).tokens
    tokens = [adapter.tokenizer.eot, 1, 2]
    for token in text:
        out = adapter.model.logits(adapter.model(torch.tensor([tokens])).states[:, -1])
        assert int(out[..., : adapter.tokenizer.vocab_size].argmax()) == token
        tokens.append(token)


def test_scores_that_look_ahead_do_not_look_at_padding():
    adapter = adapter_of(
        "memory", CHAPTERS, "model_cfg.routing_causality=lookahead", dtype=torch.float64
    ).eval()
    move_away_from_uniform(adapter)
    batch = batch_for(adapter, rows=1)
    batch.weights[:, 20:] = 0
    before = adapter.likelihood(batch, context(1, phase="eval")).nats
    batch.tokens[:, 22:] = 0
    assert torch.equal(adapter.likelihood(batch, context(1, phase="eval")).nats, before)
    batch.tokens[:, 19] = (batch.tokens[:, 19] + 1) % 60
    assert not torch.equal(adapter.likelihood(batch, context(1, phase="eval")).nats, before)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("use_lora=true", "top-level field use_lora"), ("base_model_name=x", "type=memory_adapter")],
)
def test_fields_that_stand_elsewhere_are_refused_with_where(word, meant):
    with pytest.raises(ConfigError, match=meant):
        compose(["--hydra_model_cfg=memory", "preset=none", f"model_cfg.{word}"])


# -- weights of another -----------------------------------------------------------------------------------------------


def begun(path, *more):
    """A session that begins with the weights of a run, and what was said of it."""
    said: list[str] = []
    session = session_of("memory", "ema_decay=0.9", *more)
    console = SimpleNamespace(note=said.append, warn=said.append)
    start_from_weights(session, open_source(path, said.append), console)  # type: ignore[arg-type]
    return session, "; ".join(said)


def test_weights_of_vanilla_begin_a_run_whose_memory_starts_anew(tmp_path):
    """Averages too; a memory of another size is refused, and not started anew in silence."""
    words = ["num_iterations=1", "val_loss_every=0", "sample_tokens=0", "ema_decay=0.9"]
    train(*config("vanilla", *words), tmp_path / "control")
    session, said = begun(tmp_path / "control")
    assert "what memory adds to vanilla starts anew: layers.0.memory." in said
    theirs, mine = load_tensors(tmp_path / "control", "model.pt"), session.adapter.model.state_dict()
    fresh = adapter_of("memory").model.state_dict()
    assert theirs.keys() < mine.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs.get(name, fresh[name])), name
    average = load_tensors(tmp_path / "control", "ema.pt")["shadow"]
    for name, value in session.ema.shadow.items():
        assert torch.equal(value, average.get(name, fresh[name])), name
    train(*config("memory", *words), tmp_path / "memory")
    assert "what memory adds" not in begun(tmp_path / "memory")[1]
    with pytest.raises(ValueError, match="banks.0.weight"):
        begun(tmp_path / "memory", "model_cfg.num_memory_tokens=32")


# -- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [[], ["use_low_rank_projections=true"], ["memory_block_variant=B"], ["use_low_rank_memory=true"]],
    ids=str,
)
def test_operations_of_a_step_count_the_bank_once(more):
    """Few tokens and a large bank."""
    words = [f"model_cfg.{word}" for word in (*more, "num_memory_tokens=512")]
    adapter = adapter_of("memory", *words, vocabulary=128)
    prepared = adapter.prepare(batch_for(adapter, rows=2), context(2))
    adapter(prepared)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = adapter(prepared)
        weighted_loss(output.terms, prepared.denominators).backward()
    plan = adapter.flops(32)
    masked = 64 * (plan.reference.training_per_token - plan.training_per_token)
    assert float(output.flops) + masked == pytest.approx(counter.get_total_flops(), rel=0.01)
    half = adapter.prepare(batch_for(adapter, rows=2), context(4))
    assert float(adapter(half).flops) == pytest.approx(
        float(output.flops) - 0.5 * adapter.model.bank_flops().training_per_token
    )


def test_what_acts_on_a_token_is_its_chapters():
    adapter = adapter_of("memory", CHAPTERS, "model_cfg.num_memory_tokens=64")
    every = sum(p.numel() for p in adapter.parameters())
    assert adapter.active_parameters() == every - 32 * 64
    assert adapter_of("memory").active_parameters() is None, "all"
    keys = [adapter_of("memory", CHAPTERS, f"model_cfg.top_k_chapters={k}").flops(32).keys for k in (1, 2)]
    assert keys[1] - keys[0] == 2 * 4


def test_a_memory_that_stays_as_it_is_costs_no_gradients_of_it():
    """Of what multiplies a token: queries and outputs of two layers, 64 x 64 each."""
    planned, held = (adapter_of("memory", f"memory_lr={rate}").cost(32) for rate in (0.1, 0.0))
    assert planned.training_per_token - held.training_per_token == 2 * 4 * 64 * 64
