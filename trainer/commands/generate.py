"""The `generate` command: text from a trained model, printed as it comes."""

from __future__ import annotations

import argparse
import os
import sys
import time

from adapters.base import GenerateOptions, Generation, Speculation
from data.config import CHATS
from data.tokenizers import StreamDecoder, Tokenizer
from naming import shorten
from trainer.commands.talk import talk
from trainer.diagnose import non_finite
from trainer.errors import StopRequested, TrainingError
from trainer.precision import autocast
from trainer.run.restore import Restored, add_checkpoint_arguments, restore_named
from trainer.signals import StopSignal
from trainer.view.text_view import TextView, with_gaps

__all__ = ["main"]


def _parse(argv: list[str]) -> tuple[argparse.Namespace, GenerateOptions]:
    """The words of the command, and what they ask of the model. Raises ValueError."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py generate",
        description="Continue a prompt with a trained model. The text goes to stdout, everything else to stderr.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    chat = parser.add_mutually_exclusive_group()
    chat.add_argument(
        "--chat",
        action="store_const",
        const=True,
        help="--prompt is a question, asked in the chat template; on a terminal further ones follow (default of a run "
        "of training_mode=instruction_finetuning)",
    )
    chat.add_argument(
        "--no_chat", dest="chat", action="store_const", const=False, help="continue the prompt as text"
    )
    parser.add_argument("--system", metavar="TEXT", help="of a chat: what stands before its first question")
    parser.add_argument(
        "--infill",
        metavar="TEXT",
        help="text or file with gaps, each written ____; for models that can fill gaps",
    )
    parser.add_argument("--gap_tokens", type=int, default=16, help="tokens that each gap stands for")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument(
        "--temperature",
        type=float,
        help="0 is greedy (default: 0.8; diffusion: 1, the model's own distribution)",
    )
    parser.add_argument("--top_k", type=int, default=0, help="0 is off")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 is off")
    parser.add_argument(
        "--min_p",
        type=float,
        default=0.0,
        help="least probability relative to the likeliest token's; 0 is off",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num_samples", type=int, default=1, help="drawn side by side; the first is printed as it comes"
    )
    parser.add_argument(
        "--ignore_document_end", action="store_true", help="go on after the model ends the document"
    )
    parser.add_argument(
        "--no_cache",
        action="store_true",
        help="reuse nothing the model has computed before; the text is the same",
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="diffusion: reverse steps (0: the model's own number)"
    )
    parser.add_argument(
        "--by_confidence",
        action="store_true",
        help="diffusion: surest positions first; not the model's own law",
    )
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="of models that can draft tokens (README.md, Drafts): verify them together; the text is as likely as "
        "ever, in fewer forward passes",
    )
    parser.add_argument(
        "--draft", type=int, help="speculative: tokens to draft at a time (default: as many as the model can)"
    )
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise ValueError(f"num_samples: must be at least 1, got {args.num_samples}")
    if args.prompt and args.infill is not None:
        raise ValueError(
            "prompt and infill exclude each other: write the prompt at the start of the infill text"
        )
    if args.infill is not None and (args.chat or args.system is not None):
        raise ValueError(
            "infill fills gaps of a text, and a chat has none: leave out infill, or chat and system"
        )
    if args.chat is False and args.system is not None:
        raise ValueError("system belongs to a chat: leave out no_chat or system")
    options = GenerateOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        seed=args.seed,
        stop_at_document_end=not args.ignore_document_end,
        use_cache=not args.no_cache,
        steps=args.steps,
        by_confidence=args.by_confidence,
        speculative=args.speculative,
        draft=args.draft,
    )
    return args, options


def main(argv: list[str]) -> int:
    args, options = _parse(argv)
    restored = restore_named(args)
    if broken := non_finite(restored.adapter):
        raise TrainingError(
            f"{restored.checkpoint} holds weights that are not finite: {shorten(broken)}. There is no text to "
            f"draw from them"
        )
    if _is_chat(args, restored):
        with StopSignal("ending the chat here") as stop, autocast(restored.precision, restored.device):
            return talk(restored, args, options, stop)
    moving = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"  # a cursor can go back
    view = TextView(restored.tokenizer) if moving else None
    prompt = restored.tokenizer.encode(args.prompt).tolist()
    printer = _Printer(args.prompt, restored.tokenizer, args.num_samples, view)
    gaps = with_gaps(args.infill, restored.tokenizer, args.gap_tokens) if args.infill is not None else None
    notes = restored.adapter.generation_notes if gaps is None else restored.adapter.infill_notes
    if options.by_confidence:
        notes = (
            *notes,
            "by_confidence: the surest tokens first; this is no draw from the model's distribution",
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    generated: Generation | None = None
    started = time.perf_counter()
    with StopSignal("ending the text here") as stop, autocast(restored.precision, restored.device):

        def on_tokens(row: int, tokens: list[int]) -> None:
            printer.add(row, tokens)
            if stop.requested:
                raise StopRequested

        def on_state(row: int, text: list[int | None]) -> None:
            if stop.requested:
                raise StopRequested
            if view is not None and row == 0:
                view.show(text)

        try:
            if gaps is None:
                prompts = [prompt] * args.num_samples
                generated = restored.adapter.generate(prompts, options, on_tokens, on_state)
            else:
                filled = restored.adapter.infill([gaps] * args.num_samples, options, on_state)
                for row, text in enumerate(filled.tokens):
                    printer.add(row, text)
        except StopRequested:
            print("\n(stopped)", file=sys.stderr)
    printer.end()
    if (empty := args.num_samples - len(printer.begun)) and not stop.requested:
        which = f"{empty} of {args.num_samples} samples are" if args.num_samples > 1 else "the text is"
        print(
            f"note: {which} empty, as the model ends the document at once. --ignore_document_end goes on behind its "
            f"end; another --prompt or --seed may do too",
            file=sys.stderr,
        )
    seconds = time.perf_counter() - started
    where = f"{restored.checkpoint} ({restored.weights} weights, {restored.device})"
    print(f"{printer.count} tokens, {printer.count / seconds:.0f} per second, from {where}", file=sys.stderr)
    if generated is None:
        return 0
    if generated.metrics:
        told = ", ".join(f"{name} {value:.4g}" for name, value in generated.metrics.items())
        print(f"measured over all tokens read: {told}", file=sys.stderr)
    if generated.speculation is not None:
        print(_of_drafts(generated.speculation), file=sys.stderr)
    return 0


def _is_chat(args: argparse.Namespace, restored: Restored) -> bool:
    """Whether the prompt is a question: where it is asked for, or the run was trained on chats and nothing else is."""
    if args.chat is None and args.infill is None:
        return args.system is not None or restored.cfg.training_mode == CHATS
    return bool(args.chat)


def _of_drafts(found: Speculation) -> str:
    depths = [
        f"{accepted} of {drafted} ({accepted / drafted:.0%})" if drafted else "none drafted"
        for accepted, drafted in zip(found.accepted, found.drafted, strict=True)
    ]
    return (
        f"speculative: {found.tokens_per_pass:.2f} tokens per forward pass; drafts accepted, by depth: "
        + ", ".join(depths)
    )


class _Printer:
    """Prints each sample from its prompt on. Samples are drawn side by side: the first is printed as it comes, the
    others behind it. Characters wait until all their bytes have arrived. What a view shows of a text being resolved is
    wiped before."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, samples: int, view: TextView | None) -> None:
        self.prompt, self.tokenizer, self.samples, self.view = prompt, tokenizer, samples, view
        self.decoder = StreamDecoder(tokenizer)
        self.streamed: int | None = None
        self.waiting: dict[int, list[int]] = {}
        self.begun: set[int] = set()
        self.count = 0

    def add(self, row: int, tokens: list[int]) -> None:
        if not tokens:
            return
        self.count += len(tokens)
        self.begun.add(row)
        if self.streamed is None:
            if self.view is not None:
                self.view.wipe()
            self.streamed = row
            self._begin(row)
        if row == self.streamed:
            self._write(self.decoder.push(tokens))
        else:
            self.waiting.setdefault(row, []).extend(tokens)

    def end(self) -> None:
        """Complete the sample being printed, then print those that waited."""
        if self.streamed is not None:
            self._write(self.decoder.flush() + "\n")
        for row in sorted(self.waiting):
            self._begin(row)
            self._write(self.decoder.push(self.waiting[row]) + self.decoder.flush() + "\n")

    def _begin(self, row: int) -> None:
        self.decoder = StreamDecoder(self.tokenizer, begins=not self.prompt)
        if self.samples > 1:
            print(f"--- sample {row + 1} of {self.samples} ---", file=sys.stderr, flush=True)
        self._write(self.prompt)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
