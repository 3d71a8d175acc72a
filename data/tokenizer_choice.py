"""What `tokenizer: <spec>` means: one of `data.TOKENIZERS`, the file of one or its folder, or `auto`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data import CACHE_FORMAT, SOURCES, TOKENIZERS
from data.config import DataConfig, Unit
from data.errors import DataError
from naming import did_you_mean, expand_path, load

if TYPE_CHECKING:
    from data.corpus import Corpus
    from data.tokenizers import Tokenizer

AUTO = "auto"
BYTE = "byte"


@dataclass(frozen=True)
class Choice:
    """`kind`: a row of `TOKENIZERS`, trained to `size` ids if it is a sized one. None: `spec` is a file."""

    spec: str
    kind: str | None
    size: int | None = None


def choose(cfg: DataConfig, unit: Unit = "token") -> tuple[Choice, str]:
    """The tokenizer of a run and, where `auto` left it open, why it is that one.

    Raises:
        DataError: no such kind, size or file; or it makes tokens and the architecture reads bytes.
    """
    if cfg.tokenizer != AUTO:
        choice = _parse(cfg.tokenizer)
        if unit == "byte" and choice.kind != BYTE:
            raise DataError(
                f"tokenizer: '{cfg.tokenizer}' makes tokens, and this architecture reads bytes. "
                f"Set tokenizer={BYTE}, or {AUTO}"
            )
        return choice, ""
    if unit == "byte":
        return _parse(BYTE), "as this architecture reads bytes"
    source = SOURCES[cfg.data]
    said = getattr(cfg, source.tokenizer_field) if source.tokenizer_field else None
    if not said and source.tokenizer_file:
        said = load(source.tokenizer_file)(cfg)
    return _parse(said or source.tokenizer), source.tokenizer_why


def tokenizer_of(spec: str, cache: Path) -> Tokenizer:
    """The one that a spec names by itself, without a text that it is trained on.

    Raises:
        DataError: no such kind or file, or one that is trained on a text.
    """
    choice = _parse(spec)
    if choice.kind is not None and TOKENIZERS[choice.kind].trained:
        raise DataError(
            f"tokenizer: '{spec}' is trained on a text. Name the file of one: a run holds its own"
        )
    return _untrained(choice, cache)


def vocabulary_size(cfg: DataConfig, unit: Unit = "token") -> int:
    """Ids of the tokenizer that `cfg` names, before there is one."""
    choice, _ = choose(cfg, unit)
    if choice.kind is None:
        return _load(choice).vocab_size
    return TOKENIZERS[choice.kind].load().vocabulary_size(choice.size)


def make_tokenizer(cfg: DataConfig, unit: Unit, corpus: Corpus, cache: Path, notes: list[str]) -> Tokenizer:
    """The tokenizer itself, trained on the training split where its kind is trained; `cache` keeps it.

    What `auto` came to, and what had to be repaired, is added to `notes`.
    """
    choice, why = choose(cfg, unit)
    try:
        tokenizer = _make(choice, corpus, cache, notes)
    except DataError as error:
        if cfg.tokenizer != AUTO:
            raise
        tokenizer, why = _make(_parse(BYTE), corpus, cache, notes), f"as the text is small ({error})"
    if cfg.tokenizer == AUTO:
        notes.append(f"tokenizer auto: {tokenizer.name}, {why}")
    return tokenizer


def _parse(spec: str) -> Choice:
    named = {kind: row for kind, row in TOKENIZERS.items() if row.named}
    name, _, size = spec.rpartition("-")
    if spec in named and not named[spec].sized:
        return Choice(spec, spec)
    if name in named and named[name].sized and size.isdecimal():
        named[name].load().vocabulary_size(int(size))  # refuses a size that it cannot have
        return Choice(spec, name, int(size))
    if _file(spec).is_file():
        return Choice(spec, None)
    digits = re.search(r"\d*$", spec)
    size = digits[0] if digits and digits[0] else "1024"
    spellings = [f"{kind}-<N>" if row.sized else kind for kind, row in named.items()]
    near = did_you_mean(spec.lower(), [AUTO, *(s.replace("<N>", size) for s in spellings)])
    raise DataError(
        f"tokenizer: '{spec}' is not one of {', '.join([AUTO, *spellings])}, and there is no such file.{near}"
    )


def _make(choice: Choice, corpus: Corpus, cache: Path, notes: list[str]) -> Tokenizer:
    if choice.kind is None or not TOKENIZERS[choice.kind].trained:
        return _untrained(choice, cache)
    factory = TOKENIZERS[choice.kind].load()
    from data.chats.store import spoken
    from data.chats.template import ChatTemplate
    from data.corpus import Texts
    from data.mix_texts import told, weighted
    from data.tokenizers import ByteTokenizer, load_tokenizer

    # Of large texts a part is learned from, which is chosen by what documents are called, of `Texts` by what they say.
    chosen_by = "-by-text" if isinstance(corpus.train, Texts) else ""
    path = cache / "tokenizers" / f"{choice.spec}-{told(corpus)[0][:16]}{chosen_by}-v{CACHE_FORMAT}.json"
    if path.exists():
        try:
            tokenizer = load_tokenizer(path)
            if choice.size in (None, tokenizer.vocab_size):
                return tokenizer
        except DataError as error:
            notes.append(f"rebuilt a damaged cache file: {error}")
    # One of a given size keeps what is frequent.
    text = weighted(corpus) if TOKENIZERS[choice.kind].sized else corpus.train
    if corpus.chats:
        text = spoken(corpus.train, ChatTemplate(ByteTokenizer()))
    trained = factory.train(text, choice.size)
    try:
        trained.save(path)
    except OSError as error:
        notes.append(f"the tokenizer could not be cached: {error}")
    return trained


def _untrained(choice: Choice, cache: Path) -> Tokenizer:
    if choice.kind is None:
        return _load(choice)
    row = TOKENIZERS[choice.kind]
    return row.load().fetch(cache) if row.published else row.load()()


def _load(choice: Choice) -> Tokenizer:
    from data.tokenizers import load_tokenizer

    return load_tokenizer(_file(choice.spec))


def _file(spec: str) -> Path:
    """A file, or that of a run's folder, a checkpoint's or a model's of transformers."""
    path = expand_path(spec)
    return path / "tokenizer.json" if path.is_dir() else path
