"""A language small enough to enumerate, and networks that know it: what every diffusion test is measured against.

Text is three tokens of {0, 1, 2} from a Markov chain. A row is one given token (0, carrying no information) and the
three. An oracle is a backbone whose hidden state IS its answer: the output layer is the identity.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from adapters.diffusion.chains import UniformChain
from adapters.diffusion.schedules import cosine_betas
from data.rows import Batch

F64 = torch.float64
K, LENGTH = 3, 3
M = K  # id of the mask
START = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
STEP = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
SEQUENCES = torch.tensor(list(itertools.product(range(K), repeat=LENGTH)))  # (27, 3)
LAW = START[SEQUENCES[:, 0]] * STEP[SEQUENCES[:, 0], SEQUENCES[:, 1]] * STEP[SEQUENCES[:, 1], SEQUENCES[:, 2]]
ENTROPY = 2.602680516357771
# C_k: expected cross-entropy of k masked tokens given the others, summed over them.
MASKED_NATS = (0.7208928680700827, 1.671289281826932, 3.138429022122666)
NOTHING = -1e4  # the logarithm of "never": exp of it is 0

TOKENIZER = types.SimpleNamespace(eot=0, ends=frozenset({0}), vocab_size=K, name="toy")


def rows(count: int, generator: torch.Generator | None = None) -> Batch:
    """Rows of the law, each behind a given 0."""
    generator = generator or torch.Generator().manual_seed(0)
    drawn = SEQUENCES[torch.multinomial(LAW, count, replacement=True, generator=generator)].numpy()
    tokens = np.concatenate([np.zeros((count, 1), dtype=np.int64), drawn], axis=1)
    ones = np.ones((count, LENGTH), dtype=np.float32)
    return Batch(
        tokens,
        np.zeros_like(tokens, dtype=np.int32),
        ones,
        np.zeros_like(ones),
        np.arange(count),
        count * LENGTH,
    )


def masked_posterior(xt: Tensor) -> Tensor:
    """p(x_i | visible tokens), (B, 3, K), of rows xt (B, 3) with masks; a visible token's own position is left out."""
    return MASKED_POSTERIOR[(xt * torch.tensor([16, 4, 1])).sum(1)]


def _masked_posterior(xt: Tensor) -> Tensor:
    out = []
    for i in range(LENGTH):
        fits = torch.ones(len(xt), len(SEQUENCES), dtype=torch.bool)
        for j in range(LENGTH):
            if j != i:
                fits &= (xt[:, j, None] == M) | (xt[:, j, None] == SEQUENCES[None, :, j])
        weights = fits * LAW
        marginal = torch.stack([(weights * (SEQUENCES[:, i] == v)).sum(1) for v in range(K)], 1)
        out.append(marginal / marginal.sum(1, keepdim=True))
    return torch.stack(out, 1)


MASKED_POSTERIOR = _masked_posterior(torch.tensor(list(itertools.product(range(K + 1), repeat=LENGTH))))


