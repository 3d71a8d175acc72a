"""H-Net written from the equations of its paper (Hwang et al. 2025, arXiv:2507.07955) and the names of its authors'
checkpoints: loops over bytes and chunks, in fp64, slow and obvious.

One row of bytes and one document at a time. `p` holds the weights by name, tensors, so that gradients can be asked for.
Mamba-2 is a loop over tokens too (Dao and Gu 2024, arXiv:2405.21060, section 7.1).
"""

import math
import re

import torch
import torch.nn.functional as F


def norm(x, gain, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def below(p, prefix):
    return {name.removeprefix(prefix): v for name, v in p.items() if name.startswith(prefix)}


def mamba2(x, p, states, eps):
    """(T, D) -> (T, D)"""
    heads, inner = len(p["A_log"]), p["out_proj.weight"].shape[1]
    width, taps = inner // heads, p["conv1d.weight"].shape[-1]
    z, mixed, dt = torch.split(x @ p["in_proj.weight"].T, [inner, inner + 2 * states, heads], dim=-1)
    convolved = []
    for t in range(len(x)):
        total = p["conv1d.bias"]
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                total = total + p["conv1d.weight"][:, 0, j] * mixed[t - taps + 1 + j]
        convolved.append(F.silu(total))
    h, out = torch.zeros(heads, width, states, dtype=x.dtype), []
    for t in range(len(x)):
        value, into, read = torch.split(convolved[t], [inner, states, states])
        delta = F.softplus(dt[t] + p["dt_bias"])
        value = value.view(heads, width)
        h = torch.exp(-delta * torch.exp(p["A_log"]))[:, None, None] * h
        h = h + delta[:, None, None] * value[:, :, None] * into
        y = (h @ read + p["D"][:, None] * value).flatten()
        out.append(norm(y * F.silu(z[t]), p["norm.weight"], eps) @ p["out_proj.weight"].T)
    return torch.stack(out)


def turned(x, position, dims):
    """x (h,): pairs i and i + dims/2 of the first dims, by position * 10000^(-2 i / dims)."""
    x, half = x.clone(), dims // 2
    first, second = x[:half].clone(), x[half:dims].clone()
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / dims)
        x[i] = first[i] * math.cos(angle) - second[i] * math.sin(angle)
        x[half + i] = second[i] * math.cos(angle) + first[i] * math.sin(angle)
    return x


def attention(x, p, heads, dims, window):
    """`window`: tokens before a token that it sees, -1 = all."""
    length, width = len(x), x.shape[1] // heads
    q, k, v = (x @ p["Wqkv.weight"].T).view(length, 3, heads, width).unbind(1)
    out = []
    for t in range(length):
        seen = [s for s in range(t + 1) if window < 0 or t - s <= window]
        parts = []
        for head in range(heads):
            query = turned(q[t, head], t, dims)
            scores = torch.stack([query @ turned(k[s, head], s, dims) for s in seen]) / math.sqrt(width)
            parts.append(torch.softmax(scores, 0) @ v[seen, head])
        out.append(torch.cat(parts))
    return torch.stack(out) @ p["out_proj.weight"].T


def stack(x, p, code, cfg, stage):
    kinds = "".join(kind * int(n) for kind, n in re.findall(r"([mMtT])(\d+)", code))
    for layer, kind in enumerate(kinds):
        w = below(p, f"layers.{layer}.")
        y, mixer = norm(x, w["norm1.weight"], cfg["norm_eps"]), below(w, "mixer.")
        if kind in "mM":
            x = x + mamba2(y, mixer, cfg["d_state"], cfg["norm_eps"])
        elif stage in cfg.get("attention", {}):
            x = x + cfg["attention"][stage](y, mixer)
        else:
            of_stage = (cfg[name][stage] for name in ("n_heads", "rotary_emb_dim", "window_size"))
            x = x + attention(y, mixer, *of_stage)
        if kind in "MT":
            up, gate = (norm(x, w["norm2.weight"], cfg["norm_eps"]) @ w["mlp.fc1.weight"].T).chunk(2, -1)
            x = x + (up * F.silu(gate)) @ w["mlp.fc2.weight"].T
    return norm(x, p["rmsnorm.weight"], cfg["norm_eps"])


