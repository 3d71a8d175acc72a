"""The `generate` command: text from a trained model, printed as it comes."""

from __future__ import annotations

import argparse
import sys
import time

from adapters.base import GenerateOptions
from data.tokenizers import StreamDecoder, Tokenizer
from trainer.errors import StopRequested
from trainer.precision import autocast
from trainer.restore import add_checkpoint_arguments, restore
from trainer.signals import StopSignal

__all__ = ["main"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py generate",
        description="Continue a prompt with a trained model. The text goes to stdout, everything else to stderr.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="0 is off")
    parser.add_argument("--top_p", type=float, default=1.0, help="1 is off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument(
        "--ignore_document_end", action="store_true", help="go on after the model ends the document"
    )
    parser.add_argument("--no_cache", action="store_true", help="recompute the whole text for every token")
    args = parser.parse_args(argv)
    if args.num_samples < 1:
        raise ValueError(f"num_samples: must be at least 1, got {args.num_samples}")
    options = GenerateOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_at_document_end=not args.ignore_document_end,
        use_cache=not args.no_cache,
    )
    restored = restore(args)
    prompt = restored.tokenizer.encode(args.prompt).tolist()
    printer = _Printer(args.prompt, restored.tokenizer, args.num_samples)
    started = time.perf_counter()
    with StopSignal() as stop, autocast(restored.precision, restored.device):

        def on_tokens(row: int, tokens: list[int]) -> None:
            printer.add(row, tokens)
            if stop.requested:
                raise StopRequested

        try:
            restored.adapter.generate([prompt] * args.num_samples, options, on_tokens)
        except StopRequested:
            print("\n(stopped)", file=sys.stderr)
    printer.end()
    seconds = time.perf_counter() - started
    where = f"{restored.checkpoint} ({restored.weights} weights, {restored.device})"
    print(f"{printer.count} tokens, {printer.count / seconds:.0f} per second, from {where}", file=sys.stderr)
    return 0


class _Printer:
    """Prints each sample from its prompt on; characters wait until all their bytes have arrived."""

    def __init__(self, prompt: str, tokenizer: Tokenizer, samples: int) -> None:
        self.prompt, self.tokenizer, self.samples = prompt, tokenizer, samples
        self.row = -1
        self.count = 0

    def add(self, row: int, tokens: list[int]) -> None:
        if row != self.row:
            self.end()
            self.row = row
            self.decoder = StreamDecoder(self.tokenizer)
            if self.samples > 1:
                print(f"--- sample {row + 1} of {self.samples} ---", file=sys.stderr, flush=True)
            sys.stdout.write(self.prompt)
        self.count += len(tokens)
        sys.stdout.write(self.decoder.push(tokens))
        sys.stdout.flush()

    def end(self) -> None:
        if self.row >= 0:
            sys.stdout.write(self.decoder.flush() + "\n")
            sys.stdout.flush()
