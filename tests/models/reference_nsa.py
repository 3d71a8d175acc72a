"""Native sparse attention from the paper's equations: token by token, in fp64, slow and obvious.

Yuan et al. 2025 (arXiv:2502.11089), equations 5 to 12. Of one document; what is packed is taken apart first.
"""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attend(q, k, v):
    """q (h), k (S, h), v (S, w): (w), and 0 where there is nothing to attend to."""
    return softmax(k @ q / np.sqrt(len(q))) @ v if len(k) else np.zeros(v.shape[1])


def compressed(q, k, v, t, size, stride):
    """Equations 5 and 8 of one head: q (h), summaries k (N, h), v (N, w) of blocks i of tokens i stride to i stride +
    size - 1. Output and probabilities."""
    seen = [i for i in range(len(k)) if i * stride + size - 1 <= t]
    p = np.zeros(len(k))
    if seen:
        p[seen] = softmax(k[seen] @ q / np.sqrt(len(q)))
    return p @ v if len(v) else np.zeros(v.shape[1]), p


def importance(p, blocks, size, stride, block):
    """Equation 9, counted from 0: the double sum over m and r."""
    scores = np.zeros(blocks)
    for j in range(blocks):
        for m in range(block // stride):
            for r in range(size // stride):
                i = block // stride * j + m - r
                if 0 <= i < len(p):
                    scores[j] += p[i]
    return scores


def select(scores, t, block, count, first, local):
    """Equations 11 and 12 of one group: numbers of the selected blocks, ascending."""
    own = t // block
    forced = {j for j in range(first) if j <= own} | {own - d for d in range(local) if own >= d}
    rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    return sorted(forced | set(rest[: count - len(forced)]))


def summary(x, places, up, up_bias, down, down_bias):
    """Equation 7 of one block and group: x and places (l, h), up (o, l h), down (h, o). The MLP's GELU is exact."""
    hidden = up @ (x + places).reshape(-1) + up_bias
    gelu = np.array([y * 0.5 * (1 + math.erf(y / math.sqrt(2))) for y in hidden])
    return down @ gelu + down_bias


# -- the whole model -----------------------------------------------------------------------------------------------


def rms_norm(x, gain, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gain


def silu(x):
    return x / (1 + np.exp(-x))


def turn(x, theta):
    """Rotary positions of x (T, H, h): dims i and i + h / 2 by the angle t theta^(-2 i / h)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        (a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)), -1
    )


def attention(cfg, w, x):
    """Equations 5 to 12 of a layer whose weights are in w by name: x (T, D) -> (T, D)."""
    size, stride, block = cfg.compress_block_size, cfg.stride, cfg.selection_block_size
    heads, groups, length = cfg.n_heads, cfg.n_kv_heads, len(x)
    q = (x @ w["q_proj.weight"].T).reshape(length, heads, -1)
    keys = (x @ w["k_proj.weight"].T).reshape(length, cfg.projections, groups, -1)
    values = (x @ w["v_proj.weight"].T).reshape(length, cfg.projections, groups, -1)
    of = (0, 0, 0) if cfg.share_branch_kv else (0, 1, 2)  # the projection of each branch
    turned_q, turned = turn(q, cfg.rope_theta), [turn(keys[:, i], cfg.rope_theta) for i in of]
    asks, raw = (turned_q, turned[0]) if cfg.compress_rope else (q, keys[:, of[0]])

    def summed(tokens, name, group):
        at = range(0, length - size + 1, stride)
        if cfg.compression == "mean":
            return np.array([tokens[i : i + size].mean(0) for i in at]).reshape(len(at), tokens.shape[-1])
        parts = [w[f"{name}.{p}"] for p in ("up.weight", "up.bias", "down.weight", "down.bias")]
        found = [summary(tokens[i : i + size], w[f"{name}.places"][group], *parts) for i in at]
        return np.array(found).reshape(len(at), tokens.shape[-1])

    hidden = x
    if cfg.gate_hidden_dim:
        hidden = silu(x @ w["g_proj.hidden.weight"].T + w["g_proj.hidden.bias"])
    gates = hidden @ w["g_proj.out.weight"].T + w.get("g_proj.out.bias", 0.0)
    gates = 1 / (1 + np.exp(-gates.reshape(length, heads, 3)))
    out = np.zeros((length, heads, cfg.value_dim))
    for group in range(groups):
        short = (
            summed(raw[:, group], "compress_k", group),
            summed(values[:, of[0], group], "compress_v", group),
        )
        own = range(group * heads // groups, (group + 1) * heads // groups)
        for t in range(length):
            branches, total = {}, 0.0
            for head in own:
                branches[head], p = compressed(asks[t, head], *short, t, size, stride)
                total = total + importance(p, -(-length // block), size, stride, block)
            chosen = select(
                total, t, block, cfg.num_selected_blocks, cfg.num_init_blocks, cfg.num_local_blocks
            )
            seen = [s for j in chosen for s in range(j * block, min((j + 1) * block, t + 1))]
            last = slice(max(0, t - cfg.sliding_window + 1), t + 1)
            for head in own:
                selected = attend(turned_q[t, head], turned[1][seen, group], values[seen, of[1], group])
                window = attend(turned_q[t, head], turned[2][last, group], values[last, of[2], group])
                out[t, head] = gates[t, head] @ np.stack((branches[head], selected, window))
    return out.reshape(length, -1) @ w["o_proj.weight"].T


def logits(cfg, weights, tokens):
    """(T, V) of one row of tokens (T,), which is one document."""
    x = weights["embeddings.weight"][tokens]
    for layer in range(cfg.n_layers):
        prefix = f"layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        attn = {name.removeprefix("attn."): value for name, value in w.items()}
        x = x + attention(cfg, attn, rms_norm(x, w["attn_norm.weight"], cfg.norm_eps))
        y = rms_norm(x, w["mlp_norm.weight"], cfg.norm_eps)
        gated = silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + gated @ w["mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["embeddings.weight"])
    return rms_norm(x, weights["norm.weight"], cfg.norm_eps) @ head[: cfg.vocab_size].T


def of_fla(q, k, v, g_cmp, g_slc, g_swa, block, count, window):
    """What the public code's plain version computes (fla-org/native-sparse-attention, ops/naive.py), said again: q
    (T, H, h), k and v (T, G, .), gates (T, H). Means of whole blocks; the query's own block is ranked by 1 for every
    head, and of equal ranks the lower number is taken."""
    length, heads, width = q.shape
    groups, out = k.shape[1], np.zeros((length, heads, v.shape[2]))
    whole, blocks = length // block, -(-length // block)
    for group in range(groups):
        short = [
            np.array([x[i * block : (i + 1) * block, group].mean(0) for i in range(whole)]) for x in (k, v)
        ]
        for t in range(length):
            seen, ranks = (t + 1) // block, np.zeros(blocks)
            own = range(group * heads // groups, (group + 1) * heads // groups)
            for head in own:
                p = np.zeros(blocks)
                if seen:
                    p[:seen] = softmax(short[0][:seen] @ q[t, head] / np.sqrt(width))
                    out[t, head] += g_cmp[t, head] * (p[:seen] @ short[1][:seen])
                p[t // block] = 1.0
                ranks += p
            best = sorted(range(t // block + 1), key=lambda j: (-ranks[j], j))[:count]
            tokens = [s for j in sorted(best) for s in range(j * block, min((j + 1) * block, t + 1))]
            last = slice(max(0, t - window + 1), t + 1)
            for head in own:
                out[t, head] += g_slc[t, head] * attend(q[t, head], k[tokens, group], v[tokens, group])
                out[t, head] += g_swa[t, head] * attend(q[t, head], k[last, group], v[last, group])
    return out
