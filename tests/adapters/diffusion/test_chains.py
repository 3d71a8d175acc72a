"""Markov chains of discrete diffusion against explicit matrices."""

import math

import pytest
import torch

from adapters.diffusion.chains import AbsorbingChain, GaussianChain, UniformChain, draw
from adapters.diffusion.schedules import linear_betas
from tests.adapters.diffusion.matrices import CHAINS, SCHEDULES, STATES, T, cumulative, make_chain, one_step
from tests.adapters.diffusion.processes import from_uniform
from tests.adapters.diffusion.toy import F64, K, M


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_of_steps_are_the_cumulative_matrices(kind, schedule):
    chain = make_chain(kind, SCHEDULES[schedule])
    product = torch.eye(chain.states, dtype=F64)
    for t in range(1, T + 1):
        q = one_step(chain, t)
        assert q.min() >= 0 and torch.allclose(
            q.sum(1), torch.ones(chain.states, dtype=F64), atol=1e-12, rtol=0
        )
        if kind != "absorbing":
            assert torch.allclose(q.sum(0), torch.ones(chain.states, dtype=F64), atol=1e-8, rtol=0)
        product = product @ q
        assert torch.allclose(cumulative(chain, t), product, atol=1e-10, rtol=0)
    ids = torch.arange(chain.states)
    several = chain.column(ids, torch.full_like(ids, 1), torch.full_like(ids, 4)).double().T
    assert torch.allclose(
        several, one_step(chain, 2) @ one_step(chain, 3) @ one_step(chain, 4), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("kind", CHAINS)
def test_pushing_a_distribution_multiplies_it_by_the_matrix(kind):
    chain = make_chain(kind)
    p = torch.rand(4, STATES, dtype=F64).softmax(1)
    t = torch.tensor([0, 1, 3, 6])
    expected = torch.stack([row @ cumulative(chain, int(s)) for row, s in zip(p, t, strict=True)])
    assert torch.allclose(chain.push(p, t), expected, atol=1e-12, rtol=0)
    assert torch.allclose(chain.log_push(p.log(), t), expected.clamp_min(1e-300).log(), atol=1e-9)


@pytest.mark.parametrize("kind", CHAINS)
def test_samples_follow_the_cumulative_rows(kind):
    chain = make_chain(kind)
    count = 100_000
    u = torch.rand(count, dtype=F64, generator=torch.Generator().manual_seed(1))
    for x0 in (0, 2):
        xt = chain.sample(torch.full((count,), x0), torch.full((count,), 3), u)
        expected = cumulative(chain, 3)[x0] * count
        counts = torch.bincount(xt, minlength=STATES).double()
        seen = expected > 0
        assert counts[~seen].sum() == 0
        assert (
            (counts - expected)[seen] ** 2 / expected[seen]
        ).sum() < 23.52  # p = 1e-4 at 4 degrees of freedom


def test_draws_never_hit_a_state_without_probability():
    p = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]], dtype=F64).expand(4, -1)
    ends = torch.tensor([1e-300, 1 / 3 - 1e-12, 1 / 3 + 1e-12, 1.0], dtype=F64)
    assert draw(p, ends).tolist() == [1, 1, 3, 3]


def test_gaussian_rows():
    chain = GaussianChain(5, torch.tensor([0.5], dtype=F64), F64)
    rows = chain.matrix(1)
    first = torch.tensor([0.699471735, 0.241971446, 0.0539911274, 0.00443186162, 0.000133830625], dtype=F64)
    middle = torch.tensor([0.0539911274, 0.241971446, 0.408074854, 0.241971446, 0.0539911274], dtype=F64)
    assert torch.allclose(rows[0], first, atol=1e-9) and torch.allclose(rows[2], middle, atol=1e-9)


def test_the_prior_of_a_chain_is_what_survives_its_last_step():
    betas = linear_betas(3, 0.1, 0.4)
    kept = 0.9 * 0.75 * 0.6
    ids = torch.arange(K)
    absorbing = AbsorbingChain(K + 1, betas, M).prior_nats(ids)
    assert torch.allclose(absorbing, torch.full((K,), kept * math.log(K), dtype=F64), rtol=1e-12)
    uniform = UniformChain(K, betas).prior_nats(ids)
    assert torch.allclose(uniform, torch.full((K,), from_uniform(1 - kept), dtype=F64), rtol=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "neighbors", "sinkhorn"])
def test_the_prior_is_the_divergence_of_the_last_law_from_the_uniform_one(kind):
    chain = make_chain(kind, linear_betas(2, 0.1, 0.4))
    law = one_step(chain, 1) @ one_step(chain, 2)  # rows: q(x_T | x_0)
    expected = (torch.xlogy(law, law) + law * math.log(law.shape[1])).sum(1)
    assert torch.allclose(chain.prior_nats(torch.arange(chain.states)), expected, atol=1e-9)
    assert expected.min() > 0.1


def test_nothing_is_drawn_from_what_is_no_law():
    for row in ([0.0, float("nan")], [0.0, 0.0], [1.0, float("inf")]):
        with pytest.raises(ValueError, match="not finite"):
            draw(torch.tensor([row], dtype=torch.float64), torch.tensor([0.5]))
