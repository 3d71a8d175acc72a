"""Mamba of both versions, written from the equations of the papers: a loop over tokens, in fp64, slow and obvious.

Gu and Dao 2023 (arXiv:2312.00752), algorithm 2 and figure 3; Dao and Gu 2024 (arXiv:2405.21060), section 7.1. Weights
are read by name from `w`, of one row of tokens and one document.
"""

import math

import numpy as np


def softplus(v):
    return np.where(v > 20, v, np.log1p(np.exp(np.minimum(v, 20.0))))


def silu(v):
    return v / (1 + np.exp(-v))


def rms_norm(x, gain, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def convolution(x, weight, bias):
    """x (T, C); every channel by itself: sum over j of w[c, j] x[t - k + 1 + j], what is before the first token being
    0."""
    taps, y = weight.shape[-1], np.zeros_like(x)
    for t in range(len(x)):
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                y[t] += weight[:, 0, j] * x[t - taps + 1 + j]
    return silu(y + (0 if bias is None else bias))


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def selective(x, w, states):
    """(T, D) -> (T, D)"""
    inner = w["A_log"].shape[0]
    u, z = np.split(linear(x, w, "in_proj"), 2, axis=-1)
    u = convolution(u, w["conv1d.weight"], w.get("conv1d.bias"))
    low, into, out = np.split(u @ w["x_proj.weight"].T, [-2 * states, -states], axis=-1)
    delta = softplus(linear(low, w, "dt_proj"))
    rates, h, y = -np.exp(w["A_log"]), np.zeros((inner, states)), np.zeros_like(u)
    for t in range(len(x)):
        h = np.exp(delta[t][:, None] * rates) * h + (delta[t] * u[t])[:, None] * into[t]
        y[t] = h @ out[t] + w["D"] * u[t]
    return linear(y * silu(z), w, "out_proj")


def dual(x, w, states, groups, eps):
    """(T, D) -> (T, D)"""
    heads, inner = len(w["A_log"]), w["out_proj.weight"].shape[1]
    width, of_states = inner // heads, groups * states
    z, mixed, dt = np.split(linear(x, w, "in_proj"), [inner, 2 * inner + 2 * of_states], axis=-1)
    mixed = convolution(mixed, w["conv1d.weight"], w.get("conv1d.bias"))
    values, into, out = np.split(mixed, [inner, inner + of_states], axis=-1)
    delta, y = softplus(dt + w["dt_bias"]), np.zeros_like(values)
    for head in range(heads):
        here = slice(head * width, (head + 1) * width)
        group = head // (heads // groups)
        of_group = slice(group * states, (group + 1) * states)
        h = np.zeros((width, states))
        for t in range(len(x)):
            h = math.exp(-delta[t, head] * math.exp(w["A_log"][head])) * h
            h += delta[t, head] * np.outer(values[t, here], into[t, of_group])
            y[t, here] = h @ out[t, of_group] + w["D"][head] * values[t, here]
    y = y * silu(z)
    for part in np.split(np.arange(inner), groups):
        y[:, part] = rms_norm(y[:, part], w["norm.weight"][part], eps)
    return linear(y, w, "out_proj")


def gated_mlp(x, w):
    up, gate = np.split(x @ w["mlp.fc1.weight"].T, 2, axis=-1)
    return (up * silu(gate)) @ w["mlp.fc2.weight"].T


def logits(cfg, weights, tokens):
    """tokens (T,) -> (T, V). `weights`: numpy arrays in fp64 by the names of our model."""
    x = weights["embeddings.weight"][tokens]
    for layer in range(cfg.n_layers):
        prefix = f"layers.{layer}."
        w = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        m = {name.removeprefix("mixer."): v for name, v in w.items() if name.startswith("mixer.")}
        normed = rms_norm(x, w["norm.weight"], cfg.norm_eps)
        if cfg.version == 1:
            x = x + selective(normed, m, cfg.d_state or 16)
        else:
            x = x + dual(normed, m, cfg.d_state or 128, cfg.ngroups, cfg.norm_eps)
        if cfg.d_intermediate:
            x = x + gated_mlp(rms_norm(x, w["norm2.weight"], cfg.norm_eps), w)
    x = rms_norm(x, weights["norm_f.weight"], cfg.norm_eps)
    return x @ weights.get("lm_head.weight", weights["embeddings.weight"])[: cfg.vocab_size].T
