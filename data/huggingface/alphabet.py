"""The byte alphabet of GPT-2 (Radford et al. 2019, `bytes_to_unicode`): a visible character for each of the 256 bytes,
so that a vocabulary of byte strings can be written as text."""

from __future__ import annotations

__all__ = ["ALPHABET", "byte_string", "spelled"]

_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [value for value in range(256) if value not in _VISIBLE]
_CHARACTERS = {value: chr(value) for value in _VISIBLE} | {b: chr(256 + n) for n, b in enumerate(_OTHERS)}
ALPHABET = "".join(_CHARACTERS[value] for value in range(256))  # the character of each byte
_BYTES = {character: value for value, character in enumerate(ALPHABET)}


def spelled(raw: bytes) -> str:
    """A byte string in the alphabet: b" a" is "Ġa"."""
    return "".join([ALPHABET[value] for value in raw])


def byte_string(token: str) -> bytes:
    """The bytes that a token in the alphabet stands for; a token with other characters stands for itself."""
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()
