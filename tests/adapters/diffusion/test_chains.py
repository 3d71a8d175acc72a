"""Schedules and Markov chains of discrete diffusion, against explicit matrices and the papers' numbers."""

import math

import numpy as np
import pytest
import torch

from adapters.diffusion.chains import AbsorbingChain, GaussianChain, SpectralChain, UniformChain, draw
from adapters.diffusion.d3pm import build_chain, even_grid
from adapters.diffusion.mutual_information import (
    exponents,
    lost_information_spectral,
    lost_information_uniform,
)
from adapters.diffusion.neighbors import balance, generator_matrix, neighbor_graph, spectrum
from adapters.diffusion.reverse import log_posterior, log_reverse, reverse_kl
from adapters.diffusion.schedules import (
    AlphaSchedule,
    Geometric,
    LinearSigma,
    absorbing_mutual_info_betas,
    cosine_betas,
    linear_betas,
)
from models.d3pm import D3PMConfig

F64 = torch.float64
CIRCLE = torch.tensor([0.0, 10.0, 100.0, 110.0], dtype=F64) * math.pi / 180
EMBEDDING = torch.stack([CIRCLE.cos(), CIRCLE.sin()], 1)
T, STATES = 6, 5


def random_embedding(states):
    return torch.randn(states, 3, dtype=F64, generator=torch.Generator().manual_seed(4))


def make_chain(kind, betas=None, states=STATES):
    betas = cosine_betas(T) if betas is None else betas
    if kind == "absorbing":
        return AbsorbingChain(states, betas, mask_id=states - 1)
    if kind == "uniform":
        return UniformChain(states, betas)
    if kind == "gaussian":
        return GaussianChain(states, betas, F64)
    graph = neighbor_graph(random_embedding(states), 3)
    if kind == "sinkhorn":
        return SpectralChain(spectrum(balance(graph), betas, "sinkhorn"))
    return SpectralChain(spectrum(generator_matrix(graph, 3), -torch.log1p(-betas.clamp_max(0.999)), "expm"))


CHAINS = ["absorbing", "uniform", "gaussian", "neighbors", "sinkhorn"]
SCHEDULES = {
    "cosine": cosine_betas(T),
    "linear": linear_betas(T, 0.02, 0.9),
    "1/(T-t+1)": absorbing_mutual_info_betas(T),
}


def one_step(chain, t):
    """Q_t (K, K), from the columns that a chain reads."""
    ids = torch.arange(chain.states)
    return chain.column(ids, torch.full_like(ids, t - 1), torch.full_like(ids, t)).double().T


def cumulative(chain, t):
    ids = torch.arange(chain.states)
    return chain.row(ids, torch.full_like(ids, t)).double()


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


@pytest.mark.parametrize("kind", CHAINS)
def test_the_posterior_is_bayes_rule_on_the_enumerated_joint(kind):
    chain = make_chain(kind)
    ids = torch.arange(STATES)
    for s, t in ((0, 1), (2, 3), (1, 4), (0, 6)):
        between = chain.column(ids, torch.full_like(ids, s), torch.full_like(ids, t)).double().T
        joint = cumulative(chain, s)[:, :, None] * between[None]  # (x0, xs, xt)
        for x0 in range(STATES):
            for xt in range(STATES):
                mass = joint[x0, :, xt].sum()
                if mass < 1e-14:
                    continue
                arguments = (torch.tensor([v]) for v in (x0, xt, s, t))
                posterior = log_posterior(chain, *arguments).exp()[0]
                assert torch.allclose(posterior, joint[x0, :, xt] / mass, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", CHAINS)
def test_the_reverse_step_weights_clean_tokens_by_the_joint_and_the_mixture_does_not(kind):
    chain = make_chain(kind)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=F64)  # a clean token is never the mask
    ids, s, t, xt = torch.arange(STATES), 2, 3, 1 if kind != "absorbing" else STATES - 1
    between = chain.column(ids, torch.full_like(ids, s), torch.full_like(ids, t)).double().T
    joint = cumulative(chain, s)[:, :, None] * between[None]  # (x0, xs, xt)
    together = (p[:, None] * joint[:, :, xt]).sum(0)
    posteriors = joint[:, :, xt] / joint[:, :, xt].sum(1, keepdim=True)
    averaged = (p[:, None] * posteriors).sum(0)
    log_p = p.clamp_min(1e-300).log()[None]
    arguments = (log_p, torch.tensor([xt]), torch.tensor([s]), torch.tensor([t]))
    assert torch.allclose(log_reverse(chain, *arguments).exp()[0], together / together.sum(), atol=1e-12)
    assert torch.allclose(log_reverse(chain, *arguments, "mixture").exp()[0], averaged, atol=1e-9)


