"""The toy language's own arithmetic."""

import itertools

import pytest
import torch

from tests.adapters.diffusion.toy import (
    ENTROPY,
    F64,
    LAW,
    LENGTH,
    MASKED_NATS,
    SEQUENCES,
    K,
    M,
    masked_posterior,
    uniform_ratios,
)


def test_expected_masked_nats():
    """C_k of the language, as the bound's identity sum_k C_k / k uses them."""
    for k, expected in enumerate(MASKED_NATS, start=1):
        subsets = list(itertools.combinations(range(LENGTH), k))
        total = 0.0
        for subset in subsets:
            xt = SEQUENCES.clone()
            xt[:, list(subset)] = M
            p = masked_posterior(xt).gather(2, SEQUENCES.unsqueeze(2)).squeeze(2)[:, list(subset)]
            total += float((LAW * -p.log().sum(1)).sum()) / len(subsets)
        assert total == pytest.approx(expected, abs=1e-12)
    assert sum(c / k for k, c in enumerate(MASKED_NATS, 1)) == pytest.approx(ENTROPY, abs=1e-12)


def test_ratios_of_the_oracle_are_ratios():
    """The toy's own arithmetic: ratios times p_t sum to the marginal law of the other positions."""
    xt, kept = SEQUENCES, torch.full((27,), 0.6, dtype=F64)
    ratios = uniform_ratios(xt, kept)
    assert torch.allclose(ratios.gather(2, xt.unsqueeze(2)).squeeze(2), torch.ones(27, 3, dtype=F64))
    law = torch.stack([(LAW * (0.6 * (x == SEQUENCES).double() + 0.4 / K).prod(1)).sum() for x in SEQUENCES])
    assert torch.allclose((law[:, None] * ratios.sum(2))[:, 0].view(3, 9).sum(0) / 3, law.view(3, 9).sum(0))
