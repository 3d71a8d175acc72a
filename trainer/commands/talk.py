"""Questions and answers: what `generate --chat` does."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from adapters.base import GenerateOptions
from data.chats.messages import Message
from data.chats.template import ChatTemplate
from data.tokenizers import StreamDecoder
from trainer.errors import StopRequested
from trainer.run.restore import Restored
from trainer.signals import StopSignal

__all__ = ["talk"]

ASK = "> "


def talk(restored: Restored, args: argparse.Namespace, options: GenerateOptions, stop: StopSignal) -> int:
    """Answer `args.prompt`, as often as `args.num_samples` says; on a terminal further questions follow, of which each
    is asked behind all that was said before, up to an empty line.

    Answers go to stdout, everything else to stderr. ValueError without a question and a terminal to ask for one, and
    for a system turn that the template refuses.
    """
    template = ChatTemplate(restored.tokenizer)
    if args.ignore_document_end:
        raise ValueError(
            "ignore_document_end goes on behind the end of a text, and an answer ends with its turn: "
            "leave it out, or --no_chat"
        )
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if not (args.prompt or live):
        raise ValueError("chat: there is no question, and no terminal to ask for one: --prompt <question>")
    if live and args.num_samples > 1 and not args.prompt:
        raise ValueError("num_samples: several answers are given to one question alone: --prompt <question>")
    print(f"note: asked as {template.name} has it", file=sys.stderr)
    chat = [Message("system", args.system)] if args.system is not None else []
    question = args.prompt or _asked(stop)
    options = replace(options, stop_ids=(*options.stop_ids, *template.stop_ids))
    turn = 0
    while question:
        chat.append(Message("user", question))
        answers = _answers(restored, template, chat, replace(options, seed=options.seed + turn), args, stop)
        if answers is None or not live or args.num_samples > 1:
            break
        chat.append(Message("assistant", answers[0]))
        question, turn = _asked(stop), turn + 1
    return 0


def _asked(stop: StopSignal) -> str:
    """The next question; "" at an empty line, at the end and where the chat is to end."""
    print(ASK, end="", file=sys.stderr, flush=True)
    try:
        with stop.at_once():  # reading goes on behind a signal otherwise
            return sys.stdin.readline().rstrip("\n")
    except StopRequested:
        return ""


def _answers(
    restored: Restored,
    template: ChatTemplate,
    chat: list[Message],
    options: GenerateOptions,
    args: argparse.Namespace,
    stop: StopSignal,
) -> list[str] | None:
    """Print what comes; the answers, None where the chat was to end."""
    decoder = StreamDecoder(restored.tokenizer)

    def on_tokens(row: int, tokens: list[int]) -> None:
        if row == 0:
            sys.stdout.write(decoder.push(tokens))
            sys.stdout.flush()
        if stop.requested:
            raise StopRequested

    try:
        prompts = [template.prompt(chat)] * args.num_samples
        options = replace(options, openings=(template.opening(chat),) * args.num_samples)
        found = restored.adapter.generate(prompts, options, on_tokens).tokens
    except StopRequested:
        print("\n(stopped)", file=sys.stderr)
        return None
    print(decoder.flush())
    texts = [restored.tokenizer.decode(tokens).decode("utf-8", "replace") for tokens in found]
    for number, text in enumerate(texts[1:], 2):
        print(f"--- sample {number} of {args.num_samples} ---", file=sys.stderr, flush=True)
        print(text)
    return texts
