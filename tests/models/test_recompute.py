"""What is kept where activations are recomputed in backward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kernels.library import opaque
from models.layers.recompute import Kept, recomputing
from trainer.session import _recompute_blocks


def _off(scores: Tensor) -> Tensor:
    """As computed anew on another day: every call a little further off."""
    global calls
    calls += 1
    return scores + 1e-3 * (calls - 1) * torch.tensor([0.0, 1.0, -1.0])


calls = 0
off = opaque("test_off", _off, torch.empty_like)
off.register_autograd(lambda ctx, gradient: gradient)


class Routed(nn.Module):
    """A product with the better of three matrices, by scores of which every other call is a little off."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.router = nn.Parameter(torch.randn(3, 8, generator=generator))
        self.matrices = nn.Parameter(torch.randn(3, 8, 8, generator=generator))
        self.kept: nn.Module = Kept()
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 8) -> (N, 8), and how many rows chose which matrix (3,)."""
        self.calls += 1
        off = 1e-3 * (self.calls - 1) * torch.tensor([0.0, 1.0, -1.0])
        scores = self.kept(x @ self.router.T + off)
        shares, chosen = scores.softmax(-1).max(-1)
        rows = [x[chosen == e] @ self.matrices[e] for e in range(3)]  # shapes depend on the choice
        order = torch.cat([(chosen == e).nonzero()[:, 0] for e in range(3)])
        y = torch.zeros_like(x).index_put((order,), torch.cat(rows))
        return (y * shares[:, None]).sin(), chosen.bincount(minlength=3)


def step(block: Routed, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, load = block.train()(x)
    return [y, load, *torch.autograd.grad(y.square().sum(), (x, *block.parameters()))]


def tokens(which: str, block: Routed) -> Tensor:
    """(64, 8), nearly or quite without a preference of the router."""
    if which == "equal":
        return torch.ones(1, 8).expand(64, 8)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    within = torch.linalg.lstsq(block.router.detach(), torch.ones(3, 1)).solution.T  # scores all of them 1
    return within + 1e-4 * x


@pytest.mark.parametrize("which", ["near ties", "equal"])
def test_a_choice_is_not_made_again(which):
    plain, recomputed = Routed(), Routed()
    _recompute_blocks(SimpleNamespace(blocks=lambda: ["block"], model=nn.ModuleDict({"block": recomputed})))
    x = tokens(which, plain)
    expected, found = step(plain, x), step(recomputed, x)
    assert (plain.calls, recomputed.calls) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_without_it_another_choice_would_be_made():
    block = Routed()
    block.kept = nn.Identity()
    x = tokens("near ties", block)
    loads = [block(x)[1] for _ in range(2)]
    assert not torch.equal(*loads)


def test_of_activations_only_the_input_of_a_block_is_saved():
    block = Routed()
    _recompute_blocks(SimpleNamespace(blocks=lambda: ["block"], model=nn.ModuleDict({"block": block})))
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block.train()(torch.randn(64, 8, requires_grad=True))
    assert sum(saved) == 64 * 8


class Gathered(Routed):
    """Of one shape whatever is chosen, for the compiler."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.kept(off(x @ self.router.T))
        shares, chosen = scores.softmax(-1).max(-1)
        y = (x[:, None] @ self.matrices[chosen])[:, 0]
        return (y * shares[:, None]).sin(), (chosen[:, None] == torch.arange(3)).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kept", "not kept"])
def test_a_compiled_block_chooses_once_too(way):
    """And would choose again if nothing were kept, so that this test can fail."""
    global calls
    plain, compiled = Gathered(), Gathered()
    if way == "not kept":
        compiled.kept = nn.Identity()
    compiled.forward = recomputing(compiled)
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    x, found = tokens("near ties", plain), []
    for block in (plain, compiled):
        calls = 0
        found.append(step(block, x))
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))
    assert same == (way == "kept")
