"""The lineage of the NanoGPT speedrun at two of its records (github.com/KellerJordan/modded-nanogpt, track 1).

A decoder with normalised queries and keys and squared ReLU, to which dozens of people added what made it reach one loss
in less time: looked-up vectors of token pairs and of values, sliding windows that grow, pairs of heads as one, later
layers that read and mix earlier states, attention without its own value. Each is a field with an off value
(`models/current_best/config.py`); with all of them off it is a plain decoder.

Shapes: B rows, T tokens, D width, H heads, h = D/H head width, V_p padded vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import Plan, Visible, attention_call, plan_attention, training_facts
from kernels.precision import at_least_fp32, compute_dtype
from kernels.softcap import SigmoidCap, Softcap
from models.current_best.attention import Rotation, Shared, composed_keys
from models.current_best.block import Block, Given, PlainNorm
from models.current_best.config import CurrentBestConfig
from models.current_best.embeddings import Bigrams, Previous, Smear, previous, tied
from models.current_best.gates import SCALE, Gates, Mudd, Wanted
from models.current_best.records import RECORDS
from models.current_best.rules import rules
from models.current_best.stages import rotation_of, shares
from models.layers.cache import StateCache, WindowedKVCache
from models.layers.decoder import Decoder, padded_vocabulary
from models.layers.flops import Flops, decoder_flops, mean_keys
from models.layers.init import normal_
from models.layers.roles import Rule

__all__ = ["CurrentBestGPT"]

HEAD_STD, TABLE_STD = 0.005, 0.01


def _see_whether_parted(model: CurrentBestGPT, _: Any) -> None:
    """A run that goes on for longer than it was to go would be before the split again."""
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    model.parted = not embedding.is_meta and not torch.equal(embedding, head)


class CurrentBestGPT(Decoder):
    Config = CurrentBestConfig
    cfg: CurrentBestConfig

    lm_head: nn.Linear
    frequencies: Tensor  # (r/2,) of the present stage
    score_scale: Tensor  # ()

    def __init__(self, cfg: CurrentBestConfig) -> None:
        super().__init__(cfg)
        self.layout, rows = cfg.layout, padded_vocabulary(self.vocab_size)
        self.embed_tokens = nn.Embedding(rows, cfg.d_model)
        self.lm_head = nn.Linear(cfg.d_model, rows, bias=False)
        self.smear = Smear(cfg.d_model) if cfg.of("smear") else None
        self.bigrams = None
        if cfg.bigram_rows:
            self.bigrams = Bigrams(cfg.bigram_rows, cfg.bigram_width, cfg.sign_rows)
        tables = 1 + max(self.layout.tables.values(), default=-1)
        self.value_tables = nn.ModuleList(nn.Embedding(rows, cfg.d_model) for _ in range(tables))
        self.early_gates, self.late_gates = self._gates(early=True), self._gates(early=False)
        dynamic = cfg.of("mudd_gate") and (self.early_gates or self.late_gates)
        self.gate_scale = nn.Parameter(torch.empty(())) if dynamic else None
        self.layers = nn.ModuleList(self.new_block(layer) for layer in range(cfg.depth))
        mixed = len(self.layout.exit_mix) + (tables > 0)
        self.exit = Mudd(cfg.d_model, self._exit_starts()) if mixed and cfg.of("mudd") else None
        self.norm = self.new_norm()
        omega, _ = rotation_of(cfg, 0)
        self.register_buffer("frequencies", torch.empty(len(omega)))
        self.register_buffer("score_scale", torch.empty(()))
        self.logit_softcap: Softcap | None = SigmoidCap(*cfg.softcap) if cfg.softcap else None
        self.tied = False  # whether this step's embedding and head get the gradients of both
        self.parted = False  # weights were loaded in which they are not one any more
        self.register_load_state_dict_post_hook(_see_whether_parted)
        self.stage = 0

    def _exit_starts(self) -> list[float]:
        starts = [start for _, start in self.layout.exit_mix]
        return [*starts, 0.0] if len(self.value_tables) else starts

    def _gates(self, early: bool) -> Gates | None:
        cfg, layout = self.cfg, self.layout
        wanted = []
        for layer in range(cfg.depth):
            if (layer < layout.gates_from) == early:
                wanted += self._wanted(layer)
        return Gates(cfg.d_model, wanted, cfg.of("mudd_gate")) if wanted else None

    def _wanted(self, layer: int) -> list[Wanted]:
        cfg, layout, heads = self.cfg, self.layout, self.cfg.n_heads
        attends = layer not in layout.skipping
        # The last layer has those of the residual stream from its own mix, but for what enters layer 0.
        own = cfg.of("mudd") and layer == cfg.depth - 1
        kinds = {
            "xsa": (layer in layout.xsa, heads, 0.0),
            "gate": (layer in layout.gated, heads, 0.25),
            "x0": (attends and not own and cfg.of("x0_inject") == "gated", 1, 0.0),
            "bigram": (attends and (not own or layer == 0) and cfg.bigram_rows > 0, 1, 0.05),
            "skip": (layout.skip is not None and layout.skip[1] == layer, 1, 0.5),
            "read": (layer in layout.composed, heads, 1.0),
            "write": (layer in layout.composed, heads, 0.0),
        }
        return [Wanted(kind, layer, n, start) for kind, (has, n, start) in kinds.items() if has]

    # -- the forward pass ------------------------------------------------------------------------------------------

    @property
    def stack(self) -> tuple[nn.ModuleList, nn.Module]:
        return self.layers, self.norm

    def run_stack(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: StateCache | None = None,  # type: ignore[override]
        cu_seqlens: Tensor | None = None,
        **drawn: Any,
    ) -> tuple[Tensor, tuple[Any, ...], dict[str, Tensor]]:
        """While embedding and head are one in two, the head that the loss is to use is told: "head" (V_p, D)."""
        past = self.check_input(tokens, doc_ids, cache, learned=False)
        before = previous(tokens, doc_ids, cache, self.cfg.mask_shifts_at_docs)
        table, told = self.embed_tokens.weight, {}
        if self.tied and self.training and torch.is_grad_enabled():
            table, told["head"] = tied(table, self.lm_head.weight)
        shared = self._shared(tokens, past, doc_ids, cu_seqlens, before)
        x = self._run(self._first_state(tokens, before, table), tokens, before, shared, cache)
        if cache is not None:
            cache["token"] = tokens[:, -1:]
            cache["keys"].advance(tokens.shape[1])
            cache["pairs"].advance(2 * tokens.shape[1])
            cache.advance(tokens.shape[1])
        return x, (shared,), told

    def _first_state(self, tokens: Tensor, before: Previous, table: Tensor) -> Tensor:
        e = F.embedding(tokens, table)  # (B, T, D)
        if self.smear is not None:
            e = self.smear(e, F.embedding(before.tokens, table), before.exists)
        return self.norm(e).to(e.dtype)

    def _run(
        self, x0: Tensor, tokens: Tensor, before: Previous, shared: Shared, cache: StateCache | None
    ) -> Tensor:
        layout, half = self.layout, self.cfg.depth // 2
        values = [table(tokens) for table in self.value_tables]  # (B, T, D) each
        gates = {} if self.early_gates is None else self.early_gates(x0, self.gate_scale)
        bigram, x = None, x0
        if self.bigrams is not None:
            bigram = self.bigrams(tokens, before)
            bigram = F.pad(bigram, (0, x0.shape[-1] - bigram.shape[-1]))
            if "bigram" in gates.get(0, {}):
                x = x + gates[0]["bigram"] * bigram
        states = {0: x}
        outputs: list[Tensor] = []
        for layer, block in enumerate(self.layers):
            if layer == layout.gates_from and self.late_gates is not None:
                gates |= self.late_gates(x, self.gate_scale)
            given = Given(
                x0,
                bigram,
                values[layout.tables[layer]] if layer in layout.tables else None,
                states[layout.skip[0]] if layout.skip is not None and layout.skip[1] == layer else None,
                states[layout.late[0]] if layout.late is not None and layer in layout.late[1] else None,
                tuple(states[boundary] for boundary in layout.mixed) if layer == layout.depth - 1 else (),
                gates.get(layer, {}),
            )
            unet = None
            if self.cfg.of("unet_skips") and layer >= layout.depth - half:
                unet = outputs.pop()
            x = block(x, given, unet, shared, cache)
            if self.cfg.of("unet_skips") and layer < half:
                outputs.append(x)
            if layer + 1 in layout.kept:
                states[layer + 1] = x
        return self._mixed_out(x, states, values)

    def _mixed_out(self, x: Tensor, states: dict[int, Tensor], values: list[Tensor]) -> Tensor:
        if self.exit is None:
            return x
        sources = [states[boundary] for boundary, _ in self.layout.exit_mix] + values[:1]
        numbers = self.exit(x).split(1, dim=-1)
        for number, source in zip(numbers, sources, strict=True):
            x = x + number * source
        return x

    # -- what layers share -----------------------------------------------------------------------------------------

    @property
    def windows(self) -> tuple[int | None, int | None]:
        """(short, long), tokens that a token sees, itself among them: of the step's stage in training, and of the last
        stage in scores and text. None: all."""
        if self.cfg.dense:
            return None, None
        return self._windows(self.stage) if self.training else self._scoring_windows

    def _windows(self, stage: int) -> tuple[int, int]:
        blocks = self.cfg.stages[stage]
        return self.cfg.window(blocks.short) + 1, self.cfg.window(blocks.long) + 1

    @property
    def _scoring_windows(self) -> tuple[int, int]:
        short, long = self.cfg.scoring_windows
        return short + 1, long + 1

    def _shared(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        before: Previous,
    ) -> Shared:
        cfg, layout = self.cfg, self.layout
        short, long = self.windows
        kinds = {
            (layer in layout.paired, layer in layout.long)
            for layer in range(cfg.depth)
            if layer not in layout.skipping
        }

        def plan(paired: bool, of_long: bool) -> Plan | None:
            if (paired, of_long) not in kinds:
                return None
            return self._plan(tokens, past, doc_ids, cu_seqlens, paired, long if of_long else short)

        omega = self.frequencies
        where = torch.arange(past, past + tokens.shape[1], device=tokens.device)  # (T,)
        paired_rotation = None
        if layout.paired:
            heads = torch.arange(cfg.n_heads, device=tokens.device) % 2
            paired_rotation = self._rotation((2 * where[:, None] + heads).flatten())
        ones = omega.new_ones(cfg.head_width)
        return Shared(
            plain=plan(False, False),
            long=plan(False, True),
            paired=plan(True, False),
            paired_long=plan(True, True),
            rotation=self._rotation(where),
            paired_rotation=paired_rotation,
            gains=(ones * self.score_scale, ones),
            standing=self._standing(tokens.device),
            exists=before.exists,
            doc_ids=doc_ids,
        )

    def _rotation(self, where: Tensor) -> Rotation:
        """Of places (N,): what is left of the dims beside the frequencies stands still."""
        omega = self.frequencies.to(at_least_fp32(self.frequencies.dtype))
        if self.cfg.of("rope_layout") == "half":
            omega = F.pad(omega, (0, self.cfg.head_width // 2 - len(omega)))
        angles = where.to(omega.dtype)[:, None, None] * omega  # (N, 1, r/2)
        return Rotation(angles.cos(), angles.sin())

    def _plan(
        self,
        tokens: Tensor,
        past: int,
        doc_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        paired: bool,
        window: int | None,
    ) -> Plan:
        heads = self.cfg.n_heads
        if paired:
            heads, past, tokens = heads // 2, 2 * past, tokens.repeat_interleave(2, 1)
            doc_ids = None if doc_ids is None else doc_ids.repeat_interleave(2, 1)
            cu_seqlens = None if cu_seqlens is None else 2 * cu_seqlens
        past = past if window is None else min(past, window - 1)  # what the cache still has
        visible = Visible.causally(tokens, past, window=window, doc_ids=doc_ids, cu_seqlens=cu_seqlens)
        return plan_attention(
            visible,
            dtype=compute_dtype(self.embed_tokens.weight),
            heads=(heads, heads),
            width=self.cfg.head_width,
            kernels=self.kernels,
            scale=1.0,  # queries have the scale in them
        )

    def _standing(self, device: torch.device) -> Tensor:
        """(h,) bool: the dims of a head that do not turn."""
        width, turning = self.cfg.head_width, len(self.frequencies)
        dims = torch.arange(width, device=device)
        if self.cfg.of("rope_layout") == "half":
            return dims % (width // 2) >= turning
        return dims >= 2 * turning

    def set_stage(self, stage: int) -> None:
        """Windows of training, and the rotation, of a stage of the run."""
        self.stage = stage
        self._set_rotation()

    @torch.no_grad()
    def _set_rotation(self) -> None:
        omega, scale = rotation_of(self.cfg, self.stage)
        if not self.frequencies.is_meta:
            self.frequencies.copy_(torch.tensor(omega, dtype=torch.float64), non_blocking=True)
            self.score_scale.copy_(torch.tensor(scale, dtype=torch.float64), non_blocking=True)

    def init_cache(self, rows: int) -> StateCache:
        """Keys and values of layers, as many as their windows and composed heads see, those of paired heads by
        themselves, as they have two for each token; the last token, and in layers whose keys are offset its key."""
        like, cfg, layout = self.embed_tokens.weight, self.cfg, self.layout
        short, long = self.windows
        windows = [long if layer in layout.long else short for layer in range(cfg.depth)]
        plain = [max(w, cfg.dc_window) if w and n in layout.composed else w for n, w in enumerate(windows)]
        key = like.new_zeros(rows, 1, self.cfg.n_heads, self.cfg.head_width)
        offset = {f"key_{n}": key for n, block in enumerate(self.layers) if block.offsets_keys}
        return StateCache(
            keys=WindowedKVCache(plain, rows),
            pairs=WindowedKVCache(windows, rows),
            token=torch.zeros(rows, 1, dtype=torch.int64, device=like.device),
            **offset,
        )

    # -- what the trainer asks -------------------------------------------------------------------------------------

    @property
    def embedding_weight(self) -> Tensor:
        return self.embed_tokens.weight

    def new_block(self, layer: int) -> nn.Module:
        return Block(self.cfg, layer)

    def new_norm(self) -> nn.Module:
        return PlainNorm()

    def init_part(self, part: nn.Module, generator: torch.Generator) -> None:
        for module in part.children() if part is self else [part]:
            for each in module if isinstance(module, nn.ModuleList) else [module]:
                if isinstance(each, Block | Gates | Mudd | Bigrams):
                    each.init_weights(generator)
                elif isinstance(each, Smear):
                    each.init_weights()
        if part is self:
            self._init_tables(generator)

    @torch.no_grad()
    def _init_tables(self, generator: torch.Generator) -> None:
        """record89: the head N(0, 0.005^2) and the embedding equal to it, tables of values N(0, 0.01^2); record26: the
        head 0, tables N(0, 1)."""
        old = self.cfg.record == "record26"
        if old:
            nn.init.zeros_(self.lm_head.weight)
            normal_(self.embed_tokens.weight, 1.0, generator)
        else:
            normal_(self.lm_head.weight, HEAD_STD, generator)
            self.embed_tokens.weight.copy_(self.lm_head.weight)
        for table in self.value_tables.parameters():
            normal_(table, 1.0 if old else TABLE_STD, generator)
        if self.gate_scale is not None:
            self.gate_scale.fill_(SCALE)
        self._set_rotation()

    def blocks(self) -> list[str]:
        return [f"layers.{layer}" for layer in range(self.cfg.depth)]

    lora_targets = ("qkv_proj", "o_proj")

    def param_roles(self) -> list[Rule]:
        return rules(self.cfg)

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        _, long = self._windows(0) if not self.cfg.dense else (None, None)
        heads = self.cfg.n_heads
        facts = training_facts(seq_len, window=long)
        return {"attention": attention_call(facts, heads=(heads, heads), width=self.cfg.head_width)}

    @property
    def twins(self) -> tuple[str, ...]:
        """Parameters that are one matrix with another when a run begins."""
        return ("lm_head.weight",) if self.cfg.of("tie_until") else ()

    def active_parameters(self) -> int:
        """Those that multiply: tables are looked up."""
        return sum(p.numel() for p in self.parameters()) - self.looked_up

    @property
    def looked_up(self) -> int:
        tables = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        return sum(table.weight.numel() for table in tables)

    @property
    def notes(self) -> tuple[str, ...]:
        cfg, record = self.cfg, RECORDS[self.cfg.record]
        pair = self.lm_head.weight.numel() if self.twins else 0
        found = [
            f"{self.looked_up - pair:,} of the parameters are looked up alone, {self.active_parameters():,} multiply"
        ]
        if until := cfg.of("tie_until"):
            found.append(
                f"embedding and head begin as one matrix of {pair:,}, for the first {until:.1%} of a run's steps, and "
                f"are counted so; behind them both learn on: {pair:,} parameters more"
            )
        if cfg.depth != record["n_layers"]:
            found.append(
                f"the {record['n_layers']} layers of {cfg.record} laid over {cfg.depth}: {self.layout.in_words()}"
            )
        return tuple(found)

    def flops(self, seq_len: int) -> Flops:
        """Of a training step on average over the stages of a run, of a score by the windows of its last."""
        if self.cfg.dense:
            return self._flops(seq_len, None, None)
        stages = self.cfg.stages
        scoring = self._flops(seq_len, *self._scoring_windows)
        training = Flops(0.0, 0.0)
        for stage, share in enumerate(shares(stages)):
            training = training + self._flops(seq_len, *self._windows(stage)) * share
        return replace(
            training,
            forward_per_token=scoring.forward_per_token,
            masked_forward=scoring.masked_forward,
        )

    def _flops(self, seq_len: int, short: int | None, long: int | None) -> Flops:
        cfg, layout, width = self.cfg, self.layout, self.cfg.d_model
        keys: list[float] = []
        plain: list[float] = []
        for layer in range(cfg.depth):
            if layer in layout.skipping:
                continue
            window = long if layer in layout.long else short
            # Paired, half as many heads have twice as many places.
            places = 2 * seq_len if layer in layout.paired else seq_len
            keys.append(mean_keys(places, window))
            plain.append(places)
            if layer in layout.composed:
                keys.append(mean_keys(seq_len, cfg.dc_window))
                plain.append(composed_keys(seq_len, cfg.dc_window))
        weights = self._multiplied()
        return decoder_flops(weights, keys, width, plain)

    def _multiplied(self) -> int:
        """Weights of matrices that a token is multiplied with."""
        found = self.lm_head.weight.numel()
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.lm_head:
                found += module.weight.numel()
        return found
