"""Masks within a range of masking probabilities, and the search for the range, against slow statements of both."""

import math

import pytest
import torch

from adapters.diffusion.clipping import ClipSearch, clipped_count
from models.bd3lm import BD3LMConfig
from tests.adapters.diffusion.toy import F64


def test_clipped_counts_are_the_binomial_law_given_the_range():
    n, t = torch.full((1, 4000), 4.0, dtype=torch.float64), torch.full((1, 4000), 0.3, dtype=torch.float64)
    u = torch.rand(1, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = clipped_count(n, t, u, (0.25, 0.75)).flatten().long()
    mass = torch.tensor([math.comb(4, j) * 0.3**j * 0.7 ** (4 - j) for j in (1, 2, 3)])
    expected = mass / mass.sum() * 4000
    counts = torch.bincount(k, minlength=5).double()
    assert counts[0] == counts[4] == 0
    assert float(((counts[1:4] - expected) ** 2 / expected).sum()) < 18.42  # 2 degrees of freedom


def law_of_masks(size, t, clip):
    """P(k masks) for k = 0, ..., size: binomial given the range, whose lower end is none at 1e-3."""
    mass = [math.comb(size, k) * t**k * (1 - t) ** (size - k) for k in range(size + 1)]
    inside = [
        (clip[0] <= 1e-3 or k >= clip[0] * size - 1e-9) and k <= clip[1] * size + 1e-9
        for k in range(size + 1)
    ]
    total = sum(m for m, allowed in zip(mass, inside, strict=True) if allowed)
    return [m / total if allowed else 0.0 for m, allowed in zip(mass, inside, strict=True)]


def expectation(size, clip, value, steps=400):
    """E of value(t, k) over t uniform in the range and masks drawn as in training, by midpoints in log t."""
    total, ratio = 0.0, clip[1] / clip[0]
    for i in range(steps):
        t = clip[0] * ratio ** ((i + 0.5) / steps)
        weight = t * math.log(ratio) / steps / (clip[1] - clip[0])
        total += weight * sum(p * value(t, k) for k, p in enumerate(law_of_masks(size, t, clip)))
    return total


SPREAD = 2.0  # of a masked token's nats about their mean


def curve(k, size):
    """Mean cross-entropy of a masked token where k of `size` are masked."""
    return 1.5 + 4.5 * (k / size) ** 2


def variance_of_training(size, clip):
    """Of a block's weighted loss per token, X = nats / (t size): the paper's criterion."""
    first = expectation(size, clip, lambda t, k: k * curve(k, size) / (t * size))
    second = expectation(
        size, clip, lambda t, k: ((k * curve(k, size)) ** 2 + k * SPREAD**2) / (t * size) ** 2
    )
    return second - first**2


def searching(size, seen=100.0):
    """A search that has seen blocks of that curve, and its table."""
    search = ClipSearch(size, BD3LMConfig(block_length=size).clip_ranges(), redrawn=True)
    k = torch.arange(1, size + 1, dtype=F64)
    mean = curve(k, size)
    return search, torch.stack([torch.full_like(k, seen), seen * mean, seen * (mean**2 + SPREAD**2 / k)])


@pytest.mark.parametrize("size, published", [(4, (0.45, 0.95)), (16, (0.3, 0.8))])
def test_the_search_finds_the_published_ranges(size, published):
    """On a curve of cross-entropies like a network's. Least variance of the cross-entropy itself, not of the weighted
    loss, would be [0.5, 1] for blocks of 4 and [0.2, 0.7] for 16."""
    search, table = searching(size)
    found = search.ranges[search.best(table)]
    assert found == pytest.approx(published)
    for clip in (found, (1e-3, 0.5), (0.2, 0.7)):
        assert search.variance(table, clip) == pytest.approx(variance_of_training(size, clip), rel=1e-4)
    assert variance_of_training(size, found) < min(
        variance_of_training(size, c) for c in [(1e-3, 0.5), (0.2, 0.7)]
    )


def test_the_search_adds_up_what_it_sees():
    search, _ = searching(4)
    assert search.best(search.take()) is None, "nothing was seen"
    g = torch.Generator().manual_seed(0)
    masked = torch.randint(0, 5, (40_000,), generator=g).double()
    nats = masked * curve(masked, 4) + SPREAD * masked.sqrt() * torch.randn(40_000, generator=g).double()
    search.add(masked, torch.full_like(masked, 4.0), nats)
    table = search.take()
    assert search.ranges[search.best(table)] == (0.45, 0.95)
    assert search.variance(table, (0.45, 0.95)) == pytest.approx(
        variance_of_training(4, (0.45, 0.95)), rel=0.05
    )
    assert not bool(search.take().any()), "used up"


def test_without_redrawn_masks_the_search_counts_on_none():
    search, table = searching(4)
    search.redrawn = False
    first, second = (
        sum(  # masks are binomial at every time
            math.comb(4, k) * t**k * (1 - t) ** (4 - k) * value(t, k) / 2000
            for i in range(2000)
            for t in [0.3 + 0.5 * (i + 0.5) / 2000]
            for k in range(5)
        )
        for value in (
            lambda t, k: k * curve(k, 4) / (4 * t),
            lambda t, k: ((k * curve(k, 4)) ** 2 + k * SPREAD**2) / (4 * t) ** 2,
        )
    )
    assert search.variance(table, (0.3, 0.8)) == pytest.approx(second - first**2, rel=1e-3)
