"""What each process promises, number by number: times, ends of the bounds, loss terms, and the steps of the samplers.

Bounds over all texts check that the whole is right; here every part has a value of its own, so that two faults cannot
hide behind each other. Noise is placed rather than drawn wherever that gives an exact number.
"""

import itertools
import math
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import kernels.linear_diffusion_loss as fused
from adapters.diffusion.chains import AbsorbingChain, UniformChain
from adapters.diffusion.d3pm import _Dense
from adapters.diffusion.network import Network
from adapters.diffusion.process import Choice, Draw, Window
from adapters.diffusion.reverse import log_reverse, reverse_kl
from adapters.diffusion.schedules import linear_betas
from adapters.randomness import Noise
from kernels import KERNELS
from kernels.choose import Kernels
from kernels.linear_function_loss import chunked as function_chunks
from tests.adapters.diffusion.test_adapter import batch, build, train_context
from tests.adapters.diffusion.test_bounds import d3pm, gauss_legendre, mdl, score_oracle, sedd, texts
from tests.adapters.diffusion.test_chains import make_chain, one_step
from tests.adapters.diffusion.test_sampling import window
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    LAW,
    LENGTH,
    MASKED_NATS,
    SEQUENCES,
    K,
    Oracle,
    chi_square,
    masked_oracle,
    masked_posterior,
    with_mask,
)

F64 = torch.float64
M = K  # id of the mask
COSINE = {"transition_type": "uniform", "noise_schedule": "cosine"}
WITHOUT_SUBS = {"use_subs_parameterization": False, "continuous_time": False, "sampler": "ancestral"}


class Seen(Oracle):
    """An oracle that keeps the noisy tokens (B, 4) and times (B,) of its calls."""

    def __init__(self, answer, mask_id):
        super().__init__(answer, mask_id)
        self.tokens, self.taus = [], []

    def forward(self, tokens, tau, doc_ids=None, **_):
        self.tokens.append(tokens.clone())
        self.taus.append(tau.double().clone())
        return super().forward(tokens, tau)


def rough(states):
    """Logits that depend on a position and its token, and give the mask some probability."""

    def answer(xt, tau):
        place, token = torch.arange(xt.shape[1], dtype=F64)[None, :, None], xt[:, :, None].double()
        return 1.5 * torch.sin(1.7 * torch.arange(states, dtype=F64) + 0.9 * token + 0.5 * place)

    return answer


def of(process, answer=None):
    """A network for `process` whose calls are kept."""
    return Seen(answer or rough(process.V), process.mask_id)


