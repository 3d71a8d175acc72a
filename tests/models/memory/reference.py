"""The memory layer, token by token: what of a bank each one reads and what it makes of it. Slow and plain, fp64."""

import math

import torch


def bank_of(bank, cfg):
    """(N, m)"""
    if cfg.factorized:
        rows = [torch.stack([stored(r, cfg) for r in part.detach()]) for part in (bank.weight, bank.basis)]
        return rows[0] @ rows[1].T
    return torch.stack([stored(row, cfg) for row in bank.weight.detach()])


def stored(row, cfg):
    """A row as its integers and its scale give it."""
    if not cfg.quantize_memory:
        return row
    most = {8: 127, 4: 7}[cfg.memory_quant_bits]
    scale = max(abs(float(value)) for value in row) / most or 1.0
    return torch.tensor(
        [scale * max(-most, min(most, round(float(v) / scale))) for v in row], dtype=row.dtype
    )


def matrix(projection):
    """(in, out) of a projection."""
    if hasattr(projection, "down"):
        return (projection.up.weight @ projection.down.weight).T.detach()
    return projection.weight.T.detach()


def decision_input(x, t, first, cfg, strategy):
    """z of token t of one row x (T, D), whose document begins at `first`; None: that of 0."""
    window = cfg.routing_window_size
    if strategy == "token":
        return x[t]
    if strategy == "rolling":
        return x[max(first, t - window + 1) : t + 1].mean(0)
    return x[first : first + window].mean(0) if t - first >= window else None


def chosen(router, z, cfg):
    """[(chapter, added to its logits, factor of its tokens)] in the order of the logits."""
    size = cfg.num_chapters - cfg.num_shared_chapters
    weight, bias = router.weight.detach(), router.bias.detach()
    logits = [float(bias[c] + (0 if z is None else weight[c] @ z)) for c in range(size)]
    order = sorted(range(size), key=lambda c: (-logits[c], c))[: cfg.top_k_chapters]
    total = sum(math.exp(logits[c]) for c in order)
    found = [(c, 0.0, 1.0) for c in range(cfg.num_shared_chapters)]
    for c in order:
        w = math.exp(logits[c]) / total
        added = math.log(cfg.top_k_chapters * w) if cfg.chapter_weighting == "log_bias" else 0.0
        factor = w if cfg.chapter_weighting == "scale_memory" else 1.0
        found.append((c + cfg.num_shared_chapters, added + math.log(cfg.routed_scaling_factor), factor))
    return found


def memory_layer(layer, bank, x, cfg, first=None, strategy="sequence"):
    """x (B, T, D), normalised -> what is added to the stream (B, T, D), before any feed-forward layer of its own."""
    memory, size = bank_of(bank, cfg), cfg.num_memory_tokens // cfg.num_chapters
    heads_of_queries, groups = cfg.memory_heads
    width, share = cfg.attention_width // heads_of_queries, heads_of_queries // groups
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            parts = [(range(cfg.num_memory_tokens), 0.0, 1.0)]
            if layer.router is not None:
                begin = 0 if first is None else int(first[b, t])
                z = decision_input(x[b], t, begin, cfg, strategy)
                found = chosen(layer.router, z, cfg)
                parts = [(range(c * size, c * size + size), added, factor) for c, added, factor in found]
            rows = torch.cat([factor * memory[list(places)] for places, _, factor in parts])
            added = torch.cat([torch.full((len(places),), a, dtype=x.dtype) for places, a, _ in parts])
            q, k, v = (
                x[b, t] @ matrix(layer.attn.q_proj),
                *(rows @ matrix(p) for p in (layer.attn.k_proj, layer.attn.v_proj)),
            )
            heads = []
            for head in range(heads_of_queries):
                of_head, group = slice(head * width, head * width + width), head // share
                of_group = slice(group * width, group * width + width)
                scores = k[:, of_group] @ q[of_head] / math.sqrt(width) + added
                heads.append(scores.softmax(0) @ v[:, of_group])
            out[b, t] = torch.cat(heads) @ matrix(layer.attn.o_proj)
    return out
