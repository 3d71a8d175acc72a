"""What every process promises: times of a step, and samplers that keep what they know."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from adapters.diffusion.network import Network
from adapters.diffusion.process import Sampling
from tests.adapters.diffusion.processes import (
    COSINE,
    WITHOUT_SUBS,
    Fixed,
    d3pm,
    mdl,
    of,
    sample,
    sedd,
    window,
)
from tests.adapters.diffusion.tiny import batch, build, fingerprint, train_context
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    F64,
    MARGINALS,
    K,
    M,
    chi_square,
    masked_oracle,
    score_oracle,
)


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


SAMPLERS = {
    "mdl, ancestral": lambda: mdl(num_sampling_steps=1),
    "mdl, first hitting": lambda: mdl(sampler="first_hitting"),
    "mdl, analytic": lambda: mdl(sampler="analytic", num_sampling_steps=1),
    "mdl, without subs": lambda: mdl(**WITHOUT_SUBS, num_sampling_steps=1),
    "d3pm": lambda: d3pm(1),
    "d3pm, uniform": lambda: d3pm(1, transition_type="uniform", noise_schedule="linear", l0_mode="x0"),
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


@pytest.mark.parametrize(
    "make",
    [lambda: d3pm(2, **COSINE), lambda: sedd(transition_type="uniform", sampling_timesteps=2)],
    ids=["d3pm", "sedd"],
)
def test_sampling_without_a_mask_starts_from_uniform_tokens(make):
    process = make()
    oracle = of(process, lambda xt, tau: torch.zeros(*xt.shape, K, dtype=F64))
    *_, _ = process.resolve(Network(oracle), window(4000, known={2: 2}))
    first = oracle.tokens[0]
    pairs = torch.bincount(3 * first[:, 1] + first[:, 3], minlength=9).double()
    assert chi_square(pairs, torch.ones(9, dtype=F64)) < CHI_SQUARE_LIMIT[8]
    assert bool((oracle.taus[0] == oracle.taus[0][0]).all())


@pytest.mark.parametrize(
    "make",
    [lambda s: d3pm(64, sampling_timesteps=s), lambda s: sedd(sampling_timesteps=s)],
    ids=["d3pm", "sedd"],
)
def test_sampling_timesteps_are_network_calls(make):
    calls = [sample(make(s), masked_oracle(), 200)[1] for s in (4, 16)]
    assert calls[0] <= 5 and 5 < calls[1] <= 17
    few = sample(make(16), masked_oracle(), 200, sampling=Sampling(steps=2))[1]
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


def test_the_last_step_can_take_the_most_probable_token(monkeypatch):
    """With one step D3PM's last step is all there is; the others leave it something to do if they end early."""
    monkeypatch.setattr("adapters.diffusion.masked.CLEAN_END", 0.9999)
    monkeypatch.setattr("adapters.diffusion.sedd.CLEAN_END", 0.9)
    without_subs = mdl(**WITHOUT_SUBS, num_sampling_steps=1, final_step="argmax")
    for process in (
        mdl(num_sampling_steps=1, final_step="argmax"),
        without_subs,
        d3pm(1, final_step="argmax"),
    ):
        assert bool((sample(process, masked_oracle(), 20)[0] == MARGINALS.argmax(1)).all())
    plain, greedy = (
        sample(sedd(sampling_timesteps=1, final_step=f), score_oracle(sedd()), 2000)[0]
        for f in ("sample", "argmax")
    )
    assert float((greedy[:, 0] == 0).double().mean()) > float((plain[:, 0] == 0).double().mean()) + 0.2


MEANINGLESS = [
    ("sedd", {}, {"predictor": "euler"}),
    ("d3pm", {"zero_mask_logit": True}, {"l0_mode": "x0", "reverse_param": "mixture"}),
    ("mdl", {"sampler": "first_hitting"}, {"final_step": "argmax", "num_sampling_steps": 3}),
    ("mdl", {"sampler": "analytic"}, {"final_step": "argmax"}),
    ("bd3lm", {}, {"final_step": "argmax", "num_sampling_steps": 3}),
    ("bd3lm", {"clip_search": False}, {"resample_masks": False}),
]


@pytest.mark.parametrize("kind, base, change", MEANINGLESS, ids=str)
def test_what_is_said_not_to_be_read_changes_nothing(kind, base, change):
    plain, changed = fingerprint(kind, **base), fingerprint(kind, **base, **change)
    assert set(change) <= set(build(kind, **base).model_cfg.unread())
    assert plain["loss"] == pytest.approx(changed["loss"], rel=1e-9)
    assert plain["bound"] == pytest.approx(changed["bound"], rel=1e-9)
    assert plain["text"] == changed["text"]
