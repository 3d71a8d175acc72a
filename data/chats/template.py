"""Chat templates: turns as text, as tokens, and which of these are learned.

A tokenizer of Hugging Face may bring a template in Jinja, which runs in a sandbox; others get ChatML. Special tokens
are what a template writes, never what a turn says: a literal one in a turn stays ordinary characters.

Learned are the characters of every assistant turn and the token that ends it. Where they stand is told, in this order,
by `{% generation %}` blocks of the template; by the text up to the turn, `messages[:i]` with the header of an answer,
and up to its end, `messages[:i + 1]`, if the first begins the second and this the whole; by marks around the turn's
content, if the template passes on what it is given. A token is learned if any of its characters is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from data.chats.messages import Message
from data.errors import DataError
from data.stream import utf8
from data.tokenizers import Tokenizer, spans_of, text_of

__all__ = ["ChatTemplate", "Encoded"]

# Noncharacters: of Unicode, and of no text. A shield parts a literal special token in a turn; marks say where something
# begins and ends.
SHIELD, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
_NONCHARACTERS = re.compile(f"[{SHIELD}{BEGIN}{END}]")
CHATML = ("<|im_start|>", "<|im_end|>")
UNLEARNED = -1  # in `Encoded.answers`
CHANGED = (
    "the tokenizer's chat template changes what turns say, so that it does not show where answers stand. Put "
    "{% generation %} and {% endgeneration %} around them in the template"
)


class Encoded(NamedTuple):
    """ids (L,); answers (L,) int32: bytes of an answer's content that each learned token holds, `UNLEARNED` elsewhere.
    The start token stands in neither."""

    ids: np.ndarray
    answers: np.ndarray


class _Answer(NamedTuple):
    """Characters of a rendered chat: what is learned, and of it what the turn itself says."""

    start: int
    end: int
    content: tuple[int, int]


class ChatTemplate:
    """The template of a tokenizer.

    Raises:
        DataError: its tokenizer brings one that is no Jinja.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._special = tokenizer.special_tokens
        spelled = sorted(self._special, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self.source = _source(tokenizer)
        self.name = "the tokenizer's chat template" if self.source else "ChatML"
        self._jinja = _compiled(self.source) if self.source else None
        self._blocks = bool(self.source and re.search(r"\{%[-+]?\s*generation\b", self.source))

    @cached_property
    def digest(self) -> str:
        """What tells this template, and how it is applied, from others."""
        return hashlib.sha256(f"3\0{self.source or 'chatml'}".encode()).hexdigest()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: special ones that are learned behind what it says."""
        found = self.encode([Message("user", "a"), Message("assistant", "b")])
        said = np.flatnonzero(found.answers > 0)
        behind = slice(said[-1] + 1 if len(said) else 0, None)
        learned = found.ids[behind][found.answers[behind] != UNLEARNED].tolist()
        return tuple(sorted({i for i in learned if i in self._special.values()} | self.tokenizer.ends))

    def text(self, chat: Sequence[Message]) -> str:
        """A chat as ordinary text, without special tokens: what a tokenizer is trained on."""
        return _bare(self._specials.sub("", self._render(chat)))

    def prompt(self, chat: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the next answer begins, without the start token."""
        return self._encode(self._render(chat, opens=True), []).ids.tolist()

    def opening(self, chat: Sequence[Message]) -> int:
        """How many ids of `prompt(chat)` stand before the first answer: all, where there is none. DataError as
        `encode`."""
        first = next((i for i, turn in enumerate(chat) if turn.role == "assistant"), None)
        learned = [] if first is None else self.encode(chat[: first + 1]).answers != UNLEARNED
        return int(np.argmax(learned)) if np.any(learned) else len(self.prompt(chat))

    def encode(self, chat: Sequence[Message]) -> Encoded:
        """A whole chat. DataError where the template refuses it, or does not show where its answers stand."""
        if self._blocks:
            rendered, answers = self._by_blocks(chat)
        else:
            rendered = self._render(chat)
            answers = self._by_prefixes(chat, rendered) or self._by_marks(chat, rendered)
        return self._encode(rendered, answers)

    # -- text ------------------------------------------------------------------------------------------------------

    def _render(self, chat: Sequence[Message], opens: bool = False) -> str:
        """With literal special tokens of turns shielded. `opens`: up to where an answer begins."""
        return self._fill([turn._replace(content=self._shielded(turn.content)) for turn in chat], opens)

    def _shielded(self, content: str) -> str:
        content = _NONCHARACTERS.sub("\ufffd", content)
        return self._specials.sub(lambda found: found[0][0] + SHIELD + found[0][1:], content)

    def _fill(self, chat: Sequence[Message], opens: bool = False) -> str:
        if self._jinja is None:
            return self._chatml(chat, opens)
        config = self.tokenizer.huggingface_config
        named = {key: value for key, value in config.items() if key.endswith("_token")}
        try:
            return self._jinja.render(
                messages=[turn._asdict() for turn in chat],
                add_generation_prompt=opens,
                tools=None,
                documents=None,
                **named,
            )
        except Exception as error:  # whatever a template raises; the sandbox refuses by errors of its own
            raise DataError(
                f"the tokenizer's chat template refuses a chat of {' '.join(turn.role for turn in chat) or 'no turn'}: "
                f"{' '.join(str(error).split())}"
            ) from error

    def _chatml(self, chat: Sequence[Message], opens: bool) -> str:
        """Where a vocabulary lacks its tokens, headers are ordinary text, and the end of a text ends a turn."""
        begin, end = CHATML
        if not all(token in self._special for token in CHATML):
            begin, end = begin[0] + SHIELD + begin[1:], self._end_of_text
        turns = [f"{begin}{turn.role}\n{turn.content}{end}\n" for turn in chat]
        return "".join([*turns, f"{begin}assistant\n" if opens else ""])

    @property
    def _end_of_text(self) -> str:
        """How the token is spelled that ends a text, or else starts one."""
        named = self.tokenizer.huggingface_config.get("eos_token")
        if named in self._special:
            return str(named)
        return next(text for text, index in self._special.items() if index == self.tokenizer.eot)

    # -- answers ---------------------------------------------------------------------------------------------------

    def _by_blocks(self, chat: Sequence[Message]) -> tuple[str, list[_Answer]]:
        """By `{% generation %}` blocks, which come out between marks; some end in front of the token that ends a turn,
        others behind the line that it ends."""
        rendered, marks = _unmarked(self._render(chat))
        spans = [(start, end) for start, end in marks if start is not None]
        contents = [self._shielded(turn.content) for turn in chat if turn.role == "assistant"]
        said = contents if len(contents) == len(spans) else [""] * len(spans)
        found = []
        for (start, end), words in zip(spans, said, strict=True):
            content = self._content(rendered, start, end, words)
            specials = list(self._specials.finditer(rendered, content[1], end))
            behind = self._behind(rendered, end)
            if specials:
                end = specials[-1].end()
            elif behind and behind[0] == self._closing:
                end = behind.end()
            found.append(_Answer(start, end, content))
        return rendered, found

    @cached_property
    def _closing(self) -> str:
        """The special token behind the answer with which a chat ends, "" where there is none."""
        try:
            rendered, spans = _unmarked(self._render([Message("user", "a"), Message("assistant", "b")]))
        except DataError:  # some templates take no such chat
            return ""
        found = self._behind(rendered, spans[-1][1]) if spans else None
        return found[0] if found else ""

    def _behind(self, whole: str, end: int) -> re.Match[str] | None:
        """A special token with no more than blanks in front of it."""
        return self._specials.match(whole, end + len(whole[end:]) - len(whole[end:].lstrip()))

    def _by_prefixes(self, chat: Sequence[Message], whole: str) -> list[_Answer] | None:
        """By the text up to each answer and up to its end; None where either does not begin the whole."""
        found = []
        for place, turn in enumerate(chat):
            if turn.role != "assistant":
                continue
            try:
                before = self._render(chat[:place], opens=True)
                behind = self._render(chat[: place + 1])
            except DataError:  # some templates take no chat that begins or ends so
                return None
            if not (behind.startswith(before) and whole.startswith(behind)):
                return None
            start, end = len(before), len(behind)
            content = self._content(whole, start, end, self._shielded(turn.content))
            special = self._specials.search(whole, content[1], end)
            if not self._opens:  # and so what was learned would begin with the header
                start = content[0]
            found.append(_Answer(start, special.end() if special else end, content))
        return found

    @cached_property
    def _opens(self) -> bool:
        """Whether the template says where an answer begins."""
        asked = [Message("user", "a")]
        try:
            return self._render(asked, opens=True) != self._render(asked)
        except DataError:  # some templates take no chat that ends so
            return True

    def _by_marks(self, chat: Sequence[Message], whole: str) -> list[_Answer]:
        """By marks around what the assistant says, without the blanks at its ends, which templates may take away."""

        def marked(turn: Message) -> Message:
            content = self._shielded(turn.content)
            bare = content.strip()
            if turn.role != "assistant":
                return turn._replace(content=content)
            place = content.find(bare)
            behind = content[place + len(bare) :]
            return turn._replace(content=f"{content[:place]}{BEGIN}{bare}{END}{behind}")

        rendered, spans = _unmarked(self._fill([marked(turn) for turn in chat]))
        places = [place for place, turn in enumerate(chat) if turn.role == "assistant"]
        if rendered != whole or len(spans) != len(places):
            raise DataError(CHANGED)
        found = []
        for (begin, end), place in zip(spans, places, strict=True):
            start = self._begin(chat, place, whole, end) if begin is None else begin
            behind = self._behind(whole, end)
            found.append(_Answer(start, behind.end() if behind else end, (start, end)))
        return found

    def _begin(self, chat: Sequence[Message], place: int, whole: str, end: int) -> int:
        """Where an answer begins of which the template leaves out the beginning, as some do with what was thought:
        behind the header of an answer, or with the longest end of the turn that stands there."""
        try:
            before = self._render(chat[:place], opens=True)
        except DataError:
            before = ""
        if (
            before
            and self._opens
            and whole.startswith(before)
            and self._specials.search(whole, len(before), end) is None
        ):
            return len(before)
        content = self._shielded(chat[place].content).strip()
        shared = len(os.path.commonprefix([content[::-1], whole[:end][::-1]]))
        kept = content[len(content) - shared :].lstrip()
        if not kept:
            raise DataError(CHANGED)
        return end - len(kept)

    def _content(self, whole: str, start: int, end: int, content: str) -> tuple[int, int]:
        """Where in an answer the turn's content stands; all of it up to the token that ends it, where it is another.
        The last such place: templates put headers and empty thoughts in front, in which a short answer may stand."""
        specials = [found.start() for found in self._specials.finditer(whole, start, end)]
        limit = specials[-1] if specials else end
        for said in (content, content.strip()):
            place = whole.rfind(said, start, limit)
            if place >= 0:
                return place, place + len(said)
        return start, limit

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _encode(self, rendered: str, answers: Sequence[_Answer]) -> Encoded:
        ids: list[np.ndarray] = []
        learned: list[np.ndarray] = []
        begins = True
        for start, end, special in self._pieces(rendered):
            if special is not None:
                # One start token stands before every chat, whether its template writes it or not.
                if start > 0 or special != self.tokenizer.eot:
                    inside = any(answer.start < end and start < answer.end for answer in answers)
                    ids.append(np.array([special], dtype=np.int64))
                    learned.append(np.array([0 if inside else UNLEARNED], dtype=np.int32))
                    begins = False
                continue
            here, bytes_ = self._words(rendered, start, end, begins, answers)
            ids.append(here)
            learned.append(bytes_)
            begins = False
        none = np.zeros(0, dtype=np.int64)
        return Encoded(
            np.concatenate([none, *ids]).astype(self.tokenizer.dtype),
            np.concatenate([none, *learned]).astype(np.int32),
        )

    def _pieces(self, rendered: str) -> Iterator[tuple[int, int, int | None]]:
        """Stretches of characters: a special token and its id, or what stands between two."""
        position = 0
        for found in self._specials.finditer(rendered):
            if position < found.start():
                yield position, found.start(), None
            yield found.start(), found.end(), self._special[found[0]]
            position = found.end()
        if position < len(rendered):
            yield position, len(rendered), None

    def _words(
        self, rendered: str, start: int, end: int, begins: bool, answers: Sequence[_Answer]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ordinary text: its ids (K,), and `Encoded.answers` of them (K,)."""

        def place(character: int) -> int:
            """In bytes of this stretch."""
            return len(utf8(_bare(rendered[start : min(max(character, start), end)])))

        raw = utf8(_bare(rendered[start:end]))
        ids = (self.tokenizer.encode if begins else self.tokenizer.encode_inside)(raw).astype(np.int64)
        bounds = [
            (place(a.start), place(a.end), place(a.content[0]), place(a.content[1]))
            for a in answers
            if a.start < end and start < a.end
        ]
        said = text_of(self.tokenizer, ids) if begins else self.tokenizer.decode(ids)
        if said == raw:
            spans = spans_of(self.tokenizer, ids) if begins else _one_behind_another(self.tokenizer, ids)
        else:
            ids, spans = self._in_parts(raw, begins, bounds)
        answer = np.full(len(ids), UNLEARNED, dtype=np.int32)
        for low, high, first, last in bounds:
            inside = (spans[:, 0] < high) & (spans[:, 1] > low)
            bytes_ = np.minimum(spans[:, 1], last) - np.maximum(spans[:, 0], first)
            answer[inside] = np.maximum(answer[inside], 0) + np.maximum(bytes_[inside], 0)
        return ids, answer

    def _in_parts(
        self, raw: bytes, begins: bool, bounds: Sequence[tuple[int, ...]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids of text that they do not give back, cut where answers begin and end; bytes are shared out among the
        tokens of a part."""
        cuts = sorted({0, len(raw), *(place for bound in bounds for place in bound)})
        ids, spans = [np.zeros(0, dtype=np.int64)], [np.zeros((0, 2), dtype=np.int64)]
        for low, high in zip(cuts, cuts[1:], strict=False):
            encode = self.tokenizer.encode if begins and low == 0 else self.tokenizer.encode_inside
            part = encode(raw[low:high]).astype(np.int64)
            ends = low + np.arange(len(part) + 1) * (high - low) // max(len(part), 1)
            ids.append(part)
            spans.append(np.stack([ends[:-1], ends[1:]], axis=1))
        return np.concatenate(ids), np.concatenate(spans)


def _one_behind_another(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    ends = np.cumsum(tokenizer.token_bytes[ids])
    return np.stack([ends - tokenizer.token_bytes[ids], ends], axis=1)


def _bare(text: str) -> str:
    return _NONCHARACTERS.sub("", text)


def _unmarked(marked: str) -> tuple[str, list[tuple[int | None, int]]]:
    """The text without marks, and the characters between each pair of them; from None where the first is missing.
    DataError where the second is."""
    parts: list[str] = []
    spans: list[tuple[int | None, int]] = []
    length, start = 0, None
    for part in re.split(f"([{BEGIN}{END}])", marked):
        if part == BEGIN:
            if start is not None:
                raise DataError(CHANGED)
            start = length
        elif part == END:
            spans.append((start, length))
            start = None
        else:
            parts.append(part)
            length += len(part)
    if start is not None:
        raise DataError(CHANGED)
    return "".join(parts), spans


def _source(tokenizer: Tokenizer) -> str | None:
    """The Jinja that a tokenizer brings; of several the one called default."""
    given = tokenizer.huggingface_config.get("chat_template")
    if isinstance(given, list):
        given = next((one.get("template") for one in given if one.get("name") == "default"), None)
    return given or None


def _compiled(source: str) -> Any:
    """As transformers compiles it: in a sandbox in which nothing that it is given can be changed."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import CallBlock
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # Jinja's own escapes for HTML.
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False, **how})
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except jinja2.exceptions.TemplateError as error:
        raise DataError(f"the tokenizer's chat template is no Jinja: {error}") from error
