"""Windows of text: known positions, and text longer than a window."""

import pytest
import torch

from adapters.diffusion.network import Network
from adapters.diffusion.process import Sampling
from adapters.diffusion.sampling import continue_text, fill
from tests.adapters.diffusion.processes import MANY, d3pm, mdl, sample, sedd
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    F64,
    LAW,
    MARGINALS,
    SEQUENCES,
    K,
    M,
    Oracle,
    chi_square,
    histogram,
    masked_oracle,
    score_oracle,
    uniform_oracle,
)


@pytest.mark.parametrize("known", [{1: 0}, {3: 2}, {2: 1}, {1: 1, 3: 0}])
@pytest.mark.parametrize("name", ["mdl", "d3pm", "sedd"])
def test_filled_gaps_follow_the_conditional_law(known, name):
    process, oracle = {
        "mdl": (mdl(sampler="first_hitting"), masked_oracle()),
        "d3pm": (d3pm(32), masked_oracle()),
        "sedd": (sedd(sampling_timesteps=32), score_oracle(sedd())),
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
    process = mdl(n_ctx=7, sar_chunk_size=4, num_sampling_steps=16)
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
        Sampling(),
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
    pair = fill(process, Network(oracle), [empty, empty], [0, 1], 5, 0, Sampling(), lambda i, t: None)
    alone = fill(process, Network(oracle), [empty], [1], 5, 0, Sampling(), lambda i, t: None)
    assert pair[1] == alone[0]
