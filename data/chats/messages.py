"""What a row of a data set says as a chat: turns, in the shapes that sets of instructions have.

A chat is kept as one document, its turns as JSON, `[[role, content], ...]`: so split, copies and cache are those of all
text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from data.errors import DataError
from data.stream import utf8
from naming import did_you_mean, not_one_of, shorten

__all__ = ["Message", "chat_document", "chat_fields", "messages_of"]

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"human": "user", "gpt": "assistant"}  # as `from` calls them
ANY = "text"  # `text_field` where nobody set it: whichever of these there is
SHAPES = (("messages",), ("conversations",), ("prompt", "response"), (ANY,))
TURNS = "messages (role, content), conversations (from, value), prompt and response"


class Message(NamedTuple):
    role: str
    content: str


def chat_fields(text_field: str | Sequence[str], present: Collection[str], where: str) -> tuple[str, ...]:
    """The fields of a row that hold its chat. DataError names the place and the fields that there are."""
    if text_field == ANY:
        found = next((shape for shape in SHAPES if all(name in present for name in shape)), None)
        if found:
            return found
        missing = f"none of {TURNS}"
    else:
        fields = (text_field,) if isinstance(text_field, str) else tuple(text_field)
        absent = [name for name in fields if name not in present]
        if not absent:
            return fields
        missing = f"no field {absent[0]!r}"
    has = f"it has {shorten([repr(name) for name in present])}" if present else "it is empty"
    near = did_you_mean(text_field, present) if isinstance(text_field, str) and text_field != ANY else ""
    raise DataError(
        f"{where} holds {missing} ({has}). Set text_field=<the field with the turns>, or a list whose last one is the "
        f"answer, such as text_field=[instruction,input,output].{near}"
    )


def chat_document(row: Mapping[str, Any], text_field: str | Sequence[str], where: str) -> bytes | None:
    """The document of a row; None where its turns or its answer are null, empty where it has no turn.

    Raises:
        DataError: the row has no such fields, or they are no chat. `where` names it.
    """
    fields = chat_fields(text_field, row, where)
    if len(fields) == 1:
        turns = row[fields[0]]
        if turns is None:
            return None
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise DataError(
                f"{where}: {fields[0]!r} is {_what(turns)}, and a chat is a list of turns: {TURNS} (the row has "
                f"{shorten([repr(name) for name in row])}). Set text_field=<the field with the turns>, or data of "
                f"another form by training_mode=pretraining"
            )
        chat = [_turn(turn, f"{where}: turn {place} of {fields[0]!r}") for place, turn in enumerate(turns, 1)]
    else:
        *asked, answer = (_text(row[name], f"{where}: {name!r}", null=True) for name in fields)
        if answer is None:
            return None
        question = "\n\n".join(text for text in asked if text)
        chat = [Message("user", question), Message("assistant", answer)]
    return document_of(chat) if chat else b""


def document_of(chat: Sequence[Message]) -> bytes:
    return utf8(json.dumps(chat, ensure_ascii=False, separators=(",", ":")))


def messages_of(document: bytes) -> list[Message]:
    """The turns of such a document."""
    return [Message(*turn) for turn in json.loads(document)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is {_what(turn)}, and a turn is an object with role and content")
    for role, content in (("role", "content"), ("from", "value")):
        if role in turn and content in turn:
            speaker = _text(turn[role], f"{where}: {role!r}")
            speaker = SPEAKERS.get(str(speaker), str(speaker))
            if speaker not in ROLES:
                raise DataError(f"{where}: {role!r}: {not_one_of(speaker, (*ROLES, *SPEAKERS))}")
            return Message(speaker, str(_text(turn[content], f"{where}: {content!r}")))
    has = shorten([repr(name) for name in turn]) or "nothing"
    raise DataError(f"{where} has {has}, and a turn has role and content, or from and value")


def _text(value: Any, where: str, null: bool = False) -> str | None:
    if (null and value is None) or type(value) is str:
        return value
    raise DataError(f"{where} is {_what(value)}, and must be a string")


def _what(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
