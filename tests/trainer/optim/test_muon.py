"""Muon against the algorithm restated matrix by matrix in fp64, and against torch.optim.Muon."""

import math

import pytest
import torch
from torch.nn import Parameter

from kernels.choose import Kernels
from kernels.newton_schulz import newton_schulz
from tests.kernels.interpret import interpreted
from trainer.optim import muon
from trainer.optim.muon import Muon


def orthogonalise_one(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Apply the polynomial ax + bx^3 + cx^5 to the singular values: no Gram matrices, no transposes."""
    u, s, vt = torch.linalg.svd(matrix / (torch.sqrt((matrix**2).sum()) + 1e-7), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vt


class ReferenceMuon:
    """One plain matrix; the update as Jordan et al. (2024) write it."""

    def __init__(self, weight: torch.Tensor, scale: str, lr: float, mu: float, decay: float) -> None:
        self.weight, self.momentum = weight.clone(), torch.zeros_like(weight)
        self.lr, self.mu, self.decay = lr, mu, decay
        rows, columns = weight.shape
        self.scale = (
            math.sqrt(max(1, rows / columns)) if scale == "spectral" else 0.2 * math.sqrt(max(rows, columns))
        )

    def step(self, gradient: torch.Tensor) -> None:
        self.momentum = self.mu * self.momentum + (1 - self.mu) * gradient
        nesterov = (1 - self.mu) * gradient + self.mu * self.momentum
        shrunk = self.weight - self.lr * self.decay * self.weight
        self.weight = shrunk - self.lr * self.scale * orthogonalise_one(nesterov)


# (shape, split): wide, tall, two of one shape, a fused projection, a stack of experts, a stack of fused ones, and fused
# projections of unequal parts, alone and stacked
SHAPES = [((6, 10), 1), ((10, 6), 1), ((6, 10), 1), ((24, 8), 3), ((3, 8, 5), 1), ((2, 6, 4), 2)]
SHAPES += [((14, 8), (8, 4, 2)), ((2, 9, 5), (6, 3))]


def matrices(tensor: torch.Tensor, split: int | tuple[int, ...]) -> list[torch.Tensor]:
    stack = tensor if tensor.ndim == 3 else tensor[None]
    rows = split if isinstance(split, tuple) else [tensor.shape[-2] // split] * split
    return [part for matrix in stack for part in matrix.split(rows, dim=0)]


def assert_steps_equal(optimizer, references) -> None:
    """Four steps of random gradients; `references`: of each matrix of the optimizer's one group, in their order."""
    (group,) = optimizer.param_groups
    pairs = list(zip(group["params"], group["splits"], strict=True))
    for _ in range(4):
        gradients = []
        for p, split in pairs:
            p.grad = torch.randn_like(p)
            gradients += matrices(p.grad, split)
        for reference, gradient in zip(references, gradients, strict=True):
            reference.step(gradient)
        optimizer.step()
    ours = [matrix for p, split in pairs for matrix in matrices(p.detach(), split)]
    for weight, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(weight, reference.weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", ["spectral", "rms"])
def test_equals_the_reference_matrix_by_matrix(scale):
    torch.manual_seed(0)
    params = [Parameter(torch.randn(shape, dtype=torch.float64)) for shape, _ in SHAPES]
    splits = [split for _, split in SHAPES]
    references = [
        ReferenceMuon(matrix, scale, lr=0.03, mu=0.9, decay=0.2)
        for p, split in zip(params, splits, strict=True)
        for matrix in matrices(p.detach(), split)
    ]
    optimizer = Muon(
        [{"params": params, "splits": splits}], lr=0.03, momentum=0.9, weight_decay=0.2, scale=scale
    )
    assert_steps_equal(optimizer, references)


@pytest.mark.parametrize(("scale", "adjust"), [("spectral", "original"), ("rms", "match_rms_adamw")])
@pytest.mark.parametrize("own_iteration", [True, False])
def test_equals_torch_muon(monkeypatch, scale, adjust, own_iteration):
    """To rounding of bf16 with torch's own iteration; exactly once both iterate in fp32."""
    torch.manual_seed(1)
    if own_iteration:
        monkeypatch.setattr(muon, "iteration_dtype", lambda dtype, device: torch.float32)
        monkeypatch.setattr(
            torch.optim._muon,
            "_zeropower_via_newtonschulz",
            lambda grad, coefficients, steps, eps: newton_schulz(grad[None], Kernels(), steps=steps)[0],
        )
    ours = [Parameter(torch.randn(shape)) for shape in ((32, 48), (48, 32), (32, 32))]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    a = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1, scale=scale)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn=adjust)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])
        if own_iteration:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
        else:
            assert (p - q).norm() < 0.03 * (q - start).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_come_near_one_and_directions_stay(dtype):
    torch.manual_seed(2)
    matrices = torch.randn(3, 24, 40, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ newton_schulz(matrices, Kernels(), dtype=dtype).double() @ vt.mT  # (B, 24, 24)
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < (1e-9 if dtype == torch.float64 else 0.1)


def test_iterates_in_fp64_in_an_fp64_model():
    assert muon.iteration_dtype(torch.float64, "cpu") == torch.float64
    assert muon.iteration_dtype(torch.float32, "mps") == torch.float32


def test_the_iteration_is_the_runs_to_choose():
    p = Parameter(torch.randn(8, 6))
    p.grad = torch.randn_like(p)
    optimizer = Muon([p], lr=0.1)
    optimizer.kernels = Kernels({"newton_schulz": "reference"})
    optimizer.step()
    assert optimizer.kernels.used == {"newton_schulz": {"reference": "kernels.newton_schulz"}}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_takes_the_same_step(monkeypatch, dtype):
    """Whole steps over every kind of parameter, as TRITON_INTERPRET=1 takes them, also where a CPU has bf16."""
    monkeypatch.setattr(muon, "iteration_dtype", lambda *args: dtype)
    generator = torch.Generator().manual_seed(7)
    starts, gradients = ([torch.randn(shape, generator=generator) for shape, _ in SHAPES] for _ in range(2))
    moved = {}
    for name in ("reference", "triton"):
        params = [Parameter(start.clone()) for start in starts]
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer = Muon([{"params": params, "splits": [split for _, split in SHAPES]}], lr=0.1)
        optimizer.kernels = Kernels({"newton_schulz": name})
        with interpreted():
            optimizer.step()
        assert [*optimizer.kernels.used["newton_schulz"]] == [name]
        moved[name] = [p.detach() - start for p, start in zip(params, starts, strict=True)]
    for plain, ours in zip(*moved.values(), strict=True):
        assert (plain - ours).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * plain.norm()


def test_fused_weight_is_not_one_matrix():
    torch.manual_seed(3)
    start = torch.randn(24, 8, dtype=torch.float64)
    gradient = torch.randn_like(start)
    results = []
    for split in (1, 3):
        p = Parameter(start.clone())
        p.grad = gradient.clone()
        Muon([{"params": [p], "splits": [split]}], lr=1.0).step()
        results.append(start - p.detach())
    as_one, as_three = results
    assert torch.linalg.svdvals(as_one).max() > 1.3  # scaled by sqrt(24 / 8)
    assert all(torch.linalg.svdvals(part).max() < 1.3 for part in as_three.chunk(3))


def test_momentum_is_fp32_for_bf16_weights():
    p = Parameter(torch.randn(8, 8, dtype=torch.bfloat16))
    p.grad = torch.randn_like(p)
    optimizer = Muon([p], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.float32
    assert p.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flag_of_zero_changes_nothing(dtype):
    torch.manual_seed(4)
    start = torch.randn(8, 6, dtype=dtype)
    gradient = torch.randn_like(start)
    results = []
    for flag in (None, torch.zeros(())):
        p = Parameter(start.clone())
        p.grad = gradient.clone()
        optimizer = Muon([p], lr=0.1, weight_decay=0.3)
        optimizer.found_inf = flag
        optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)
    assert not torch.equal(results[0], start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "muonic"}, "'muonic' is not one of spectral, rms"),
        ({"ns_steps": 0}, "at least 1, got 0"),
        ({"coefficients": "polar"}, "'polar' is not one of classic, polar_express"),
        ({"momentum": 1.0}, "momentum < 1, got 1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Muon([Parameter(torch.zeros(2, 2))], lr=0.1, **options)


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        Muon([Parameter(torch.zeros(4))], lr=0.1)
    with pytest.raises(ValueError, match="8 rows cannot be split into 3"):
        Muon([{"params": [Parameter(torch.zeros(8, 4))], "splits": [3]}], lr=0.1)
