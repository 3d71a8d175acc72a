"""`bench generate`: new tokens per second, by rows at once and length of the prompt.

`generate` of the adapter, as the command uses it, takes turns with a plain loop over the same model and its cache: a
forward pass, softmax, torch.multinomial. Beside them stands what the machine allows: every pass reads the weights that
multiply and the cache at the speed of a copy, or multiplies at the speed of a large product, whichever takes longer.
An architecture whose cache no single token is appended to has no plain loop and no bound. `--speculative` lets a model
that can draft tokens do so in turn with that: how much faster that is depends on the text, so it tells something of a
trained one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.base import GenerateOptions, Speculation
from adapters.default import DefaultModelAdapter
from trainer.commands.bench.ceilings import ceilings
from trainer.commands.bench.turns import interleaved, median_ratio
from trainer.precision import autocast
from trainer.run.files import output_file, write_atomically
from trainer.run.manifest import collect_environment
from trainer.run.restore import Restored, add_checkpoint_arguments, named, restore_named, say
from trainer.view.console import Console

__all__ = ["main"]

CONTEXT_MULTIPLE = 128  # a raised n_ctx: architectures may want a multiple of something


@dataclass
class Row:
    """Of one length of prompt and one number of rows; tokens are new ones, of all rows, with the reading of the prompt
    in their time. None: there is no such thing for this architecture, or no batch of 1 to compare with."""

    prompt: int
    batch: int
    tokens_per_second: float
    times_batch_1: float | None
    plain_tokens_per_second: float | None
    times_plain_loop: float | None
    seconds_to_first_token: float  # the prompt is read
    seconds_per_further_token: float  # of all rows
    network_calls: int
    bound_tokens_per_second: float | None
    percent_of_bound: float | None
    # With --speculative; `times_generate`: how many times as fast as without.
    speculative_tokens_per_second: float | None = None
    times_generate: float | None = None
    tokens_per_pass: float | None = None
    accepted: list[float] | None = None  # share of the drafts of each depth


def main(argv: list[str]) -> int:
    args = _parse(argv)
    output = output_file(args.output) if args.output else None
    console = Console(live=False, stream=sys.stderr)
    with console.doing("building the model") as tell:
        found = _model(args)
        limit = getattr(found.adapter.model, "max_context", None)
        _refuse_if_none_fits(args, limit)
        found.adapter.drafts(GenerateOptions(**_drafting(args)))
        rows: list[Row] = []
        best = ceilings(found.device, _dtype(found)) if _cached(found) else {}
        for prompt in args.prompt:
            if limit is not None and (needed := 1 + prompt + args.max_new_tokens) > limit:
                say(
                    f"prompt {prompt} is left out: {needed} tokens with the start are more than n_ctx ({limit})"
                )
                continue
            tell(f"measuring prompts of {prompt} tokens")
            rows += _measure(found, prompt, args, best)
    result = {
        "environment": collect_environment(found.device),
        "model": _about(found, args),
        "ceilings": best,
        "rows": [asdict(row) for row in rows],
    }
    if output:  # before anything is printed: whoever reads that may leave
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    print(_report(result, rows))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py bench generate",
        description="Tokens per second of generation. Without a checkpoint the weights of --hydra_model_cfg (gpt2) are "
        "as initialised, its n_ctx is raised to what the longest text needs, and further words are Hydra overrides.",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument("--batch", type=_numbers, default=[1, 8, 64], help="rows at once: 1,8,64")
    parser.add_argument("--prompt", type=_numbers, default=[32, 512], help="tokens of each prompt: 32,512")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="new tokens of each row")
    parser.add_argument("--turns", type=int, default=3, help="measured turns of each side")
    parser.add_argument(
        "--speculative", action="store_true", help="beside it, with drafts; for models that make some"
    )
    parser.add_argument(
        "--draft", type=int, help="speculative: tokens to draft at a time (default: all it can)"
    )
    parser.add_argument("--output", help="write the figures to this JSON file")
    args = parser.parse_intermixed_args(argv)
    for name in ("batch", "prompt", "max_new_tokens", "turns"):
        given = getattr(args, name)
        least = 2 if name == "max_new_tokens" else 1
        if (smallest := min(given) if isinstance(given, list) else given) < least:
            raise ValueError(f"{name}: must be at least {least}, got {smallest}")
    _drafting(args)
    return args


def _drafting(args: argparse.Namespace) -> dict[str, Any]:
    """Options of generation, checked."""
    chosen = {"speculative": args.speculative, "draft": args.draft}
    GenerateOptions(**chosen)
    return chosen


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers are meant, such as 1,8,64, got {text!r}") from None


def _model(args: argparse.Namespace) -> Restored:
    if not named(args):
        from configs.compose import compose

        args.hydra_model_cfg = args.hydra_model_cfg or "configs/gpt2.yaml"
        words = [f"--hydra_model_cfg={args.hydra_model_cfg}", *args.overrides]
        _, model_cfg = compose(words, notify=lambda text: None)
        needed = -(-(1 + max(args.prompt) + args.max_new_tokens) // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        if (getattr(model_cfg, "n_ctx", None) or needed) < needed:
            args.overrides = [*args.overrides, f"model_cfg.n_ctx={needed}"]
    return restore_named(args)


def _refuse_if_none_fits(args: argparse.Namespace, limit: int | None) -> None:
    if limit is None or 1 + min(args.prompt) + args.max_new_tokens <= limit:
        return
    longest = limit - 1 - args.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens: {args.max_new_tokens} with the start and a prompt are more than n_ctx ({limit}) of this "
            f"model; at most {limit - 2} fit, behind a prompt of 1"
        )
    raise ValueError(
        f"prompt: {min(args.prompt)} with the start and {args.max_new_tokens} new tokens are more than n_ctx ({limit}) "
        f"of this model; at most {longest} fit"
    )


def _about(found: Restored, args: argparse.Namespace) -> dict[str, Any]:
    adapter = found.adapter
    return {
        "type": found.cfg.type,
        "parameters": adapter.parameter_count,
        "weights": str(found.checkpoint or found.weights),
        "overrides": args.overrides,
        "precision": found.precision,
        "max_new_tokens": args.max_new_tokens,
        "cached": _cached(found),
    }


def _cached(found: Restored) -> bool:
    adapter = found.adapter
    return isinstance(adapter, DefaultModelAdapter) and getattr(adapter.model, "init_cache", None) is not None


def _decoder(found: Restored) -> DefaultModelAdapter:
    assert isinstance(found.adapter, DefaultModelAdapter)
    return found.adapter


def _measure(found: Restored, prompt: int, args: argparse.Namespace, best: dict[str, float]) -> Iterator[Row]:
    """All numbers of rows, and both sides of each, take turns."""
    new = args.max_new_tokens
    prompts = {batch: _prompts(found, batch, prompt) for batch in args.batch}
    ours = {batch: _Ours(found, prompts[batch], new) for batch in args.batch}
    sides: dict[str, Callable[[int], object]] = {f"generate {batch}": side for batch, side in ours.items()}
    if _cached(found):
        for batch in args.batch:
            sides[f"plain {batch}"] = _plain(found, prompts[batch], new)
    drafting = {}
    if args.speculative:
        drafting = {batch: _Ours(found, prompts[batch], new, **_drafting(args)) for batch in args.batch}
        sides |= {f"speculative {batch}": side for batch, side in drafting.items()}
    seconds = interleaved(sides, args.turns, found.device, warm_up=1)
    for batch in args.batch:
        mine, plain = seconds[f"generate {batch}"], seconds.get(f"plain {batch}")
        speed = batch * new / statistics.median(mine)
        bound = _bound(found, prompt, batch, new, best) if plain else None
        first = statistics.median(ours[batch].first[-args.turns :])
        yield Row(
            prompt=prompt,
            batch=batch,
            tokens_per_second=speed,
            times_batch_1=batch * median_ratio(seconds["generate 1"], mine) if 1 in args.batch else None,
            plain_tokens_per_second=batch * new / statistics.median(plain) if plain else None,
            times_plain_loop=median_ratio(plain, mine) if plain else None,
            seconds_to_first_token=first,
            seconds_per_further_token=(statistics.median(mine) - first) / (new - 1),
            network_calls=ours[batch].calls,
            bound_tokens_per_second=bound,
            percent_of_bound=100 * speed / bound if bound else None,
            **_of_drafts(drafting[batch], mine, seconds[f"speculative {batch}"]) if drafting else {},
        )


def _of_drafts(side: _Ours, plain: list[float], mine: list[float]) -> dict[str, Any]:
    found = side.speculation
    assert found is not None
    return {
        "speculative_tokens_per_second": found.tokens / statistics.median(mine),
        "times_generate": median_ratio(plain, mine),
        "tokens_per_pass": found.tokens_per_pass,
        "accepted": [right / max(1, made) for right, made in zip(found.accepted, found.drafted, strict=True)],
    }


def _prompts(found: Restored, batch: int, length: int) -> list[list[int]]:
    """Ids that end no text, the same for both sides."""
    tokenizer = found.tokenizer
    ids = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.ends and i != tokenizer.eot]
    drawn = torch.randint(len(ids), (batch, length), generator=torch.Generator().manual_seed(0))
    return [[ids[i] for i in row] for row in drawn.tolist()]


class _Ours:
    """One call generates; it notes when the first token came."""

    def __init__(self, found: Restored, prompts: list[list[int]], new: int, **drafting: Any) -> None:
        self.found, self.prompts = found, prompts
        self.options = GenerateOptions(
            max_new_tokens=new, temperature=1.0, stop_at_document_end=False, **drafting
        )
        self.speculation: Speculation | None = None
        self.first: list[float] = []  # seconds
        self.calls = 0

    def __call__(self, turn: int) -> None:
        started = time.perf_counter()
        came: list[float] = []

        def hear(row: int, tokens: list[int]) -> None:
            if tokens and not came:
                came.append(time.perf_counter() - started)

        with autocast(self.found.precision, self.found.device):
            done = self.found.adapter.generate(self.prompts, self.options, hear)
        self.calls, self.speculation = done.network_calls, done.speculation
        self.first += came or [time.perf_counter() - started]


def _plain(found: Restored, prompts: list[list[int]], new: int) -> Callable[[int], list[list[int]]]:
    """The loop that everybody has written."""
    adapter, eot = _decoder(found), found.tokenizer.eot
    texts = torch.tensor([[eot, *prompt] for prompt in prompts], device=found.device)  # (B, T)

    @torch.no_grad()
    def loop(turn: int) -> list[list[int]]:
        cache, tokens, text = adapter.model.init_cache(len(texts)), texts, []
        with autocast(found.precision, found.device):
            for _ in range(new):
                probabilities = adapter.next_logits(tokens, cache).float().softmax(1)  # (B, V)
                tokens = torch.multinomial(probabilities, 1)  # (B, 1)
                text.append(tokens)
        return torch.cat(text, 1).tolist()

    return loop


def _dtype(found: Restored) -> torch.dtype:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(found.precision, torch.float32)


def _bound(found: Restored, prompt: int, batch: int, new: int, best: dict[str, float]) -> float:
    """New tokens per second that the machine allows: of all passes, each as long as what it must read or multiply."""
    weights = found.adapter.flops(1).forward_per_token / 2 * _dtype(found).itemsize
    kept, per_token = _cache_bytes(found)

    def seconds(tokens: int, length: int) -> float:
        """Of a pass that reads `tokens` of each row, behind it `length` in all."""
        read = weights + batch * (kept + per_token * length)
        # In a row of n tokens one looks back on n / 2 on average.
        seen = 2 * length - tokens
        operations = batch * tokens * found.adapter.flops(seen).forward_per_token
        return max(read / best["bytes_per_second"], operations / best["flops_per_second"])

    reading, going_on = seconds(1 + prompt, 1 + prompt), seconds(1, 1 + prompt + new // 2)
    return batch * new / (reading + (new - 1) * going_on)


def _cache_bytes(found: Restored) -> tuple[float, float]:
    """Bytes of one row's cache: whatever the length, and per token. Measured at two lengths that fill its storage."""
    adapter, sizes = _decoder(found), {}
    for length in (16, 32):
        cache = adapter.model.init_cache(1)
        tokens = torch.zeros(1, length, dtype=torch.int64, device=found.device)
        with torch.no_grad(), autocast(found.precision, found.device):
            adapter.next_logits(tokens, cache)
        sizes[length] = sum(t.numel() * t.element_size() for t in _tensors(cache))
    per_token = (sizes[32] - sizes[16]) / 16
    return sizes[16] - 16 * per_token, per_token


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
        return
    inside = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    for part in inside or getattr(thing, "__dict__", {}).values():
        yield from _tensors(part)


