"""Samplers with perfect networks: the laws of what they write, by composing steps or by counting."""

import itertools

import numpy as np
import pytest
import torch

from adapters.diffusion.chains import AbsorbingChain, UniformChain
from adapters.diffusion.mdl import MDLAdapter
from adapters.diffusion.network import Network
from adapters.diffusion.process import Choice, Window
from adapters.diffusion.reverse import log_reverse
from adapters.diffusion.sampling import continue_text, fill
from adapters.diffusion.schedules import absorbing_mutual_info_betas, cosine_betas
from adapters.diffusion.scores import AbsorbingGraph, UniformGraph
from adapters.randomness import Noise
from models.mdl import MDLConfig
from tests.adapters.diffusion.test_bounds import d3pm, mdl, score_oracle, sedd
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    LAW,
    LENGTH,
    SEQUENCES,
    TOKENIZER,
    K,
    Oracle,
    chi_square,
    histogram,
    masked_oracle,
    masked_posterior,
    uniform_leave_one_out,
    uniform_ratios,
    with_mask,
)

F64 = torch.float64
M = K
MARGINALS = torch.stack(
    [torch.stack([LAW[SEQUENCES[:, i] == v].sum() for v in range(K)]) for i in range(LENGTH)]
)
INDEPENDENT = torch.stack([MARGINALS[i, SEQUENCES[:, i]] for i in range(LENGTH)]).prod(0)


def window(count, seed=0, known=None, choice=None):
    """`count` rows with everything unknown but the given token and `known` {position: token}."""
    x, unknown = (
        torch.zeros(count, LENGTH + 1, dtype=torch.int64),
        torch.ones(count, LENGTH + 1, dtype=torch.bool),
    )
    unknown[:, 0] = False
    for position, token in (known or {}).items():
        x[:, position], unknown[:, position] = token, False
    return Window(x, unknown, Noise(seed, 0, "sample", np.arange(count)), choice or Choice())


def sample(process, oracle, count, **options):
    network = Network(oracle)
    *_, last = process.resolve(network, window(count, **options))
    return last[:, 1:], network.calls


# -- laws by composing transition matrices -------------------------------------------------------------


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
    "steps, absorbing, uniform", [(16, 0.02942, 0.02651), (64, 0.00739, 0.00643), (512, 0.00092, 0.00080)]
)
def test_ancestral_sampling_converges_to_the_law(steps, absorbing, uniform):
    chain = AbsorbingChain(K + 1, absorbing_mutual_info_betas(steps), M)
    law = composed_law(chain, lambda x, kept: with_mask(masked_posterior(x)), all_masked)
    assert total_variation(law) == pytest.approx(absorbing, abs=1e-5)
    chain = UniformChain(K, cosine_betas(steps))
    law = composed_law(chain, lambda x, kept: uniform_leave_one_out(x, kept).log(), noisy_law(chain))
    assert total_variation(law) == pytest.approx(uniform, abs=1e-5)


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_analytic_step_is_exact_for_one_token_in_any_number_of_steps(graph, steps):
    """Composed over the states of one token, from the true p_T; Euler's step is not exact, and converges like 1/S."""
    p0 = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
    process = sedd(transition_type=graph, noise_schedule="geometric", sigma_min=0.2, sigma_max=3.0)
    euler_error = [one_token_error(process, p0, s, "euler") for s in (steps, 8 * steps)]
    assert one_token_error(process, p0, steps, "analytic") < 1e-9
    assert euler_error[0] > 1e-3 and (steps < 7 or euler_error[1] < euler_error[0] / 4)


def one_token_error(process, p0, steps, predictor):
    graph: AbsorbingGraph | UniformGraph = process.graph
    states = process.V
    times = torch.linspace(1, 0.05, steps + 1, dtype=F64)

    def law_at(t):
        kept = process.schedule.alpha(t)
        if process.mask_id is None:
            return kept * p0 + (1 - kept) / K
        return torch.cat([kept * p0, (1 - kept)[None]])

    law = law_at(times[0])
    for t, s in itertools.pairwise(times):
        p = law_at(t)
        now = torch.arange(states)
        log_s = (p[None, :] / p[:, None]).log()  # [x, y] = p(y)/p(x)
        delta = float(process.schedule.sigma(t) - process.schedule.sigma(s))
        amount = float((t - s) * process.schedule.rate(t))
        step = (
            graph.analytic(log_s, now, delta) if predictor == "analytic" else graph.euler(log_s, now, amount)
        )
        step = step / step.sum(1, keepdim=True)
        if process.mask_id is not None:  # only the mask moves
            step = torch.cat([torch.eye(states, dtype=F64)[:-1], step[-1:]])
        assert step.min() >= 0
        law = law @ step
    return float((law - law_at(times[-1])).abs().sum())