def once_per_state(law: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`law(xt (B, 3), kept (B,))` computed for each noisy text and survival probability once, however many rows share
    them: there are 27 texts, and all rows of a sampler are at one time."""

    def found(xt: Tensor, kept: Tensor) -> Tensor:
        levels, level = kept.unique(return_inverse=True)
        if len(SEQUENCES) * len(levels) >= len(xt):
            return law(xt, kept)
        known = law(SEQUENCES.repeat(len(levels), 1), levels.repeat_interleave(len(SEQUENCES)))
        return known[len(SEQUENCES) * level + text_index(xt)]

    return found


def noisy_likelihood(xt: Tensor, kept: Tensor) -> Tensor:
    """q(x_t^j | sequence), (B, 3, 27), of the uniform chain with survival probability `kept` (B,)."""
    same = xt[:, :, None] == SEQUENCES.T[None]  # (B, 3, 27)
    kept = kept.double()[:, None, None]
    return kept * same + (1 - kept) / K


@once_per_state
def uniform_leave_one_out(xt: Tensor, kept: Tensor) -> Tensor:
    """p(x0_i | x_t at all other positions), (B, 3, K), under uniform noise."""
    q = noisy_likelihood(xt, kept)
    out = []
    for i in range(LENGTH):
        others = [j for j in range(LENGTH) if j != i]
        weights = LAW * q[:, others].prod(1)  # (B, 27)
        marginal = torch.stack([(weights * (SEQUENCES[:, i] == v)).sum(1) for v in range(K)], 1)
        out.append(marginal / marginal.sum(1, keepdim=True))
    return torch.stack(out, 1)


@once_per_state
def uniform_ratios(xt: Tensor, kept: Tensor) -> Tensor:
    """p_t(x with y at i) / p_t(x), (B, 3, K)."""
    q = noisy_likelihood(xt, kept)
    total = (LAW * q.prod(1)).sum(1)  # (B,)
    out = []
    for i in range(LENGTH):
        others = [j for j in range(LENGTH) if j != i]
        rest = LAW * q[:, others].prod(1)  # (B, 27)
        swapped = []
        for y in range(K):
            at_y = noisy_likelihood(torch.full((len(xt), LENGTH), y), kept)[:, i]
            swapped.append((rest * at_y).sum(1) / total)
        out.append(torch.stack(swapped, 1))
    return torch.stack(out, 1)


class Oracle(nn.Module):
    """`answer(xt (B, 3), tau (B,)) -> (B, 3, V)` becomes the logits. Counts calls in `calls`."""

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor], mask_id: int | None) -> None:
        super().__init__()
        self.answer, self.mask_id = answer, mask_id
        self.n, self.V = K, K + (mask_id is not None)
        self.head_weight = nn.Parameter(torch.eye(self.V, dtype=torch.float64))
        self.head_bias = nn.Parameter(torch.zeros(self.V, dtype=torch.float64))
        self.calls = 0

    def forward(self, tokens: Tensor, tau: Tensor, doc_ids: Tensor | None = None, **_: object) -> Tensor:
        self.calls += 1
        logits = self.answer(tokens[:, 1:], tau)
        return torch.cat([torch.zeros(len(tokens), 1, self.V, dtype=torch.float64), logits], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def with_mask(p: Tensor, log_of_mask: float = NOTHING) -> Tensor:
    """Log-probabilities (..., K) -> logits (..., K + 1)."""
    return torch.cat([p.clamp_min(1e-300).log(), p.new_full((*p.shape[:-1], 1), log_of_mask)], -1)


def masked_oracle() -> Oracle:
    return Oracle(lambda xt, tau: with_mask(masked_posterior(xt)), K)


def text_index(text: Tensor) -> Tensor:
    """(B,) places of rows (B, 3) without masks in SEQUENCES."""
    return (text * torch.tensor([9, 3, 1])).sum(1)


def histogram(text: Tensor) -> Tensor:
    """Counts (27,) of rows (B, 3)."""
    return torch.bincount(text_index(text), minlength=27).double()


def chi_square(counts: Tensor, law: Tensor) -> float:
    expected = law / law.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


# The 1 - 1e-4 quantile of chi-square by degrees of freedom.
CHI_SQUARE_LIMIT = {2: 18.42, 8: 31.83, 26: 61.66}
MARGINALS = torch.stack(
    [torch.stack([LAW[SEQUENCES[:, i] == v].sum() for v in range(K)]) for i in range(LENGTH)]
)
INDEPENDENT = torch.stack([MARGINALS[i, SEQUENCES[:, i]] for i in range(LENGTH)]).prod(0)


def block_oracle(size):
    """Masked posterior given clean tokens of earlier blocks and the visible ones of the own block."""

    class BlockOracle(Oracle):
        def read(self, clean, doc_ids, blocks):
            return clean

        def forward(self, tokens, tau, doc_ids=None, clean=None, blocks=None):
            out = torch.zeros(*tokens.shape, self.V, dtype=F64)
            assert blocks[0] == blocks[1]  # the given token is of the first block
            for block in blocks.unique().tolist():
                here, before = (blocks == block)[1:], (blocks < block)[1:]
                seen = torch.where(here, tokens[:, 1:], torch.where(before, clean[:, 1:], M))
                out[:, 1:][:, here] = with_mask(masked_posterior(seen))[:, here]
            return out

    return BlockOracle(lambda xt, tau: xt, M)


def score_oracle(process):
    """The true ratios, as the network of `process` would put them out."""
    if process.mask_id is not None:
        return Oracle(lambda xt, tau: with_mask(masked_posterior(xt)) + math.log(K), M)
    return Oracle(lambda xt, tau: uniform_ratios(xt, torch.exp(-tau.double())).log(), None)


def uniform_oracle(steps):
    chain = UniformChain(K, cosine_betas(steps))

    def answer(xt, tau):
        t = (tau.double() * steps / 1000).round().long()
        return uniform_leave_one_out(xt, chain.alpha_bar[t]).log()

    return Oracle(answer, None)


def gauss_legendre(low, high, nodes):
    x, w = np.polynomial.legendre.leggauss(nodes)
    return (x + 1) / 2 * (high - low) + low, w * (high - low) / 2
