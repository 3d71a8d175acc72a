"""Bounds by other means: those of networks that know the law, and of toys that are small enough to enumerate."""

import itertools
import math

import pytest
import torch

from adapters.diffusion.network import Network
from adapters.diffusion.otherwise import bound_by_levels, largest_window
from tests.adapters.diffusion.processes import WITHOUT_SUBS, bd3lm, d3pm, mdl, sedd, texts
from tests.adapters.diffusion.tiny import EVAL, batch, build
from tests.adapters.diffusion.toy import (
    ENTROPY,
    F64,
    LAW,
    SEQUENCES,
    block_oracle,
    masked_oracle,
    score_oracle,
)

OVER_TIME = {"time_conditioning": True, "sampler": "ancestral"}
ENDS = 4e-3

# process, network that knows the law, and nats by which the bound may miss the entropy: what the ends of the way leave
KNOWING = {
    "mdl": lambda: (mdl(), masked_oracle(), 1e-9),
    "mdl over time": lambda: (mdl(**OVER_TIME), masked_oracle(), ENDS),
    "mdl cosine": lambda: (mdl(alpha_type="cosine", **OVER_TIME), masked_oracle(), ENDS),
    "mdl geometric": lambda: (mdl(alpha_type="geometric", **OVER_TIME), masked_oracle(), ENDS),
    "mdl with a noisy clean end": lambda: (mdl(alpha_max=0.9, **OVER_TIME), masked_oracle(), ENDS),
    "bd3lm": lambda: (bd3lm(2), block_oracle(2), 1e-9),
    "bd3lm over time": lambda: (bd3lm(2, time_conditioning=True), block_oracle(2), ENDS),
    "sedd absorbing": lambda: (sedd(), score_oracle(sedd()), ENDS),
}


def slow_over_time(name):
    return pytest.mark.slow if name not in ("mdl", "bd3lm") else ()


