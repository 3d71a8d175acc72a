"""The ratio loss, what is reported of chunks, and how operations are counted at the chunks that there were."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapters.base import weighted_loss
from models.hierarchy.chunking import straight_through
from models.hierarchy.routing import ratio_loss
from tests.contract.tiny import (
    SEQ_LEN,
    adapter_of,
    batch_for,
    batch_of,
    context,
    loss_and_gradients,
    move_away_from_uniform,
    split,
)

TWO = (
    'model_cfg.arch_layout=["m1",["T1m1",["T1"],"m1"],"m1"]',
    *("model_cfg.n_layers=null", "model_cfg.num_compression_layers=null", "model_cfg.target_ratio=[2.0,3.0]"),
)


def two_stages(*more):
    adapter = adapter_of("hnet", *TWO, *more, dtype=torch.float64)
    move_away_from_uniform(adapter, std=0.1)
    return adapter


@pytest.mark.parametrize("n", [2.0, 3.0, 6.5])
def test_values_of_the_ratio_loss(n):
    """Those that the paper names, and its gradient in G; F has none."""
    for f, g, value in ((1 / n, 1 / n, 1), (1, 1, n), (0, 0, n / (n - 1)), (0.4, 0.2, None)):
        opened, probability = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (f, g))
        loss = ratio_loss(opened, probability, n)
        loss.backward()
        if value is not None:
            assert loss.item() == pytest.approx(value)
        assert probability.grad.item() == pytest.approx(n * (n * f - 1) / (n - 1))
        assert opened.grad is None


def test_the_ratio_loss_falls_below_1_where_both_parts_differ():
    assert ratio_loss(torch.tensor(0.1), torch.tensor(0.9), 2.0) < 1


def test_what_is_passed_through_is_exactly_1():
    c = torch.rand(10_000).requires_grad_()
    one = straight_through(c)
    assert (one == 1).all()
    one.sum().backward()
    assert (c.grad == 1).all()


def by_hand(adapter, told):
    """Sum over rows and stages."""
    total = 0.0
    for stage, n in enumerate(adapter.model_cfg.ratios):
        for row in range(told["opened"].shape[1]):
            places = told["places"][stage, row]
            total += ratio_loss(
                told["opened"][stage, row] / places, told["probability"][stage, row] / places, n
            )
    return total


def test_the_ratio_loss_is_that_of_each_row_and_is_really_added():
    adapter, batch = two_stages(), None
    batch = batch_for(adapter)
    prepared = adapter.prepare(batch, context())
    output, told = adapter(prepared), adapter.hidden(prepared).extra
    assert list(output.terms) == ["ce", "ratio"] and not output.terms["ratio"].likelihood
    assert told["opened"].shape == (2, 4) and (told["places"][1] == told["opened"][0]).all()
    torch.testing.assert_close(output.terms["ratio"].sum, by_hand(adapter, told))
    whole = weighted_loss(output.terms, prepared.denominators)
    ce = output.terms["ce"].sum / prepared.denominators["tokens"]
    torch.testing.assert_close(whole - ce, 0.03 * by_hand(adapter, told) / 4)
    assert whole > ce + 0.03


def test_the_ratio_loss_alone_moves_the_routers():
    adapter = two_stages()
    adapter(adapter.prepare(batch_for(adapter), context())).terms["ratio"].sum.backward()
    moved = {name for name, p in adapter.named_model_parameters() if p.grad is not None and p.grad.any()}
    routers = {name for name, _ in adapter.named_model_parameters() if "routing_module" in name}
    assert len(routers) == 4 and routers <= moved


def test_the_published_form_depends_on_how_a_step_is_cut_and_says_so():
    row, published = two_stages(), two_stages("model_cfg.ratio_over=batch")
    assert not row.depends_on_split and "ratio_over=row is not" in published.depends_on_split
    batch = batch_for(row)
    batch.tokens[0] = 7  # rows whose parts differ
    for adapter, same in ((row, True), (published, False)):
        whole, _ = loss_and_gradients(adapter, [batch])
        parts, _ = loss_and_gradients(adapter, split(batch, [1, 3]))
        assert (parts["ratio"] == pytest.approx(whole["ratio"], rel=1e-9)) == same
        assert parts["ce"] == pytest.approx(whole["ce"], rel=1e-9)
    prepared = published.prepare(batch, context())
    told, output = published.hidden(prepared).extra, published(prepared)
    sums = {name: part.sum(1) for name, part in told.items()}
    pairs = zip(sums["opened"] / sums["places"], sums["probability"] / sums["places"], [2, 3], strict=True)
    torch.testing.assert_close(output.terms["ratio"].sum / 4, sum(ratio_loss(f, g, n) for f, g, n in pairs))


def test_what_is_reported():
    adapter = two_stages()
    prepared = adapter.prepare(batch_for(adapter), context())
    output, told = adapter(prepared), adapter.hidden(prepared).extra

    def mean(name):
        return float(output.metrics[name].sum / output.metrics[name].count)

    opened = told["opened"].sum(1)
    assert mean("boundary_share_1") == pytest.approx(float(opened[0]) / (4 * SEQ_LEN))
    assert mean("boundary_share_2") == pytest.approx(float(opened[1] / opened[0]))
    for stage in (1, 2):
        assert mean(f"bytes_per_chunk_{stage}") == pytest.approx(4 * SEQ_LEN / float(opened[stage - 1]))
        assert 0.5 < mean(f"probability_at_boundaries_{stage}") <= 1
        assert 0 < mean(f"boundary_probability_{stage}") < mean(f"probability_at_boundaries_{stage}")
    losses = mean("ratio_loss_1") + mean("ratio_loss_2")
    assert losses == pytest.approx(float(output.terms["ratio"].sum.detach()) / 4)
    assert adapter.console_metrics == ("bytes_per_chunk_1", "bytes_per_chunk_2")
    assert set(adapter.console_metrics) <= output.metrics.keys()
    found = adapter.eval().likelihood(batch_for(adapter), context(phase="eval")).metrics
    assert set(adapter.console_metrics) <= found.keys()


def test_operations_are_those_of_the_chunks_that_there_were():
    adapter = two_stages()
    prepared = adapter.prepare(batch_for(adapter), context())
    output, told = adapter(prepared), adapter.hidden(prepared).extra
    each = [
        adapter.model.flops_of([SEQ_LEN, *(float(n) for n in told["opened"][:, row])], SEQ_LEN)
        for row in range(4)
    ]
    assert float(output.flops) == pytest.approx(SEQ_LEN * sum(f.training_per_token for f in each))
    few, many = (adapter.model.flops_of([32, n, n], 32).training_per_token for n in (1.0, 32.0))
    assert few < float(output.flops) / (4 * SEQ_LEN) < many


def test_a_run_of_one_byte_may_open_a_chunk_at_every_byte():
    """As of a trained model: as many chunks as bytes fit everywhere, and their text is that of a whole."""
    adapter = adapter_of("hnet", "model_cfg.n_ctx=600", dtype=torch.float64)
    router = adapter.model.backbone.routing_module
    with torch.no_grad():
        router.k_proj_layer.weight.neg_()
    batch = batch_of(np.full((2, 513), ord("T")))
    prepared = adapter.prepare(batch, context(2))
    output, told = adapter(prepared), adapter.hidden(prepared).extra
    assert told["opened"].tolist() == [[512.0, 512.0]]
    loss = weighted_loss(output.terms, prepared.denominators)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in adapter.parameters())
    assert float(output.metrics["ratio_loss_1"].sum) / 2 > 1.9
    tokens = prepared.tensors["inputs"]
    with torch.no_grad():
        cache = adapter.model.init_cache(2)
        pieces = [adapter.model(piece, cache=cache).states for piece in (tokens[:, :500], tokens[:, 500:])]
        whole = adapter.model(tokens).states
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


def test_the_baseline_of_fixed_chunks_is_told_apart():
    adapter = adapter_of("hnet", "model_cfg.chunking=fixed", "model_cfg.target_ratio=4.0")
    output = adapter(adapter.prepare(batch_for(adapter), context()))
    assert list(output.terms) == ["ce"] and any("H-Net (pool)" in note for note in adapter.notes)
    assert float(output.metrics["bytes_per_chunk_1"].sum / output.metrics["bytes_per_chunk_1"].count) == 4


def test_the_picture_of_a_text_is_of_its_chunks():
    adapter, text = two_stages().eval(), "import os\nimport sys\nÄ = 1\n"
    tokens = torch.tensor([[adapter.tokenizer.eot, *text.encode()]])
    with torch.no_grad():
        found, told = adapter.annotate(text), adapter.model(tokens).extra
    assert [one.name[:7] for one in found.spans] == ["stage 1", "stage 2"]
    assert told["boundaries"].sum((1, 2)).tolist() == told["opened"][:, 0].tolist()
    within, outer = told["boundaries"][1, 0], told["boundaries"][0, 0]
    assert (outer | ~within).all() and 1 < within.sum() < outer.sum() < len(outer), "chunks of chunks"
    for one, begins in zip(found.spans, told["boundaries"][:, 0, 1:], strict=True):
        begins[0] = True  # of what comes before the first of the text
        assert [span.start for span in one.spans] == begins.nonzero()[:, 0].tolist()
        assert [span.end for span in one.spans][:-1] == [span.start for span in one.spans][1:]
        assert one.spans[-1].end == len(text.encode())
    assert not adapter.annotate("").spans[0].spans


def test_rates_scale_with_the_innermost_width():
    adapter = adapter_of("hnet", "model_cfg.d_model=[48,64]")
    assert adapter.width == 64 and "2.477, 1.517" in adapter.notes[0]
