"""What each token of a foreign tokenizer stands for, in bytes.

Its decoder is a chain of steps over whole texts. Each of those that language models use is a step over single tokens,
but for the blank that a text begins with (`lead`), so that text can be decoded piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import regex

from data.errors import DataError
from data.huggingface.alphabet import byte_string
from naming import not_one_of

__all__ = ["BYTE_TOKEN", "lead_of", "speller", "without_lead"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback
Step = Callable[[str], str]
Part = dict[str, Any] | None  # a component as tokenizer.json holds it


def speller(decoder: Part, pre_tokenizer: Part) -> Callable[[str], bytes]:
    """A function from a token to its bytes. A tokenizer without a decoder is read by how it cuts text.

    Raises:
        DataError: a decoder has a step that is not known.
    """
    chain = _chain(decoder, pre_tokenizer)
    unknown = [step["type"] for step in chain if step["type"] not in _STEPS]
    if unknown:
        raise DataError(f"tokenizer.json: decoder {not_one_of(unknown[0], sorted(_STEPS))}")
    of_bytes = any(step["type"] == "ByteLevel" for step in chain)
    fallback = any(step["type"] == "ByteFallback" for step in chain)
    steps = [_STEPS[step["type"]](step) for step in chain]

    def spell(token: str) -> bytes:
        if fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for step in steps:
            token = step(token)
        return byte_string(token) if of_bytes else token.encode()

    return spell


def lead_of(normalizer: Part, pre_tokenizer: Part, decoder: Part) -> bytes:
    """The blank that stands before every text once it was encoded, or nothing."""
    puts = any(_puts_blank(step) for part in (normalizer, pre_tokenizer) for step in _steps(part))
    takes = any(_takes_blank(step) for step in _chain(decoder, pre_tokenizer))
    return b" " if puts or takes else b""


def without_lead(part: Part) -> Part:
    """A normalizer or pre-tokenizer that puts no blank before a text. Where it cuts into words first, the blank stands
    before each of them, and stays: the texts that are not to have one begin behind a line."""
    steps = [step for step in _steps(part) if step["type"] != "Prepend"]
    words = next((n for n, step in enumerate(steps) if step["type"] in _WORDS), len(steps))
    kept = [_unled(step) if n < words else step for n, step in enumerate(steps)]
    if part is None or not kept:
        return None
    if part["type"] != "Sequence":
        return kept[0]
    return {**part, _NESTED[0] if _NESTED[0] in part else _NESTED[1]: kept}


_WORDS = ("WhitespaceSplit", "Whitespace", "BertPreTokenizer")
_NESTED = ("normalizers", "pretokenizers", "decoders")


def _steps(part: Part) -> list[dict[str, Any]]:
    """The components of a chain, chains within it resolved."""
    if part is None:
        return []
    nested = next((part[name] for name in _NESTED if name in part), None)
    return [part] if nested is None else [step for inner in nested for step in _steps(inner)]


def _chain(decoder: Part, pre_tokenizer: Part) -> list[dict[str, Any]]:
    if decoder is not None:
        return _steps(decoder)
    cuts = [step for step in _steps(pre_tokenizer) if step["type"] in ("ByteLevel", "Metaspace")]
    return cuts or [{"type": "Joined"}]


def _puts_blank(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Prepend" or (step["type"] == "ByteLevel" and step.get("add_prefix_space", True))


def _takes_blank(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] in ("WordPiece", "Joined") or (step["type"] == "Strip" and step["start"] > 0)


def _unled(step: dict[str, Any]) -> dict[str, Any]:
    never: dict[str, dict[str, Any]] = {
        "Metaspace": {"prepend_scheme": "never"},
        "ByteLevel": {"add_prefix_space": False},
    }
    return {**step, **never.get(step["type"], {})}


# -- steps of decoders, a token at a time ------------------------------------------------------------------------------


def _same(step: dict[str, Any]) -> Step:
    return lambda token: token


def _replace(step: dict[str, Any]) -> Step:
    pattern, content = step["pattern"], step["content"]
    if "String" in pattern:
        return lambda token: token.replace(pattern["String"], content)
    found = regex.compile(pattern["Regex"])
    return lambda token: found.sub(lambda _: content, token)


def _metaspace(step: dict[str, Any]) -> Step:
    return lambda token: token.replace(step["replacement"], " ")


def _word_piece(step: dict[str, Any]) -> Step:
    prefix = step["prefix"]
    return lambda token: token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"


def _suffixed(step: dict[str, Any]) -> Step:
    return lambda token: token.replace(step["suffix"], " ")


def _joined(step: dict[str, Any]) -> Step:
    return lambda token: f" {token}"


_STEPS: dict[str, Callable[[dict[str, Any]], Step]] = {
    "ByteLevel": _same,
    "ByteFallback": _same,
    "Fuse": _same,
    "Strip": _same,
    "Replace": _replace,
    "Metaspace": _metaspace,
    "WordPiece": _word_piece,
    "BPEDecoder": _suffixed,
    "Joined": _joined,  # no decoder: words with a blank between them
}
