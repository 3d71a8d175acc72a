"""Mixture of experts restated from its equations, token by token and expert by expert.

Gate `mixtral`: Jiang et al. 2024, arXiv:2401.04088, with the balance of Fedus et al. 2021, 2101.03961, and the z-loss
of Zoph et al. 2022, 2202.08906. Gate `deepseek_v3`: 2412.19437, section 2.1.2.
"""

from dataclasses import dataclass

import torch

from tests.models.reference import feed_forward, silu, vanilla_block


@dataclass
class Gate:
    """`kind`, `top_k`, `factor` of the weights' sum, and the limit to `topk_group` of `n_group` groups."""

    kind: str
    top_k: int
    factor: float
    n_group: int = 1
    topk_group: int = 1


@dataclass
class Routed:
    """What one token's gate decided: raw logits (E,), scores (E,), the chosen experts."""

    logits: torch.Tensor
    scores: torch.Tensor
    chosen: list[int]

    @property
    def shares(self):
        """Scores as parts of the token; softmax's are that already."""
        return self.scores / self.scores.sum()


def _best(values, among, k):
    """The k of the indices `among` with the largest values; of equal ones the first."""
    return sorted(sorted(among), key=lambda e: -float(values[e].detach()))[:k]


def choose(gate, logits, bias):
    """(scores, chosen experts, weight of each)"""
    experts = range(len(logits))
    if gate.kind == "mixtral":
        scores = torch.exp(logits) / torch.exp(logits).sum()
        chosen = _best(scores, experts, gate.top_k)
        return scores, chosen, [scores[e] / sum(scores[c] for c in chosen) for e in chosen]
    scores = 1 / (1 + torch.exp(-logits))
    order, size = scores.detach() + bias, len(logits) // gate.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(gate.n_group)]
    totals = [sum(order[e] for e in _best(order, group, 2)) for group in groups]
    kept = _best(totals, range(gate.n_group), gate.topk_group)
    chosen = _best(order, [e for g in kept for e in groups[g]], gate.top_k)
    total = sum(scores[e] for e in chosen) + 1e-20
    return scores, chosen, [gate.factor * scores[e] / total for e in chosen]


def expert_layer(p, name, x, gate, bias):
    """(output, what was decided) for one token: w1, w3 (E, f, d), w2 (E, d, f); one network of all shared experts."""
    logits = p[f"{name}.gate.weight"] @ x
    scores, chosen, weights = choose(gate, logits, bias)
    w1, w2, w3 = (p[f"{name}.experts.{w}_proj"] for w in ("gate", "down", "up"))
    y = sum(g * (w2[e] @ (silu(w1[e] @ x) * (w3[e] @ x))) for g, e in zip(weights, chosen, strict=True))
    if f"{name}.shared_experts.gate_proj.weight" in p:
        w1, w2, w3 = (p[f"{name}.shared_experts.{w}_proj.weight"] for w in ("gate", "down", "up"))
        y = y + w2 @ (silu(w1 @ x) * (w3 @ x))
    return y, Routed(logits, scores, chosen)


def moe_block(p, block, xs, docs, cfg, gate, buffers):
    """(states, what was decided of every token): a block of vanilla whose MLP is the expert layer, or is not."""
    told = []

    def mlp(p, name, x, cfg):
        if f"{name}.gate.weight" not in p:
            return feed_forward(p, name, x, cfg)
        y, routed = expert_layer(p, name, x, gate, buffers.get(f"{name}.gate.e_score_correction_bias"))
        told.append(routed)
        return y

    return vanilla_block(p, block, xs, docs, cfg, mlp), told


def moe_states(p, tokens, docs, cfg, gate, buffers):
    """(states behind the last block, tokens' decisions of each layer that has experts)"""
    xs, layers = [p["embed_tokens.weight"][token] for token in tokens], []
    for layer in range(cfg.n_layers):
        xs, told = moe_block(p, f"layers.{layer}", xs, docs, cfg, gate, buffers)
        layers += [told] if told else []
    return xs, layers


def balance(routed, top_k):
    """E sum_e f_e P_e over the given tokens: f the share of all choices, P the mean share."""
    experts = len(routed[0].logits)
    total = 0.0
    for e in range(experts):
        share = sum(e in r.chosen for r in routed) / (len(routed) * top_k)
        total = total + share * sum(r.shares[e] for r in routed) / len(routed)
    return experts * total


def sequence_balance(routed, top_k):
    """sum_e f_e P_e over the tokens of one sequence: f from the scores alone (neither bias nor groups)."""
    experts, total = len(routed[0].logits), 0.0
    for e in range(experts):
        among_best = sum(e in _best(r.scores, range(experts), top_k) for r in routed)
        share = experts / (top_k * len(routed)) * among_best
        total = total + share * sum(r.shares[e] for r in routed) / len(routed)
    return total


def z_loss(routed):
    """mean (ln sum_e exp(logit_e))^2 over the given tokens."""
    return sum(torch.log(torch.exp(r.logits).sum()) ** 2 for r in routed) / len(routed)
