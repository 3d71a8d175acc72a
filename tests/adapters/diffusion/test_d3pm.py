"""D3PM: chains from their configuration, bounds step by step, objective, ancestral sampling."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from adapters.diffusion.chains import AbsorbingChain, GaussianChain, UniformChain
from adapters.diffusion.d3pm import _Dense, build_chain, even_grid
from adapters.diffusion.likelihood import REPLICATES, estimate_bound
from adapters.diffusion.network import Network
from adapters.diffusion.process import Draw, Sampling
from adapters.diffusion.reverse import log_reverse, reverse_kl
from adapters.diffusion.schedules import absorbing_mutual_info_betas, cosine_betas
from adapters.randomness import Noise
from data.store import TokenStore
from models.d3pm import D3PMConfig
from tests.adapters.diffusion.matrices import T, cumulative
from tests.adapters.diffusion.processes import (
    COSINE,
    MANY,
    d3pm,
    drawn_from,
    follows_the_law,
    of,
    rough,
    sample,
    texts,
    toy_texts,
    window,
)
from tests.adapters.diffusion.tiny import (
    EVAL,
    TOKENIZER,
    V,
    assert_changes,
    batch,
    build,
    fingerprint,
    train_context,
)
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    F64,
    LAW,
    LENGTH,
    MASKED_NATS,
    SEQUENCES,
    K,
    M,
    chi_square,
    histogram,
    masked_oracle,
    masked_posterior,
    uniform_leave_one_out,
    uniform_oracle,
    with_mask,
)


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


def test_a_schedule_fitted_to_the_text_travels_with_the_weights():
    fields = {"transition_type": "uniform", "noise_schedule": "mutual_info", "auxiliary_loss_weight": 0.0}
    adapter = build("d3pm", **fields)
    flat = adapter.process.chain.alpha_bar.clone()
    tokens = np.repeat([1, 2, 3], [90, 9, 1]).astype(np.uint16)
    store = TokenStore(tokens, np.array([0, 50, 100]), np.array([50, 50]), TOKENIZER)
    adapter.on_training_text(store)
    fitted = adapter.process.chain.alpha_bar
    assert not torch.allclose(flat, fitted)
    other = build("d3pm", **fields)
    other.model.load_state_dict(adapter.model.state_dict())
    assert torch.equal(other.process.chain.alpha_bar, fitted)


def test_the_network_of_a_chain_of_steps_is_told_a_thousandth_of_the_way():
    process = d3pm(8, nelbo_steps=4)
    t = torch.tensor([[1], [3], [8]])
    assert process.tau(t).tolist() == [125.0, 375.0, 1000.0]
    oracle = of(process)
    *_, _ = process.resolve(Network(oracle), window(64, sampling=Sampling(steps=4)))
    assert [float(tau[0]) for tau in oracle.taus] == [1000.0, 750.0, 500.0, 250.0]
    x0, noised, u = toy_texts(4)
    r = torch.tensor([[0.1], [0.3], [0.6], [0.9]], dtype=F64)
    process.estimate(Draw(Network(oracle), x0, noised, None, r, u, u, {}))
    assert oracle.taus[-1].tolist() == [250.0, 500.0, 750.0, 1000.0]
    oracle.taus.clear()
    *_, _ = process.resolve(Network(oracle), window(4, sampling=Sampling(by_confidence=True, steps=2)))
    assert [float(tau[0]) for tau in oracle.taus] == [1000.0, 750.0]  # 2 of 3 masked: the first t past 2/3


# -- the bound -------------------------------------------------------------------------------------------


def exact_d3pm_bound(chain, answer):
    """The variational bound of the law, summed over all steps, texts and noisy texts."""
    states = torch.tensor(list(itertools.product(range(chain.states), repeat=LENGTH)))  # (X, 3)
    total = float((LAW[:, None] * chain.prior_nats(SEQUENCES.flatten()).view(-1, LENGTH)).sum())
    for t in range(1, chain.steps + 1):
        at = torch.full((len(SEQUENCES) * LENGTH,), t)
        q = chain.row(SEQUENCES.flatten(), at).view(-1, LENGTH, chain.states)  # (27, 3, K)
        joint = LAW[:, None] * torch.stack([q[:, i, states[:, i]] for i in range(LENGTH)]).prod(0)  # (27, X)
        log_p = answer(states, chain.alpha_bar[t].expand(len(states)))  # (X, 3, K)
        for i in range(LENGTH):
            x0, xt = SEQUENCES[:, None, i].expand(joint.shape), states[None, :, i].expand(joint.shape)
            possible = joint > 0
            now = torch.full((int(possible.sum()),), t)
            p = log_p[None, :, i].expand(*joint.shape, -1)[possible]
            kl = reverse_kl(chain, p, x0[possible], xt[possible], now - 1, now, "joint")
            total += float((joint[possible] * kl).sum())
    return total


def absorbing_answer(states, kept):
    return with_mask(masked_posterior(states))


def uniform_answer(states, kept):
    return uniform_leave_one_out(states, kept).log()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "steps, expected",
    [
        (1, 3.138429022),
        (2, 2.858586445),
        (4, 2.727641400),
        (8, 2.664412938),
        (16, 2.633359722),
        pytest.param(64, 2.610315254, marks=SLOW),
        pytest.param(256, 2.604587009, marks=SLOW),
    ],
)
def test_absorbing_bound_falls_to_the_entropy_with_the_steps(steps, expected):
    chain = AbsorbingChain(K + 1, absorbing_mutual_info_betas(steps), M)
    assert exact_d3pm_bound(chain, absorbing_answer) == pytest.approx(expected, abs=1e-9)
    t = torch.arange(1, steps + 1, dtype=F64)
    weights = [
        math.comb(LENGTH, k) * float((1 / t * (t / steps) ** k * (1 - t / steps) ** (LENGTH - k)).sum())
        for k in range(1, LENGTH + 1)
    ]
    by_counts = sum(w * c for w, c in zip(weights, MASKED_NATS, strict=True))
    assert by_counts == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (4, 2.748960832),
        (16, 2.640141267),
        pytest.param(64, 2.612013121, marks=SLOW),
        pytest.param(512, 2.603845067, marks=SLOW),
    ],
)
def test_uniform_bound_falls_to_the_entropy_with_the_steps(steps, expected):
    chain = UniformChain(K, cosine_betas(steps))
    assert exact_d3pm_bound(chain, uniform_answer) == pytest.approx(expected, abs=1e-9)


def test_the_whole_sum_over_steps_is_one_stratified_estimate():
    """As many strata as steps: each step is visited once per replicate, and only the noise is left."""
    steps = 8
    x0, noised = texts(SEQUENCES.repeat(200, 1))
    network = Network(masked_oracle())
    noise = Noise(1, 0, "x", range(len(x0)))
    full = estimate_bound(d3pm(steps), network, x0, noised, None, noise, REPLICATES * steps)
    weights = LAW.repeat(200) / 200
    error = float((weights**2 * full.variance).sum().sqrt())
    assert error < 0.01
    assert float((weights * full.nats).sum()) == pytest.approx(2.664412938, abs=4 * error)


def test_fewer_bound_steps_are_a_looser_bound_of_the_same_chain():
    """Skipping to 4 steps gives the bound of a chain of 4 steps."""
    x0, noised = texts(SEQUENCES.repeat(200, 1))
    process = d3pm(16, nelbo_steps=4)
    bound = estimate_bound(
        process, Network(masked_oracle()), x0, noised, None, Noise(1, 0, "x", range(len(x0))), 16
    )
    weights = LAW.repeat(200) / 200
    error = float((weights**2 * bound.variance).sum().sqrt())
    assert float((weights * bound.nats).sum()) == pytest.approx(2.727641400, abs=4 * error)


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


def test_the_auxiliary_loss_is_not_part_of_the_bound():
    values = [fingerprint("d3pm", auxiliary_loss_weight=w) for w in (0.0, 0.5)]
    assert values[0]["bound"] == values[1]["bound"] and values[0]["loss"] < values[1]["loss"]
    terms = [build("d3pm", auxiliary_loss_weight=w) for w in (0.0, 0.5)]
    nelbo = [float(a(a.prepare(batch([0, 1, 2, 3]), train_context())).terms["nelbo"].sum) for a in terms]
    assert nelbo[0] == pytest.approx(nelbo[1], rel=1e-9)


TRAINED = {
    "absorbing": {},
    "uniform": {"transition_type": "uniform"},
    "absorbing, mixture": {"reverse_param": "mixture"},
    "gaussian": {"transition_type": "gaussian"},
    "nearest_neighbor": {
        "transition_type": "nearest_neighbor",
        "noise_schedule": "cosine",
        "nearest_neighbors": 3,
    },
}


@pytest.mark.parametrize("chain", TRAINED)
def test_the_loss_of_a_chain_keeps_its_digits_where_products_have_eight_bits(chain, tmp_path):
    """Under autocast only the network is narrow: with the same logits, loss, gradient and bound are those of fp64."""
    fields = {"num_timesteps": 1000, "sampling_timesteps": 12, **TRAINED[chain]}
    if chain == "nearest_neighbor":
        np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(V, 4)))
        fields["nn_embedding_path"] = str(tmp_path / "table.npy")

    found = []
    for narrow in (False, True):
        adapter = build("d3pm", **fields)
        adapter.to(torch.float32 if narrow else torch.float64)
        # Logits that eight bits hold exactly: a zero output layer with a bias.
        adapter.model.output.weight.data.zero_()
        adapter.model.output.bias.data = (
            torch.linspace(-1, 1, 9).repeat(2)[: adapter.model.V].to(adapter.model.output.bias)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            prepared = adapter.prepare(batch(range(64)), train_context(64))
            prepared.tensors["rows.weights"] = prepared.tensors["rows.weights"].to(adapter.model.output.bias)
            out = adapter(prepared)
            bound = adapter.likelihood(batch(range(8)), EVAL)
        out.terms["objective"].sum.backward()
        grad = adapter.model.output.bias.grad.double()
        found.append((float(out.terms["objective"].sum.detach()), grad, bound.nats.sum()))
    (loss, grad, nats), (narrow_loss, narrow_grad, narrow_nats) = found
    assert narrow_loss == pytest.approx(loss, rel=1e-3)
    assert float((narrow_grad - grad).norm() / grad.norm()) < 5e-3
    assert float(narrow_nats) == pytest.approx(float(nats), rel=1e-3)


# -- text ------------------------------------------------------------------------------------------------


def composed_law(chain, answer, start):
    """The law over all states after the whole reverse chain, every position moving independently at each step. States
    that the chain cannot be in have no reverse step (0/0) and no mass."""
    states = torch.tensor(list(itertools.product(range(chain.states), repeat=LENGTH)))
    law = start(states)
    for t in range(chain.steps, 0, -1):
        log_p = answer(states, chain.alpha_bar[t].expand(len(states)))
        now = torch.full((len(states),), t)
        moves = [
            log_reverse(chain, log_p[:, i], states[:, i], now - 1, now).exp().nan_to_num()
            for i in range(LENGTH)
        ]
        step = torch.stack([moves[i][:, states[:, i]] for i in range(LENGTH)]).prod(0)  # (from, to)
        law = law @ step
    clean = (states < K).all(1)
    assert float(law[~clean].sum()) < 1e-12
    return law[clean]


def total_variation(law):
    return float((law - LAW).abs().sum() / 2)


def all_masked(states):
    return (states == M).all(1).double()


def noisy_law(chain):
    def law(states):
        own = chain.row(SEQUENCES.flatten(), torch.full((27 * LENGTH,), chain.steps)).view(27, LENGTH, K)
        return LAW @ torch.stack([own[:, i, states[:, i]] for i in range(LENGTH)]).prod(0)

    return law


@pytest.mark.parametrize(
    "steps, absorbing, uniform",
    [
        (16, 0.02942, 0.02651),
        (64, 0.00739, 0.00643),
        pytest.param(512, 0.00092, 0.00080, marks=pytest.mark.slow),
    ],
)
def test_ancestral_sampling_converges_to_the_law(steps, absorbing, uniform):
    chain = AbsorbingChain(K + 1, absorbing_mutual_info_betas(steps), M)
    law = composed_law(chain, lambda x, kept: with_mask(masked_posterior(x)), all_masked)
    assert total_variation(law) == pytest.approx(absorbing, abs=1e-5)
    chain = UniformChain(K, cosine_betas(steps))
    law = composed_law(chain, lambda x, kept: uniform_leave_one_out(x, kept).log(), noisy_law(chain))
    assert total_variation(law) == pytest.approx(uniform, abs=1e-5)


SAMPLERS = {
    "absorbing": lambda: (d3pm(64), masked_oracle()),
    "uniform": lambda: (d3pm(64, **COSINE), uniform_oracle(64)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_law(name):
    assert follows_the_law(*SAMPLERS[name](), MANY)


def test_few_steps_are_seen_to_be_wrong():
    """The test above can fail: sixteen steps are visibly biased in many samples."""
    text, _ = sample(d3pm(16), masked_oracle(), 20_000)
    assert chi_square(histogram(text), LAW) > CHI_SQUARE_LIMIT[26]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["absorbing", "uniform"])
def test_many_samples_follow_the_law(name):
    make = {
        "absorbing": lambda: (d3pm(512), masked_oracle()),
        "uniform": lambda: (d3pm(512, **COSINE), uniform_oracle(512)),
    }[name]
    assert follows_the_law(*make(), 20_000)


@pytest.mark.parametrize("steps", [3, 6])
@pytest.mark.parametrize("name", ["absorbing", "absorbing x0", "uniform", "uniform x0", "uniform mixture"])
def test_reverse_steps_are_the_chains_own_and_the_last_one_by_x0_the_prediction_itself(
    name, steps, monkeypatch
):
    """With 3 of 6 steps each is a skip, and takes the noise of both: 6 -> 4 -> 2 -> 0."""
    seen = drawn_from(monkeypatch)
    process = d3pm(6, **CHAINS[name])
    oracle = of(process)
    *_, _ = process.resolve(Network(oracle), window(80, sampling=Sampling(steps=steps)))
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


# -- every field has an effect ---------------------------------------------------------------------------


LINEAR = {"transition_type": "uniform", "noise_schedule": "linear", "linear_beta_max": 0.9}
FIELDS = [
    ({}, {"noise_schedule": "cosine"}, "loss"),
    ({}, {"num_timesteps": 20}, "loss"),
    ({}, {"auxiliary_loss_weight": 0.5}, "loss"),
    ({}, {"transition_type": "gaussian", "noise_schedule": "linear"}, "loss"),
    (LINEAR, {"linear_beta_min": 0.3}, "loss"),
    (LINEAR, {"linear_beta_max": 0.5}, "loss"),
    ({}, {"sampling_timesteps": 3}, "calls"),
    ({}, {"reverse_param": "mixture"}, "loss"),
    (LINEAR, {"reverse_param": "mixture"}, "loss"),
    (LINEAR, {"reverse_param": "mixture"}, "text"),
    (LINEAR, {"l0_mode": "x0"}, "loss"),
    ({**LINEAR, "sampling_timesteps": 2}, {"l0_mode": "x0"}, "text"),
    ({}, {"zero_mask_logit": True}, "loss"),
    ({}, {"zero_mask_logit": True}, "text"),
    ({}, {"nelbo_steps": 3}, "bound"),
    ({}, {"nelbo_draws": 8}, "bound"),
    ({"sampling_timesteps": 1}, {"final_step": "argmax"}, "text"),
    ({}, {"time_conditioning": False}, "loss"),
]


@pytest.mark.parametrize("base, change, what", FIELDS, ids=lambda v: str(v).replace(" ", "")[:40])
def test_every_field_changes_something(base, change, what):
    assert_changes("d3pm", base, change, what)
