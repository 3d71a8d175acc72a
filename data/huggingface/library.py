"""Hugging Face's `tokenizers` library, made to take text for text: what it is given, and what its vocabulary means."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import DataError
from data.huggingface.spelling import BYTE_TOKEN, lead_of, speller, without_lead

__all__ = ["Vocabulary", "backends", "library"]

UNKNOWN = "\ufffd"  # what a token for everything unknown stands for


def library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "a tokenizer of transformers is run by the library 'tokenizers', which is not installed: "
            'pip install -e ".[hf]"'
        ) from error
    return tokenizers


def backends(content: dict[str, Any], special: Iterable[int]) -> tuple[Any, Any]:
    """The library's tokenizer of a tokenizer.json for whole texts, and the one for text behind other text, which puts
    no blank in front.

    It adds nothing to a text, cuts nothing off, draws nothing, and reads the literal of a special token as text;
    `special` are ids that are special besides those that the file marks.

    Raises:
        DataError: the library cannot read it, or an id is not in it.
    """
    if not isinstance(content.get("model"), dict):
        raise DataError('tokenizer.json: there is no "model" in it: not a file of the library tokenizers.')
    plain = {"truncation": None, "padding": None, "post_processor": None}
    whole = _read({**content, **plain, "model": {**content["model"], **_without_draws(content["model"])}})
    for index in special:
        if (token := whole.id_to_token(index)) is None:
            raise DataError(f"tokenizer.json: there is no token of id {index}.")
        whole.add_special_tokens([library().AddedToken(token, normalized=False, special=True)])
    parts = {name: part(whole, name) for name in ("normalizer", "pre_tokenizer")}
    unled = {name: without_lead(found) for name, found in parts.items()}
    if unled == parts:
        return whole, whole
    inside = _read({**json.loads(whole.to_str()), **unled})
    return whole, inside


def part(backend: Any, name: str) -> dict[str, Any] | None:
    """A component as the library writes it."""
    found = getattr(backend, name)
    return None if found is None else json.loads(found.__getstate__())


def _without_draws(model: dict[str, Any]) -> dict[str, None]:
    return {"dropout": None} if "dropout" in model else {}


def _read(content: dict[str, Any]) -> Any:
    tokenizers = library()
    try:
        found = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"tokenizer.json: the library tokenizers {tokenizers.__version__} cannot read it: {error}."
        ) from error
    found.encode_special_tokens = True
    return found


@dataclass(frozen=True)
class Vocabulary:
    """`spelled`: the bytes of each id, none for special tokens and for ids that are no token. `special`: the ids that
    text never becomes, by their literals. `lead`: as in `data.tokenizers.Tokenizer`."""

    spelled: list[bytes]
    special: dict[str, int]
    lead: bytes

    @classmethod
    def of(cls, backend: Any, model: dict[str, Any], ends: frozenset[int]) -> Vocabulary:
        """`model`: that of the tokenizer.json, as the library does not show all of it."""
        names = ("normalizer", "pre_tokenizer", "decoder")
        normalizer, pre_tokenizer, decoder = (part(backend, name) for name in names)
        spell = speller(decoder, pre_tokenizer)
        ids = backend.get_vocab(with_added_tokens=True)
        added, unknown = backend.get_added_tokens_decoder(), _unknown(model, backend)
        special = {
            token.content: index
            for index, token in sorted(added.items())
            if index in ends or (token.special and index != unknown and not _is_byte(model, token.content))
        }
        spelled = [b""] * (max(ids.values()) + 1)
        for token, index in ids.items():
            if index == unknown:
                spelled[index] = spell(UNKNOWN)
            elif index in added and not _is_byte(model, token):
                spelled[index] = token.encode()
            else:
                spelled[index] = spell(token)
        for index in special.values():
            spelled[index] = b""
        return cls(spelled, special, lead_of(normalizer, pre_tokenizer, decoder))

    def byte_ids(self) -> np.ndarray | None:
        """(256,) the id of each byte beyond ASCII (0 for the others); None where one has none."""
        ids = {token: index for index, token in enumerate(self.spelled) if len(token) == 1}
        beyond = [bytes([value]) for value in range(0x80, 0x100)]
        if any(byte not in ids for byte in beyond):
            return None
        return np.array([0] * 0x80 + [ids[byte] for byte in beyond], dtype=np.int64)


def _is_byte(model: dict[str, Any], token: str) -> bool:
    return bool(model.get("byte_fallback")) and BYTE_TOKEN.fullmatch(token) is not None


def _unknown(model: dict[str, Any], backend: Any) -> int | None:
    """The id of what the vocabulary cannot write."""
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else backend.token_to_id(token)