# -- laws by counting ----------------------------------------------------------------------------------

MANY = 4000


@pytest.mark.parametrize(
    "name, make",
    [
        ("first hitting", lambda: (mdl(sampler="first_hitting"), masked_oracle())),
        ("ancestral", lambda: (mdl(num_sampling_steps=128), masked_oracle())),
        ("analytic", lambda: (mdl(num_sampling_steps=128, sampler="analytic"), masked_oracle())),
        ("cosine", lambda: (mdl(num_sampling_steps=128, alpha_type="cosine"), masked_oracle())),
        (
            "without subs",
            lambda: (
                mdl(
                    num_sampling_steps=128,
                    use_subs_parameterization=False,
                    continuous_time=False,
                    sampler="ancestral",
                ),
                masked_oracle(),
            ),
        ),
        ("d3pm absorbing", lambda: (d3pm(128), masked_oracle())),
        (
            "d3pm uniform",
            lambda: (d3pm(128, transition_type="uniform", noise_schedule="cosine"), uniform_oracle(128)),
        ),
        ("sedd", lambda: (sedd(sampling_timesteps=128), score_oracle(sedd()))),
        ("sedd euler", lambda: (sedd(sampling_timesteps=256, predictor="euler"), score_oracle(sedd()))),
        (
            "sedd uniform",
            lambda: (
                sedd(transition_type="uniform", sampling_timesteps=128),
                score_oracle(sedd(transition_type="uniform")),
            ),
        ),
    ],
)
def test_samples_follow_the_law(name, make):
    text, _ = sample(*make(), MANY)
    counts = histogram(text)
    assert counts.sum() == MANY and text.max() < K
    assert chi_square(counts, LAW) < CHI_SQUARE_LIMIT[26]


def uniform_oracle(steps):
    chain = UniformChain(K, cosine_betas(steps))

    def answer(xt, tau):
        t = (tau.double() * steps / 1000).round().long()
        return uniform_leave_one_out(xt, chain.alpha_bar[t]).log()

    return Oracle(answer, None)


def test_few_steps_are_seen_to_be_wrong():
    """The test above can fail: one step draws positions independently, sixteen are visibly biased in many samples."""
    text, calls = sample(mdl(num_sampling_steps=1), masked_oracle(), MANY)
    assert calls == 1
    assert chi_square(histogram(text), INDEPENDENT) < CHI_SQUARE_LIMIT[26]
    assert chi_square(histogram(text), LAW) > 5 * CHI_SQUARE_LIMIT[26]
    text, _ = sample(d3pm(16), masked_oracle(), 20_000)
    assert chi_square(histogram(text), LAW) > CHI_SQUARE_LIMIT[26]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdl", "d3pm", "uniform"])
def test_many_samples_follow_the_law(name):
    make = {
        "mdl": lambda: (mdl(num_sampling_steps=512), masked_oracle()),
        "d3pm": lambda: (d3pm(512), masked_oracle()),
        "uniform": lambda: (
            d3pm(512, transition_type="uniform", noise_schedule="cosine"),
            uniform_oracle(512),
        ),
    }[name]
    text, _ = sample(*make(), 20_000)
    assert chi_square(histogram(text), LAW) < CHI_SQUARE_LIMIT[26]


