"""What a mixture of depths is trained by, scored by, and what it tells of its routing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from adapters import build_adapter
from adapters.base import GenerateOptions, Metric
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import adapter_of, batch_for, batch_of, config, context, loss_and_gradients, split

RANDOM, AUX = "model_cfg.router_type=random", "model_cfg.causal_method=aux_loss"
DEEPER = "model_cfg.n_layers=4"


@torch.no_grad()
def scored(adapter, batch, rows=4):
    return adapter.eval().likelihood(batch, context(rows, phase="eval"))


def value(metric: Metric) -> float:
    return float(metric.sum) / float(metric.count)


def sure(adapter, answer: float) -> None:
    """All predictors answer so."""
    for block in adapter.model.layers:
        if hasattr(block, "router"):
            nn.init.zeros_(block.router.predictor.down.weight)
            nn.init.constant_(block.router.predictor.down.bias, answer)


# -- terms ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_training_has_seen_the_future_and_is_no_likelihood():
    adapter = adapter_of("mod", DEEPER, "model_cfg.mod_bce_weight=0.5")
    prepared = adapter.prepare(batch_for(adapter), context())
    output = adapter(prepared)
    assert [*output.terms] == ["ce_topk", "bce"]
    assert not any(term.likelihood for term in output.terms.values())
    assert (output.terms["ce_topk"].weight, output.terms["bce"].weight) == (1.0, 0.5)
    assert prepared.denominators == {"tokens": 4 * 32, "positions": 4 * 32}


def test_the_binary_cross_entropy_is_the_mean_over_routed_blocks_of_all_positions():
    """Masked targets count in it too: their tokens are chosen like others."""
    adapter = adapter_of("mod", DEEPER, dtype=torch.float64)
    batch = batch_for(adapter)
    batch.weights[1, 5:] = 0
    prepared = adapter.prepare(batch, context())
    told = adapter.hidden(prepared).extra
    assert told["logit"].shape == (2, 4, 32) and told["chosen"].sum(-1).unique().tolist() == [4]
    p, chosen = told["logit"].sigmoid(), told["chosen"]
    expected = -torch.where(chosen, p, 1 - p).log().mean()
    term = adapter(prepared).terms["bce"]
    found = term.sum / prepared.denominators[term.denominator]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert float(found.detach()) == pytest.approx(math.log(2), rel=0.05), "it begins undecided"


@pytest.mark.parametrize("more", [RANDOM, AUX], ids=["random", "aux_loss"])
def test_splitting_a_batch_changes_nothing(more):
    adapter = adapter_of("mod", more, DEEPER, dtype=torch.float64)
    batch = batch_for(adapter)
    whole, parts = (loss_and_gradients(adapter.train(), split(batch, sizes)) for sizes in ([4], [1, 3]))
    assert parts[0] == pytest.approx(whole[0], rel=1e-9)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, rtol=1e-7, atol=1e-12, msg=name)
    assert set(whole[1]) == {name for name, _ in adapter.named_model_parameters()}, "every one has a gradient"
    assert ("bce" in whole[0]) == (more == AUX), "nothing is learned of random scores"


def test_the_weight_of_the_predictors_loss_moves_nothing_but_predictors():
    found = []
    for weight in (0.0, 1.0):
        adapter = adapter_of("mod", DEEPER, f"model_cfg.mod_bce_weight={weight}", dtype=torch.float64)
        batch = batch_for(adapter)
        found.append((scored(adapter, batch).nats, loss_and_gradients(adapter.train(), [batch])[1]))
    (nats, without), (same_nats, with_) = found
    assert torch.equal(nats, same_nats)
    for name, gradient in without.items():
        if "predictor" in name:
            assert not gradient.any() and with_[name].any(), name
        else:
            torch.testing.assert_close(with_[name], gradient, rtol=1e-10, atol=1e-15, msg=name)


# -- random scores ----------------------------------------------------------------------------------------------------


def test_random_scores_are_of_each_row_and_step_and_in_evaluation_of_neither():
    adapter = adapter_of("mod", RANDOM)
    batch = batch_for(adapter)

    def seeds(**given):
        return adapter.prepare(batch, context(**given)).tensors["row_seeds"]

    assert len(seeds().unique()) == 4 and not torch.equal(seeds(), seeds(step=1))
    assert "row_seeds" not in adapter.prepare(batch, context(phase="eval")).tensors, "those of text"
    assert torch.equal(scored(adapter, batch).nats, scored(adapter, batch).nats)


# -- what is reported -------------------------------------------------------------------------------------------------


def test_training_tells_of_its_routing():
    adapter = adapter_of("mod", DEEPER)
    sure(adapter, 50.0)
    prepared = adapter.prepare(batch_for(adapter), context())
    metrics = adapter(prepared).metrics
    told = adapter.hidden(prepared).extra
    assert metrics.keys() == {
        "largest_router_score",
        "foretold_share",
        "routing_accuracy_1",
        "routing_accuracy_3",
    }
    largest = metrics["largest_router_score"]
    assert largest.reduce == "max" and float(largest.sum) == float(told["score"].detach().abs().max())
    assert value(metrics["foretold_share"]) == 1
    assert value(metrics["routing_accuracy_1"]) == value(metrics["routing_accuracy_3"]) == 4 / 32


def test_scores_are_of_causal_routing_and_the_loss_of_the_choice_stands_beside():
    adapter = adapter_of("mod", DEEPER, dtype=torch.float64)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
    batch = batch_for(adapter)
    trained = adapter.train()(adapter.prepare(batch, context())).terms["ce_topk"]
    sure(adapter, -50.0)
    found = scored(adapter, batch)
    metrics = found.metrics
    assert metrics.keys() == {"used_share", "ce_topk", "routing_accuracy_1", "routing_accuracy_3"}
    assert value(metrics["ce_topk"]) == pytest.approx(float(trained.sum.detach()) / 128, rel=1e-12)
    assert value(metrics["used_share"]) == 0 and value(metrics["routing_accuracy_1"]) == 1 - 4 / 32
    assert abs(float(found.nats.sum()) / 128 - value(metrics["ce_topk"])) > 1e-3
    sure(adapter, 50.0)
    other = scored(adapter, batch)
    assert value(other.metrics["used_share"]) == 1
    assert value(other.metrics["ce_topk"]) == pytest.approx(value(metrics["ce_topk"]), rel=1e-12)
    assert not torch.allclose(other.nats, found.nats), "the predictors are asked"


def test_rows_of_padding_count_in_no_figure():
    adapter = adapter_of("mod", dtype=torch.float64)
    batch = batch_for(adapter)
    alone = scored(adapter, split(batch, [2, 2])[0]).metrics
    batch.weights[2:] = 0
    found = scored(adapter, batch).metrics
    for name, metric in alone.items():
        assert value(found[name]) == pytest.approx(value(metric), rel=1e-12), name
        assert float(found[name].count) == float(metric.count) > 0, name


def test_padding_of_a_row_is_not_chosen():
    """Whatever a short row is padded to, its figures are those of its own tokens."""
    adapter = adapter_of("mod", DEEPER, dtype=torch.float64)
    batch, short = batch_for(adapter), 12
    alone = scored(adapter, batch_of(batch.tokens[1:2, : short + 1])).metrics
    batch.weights[[0, 2, 3]] = 0
    batch.weights[1, short:] = 0
    found = scored(adapter, batch).metrics
    for name, metric in alone.items():
        assert value(found[name]) == pytest.approx(value(metric), rel=1e-12), name


@pytest.mark.parametrize(("answer", "share"), [(50.0, 1.0), (-50.0, 0.0)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_text_tells_how_much_it_used(answer, share, use_cache):
    adapter = adapter_of("mod").eval()
    sure(adapter, answer)
    options = GenerateOptions(max_new_tokens=4, stop_at_document_end=False, use_cache=use_cache)
    assert adapter.generate([[1, 2], []], options).metrics == {"used_share": share}


@pytest.mark.parametrize("more", [RANDOM, AUX, "model_cfg.every_other=false"], ids=str)
def test_text_through_the_cache_is_text_without(more):
    adapter = adapter_of("mod", more, "model_cfg.sliding_window=5", dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    prompts = [np.arange(9).tolist(), [3], []]
    texts = [
        adapter.generate(
            prompts, GenerateOptions(max_new_tokens=30, temperature=0.0, use_cache=use_cache)
        ).tokens
        for use_cache in (True, False)
    ]
    assert texts[0] == texts[1] and len({tuple(text) for text in texts[0]}) > 1


# -- what is drawn ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_tokens_that_are_drawn_are_those_that_a_block_changes():
    adapter = build_adapter(*config("mod", DEEPER, "model_cfg.vocab_size=null"), ByteTokenizer()).eval()
    text = "what of \0 it enters?"
    changed = {}

    def keep(block, given, output):
        changed[block.layer] = (output[0] != given[0]).any(-1)[0, 1:].nonzero().flatten().tolist()

    for block in adapter.model.layers:
        if hasattr(block, "router"):
            nn.init.normal_(block.router.predictor.down.weight, std=10.0)
            block.register_forward_hook(keep)
    found = adapter.annotate(text)
    assert [one.name for one in found.spans] == [f"layer {i}: tokens that enter" for i in (1, 3)]
    assert [[span.start for span in one.spans] for one in found.spans] == [changed[1], changed[3]]
    assert all(0 < len(places) < len(text) for places in changed.values())
