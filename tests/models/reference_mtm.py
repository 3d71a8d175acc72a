"""Sequential modules for further tokens restated from their equations (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Trunk:
    """What a trunk is made of, as functions of states, lists of vectors over tokens. Norms and blocks of modules are
    of its kind."""

    states: Callable  # (tokens, docs) -> behind the last block
    block: Callable  # (name, states, docs) -> behind a block whose parameters' names start so
    norm: Callable  # (name, vector) -> vector
    embedding: torch.Tensor  # (V_p, D)
    head: torch.Tensor  # (V_p, D)
    last_norm: str


def mtm_logits(p, trunk, tokens, docs, length, cfg):
    """[(T, V_p)] of the trunk and of the modules 1 to D, over the first `length` = T of the row's tokens: those behind
    them are the inputs and targets of the last positions' modules."""
    docs = docs[:length]
    xs = trunk.states(tokens[:length], docs)
    normed = [trunk.norm(trunk.last_norm, x) for x in xs]
    found = [torch.stack([trunk.head @ x for x in normed])]
    h = normed if cfg.mtp_hidden == "post_norm" else xs
    for k in range(1, cfg.n_mtp_modules + 1):
        module, mixed = f"mtp_modules.{k - 1}", []
        for i in range(length):
            state = trunk.norm(f"{module}.hnorm", h[i])
            token = trunk.norm(f"{module}.enorm", trunk.embedding[tokens[i + k]])
            pair = [state, token] if cfg.concat_order == "hidden_first" else [token, state]
            mixed.append(p[f"{module}.eh_proj.weight"] @ torch.cat(pair))
        h = trunk.block(f"{module}.block", mixed, docs)
        last = trunk.last_norm if cfg.mtp_share_head_norm else f"{module}.norm"
        found.append(torch.stack([trunk.head @ trunk.norm(last, x) for x in h]))
    return found