def _report(result: dict[str, Any], rows: list[Row]) -> str:
    e, m = result["environment"], result["model"]
    lines = [
        f"{e['device']}, {e['threads']} threads, torch {e['torch']}, load average {e['load_average']}",
        f"{m['type']}, {m['parameters']:,} parameters, {m['precision']}, {m['max_new_tokens']} new tokens a row",
    ]
    if c := result["ceilings"]:
        lines.append(
            f"ceilings: copy {c['bytes_per_second'] / 1e9:,.1f} GB/s, products {c['flops_per_second'] / 1e12:,.2f} "
            f"TFLOP/s"
        )
    else:
        lines.append("no plain loop and no bound: it has no cache that single tokens are appended to")
    lines.append(
        f"{'prompt':>6}{'rows':>6}{'tokens/s':>11}{'x 1 row':>9}{'x plain':>9}{'first token':>13}{'then each':>11}"
        f"{'bound':>11}{'of it':>7}"
    )
    for row in rows:
        lines.append(
            f"{row.prompt:>6}{row.batch:>6}{row.tokens_per_second:>11,.0f}{_or_dash(row.times_batch_1, '.1f'):>9}"
            f"{_or_dash(row.times_plain_loop, '.2f'):>9}{row.seconds_to_first_token * 1e3:>10,.0f} ms"
            f"{row.seconds_per_further_token * 1e3:>8,.1f} ms{_or_dash(row.bound_tokens_per_second, ',.0f'):>11}"
            f"{_or_dash(row.percent_of_bound, '.0f', ' %'):>7}"
        )
    if rows and rows[0].accepted is not None:
        lines.append(
            f"{'prompt':>6}{'rows':>6}{'drafted':>11}{'x':>9}{'tokens a pass':>15}  accepted, by depth"
        )
        lines += [
            f"{row.prompt:>6}{row.batch:>6}{row.speculative_tokens_per_second:>11,.0f}{row.times_generate:>9.2f}"
            f"{row.tokens_per_pass:>15.2f}  {', '.join(f'{share:.0%}' for share in row.accepted or [])}"
            for row in rows
        ]
    return "\n".join(lines)


def _or_dash(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
