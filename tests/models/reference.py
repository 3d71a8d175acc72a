"""GPT-2 and the Llama-style decoder restated from their equations: loops over tokens and heads, fp64, nothing
shared with the project. Slow on purpose; autograd differentiates it. One row of tokens at a time.

`p` maps our parameter names to tensors; linear weights are (out, in). `docs` holds a document id per token.
"""

import math

import torch


def _linear(p, name, x):
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _layer_norm(p, name, x, eps=1e-5):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    y = (x - mean) / torch.sqrt(variance + eps) * p[f"{name}.weight"]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _rms_norm(p, name, x, eps):
    return x / torch.sqrt((x * x).sum() / len(x) + eps) * p[f"{name}.weight"]


def _gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _softmax(scores):
    weights = torch.exp(torch.stack(scores))
    return weights / weights.sum()


def _positions(docs):
    found = []
    for t, doc in enumerate(docs):
        found.append(found[-1] + 1 if t and docs[t - 1] == doc else 0)
    return found


def _attend(q, k, v, docs, t, window=None, softcap=None):
    """Output of one head for token t; q, k, v are lists of vectors over tokens."""
    seen = [s for s in range(t + 1) if docs[s] == docs[t] and (window is None or t - s < window)]
    scores = [(q[t] * k[s]).sum() / math.sqrt(len(q[t])) for s in seen]
    if softcap is not None:
        scores = [softcap * torch.tanh(score / softcap) for score in scores]
    return sum(weight * v[s] for weight, s in zip(_softmax(scores), seen, strict=True))


def gpt2_logits(p, tokens, docs, n_layers, n_heads):
    """(T, V_p)"""
    where = _positions(docs)
    xs = [p["wte.weight"][token] + p["wpe.weight"][where[t]] for t, token in enumerate(tokens)]
    width = len(xs[0])
    h = width // n_heads
    for layer in range(n_layers):
        block = f"h.{layer}"
        qkv = [_linear(p, f"{block}.attn.c_attn", _layer_norm(p, f"{block}.ln_1", x)) for x in xs]
        heads = []
        for j in range(n_heads):
            q, k, v = ([row[o * width + j * h : o * width + (j + 1) * h] for row in qkv] for o in range(3))
            heads.append([_attend(q, k, v, docs, t) for t in range(len(xs))])
        for t in range(len(xs)):
            joined = torch.cat([head[t] for head in heads])
            xs[t] = xs[t] + _linear(p, f"{block}.attn.c_proj", joined)
            inner = _gelu(_linear(p, f"{block}.mlp.c_fc", _layer_norm(p, f"{block}.ln_2", xs[t])))
            xs[t] = xs[t] + _linear(p, f"{block}.mlp.c_proj", inner)
    head = p.get("lm_head.weight", p["wte.weight"])
    return torch.stack([head @ _layer_norm(p, "ln_f", x) for x in xs])


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


def vanilla_logits(p, tokens, docs, cfg):
    """(T, V_p). `cfg` is read for its plain values only."""
    h = cfg.d_model // cfg.n_heads
    groups = cfg.n_kv_heads or cfg.n_heads
    norm = _rms_norm if cfg.use_rmsnorm else _layer_norm
    xs = [p["embed_tokens.weight"][token] for token in tokens]
    if not cfg.use_rope:
        xs = [x + p["positions.weight"][at] for x, at in zip(xs, _positions(docs), strict=True)]

    def head_vectors(name, normed, j, gain=None, rotated=False):
        vectors = [_linear(p, name, x)[j * h : (j + 1) * h] for x in normed]
        if gain is not None and cfg.qk_norm:
            vectors = [_rms_norm(p, gain, x, cfg.norm_eps) for x in vectors]
        if rotated and cfg.use_rope:
            # Positions count from the start of the row: rotation is relative, documents need no restart.
            vectors = [_rotate(x, t, cfg.rope_theta) for t, x in enumerate(vectors)]
        return vectors

    for layer in range(cfg.n_layers):
        attn, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        normed = [norm(p, f"layers.{layer}.input_layernorm", x, cfg.norm_eps) for x in xs]
        heads = []
        for j in range(cfg.n_heads):
            g = j * groups // cfg.n_heads
            q = head_vectors(f"{attn}.q_proj", normed, j, f"{attn}.q_norm", rotated=True)
            k = head_vectors(f"{attn}.k_proj", normed, g, f"{attn}.k_norm", rotated=True)
            v = head_vectors(f"{attn}.v_proj", normed, g)
            heads.append(
                [_attend(q, k, v, docs, t, cfg.sliding_window, cfg.attn_softcap) for t in range(len(xs))]
            )
        for t in range(len(xs)):
            xs[t] = xs[t] + _linear(p, f"{attn}.o_proj", torch.cat([head[t] for head in heads]))
            y = norm(p, f"layers.{layer}.post_attention_layernorm", xs[t], cfg.norm_eps)
            up = _linear(p, f"{mlp}.up_proj", y)
            if cfg.use_swiglu:
                gate = _linear(p, f"{mlp}.gate_proj", y)
                inner = gate / (1 + torch.exp(-gate)) * up
            else:
                inner = _gelu(up)
            xs[t] = xs[t] + _linear(p, f"{mlp}.down_proj", inner)
    head = p.get("lm_head.weight", p["embed_tokens.weight"])
    return torch.stack([head @ norm(p, "norm", x, cfg.norm_eps) for x in xs])
