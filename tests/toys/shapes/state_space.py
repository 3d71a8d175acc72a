"""A diagonal linear recurrence in place of attention: any context, at the cost of one state.

Shapes: B rows, T tokens, D width, which is that of the state too.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import ModelConfig, Positive
from kernels.precision import at_least_fp32
from models.layers.cache import StateCache
from models.layers.decoder import Decoder, padded_vocabulary
from models.layers.flops import Flops, matmul_flops
from models.layers.init import INIT_STD, normal_
from models.layers.norms import RMSNorm
from models.layers.roles import Rule


class Config(ModelConfig):
    vocab_size: Positive | None = None
    d_model: Positive = 32
    n_layers: Positive = 2


class Block(nn.Module):
    """x + W_o (h * silu(g)), h_t = a_t h_{t-1} + (1 - a_t) v_t, a = sigmoid(.), all of a, v, g linear in norm(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width, 1e-5)
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, goes_on: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), goes_on (B, T): 0 where a document begins, state (B, D) -> x, and the state behind it."""
        decay, value, gate = self.inner(self.norm(x)).to(at_least_fp32(x.dtype)).chunk(3, dim=-1)  # (B, T, D)
        decay = decay.sigmoid()
        states = recurrence(decay * goes_on[..., None], (1 - decay) * value, state)
        return x + self.outer(states * F.silu(gate)), states[:, -1]


def recurrence(decay: Tensor, value: Tensor, state: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + value_t behind h_{-1} = state, (B, T, D), in log2 T passes: after each, h_t and decay_t
    account for twice as many tokens."""
    states = torch.cat((value[:, :1] + decay[:, :1] * state[:, None], value[:, 1:]), dim=1)
    reach = 1
    while reach < states.shape[1]:
        states = states + decay * F.pad(states[:, :-reach], (0, 0, reach, 0))
        decay = decay * F.pad(decay[:, :-reach], (0, 0, reach, 0))
        reach *= 2
    return states


class StateSpace(Decoder):
    Config = Config
    lm_head = None
    max_context = None  # no window slides: the state carries everything

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        self.embed = nn.Embedding(padded_vocabulary(self.vocab_size), cfg.d_model)
        self.layers = nn.ModuleList(Block(cfg.d_model) for _ in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, 1e-5)

    def forward(
        self, tokens: Tensor, doc_ids: Tensor | None = None, cache: StateCache | None = None
    ) -> Tensor:
        x = self.embed(tokens)  # (B, T, D)
        goes_on = torch.ones_like(tokens)
        if doc_ids is not None:
            goes_on[:, 1:] = doc_ids[:, 1:] == doc_ids[:, :-1]
        kept = self.init_cache(len(tokens)) if cache is None else cache
        for i, block in enumerate(self.layers):
            x, kept[f"state_{i}"] = block(x, goes_on, kept[f"state_{i}"])
        kept.advance(tokens.shape[1])
        return self.norm(x)

    def init_cache(self, rows: int) -> StateCache:
        states = {
            f"state_{i}": self.norm.weight.new_zeros(rows, self.cfg.d_model) for i in range(self.cfg.n_layers)
        }
        return StateCache(**states)

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed.weight

    def init_weights(self, generator: torch.Generator) -> None:
        self.norm.init_weights()
        normal_(self.embed.weight, INIT_STD, generator)
        for block in self.layers:
            block.norm.init_weights()
            normal_(block.inner.weight, self.cfg.d_model**-0.5, generator)
            normal_(block.outer.weight, INIT_STD, generator)
            nn.init.zeros_(block.inner.bias)

    def blocks(self) -> list[str]:
        return [f"layers.{i}" for i in range(self.cfg.n_layers)]

    def param_roles(self) -> list[Rule]:
        return [
            Rule(r"embed\.weight", "embedding"),
            Rule(r"layers\.\d+\.inner\.weight", "matrix", split=3),
            Rule(r"layers\.\d+\.outer\.weight", "matrix"),
            Rule(r".*norm\.weight|.*\.bias", "scalar"),
        ]

    def flops(self, seq_len: int) -> Flops:
        return matmul_flops(4 * self.cfg.n_layers * self.cfg.d_model**2 + self.head_weight.numel())
