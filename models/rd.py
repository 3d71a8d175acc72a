"""Recurrent depth (Geiping et al. 2025, "Scaling up Test-Time Compute with Latent Reasoning", arXiv:2502.05171).

A prelude makes of tokens what is injected, e; a core, whose weights are shared over all iterations, makes of a state
and e the next state, from noise on, as often as one likes; a coda makes of a state what the head reads. How often is
drawn anew in every training step, and chosen freely where text is scored or written (`models/reading.py`:
what else may be chosen there).

    e = P(sqrt(D) E[tokens]);  s_0 ~ N(0, sigma^2);  s_i = core(A [s_{i-1}; e]);  hidden = gc(C(gc(s_r)))

Shapes: B rows, T tokens, D width, H heads, h = D/H head width, f hidden width, V_p padded vocabulary, r recurrences.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs.match import Dial, SizeDials, decoder_dials
from configs.schema import DefaultModelConfig, Free, NonNegativeFloat, Positive, Rate
from kernels.attention import Plan, Visible, attention_call, plan_attention, training_facts
from kernels.precision import compute_dtype
from models.drafters import DepthDrafter
from models.layers.cache import Cache
from models.layers.decoder import Decoder, Hidden, padded_vocabulary, through
from models.layers.depth import DepthLaw
from models.layers.exits import state_change
from models.layers.flops import Flops, matmul_flops
from models.layers.hashing import hashed_normal
from models.layers.init import truncated_normal_
from models.layers.norms import RMSNorm
from models.layers.recurrent_cache import RecurrentCache, Turn
from models.layers.roles import Rule
from models.layers.rotary import rotary_tables
from models.reading import ReadingConfig, read
from models.vanilla import MLP, Rotation, VanillaConfig, block_flops
from models.vanilla import Attention as VanillaAttention

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["RD", "RDConfig", "states_after"]

BOUND = 3.0  # standard deviations at which normal draws are cut off
MAX_DRAFTS = 4  # each costs a pass at the depth of drafts, and is in vain where one before it is wrong
STATE_STD = math.sqrt(2 / 5)  # of what enters the prelude, too

Shared = tuple[Plan, Rotation]


def states_after(recurrences: int) -> str:
    """The name of the hidden states that a smaller or larger number of recurrences gives."""
    return f"states_after_{recurrences}"


class RDConfig(DefaultModelConfig, ReadingConfig):
    # Blocks: of the prelude, the core and the coda; None = a quarter of n_layers, the rest, a quarter.
    n_layers: Positive | None = 8  # type: ignore[assignment]  # None = their sum
    l_p: Positive | None = None
    l_core: Positive | None = None
    l_c: Positive | None = None
    mean_recurrence: Free[Positive] = 32  # training draws r = 1 + a Poisson number of this mean
    lognorm_var: Free[NonNegativeFloat] = (
        0.25  # variance of the logarithm of what that mean itself is drawn from
    )
    r_max: Free[Annotated[int, Field(ge=2)] | None] = None  # what is drawn is no more than this; None = any
    eval_recurrence: Free[Positive | None] = None  # r of scores and text; None = mean_recurrence
    k_trunc: Free[Positive] = 8  # last iterations that gradients go back through
    s0_std: Rate | Literal["auto"] = "auto"  # of the noise that the state begins with; auto = sqrt(2 / 5)
    adapter_mode: Literal["concat", "add"] = "concat"  # how e meets the state: A [s; e], or s + e
    ffn_hidden: Positive | None = None  # None = as in vanilla
    rope_theta: Rate = 50000.0
    norm_eps: Rate = 1e-6
    qk_bias: bool = True
    tie_embeddings: bool = True

    tiny = {"n_layers": 3, "mean_recurrence": 2, "k_trunc": 2}
    examples = {part: (1, {"n_layers": None}) for part in ("l_p", "l_core", "l_c")}

    @property
    def parts(self) -> tuple[int, int, int]:
        """Blocks of prelude, core and coda."""
        if self.n_layers is None:
            return self.l_p or 2, self.l_core or 4, self.l_c or 2
        quarter = max(1, self.n_layers // 4)
        prelude, coda = self.l_p or quarter, self.l_c or quarter
        return prelude, self.l_core or self.n_layers - prelude - coda, coda

    @property
    def control(self) -> VanillaConfig:
        """The control of these sizes: rules on them, hidden width and operations of a block are this one's too."""
        sizes = {name: getattr(self, name) for name in DefaultModelConfig.model_fields}
        shared = {name: getattr(self, name) for name in ("ffn_hidden", "rope_theta", "norm_eps")}
        return VanillaConfig(**{**sizes, **shared, "n_layers": max(1, sum(self.parts))})

    @property
    def hidden_width(self) -> int:
        return self.control.hidden_width

    def size_dials(self) -> SizeDials:
        """All blocks, or those of the core where the others are given."""
        total, core = sum(self.parts), self.parts[1]

        def depth(n: int) -> dict[str, Any]:
            found = {} if self.n_layers is None else {"n_layers": n}
            return found if self.l_core is None and found else {**found, "l_core": core + n - total}

        least = 3 if self.l_core is None and self.n_layers is not None else 1 + total - core
        return replace(decoder_dials(self), depth=Dial(total, depth, least))

    @property
    def depth_law(self) -> DepthLaw:
        return DepthLaw(self.mean_recurrence, self.lognorm_var, self.r_max)

    @property
    def eval_depth(self) -> int:
        return self.eval_recurrence or self.mean_recurrence

    @property
    def state_std(self) -> float:
        return STATE_STD if self.s0_std == "auto" else self.s0_std

    def problems(self, run: RunConfig) -> list[str]:
        found = self.control.problems(run) + ReadingConfig.problems(self, run)
        prelude, core, coda = self.parts
        if core < 1:
            found.append(
                f"model_cfg.n_layers ({self.n_layers}) leaves no core between model_cfg.l_p ({prelude}) and "
                f"model_cfg.l_c ({coda}). Nearest: n_layers={prelude + coda + 1}"
            )
        if self.r_max is not None and self.r_max < self.mean_recurrence:
            found.append(
                f"model_cfg.r_max ({self.r_max}) is below model_cfg.mean_recurrence ({self.mean_recurrence}): "
                f"almost every step would take r_max, and the depth is to vary. Nearest: "
                f"r_max={self.mean_recurrence}, or mean_recurrence={self.r_max}"
            )
        if core >= 1 and self.n_layers not in (None, total := prelude + core + coda):
            fitting = self.n_layers - prelude - coda
            found.append(
                f"model_cfg.l_p + model_cfg.l_core + model_cfg.l_c ({prelude} + {core} + {coda} = {total}) must be "
                f"model_cfg.n_layers ({self.n_layers}). Nearest: n_layers={total} or n_layers=null"
                + (f", or l_core={fitting}" if fitting >= 1 else "")
            )
        return found


