"""Norms of rows: what the generic tests of kernels do not ask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels import rms_norm as rms_norm_op
from kernels.against import deviations
from kernels.choose import Call, Kernels
from kernels.layer_norm import add_layer_norm, layer_norm
from kernels.ngpt_update import ngpt_update
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm.closed_form import closed_form
from kernels.unit_norm import unit_norm
from models.layers.adaln import AdaptiveNorm
from models.layers.norms import LayerNorm, RMSNorm
from tests.kernels import samples
from tests.kernels.interpret import interpreted
from tests.kernels.samples import transposed

TRITON, PLAIN = Kernels({"default": "triton"}), Kernels({"default": "reference"})


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def test_references_are_torchs_own():
    x, branch, weight, bias = drawn(3, 5, 8), drawn(3, 5, 8) * 2, drawn(8), drawn(8) + 1
    total, y = add_rms_norm(x, branch, weight, 1e-5, PLAIN)
    assert torch.equal(total, x + branch) and torch.equal(y, F.rms_norm(x + branch, (8,), weight, 1e-5))
    assert torch.equal(rms_norm(x, None, 1e-5, PLAIN), F.rms_norm(x, (8,), None, 1e-5))
    total, y = add_layer_norm(x, branch, weight, bias, 1e-5, Kernels())
    assert torch.equal(total, x + branch) and torch.equal(y, F.layer_norm(total, (8,), weight, bias, 1e-5))
    assert torch.equal(
        layer_norm(x, weight, None, 1e-5, Kernels()), F.layer_norm(x, (8,), weight, None, 1e-5)
    )


@pytest.mark.parametrize("layout", [torch.clone, transposed])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", rms_norm_op.SPEC.small)
def test_gradients_by_formula_are_those_of_the_definition(size, dtype, layout):
    spec, sample = samples.drawn("rms_norm", size, getattr(torch, dtype))
    found = deviations(closed_form, rms_norm_op.reference, sample.map(layout))
    assert max(found.values()) <= spec.tolerance[dtype], found


def test_a_cpu_takes_the_formula_where_nothing_is_compiled():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert Kernels().foresee("rms_norm", Call(cpu, torch.float32))[0] == "closed_form"
    assert Kernels().foresee("rms_norm", Call(cpu, torch.float32, compiling=True))[0] == "reference"
    assert Kernels().foresee("rms_norm", Call(meta, torch.float32))[0] == "reference"
    assert rms_norm(drawn(8), drawn(8), 1e-5, Kernels()).shape == (8,)


def test_a_formula_has_no_second_derivative_and_says_so():
    x = drawn(3, 8)
    (dx,) = torch.autograd.grad(rms_norm(x, None, 1e-5, Kernels()).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("make", [lambda: RMSNorm(8, 1e-5), lambda: LayerNorm(8, 1e-5, True)])
def test_a_layer_adds_a_branch_in_the_streams_dtype(make):
    norm = make()
    norm.init_weights()
    x, branch = drawn(2, 3, 8), drawn(2, 3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, y = norm(x, branch)
        assert total.dtype == torch.float32 and torch.equal(total, x + branch)
        assert y.dtype == torch.bfloat16 and torch.equal(y, norm(total))


@pytest.mark.parametrize("used", ["total", "normed"])
def test_an_output_that_nobody_reads(used):
    x, branch, weight = drawn(3, 8), drawn(3, 8) * 2, drawn(8)

    def gradients(kernels):
        outputs = dict(zip(("total", "normed"), add_rms_norm(x, branch, weight, 1e-5, kernels), strict=True))
        return torch.autograd.grad(outputs[used].sin().sum(), (x, branch), retain_graph=True)

    with interpreted():
        found = gradients(TRITON)
    torch.testing.assert_close(found, gradients(Kernels()))


@pytest.mark.parametrize("shape", [(3, 1), (1, 1), (3, 5), (1, 5)], ids=str)
def test_modulation_of_every_shape(shape):
    """Of rows of a batch, of all, of positions: what the diffusion models condition on."""
    norm = AdaptiveNorm(8, 1e-5)
    norm.init_weights()
    x, shift, scale = drawn(3, 5, 8), drawn(*shape, 16)[..., :8], drawn(*shape, 8)

    def results():
        y = norm(x, shift, scale)
        return y, *torch.autograd.grad(y.sin().sum(), (x, shift, scale, norm.weight))

    expected = results()
    norm.kernels = TRITON
    with interpreted():
        found = results()
    torch.testing.assert_close(found, expected)


def test_a_step_of_ngpt_stays_on_the_sphere():
    """Equations 10 and 11 by hand; what has no direction does not move."""
    h = unit_norm(drawn(3, 4, 8).double(), Kernels())
    torch.testing.assert_close(h.norm(dim=-1), torch.ones(3, 4, dtype=torch.float64))
    branch, alpha = 5 * drawn(3, 4, 8).double().flip(0), torch.linspace(0, 1, 8, dtype=torch.float64)
    branch[0, 0] = 0
    direction = branch / branch.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    moved = h + alpha * (direction - h)
    y = ngpt_update(h, branch, alpha, Kernels())
    torch.testing.assert_close(y, moved / moved.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(unit_norm(torch.zeros(2, 3), Kernels()), torch.zeros(2, 3), rtol=0, atol=0)


def test_rows_that_do_not_fit_are_refused():
    x = torch.zeros(1, 8193)
    with interpreted(), pytest.raises(ValueError, match="rows of 8,193 columns do not fit"):
        rms_norm(x, None, 1e-5, Kernels({"rms_norm": "triton"}))
