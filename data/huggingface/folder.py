"""The tokenizer of a model's folder as transformers writes it: tokenizer.json, and which token starts a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.huggingface.tokenizer import HuggingFaceTokenizer
from naming import shorten

__all__ = ["read_huggingface_tokenizer"]

# Where a role of a token is named: by its text in the tokenizer's own files, by its id in those of the model.
NAMED_IN = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERED_IN = ("generation_config.json", "config.json")
OTHER_FORMS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model", "tekken.json")
NOT_KEPT = ("auto_map", "name_or_path", "tokenizer_file", "vocab_file", "merges_file")  # of that folder alone


def read_huggingface_tokenizer(folder: str | Path, vocab_size: int | None = None) -> HuggingFaceTokenizer:
    """The tokenizer of a folder. A document starts with its BOS if it has one, else with its EOS; a text that is being
    generated ends at either.

    The tokenizer's own files say what it has, `null` included; where they are silent, the model's ids do, if they are
    those of added tokens.

    Args:
        vocab_size: rows of the model's embedding; ids must be below it.

    Raises:
        DataError: there is no tokenizer.json, it cannot be read, an id is beyond `vocab_size`, or no token is named.
    """
    folder = Path(folder)
    content = _read(folder / "tokenizer.json", _how_to_make_one(folder))
    files = {name: _read(folder / name) for name in (*NAMED_IN, *NUMBERED_IN) if (folder / name).exists()}
    try:
        ids = _ids(content)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise DataError(
            f"{folder / 'tokenizer.json'}: its vocabulary is not as the library tokenizers writes it."
        ) from None
    if vocab_size is not None:
        _require_below(vocab_size, ids, folder)
    starts, ends = (_Role(role, folder, content, files, ids).found() for role in ("bos", "eos"))
    if not (starts or ends):
        added = list(_added(content))
        raise DataError(
            f"{str(folder)!r}: neither a BOS nor an EOS token is named, and one must stand between documents. Set "
            f'"eos_token" in {folder / "tokenizer_config.json"} to a token of tokenizer.json '
            f"({f'added tokens: {shorten(added)}' if added else 'it has no added tokens'})."
        )
    eot = (starts or ends)[0]
    try:
        return HuggingFaceTokenizer(content, eot, ends, _config(folder, files, ids, eot, ends))
    except DataError as error:
        raise DataError(f"{str(folder)!r}: {error}") from error


class _Role:
    """Which tokens play a role, "bos" or "eos", by the files of a folder."""

    def __init__(
        self, role: str, folder: Path, content: dict[str, Any], files: dict[str, Any], ids: dict[str, int]
    ):
        self.role, self.folder, self.files, self.ids = role, folder, files, ids
        self.added = set(_added(content).values())

    def found(self) -> list[int]:
        """The ids, that of the tokenizer first; none where it has no such token."""
        key = f"{self.role}_token"
        told = [(name, self.files[name][key]) for name in NAMED_IN if key in self.files.get(name, {})]
        named = [self._id(name, text) for name, text in told if text is not None]
        # A tokenizer without BOS says null, whatever its model's config has there. Texts have further ends.
        numbered = [] if told and self.role == "bos" else list(self._numbered())
        return list(dict.fromkeys([*named, *numbered]))

    def _id(self, name: str, token: Any) -> int:
        text = _text(token)
        if isinstance(text, int) and text in self.ids.values():
            return text
        if not isinstance(text, str) or text not in self.ids:
            raise DataError(
                f"{self.folder / name}: {self.role}_token is {text!r}, which is no token of tokenizer.json. Add "
                f"it there (save_pretrained of transformers does), or name another."
            )
        return self.ids[text]

    def _numbered(self) -> Iterator[int]:
        for name in NUMBERED_IN:
            given = self.files.get(name, {}).get(f"{self.role}_token_id")
            # Defaults of a config's class stand there too, and mean nothing for a vocabulary of another.
            yield from (i for i in (given if isinstance(given, list) else [given]) if i in self.added)


def _config(
    folder: Path, files: dict[str, Any], ids: dict[str, int], eot: int, ends: list[int]
) -> dict[str, Any]:
    """What tokenizer_config.json says, completed by what stands in other files, so that it says it alone."""
    texts = {index: token for token, index in ids.items()}
    template = folder / "chat_template.jinja"
    found = {
        "bos_token": texts[eot],
        "eos_token": texts[(ends or [eot])[0]],
        **files.get("special_tokens_map.json", {}),
        **({"chat_template": template.read_text(encoding="utf-8")} if template.exists() else {}),
    }
    found |= files.get("tokenizer_config.json", {})
    return {name: _text(value) for name, value in found.items() if name not in NOT_KEPT}


def _text(value: Any) -> Any:
    """A token as its text alone: how it is found stands in tokenizer.json."""
    if isinstance(value, list):
        return [_text(one) for one in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _ids(content: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json and its id."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [token, score]
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    return {**(vocabulary or {}), **_added(content)}


def _added(content: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in content.get("added_tokens") or []}


def _require_below(vocab_size: int, ids: dict[str, int], folder: Path) -> None:
    token, highest = max(ids.items(), key=lambda item: item[1], default=("", -1))
    if highest >= vocab_size:
        raise DataError(
            f"{folder / 'tokenizer.json'}: {token!r} is id {highest}, and the model has {vocab_size} rows "
            f"(vocab_size of {folder / 'config.json'}), for ids 0 to {vocab_size - 1}. The tokenizer is "
            f"another model's, or the embedding was not resized when the token was added (resize_token_embeddings of "
            f"transformers)."
        )


def _read(path: Path, missing: str = "") -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(missing) from error
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"{str(path)!r} is not a JSON file: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{str(path)!r} must hold a JSON object, and holds a {type(found).__name__}.")
    return found


def _how_to_make_one(folder: Path) -> str:
    others = [name for name in OTHER_FORMS if (folder / name).exists()]
    there = f"only {', '.join(others)}" if others else "nor any other form of a tokenizer"
    return (
        f'{str(folder)!r} has no tokenizer.json, {there}. transformers makes one: python -c "from transformers import '
        f"AutoTokenizer; AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )
