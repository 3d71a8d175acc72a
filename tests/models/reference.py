"""GPT-2 and the Llama-style decoder restated from their equations: loops over tokens and heads, fp64, nothing
shared with the project. Slow on purpose; autograd differentiates it. One row of tokens at a time.

`p` maps our parameter names to tensors; linear weights are (out, in). `docs` holds a document id per token. States are
lists of vectors over tokens. Architectures that are built of these parts are restated of them (reference_*.py).
"""

import math

import torch


def linear(p, name, x):
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def layer_norm(p, name, x, eps=1e-5):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    y = (x - mean) / torch.sqrt(variance + eps) * p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rms_norm(p, name, x, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * p[f"{name}.weight"]


def _gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(scores):
    weights = torch.exp(torch.stack(scores))
    return weights / weights.sum()


def places(docs):
    found = []
    for t, doc in enumerate(docs):
        found.append(found[-1] + 1 if t and docs[t - 1] == doc else 0)
    return found


def attend(q, k, v, docs, t, window=None, softcap=None, at=None):
    """Output of one head for token t; q, k, v are lists of vectors over tokens. `at`: their places in the row, in
    ascending order, where tokens of it are missing."""
    at = range(len(docs)) if at is None else at
    seen = [s for s in range(t + 1) if docs[s] == docs[t] and (window is None or at[t] - at[s] < window)]
    scores = [(q[t] * k[s]).sum() / math.sqrt(len(q[t])) for s in seen]
    if softcap is not None:
        scores = [softcap * torch.tanh(score / softcap) for score in scores]
    return sum(weight * v[s] for weight, s in zip(softmax(scores), seen, strict=True))


def gpt2_block(p, block, xs, docs, n_heads):
    """States behind the block whose parameters' names start with `block`."""
    width, xs = len(xs[0]), list(xs)
    h = width // n_heads
    qkv = [linear(p, f"{block}.attn.c_attn", layer_norm(p, f"{block}.ln_1", x)) for x in xs]
    heads = []
    for j in range(n_heads):
        q, k, v = ([row[o * width + j * h : o * width + (j + 1) * h] for row in qkv] for o in range(3))
        heads.append([attend(q, k, v, docs, t) for t in range(len(xs))])
    for t in range(len(xs)):
        joined = torch.cat([head[t] for head in heads])
        xs[t] = xs[t] + linear(p, f"{block}.attn.c_proj", joined)
        inner = _gelu(linear(p, f"{block}.mlp.c_fc", layer_norm(p, f"{block}.ln_2", xs[t])))
        xs[t] = xs[t] + linear(p, f"{block}.mlp.c_proj", inner)
    return xs


def gpt2_states(p, tokens, docs, n_layers, n_heads):
    """Behind the last block, before the final norm."""
    where = places(docs)
    xs = [p["wte.weight"][token] + p["wpe.weight"][where[t]] for t, token in enumerate(tokens)]
    for layer in range(n_layers):
        xs = gpt2_block(p, f"h.{layer}", xs, docs, n_heads)
    return xs


def gpt2_logits(p, tokens, docs, n_layers, n_heads):
    """(T, V_p)"""
    head = p.get("lm_head.weight", p["wte.weight"])
    xs = gpt2_states(p, tokens, docs, n_layers, n_heads)
    return torch.stack([head @ layer_norm(p, "ln_f", x) for x in xs])


def _rotate(x, position, theta):
    """Turn each pair (i, i + h/2) by position * theta^(-2i/h)."""
    h = len(x)
    turned = [None] * h
    for i in range(h // 2):
        angle = position * theta ** (-2 * i / h)
        a, b = x[i], x[i + h // 2]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + h // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(turned)


def rotate_pairs(x, position, theta):
    """Turn each pair (2i, 2i + 1) by position * theta^(-2i/h)."""
    h = len(x)
    turned = []
    for i in range(h // 2):
        angle = position * theta ** (-2 * i / h)
        a, b = x[2 * i], x[2 * i + 1]
        turned += [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
    return torch.stack(turned)


def silu(x):
    return x / (1 + torch.exp(-x))


def feed_forward(p, mlp, x, cfg):
    """SwiGLU or GELU, as `cfg` says."""
    up = linear(p, f"{mlp}.up_proj", x)
    inner = silu(linear(p, f"{mlp}.gate_proj", x)) * up if cfg.use_swiglu else _gelu(up)
    return linear(p, f"{mlp}.down_proj", inner)


def norm(p, name, x, cfg):
    return (rms_norm if cfg.use_rmsnorm else layer_norm)(p, name, x, cfg.norm_eps)


def vanilla_block(p, block, xs, docs, cfg, mlp=feed_forward, at=None):
    """States behind the block whose parameters' names start with `block`; `mlp` as `feed_forward`, `at` as in
    `attend`."""
    at = range(len(xs)) if at is None else at
    h, groups, xs = cfg.d_model // cfg.n_heads, cfg.n_kv_heads or cfg.n_heads, list(xs)
    attn = f"{block}.self_attn"

    def head_vectors(name, normed, j, gain=None, rotated=False):
        vectors = [linear(p, name, x)[j * h : (j + 1) * h] for x in normed]
        if gain is not None and cfg.qk_norm:
            vectors = [rms_norm(p, gain, x, cfg.norm_eps) for x in vectors]
        if rotated and cfg.use_rope:
            # Positions count from the start of the row: rotation is relative, documents need no restart.
            vectors = [_rotate(x, t, cfg.rope_theta) for t, x in zip(at, vectors, strict=True)]
        return vectors

    normed = [norm(p, f"{block}.input_layernorm", x, cfg) for x in xs]
    heads = []
    for j in range(cfg.n_heads):
        g = j * groups // cfg.n_heads
        q = head_vectors(f"{attn}.q_proj", normed, j, f"{attn}.q_norm", rotated=True)
        k = head_vectors(f"{attn}.k_proj", normed, g, f"{attn}.k_norm", rotated=True)
        v = head_vectors(f"{attn}.v_proj", normed, g)
        heads.append(
            [attend(q, k, v, docs, t, cfg.sliding_window, cfg.attn_softcap, at) for t in range(len(xs))]
        )
    for t in range(len(xs)):
        xs[t] = xs[t] + linear(p, f"{attn}.o_proj", torch.cat([head[t] for head in heads]))
        y = norm(p, f"{block}.post_attention_layernorm", xs[t], cfg)
        xs[t] = xs[t] + mlp(p, f"{block}.mlp", y, cfg)
    return xs


def vanilla_states(p, tokens, docs, cfg, n_layers=None):
    """Behind the last of `n_layers` blocks, before the final norm. `cfg` is read for its plain values only."""
    xs = [p["embed_tokens.weight"][token] for token in tokens]
    if not cfg.use_rope:
        xs = [x + p["positions.weight"][at] for x, at in zip(xs, places(docs), strict=True)]
    for layer in range(cfg.n_layers if n_layers is None else n_layers):
        xs = vanilla_block(p, f"layers.{layer}", xs, docs, cfg)
    return xs


def vanilla_logits(p, tokens, docs, cfg):
    """(T, V_p)"""
    head = p.get("lm_head.weight", p["embed_tokens.weight"])
    return torch.stack([head @ norm(p, "norm", x, cfg) for x in vanilla_states(p, tokens, docs, cfg)])


def nats(logits, target):
    """-ln softmax(logits)[target]; of padded logits give those of the vocabulary."""
    return torch.log(torch.exp(logits).sum()) - logits[target]


def ahead(tokens, docs, k, length):
    """(position, its k-th next token) of the first `length` positions, where all that lies between belongs to the
    position's document: the token may be what ends it."""
    return [(t, tokens[t + k]) for t in range(length) if docs[t + k - 1] == docs[t]]


def mean_nats(rows_of_logits, rows_of_pairs):
    """Mean over all pairs (position, target) of all rows; logits (T, V) of each row."""
    found = [
        nats(logits[t], target)
        for logits, pairs in zip(rows_of_logits, rows_of_pairs, strict=True)
        for t, target in pairs
    ]
    return sum(found) / len(found)