class Attention(VanillaAttention):
    """The control's, with biases of queries and keys alone, and pairs of neighbouring dims that turn."""

    interleaved = True

    def __init__(self, cfg: RDConfig, layer: int) -> None:
        super().__init__(cfg.control, layer)
        self.q_proj, self.k_proj = (nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.qk_bias) for _ in range(2))


class Block(nn.Module):
    """x <- n2(x + attention(n1(x))), x <- n4(x + mlp(n3(x))): what leaves a sum is normalised too, so that a core may
    run any number of times (section 3.2). The residual stream keeps its dtype."""

    def __init__(self, cfg: RDConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm, self.attn_sum_norm, self.mlp_norm, self.mlp_sum_norm = (
            RMSNorm(cfg.d_model, cfg.norm_eps) for _ in range(4)
        )
        self.self_attn = Attention(cfg, layer)
        self.mlp = MLP(cfg.control)

    def forward(self, x: Tensor, plan: Plan, rotation: Rotation, cache: Turn | None = None) -> Tensor:
        x = self.attn_sum_norm.stream(x, self.self_attn(self.attn_norm(x), plan, rotation, cache))
        return self.mlp_sum_norm.stream(x, self.mlp(self.mlp_norm(x)))


class RD(Decoder):
    Config = RDConfig
    cfg: RDConfig

    def __init__(self, cfg: RDConfig) -> None:
        super().__init__(cfg)
        rows = padded_vocabulary(self.vocab_size)
        self.embed_tokens = nn.Embedding(rows, cfg.d_model)
        layers = iter(range(sum(cfg.parts)))
        self.prelude, self.core, self.coda = (
            nn.ModuleList(self.new_block(next(layers)) for _ in range(number)) for number in cfg.parts
        )
        concat = cfg.adapter_mode == "concat"
        self.adapter = nn.Linear(2 * cfg.d_model, cfg.d_model, bias=False) if concat else None
        self.norm = self.new_norm()  # gc: in front of the coda, and once more behind it
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, rows, bias=False)

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: RecurrentCache | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        recurrences: int | None = None,
        retained: int | None = None,
        seeds: Tensor | None = None,
        also_after: tuple[int, ...] = (),
    ) -> Hidden:
        """As `Decoder.forward`. `recurrences`: r, None = `eval_recurrence`. `retained`: gradients go back through the
        last so many iterations, None = all; those before are run without a graph, so that memory does not depend on r.
        `seeds` (B,) or (1,) int64, of the state's noise (`start`). `also_after`: other numbers of recurrences, whose
        hidden states (B, T, D) are `Hidden.extra`'s `states_after(r)`. What is compiled are blocks, once with a graph
        and once without: another r compiles nothing.

        `Hidden.extra["change"]` (B, T): how far the last iteration moved a state, in units of its length.
        """
        depth = recurrences or self.cfg.eval_depth
        assert cache is None or depth <= self.cfg.eval_depth, (
            "a cache has room for eval_recurrence iterations"
        )
        if retained is None and not self.cfg.reads_plainly:
            return self._read(tokens, doc_ids, cache, depth, seeds, also_after)
        assert cache is None or not also_after, "a cache holds one depth"
        e, shared = self.embed(tokens, doc_ids, cache, cu_seqlens)
        before = s = self.start(e, 0 if cache is None else cache.length, seeds)
        kept_from = 0 if retained is None else depth - retained
        extra: dict[str, Tensor] = {}
        for i in range(max(depth, *also_after, 0)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= kept_from):
                before, s = s, self.recur(s, e, shared, _turn(cache, i))
            if i + 1 == depth:
                hidden, extra["change"] = (
                    self.decode(s, shared, _turn(cache)),
                    state_change(before.detach(), s.detach()),
                )
            if i + 1 in also_after:
                extra[states_after(i + 1)] = self.decode(s, shared)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return Hidden(hidden, extra)

    def _read(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None,
        cache: RecurrentCache | None,
        depth: int,
        seeds: Tensor | None,
        also_after: tuple[int, ...],
    ) -> Hidden:
        """As `forward`, heeding what `ReadingConfig` offers; `also_after` is of all tokens alike all the same."""
        found = read(self, tokens, doc_ids, cache, depth=depth, seeds=seeds)
        if also_after:
            plain = self(
                tokens, doc_ids, recurrences=also_after[0], retained=0, seeds=seeds, also_after=also_after
            )
            found.extra |= {name: plain.extra[name] for name in map(states_after, also_after)}
        return found

    # -- the parts of a forward pass --------------------------------------------------------------------------------

    def embed(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None,
        cache: Cache | None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Shared]:
        """What is injected into every iteration, e (B, T, D), and what all blocks share."""
        past = self.check_input(tokens, doc_ids, cache, learned=False)
        shared = self.shared(tokens, past, doc_ids, cu_seqlens)
        return self.inject(tokens, shared, _turn(cache)), shared

    def inject(self, tokens: Tensor, shared: Shared, cache: Turn | None = None) -> Tensor:
        """tokens (B, T) -> e (B, T, D)."""
        x = self.embed_tokens(tokens) * math.sqrt(self.cfg.d_model)
        return through(self.prelude, x, shared, cache)[0]

    def start(self, like: Tensor, past: int, seeds: Tensor | None) -> Tensor:
        """s_0 (B, T, D), of the dtype of `like`, of tokens behind `past` others: noise, N(0, sigma^2) cut off at 3
        sigma, that is a function of a row's seed, the position in the window and the dim. seeds (B,) int64; (1,) for
        all rows, as where rows must not depend on each other; None = a fixed one for all."""
        rows, tokens, width = like.shape
        if seeds is None:
            seeds = torch.zeros(1, dtype=torch.int64, device=like.device)
        noise = hashed_normal(seeds, 0, past * width, tokens * width, BOUND)
        return (self.cfg.state_std * noise).to(like.dtype).view(-1, tokens, width).expand(rows, -1, -1)

    def recur(self, s: Tensor, e: Tensor, shared: Shared, cache: Turn | None = None) -> Tensor:
        """One iteration: s_{i-1} (B, T, D) -> s_i, of the dtype of e. `cache`: of this iteration."""
        x = s + e if self.adapter is None else self.adapter(torch.cat((s, e), dim=-1)).to(e.dtype)
        return through(self.core, x, shared, cache)[0]

    def decode(self, s: Tensor, shared: Shared, cache: Turn | None = None) -> Tensor:
        """A state (B, T, D) -> hidden (B, T, D), which the head reads."""
        x, _ = through(self.coda, self.norm.stream(s), shared, cache)
        return self.norm(x)

    def shared(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Shared:
        """The plan of attention and the rotation. `mask`: as in `Visible`."""
        table = self.embedding_weight
        index = torch.arange(past, past + tokens.shape[1], device=tokens.device)  # (T,)
        rotation = rotary_tables(index, self.cfg.control.head_width, self.cfg.rope_theta, table.dtype)
        visible = Visible.causally(tokens, past, doc_ids=doc_ids, cu_seqlens=cu_seqlens)
        visible = visible if mask is None else replace(visible, mask=mask)
        plan = plan_attention(visible, dtype=compute_dtype(table), kernels=self.kernels, **self._heads)
        return plan, rotation

    @property
    def _heads(self) -> dict[str, Any]:
        return {"heads": (self.cfg.n_heads, self.cfg.n_heads), "width": self.cfg.control.head_width}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        return {"attention": attention_call(training_facts(seq_len), **self._heads)}

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed_tokens.weight

    def init_cache(self, rows: int, turns: int | None = None, drafting: bool = False) -> RecurrentCache:
        """An entry of each block outside of the core, and of those of the core one for each of `turns` iterations (None
        = `eval_recurrence`), no more than `kv_budget`. `drafting`: of the coda's blocks one for drafts too."""
        prelude, core, coda = self.cfg.parts
        turns = turns or self.cfg.eval_depth
        slots = min(turns, self.cfg.kv_budget or turns)
        return RecurrentCache([1] * prelude + [slots] * core + [2 if drafting else 1] * coda, rows)

    @property
    def core_places(self) -> range:
        """Of the core's blocks, in a cache."""
        prelude, core, _ = self.cfg.parts
        return range(prelude, prelude + core)

    @property
    def no_drafts(self) -> str:
        """Why tokens cannot be drafted with fewer recurrences and verified together; "" where they can."""
        c = self.cfg
        if c.one_by_one:
            return f"model_cfg.{c.one_by_one} reads tokens one by one: drafts cannot be verified together"
        if c.draft_depth >= c.eval_depth:
            return (
                f"drafts take fewer recurrences than text: model_cfg.draft_recurrence, {c.draft_depth}, would have to "
                f"be below model_cfg.eval_recurrence, {c.eval_depth}"
            )
        return ""

    @property
    def max_drafts(self) -> int:
        return 0 if self.no_drafts else MAX_DRAFTS

    def init_drafter(self, rows: int, drafts: int) -> DepthDrafter:
        return DepthDrafter(self, rows)

    # -- parameters -------------------------------------------------------------------------------------------------

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> RMSNorm:
        return RMSNorm(self.cfg.d_model, self.cfg.norm_eps)

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        """Normal with std sqrt(2 / 5D), cut off at 3 std; what ends a branch, and the factor of its gate, smaller by
        sqrt(2l) for the l blocks that a token passes at the mean depth; biases 0, gains 1 (section 4.1, after Takase et
        al. 2023)."""
        prelude, core, coda = self.cfg.parts
        passed = prelude + coda + core * self.cfg.mean_recurrence
        std = math.sqrt(2 / (5 * self.cfg.d_model))
        for name, module in part.named_modules():
            if isinstance(module, RMSNorm):
                module.init_weights()
            elif isinstance(module, nn.Linear | nn.Embedding):
                small = name.endswith(("o_proj", "down_proj", "up_proj"))
                truncated_normal_(
                    module.weight, std / math.sqrt(2 * passed) if small else std, BOUND, generator
                )
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> list[str]:
        parts = zip(("prelude", "core", "coda"), self.cfg.parts, strict=True)
        return [f"{part}.{layer}" for part, number in parts for layer in range(number)]

    @property
    def kept_passes(self) -> int:
        """Passes through a block that a step's backward goes back through, at most."""
        prelude, core, coda = self.cfg.parts
        return prelude + coda + core * self.cfg.depth_law.deepest(self.cfg.k_trunc)

    def passes(self, path: str) -> float:
        return float(self.cfg.mean_recurrence) if path.startswith("core.") else 1.0

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        """What is looked up is multiplied by sqrt(D), so that the rate of its entries shrinks with that."""
        return [
            Rule(r"embed_tokens\.weight", "embedding", width_power=0.5),
            Rule(r"lm_head\.weight", "head"),
            Rule(r"adapter\.weight", "matrix", width=2 * self.cfg.d_model),
            Rule(r".*(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight", "matrix"),
            Rule(r"(.*_)?norm\.weight|.*\.bias", "scalar"),
        ]

    def block_flops(self, seq_len: int) -> Flops:
        return block_flops(self.cfg.control, seq_len)

    def flops(self, seq_len: int, recurrences: int | None = None) -> Flops:
        """Of a training step of so many recurrences; None = of the mean over what is drawn, and scores and text at
        `eval_recurrence`. Iterations without a graph have no backward."""
        c, law = self.cfg, self.cfg.depth_law
        prelude, core, coda = c.parts
        block = self.block_flops(seq_len)
        once = block * (prelude + coda) + matmul_flops(self.head_weight.numel())
        turn = block * core
        if self.adapter is not None:
            turn += matmul_flops(self.adapter.weight.numel())
        if recurrences is not None:
            kept = min(c.k_trunc, recurrences)
            return once + turn * kept + turn.frozen * (recurrences - kept)
        kept_mean = law.expected(c.k_trunc)
        training = once + turn * kept_mean + turn.frozen * (law.expected() - kept_mean)
        reading = once + turn * c.eval_depth
        return replace(
            training, forward_per_token=reading.forward_per_token, masked_forward=reading.masked_forward
        )


def _turn(cache: Any, i: int = 0) -> Turn | None:
    """Keys of iteration i, and of what runs once."""
    return None if cache is None else cache.turn(i)
