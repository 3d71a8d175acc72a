"""Parallel multi-token prediction (Gloeckle et al. 2024, arXiv:2404.19737).

A trunk of the control's blocks, and n heads of one block each that read its state; head k predicts the k-th token
after each position. All share the last norm and the output matrix, so the first head and the trunk are a plain decoder,
and the others are dropped where text is scored or written.

Shapes: B rows, T tokens, D width, V_p padded vocabulary, n heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from configs.schema import Free, NonNegativeFloat, Positive
from models.drafters import HeadDrafter
from models.layers.cache import Cache, KVCache
from models.layers.decoder import Hidden, further, through
from models.layers.flops import Flops, matmul_flops
from models.layers.roles import Rule
from models.mtm import MTMConfig
from models.vanilla import Vanilla, VanillaConfig

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["MTP", "MTPConfig"]


class MTPConfig(VanillaConfig):
    n_mtp_tokens: Positive = 2  # n, the next token among them
    isoparam: bool = True  # trunk and heads are n_layers blocks together; False: the trunk has n_layers - 1
    head_type: Literal["transformer", "linear"] = "transformer"
    head_topology: Literal["parallel", "causal", "anticausal"] = (
        "parallel"  # what head k reads: trunk, k-1, k+1
    )
    mtp_loss_weights: Free[list[NonNegativeFloat] | None] = (
        None  # of each head, the next token's first; None = 1
    )
    use_deepseek_mtp: bool = False  # sequential modules behind n_layers blocks instead: models/mtm.py
    mtp_lambda: Free[NonNegativeFloat] = 0.3  # of those

    tiny = {"n_layers": 3}
    examples = {
        "mtp_loss_weights": [0.5, 2.0],
        "mtp_lambda": (0.7, {"use_deepseek_mtp": True}),
    }

    @property
    def tokens_ahead(self) -> int:
        """Tokens predicted at each position."""
        return self.n_mtp_tokens

    @property
    def trunk_layers(self) -> int:
        return self.n_layers - (self.n_mtp_tokens if self.isoparam else 1)

    @property
    def deepseek(self) -> MTMConfig:
        """The same decoder with n - 1 sequential modules."""
        own = {name: getattr(self, name) for name in VanillaConfig.model_fields}
        shared = {name: own.pop(name) for name in MTMConfig.model_fields if name in own}
        return MTMConfig(
            **shared,
            trunk="vanilla",
            trunk_cfg=own,
            n_mtp_modules=self.n_mtp_tokens - 1,
            mtp_lambda=self.mtp_lambda,
        )

    def loss_weights(self, done: float) -> list[float]:
        """Of each head; `done`: share of the training that lies behind."""
        if self.use_deepseek_mtp:
            return self.deepseek.loss_weights(done)
        return self.mtp_loss_weights or [1.0] * self.n_mtp_tokens

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        if self.use_deepseek_mtp:
            return found
        n, weights = self.n_mtp_tokens, self.mtp_loss_weights
        if n > 1 and self.trunk_layers < 1:
            least = n + 1 if self.isoparam else 2
            fewer = f"n_mtp_tokens={max(1, self.n_layers - 1)} or " if self.isoparam else ""
            found.append(
                f"model_cfg.n_mtp_tokens ({n}) leaves no trunk of model_cfg.n_layers ({self.n_layers}): each head is "
                f"one of these blocks. Nearest: {fewer}n_layers={least}"
            )
        if weights is not None and len(weights) != n:
            found.append(
                f"model_cfg.mtp_loss_weights ({weights}) must have model_cfg.n_mtp_tokens ({n}) entries, the next "
                f"token's first. Nearest: {(weights + [1.0] * n)[:n]}, or null for ones"
            )
        if weights is not None and not any(weights):
            found.append(
                f"model_cfg.mtp_loss_weights ({weights}) leaves nothing to train. Nearest: {[1.0] + weights[1:]}, or "
                f"null for ones"
            )
        return found

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.n_mtp_tokens == 1:  # one head, or no module
            found |= dict.fromkeys(("isoparam", "head_topology", "mtp_lambda"), "n_mtp_tokens=1")
        if not self.use_deepseek_mtp:
            return {**found, "mtp_lambda": "use_deepseek_mtp=false"}
        idle = ("isoparam", "head_type", "head_topology", "mtp_loss_weights")
        return {**found, **dict.fromkeys(idle, "use_deepseek_mtp=true")}


class MTP(Vanilla):
    """Built with `use_deepseek_mtp` it is another model, `models.mtm.MTM`: the adapter sees to it."""

    Config = MTPConfig
    cfg: MTPConfig

    def __init__(self, cfg: MTPConfig) -> None:
        assert not cfg.use_deepseek_mtp, "MultiTokenAdapter.build_model makes the sequential model"
        super().__init__(cfg)
        self.layers = self.layers[: cfg.trunk_layers]
        self.heads = nn.ModuleList(self._new_head(cfg.trunk_layers + k) for k in range(cfg.n_mtp_tokens))

    def _new_head(self, layer: int) -> nn.Module:
        if self.cfg.head_type == "transformer":
            return self.new_block(layer)
        return nn.Linear(self.cfg.d_model, self.cfg.d_model, bias=False)

    def forward(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        cu_seqlens: Tensor | None = None,
        ahead: Sequence[Tensor] = (),
        **drawn: Any,
    ) -> Tensor | Hidden:
        """As `Decoder.forward`: the states of the first head. For each of `ahead`, (B, T) tokens that follow each
        position, a further head runs beside it, whose states (B, T, D) are `Hidden.extra`'s `further(k)`; heads run in
        parallel, so that they read none of these tokens."""
        x, shared = self.embed(tokens, doc_ids, cache, cu_seqlens, **drawn)
        x, _ = through(self.layers, x, shared, cache)
        first, *others = (self.norm(u) for u in self.head_states(x, shared, cache, 1 + len(ahead)))
        if cache is not None:
            cache.advance(tokens.shape[1])
        return Hidden(first, {further(k): u for k, u in enumerate(others, 2)}) if others else first

    def head_states(
        self, x: Tensor, shared: tuple[Any, ...], cache: Cache | None = None, count: int | None = None
    ) -> list[Tensor]:
        """Of the first `count` heads (None = all), before the norm, each (B, T, D), from the trunk's x (B, T, D). Of a
        chain that begins at the far end, all run."""
        n, topology = self.cfg.n_mtp_tokens, self.cfg.head_topology
        count = n if count is None else count
        order = reversed(range(n)) if topology == "anticausal" else range(count)
        states: dict[int, Tensor] = {}
        read = x
        for k in order:
            head = self.heads[k]
            states[k] = head(read) if isinstance(head, nn.Linear) else head(read, *shared, cache)
            read = x if topology == "parallel" else states[k]
        return [states[k] for k in range(count)]

    def init_cache(self, rows: int) -> KVCache:
        return KVCache(self.cfg.trunk_layers + self.cfg.n_mtp_tokens, rows)

    @property
    def max_drafts(self) -> int:
        return self.cfg.n_mtp_tokens - 1

    def init_drafter(self, rows: int, drafts: int) -> HeadDrafter:
        return HeadDrafter(self, rows, drafts)

    def blocks(self) -> list[str]:
        heads = range(self.cfg.n_mtp_tokens if self.cfg.head_type == "transformer" else 0)
        return [
            *(f"layers.{layer}" for layer in range(self.cfg.trunk_layers)),
            *(f"heads.{k}" for k in heads),
        ]

    def hf_views(self) -> dict[str, Tensor]:
        """Of a decoder without further heads; others have no form there."""
        if self.cfg.n_mtp_tokens > 1 or self.cfg.head_type != "transformer":
            raise ValueError(
                f"model_cfg.n_mtp_tokens={self.cfg.n_mtp_tokens}, head_type={self.cfg.head_type}: {self.hf.name} has "
                f"no heads of blocks behind a trunk"
            )
        block = f"layers.{self.cfg.trunk_layers}."
        return {name.replace("heads.0.", block): view for name, view in super().hf_views().items()}

    def param_roles(self) -> list[Rule]:
        return [Rule(r"heads\.\d+\.weight", "matrix"), *super().param_roles()]

    def flops(self, seq_len: int) -> Flops:
        """In training all heads and n times the output matrix; else the first head, and those that it reads."""
        c = self.cfg
        block, output = self.block_flops(seq_len), matmul_flops(self.head_weight.numel())
        head = block if c.head_type == "transformer" else matmul_flops(c.d_model**2)
        asked = c.n_mtp_tokens if c.head_topology == "anticausal" else 1
        dropped = head * (c.n_mtp_tokens - asked) + output * (c.n_mtp_tokens - 1)
        return block * c.trunk_layers + head * asked + output + dropped.training_only