@pytest.mark.parametrize("known", [{1: 0}, {3: 2}, {2: 1}, {1: 1, 3: 0}])
@pytest.mark.parametrize("name", ["mdl", "d3pm", "sedd"])
def test_filled_gaps_follow_the_conditional_law(known, name):
    process, oracle = {
        "mdl": (mdl(sampler="first_hitting"), masked_oracle()),
        "d3pm": (d3pm(64), masked_oracle()),
        "sedd": (sedd(sampling_timesteps=64), score_oracle(sedd())),
    }[name]
    text, _ = sample(process, oracle, MANY, known=known)
    fits = torch.stack([SEQUENCES[:, p - 1] == v for p, v in known.items()]).all(0)
    for position, token in known.items():
        assert bool((text[:, position - 1] == token).all())
    counts = histogram(text)
    assert counts[~fits].sum() == 0
    assert chi_square(counts[fits], LAW[fits]) < CHI_SQUARE_LIMIT[int(fits.sum()) - 1]


@pytest.mark.parametrize("graph", ["d3pm", "sedd"])
def test_known_tokens_survive_on_graphs_without_a_mask(graph):
    process, oracle = {
        "d3pm": (d3pm(32, transition_type="uniform", noise_schedule="cosine"), uniform_oracle(32)),
        "sedd": (
            sedd(transition_type="uniform", sampling_timesteps=32),
            score_oracle(sedd(transition_type="uniform")),
        ),
    }[graph]
    text, _ = sample(process, oracle, 2000, known={2: 2})
    assert bool((text[:, 1] == 2).all())
    # The first token's conditional law, approximately: both schemes condition on noisy text.
    share = float((text[:, 0] == 2).double().mean())
    truth = float(
        LAW[(SEQUENCES[:, 1] == 2) & (SEQUENCES[:, 0] == 2)].sum() / LAW[SEQUENCES[:, 1] == 2].sum()
    )
    assert share == pytest.approx(truth, abs=0.25)
    assert share > MARGINALS[0, 2] + 0.05


# -- calls ---------------------------------------------------------------------------------------------


def test_the_cache_saves_calls_and_changes_nothing():
    steps, runs = 20, 100
    calls = []
    for seed in range(runs):
        lazy, fewer = sample(mdl(num_sampling_steps=steps), masked_oracle(), 1, seed=seed)
        full, all_calls = sample(
            mdl(num_sampling_steps=steps, sampler="ancestral"), masked_oracle(), 1, seed=seed
        )
        assert torch.equal(lazy, full)
        assert fewer <= min(all_calls, LENGTH)
        calls.append(fewer)
    calls = torch.tensor(calls, dtype=F64)
    expected = steps * (1 - (1 - 1 / steps) ** LENGTH)
    assert float(calls.mean()) == pytest.approx(expected, abs=3 * float(calls.std()) / runs**0.5)


def test_first_hitting_takes_one_call_per_position():
    assert sample(mdl(sampler="first_hitting"), masked_oracle(), 50)[1] == LENGTH


@pytest.mark.parametrize(
    "make", [lambda s: d3pm(64, sampling_timesteps=s), lambda s: sedd(sampling_timesteps=s)]
)
def test_sampling_timesteps_are_network_calls(make):
    calls = [sample(make(s), masked_oracle(), 200)[1] for s in (4, 16)]
    assert calls[0] <= 5 and 5 < calls[1] <= 17
    few = sample(make(16), masked_oracle(), 200, choice=Choice(steps=2))[1]
    assert few <= 3


def test_a_revealed_token_never_changes():
    for process, oracle in (
        (mdl(num_sampling_steps=16), masked_oracle()),
        (d3pm(16), masked_oracle()),
        (sedd(sampling_timesteps=16), score_oracle(sedd())),
    ):
        states = list(process.resolve(Network(oracle), window(100)))
        for before, after in itertools.pairwise(states):
            assert bool((before == after)[before != M].all())
        assert not bool((states[-1] == M).any())


# -- choices -------------------------------------------------------------------------------------------


def test_temperature_and_nucleus_act_on_the_prediction():
    log_p = torch.tensor([[0.5, 0.3, 0.2]], dtype=F64).log()
    cold = Choice(temperature=0.5)(log_p).exp()
    assert torch.allclose(cold, torch.tensor([[25.0, 9.0, 4.0]], dtype=F64) / 38)
    assert torch.allclose(Choice(top_p=0.6)(log_p).exp(), torch.tensor([[0.625, 0.375, 0.0]], dtype=F64))
    assert torch.allclose(Choice(top_k=1)(log_p).exp(), torch.tensor([[1.0, 0, 0]], dtype=F64))
    assert Choice(temperature=0)(log_p).exp().tolist() == [[1, 0, 0]]
    assert torch.equal(Choice()(log_p), log_p.log_softmax(1))


