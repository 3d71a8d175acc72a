"""Parallel heads for the next n tokens restated from their equations (Gloeckle et al. 2024, arXiv:2404.19737)."""

import torch

from tests.models.reference import norm, vanilla_block, vanilla_states


def mtp_logits(p, tokens, docs, cfg, trunk_layers):
    """[(T, V_p)] of the heads 1 to n: head i reads the trunk ("parallel"), what head i - 1 made of it ("causal"), or
    head i + 1 ("anticausal"); the first of such a chain reads the trunk."""
    z, n = vanilla_states(p, tokens, docs, cfg, trunk_layers), cfg.n_mtp_tokens

    def head_states(i, xs):
        """Behind head i (0-based): a block with weights of its own, or one matrix."""
        if cfg.head_type == "linear":
            return [p[f"heads.{i}.weight"] @ x for x in xs]
        return vanilla_block(p, f"heads.{i}", xs, docs, cfg)

    states = {}
    for i in reversed(range(n)) if cfg.head_topology == "anticausal" else range(n):
        before = {"parallel": None, "causal": i - 1, "anticausal": i + 1}[cfg.head_topology]
        states[i] = head_states(i, states.get(before, z))
    head = p.get("lm_head.weight", p["embed_tokens.weight"])
    return [torch.stack([head @ norm(p, "norm", u, cfg) for u in states[i]]) for i in range(n)]
