"""A loss given as a function of logits: chunked against the definition, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.choose import Kernels
from kernels.linear_function_loss import linear_function_loss, reference

M, D, V, PADDED = 13, 6, 10, 12


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    weights = torch.rand(M, dtype=torch.float64, generator=generator).to(dtype)
    return normal(M, D), normal(PADDED, D), normal(PADDED), weights


def squares(logits, rows, with_ce=True):
    """A loss of row number and logits; more than a softmax can be written so."""
    number = torch.arange(rows.start, rows.stop, dtype=logits.dtype).unsqueeze(1)
    return (logits - number).square().sum(1), logits.logsumexp(1) if with_ce else None


@pytest.mark.parametrize("with_ce", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 5, 13, 99])
def test_chunks_give_value_and_gradients_of_the_definition(chunk_rows, with_ce):
    found = []
    for run, options in ((reference, {}), (linear_function_loss, {"chunk_rows": chunk_rows})):
        *leaves, weights = draw()
        loss = lambda logits, rows: squares(logits, rows, with_ce)  # noqa: E731
        total, nats, ce = run(*leaves, weights, loss, V=V, aux_weight=0.3, **options)
        assert not nats.requires_grad and (ce is not None) is with_ce
        (3 * total).backward()
        found.append([total.detach(), nats, *([ce] if with_ce else []), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_that_are_needed_are_computed():
    hidden, weight, bias, weights = draw()
    total, _, _ = linear_function_loss(
        hidden, weight.detach(), bias, weights, squares, V=V, aux_weight=0.3, chunk_rows=4
    )
    total.backward()
    wanted = torch.autograd.grad(
        reference(hidden, weight, bias, weights, squares, V=V, aux_weight=0.3)[0], bias
    )
    torch.testing.assert_close(bias.grad, wanted[0])
    with torch.no_grad():
        assert torch.isfinite(linear_function_loss(hidden, weight, bias, weights, squares, V=V)[1]).all()


def test_low_precision_rows_have_statistics_in_full():
    hidden, weight, bias, weights = draw(torch.bfloat16)
    total, nats, _ = linear_function_loss(hidden, weight, bias, weights, squares, V=V, chunk_rows=5)
    total.backward()
    assert total.dtype == nats.dtype == torch.float32 and weight.grad.dtype == torch.bfloat16


def test_the_kernels_of_the_run_choose():
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] >= V:
                self.rows = max(self.rows, len(result))
            return result

    hidden, weight = torch.zeros(2000, 1), torch.zeros(PADDED, 1)
    bias, weights = torch.zeros(PADDED), torch.ones(2000)
    kernels = Kernels({"default": "reference"})
    with Largest() as largest:
        linear_function_loss(hidden, weight, bias, weights, squares, V=V, kernels=kernels)
    assert largest.rows == 2000 and kernels.used == {"linear_function_loss": {"reference": "kernels.default"}}
    with Largest() as largest:
        linear_function_loss(hidden, weight, bias, weights, squares, V=V, chunk_rows=7)
    assert largest.rows <= PADDED