def boundaries(x, p):
    """p_t of every place: equation 4, with the projections as the authors' code applies them."""
    found = [torch.ones((), dtype=x.dtype)]
    for t in range(1, len(x)):
        q = p["q_proj_layer.weight"] @ x[t - 1]
        k = p["k_proj_layer.weight"] @ x[t]
        found.append((1 - q @ k / (q.norm() * k.norm())) / 2)
    return torch.stack(found)


def stage_of(x, p, layout, cfg, stage, told):
    """x (L, width of the stage before) -> the same."""
    width = x.shape[1]
    if "pad_dimension" in p:
        x = torch.cat((x, p["pad_dimension"].expand(len(x), -1)), dim=1)
    if len(layout) == 1:
        return stack(x, below(p, "main_network."), layout[0], cfg, stage)[:, :width]
    encoder, within, decoder = layout
    encoded = stack(x, below(p, "encoder."), encoder, cfg, stage)
    if cfg.get("pools"):
        heard = pooled(encoded, p, within, cfg, stage, told)
        residual = encoded @ p["residual_proj.weight"].T + p["residual_proj.bias"]
        return stack(heard + residual, below(p, "decoder."), decoder, cfg, stage)[:, :width]
    if cfg["chunking"] == "fixed":
        every = cfg["target_ratio"][stage]
        probabilities = torch.tensor([float(t % every == 0) for t in range(len(x))], dtype=x.dtype)
    else:
        probabilities = boundaries(encoded, below(p, "routing_module."))
    opens = [t for t in range(len(x)) if probabilities[t] > 0.5]
    told.setdefault(stage, []).append((probabilities, opens))
    inner = stage_of(encoded[opens], below(p, "main_network."), within, cfg, stage + 1, told)
    smoothed, state = [], torch.zeros(x.shape[1], dtype=x.dtype)
    for chunk, t in enumerate(opens):
        weight = probabilities[t].clamp(cfg["ema_eps"], 1 - cfg["ema_eps"])
        state = weight * inner[chunk] + (1 - weight) * state
        smoothed.append(state)
    out = []
    for t in range(len(x)):
        chunk = sum(1 for o in opens if o <= t) - 1
        sure = probabilities[t] if t in opens else 1 - probabilities[t]
        through = 1 + (sure - sure.detach())
        residual = p["residual_proj.weight"] @ encoded[t] + p["residual_proj.bias"]
        out.append(through * smoothed[chunk] + residual)
    return stack(torch.stack(out), below(p, "decoder."), decoder, cfg, stage)[:, :width]


def pooled(encoded, p, within, cfg, stage, told):
    """(L, D): to each place what the stage within makes of the last chunk of N places that is whole by then, each chunk
    an MLP of all that it holds; 0 where none is. `told` as of other chunks."""
    every, w = int(cfg["target_ratio"][stage]), below(p, "pooling.")
    chunks = []
    for first in range(0, len(encoded) - every + 1, every):
        held = torch.cat([encoded[first + n] for n in range(every)])
        hidden = F.relu(w["up.weight"] @ held + w["up.bias"])
        chunks.append(w["down.weight"] @ hidden + w["down.bias"])
    ends = [every * j + every - 1 for j in range(len(chunks))]
    told.setdefault(stage, []).append((torch.tensor([float(t in ends) for t in range(len(encoded))]), ends))
    if not chunks:
        return torch.zeros_like(encoded)
    inner = stage_of(torch.stack(chunks), below(p, "main_network."), within, cfg, stage + 1, told)
    out = []
    for t in range(len(encoded)):
        whole = [j for j in range(len(chunks)) if t >= (j + 1) * every - 1]
        out.append(inner[whole[-1]] if whole else torch.zeros_like(encoded[t]))
    return torch.stack(out)


def logits(p, tokens, cfg, told=None):
    """tokens: numbers of one document -> (T, V). `cfg`: every field as a list of stages, nothing left out; `attention`:
    of stages that have another than H-Net's, by number, a function of (x, weights). `told`: of each stage
    (probabilities, places that opened a chunk)."""
    told = {} if told is None else told
    x = stage_of(p["embeddings.weight"][tokens], below(p, "backbone."), cfg["arch_layout"], cfg, 0, told)
    return x @ p.get("lm_head.weight", p["embeddings.weight"]).T


def ratio_loss(opened, probability, n):
    """Equation 10, of one row: what opened, of so many places."""
    f, g = opened, probability
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
