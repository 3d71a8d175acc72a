"""Which implementation of attention `auto` takes, and what each of them cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kernels import CHUNKED, REFERENCE
from kernels.attention import flex, offsets
from kernels.attention.chunked import plain_is_faster
from kernels.attention.visible import LONG, MAX_PLAIN_KEYS, NARROW
from kernels.choose import Call

__all__ = ["choose", "refused_by_flex", "refused_by_sdpa", "refused_by_varlen"]

SDPA, VARLEN, FLEX, FLASH_ATTN = "sdpa", "varlen", "flex", "flash_attn"
MASKED = {"documents", "window", "mask", "block diffusion"}


def refused_by_sdpa(call: Call) -> str | None:
    if "softcap" in call.facts:
        return "torch's scaled_dot_product_attention has no softcap"
    if "dropout of all" in call.facts:
        return "torch's scaled_dot_product_attention takes dropout below 1"
    return None


def refused_by_varlen(call: Call) -> str | None:
    for fact in ("softcap", "dropout"):
        if fact in call.facts:
            return f"torch's varlen_attn has no {fact}"
    return offsets.refusal(call.facts, call.columns)


def refused_by_flex(call: Call) -> str | None:
    if "dropout" in call.facts:
        return "FlexAttention has no dropout"
    if 0 < call.columns < flex.MIN_WIDTH:
        return f"FlexAttention computes heads of at least {flex.MIN_WIDTH}, and these have {call.columns}"
    return None


def choose(call: Call, lacking: Callable[[str], str]) -> tuple[str, str]:
    """(implementation, why). `lacking` says of an implementation why it cannot run the call, "" if it can."""
    ways = _on_a_gpu(call) if call.device.type == "cuda" else _elsewhere(call)
    passed = ""
    for name, why in ways:
        if not (missing := lacking(name)):
            return name, f"{why}{passed}"
        passed += f"; not {name}: {missing}"
    return REFERENCE, f"the plain definition{passed}"


def _on_a_gpu(call: Call) -> Iterator[tuple[str, str]]:
    """Kernels without a mask first: they read nothing that nobody sees."""
    facts = set(call.facts)
    behind_a_cache = {"cache", "causal"} <= facts and "one query" not in facts
    unmasked = not facts & MASKED and not behind_a_cache
    if unmasked:
        yield SDPA, "no mask: torch's fused kernels, cuDNN's from Hopper on"
    elif (
        "cache" not in facts
    ):  # what is decoded is one short query after another: nothing worth preparing for
        yield VARLEN, "documents and windows as offsets: FlashAttention without a mask"
        if "mask" not in facts:
            yield FLEX, "FlexAttention: tiles in which nothing is seen are skipped"
        yield FLASH_ATTN, "documents and windows as offsets: the package flash-attn"
    if not unmasked:
        yield SDPA, "torch's fused kernels that take a mask"
    elif "cache" not in facts:
        yield FLEX, "FlexAttention"
        yield FLASH_ATTN, "the package flash-attn"
    yield CHUNKED, "blocks of queries in plain operations"


def _elsewhere(call: Call) -> Iterator[tuple[str, str]]:
    facts = set(call.facts)
    if "block diffusion" in facts:
        yield CHUNKED, "groups of queries that see the same keys"
    decoding = "one query" in facts and "causal" in facts
    if plain_is_faster(call.device, call.dtype) and LONG not in facts and not decoding:
        yield CHUNKED, f"up to {MAX_PLAIN_KEYS} keys plain products are faster"
    if call.device.type == "cpu" and NARROW in facts and not decoding:
        yield CHUNKED, "blocks of queries, each with the keys of their windows"
    if call.device.type == "cpu" and "dropout" in facts:
        yield CHUNKED, "with dropout the library writes down all scores at once"
    yield SDPA, "torch's fused attention"
    yield CHUNKED, "blocks of queries in plain operations"