@pytest.mark.parametrize("kind", CHAINS)
def test_a_certain_prediction_has_no_loss(kind):
    chain = make_chain(kind)
    x0 = torch.tensor([0, 1, 2, 3])
    log_p = torch.nn.functional.one_hot(x0, STATES).to(F64).clamp_min(1e-300).log()
    for t in (1, 2, 6):
        xt = x0 if kind != "absorbing" else torch.full_like(x0, STATES - 1)
        kl = reverse_kl(chain, log_p, x0, xt, torch.full_like(x0, t - 1), torch.full_like(x0, t), "joint")
        assert kl.abs().max() < 1e-9


def test_draws_never_hit_a_state_without_probability():
    p = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0]], dtype=F64).expand(4, -1)
    ends = torch.tensor([1e-300, 1 / 3 - 1e-12, 1 / 3 + 1e-12, 1.0], dtype=F64)
    assert draw(p, ends).tolist() == [1, 1, 3, 3]


# -- numbers of the papers ---------------------------------------------------------------------------------------


def test_absorbing_step_with_a_predicted_mask():
    chain = AbsorbingChain(4, absorbing_mutual_info_betas(10), mask_id=3)
    x0, xt, s, t = (torch.tensor([v]) for v in (0, 3, 3, 4))
    log_p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=F64).log()
    q = log_posterior(chain, x0, xt, s, t).exp()[0]
    assert torch.allclose(q, torch.tensor([0.25, 0, 0, 0.75], dtype=F64), atol=1e-12)
    expected = torch.tensor([0.1086956522, 0.0434782609, 0.0434782609, 0.8043478261], dtype=F64)
    assert torch.allclose(log_reverse(chain, log_p, xt, s, t).exp()[0], expected, atol=1e-10)
    assert reverse_kl(chain, log_p, x0, xt, s, t, "joint").item() == pytest.approx(
        0.1557583392785932, abs=1e-12
    )


def test_uniform_step_in_both_parameterisations():
    chain = UniformChain(4, cosine_betas(10))
    assert chain.alpha_bar[3].item() == pytest.approx(0.8870797659, abs=1e-10)
    assert chain.betas[4].item() == pytest.approx(0.0929109886, abs=1e-10)
    xt, s, t = (torch.tensor([v]) for v in (2, 3, 4))
    log_p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=F64).log()
    expected = torch.tensor([0.05223965, 0.02277143, 0.91204024, 0.01294869], dtype=F64)
    assert torch.allclose(log_reverse(chain, log_p, xt, s, t).exp()[0], expected, atol=1e-8)
    for x0, joint, mixture in ((0, 0.6324208070611266, 0.1638013049), (2, 0.0815412318470344, 0.4477216876)):
        kl = [
            reverse_kl(chain, log_p, torch.tensor([x0]), xt, s, t, kind).item()
            for kind in ("joint", "mixture")
        ]
        assert kl[0] == pytest.approx(joint, abs=1e-12) and kl[1] == pytest.approx(mixture, abs=1e-9)


