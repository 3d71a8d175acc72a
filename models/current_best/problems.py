"""What cannot be together, and what means nothing beside something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.current_best.config import DENSE, LONGEST_DENSE, OFF

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from models.current_best.config import CurrentBestConfig

__all__ = ["problems", "unread"]

LISTS = (
    "attn_skip_layers",
    "paired_head_layers",
    "value_embed_layers",
    "xsa_layers",
    "attn_gate_layers",
    "dc_layers",
    "skip_link",
    "late_attn_source",
)
NEED_ATTENTION = ("paired_head_layers", "value_embed_layers", "xsa_layers", "attn_gate_layers", "dc_layers")


def problems(cfg: CurrentBestConfig, run: RunConfig) -> list[str]:
    found = [*_lists(cfg)]
    if found or cfg.d_model % cfg.n_heads:
        return found
    return [*_heads(cfg), *_windows(cfg, run), *_numbers(cfg), *_together(cfg)]


def _lists(cfg: CurrentBestConfig) -> list[str]:
    """Of layers that there are not, twice, or in a wrong order."""
    found = []
    for name in LISTS:
        given = getattr(cfg, name)
        if given is None:
            continue
        if outside := [layer for layer in given if layer >= cfg.depth]:
            found.append(
                f"model_cfg.{name} ({given}) names layer {outside[0]} of {cfg.depth}, counted from 0. Nearest: "
                f"{[layer for layer in given if layer < cfg.depth]}"
            )
        elif len(set(given)) < len(given):
            found.append(
                f"model_cfg.{name} ({given}) names a layer twice. Nearest: {[*dict.fromkeys(given)]}"
            )
    for name, least, words in (
        ("skip_link", 2, "[source, layer that adds it]"),
        ("late_attn_source", 2, "[source, layers whose attention reads it ...]"),
    ):
        given = getattr(cfg, name)
        wrong = given and (
            len(given) < least or (name == "skip_link" and len(given) != 2) or min(given[1:]) <= given[0]
        )
        if wrong:
            found.append(
                f"model_cfg.{name} ({given}) must be {words}, which lie behind the source. Nearest: [] for none"
            )
    return found


def _heads(cfg: CurrentBestConfig) -> list[str]:
    found = []
    step = 4 if cfg.rope_style == "half_truncated" else 2
    if cfg.head_width % step:
        below, above = (cfg.n_heads * (cfg.head_width // step + n) * step for n in (0, 1))
        nearest = ", ".join(str(width) for width in (below, above) if width)
        found.append(
            f"model_cfg.d_model / model_cfg.n_heads ({cfg.d_model} / {cfg.n_heads} = {cfg.head_width}) must be a "
            f"multiple of {step} with rope_style={cfg.rope_style}; nearest d_model: {nearest}"
        )
    if cfg.layout.paired and cfg.n_heads % 2:
        found.append(
            f"model_cfg.n_heads ({cfg.n_heads}) must be even where layers ({[*cfg.layout.paired]}) pair their heads. "
            f"Nearest: n_heads={cfg.n_heads + 1}, or paired_head_layers=[]"
        )
    return found


def _windows(cfg: CurrentBestConfig, run: RunConfig) -> list[str]:
    pattern, found = cfg.window_pattern, []
    longest = max(run.train_seq_len, run.val_seq_len or 0)
    if cfg.dense and longest >= LONGEST_DENSE:
        found.append(
            f"model_cfg.window_pattern={DENSE}: rows of {longest} tokens are attended to in windows here; below "
            f"{LONGEST_DENSE} they need not be. Nearest: null for the record's"
        )
    elif not cfg.dense and longest >= LONGEST_DENSE and cfg.window(cfg.stages[-1].short) >= longest - 1:
        found.append(
            f"model_cfg.window_unit ({cfg.window_unit}): a short window of {cfg.stages[-1].short} blocks sees all of a "
            f"row of {longest} tokens; below {LONGEST_DENSE} it may. Nearest: "
            f"window_unit={max(1, (longest - 2) // cfg.stages[-1].short)}"
        )
    if pattern not in (None, DENSE) and (len(pattern) != cfg.depth or set(pattern) - set("SL-")):
        nearest = "".join("-" if n in cfg.layout.skipping else "S" for n in range(cfg.depth))
        found.append(
            f"model_cfg.window_pattern ({pattern!r}) must be a letter for each of {cfg.depth} layers: S short, L "
            f"long, - none, or {DENSE} for no windows. Nearest: {nearest}"
        )
    elif pattern not in (None, DENSE) and (
        wrong := [n for n, kind in enumerate(pattern) if (kind == "-") != (n in cfg.layout.skipping)]
    ):
        found.append(
            f"model_cfg.window_pattern ({pattern!r}) and model_cfg.attn_skip_layers ({[*cfg.layout.skipping]}) differ "
            f"about layer {wrong[0]}: - is a layer without attention"
        )
    return found


def _numbers(cfg: CurrentBestConfig) -> list[str]:
    found = []
    cap = cfg.logit_softcap
    if cap and (len(cap) != 3 or not cap[0] or not cap[2]):
        found.append(
            f"model_cfg.logit_softcap ({cap}) must be [A, B, C] of A sigmoid((z + B) / C), A and C positive. Nearest: "
            f"[23.0, 5.0, 7.5], or [] for none"
        )
    weights = cfg.of("mtp_weights")
    if not weights or not weights[0]:
        found.append(
            f"model_cfg.mtp_weights ({weights}) must begin with the next token's, which is not 0. Nearest: [1.0]"
        )
    if cfg.bigram_vocab_size == 1:
        found.append(
            "model_cfg.bigram_vocab_size (1) leaves no row to hash to: the last is for tokens without one before. "
            "Nearest: 2, or 0 for no table"
        )
    if cfg.bigram_dim is not None and cfg.bigram_dim > cfg.d_model:
        found.append(
            f"model_cfg.bigram_dim ({cfg.bigram_dim}) must not exceed model_cfg.d_model ({cfg.d_model}). Nearest: "
            f"{cfg.d_model}"
        )
    return found


def _together(cfg: CurrentBestConfig) -> list[str]:
    layout, found = cfg.layout, []
    if cfg.record == "record26" and cfg.of("tie_until"):
        found.append(
            f"model_cfg.tie_until ({cfg.tie_until}): embedding and head of record26 begin apart and are stepped at "
            "rates of their own. Nearest: 0, or record=record89"
        )
    if gone := [n for n in NEED_ATTENTION if set(getattr(cfg, n) or ()) & set(layout.skipping)]:
        found.append(
            f"model_cfg.{gone[0]} ({getattr(cfg, gone[0])}) names a layer without attention (attn_skip_layers: "
            f"{[*layout.skipping]})"
        )
    for name, layers in (("xsa_layers", layout.xsa), ("dc_layers", layout.composed)):
        if both := sorted(set(layers) & set(layout.paired)):
            found.append(
                f"model_cfg.{name} ({[*layers]}) and model_cfg.paired_head_layers ({[*layout.paired]}) share layer "
                f"{both[0]}: paired heads have none. Nearest: take it out of one"
            )
    if cfg.of("mudd") and cfg.depth - 1 in layout.skipping:
        found.append(
            f"model_cfg.mudd mixes what attention of the last layer ({cfg.depth - 1}) reads, and attn_skip_layers "
            f"({[*layout.skipping]}) takes that away. Nearest: mudd=false"
        )
    if cfg.of("key_offset") == "long" and cfg.rope_style == "full" and cfg.key_offset is not None:
        found.append(
            "model_cfg.key_offset=long moves the dims of keys that do not turn, and with rope_style=full all turn. "
            "Nearest: key_offset=off"
        )
    return found


def unread(cfg: CurrentBestConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    if cfg.dense:
        found |= dict.fromkeys(("yarn_windows", "window_schedule", "window_unit"), f"window_pattern={DENSE}")
    if not cfg.layout.composed:
        found["dc_window"] = "dc_layers=[]"
    if cfg.vocab_size is not None and not cfg.bigram_rows:
        found |= dict.fromkeys(("bigram_dim", "bigram_sign_rows"), "bigram_vocab_size=0")
    if not cfg.layout.tables:
        found |= dict.fromkeys(("ve_gate", "value_embeds"), "value_embed_layers=[]")
    if cfg.rope_style == "full":
        found["key_offset"] = "rope_style=full"
    if cfg.of("x0_inject") == OFF and not any(
        (cfg.layout.xsa, cfg.layout.gated, cfg.layout.composed, cfg.layout.skip)
    ):
        found["mudd_gate"] = "no layer has gates"
    return found
