"""SEDD: the score entropy, every part of its bound, and its sampler's plan."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import kernels.linear_diffusion_loss as fused
from adapters.diffusion.network import Network
from tests.adapters.diffusion.processes import (
    GEOMETRIC,
    LOGLINEAR,
    MANY,
    ROUGH,
    Seen,
    expected_parts,
    follows_the_law,
    from_uniform,
    information,
    mdl,
    of,
    plan_of,
    remaining,
    rough,
    sedd,
    texts,
    toy_texts,
)
from tests.adapters.diffusion.tiny import V, assert_changes, batch, build, train_context
from tests.adapters.diffusion.toy import (
    ENTROPY,
    F64,
    LAW,
    LENGTH,
    SEQUENCES,
    K,
    M,
    gauss_legendre,
    masked_oracle,
    masked_posterior,
    rows,
    score_oracle,
    with_mask,
)


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


@pytest.mark.parametrize("scaled", [True, False])
def test_the_score_total_is_the_networks_own(scaled):
    adapter = build("sedd", scale_by_sigma=scaled)
    prepared = adapter.prepare(batch(range(8)), train_context(8))
    metric = adapter(prepared).metrics["score_total"]
    t = prepared.tensors
    logits = adapter.model.logits(adapter.model(t["xt"], t["tau"], doc_ids=t["doc_ids"])).flatten(0, 1)[
        t["rows.index"], :V
    ]
    shift = 0.0 if scaled else t["rows.c.shift"]
    expected = torch.exp(logits.logsumexp(1) + shift - math.log(V)).sum()
    assert float(metric.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert metric.count == len(t["rows.index"])


# -- the bound -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
def test_score_entropy_plus_its_ends_is_the_entropy(graph):
    """With the true ratios, at ends as shipped: integral + reconstruction + prior = H(x_0) + KL(p_T || base)."""
    eps = 1e-3
    process = sedd(transition_type=graph, noise_schedule="loglinear", sampling_eps=eps)
    points, weights = (torch.tensor(v, dtype=F64) for v in gauss_legendre(math.log(eps), 0.0, 16))
    t = points.exp()  # nodes in log t, where the integrand is smooth
    jumped, clean = (process.schedule.mask_probability(v) for v in (t, torch.tensor(eps, dtype=F64)))
    oracle = Seen(score_oracle(process).answer, process.mask_id)
    r, weights = (t - eps) / (1 - eps), weights * t / (1 - eps)
    found = expected_parts(process, oracle, r, weights, jumped, float(clean))
    del found["paper"]
    assert sum(found.values()) == pytest.approx(ENTROPY + leak(process, graph), abs=1e-4)


def leak(process, graph):
    """KL(p_1 || base): what is left of the text at t = 1, under the prior that the bound uses."""
    kept = float(process.schedule.alpha(torch.ones((), dtype=F64)))
    if graph == "uniform":
        law = torch.zeros(27, dtype=F64)
        for i, sequence in enumerate(SEQUENCES):
            law[i] = (LAW * (kept * (sequence == SEQUENCES).double() + (1 - kept) / K).prod(1)).sum()
        return float(torch.xlogy(law, law * 27).sum())
    out = 0.0
    for xt in itertools.product(range(K + 1), repeat=LENGTH):
        state = torch.tensor(xt)
        mass = float(
            (LAW * torch.where(state == M, 1 - kept, kept * (state == SEQUENCES).double()).prod(1)).sum()
        )
        base = math.prod(1 - kept if s == M else kept / K for s in xt)
        out += mass * math.log(mass / base) if mass else 0.0
    return out


def test_predictions_read_as_scores_give_the_masked_bound_term_by_term():
    """SEDD's loss of a normalised prediction is MDLM's, at the same times and masks."""
    score, mask = sedd(), mdl(time_conditioning=True, sampler="ancestral")
    batch = rows(16)
    x0 = torch.from_numpy(batch.tokens)
    noised = texts(x0[:, 1:])[1]
    time = torch.rand(16, 1, dtype=F64) * 0.99 + 0.01
    xt = score.corrupt(x0, noised, time, torch.rand(16, LENGTH + 1, dtype=F64))
    values = []
    for process, network in ((score, Network(score_oracle(score))), (mask, Network(masked_oracle()))):
        chosen = process.rows(x0, xt, noised, time)
        hidden = network.hidden(xt, process.tau(time), chosen.index)
        values.append(process.bound_nats(network.loss(hidden, chosen, process.mode), chosen))
    assert torch.allclose(values[0], values[1], atol=1e-9)


# -- text ------------------------------------------------------------------------------------------------


SAMPLERS = {
    "absorbing": {"sampling_timesteps": 64},
    "euler": {"sampling_timesteps": 128, "predictor": "euler"},
    "uniform": {"sampling_timesteps": 64, "transition_type": "uniform"},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_law(name):
    process = sedd(**SAMPLERS[name])
    assert follows_the_law(process, score_oracle(process), MANY)


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
def test_many_samples_follow_the_law(graph):
    process = sedd(transition_type=graph, sampling_timesteps=256)
    assert follows_the_law(process, score_oracle(process), 20_000)


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


# -- every field has an effect ---------------------------------------------------------------------------


FIELDS = [
    ({}, {"transition_type": "uniform"}, "loss"),
    ({}, {"noise_schedule": "geometric"}, "loss"),
    ({"noise_schedule": "geometric"}, {"sigma_min": 1e-2}, "loss"),
    ({"noise_schedule": "geometric"}, {"sigma_max": 5.0}, "loss"),
    ({}, {"noise_eps": 0.2}, "loss"),
    ({}, {"sampling_eps": 0.2}, "loss"),
    ({}, {"use_low_discrepancy_sampler": False}, "loss"),
    ({}, {"se_loss_weight": 2.0}, "loss"),
    ({}, {"lm_loss_weight": 0.5}, "loss"),
    ({"lm_loss_weight": 0.5}, {"se_loss_weight": 2.0}, "loss"),
    ({}, {"scale_by_sigma": False}, "loss"),
    ({"noise_schedule": "geometric"}, {"predictor": "euler"}, "text"),
    ({}, {"sampling_timesteps": 3}, "calls"),
    ({}, {"time_conditioning": False}, "loss"),
    ({}, {"nelbo_draws": 8}, "bound"),
    ({"nelbo_draws": None, "num_timesteps": 4}, {"num_timesteps": 9}, "estimator"),
]


@pytest.mark.parametrize("base, change, what", FIELDS, ids=lambda v: str(v).replace(" ", "")[:40])
def test_every_field_changes_something(base, change, what):
    assert_changes("sedd", base, change, what)
