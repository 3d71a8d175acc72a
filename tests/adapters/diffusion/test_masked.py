"""Samplers that reveal masked positions, and the tail of a binomial law."""

import itertools
import math

import numpy as np
import pytest
import torch

from adapters.base import GenerateOptions
from adapters.diffusion import masked
from adapters.diffusion.network import Network
from adapters.diffusion.process import Sampling, Window
from adapters.randomness import Noise
from tests.adapters.diffusion.processes import MANY, mdl, of, sample, window
from tests.adapters.diffusion.tiny import build
from tests.adapters.diffusion.toy import F64, LENGTH, K, M, masked_oracle, masked_posterior


def test_binomial_tail_against_the_sum():
    n = torch.tensor([0.0, 1.0, 5.0, 7.0], dtype=F64)
    for k in (0.0, 1.0, 3.0, 7.0):
        expected = [
            sum(math.comb(int(c), j) * 0.3**j * 0.7 ** (int(c) - j) for j in range(int(k), int(c) + 1))
            for c in n
        ]
        got = masked.binomial_tail(n, 0.3, torch.full((4,), k, dtype=F64))
        assert torch.allclose(got, torch.tensor(expected, dtype=F64), atol=1e-12)
    nearly = masked.binomial_tail(n, 1 - math.exp(-20), torch.full((4,), 1.0, dtype=F64))
    assert torch.allclose(nearly, torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=F64), atol=1e-8)


def reveals(process, count, seed=0):
    """Text, network calls, and how often something appeared in each row (count,)."""
    network = Network(masked_oracle())
    noisy = torch.full((count, LENGTH), M)
    steps = torch.zeros(count)
    for x in process.resolve(network, window(count, seed=seed)):
        steps += (x[:, 1:] != noisy).any(1)
        noisy = x[:, 1:]
    return noisy, network.calls, steps


def test_the_cache_saves_calls_and_changes_nothing():
    """A row that is alone costs a call for each step at which something appears, on average S (1 - (1 - 1/S)^L)."""
    steps = 20
    lazy, all_steps = (mdl(num_sampling_steps=steps, sampler=s) for s in ("ancestral_cache", "ancestral"))
    for seed in range(12):
        text, fewer, own = reveals(lazy, 1, seed)
        same, calls, _ = reveals(all_steps, 1, seed)
        assert torch.equal(text, same)
        assert fewer == own and fewer <= min(calls, LENGTH)
    own = reveals(all_steps, MANY)[2]
    expected = steps * (1 - (1 - 1 / steps) ** LENGTH)
    assert float(own.mean()) == pytest.approx(expected, abs=4 * float(own.std()) / MANY**0.5)


def test_first_hitting_takes_one_call_per_position():
    assert sample(mdl(sampler="first_hitting"), masked_oracle(), 50)[1] == LENGTH


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


class OneNumber:
    """Noise whose every number is 5e-6: below the share of 1e-5 / 0.5 that stays masked in the second of two steps, and
    a draw of the first token."""

    def __init__(self, seed, step, purpose, rows):
        self.rows = rows

    def uniform(self, stream, count):
        return torch.full((len(self.rows), count), 5e-6, dtype=F64)

    def child(self, stream):
        return self


@pytest.mark.parametrize("kind", ["mdl", "bd3lm"])
def test_the_likeliest_token_is_for_what_is_masked_at_the_end_of_the_grid(kind, monkeypatch):
    """As released, that is at 1e-5, and nothing else of the way there: whatever is drawn is drawn."""
    monkeypatch.setattr("adapters.diffusion.sampling.Noise", OneNumber)
    found = {}
    for final_step in ("sample", "argmax"):
        fields = {"sampler": "ancestral", "num_sampling_steps": 2, "final_step": final_step}
        states = []
        adapter = build(kind, **fields)
        adapter.model.head_bias.data[7] = 5.0
        adapter.infill(
            [[1, None, 3]], GenerateOptions(), on_state=lambda row, text, to=states: to.append(text[1])
        )
        found[final_step] = states
    assert found == {"sample": [None, 0], "argmax": [None, None, 7]}


def test_first_hitting_draws_every_token():
    """The last one of a row too: rows with three and with two gaps."""
    count = 400
    whole = window(count)
    x, unknown = whole.x.clone(), whole.unknown.clone()
    x[::2, 2], unknown[::2, 2] = 1, False
    noisy = Window(x, unknown, Noise(0, 0, "sample", np.arange(count)), Sampling())
    states, greedy = (
        list(mdl(sampler="first_hitting", final_step=f).resolve(Network(masked_oracle()), noisy))
        for f in ("sample", "argmax")
    )
    assert all(torch.equal(a, b) for a, b in zip(states, greedy, strict=True))
    likeliest = []
    for before, after in itertools.pairwise([x.masked_fill(unknown, M), *states]):
        row, place = (before != after).nonzero().unbind(1)
        ends = (before == M).sum(1)[row] == 1
        likeliest.append(
            (masked_posterior(before[:, 1:]).argmax(2)[row, place - 1] == after[row, place])[ends]
        )
    likeliest = torch.cat(likeliest)
    assert len(likeliest) == count and float(likeliest.double().mean()) < 0.8


@pytest.mark.parametrize(
    "more", [{"by_confidence": True, "steps": 3}, {}], ids=["confidence", "first hitting"]
)
def test_rows_with_different_gaps_do_not_disturb_each_other(more):
    adapter = build("mdl", sampler="first_hitting")
    texts = [[1, None, 3, 4, 5, 6], [None] * 6]
    for seed in range(8):
        options = GenerateOptions(seed=seed, **more)
        together = adapter.infill(texts, options).tokens
        assert together[0] == adapter.infill(texts[:1], options).tokens[0]