def test_gaussian_rows():
    chain = GaussianChain(5, torch.tensor([0.5], dtype=F64), F64)
    rows = chain.matrix(1)
    first = torch.tensor([0.699471735, 0.241971446, 0.0539911274, 0.00443186162, 0.000133830625], dtype=F64)
    middle = torch.tensor([0.0539911274, 0.241971446, 0.408074854, 0.241971446, 0.0539911274], dtype=F64)
    assert torch.allclose(rows[0], first, atol=1e-9) and torch.allclose(rows[2], middle, atol=1e-9)


def test_nearest_neighbors_on_a_circle():
    with pytest.raises(ValueError, match="2 components"):
        neighbor_graph(EMBEDDING, 1)
    rates = generator_matrix(neighbor_graph(EMBEDDING, 2), 2)
    off = rates - rates.diag().diag()
    assert off[0].tolist() == [0, 0.5, 0.25, 0] and off[1].tolist() == [0.5, 0, 0.5, 0.25]
    chain = SpectralChain(spectrum(rates, torch.ones(3, dtype=F64), "expm"))
    expected = torch.tensor([0.54742258, 0.23192519, 0.15650973, 0.06414250], dtype=F64)
    assert torch.allclose(chain.row(torch.tensor([0]), torch.tensor([1]))[0], expected, atol=1e-8)
    for t in (1, 2, 3):
        assert torch.allclose(cumulative(chain, t), torch.linalg.matrix_exp(t * rates), atol=1e-12)


def test_cosine_and_linear_products():
    assert torch.cumprod(1 - cosine_betas(1000), 0)[-1].item() == pytest.approx(1.5584501619e-6, rel=1e-9)
    assert torch.cumprod(1 - linear_betas(1000, 1e-4, 0.02), 0)[-1].item() == pytest.approx(
        4.0358297654e-5, rel=1e-9
    )


def test_weights_of_the_continuous_schedules():
    t = torch.tensor(0.63, dtype=F64)
    for schedule, weight in (
        (AlphaSchedule("loglinear"), 1.587301587),
        (AlphaSchedule("cosine"), 2.911196365),
        (AlphaSchedule("cosine_sq"), 2.063640656),
        (Geometric(1e-4, 20.0), 10.92052040),
        (LinearSigma(0.0, 10.0), 0.01839682996),
    ):
        assert schedule.weight(t).item() == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize(
    "schedule",
    [AlphaSchedule(k) for k in ("loglinear", "cosine", "cosine_sq")] + [Geometric(), LinearSigma(0.01, 9.0)],
)
def test_weight_and_rate_are_the_derivatives(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.mask_probability(t).sum(), t)
    assert torch.allclose(schedule.weight(t), slope / schedule.mask_probability(t), rtol=1e-9)
    (slope,) = torch.autograd.grad(schedule.sigma(t).sum(), t)
    assert torch.allclose(schedule.rate(t), slope, rtol=1e-9)
    assert torch.allclose(torch.exp(-schedule.sigma(t)), schedule.alpha(t), rtol=1e-12)


# -- information ---------------------------------------------------------------------------------------------------


def test_absorbing_loses_information_linearly():
    chain = AbsorbingChain(4, absorbing_mutual_info_betas(50), mask_id=3)
    t = torch.arange(51, dtype=F64)
    assert torch.allclose(chain.alpha_bar, 1 - t / 50, atol=1e-14)


def test_lost_information_of_a_coin():
    p = torch.tensor([0.7, 0.3], dtype=F64)
    assert lost_information_uniform(p, 0.5) == pytest.approx(0.7256692995628501, abs=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "neighbors"])
def test_fitted_schedules_lose_information_linearly(kind):
    p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=F64)
    if kind == "uniform":

        def lost(exponent):
            return lost_information_uniform(p, exponent)
    else:
        rates = generator_matrix(neighbor_graph(random_embedding(5), 3), 3)
        lost = lost_information_spectral(p, *torch.linalg.eigh(rates))
    total = exponents(lost, 30)
    assert total[0] == 0 and bool((total.diff() > 0).all())
    for t in range(1, 31):
        assert lost(float(total[t])) == pytest.approx(t / 31, abs=1e-3)