def otherwise(process, oracle, sequences=SEQUENCES):
    x0, noised = texts(sequences)
    return bound_by_levels(process, Network(oracle), x0, noised, torch.zeros_like(x0), seed=0)


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow_over_time(n)) for n in KNOWING])
def test_a_network_that_knows_the_law_has_its_entropy(name):
    process, oracle, most = KNOWING[name]()
    found = otherwise(process, oracle)
    assert not found.errors.any() and "all patterns of masks" in found.how
    assert float((LAW * found.nats).sum()) == pytest.approx(ENTROPY, abs=most)
    if most < ENDS:  # nothing is left out at either end: of every single text
        torch.testing.assert_close(found.nats, -LAW.log(), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_a_chain_of_few_steps_is_looser_by_what_is_known():
    found = otherwise(d3pm(64), masked_oracle())
    assert float((LAW * found.nats).sum()) == pytest.approx(2.610315254, abs=1e-8)


# -- the estimates of likelihood agree -----------------------------------------------------------------------------

MASKED = {
    "mdl": ("mdl", {}),
    "mdl over time": ("mdl", OVER_TIME),
    "mdl in steps": ("mdl", {"continuous_time": False, "num_timesteps": 8}),
    "mdl without subs": ("mdl", {**WITHOUT_SUBS, "num_timesteps": 8}),
    "bd3lm": ("bd3lm", {}),
    "bd3lm over time": ("bd3lm", {"time_conditioning": True}),
    "sedd": ("sedd", {}),
    "sedd unscaled": ("sedd", {"scale_by_sigma": False}),
    "d3pm": ("d3pm", {}),
    "d3pm mixture": ("d3pm", {"reverse_param": "mixture"}),
    "d3pm x0": ("d3pm", {"l0_mode": "x0"}),
    "d3pm without the mask": ("d3pm", {"zero_mask_logit": True}),
}
FEW = {"noise_schedule": "cosine", "num_timesteps": 6, "sampling_timesteps": 6}
OTHERS = {
    "d3pm uniform": ("d3pm", {"transition_type": "uniform", **FEW}),
    "d3pm uniform mixture": ("d3pm", {"transition_type": "uniform", "reverse_param": "mixture", **FEW}),
    "d3pm gaussian": ("d3pm", {"transition_type": "gaussian", **FEW, "noise_schedule": "linear"}),
    "sedd uniform": ("sedd", {"transition_type": "uniform", "noise_schedule": "geometric"}),
}
COPIES = 600


def many(ids, seq_len):
    """Copies of one text, whose numbers, and noise, are others."""
    one = batch([0] * COPIES, seq_len)
    one.rows[:] = range(COPIES)
    one.tokens[:] = one.tokens[:1] % ids
    return one


def first(copies):
    one = batch([0], copies.weights.shape[1])
    one.tokens[:] = copies.tokens[:1]
    return one


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow_over_time(n)) for n in MASKED])
def test_the_mean_of_estimates_is_the_sum_over_masks(name):
    kind, fields = MASKED[name]
    adapter = build(kind, **fields)
    copies = many(11, 4)
    nats = adapter.likelihood(copies, EVAL).nats
    found = adapter.bound_otherwise(first(copies), EVAL)
    error = float(nats.std()) / math.sqrt(COPIES)
    assert error < 0.1 * float(nats.mean())
    assert abs(float(nats.mean() - found.nats[0])) < 4.5 * error
    assert float(found.errors[0]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_of_eight_ids_both_means_are_what_brute_force_gives(name):
    """Two tokens: all 64 noisy texts at every level, each as likely as it is."""
    kind, fields = OTHERS[name]
    adapter = build(kind, vocab_size=8, **fields)
    with torch.no_grad():
        adapter.model.head_weight.mul_(0.3)  # ratios of a network that is not far off
    copies = many(8, 2)
    nats = adapter.likelihood(copies, EVAL).nats
    found = adapter.bound_otherwise(first(copies), EVAL)
    truth = brute_force(kind, adapter, torch.from_numpy(copies.tokens[0]))
    error = float(nats.std()) / math.sqrt(COPIES)
    assert error < 0.04 * truth and 0 < float(found.errors[0]) < 0.06 * truth
    assert abs(float(nats.mean()) - truth) < 4.5 * error
    assert abs(float(found.nats[0]) - truth) < 4.5 * float(found.errors[0])


def brute_force(kind, adapter, text):
    """The bound of text (3,), the first of which is given: from the chain's one-step matrices, or from ratios."""
    process = adapter.process
    noisy = torch.tensor(list(itertools.product(range(8), repeat=2)))  # (64, 2)
    x0 = text[1:].expand(64, 2)

    def log_p(tau):
        xt = torch.cat([text[:1].expand(64, 1), noisy], 1)
        hidden = adapter.model(xt, torch.full((64,), tau, dtype=torch.float32), doc_ids=torch.zeros_like(xt))
        return adapter.model.logits(hidden)[:, 1:, :8].double()  # (64, 2, 8)

    with torch.no_grad():
        return (steps_of if kind == "d3pm" else times_of)(process, noisy, x0, log_p)


def steps_of(process, noisy, x0, logits):
    chain, total = process.chain, 0.0
    every = torch.arange(8)

    def at(t):  # Qbar_t (8, 8)
        return chain.row(every, torch.full((8,), t)).double()

    for t in range(1, process.steps + 1):
        before, now = at(t - 1), at(t)
        step = torch.stack([chain.column(every, *(torch.full((8,), s) for s in (t - 1, t)))], 0)[0].double().T
        mass = now[x0, noisy].prod(1)  # (64,)
        p = logits(1000 * t / process.steps).softmax(-1)
        # q(x_s | x_t, x_0) for every x_0 there is: (64, 2, 8 of x_0, 8 of x_s)
        joint = before[None, None] * step.T[noisy][:, :, None]
        posterior = (joint / joint.sum(-1, keepdim=True)).nan_to_num()  # of what cannot have come there
        q = posterior.gather(2, x0[:, :, None, None].expand(64, 2, 1, 8)).squeeze(2)
        if process.cfg.reverse_param == "mixture":
            r = (p[..., None] * posterior).sum(2)
        else:
            r = (p[..., None] * joint).sum(2)
            r = r / r.sum(-1, keepdim=True)
        kl = (torch.xlogy(q, q) - torch.xlogy(q, r)).sum((1, 2))
        total += float((mass * kl).sum())
    end = at(process.steps)[x0[0]]  # (2, 8)
    return total + float((end * (8 * end).log()).sum())


def times_of(process, noisy, x0, logits, nodes=400):
    """The trapezoid rule in log t of score entropy."""
    eps = process.cfg.sampling_eps
    grid = torch.logspace(math.log10(eps), 0, nodes, dtype=F64)
    values = []
    for t in grid:
        sigma, rate = float(process.schedule.sigma(t)), float(process.schedule.rate(t))
        q = law(x0, sigma)  # (64, 2, 8)
        own = q.gather(2, noisy[:, :, None])
        ratio, log_s = q / own, logits(sigma)
        each = log_s.exp() - ratio * log_s + ratio * (ratio.log() - 1)
        each = each.scatter(2, noisy[:, :, None], 0.0).sum((1, 2))
        values.append(rate / 8 * float((own.squeeze(2).prod(1) * each).sum()) * t)
    total = float(torch.trapezoid(torch.tensor(values, dtype=F64), grid.log()))
    sigma = float(process.schedule.sigma(torch.tensor(eps, dtype=F64)))
    q, flat = law(x0, sigma), noisy.flatten()
    log_s = logits(sigma).flatten(0, 1).scatter(1, flat[:, None], 0.0)
    p = process.graph.analytic(log_s, flat, sigma)
    p = (1 - 1e-6) * p / p.sum(1, keepdim=True) + 1e-6 / 8
    own = -p.gather(1, x0.reshape(-1, 1)).log().view(64, 2).sum(1)
    mass = q.gather(2, noisy[:, :, None]).squeeze(2).prod(1)
    return total + float((mass * own).sum()) + 2 * process.prior_nats()


def law(x0, sigma):
    kept = math.exp(-sigma)
    return torch.full((*x0.shape, 8), (1 - kept) / 8, dtype=F64).scatter(
        2, x0[:, :, None], kept + (1 - kept) / 8
    )


def test_windows_are_as_long_as_their_patterns_allow():
    assert largest_window(mdl(), 6) == 6
    assert largest_window(d3pm(64), 6) == 6
    assert largest_window(d3pm(1000), 6) == 3
    assert largest_window(d3pm(64, transition_type="uniform", noise_schedule="cosine"), 6) == 6
