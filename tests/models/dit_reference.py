"""The diffusion transformer once more: loops over rows, positions and heads, from the papers' equations.

Shares no code with `models`: it reads a state dict and takes the sizes as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def condition(weights: Mapping[str, Tensor], tau: float) -> Tensor:
    """c = SiLU(MLP([cos(tau w), sin(tau w)])), w_k = 10000^(-k / 128)."""
    angles = [tau * 10000 ** (-k / 128) for k in range(128)]
    features = torch.tensor(
        [math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64
    )
    hidden = weights["time.inner.weight"] @ features + weights["time.inner.bias"]
    hidden = hidden / (1 + torch.exp(-hidden))
    out = weights["time.outer.weight"] @ hidden + weights["time.outer.bias"]
    return out / (1 + torch.exp(-out))


def norm(x: Tensor, gain: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred**2).mean() + eps) * gain * (1 + scale) + shift


def rotate(x: Tensor, position: int) -> Tensor:
    """Pairs (i, i + h/2) turned by position * 10000^(-2i/h)."""
    half = len(x) // 2
    out = []
    for i in range(half):
        angle = position * 10000 ** (-2 * i / len(x))
        out.append(x[i] * math.cos(angle) - x[i + half] * math.sin(angle))
    for i in range(half):
        angle = position * 10000 ** (-2 * i / len(x))
        out.append(x[i + half] * math.cos(angle) + x[i] * math.sin(angle))
    return torch.stack(out)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def hidden_states(
    weights: Mapping[str, Tensor],
    tokens: list[int],
    tau: list[float],
    allowed: list[list[bool]],
    n_layers: int,
    n_heads: int,
    eps: float,
) -> Tensor:
    """One row: tokens and times of L positions, allowed[i][j] whether i sees j -> (L, D)."""
    length = len(tokens)
    width = weights["embed.weight"].shape[1]
    h = width // n_heads
    x = [weights["embed.weight"][token] for token in tokens]
    c = [condition(weights, t) for t in tau]
    for layer in range(n_layers):
        w = {
            k.removeprefix(f"layers.{layer}."): v
            for k, v in weights.items()
            if k.startswith(f"layers.{layer}.")
        }
        parts = [(w["adaln.weight"] @ ci + w["adaln.bias"]).split(width) for ci in c]
        normed = [norm(x[i], w["norm1.weight"], parts[i][0], parts[i][1], eps) for i in range(length)]
        q, k, v = ([w["attn.qkv.weight"][s * width : (s + 1) * width] @ y for y in normed] for s in range(3))
        for i in range(length):
            heads = []
            for head in range(n_heads):
                part = slice(head * h, (head + 1) * h)
                seen = [j for j in range(length) if allowed[i][j]]
                query = rotate(q[i][part], i)
                scores = torch.stack([query @ rotate(k[j][part], j) / math.sqrt(h) for j in seen])
                shares = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
                heads.append(sum(shares[s] * v[j][part] for s, j in enumerate(seen)))
            x[i] = x[i] + parts[i][2] * (w["attn.out.weight"] @ torch.cat(heads))
        for i in range(length):
            y = norm(x[i], w["norm2.weight"], parts[i][3], parts[i][4], eps)
            y = gelu_tanh(w["mlp.up.weight"] @ y + w["mlp.up.bias"])
            x[i] = x[i] + parts[i][5] * (w["mlp.down.weight"] @ y + w["mlp.down.bias"])
    final = []
    for i in range(length):
        shift, scale = (weights["final_adaln.weight"] @ c[i] + weights["final_adaln.bias"]).split(width)
        final.append(norm(x[i], weights["final_norm.weight"], shift, scale, eps))
    return torch.stack(final)