def test_information_of_the_two_forms_agrees():
    """The uniform chain is also a spectral one: R = 11'/K - 1."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    rates = torch.full((3, 3), 1 / 3, dtype=F64) - torch.eye(3, dtype=F64)
    spectral = lost_information_spectral(p, *torch.linalg.eigh(rates))
    for exponent in (1e-3, 0.4, 3.0):
        assert spectral(exponent) == pytest.approx(lost_information_uniform(p, exponent), abs=1e-12)


# -- configuration -------------------------------------------------------------------------------------------------


def config(**fields):
    return D3PMConfig(**{"vocab_size": 5, "num_timesteps": T, "sampling_timesteps": T, **fields})


def last_row(**fields):
    cfg = config(**fields)
    return cumulative(build_chain(cfg, 5, 4 if cfg.has_mask else None, torch.full((5,), 0.2)), T)[0]


@pytest.mark.parametrize(
    "base, change",
    [
        ({"transition_type": "gaussian", "noise_schedule": "linear"}, {"gaussian_beta_max": 0.5}),
        ({"transition_type": "gaussian", "noise_schedule": "linear"}, {"gaussian_beta_min": 0.01}),
        (
            {"transition_type": "uniform", "noise_schedule": "linear", "linear_beta_max": 0.5},
            {"linear_beta_max": 0.6},
        ),
        (
            {"transition_type": "uniform", "noise_schedule": "linear", "linear_beta_max": 0.5},
            {"linear_beta_min": 0.3},
        ),
        ({"transition_type": "uniform", "noise_schedule": "cosine"}, {"noise_schedule": "mutual_info"}),
        ({"transition_type": "uniform", "noise_schedule": "cosine"}, {"transition_type": "absorbing"}),
        ({"noise_schedule": "cosine"}, {"num_timesteps": T + 1}),
    ],
)
def test_every_field_of_a_chain_changes_it(base, change):
    assert not torch.allclose(last_row(**base), last_row(**{**base, **change}), atol=1e-12)


def test_fields_of_the_neighbor_chain_change_it(tmp_path):
    for seed in (0, 1):
        table = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        np.save(tmp_path / f"{seed}.npy", table.numpy())
        torch.save(table, tmp_path / f"{seed}.pt")

    def row(**fields):
        cfg = config(
            **{
                "vocab_size": 8,
                "transition_type": "nearest_neighbor",
                "noise_schedule": "cosine",
                "nn_embedding_path": str(tmp_path / "0.npy"),
                **fields,
            }
        )
        return cumulative(build_chain(cfg, 8, None, torch.arange(1, 9) / 36), 2)[0]

    base = row()
    assert torch.allclose(base, row(nn_embedding_path=str(tmp_path / "0.pt")))
    for change in (
        {"nearest_neighbors": 4},
        {"nn_embedding_path": str(tmp_path / "1.npy")},
        {"nn_construction": "sinkhorn"},
        {"noise_schedule": "mutual_info"},
    ):
        assert not torch.allclose(base, row(**change), atol=1e-9), change
    with pytest.raises(ValueError, match="dense_state_limit"):
        row(dense_state_limit=7)
    with pytest.raises(ValueError, match="no such file"):
        row(nn_embedding_path=str(tmp_path / "absent.npy"))


def test_a_schedule_that_a_chain_has_not_is_refused():
    for fields in (
        {"transition_type": "gaussian", "noise_schedule": "mutual_info"},
        {"transition_type": "uniform", "noise_schedule": "mutual_info"},  # without frequencies
    ):
        with pytest.raises(ValueError, match="mutual_info"):
            build_chain(config(**fields), 5, None, None)
    with pytest.raises(ValueError, match="num_timesteps"):
        GaussianChain(4096, cosine_betas(1000))


def test_grids_skip_evenly():
    assert even_grid(10, 10).tolist() == list(range(10, -1, -1))
    assert even_grid(10, 4).tolist() == [10, 8, 5, 2, 0]
    with pytest.raises(ValueError, match="1 to 10"):
        even_grid(10, 11)
