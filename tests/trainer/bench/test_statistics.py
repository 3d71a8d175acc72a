"""Intervals against known values, and how often they are right on draws of which the truth is known."""

import math

import numpy as np
import pytest

from trainer.bench.statistics import (
    Interval,
    corrected_level,
    paired_interval,
    ratio_standard_error,
    smallest_difference,
    spread,
    student_p,
    student_quantile,
    told_apart,
    unpaired_interval,
)

DRAWS = 2000
MOST = 0.065  # of a 5 % test, beyond which 2,000 draws come by chance once in a thousand times


@pytest.mark.parametrize(
    ("share", "freedom", "expected"),
    [
        (0.975, 1, 12.7062047364),
        (0.975, 2, 4.3026527297),
        (0.975, 7, 2.3646242510),
        (0.95, 4, 2.1318467863),
        (0.995, 30, 2.7499956536),
        (0.975, 2.5, 3.5746548420),
        (0.975, 1e6, 1.9599663),
        (0.5, 3, 0.0),
        (1 - 0.05 / 190 / 2, 2, 61.6),  # 190 pairs, not one of them false
    ],
)
def test_quantiles(share, freedom, expected):
    assert student_quantile(share, freedom) == pytest.approx(
        expected, rel=1e-3 if expected == 61.6 else 1e-6, abs=1e-9
    )


def test_p_values():
    # One degree of freedom is Cauchy's, two have a closed form.
    for t in (0.0, 0.3, 1.0, 4.0, 300.0):
        assert student_p(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, abs=1e-13)
        assert student_p(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-13)
    assert student_p(math.inf, 3) == 0


def _share_of(hits):
    return sum(hits) / len(hits)


def _bootstrap(values, rng):
    """The percentile bootstrap that this does without."""
    means = values[rng.integers(len(values), size=(1000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low <= 0 <= high


def test_a_bootstrap_covers_less_than_it_says_and_t_what_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(DRAWS, 3))
    assert _share_of([_bootstrap(one, rng) for one in draws[:1000]]) < 0.80
    assert _share_of([not paired_interval(one).excludes_zero for one in draws]) == pytest.approx(
        0.95, abs=0.015
    )


def test_the_spread_of_few_values_is_that_of_what_they_are_drawn_from():
    draws = np.random.default_rng(1).normal(size=(4000, 3))
    assert np.mean([spread(one) ** 2 for one in draws]) == pytest.approx(1, abs=0.05)
    assert spread(draws[0]) / np.std(draws[0]) == pytest.approx(1.2247, abs=1e-4)
    assert math.isnan(spread([1.0]))


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("spreads", [(1.0, 1.0), (1.0, 5.0)])
def test_alike_runs_are_told_apart_in_at_most_one_of_twenty_draws(seeds, spreads):
    """A/A: what both of a pair owe to their seed is shared, the rest is not, and may be of unequal size."""
    rng = np.random.default_rng(seeds)
    shared = 3 * rng.normal(size=(DRAWS, seeds))
    a, b = (shared + size * rng.normal(size=(DRAWS, seeds)) for size in spreads)
    assert _share_of([paired_interval(one).p < 0.05 for one in b - a]) <= MOST


@pytest.mark.parametrize("spreads", [(1.0, 1.0), (1.0, 5.0)])
def test_alike_runs_of_other_seeds_too(spreads):
    rng = np.random.default_rng(9)
    a, b = (size * rng.normal(size=(DRAWS, 8)) for size in spreads)
    pairs = [unpaired_interval(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.03 < _share_of([pair.p < 0.05 for pair in pairs]) <= MOST  # nor is it merely blind


@pytest.mark.parametrize("spreads", [(1, 1, 1, 1, 1), (0.2, 1, 1, 3, 9)])
def test_a_table_of_alike_models_names_a_winner_in_at_most_one_of_twenty(spreads):
    """All pairs of five, which share runs: any that is told apart is false."""
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(DRAWS, len(spreads), 3)) * np.array(spreads)[:, None]
    first, second = np.triu_indices(len(spreads), 1)
    any_found = [
        any(told_apart([paired_interval(one[b] - one[a]) for a, b in zip(first, second, strict=True)]))
        for one in scores
    ]
    assert _share_of(any_found) <= MOST


def test_all_seeds_of_one_beating_all_of_another_is_no_evidence():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, DRAWS, 3))
    sweeps = (a.max(1) < b.min(1)) | (b.max(1) < a.min(1))
    assert sweeps.mean() == pytest.approx(0.1, abs=0.02)  # 1 of 20 for either
    assert paired_interval([0.1, 0.9, 0.2]).p > 0.05


def test_benjamini_hochberg_on_a_published_table():
    """Benjamini and Hochberg (1995), section 4.1: four of fifteen."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344]
    p += [0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    pairs = [Interval(1.0, 1.0, 2, value) for value in reversed(p)]
    assert told_apart(pairs) == [False] * 11 + [True] * 4
    assert corrected_level(pairs) == pytest.approx(1 - 0.05 * 4 / 15)
    assert told_apart([]) == [] and corrected_level([]) == 0.95


def test_intervals_at_the_corrected_level_exclude_zero_just_where_pairs_are_told_apart():
    rng = np.random.default_rng(6)
    for draw in range(200):
        shift = rng.choice([0, 1, 6], size=12)
        pairs = [paired_interval(s + rng.normal(size=3)) for s in shift]
        level = corrected_level(pairs)
        assert [pair.at(level).excludes_zero for pair in pairs] == told_apart(pairs), draw


def test_the_smallest_difference_is_where_the_interval_begins_to_exclude_zero():
    values = np.array([-1.0, 0.0, 1.0])
    edge = smallest_difference(spread(values), 3)
    assert edge == pytest.approx(4.3026527297 / math.sqrt(3))
    assert paired_interval(values + 1.001 * edge).excludes_zero
    assert not paired_interval(values + 0.999 * edge).excludes_zero
    assert smallest_difference(1.0, 1) == math.inf


def test_of_one_seed_nothing_is_said_and_of_equal_ones_all():
    one = paired_interval([0.5])
    assert (one.mean, one.low, one.high, one.p) == (0.5, -math.inf, math.inf, 1.0)
    assert unpaired_interval([1.0], [2.0, 3.0]).p == 1.0
    same = paired_interval([0.5, 0.5, 0.5])
    assert (same.low, same.high, same.p) == (0.5, 0.5, 0.0)
    assert paired_interval([0.0, 0.0]).p == 1.0 and not paired_interval([0.0, 0.0]).excludes_zero
    for wrong in ([], [math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="finite numbers"):
            paired_interval(wrong)


def test_the_error_of_a_ratio_is_that_of_repeated_draws():
    rng = np.random.default_rng(7)
    sizes = rng.integers(50, 500, size=(3000, 40)).astype(float)
    amounts = sizes * (2 + 0.3 * rng.normal(size=sizes.shape))
    found = np.mean([ratio_standard_error(*one) for one in zip(amounts, sizes, strict=True)])
    assert found == pytest.approx((amounts.sum(1) / sizes.sum(1)).std(), rel=0.05)
    assert ratio_standard_error(amounts[0, :1], sizes[0, :1]) is None
