"""The normalised transformer restated from its equations (Loshchilov et al. 2024, arXiv:2410.01131), token by token."""

import math

import torch

from tests.models.reference import rotate_pairs, silu, softmax


def unit(x):
    return x / torch.sqrt((x * x).sum())


def _attention(p, name, xs, docs, cfg, s_qk):
    """Before it is normalised; scores are sqrt(h) cos(q, k) where the scales are 1."""
    h = cfg.d_model // cfg.n_heads
    heads = []
    for j in range(cfg.n_heads):
        mine = slice(j * h, (j + 1) * h)
        q, k, v = ([(p[f"{name}.{n}_proj.weight"] @ x)[mine] for x in xs] for n in "qkv")
        q, k = (
            [s_qk[mine] * unit(rotate_pairs(y, t, cfg.rope_theta)) for t, y in enumerate(ys)] for ys in (q, k)
        )
        outs = []
        for t in range(len(xs)):
            seen = [s for s in range(t + 1) if docs[s] == docs[t]]
            weights = softmax([math.sqrt(h) * (q[t] * k[s]).sum() for s in seen])
            outs.append(sum(w * v[s] for w, s in zip(weights, seen, strict=True)))
        heads.append(outs)
    joined = [torch.cat([head[t] for head in heads]) for t in range(len(xs))]
    return [p[f"{name}.o_proj.weight"] @ y for y in joined]


def _mlp(p, name, x, s_u, s_v):
    u = s_u * (p[f"{name}.up_proj.weight"] @ x)
    v = math.sqrt(len(x)) * s_v * (p[f"{name}.gate_proj.weight"] @ x)
    return p[f"{name}.down_proj.weight"] @ (u * silu(v))


def _towards(x, other, alpha):
    """From x, as a unit vector, the fraction |alpha| towards `other`, as one, and back onto the sphere."""
    return unit(unit(x) + alpha.abs() * (unit(other) - unit(x)))


def ngpt_logits(p, tokens, docs, cfg):
    """(T, V_p). Rows and columns of `p` are unit vectors already; stored scales are not yet those that are used."""
    root = cfg.d_model**-0.5

    def used(name, init, scale):
        return p[f"{name}.weight"] * init / (root if scale is None else scale)

    xs = [p["embed_tokens.weight"][token] for token in tokens]
    for layer in range(cfg.n_layers):
        attn, mlp = (f"layers.{layer}.{part}" for part in ("self_attn", "mlp"))
        s_qk = used(f"{attn}.qk_scale", cfg.sqk_init, cfg.sqk_scale)
        s_u, s_v = (used(f"{mlp}.{name}_scale", cfg.suv_init, cfg.suv_scale) for name in ("up", "gate"))
        to_attn, to_mlp = (
            used(f"layers.{layer}.{part}_alpha", cfg.alpha_init, cfg.alpha_scale) for part in ("attn", "mlp")
        )
        attended = _attention(p, attn, xs, docs, cfg, s_qk)
        xs = [_towards(x, y, to_attn) for x, y in zip(xs, attended, strict=True)]
        xs = [_towards(x, _mlp(p, mlp, x, s_u, s_v), to_mlp) for x in xs]
    s_z = used("head_scale", cfg.sz_init, cfg.sz_scale)
    head = p.get("lm_head.weight", p["embed_tokens.weight"])
    return torch.stack([s_z * (head @ x) for x in xs])
