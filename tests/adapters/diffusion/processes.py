"""Processes of the toy language without an adapter, networks that keep their calls, and ways to run them."""

import itertools
import math

import numpy as np
import torch
from torch.nn import functional as F

from adapters.diffusion import reverse
from adapters.diffusion.bd3lm import BD3LMProcess
from adapters.diffusion.d3pm import D3PMProcess
from adapters.diffusion.mdl import MDLProcess
from adapters.diffusion.network import Network
from adapters.diffusion.process import Draw, Sampling, Window
from adapters.diffusion.sedd import SEDDProcess
from adapters.randomness import Noise
from models.bd3lm import BD3LMConfig
from models.d3pm import D3PMConfig
from models.mdl import MDLConfig
from models.sedd import SEDDConfig
from tests.adapters.diffusion.toy import (
    CHI_SQUARE_LIMIT,
    F64,
    LAW,
    LENGTH,
    SEQUENCES,
    K,
    M,
    Oracle,
    chi_square,
    histogram,
)

COSINE = {"transition_type": "uniform", "noise_schedule": "cosine"}
WITHOUT_SUBS = {"use_subs_parameterization": False, "continuous_time": False, "sampler": "ancestral"}


def mdl(**fields):
    return MDLProcess(MDLConfig(**{"vocab_size": K, "n_ctx": LENGTH, **fields}), K, K + 1, M)


def sedd(**fields):
    cfg = SEDDConfig(**{"vocab_size": K, "n_ctx": LENGTH, **fields})
    return SEDDProcess(cfg, K, K + cfg.has_mask, M if cfg.has_mask else None)


def d3pm(steps, **fields):
    cfg = D3PMConfig(**{"vocab_size": K, "num_timesteps": steps, "sampling_timesteps": steps, **fields})
    return D3PMProcess(cfg, K, K + cfg.has_mask, M if cfg.has_mask else None, torch.full((K,), 1 / K))


def bd3lm(size, **fields):
    cfg = BD3LMConfig(**{"vocab_size": K, "n_ctx": LENGTH, "block_length": size, **fields})
    return BD3LMProcess(cfg, K, K + 1, M)


def texts(sequences):
    """Rows (B, 4) with the given token, and what is scored."""
    x0 = F.pad(sequences, (1, 0))
    noised = torch.ones_like(x0, dtype=torch.bool)
    noised[:, 0] = False
    return x0, noised


def toy_texts(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noised = texts(SEQUENCES[torch.multinomial(LAW, count, True, generator=g)])
    return x0, noised, torch.rand(count, LENGTH + 1, dtype=F64, generator=g)


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


class Fixed:
    """Noise whose every number is `u`."""

    def __init__(self, rows, u):
        self.rows, self.u = rows, u

    def uniform(self, stream, count):
        return torch.full((self.rows, count), self.u, dtype=F64)


MANY = 4000  # samples, to count


def window(count, seed=0, known=None, sampling=None):
    """`count` rows with everything unknown but the given token and `known` {position: token}."""
    x, unknown = (
        torch.zeros(count, LENGTH + 1, dtype=torch.int64),
        torch.ones(count, LENGTH + 1, dtype=torch.bool),
    )
    unknown[:, 0] = False
    for position, token in (known or {}).items():
        x[:, position], unknown[:, position] = token, False
    return Window(x, unknown, Noise(seed, 0, "sample", np.arange(count)), sampling or Sampling())


def sample(process, oracle, count, **options):
    network = Network(oracle)
    *_, last = process.resolve(network, window(count, **options))
    return last[:, 1:], network.calls


def follows_the_law(process, oracle, count):
    """Whether `count` samples are distributed like the language."""
    text, _ = sample(process, oracle, count)
    counts = histogram(text)
    assert counts.sum() == count and text.max() < K
    return chi_square(counts, LAW) < CHI_SQUARE_LIMIT[26]


def plan_of(process, module, monkeypatch):
    """The steps that a score sampler would take: (sigma, step, amount)."""
    monkeypatch.setattr(
        f"adapters.diffusion.{module}.reveal_by_scores",
        lambda process, model, network, window, plan, *last: plan,
    )
    return process.resolve(Network(of(process)), window(1))


LOGLINEAR = (lambda t: -math.log1p(-0.9 * t), lambda t: 0.9 / (1 - 0.9 * t))
GEOMETRIC = (lambda t: 0.02 ** (1 - t) * 3.0**t, lambda t: 0.02 ** (1 - t) * 3.0**t * math.log(150.0))


def drawn_from(monkeypatch):
    """Collects the probabilities (M, V), normalised, that D3PM's reverse step draws from."""
    seen, draw = [], reverse.draw

    def spy(p, u):
        seen.append(p / p.sum(1, keepdim=True))
        return draw(p, u)

    monkeypatch.setattr(reverse, "draw", spy)
    return seen


# -- parts of a bound ------------------------------------------------------------------------------------


ROUGH = 0.3  # of the way is left out at the clean end, and of the text survives at the other one


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
