"""MDLM: times, both ends and every part of its bounds, and its samplers."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from adapters.diffusion.likelihood import estimate_bound
from adapters.diffusion.mdl import MDLAdapter
from adapters.diffusion.network import Network
from adapters.diffusion.process import Draw, Sampling
from adapters.randomness import Noise
from models.mdl import MDLConfig
from tests.adapters.diffusion.processes import (
    LOGLINEAR,
    MANY,
    ROUGH,
    WITHOUT_SUBS,
    Seen,
    d3pm,
    drawn_from,
    expected_parts,
    follows_the_law,
    mdl,
    of,
    plan_of,
    rough,
    sample,
    texts,
    toy_texts,
    window,
)
from tests.adapters.diffusion.tiny import assert_changes
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    ENTROPY,
    F64,
    INDEPENDENT,
    LAW,
    LENGTH,
    MASKED_NATS,
    SEQUENCES,
    TOKENIZER,
    K,
    M,
    Oracle,
    chi_square,
    gauss_legendre,
    histogram,
    masked_oracle,
    masked_posterior,
    rows,
    with_mask,
)


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
    *_, _ = process.resolve(Network(oracle), window(4, sampling=Sampling(by_confidence=True, steps=3)))
    most = 1 - math.exp(-sigma(1.0))
    expected = [-math.log1p(-min(u, most)) for u in (1.0, 2 / 3, 1 / 3)]  # the noise of that many masks
    assert [float(tau[0]) for tau in oracle.taus] == pytest.approx(expected, rel=1e-6)


def test_times_of_the_discrete_masked_model_are_all_of_its_grid():
    """Whatever `sampling_eps`, which is for continuous time: a bound that left out steps would be none."""
    process = mdl(continuous_time=False, num_timesteps=10, sampling_eps=0.3)
    r = (torch.arange(10, dtype=F64).unsqueeze(1) + 0.5) / 10
    assert torch.allclose(process.training_time(r), torch.arange(1, 11, dtype=F64).unsqueeze(1) / 10)
    ends = torch.tensor([[1e-12], [1 - 1e-12]], dtype=F64)
    assert process.training_time(ends).tolist() == [[0.1], [1.0]]
    dense = process.training_time(torch.linspace(1e-9, 1 - 1e-9, 1001, dtype=F64).unsqueeze(1))
    assert torch.allclose(dense * 10, (dense * 10).round(), atol=1e-12) and len(dense.unique()) == 10


def test_stratified_times_lower_the_variance():
    """The training loss of a batch of 16, over many steps. On the linear schedule of alpha the expected loss hardly
    depends on the time; on one that is linear in sigma it does."""
    x0, noised = texts(
        SEQUENCES[torch.multinomial(LAW, 16, True, generator=torch.Generator().manual_seed(5))]
    )
    process = mdl(alpha_type="linear_sigma", sigma_min=0.0, sigma_max=10.0)
    network = Network(masked_oracle())

    def variance(stratified):
        """Over 300 steps, whose rows make one batch."""
        steps = [Noise(0, step, "x", range(16)) for step in range(300)]
        r = [noise.stratified("time", 16) if stratified else noise.uniform("time", 1) for noise in steps]
        time = process.training_time(torch.cat(r))
        clean, scored = x0.repeat(300, 1), noised.repeat(300, 1)
        u = torch.cat([noise.uniform("mask", LENGTH + 1) for noise in steps])
        xt = process.corrupt(clean, scored, time, u)
        chosen = process.rows(clean, xt, scored, time)
        hidden = network.hidden(xt, process.tau(time), chosen.index)
        nats = process.bound_nats(process.row_loss(network, hidden, chosen), chosen)
        return chosen.sum_by_row(nats, *clean.shape).view(300, 16).sum(1).var()

    assert variance(True) < 0.9 * variance(False)


# -- the bound -------------------------------------------------------------------------------------------


def subset_average(process, network):
    """The exact-count bound of the whole law: every subset of positions, every number of masks."""
    total = 0.0
    for k in range(1, LENGTH + 1):
        subsets = list(itertools.combinations(range(1, LENGTH + 1), k))
        for subset in subsets:
            x0, noised = texts(SEQUENCES)
            u = torch.full((len(x0), LENGTH + 1), 0.9, dtype=F64)
            u[:, list(subset)] = 0.1
            r = torch.full((len(x0), 1), (k - 0.5) / LENGTH, dtype=F64)
            parts = process.estimate(Draw(network, x0, noised, None, r, u, u, {}))
            total += float((LAW * parts["diffusion"]).sum()) / len(subsets) / LENGTH
    return total


def test_masked_bound_of_a_perfect_network_is_the_entropy():
    assert subset_average(mdl(), Network(masked_oracle())) == pytest.approx(ENTROPY, abs=1e-9)


def test_any_other_network_has_a_larger_bound():
    def blunt(xt, tau):
        return 0.8 * with_mask(masked_posterior(xt))

    assert subset_average(mdl(), Network(Oracle(blunt, M))) > ENTROPY + 1e-3


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


def test_discrete_masked_bound_is_d3pm_term_by_term():
    """Discrete time on a linear schedule is the absorbing chain whose information falls linearly."""
    steps = 8
    discrete = mdl(continuous_time=False, num_timesteps=steps, alpha_min=0.0)
    chain = d3pm(steps, zero_mask_logit=True, auxiliary_loss_weight=0.0)
    batch = rows(32)
    x0 = torch.from_numpy(batch.tokens)
    noised = texts(x0[:, 1:])[1]
    t = torch.arange(32).unsqueeze(1) % steps + 1
    xt = chain.corrupt(x0, noised, t, torch.rand(32, LENGTH + 1, dtype=F64))
    network = Network(Oracle(lambda xt, tau: with_mask(masked_posterior(xt), 0.3), M))
    values = []
    for process, time in ((discrete, t.double() / steps), (chain, t)):
        chosen = process.rows(x0, xt, noised, time)
        hidden = network.hidden(xt, process.tau(time), chosen.index)
        values.append(process.bound_nats(process.row_loss(network, hidden, chosen), chosen))
    assert torch.allclose(*values, atol=1e-9)


def test_released_codes_estimate_is_recovered_from_exact_counts():
    """The integral over t in [eps, 1] without ends, by Monte Carlo and by reweighting the counts."""
    x0, noised = texts(SEQUENCES.repeat(400, 1))
    weights = LAW.repeat(400) / 400
    noise = Noise(1, 0, "x", range(len(x0)))
    over_time = mdl(time_conditioning=True, sampler="ancestral", sampling_eps=0.2, alpha_min=0.3)
    by_count = mdl(sampling_eps=0.2, alpha_min=0.3)
    paper = [
        float(
            (
                weights
                * estimate_bound(p, Network(masked_oracle()), x0, noised, None, noise, 8).estimates["paper"]
            ).sum()
        )
        for p in (over_time, by_count)
    ]
    assert paper[0] == pytest.approx(paper[1], abs=0.02)
    assert abs(paper[0] - ENTROPY) > 0.1  # at such ends it is far from a bound


@pytest.mark.parametrize("unknown", [[True, False, False], [False, True, True], [True, False, True]])
def test_the_score_of_gaps_is_that_of_the_conditional_law(unknown):
    """With perfect predictions the bound is -log p(unknown | known) of every text."""
    cfg = MDLConfig(vocab_size=K, n_ctx=LENGTH, nelbo_draws=16)
    adapter = MDLAdapter(masked_oracle(), cfg, TOKENIZER)
    copies = 40
    texts = SEQUENCES.repeat(copies, 1)
    found = adapter.gap_likelihood(texts.tolist(), [unknown] * len(texts))
    known = torch.tensor([not u for u in unknown])
    same = (SEQUENCES[:, None, known] == SEQUENCES[None, :, known]).all(2).double()  # (27, 27)
    truth = -(LAW / (same @ LAW)).log()
    error = found.variance.view(copies, 27).sum(0).sqrt() / copies
    difference = (found.nats.view(copies, 27).mean(0) - truth).abs()
    assert bool((difference <= 4.5 * error + 1e-9).all())
    assert float(difference.max()) < 0.2 and found.kind == "bound"


# -- text ------------------------------------------------------------------------------------------------


SAMPLERS = {
    "first hitting": lambda: mdl(sampler="first_hitting"),
    "ancestral": lambda: mdl(num_sampling_steps=64),
    "analytic": lambda: mdl(num_sampling_steps=64, sampler="analytic"),
    "cosine": lambda: mdl(num_sampling_steps=64, alpha_type="cosine"),
    "without subs": lambda: mdl(num_sampling_steps=64, **WITHOUT_SUBS),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_law(name):
    assert follows_the_law(SAMPLERS[name](), masked_oracle(), MANY)


def test_one_step_is_seen_to_be_wrong():
    """The test above can fail: one step draws positions independently."""
    text, calls = sample(mdl(num_sampling_steps=1), masked_oracle(), MANY)
    assert calls == 1
    assert chi_square(histogram(text), INDEPENDENT) < CHI_SQUARE_LIMIT[26]
    assert chi_square(histogram(text), LAW) > 5 * CHI_SQUARE_LIMIT[26]


@pytest.mark.slow
def test_many_samples_follow_the_law():
    assert follows_the_law(mdl(num_sampling_steps=512), masked_oracle(), 20_000)


def test_greedy_text_is_the_same_for_every_seed_and_confidence_is_not_the_law():
    text, _ = sample(mdl(sampler="first_hitting"), masked_oracle(), 50, sampling=Sampling(temperature=0))
    assert bool((text == 0).all())
    text, calls = sample(mdl(), masked_oracle(), MANY, sampling=Sampling(by_confidence=True, steps=3))
    assert calls == 3
    assert chi_square(histogram(text), LAW) > 3 * CHI_SQUARE_LIMIT[26]


def test_the_analytic_sampler_of_the_masked_model_undoes_all_noise_in_even_steps(monkeypatch):
    process = mdl(sampler="analytic", num_sampling_steps=4, alpha_min=0.1)
    plan = plan_of(process, "mdl", monkeypatch)
    sigma = [LOGLINEAR[0](t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert [s for s, _, _ in plan] == pytest.approx(sigma[:4], rel=1e-9)
    assert [a for _, _, a in plan] == pytest.approx([t - s for t, s in itertools.pairwise(sigma)], rel=1e-9)
    assert {step.__name__ for _, step, _ in plan} == {"analytic"}


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


# -- every field has an effect ---------------------------------------------------------------------------


GEOMETRIC_ALPHA = {"alpha_type": "geometric"}
DISCRETE = {"continuous_time": False, "num_timesteps": 10}
FIELDS = [
    ({}, {"alpha_type": "cosine"}, "loss"),
    ({}, {"alpha_type": "cosine_sq"}, "loss"),
    ({}, {"alpha_type": "linear_sigma"}, "loss"),
    ({}, {"alpha_min": 0.3}, "loss"),
    ({}, {"alpha_max": 0.7}, "loss"),
    (GEOMETRIC_ALPHA, {"sigma_min": 1e-2}, "loss"),
    (GEOMETRIC_ALPHA, {"sigma_max": 5.0}, "loss"),
    ({}, {"sampling_eps": 0.2}, "loss"),
    ({}, {"sampling_eps": 0.2}, "paper"),
    ({}, DISCRETE, "bound"),
    (DISCRETE, {"num_timesteps": 3}, "loss"),
    ({**DISCRETE, "sampler": "ancestral"}, {"use_subs_parameterization": False}, "loss"),
    ({**DISCRETE, "sampler": "ancestral"}, {"use_subs_parameterization": False}, "text"),
    ({}, {"use_low_discrepancy_sampler": False}, "loss"),
    ({}, {"num_sampling_steps": 3}, "calls"),
    ({}, {"sampler": "ancestral"}, "calls"),
    ({}, {"sampler": "analytic"}, "text"),
    ({}, {"sampler": "first_hitting"}, "text"),
    ({}, {"sar_chunk_size": 2}, "text"),
    ({"sampler": "ancestral"}, {"time_conditioning": True}, "loss"),
    ({}, {"nelbo_draws": 8}, "bound"),
    ({"alpha_max": 0.5}, {"final_step": "argmax"}, "text"),
]


@pytest.mark.parametrize("base, change, what", FIELDS, ids=lambda v: str(v).replace(" ", "")[:40])
def test_every_field_changes_something(base, change, what):
    assert_changes("mdl", base, change, what)
