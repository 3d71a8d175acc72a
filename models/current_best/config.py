"""The fields of `current_best_gpt`, and what follows from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from configs.match import Dial, SizeDials, decoder_dials
from configs.schema import (
    DefaultModelConfig,
    Fraction,
    Free,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Rate,
    RunConfig,
)
from models.current_best.layout import LEAST_SKIPPING, Layout, Stretch
from models.current_best.records import HEAD_WIDTH, RECORDS, STAGES, VOCABULARY, Stage

__all__ = ["CurrentBestConfig"]

DENSE, OFF = "dense", "off"
LONGEST_DENSE = 2048  # tokens from which on attention to everything is refused
SCORING_BLOCKS = 20  # of the long window of record89, beyond its last stage
GATES_FROM, LATE, LINK = 4, 7, 3  # layers of record89: gates from its own input; c_7; c_3
LAST_STATE = -0.5  # what the mix behind the last layer begins with, of c_7

Layers = list[NonNegative]


class CurrentBestConfig(DefaultModelConfig):
    """null means what the record sets; the properties of the same meaning say what that is here."""

    record: Literal["record89", "record26"] = "record89"
    n_ctx: Positive = 2048
    n_heads: Positive = 6
    n_layers: Positive | None = None  # type: ignore[assignment]
    ffn_hidden: Positive | None = None
    attn_skip_layers: Layers | None = None
    attn_scale_init: Rate | None = None
    rope_style: Literal["half_truncated", "full"] = "half_truncated"
    rope_layout: Literal["pair", "half"] | None = None
    yarn_windows: bool | None = None
    window_pattern: str | None = None
    window_schedule: Literal["stages", "linear", "constant"] | None = None
    window_unit: Positive = 128
    key_offset: Literal["long", "off"] | None = None
    paired_head_layers: Layers | None = None
    value_embeds: NonNegative | None = None
    value_embed_layers: Layers | None = None
    ve_gate: bool | None = None
    unet_skips: bool | None = None
    x0_inject: Literal["gated", "scalar", "off"] | None = None
    resid_lambda_init: Rate | Literal["off"] | None = None
    post_lambdas: bool | None = None
    skip_link: Layers | None = None
    late_attn_source: Layers | None = None
    mudd: bool | None = None
    mudd_gate: bool | None = None
    xsa_layers: Layers | None = None
    attn_gate_layers: Layers | None = None
    dc_layers: Layers | None = None
    dc_window: Positive = 112
    smear: bool | None = None
    bigram_vocab_size: NonNegative | None = None
    bigram_dim: Positive | None = None
    bigram_sign_rows: NonNegative | None = None
    logit_softcap: list[NonNegativeFloat] | None = None
    tie_until: Fraction | None = None
    mtp_weights: Free[list[NonNegativeFloat] | None] = None
    prefix_weights: Free[NonNegativeFloat | None] = None
    pad_in_loss: Free[bool] = False
    adam_every: Free[Positive | None] = None
    mask_shifts_at_docs: bool = True

    tiny = {"window_unit": 4, "dc_window": 6, "adam_every": 1}
    examples = {
        "attn_skip_layers": [0],
        "window_pattern": "SL",
        "paired_head_layers": [],
        "value_embed_layers": [1],
        "skip_link": [],
        "late_attn_source": [0, 1],
        "xsa_layers": [],
        "attn_gate_layers": [],
        "dc_layers": [],
        "logit_softcap": [],
        "mtp_weights": [1.0, 0.5],
        "resid_lambda_init": "off",
        "tie_until": 0.0,
        "adam_every": 2,
    }
    rare = {
        "mask_shifts_at_docs": "rows of these tests are one document each",
        "prefix_weights": "no letter begins with another",
        "value_embeds": "tables are fewer than layers that read them",
    }

    def of(self, name: str) -> Any:
        """A field's own value, or the record's."""
        own = getattr(self, name)
        return RECORDS[self.record][name] if own is None else own

    # -- sizes -------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        return self.of("n_layers")

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    @property
    def hidden_width(self) -> int:
        return self.ffn_hidden or 4 * self.d_model

    def size_dials(self) -> SizeDials:
        return replace(decoder_dials(self), depth=Dial(self.depth, lambda n: {"n_layers": n}))

    @property
    def scale_of_scores(self) -> float:
        """Of queries and keys of root mean square 1: the record's for its heads of 128, so that scores of narrower ones
        spread as much."""
        if self.attn_scale_init is not None:
            return self.attn_scale_init
        return self.of("attn_scale_init") * (HEAD_WIDTH / self.head_width) ** 0.5

    @property
    def bigram_rows(self) -> int:
        """The record's has 7.5 rows for each of the vocabulary's."""
        assert self.vocab_size is not None
        if self.bigram_vocab_size is not None:
            return self.bigram_vocab_size
        return self.of("bigram_vocab_size") * _padded(self.vocab_size) // VOCABULARY

    @property
    def bigram_width(self) -> int:
        return self.bigram_dim or self.d_model

    @property
    def sign_rows(self) -> int:
        """Of 0 nothing is multiplied by signs. Two ids below a power of two differ in less than it."""
        assert self.vocab_size is not None
        if self.bigram_sign_rows is not None:
            return self.bigram_sign_rows
        return min(8192, 1 << max(1, (self.vocab_size - 1).bit_length()))

    @property
    def softcap(self) -> list[float]:
        """[A, B, C], or [] for none."""
        if self.logit_softcap is None and self.record == "record26":
            a, b, c = self.of("logit_softcap")
            return [a, b, c * self.d_model**0.5]
        return self.of("logit_softcap")

    # -- stages ------------------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[Stage]:
        schedule = self.of("window_schedule")
        if schedule == "constant":
            own = STAGES[RECORDS[self.record]["window_schedule"]][-1]
            return [own._replace(start=0.0)]
        return STAGES[schedule]

    def window(self, blocks: int) -> int:
        """Tokens before its own that a token sees: no more than a context has."""
        return min(blocks * self.window_unit, self.n_ctx)

    @property
    def scoring_windows(self) -> tuple[int, int]:
        """(short, long): of the last stage; record89 widens the long one."""
        last = self.stages[-1]
        long = SCORING_BLOCKS if self.of("yarn_windows") else last.long
        return self.window(last.short), self.window(max(last.long, long))

    @property
    def dense(self) -> bool:
        return self.of("window_pattern") == DENSE

    @property
    def offsets_keys(self) -> bool:
        """In layers of the long window, of dims that do not turn: there are none where all do."""
        return self.of("key_offset") == "long" and self.rope_style == "half_truncated"

    # -- which layer does what -------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        return _layout(self)

    def problems(self, run: RunConfig) -> list[str]:
        from models.current_best.problems import problems

        return super().problems(run) + problems(self, run)

    def unread(self) -> dict[str, str]:
        from models.current_best.problems import unread

        return {**super().unread(), **unread(self)}


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // 128) * 128


def _layout(cfg: CurrentBestConfig) -> Layout:
    record = RECORDS[cfg.record]
    stretch = Stretch(record["n_layers"], cfg.depth)
    of_record89 = Stretch(RECORDS["record89"]["n_layers"], cfg.depth)

    def layers(name: str, without: Any = ()) -> list[int]:
        own = getattr(cfg, name)
        return stretch.all(record[name], without) if own is None else list(own)

    skipping = layers("attn_skip_layers")
    if cfg.attn_skip_layers is None and cfg.depth < LEAST_SKIPPING:
        skipping = []
    paired, xsa, composed = _apart(cfg, stretch, skipping)
    with_values = layers("value_embed_layers", skipping)
    tables = max(1, min(cfg.of("value_embeds"), len(with_values))) if cfg.of("value_embeds") else 0
    return Layout(
        depth=cfg.depth,
        skipping=tuple(skipping),
        long=_long(cfg, stretch, skipping),
        paired=tuple(paired),
        xsa=tuple(xsa),
        gated=tuple(layers("attn_gate_layers", skipping)),
        composed=tuple(composed),
        tables={layer: n % tables for n, layer in enumerate(with_values)} if tables else {},
        skip=_skip(layers("skip_link") if cfg.skip_link is None else cfg.skip_link),
        late=_late(layers("late_attn_source"), skipping),
        gates_from=max(1, of_record89(GATES_FROM)),
        **_mixes(cfg, of_record89),
    )


def _apart(cfg: CurrentBestConfig, stretch: Stretch, skipping: list[int]) -> tuple[list[int], ...]:
    """Layers of paired heads, and of exclusive attention and composed heads, of which a paired one has neither: where
    the record's lists meet, the nearer place has the layer, and what is given has it in any case."""
    names = ("paired_head_layers", "xsa_layers", "dc_layers")
    record = {name: RECORDS[cfg.record][name] for name in names}
    found = {name: stretch.all(record[name], skipping) for name in names}
    pairs = names[0]
    for other in ("dc_layers", "xsa_layers"):
        for layer in set(found[pairs]) & set(found[other]):
            nearer = stretch.away(layer, record[pairs]) < stretch.away(layer, record[other])
            found[other if nearer else pairs].remove(layer)
    given = {name: list(own) for name in names if (own := getattr(cfg, name)) is not None}
    for name, layers in given.items():
        for other in names[1:] if name == pairs else names[:1]:
            if other not in given:
                found[other] = [layer for layer in found[other] if layer not in layers]
    return tuple((found | given)[name] for name in names)


