"""NorMuon against the algorithm restated matrix by matrix in fp64."""

import pytest
import torch
from torch.nn import Parameter

from tests.trainer.optim.test_muon import SHAPES, assert_steps_equal, matrices, orthogonalise_one
from trainer.optim.normuon import NorMuon


class ReferenceNorMuon:
    """One plain matrix; the second moment follows rows of what is tall or square, columns of what is wide."""

    def __init__(self, weight: torch.Tensor, lr: float, mu: float, beta2: float, decay: float) -> None:
        self.weight, self.momentum = weight.clone(), torch.zeros_like(weight)
        self.lr, self.mu, self.beta2, self.decay = lr, mu, beta2, decay
        rows, columns = weight.shape
        self.of_rows = rows >= columns
        self.second = torch.zeros(rows if self.of_rows else columns, dtype=weight.dtype)
        self.scale = max(1.0, rows / columns) ** 0.5

    def step(self, gradient: torch.Tensor) -> None:
        self.momentum = self.mu * self.momentum + (1 - self.mu) * gradient
        o = orthogonalise_one((1 - self.mu) * gradient + self.mu * self.momentum)
        lines = o if self.of_rows else o.T
        self.second = self.beta2 * self.second + (1 - self.beta2) * (lines**2).mean(dim=1)
        lines = lines / torch.sqrt(self.second.clamp(min=1e-10))[:, None]
        update = lines if self.of_rows else lines.T
        update = update * (o.norm() / update.norm())
        shrunk = self.weight - self.lr * self.decay * self.weight
        self.weight = shrunk - self.lr * self.scale * update


def test_equals_the_reference_matrix_by_matrix():
    """Wide, tall and square ones, fused projections and stacks of experts."""
    torch.manual_seed(0)
    shapes = [*SHAPES, ((7, 7), 1)]
    params = [Parameter(torch.randn(shape, dtype=torch.float64)) for shape, _ in shapes]
    splits = [split for _, split in shapes]
    references = [
        ReferenceNorMuon(matrix, lr=0.03, mu=0.9, beta2=0.8, decay=0.2)
        for p, split in zip(params, splits, strict=True)
        for matrix in matrices(p.detach(), split)
    ]
    optimizer = NorMuon(
        [{"params": params, "splits": splits}], lr=0.03, momentum=0.9, beta2=0.8, weight_decay=0.2
    )
    assert_steps_equal(optimizer, references)


@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16)])
def test_the_norm_of_the_update_is_that_of_muon_and_its_lines_come_to_one_length(monkeypatch, shape):
    """In fp32, on gradients whose rows and columns are of very different sizes."""
    monkeypatch.setattr("trainer.optim.muon.iteration_dtype", lambda dtype, device: torch.float32)
    torch.manual_seed(1)
    sizes = torch.logspace(0, -2, shape[0])[:, None] * torch.logspace(-1, 0, shape[1])
    start, gradients = torch.randn(shape), [sizes * torch.randn(shape) for _ in range(3)]
    spreads = {}
    for kind, options in (("muon", {"beta2": 0.0, "of": 0}), ("normuon", {"beta2": 0.9, "of": 1})):
        p = Parameter(start.clone())
        optimizer = NorMuon([p], lr=1.0, beta2=options["beta2"])
        if kind == "muon":
            monkeypatch.setattr(optimizer, "adjusted", lambda bucket, update: update)
        for gradient in gradients:
            before = p.detach().clone()
            p.grad = gradient.clone()
            optimizer.step()
        moved = before - p.detach()
        lengths = moved.norm(dim=1 if shape[0] >= shape[1] else 0)
        spreads[kind] = float(lengths.max() / lengths.min()), float(moved.norm())
    assert spreads["normuon"][1] == pytest.approx(spreads["muon"][1], rel=1e-5)
    # Rows of a square orthogonal matrix have one length to begin with, but for what the iteration leaves.
    assert spreads["normuon"][0] < (1.0 if shape[0] == shape[1] else 0.7) * spreads["muon"][0]


def test_zeros_move_nothing_and_leave_finite_state():
    p = Parameter(torch.randn(6, 4))
    before = p.detach().clone()
    optimizer = NorMuon([p], lr=0.1)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)
    p.grad = torch.cat([torch.zeros(1, 4), torch.randn(5, 4)])  # a row without a gradient
    optimizer.step()
    assert p.isfinite().all() and torch.equal(p[0], before[0]) and not torch.equal(p[1], before[1])


def test_the_second_moment_is_small_fp32_and_saved_by_piece():
    p = Parameter(torch.randn(14, 8, dtype=torch.bfloat16))
    optimizer = NorMuon([{"params": [p], "splits": [(8, 4, 2)]}], lr=0.1)
    moments = {key: t for key, t in optimizer.state[p].items() if "second" in key}
    assert {key: (tuple(t.shape), t.dtype) for key, t in moments.items()} == {
        "second_moment.0": ((1, 8, 1), torch.float32),
        "second_moment.1": ((1, 1, 8), torch.float32),
        "second_moment.2": ((1, 1, 8), torch.float32),
    }
    p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(t.any() for t in moments.values()), "what is saved is what is used"


def test_bad_options():
    with pytest.raises(ValueError, match="0 <= beta2 < 1, got 1.0"):
        NorMuon([Parameter(torch.zeros(2, 2))], lr=0.1, beta2=1.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        NorMuon([Parameter(torch.zeros(2, 2))], lr=0.1, ns_steps=0)