def toy_texts(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noised = texts(SEQUENCES[torch.multinomial(LAW, count, True, generator=g)])
    return x0, noised, torch.rand(count, LENGTH + 1, dtype=F64, generator=g)


# -- what the network is told of the time ---------------------------------------------------------------


def test_the_network_of_a_chain_of_steps_is_told_a_thousandth_of_the_way():
    process = d3pm(8, nelbo_steps=4)
    t = torch.tensor([[1], [3], [8]])
    assert process.tau(t).tolist() == [125.0, 375.0, 1000.0]
    oracle = of(process)
    *_, _ = process.resolve(Network(oracle), window(64, choice=Choice(steps=4)))
    assert [float(tau[0]) for tau in oracle.taus] == [1000.0, 750.0, 500.0, 250.0]
    x0, noised, u = toy_texts(4)
    r = torch.tensor([[0.1], [0.3], [0.6], [0.9]], dtype=F64)
    process.estimate(Draw(Network(oracle), x0, noised, None, r, u, u, {}))
    assert oracle.taus[-1].tolist() == [250.0, 500.0, 750.0, 1000.0]
    oracle.taus.clear()
    *_, _ = process.resolve(Network(oracle), window(4, choice=Choice(by_confidence=True, steps=2)))
    assert [float(tau[0]) for tau in oracle.taus] == [1000.0, 750.0]  # 2 of 3 masked: the first t past 2/3


@pytest.mark.parametrize(
    "fields, sigma",
    [
        ({"alpha_min": 0.2, "alpha_max": 0.9}, lambda t: -math.log(0.9 - 0.7 * t)),
        (
            {"alpha_type": "geometric", "sigma_min": 0.05, "sigma_max": 4.0},
            lambda t: 0.05 ** (1 - t) * 4.0**t,
        ),
        (
            {"alpha_type": "linear_sigma", "sigma_min": 0.1, "sigma_max": 3.0},
            lambda t: 0.1 + 2.9 * t,
        ),
    ],
)
def test_the_network_of_the_masked_model_is_told_the_total_noise(fields, sigma):
    process = mdl(time_conditioning=True, sampler="ancestral", num_sampling_steps=4, **fields)
    found = process.tau(torch.tensor([[0.25], [0.7]], dtype=F64))
    assert found.tolist() == pytest.approx([sigma(0.25), sigma(0.7)], rel=1e-6)
    oracle = of(process)
    *_, _ = process.resolve(Network(oracle), window(400))
    expected = [sigma(t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert [float(tau[0]) for tau in oracle.taus] == pytest.approx(expected, rel=1e-6)
    oracle.taus.clear()
    *_, _ = process.resolve(Network(oracle), window(4, choice=Choice(by_confidence=True, steps=3)))
    most = 1 - math.exp(-sigma(1.0))
    expected = [-math.log1p(-min(u, most)) for u in (1.0, 2 / 3, 1 / 3)]  # the noise of that many masks
    assert [float(tau[0]) for tau in oracle.taus] == pytest.approx(expected, rel=1e-6)


def test_geometric_noise_runs_from_the_smallest_to_the_largest():
    """sigma(t) = sigma_min^(1-t) sigma_max^t (Lou et al. 2024, appendix C.1), and its derivative."""
    fields = {"noise_schedule": "geometric", "sigma_min": 0.01, "sigma_max": 5.0}
    t = torch.tensor([[0.0], [0.3], [1.0]], dtype=F64)
    sigma = torch.tensor([0.01, 0.01**0.7 * 5.0**0.3, 5.0], dtype=F64)
    rate = sigma * math.log(500.0)
    x0, noised, u = toy_texts(3)
    process = sedd(transition_type="uniform", **fields)
    rows = process.rows(x0, x0, noised, t)
    assert torch.allclose(rows.coefficients["sigma_bar"], sigma.repeat_interleave(3), rtol=1e-12)
    assert torch.allclose(rows.weights, rate.repeat_interleave(3), rtol=1e-12)
    for process in (
        sedd(**fields),
        mdl(alpha_type="geometric", sigma_min=0.01, sigma_max=5.0),
    ):
        assert torch.allclose(process.tau(t).double(), sigma, rtol=1e-6)
        rows = process.rows(x0, x0.masked_fill(noised, M), noised, t)
        assert torch.allclose(rows.weights, (rate / torch.expm1(sigma)).repeat_interleave(3), rtol=1e-12)


def test_times_of_the_discrete_masked_model_are_all_of_its_grid():
    """Whatever `sampling_eps`, which is for continuous time: a bound that left out steps would be none."""
    process = mdl(continuous_time=False, num_timesteps=10, sampling_eps=0.3)
    r = (torch.arange(10, dtype=F64).unsqueeze(1) + 0.5) / 10
    assert torch.allclose(process.training_time(r), torch.arange(1, 11, dtype=F64).unsqueeze(1) / 10)
    ends = torch.tensor([[1e-12], [1 - 1e-12]], dtype=F64)
    assert process.training_time(ends).tolist() == [[0.1], [1.0]]
    dense = process.training_time(torch.linspace(1e-9, 1 - 1e-9, 1001, dtype=F64).unsqueeze(1))
    assert torch.allclose(dense * 10, (dense * 10).round(), atol=1e-12) and len(dense.unique()) == 10


@pytest.mark.parametrize("kind", ["mdl", "sedd"])
@pytest.mark.parametrize("stratified", [True, False])
def test_times_of_a_step_are_stratified_over_all_its_rows_or_independent(kind, stratified, monkeypatch):
    """Strata: exactly one time in each, however the step is split. Independent: a stratum stays empty with probability
    1/e, the times are uniform, and neighbours know nothing of each other."""
    adapter, rows, steps, drawn = (
        build(kind, trained=False, use_low_discrepancy_sampler=stratified),
        256,
        4,
        [],
    )
    training_time = adapter.process.training_time

    def spy(r):
        drawn.append(r.squeeze(1))
        return training_time(r)

    monkeypatch.setattr(adapter.process, "training_time", spy)
    for step in range(steps):
        for first in (0, 64, 192):
            adapter.prepare(
                batch(range(first, {0: 64, 64: 192, 192: 256}[first])), train_context(rows, step=step)
            )
    r = torch.cat(drawn).view(steps, rows)
    filled = [len((row * rows).floor().unique()) for row in r]
    if stratified:
        assert filled == [rows] * steps
        return
    assert sum(filled) / r.numel() == pytest.approx(1 - math.exp(-1), abs=0.05)
    values = r.flatten()
    grid = torch.arange(1, len(values) + 1, dtype=F64) / len(values)
    assert float((values.sort().values - grid).abs().max()) < 2.3 / len(values) ** 0.5  # Kolmogorov-Smirnov
    for one, other in ((values[1:], values[:-1]), (r[1:], r[:-1])):  # within a step, and across steps
        pair = torch.stack([one.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / len(values) ** 0.5


# -- parts of the bounds ----------------------------------------------------------------------------------


def reachable(mask_id, jumped):
    """q(x_t | x_0), (27, X), and the noisy texts (X, 3) at the probability `jumped` of having been noised."""
    states = torch.tensor(list(itertools.product(range(K + (mask_id is not None)), repeat=LENGTH)))
    same = (states[None] == SEQUENCES[:, None]).double()  # (27, X, 3)
    if mask_id is None:
        return ((1 - jumped) * same + jumped / K).prod(2), states
    return torch.where(states == mask_id, jumped, (1 - jumped) * same).prod(2), states


def placed(x0, states, mask_id, jumped):
    """Uniforms (B, 4) that turn texts x0 (B, 3) into `states` (B, 3) if the probability of noise is exactly `jumped`
    (B,): as near to that threshold as can be."""
    jumped = jumped.unsqueeze(1)
    stay, go = jumped * (1 + 1e-9), jumped * (1 - 1e-9)
    if mask_id is None:
        go = jumped * (states + 0.5) / K
    return F.pad(torch.where(states == x0, stay, go), (1, 0), value=0.5)


def expected_parts(process, oracle, r, weights, jumped, clean):
    """Expectations of the parts of `estimate` over all texts, the times of r (N,) with `weights` (N,), and all noise;
    the probability of noise is `jumped` (N,) at these times and `clean` at the clean end."""
    mask_id, values = process.mask_id, []
    at_clean, states = reachable(mask_id, clean)
    q = torch.stack([reachable(mask_id, float(j))[0] for j in jumped])  # (N, 27, X)
    node, text, state = (q > 0).nonzero().unbind(1)
    x0, noised = texts(SEQUENCES[text])
    u = placed(SEQUENCES[text], states[state], mask_id, jumped[node])
    end = placed(SEQUENCES[text], states[state], mask_id, torch.full((len(u),), clean, dtype=F64))
    draw = Draw(Network(oracle), x0, noised, None, r[node].unsqueeze(1), u, end, {})
    parts = process.estimate(draw)
    own = LAW[text] * weights[node]
    mass = {"recon": own * at_clean[text, state]}
    values = {k: float((mass.get(k, own * q[node, text, state]) * v).sum()) for k, v in parts.items()}
    assert torch.equal(oracle.tokens[0][:, 1:], states[state])
    for tau, noise in zip(oracle.taus, (jumped[node], torch.full_like(own, clean)), strict=False):
        assert torch.allclose(tau, -torch.log1p(-noise), rtol=1e-5, atol=1e-6)
    return values


def information(mask_id, jumped):
    """I(x_0; x_t) of the language."""
    q, _ = reachable(mask_id, jumped)
    joint = LAW[:, None] * q
    return float((torch.xlogy(joint, q) - torch.xlogy(joint, joint.sum(0))).sum())


def remaining(mask_id, jumped):
    """sum_i H(x_0^i | x_t): the least cross-entropy of clean tokens that are predicted one by one."""
    joint = LAW[:, None] * reachable(mask_id, jumped)[0]  # (27, X)
    out = 0.0
    for i in range(LENGTH):
        p = torch.stack([joint[SEQUENCES[:, i] == v].sum(0) for v in range(K)])
        out -= float((torch.xlogy(p, p) - torch.xlogy(p, p.sum(0))).sum())
    return out


def from_uniform(jumped):
    """KL of one token's law at the end to the uniform one."""
    p = [1 - jumped + jumped / K, jumped / K, jumped / K]
    return sum(x * math.log(K * x) for x in p)


ROUGH = 0.3  # of the way is left out at the clean end, and of the text survives at the other one
HALF_GEOMETRIC = {"noise_schedule": "geometric", "sigma_min": 0.2, "sigma_max": 1.5}


def loglinear(t):
    return (1 - ROUGH) * t


def geometric(t):
    return 1 - math.exp(-(0.2 ** (1 - t)) * 1.5**t)


@pytest.mark.parametrize(
    "graph, fields, noise",
    [
        ("absorbing", {"noise_eps": ROUGH}, loglinear),
        ("absorbing", {"noise_eps": ROUGH, "scale_by_sigma": False}, loglinear),
        ("absorbing", HALF_GEOMETRIC, geometric),
        ("uniform", {"noise_schedule": "loglinear", "noise_eps": ROUGH}, loglinear),
        ("uniform", HALF_GEOMETRIC, geometric),
    ],
)
def test_every_part_of_the_score_entropy_bound_is_what_theory_says(graph, fields, noise):
    """With the true ratios the integral over [eps, 1] is the information lost in between, I(x_0; x_eps) - I(x_0; x_1);
    the reconstruction is what single tokens still lack at eps, and the prior what survives until 1."""
    process = sedd(transition_type=graph, sampling_eps=ROUGH, **fields)
    oracle = Seen(score_oracle(process).answer, process.mask_id)
    if not process.cfg.scaled and graph == "absorbing":  # log-scores as they are

        def answer(xt, tau):
            return with_mask(masked_posterior(xt)) - torch.expm1(tau.double()).log()[:, None, None].double()

        oracle = Seen(answer, process.mask_id)
    r, weights = (torch.tensor(v, dtype=F64) for v in gauss_legendre(0.0, 1.0, 8))
    jumped = torch.tensor([noise(ROUGH + (1 - ROUGH) * float(x)) for x in r], dtype=F64)
    start, end, m = noise(ROUGH), noise(1.0), process.mask_id
    found = expected_parts(process, oracle, r, weights, jumped, start)
    lost = information(m, start) - information(m, end)
    assert found["diffusion"] == pytest.approx(lost, abs=1e-5)
    assert found["paper"] == pytest.approx(lost / (1 - ROUGH), abs=1e-5)
    assert found["recon"] == pytest.approx(remaining(m, start), abs=2e-5)
    one = from_uniform(end) if graph == "uniform" else (1 - end) * math.log(K)
    assert found["prior"] == pytest.approx(LENGTH * one, rel=1e-9) and process.prior_nats() == pytest.approx(
        one, rel=1e-9
    )
    assert min(found.values()) > 0.02  # no part is too small to be missed


def counts_of(p):
    """P(Binomial(3, p) = k) for k = 1, 2, 3."""
    return [math.comb(LENGTH, k) * p**k * (1 - p) ** (LENGTH - k) for k in range(1, LENGTH + 1)]


@pytest.mark.parametrize("alpha_max", [1.0, 0.9])
def test_every_part_of_the_masked_bound_over_time_is_what_theory_says(alpha_max):
    """The integral is sum_k C_k / k times the probability that the k-th mask falls inside it, C_k the cross-entropy of
    k masked tokens; the ends are the tokens masked at eps, and those not masked at 1."""
    process = mdl(
        time_conditioning=True, sampler="ancestral", sampling_eps=ROUGH, alpha_min=ROUGH, alpha_max=alpha_max
    )
    r, weights = (torch.tensor(v, dtype=F64) for v in gauss_legendre(0.0, 1.0, 8))
    masked = [1 - alpha_max + (alpha_max - ROUGH) * t for t in (ROUGH, 1.0)]
    jumped = masked[0] + (masked[1] - masked[0]) * r
    found = expected_parts(process, Seen(masked_oracle().answer, M), r, weights, jumped, masked[0])
    start, end = (counts_of(p) for p in masked)
    inside = [sum(end[k:]) - sum(start[k:]) for k in range(LENGTH)]
    integral = sum(c / k * p for k, (c, p) in enumerate(zip(MASKED_NATS, inside, strict=True), 1))
    assert found["diffusion"] == pytest.approx(integral, abs=1e-6)
    assert found["paper"] == pytest.approx(integral / (1 - ROUGH), abs=1e-6)
    assert found["recon"] == pytest.approx(sum(c * p for c, p in zip(MASKED_NATS, start, strict=True)))
    assert found["prior"] == pytest.approx(LENGTH * ROUGH * math.log(K), rel=1e-12)


@pytest.mark.parametrize("subs", [True, False])
@pytest.mark.parametrize("alpha_max", [1.0, 0.9])
def test_every_part_of_the_discrete_masked_bound_is_what_theory_says(subs, alpha_max):
    """Step by step (u_t - u_s)/u_t of the masked tokens' cross-entropy; a token that is masked at time 0 already is
    reconstructed from there."""
    steps = 4
    process = mdl(
        **{**WITHOUT_SUBS, "use_subs_parameterization": subs},
        num_timesteps=steps,
        alpha_min=ROUGH,
        alpha_max=alpha_max,
    )
    r, weights = (torch.arange(steps, dtype=F64) + 0.5) / steps, torch.full((steps,), 1 / steps, dtype=F64)
    u = [1 - alpha_max + (alpha_max - ROUGH) * t / steps for t in range(steps + 1)]
    found = expected_parts(
        process, Seen(masked_oracle().answer, M), r, weights, torch.tensor(u[1:], dtype=F64), u[0]
    )
    total = sum(
        (t - s) / t * c * p
        for s, t in itertools.pairwise(u)
        for c, p in zip(MASKED_NATS, counts_of(t), strict=True)
    )
    assert found["diffusion"] == found["paper"] == pytest.approx(total, rel=1e-9)
    recon = sum(c * p for c, p in zip(MASKED_NATS, counts_of(u[0]), strict=True))
    assert found["recon"] == pytest.approx(recon, rel=1e-9, abs=1e-12)
    assert found["prior"] == pytest.approx(LENGTH * ROUGH * math.log(K), rel=1e-12)


def test_without_subs_a_network_that_never_predicts_the_mask_has_the_same_bound():
    """Draw by draw: D3PM's divergence is then the weighted cross-entropy."""
    steps, x0, noised = 6, *toy_texts(60)[:2]
    answer = rough(K)
    network = Network(Oracle(lambda xt, tau: F.pad(answer(xt, tau), (0, 1), value=-1e4), M))
    r = (torch.arange(60, dtype=F64).unsqueeze(1) % steps + 0.5) / steps
    u, end = toy_texts(60, 1)[2], toy_texts(60, 2)[2]
    parts = [
        mdl(
            **{**WITHOUT_SUBS, "use_subs_parameterization": subs}, num_timesteps=steps, alpha_max=0.9
        ).estimate(Draw(network, x0, noised, None, r, u, end, {}))
        for subs in (True, False)
    ]
    assert parts[0].keys() == parts[1].keys() and float(parts[0]["diffusion"].min()) >= 0
    assert all(torch.allclose(parts[0][k], parts[1][k], rtol=1e-9, atol=1e-9) for k in parts[0])
    assert float(parts[0]["diffusion"].mean()) > 1


def log_p_of(process, xt, zero_mask=False):
    """(B, 4, V) log-probabilities of the rough network; the given token's are of no use."""
    z = F.pad(rough(process.V)(xt[:, 1:], None), (0, 0, 1, 0))
    if zero_mask:
        z[..., M] = -1e30
    return z.log_softmax(-1)


def divergences(process, x0, xt, s, t):
    """(B, 4) KL of every position's reverse step from s (B, 1) to t (B, 1), by the definition."""
    log_p = log_p_of(process, xt, process.cfg.zero_mask_logit)
    s, t = (v.expand(x0.shape).flatten() for v in (s, t))
    args = (log_p.flatten(0, 1), x0.flatten(), xt.flatten(), s, t)
    kl = reverse_kl(process.chain, *args, process.cfg.reverse_param).view(x0.shape)
    ce = -log_p.gather(2, x0.unsqueeze(2)).squeeze(2)
    if process.cfg.l0_mode == "x0":
        last = (s == 0).view(x0.shape) & ((xt == M) if process.mask_id is not None else True)
        kl = torch.where(last, ce, kl)
    return kl, ce


CHAINS = {
    "absorbing": {},
    "absorbing cosine": {"noise_schedule": "cosine"},
    "absorbing without mask": {"noise_schedule": "cosine", "zero_mask_logit": True},
    "absorbing x0": {"l0_mode": "x0"},
    "uniform": COSINE,
    "uniform x0": {**COSINE, "l0_mode": "x0"},
    "uniform mixture": {**COSINE, "reverse_param": "mixture"},
    "gaussian": {"transition_type": "gaussian", "noise_schedule": "linear", "gaussian_beta_max": 0.5},
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_bound_that_skips_steps_is_the_divergence_of_the_skips(name):
    """8 steps in 3 skips, 8 -> 5 -> 3 -> 0: in closed form, densely, and by the definition. The probability of a jump
    in a skip is 1 - alpha-bar_t / alpha-bar_s, not that of its last step."""
    process = d3pm(8, nelbo_steps=3, **CHAINS[name])
    x0, noised, u = toy_texts(60)
    noised[::3, 2] = False
    place = torch.arange(60).unsqueeze(1) % 3
    grid = torch.tensor([0, 3, 5, 8])
    s, t = grid[place], grid[place + 1]
    draw = Draw(Network(of(process)), x0, noised, None, (place + 0.5) / 3, u, u, {})
    kl, _ = divergences(process, x0, process.corrupt(x0, noised, t, u), s, t)
    expected = 3 * torch.where(noised, kl, 0.0).sum(1)
    atol = 1e-5 if name == "gaussian" else 1e-9  # its table is kept in fp32
    assert torch.allclose(process.estimate(draw)["diffusion"], expected, atol=atol)
    process.objective = _Dense(process.chain, process.cfg)
    dense = process.estimate(draw)
    assert torch.allclose(dense["diffusion"], expected, atol=atol)
    assert torch.equal(dense["paper"], dense["diffusion"]) and float(expected.mean()) > 0.5


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("weight", [0.25, 0.0])
def test_the_objective_of_a_chain_is_its_divergence_and_a_cross_entropy_of_every_noised_token(name, weight):
    """L = KL + lambda CE (Austin et al. 2021, equation 5), the cross-entropy also where the token has survived; the
    bound beside it is T times the divergence."""
    process = d3pm(6, auxiliary_loss_weight=weight, **CHAINS[name])
    x0, noised, u = toy_texts(60)
    noised[::3, 2] = False
    t = torch.arange(60).unsqueeze(1) % 6 + 1
    xt = process.corrupt(x0, noised, t, u)
    assert bool((xt == x0)[noised].any())
    rows = process.rows(x0, xt, noised, t)
    read = noised if weight or process.mask_id is None else noised & (xt == M)
    assert torch.equal(rows.index, read.flatten().nonzero().squeeze(1))
    network = Network(of(process))
    hidden = network.hidden(xt, process.tau(t), rows.index)
    loss = process.row_loss(network, hidden, rows)
    kl, ce = (v.where(noised, 0.0).sum().item() for v in divergences(process, x0, xt, t - 1, t))
    terms = process.terms(network, hidden, loss, rows)
    rel = 1e-5 if name == "gaussian" else 1e-9
    assert terms["nelbo"].sum.item() == pytest.approx(6 * kl, rel=rel) and terms["nelbo"].weight == 0
    assert terms["objective"].sum.item() == pytest.approx(kl + weight * ce, rel=rel)
    assert terms["objective"].weight == 1 and {v.denominator for v in terms.values()} == {"tokens"}
    if weight:
        assert terms["cross_entropy"].sum.item() == pytest.approx(ce, rel=rel)
        assert terms["cross_entropy"].weight == 0
    assert kl > 1 and ce > 1


@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_the_last_step_of_a_bound_by_x0_is_the_plain_cross_entropy(name):
    """-log p(x_0 | x_1) of the network itself, without the chain's own step: of masked tokens where there is a mask."""
    fields = {**(COSINE if name == "uniform" else {"noise_schedule": "cosine"}), "l0_mode": "x0"}
    process, (x0, noised, u) = d3pm(3, **fields), toy_texts(40)
    r = torch.full((40, 1), 1 / 6, dtype=F64)
    found = process.estimate(Draw(Network(of(process)), x0, noised, None, r, u, u, {}))["diffusion"]
    xt = process.corrupt(x0, noised, torch.ones(40, 1, dtype=torch.int64), u)
    scored = noised if name == "uniform" else noised & (xt == M)
    ce = -log_p_of(process, xt).gather(2, x0.unsqueeze(2)).squeeze(2)
    assert torch.allclose(found, 3 * torch.where(scored, ce, 0.0).sum(1), atol=1e-12)
    assert float(found.sum()) > 1


@pytest.mark.parametrize("scaled", [True, False])
def test_the_cross_entropy_beside_the_score_entropy_has_no_weight_of_the_time(scaled):
    """se_loss_weight * bound + lm_loss_weight * (cross-entropy of the clean token at masked positions)."""
    fields = {"se_loss_weight": 0.4, "scale_by_sigma": scaled}
    x0, noised, u = toy_texts(60)
    noised[::3, 2] = False
    time = torch.linspace(0.2, 1.0, 60, dtype=F64).unsqueeze(1)
    for lm in (0.7, 0.0):
        process = sedd(lm_loss_weight=lm, **fields)
        xt = process.corrupt(x0, noised, time, u)
        rows = process.rows(x0, xt, noised, time)
        network = Network(of(process))
        hidden = network.hidden(xt, process.tau(time), rows.index)
        loss = process.row_loss(network, hidden, rows)
        masked = noised & (xt == M)
        z = F.pad(rough(K + 1)(xt[:, 1:], None), (0, 0, 1, 0))[masked][:, :K]
        own = z.gather(1, x0[masked].unsqueeze(1)).squeeze(1)
        weight = (1 / time).expand(x0.shape)[masked]  # w(t) of the loglinear schedule, whatever its end
        ce = float((z.logsumexp(1) - own).sum())
        shift = 0.0  # log-scores in units of 1/((e^sigma - 1) n), or as they are
        if not scaled:
            grown = 1 / (1 - 0.999 * time) - 1
            shift = (grown.log() + math.log(K)).expand(x0.shape)[masked]
        total = (z.logsumexp(1) + shift - math.log(K)).exp() - own - shift + math.log(K) - 1
        bound = float((weight * total).sum())
        terms = process.terms(network, hidden, loss, rows)
        assert float(process.bound_nats(loss, rows).sum()) == pytest.approx(bound, rel=1e-9)
        if lm:
            assert {k: v.weight for k, v in terms.items()} == {
                "nelbo": 0.0,
                "objective": 1.0,
                "cross_entropy": 0.0,
            }
            assert terms["nelbo"].sum.item() == pytest.approx(bound, rel=1e-9)
            assert terms["objective"].sum.item() == pytest.approx(0.4 * bound + lm * ce, rel=1e-9)
            assert terms["cross_entropy"].sum.item() == pytest.approx(ce, rel=1e-9)
        else:
            assert [*terms] == ["nelbo"] and terms["nelbo"].weight == 0.4
            assert terms["nelbo"].sum.item() == pytest.approx(bound, rel=1e-9)


# -- the noisy end ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_schedule": "cosine"},
        {"noise_schedule": "linear", "linear_beta_min": 0.2, "linear_beta_max": 0.3},
        {"transition_type": "uniform", "noise_schedule": "linear", "linear_beta_max": 0.3},
        {"transition_type": "gaussian", "noise_schedule": "linear", "gaussian_beta_max": 0.3},
    ],
)
def test_a_chains_bound_counts_the_prior_of_every_noised_token(fields):
    process, (x0, noised, u) = d3pm(2, **fields), toy_texts(20)
    noised[::2, 3] = False
    r = torch.full((20, 1), 0.7, dtype=F64)
    found = process.estimate(Draw(Network(of(process)), x0, noised, None, r, u, u, {}))["prior"]
    chain = process.chain
    at = torch.full((K,), 2)
    law = chain.row(torch.arange(K), at).double()[:, :K]
    # Without a mask the divergence from the uniform law; with one, what has survived is spread over the real tokens.
    spread = torch.xlogy(law, law) if process.mask_id is None else 0.0
    each = (spread + law * math.log(K)).sum(1)
    expected = torch.where(noised, each[x0], 0.0).sum(1)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0) and float(found.min()) > 1e-4
    if fields == {"noise_schedule": "cosine"}:  # beta_2 is clipped at 0.999
        survives = 1e-3 * math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
        assert float(found[1]) == pytest.approx(LENGTH * survives * math.log(K), rel=1e-9)


# -- which code computes the loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("kind", ["mdl", "sedd", "d3pm", "bd3lm"])
def test_the_kernels_of_the_run_compute_the_loss(kind, implementation, monkeypatch):
    called = []
    for name, spec in KERNELS[fused.OP].implementations.items():
        module = import_module(spec.partition(":")[0])
        monkeypatch.setattr(module, name, partial(_noted, called, name, getattr(module, name)))
    adapter = build(kind, trained=False)
    adapter.kernels = Kernels({"default": implementation})
    adapter(adapter.prepare(batch([0, 1]), train_context(2)))
    assert called == [implementation] == [*adapter.kernels.used["linear_diffusion_loss"]]


def _noted(called, name, run, *args, **options):
    called.append(name)
    return run(*args, **options)


def test_the_plain_loss_of_a_dense_chain_holds_all_logits_and_the_chunked_one_a_few(monkeypatch):
    monkeypatch.setattr(function_chunks, "rows_at_once", lambda *args: 5)
    sizes, dense = [], _Dense.loss

    def spy(self, network, hidden, rows, aux_weight):
        of_logits = network.loss_of_logits

        def counted(hidden, weights, function, aux_weight):
            def row_nats(logits, chosen):
                sizes.append(len(logits))
                return function(logits, chosen)

            return of_logits(hidden, weights, row_nats, aux_weight)

        network.loss_of_logits = counted
        return dense(self, network, hidden, rows, aux_weight)

    monkeypatch.setattr(_Dense, "loss", spy)
    for implementation in ("reference", "chunked"):
        sizes.clear()
        adapter = build("d3pm", trained=False, l0_mode="x0")
        adapter.kernels = Kernels({"default": implementation})
        adapter(adapter.prepare(batch([0, 1]), train_context(2)))
        assert sum(sizes) == 16 and max(sizes) == (16 if implementation == "reference" else 5)


# -- steps of the samplers ------------------------------------------------------------------------------------


class Fixed:
    """Noise whose every number is `u`."""

    def __init__(self, rows, u):
        self.rows, self.u = rows, u

    def uniform(self, stream, count):
        return torch.full((self.rows, count), self.u, dtype=F64)


SAMPLERS = {
    "ancestral": lambda: mdl(num_sampling_steps=1),
    "first hitting": lambda: mdl(sampler="first_hitting"),
    "analytic": lambda: mdl(sampler="analytic", num_sampling_steps=1),
    "without subs": lambda: mdl(**WITHOUT_SUBS, num_sampling_steps=1),
    "d3pm": lambda: d3pm(1),
    "d3pm uniform": lambda: d3pm(1, transition_type="uniform", noise_schedule="linear", l0_mode="x0"),
    "sedd": lambda: sedd(sampling_timesteps=1),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_rare_tokens_can_be_drawn(name):
    """A token of probability 1e-9, at a uniform number that fp32 rounds to 1: in fp32 the tail is cut off (Zheng et al.
    2024, arXiv:2409.02908)."""
    process = SAMPLERS[name]()
    log_p = torch.tensor([0.5, 0.5 - 1e-9, 1e-9], dtype=F64).log()
    logits = log_p + (math.log(K) if name == "sedd" else 0.0)
    if process.mask_id is not None:
        logits = F.pad(logits, (0, 1), value=-1e4)
    network = Network(of(process, lambda xt, tau: logits.expand(*xt.shape, -1)))
    for u, token in ((1 - 5e-10, 2), (1 - 2e-9, 1)):
        *_, text = process.resolve(network, replace(window(2), noise=Fixed(2, u)))
        assert bool((text[:, 1:] == token).all())


def test_logits_for_sampling_are_in_double_precision():
    adapter = build("mdl", trained=False).float()
    network = adapter.network()
    hidden = network.hidden(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2), torch.arange(6))
    assert hidden.dtype == torch.float32
    assert {logits.dtype for _, logits in network.logits(hidden)} == {F64}


def test_first_hitting_calls_the_network_at_the_times_of_the_process():
    """u <- u U^(1/k) with k masked: on average 3/4, 1/2, 1/4 for three, and u_1^3 is uniform (Zheng et al. 2024)."""
    process, count = mdl(sampler="first_hitting"), 20_000
    oracle = of(process, lambda xt, tau: torch.zeros(*xt.shape, K + 1, dtype=F64))
    *_, _ = process.resolve(Network(oracle), window(count))
    u = torch.stack([1 - torch.exp(-tau) for tau in oracle.taus])  # (3, B)
    assert u.mean(1).tolist() == pytest.approx([3 / 4, 1 / 2, 1 / 4], abs=0.007)
    assert float((u[0] ** 3).mean()) == pytest.approx(1 / 2, abs=0.009)
    assert float((u[0] ** 6).mean()) == pytest.approx(1 / 3, abs=0.009)
    for k, ratio in ((2, u[1] / u[0]), (1, u[2] / u[1])):  # U^(1/k), independent of what went before
        assert float((ratio**k).mean()) == pytest.approx(1 / 2, abs=0.009)
    for masks, tokens in zip((3, 2, 1), oracle.tokens, strict=True):
        assert bool(((tokens == M).sum(1) == masks).all())


@pytest.mark.parametrize("final_step", ["argmax", "sample"])
def test_first_hitting_ends_each_row_with_its_last_token(final_step):
    """Rows with three and with two gaps: only the token that completes a row is the likeliest one."""
    count = 400
    whole = window(count)
    x, unknown = whole.x.clone(), whole.unknown.clone()
    x[::2, 2], unknown[::2, 2] = 1, False
    process = mdl(sampler="first_hitting", final_step=final_step)
    states = list(
        process.resolve(
            Network(masked_oracle()), Window(x, unknown, Noise(0, 0, "sample", np.arange(count)), Choice())
        )
    )
    last, earlier = [], []
    for before, after in itertools.pairwise([x.masked_fill(unknown, M), *states]):
        row, place = (before != after).nonzero().unbind(1)
        greedy = masked_posterior(before[:, 1:]).argmax(2)[row, place - 1] == after[row, place]
        ends = (before == M).sum(1)[row] == 1
        last.append(greedy[ends])
        earlier.append(greedy[~ends])
    last, earlier = torch.cat(last), torch.cat(earlier)
    assert len(last) == count and len(earlier) == count // 2 * 3
    assert float(earlier.double().mean()) < 0.8
    assert float(last.double().mean()) == 1 if final_step == "argmax" else float(last.double().mean()) < 0.8


@pytest.mark.parametrize("ignore_bos", [True, False])
def test_known_text_of_a_chain_without_a_mask_is_noised_as_far_as_the_rest(ignore_bos):
    """Before the call at t, at every t; the token before the text only if training noises it too."""
    process, count = d3pm(4, ignore_bos=ignore_bos, **COSINE), 4000
    oracle = of(process, lambda xt, tau: torch.zeros(*xt.shape, K, dtype=F64))
    *_, text = process.resolve(Network(oracle), window(count, known={2: 2}))
    assert len(oracle.tokens) == 4 and bool((text[:, 2] == 2).all()) and bool((text[:, 0] == 0).all())
    chain = process.chain

    def law_fits(tokens, law):
        return chi_square(torch.bincount(tokens, minlength=K).double(), law) < CHI_SQUARE_LIMIT[2]

    for t, tokens in zip((4, 3, 2, 1), oracle.tokens, strict=True):
        at = torch.tensor([t])
        assert law_fits(tokens[:, 2], chain.row(torch.tensor([2]), at)[0])
        if ignore_bos:
            assert bool((tokens[:, 0] == 0).all())
        else:
            assert law_fits(tokens[:, 0], chain.row(torch.tensor([0]), at)[0])
    # A look at the numbers: at t = 1 some known text is noise already, at t = 3 much of it.
    kept = [float((tokens[:, 2] == 2).double().mean()) for tokens in oracle.tokens]
    assert 0.9 < kept[3] < 0.99 and kept[1] < 0.7


@pytest.mark.parametrize(
    "make", [lambda: d3pm(2, **COSINE), lambda: sedd(transition_type="uniform", sampling_timesteps=2)]
)
def test_sampling_without_a_mask_starts_from_uniform_tokens(make):
    process = make()
    oracle = of(process, lambda xt, tau: torch.zeros(*xt.shape, K, dtype=F64))
    *_, _ = process.resolve(Network(oracle), window(4000, known={2: 2}))
    first = oracle.tokens[0]
    pairs = torch.bincount(3 * first[:, 1] + first[:, 3], minlength=9).double()
    assert chi_square(pairs, torch.ones(9, dtype=F64)) < CHI_SQUARE_LIMIT[8]
    assert bool((oracle.taus[0] == oracle.taus[0][0]).all())


def plan_of(process, module, monkeypatch):
    """The steps that a score sampler would take: (sigma, step, amount)."""
    monkeypatch.setattr(
        f"adapters.diffusion.{module}.reveal_by_scores", lambda process, model, network, window, plan: plan
    )
    return process.resolve(Network(of(process)), window(1))


LOGLINEAR = (lambda t: -math.log1p(-0.9 * t), lambda t: 0.9 / (1 - 0.9 * t))
GEOMETRIC = (lambda t: 0.02 ** (1 - t) * 3.0**t, lambda t: 0.02 ** (1 - t) * 3.0**t * math.log(150.0))


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
@pytest.mark.parametrize("schedule", ["loglinear", "geometric"])
@pytest.mark.parametrize("predictor", ["analytic", "euler"])
def test_the_score_sampler_walks_an_even_grid_and_ends_with_a_denoising(
    graph, schedule, predictor, monkeypatch
):
    """From 1 to 1e-5 (Lou et al. 2024, section 4.2): Tweedie's step undoes sigma_i - sigma_{i+1}, Euler's takes
    dt sigma'(t) at its beginning, and whatever noise is left at 1e-5 is undone at once."""
    fields = {"noise_eps": 0.1, "sigma_min": 0.02, "sigma_max": 3.0}
    process = sedd(
        transition_type=graph, noise_schedule=schedule, predictor=predictor, sampling_timesteps=5, **fields
    )
    sigma, rate = LOGLINEAR if schedule == "loglinear" else GEOMETRIC
    times = [1 + i * (1e-5 - 1) / 5 for i in range(6)]
    plan = plan_of(process, "sedd", monkeypatch)
    assert len(plan) == 6
    assert [s for s, _, _ in plan] == pytest.approx([sigma(t) for t in times], rel=1e-9)
    step = process.graph.analytic if predictor == "analytic" else process.graph.euler
    assert [taken for _, taken, _ in plan] == [step] * 5 + [process.graph.analytic]
    pairs = list(itertools.pairwise(times))
    amounts = (
        [sigma(t) - sigma(s) for t, s in pairs]
        if predictor == "analytic"
        else [(t - s) * rate(t) for t, s in pairs]
    )
    assert [a for _, _, a in plan] == pytest.approx([*amounts, sigma(1e-5)], rel=1e-9)


def test_the_analytic_sampler_of_the_masked_model_undoes_all_noise_in_even_steps(monkeypatch):
    process = mdl(sampler="analytic", num_sampling_steps=4, alpha_min=0.1)
    plan = plan_of(process, "mdl", monkeypatch)
    sigma = [LOGLINEAR[0](t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert [s for s, _, _ in plan] == pytest.approx(sigma[:4], rel=1e-9)
    assert [a for _, _, a in plan] == pytest.approx([t - s for t, s in itertools.pairwise(sigma)], rel=1e-9)
    assert {step.__name__ for _, step, _ in plan} == {"analytic"}


def drawn_from(monkeypatch):
    """Collects the probabilities (M, V), normalised, that D3PM's reverse step draws from."""
    import adapters.diffusion.reverse as module

    seen, draw = [], module.draw

    def spy(p, u):
        seen.append(p / p.sum(1, keepdim=True))
        return draw(p, u)

    monkeypatch.setattr(module, "draw", spy)
    return seen


@pytest.mark.parametrize("most", [1.0, 0.9])
def test_without_subs_a_position_stays_masked_with_the_ratio_of_the_mask_probabilities(most, monkeypatch):
    """u_s / u_t where the network gives the mask no probability. At the end nothing stays: what is masked even at time
    0 takes a step of its own."""
    seen = drawn_from(monkeypatch)
    process = mdl(**WITHOUT_SUBS, num_sampling_steps=4, alpha_type="cosine", alpha_min=0.2, alpha_max=most)
    oracle = masked_oracle()
    states = list(process.resolve(Network(oracle), window(400)))
    u = [1 - 0.2 - (most - 0.2) * math.cos(math.pi / 2 * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    u += [0.0] if most < 1 else []
    assert len(seen) == len(u) - 1 and not bool((states[-1] == M).any())
    before = torch.full((400, LENGTH), M)
    for p, s, t, after in zip(seen, u[1:], u[:-1], states, strict=True):
        posterior = masked_posterior(before)[before == M]
        assert torch.allclose(p[:, M], torch.full((len(p),), s / t, dtype=F64), atol=1e-9)
        assert torch.allclose(p[:, :K], (1 - s / t) * posterior, atol=1e-9)
        before = after[:, 1:]


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("name", ["absorbing", "absorbing x0", "uniform", "uniform x0", "uniform mixture"])
def test_reverse_steps_are_the_chains_own_and_the_last_one_by_x0_the_prediction_itself(
    name, steps, monkeypatch
):
    """With 3 of 6 steps each is a skip, and takes the noise of both: 6 -> 4 -> 2 -> 0."""
    seen = drawn_from(monkeypatch)
    process = d3pm(6, **CHAINS[name])
    oracle = of(process)
    *_, _ = process.resolve(Network(oracle), window(80, choice=Choice(steps=steps)))
    assert len(seen) == steps
    for i, (tokens, p) in enumerate(zip(oracle.tokens, seen, strict=True)):
        t, s = 6 - i * 6 // steps, 6 - (i + 1) * 6 // steps
        moving = torch.ones_like(tokens, dtype=torch.bool) if process.mask_id is None else tokens == M
        moving[:, 0] = False
        log_p, now = log_p_of(process, tokens)[moving], tokens[moving]
        start, end = torch.full_like(now, s), torch.full_like(now, t)
        by_chain = log_reverse(process.chain, log_p, now, start, end, process.cfg.reverse_param).exp()
        plain = s == 0 and process.cfg.l0_mode == "x0"
        expected = log_p.exp() if plain else by_chain
        if s == 0 and process.mask_id is not None:
            expected[:, M] = 0
        assert torch.allclose(p, expected / expected.sum(1, keepdim=True), atol=1e-12)
    if name == "uniform x0":  # the two are far apart
        assert float((by_chain - log_p.exp()).abs().sum(1).mean()) > 0.3


# -- the score entropy itself --------------------------------------------------------------------------


def score_entropies(sigma, log_s):
    """Of one token x_t under the uniform graph with K states, for every x_t: the denoising score entropy, averaged over
    the clean token given x_t, and the marginal one (Lou et al. 2024, definitions 3.1 and 3.4), both over sigma'. log_s
    (K, K): row x, column y."""
    start = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    kept = math.exp(-sigma)
    q = kept * torch.eye(K, dtype=F64) + (1 - kept) / K  # (clean, noisy)
    law = start @ q
    clean = start[:, None] * q / law  # p(clean | noisy)
    ratio = law[None, :] / law[:, None]  # r_y at x
    others = ~torch.eye(K, dtype=torch.bool)

    def entropy(r):
        return ((log_s.exp() - r * log_s + r * (r.log() - 1)) * others).sum(1) / K

    per_clean = torch.stack([entropy(q[x0][None, :] / q[x0][:, None]) for x0 in range(K)])  # (clean, noisy)
    return (clean * per_clean).sum(0), entropy(ratio), ratio.log()


def test_score_entropy_is_zero_at_the_true_ratios_and_the_denoising_one_differs_by_a_constant():
    sigma, zero = 0.7, torch.zeros(K, K, dtype=F64)
    truth = score_entropies(sigma, zero)[2]
    denoising, marginal, _ = score_entropies(sigma, truth)
    assert torch.allclose(marginal, torch.zeros(K, dtype=F64), atol=1e-12)
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.3, 2.0):
        other = truth + scale * torch.randn(K, K, dtype=F64, generator=generator)
        worse_denoising, worse_marginal, _ = score_entropies(sigma, other)
        assert bool((worse_marginal > 0).all())
        assert torch.allclose(worse_denoising - worse_marginal, denoising - marginal, atol=1e-12)


def test_the_trained_loss_is_the_denoising_score_entropy_and_has_no_slope_at_the_true_ratios():
    sigma = 0.7
    truth = score_entropies(sigma, torch.zeros(K, K, dtype=F64))[2]
    start = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    kept = math.exp(-sigma)
    q = kept * torch.eye(K, dtype=F64) + (1 - kept) / K
    joint = start[:, None] * q  # (clean, noisy)
    x0, xt = (i.flatten() for i in torch.meshgrid(torch.arange(K), torch.arange(K), indexing="ij"))
    for shift in (0.0, 0.3):
        logits = (truth[xt] + shift * torch.eye(K, dtype=F64)[(xt + 1) % K]).requires_grad_()
        total, nats, _ = fused.linear_diffusion_loss(
            logits,
            torch.eye(K, dtype=F64),
            torch.zeros(K, dtype=F64),
            x0,
            xt,
            joint.flatten(),
            {"sigma_bar": torch.full((K * K,), sigma, dtype=F64)},
            mode="sedd_uniform",
            V=K,
            n=K,
            mask_id=None,
        )
        denoising, _, _ = score_entropies(
            sigma, truth + shift * torch.eye(K, dtype=F64)[(torch.arange(K) + 1) % K]
        )
        assert float(total.detach()) == pytest.approx(float((joint.sum(0) * denoising).sum()), rel=1e-9)
        total.backward()
        slope = torch.zeros(K, K, dtype=F64).index_add_(0, xt, logits.grad)  # of the score at each x_t
        assert (float(slope.abs().max()) < 1e-12) is (shift == 0)