def test_greedy_text_is_the_same_for_every_seed_and_confidence_is_not_the_law():
    text, _ = sample(mdl(sampler="first_hitting"), masked_oracle(), 50, choice=Choice(temperature=0))
    assert bool((text == 0).all())
    text, calls = sample(mdl(), masked_oracle(), MANY, choice=Choice(by_confidence=True, steps=3))
    assert calls == 3
    assert chi_square(histogram(text), LAW) > 3 * CHI_SQUARE_LIMIT[26]


def test_the_last_step_can_take_the_most_probable_token(monkeypatch):
    """With one step the last step is all there is."""
    for process in (mdl(num_sampling_steps=1, final_step="argmax"), d3pm(1, final_step="argmax")):
        assert bool((sample(process, masked_oracle(), 20)[0] == MARGINALS.argmax(1)).all())
    monkeypatch.setattr("adapters.diffusion.sedd.CLEAN_END", 0.9)  # leave the final denoising something to do
    plain, greedy = (
        sample(sedd(sampling_timesteps=1, final_step=f), score_oracle(sedd()), 2000)[0]
        for f in ("sample", "argmax")
    )
    assert float((greedy[:, 0] == 0).double().mean()) > float((plain[:, 0] == 0).double().mean()) + 0.2


# -- longer text ---------------------------------------------------------------------------------------


def chain_oracle(length):
    """p(x_i | nearest visible token to the left) of a deterministic cycle 0 -> 1 -> 2 -> 0."""

    def answer(xt, tau):
        out = torch.full((*xt.shape, K + 1), -1e4, dtype=F64)
        last = torch.zeros(len(xt), dtype=torch.int64)
        for i in range(xt.shape[1]):
            last = torch.where(xt[:, i] == M, (last + 1) % K, xt[:, i])
            out[torch.arange(len(xt)), i, last] = 0.0
        return out

    class Cycle(Oracle):
        def forward(self, tokens, tau, doc_ids=None, **_):
            logits = answer(tokens, tau)
            return logits

    return Cycle(answer, M)


def test_long_text_goes_on_from_its_own_end():
    """Windows of 8, chunks of 4: every chunk continues the prefix it is conditioned on, which never changes."""
    process = mdl(n_ctx=7, sar_chunk_size=4)
    shown = []
    out = continue_text(
        process,
        Network(chain_oracle(8)),
        [[0], [2]],
        [0, 1],
        23,
        8,
        process.chunk,
        0,
        Choice(),
        lambda i, t: shown.append((i, t)),
    )
    assert out[0] == [i % 3 for i in range(24)] and out[1] == [(i + 2) % 3 for i in range(24)]
    final = {0: [], 1: []}
    for i, tokens in shown:
        decided = [t for t in tokens if t is not None]
        assert decided == out[i][: len(tokens)] or None in tokens
        final[i] = tokens
    assert final[0] == out[0] and final[1] == out[1]


def test_rows_do_not_depend_on_their_neighbours():
    process, oracle = mdl(num_sampling_steps=16), masked_oracle()
    empty = [0, None, None, None]
    pair = fill(process, Network(oracle), [empty, empty], [0, 1], 5, 0, Choice(), lambda i, t: None)
    alone = fill(process, Network(oracle), [empty], [1], 5, 0, Choice(), lambda i, t: None)
    assert pair[1] == alone[0]


def test_ratios_of_the_oracle_are_ratios():
    """The toy's own arithmetic: ratios times p_t sum to the marginal law of the other positions."""
    xt, kept = SEQUENCES, torch.full((27,), 0.6, dtype=F64)
    ratios = uniform_ratios(xt, kept)
    assert torch.allclose(ratios.gather(2, xt.unsqueeze(2)).squeeze(2), torch.ones(27, 3, dtype=F64))
    law = torch.stack([(LAW * (0.6 * (x == SEQUENCES).double() + 0.4 / K).prod(1)).sum() for x in SEQUENCES])
    assert torch.allclose((law[:, None] * ratios.sum(2))[:, 0].view(3, 9).sum(0) / 3, law.view(3, 9).sum(0))


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
