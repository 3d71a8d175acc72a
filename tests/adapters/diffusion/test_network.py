"""Losses and logits of chosen positions: which code computes them, and in what portions."""

from functools import partial
from importlib import import_module

import pytest
import torch

import kernels.linear_diffusion_loss as fused
from adapters.diffusion.d3pm import _Dense
from kernels import KERNELS
from kernels.choose import Kernels
from kernels.linear_function_loss import chunked as function_chunks
from tests.adapters.diffusion.tiny import KINDS, batch, build, objective, train_context
from tests.adapters.diffusion.toy import F64


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("kind", ["mdl", "sedd", "d3pm", "bd3lm"])
def test_the_kernels_of_the_run_compute_the_loss(kind, implementation, monkeypatch):
    called = []
    for name, way in KERNELS[fused.OP].implementations.items():
        path, _, function = way.where.partition(":")
        module = import_module(path)
        monkeypatch.setattr(module, function, partial(_noted, called, name, getattr(module, function)))
    adapter = build(kind, trained=False)
    adapter.kernels = Kernels({"default": implementation})
    adapter(adapter.prepare(batch([0, 1]), train_context(2)))
    assert called == [implementation] == [*adapter.kernels.used["linear_diffusion_loss"]]


def _noted(called, name, run, *args, **options):
    called.append(name)
    return run(*args, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_and_the_plain_loss_agree(kind):
    found = []
    for implementation in ("chunked", "reference"):
        adapter = build(kind)
        adapter.kernels = Kernels({"default": implementation})
        found.append(objective(adapter, [batch([0, 1, 2, 3])]))
    chunked, plain = found
    assert chunked[0] == pytest.approx(plain[0], rel=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(chunked[1], plain[1], strict=True))


def test_the_plain_loss_of_a_dense_chain_holds_all_logits_and_the_chunked_one_a_few(monkeypatch):
    monkeypatch.setattr(function_chunks, "rows_at_once", lambda *args: 5)
    sizes, dense = [], _Dense.loss

    def spy(self, network, hidden, rows, aux_weight):
        of_logits = network.loss_of_logits

        def counted(hidden, weights, function, aux_weight):
            def row_nats(logits, chosen):
                sizes.append(len(logits))
                return function(logits, chosen)

            return of_logits(hidden, weights, row_nats, aux_weight)

        network.loss_of_logits = counted
        return dense(self, network, hidden, rows, aux_weight)

    monkeypatch.setattr(_Dense, "loss", spy)
    for implementation in ("reference", "chunked"):
        sizes.clear()
        adapter = build("d3pm", trained=False, l0_mode="x0")
        adapter.kernels = Kernels({"default": implementation})
        adapter(adapter.prepare(batch([0, 1]), train_context(2)))
        assert sum(sizes) == 16 and max(sizes) == (16 if implementation == "reference" else 5)


def test_the_dense_loss_has_the_gradient_of_its_definition(monkeypatch):
    """In chunks of one row and of all rows."""
    values = []
    for chunk in (1, 2**20):
        monkeypatch.setattr(function_chunks, "rows_at_once", lambda *args, chunk=chunk: chunk)
        values.append(objective(build("d3pm", reverse_param="mixture"), [batch([0, 1, 2, 3])]))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(values[0][1], values[1][1], strict=True))
    adapter = build("d3pm", reverse_param="mixture")
    value, _ = objective(adapter, [batch([0, 1, 2, 3])])
    weight = adapter.model.output.weight
    slope = float(weight.grad[3, 5])
    with torch.no_grad():
        weight[3, 5] += 1e-6
    moved, _ = objective(adapter, [batch([0, 1, 2, 3])])
    assert (moved - value) / 1e-6 == pytest.approx(slope, rel=1e-3)


def test_logits_for_sampling_are_in_double_precision():
    adapter = build("mdl", trained=False).float()
    network = adapter.network()
    hidden = network.hidden(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), torch.arange(6))
    assert hidden.dtype == torch.float32
    assert {logits.dtype for _, logits in network.logits(hidden)} == {F64}