def _long(cfg: CurrentBestConfig, stretch: Stretch, skipping: list[int]) -> tuple[int, ...]:
    pattern = cfg.of("window_pattern")
    if pattern == DENSE:
        return tuple(layer for layer in range(cfg.depth) if layer not in skipping)
    long = [layer for layer, kind in enumerate(pattern) if kind == "L"]
    return tuple(long if cfg.window_pattern is not None else stretch.all(long, skipping))


def _skip(pair: list[int]) -> tuple[int, int] | None:
    """A layer cannot add what it or a later one returns."""
    return (pair[0] + 1, pair[1]) if len(pair) == 2 and pair[0] < pair[1] else None


def _late(found: list[int], skipping: list[int]) -> tuple[int, tuple[int, ...]] | None:
    if not found:
        return None
    source, *readers = found
    readers = [layer for layer in readers if layer > source and layer not in skipping]
    return (source + 1, tuple(readers)) if readers else None


def _mixes(cfg: CurrentBestConfig, stretch: Stretch) -> dict[str, Any]:
    """States that dense connections read, each once: those that exist, and are not what reads them."""
    if not cfg.of("mudd"):
        return {"mixed": (), "exit_mix": ()}
    last = cfg.depth - 1
    late, link = (stretch(layer) + 1 for layer in (LATE, LINK))
    mixed = tuple(b for b in dict.fromkeys((0, late)) if b < last)
    starts = {0: 0.0}
    for boundary, start in ((late, LAST_STATE), (last, 0.0), (link, 0.0)):
        if boundary <= last:
            starts.setdefault(boundary, start)
    return {"mixed": mixed, "exit_mix": tuple(starts.items())}
