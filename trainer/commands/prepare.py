"""The `prepare` command: text into a folder of token shards, which runs and other programs read; and what the cache
holds."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from data import SOURCES
from data.bin import PUBLIC
from data.cache import cache_root
from data.cache_contents import KINDS, chosen_kinds, contents, delete
from data.fetch import fetch, folder_of, names_of
from data.prepare import LARGEST_SHARD, SMALLEST_SHARD, Prepared, Wanted, prepare
from naming import expand_path
from trainer.view.console import Console
from trainer.view.format import duration, quantity

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["main"]

PAUSE, PAUSE_IN_FILE = 0.2, 10.0  # seconds between lines of progress


def main(argv: list[str]) -> int:
    """`python mytrainer.py prepare`."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py prepare",
        description="Turn text into a folder of token shards (headers 20240520 and 20240801), once, in several "
        "processes: data=bin input_file=FOLDER then trains as on the text itself. Other words are those of a run that "
        "say which text and which tokenizer: data=jsonl train_files='x/*.jsonl' tokenizer=gpt2. A preparation that "
        "was stopped goes on by the same command.",
        allow_abbrev=False,  # a word that is no option is the configuration's
    )
    parser.add_argument("--out", help="the folder to write")
    parser.add_argument("--processes", type=int, help="how many encode (default: one for each core)")
    parser.add_argument(
        "--text", action="store_true", help="write the text too: for tokenizers that lose some of it"
    )
    parser.add_argument(
        "--drop_copies", action="store_true", help="leave out documents whose text was there before"
    )
    parser.add_argument(
        "--shard_tokens", type=int, help=f"tokens of a shard (default: {Wanted.shard_tokens:,})"
    )
    parser.add_argument(
        "--clean",
        nargs="*",
        metavar="KIND",
        help=f"say what the cache holds, and delete these kinds of it: {', '.join(KINDS)}, all",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="with --clean: say what would be deleted, and do not"
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help=f"behind {' or '.join(PUBLIC)}: fetch so many of its public shards",
    )
    args, words = parser.parse_known_args(argv)
    _refuse_idle(args, bool(words) and words[0] in PUBLIC)
    if words and words[0] in PUBLIC:
        return _fetch(words[0], args, words[1:])
    if args.shards is not None:
        raise ValueError(f"shards: it belongs to {' or '.join(PUBLIC)}: prepare fineweb10B --shards N")
    if args.clean is not None:
        return _clean(args, words)
    if args.dry_run:
        raise ValueError("dry_run: it belongs to --clean")
    return _prepare(_wanted(args), words)


def _refuse_idle(args: argparse.Namespace, public: bool) -> None:
    """Options that belong to another use of the command than the one that is asked for."""
    of_shards = [name for name in ("processes", "text", "drop_copies", "shard_tokens") if getattr(args, name)]
    if public:
        idle, use = (
            of_shards + [n for n in ("clean", "dry_run") if getattr(args, n) not in (None, False)],
            "fetching",
        )
    elif args.clean is not None:
        idle, use = of_shards + (["out"] if args.out else []), "--clean"
    else:
        return
    if idle:
        raise ValueError(
            f"{idle[0]}: {use} does not read it. Leave out {' '.join(f'--{name}' for name in idle)}"
        )


def _wanted(args: argparse.Namespace) -> Wanted:
    if not args.out:
        raise ValueError("out: --out <folder> says where the shards go; none was given")
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"processes: must be at least 1, got {args.processes}")
    size = Wanted.shard_tokens if args.shard_tokens is None else args.shard_tokens
    if not SMALLEST_SHARD <= size <= LARGEST_SHARD:
        nearest = min(max(size, SMALLEST_SHARD), LARGEST_SHARD)
        raise ValueError(
            f"shard_tokens: must be {SMALLEST_SHARD:,} to {LARGEST_SHARD:,}, got {size:,}. Nearest: {nearest}"
        )
    return Wanted(expand_path(args.out), args.processes or processes, args.text, args.drop_copies, size)


def _prepare(wanted: Wanted, words: list[str]) -> int:
    cfg = _configuration(words)
    started = time.monotonic()
    with closing(Console()) as console:
        bar = _Bar(console)
        try:
            with console.doing("reading the text") as tell:
                found = prepare(cfg, wanted, cache_root(), tell, bar)
        except KeyboardInterrupt:
            console.close()
            console.note(f"what is complete is kept in {wanted.folder}: the same command goes on with it")
            raise
        for note in found.notes:
            console.note(note)
        for line in _summary(found, wanted, time.monotonic() - started):
            console.note(line)
    return 0


def _configuration(words: list[str]) -> RunConfig:
    """The fields of a run that the words give. ConfigError for what no run may have."""
    from configs.compose import ANY_MODEL, check, prepare_one, tree_of
    from configs.frontend import parse

    request = parse(words)
    added = [] if request.models else [f"--hydra_model_cfg={ANY_MODEL}"]
    added += [] if "preset" in request.values else ["preset=none"]
    plan = prepare_one([*added, *words])
    cfg = check(plan, tree_of(plan)).cfg
    read = {"data", "tokenizer", "near_copies", "preset", *SOURCES[cfg.data].reads}
    unread = sorted(request.keys - read)
    notes = [*plan.notices, *([f"prepare does not read {', '.join(unread)}"] if unread else [])]
    for note in dict.fromkeys(notes):
        print(f"note: {note}", file=sys.stderr)
    return cfg


class _Bar:
    """The line of progress: `done` of `total` bytes of text."""

    def __init__(self, console: Console):
        self._console = console
        self._pause = PAUSE if console.is_live else PAUSE_IN_FILE
        self._first: int | None = None
        self._began: tuple[float, int] | None = (
            None  # behind the first bytes, which processes had to start for
        )
        self._shown = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._first = done if self._first is None else self._first
        if self._began is None:
            if done > self._first:
                self._began, self._shown = (now, done), now
            return
        if now - self._shown < self._pause:
            return
        self._shown = now
        since, at_first = self._began
        speed = (done - at_first) / max(now - since, 1e-9)
        left = (total - done) / speed if speed else float("inf")
        self._console.progress(
            f"{done / max(total, 1):6.1%}  {quantity(done)}B of {quantity(total)}B  {quantity(speed)}B/s  "
            f"{duration(left)} left"
        )


def _summary(found: Prepared, wanted: Wanted, seconds: float) -> list[str]:
    manifest = found.manifest
    sides = {side: manifest[side] for side in ("train", "heldout")}
    documents = sum(side["documents"] for side in sides.values())
    lines = [
        f"{name}: {side['documents']:,} documents, {side['tokens']:,} tokens, {side['bytes']:,} bytes of text in "
        f"{len(side['shards']):,} shard{'s' * (len(side['shards']) > 1)}"
        for name, side in (("training", sides["train"]), ("held out", sides["heldout"]))
    ]
    if found.kept == documents:
        lines.append(f"all of it was in {wanted.folder} already")
    elif found.kept:
        lines.append(f"{found.kept:,} documents were there already: a preparation that was stopped went on")
    written = sum(file["bytes"] for file in manifest["files"].values())
    return [
        *lines,
        f"written: {written:,} bytes in {wanted.folder} ({duration(seconds)}), digest {manifest['digest'][:16]}",
        f"train on it: python mytrainer.py --hydra_model_cfg=configs/gpt2.yaml data=bin input_file={wanted.folder}",
    ]


# -- public shards -------------------------------------------------------------------------------------------------


def _fetch(data: str, args: argparse.Namespace, words: Sequence[str]) -> int:
    if words:
        raise ValueError(f"{words[0]!r}: prepare {data} takes --shards N and --out <folder>")
    if args.shards is None or args.shards < 1:
        raise ValueError(
            "shards: how many to fetch, at least 1 (of 100 million tokens, 200 MB each): --shards 1"
        )
    folder = expand_path(args.out) if args.out else folder_of(data)
    names = names_of(data, args.shards)
    with closing(Console()) as console:
        for number, name in enumerate(names, start=1):
            fetched = fetch(data, name, folder, _Bar(console))
            what = "fetched" if fetched else "was there already"
            console.note(f"{name} {what} ({number} of {len(names)})")
        root = f" data_root={folder}" if args.out else ""
        console.note(
            f"train on them: python mytrainer.py --hydra_model_cfg=configs/gpt2.yaml data={data}{root}"
        )
    return 0


# -- the cache -----------------------------------------------------------------------------------------------------


def _clean(args: argparse.Namespace, words: Sequence[str]) -> int:
    if words:
        raise ValueError(f"clean: {words[0]!r} is none of its words. They are {', '.join([*KINDS, 'all'])}")
    cache = cache_root()
    kinds = chosen_kinds(args.clean)
    entries = contents(cache)
    print(f"{cache}: {quantity(sum(entry.bytes for entry in entries))}B")
    for kind, about in KINDS.items():
        those = [entry for entry in entries if entry.kind == kind]
        if not those:
            continue
        size = quantity(sum(entry.bytes for entry in those))
        ages = [time.time() - entry.changed for entry in those]
        print(
            f"  {kind:<12} {size:>5}B in {len(those):,}, {duration(min(ages))} to {duration(max(ages))} old: "
            f"{about.about}"
        )
    chosen = [entry for entry in entries if entry.kind in kinds]
    if not args.dry_run:
        chosen = delete(chosen)
    gone = [entry for entry in chosen if not entry.kept]
    for entry in chosen:
        what = f"left ({entry.kept})" if entry.kept else "would be deleted" if args.dry_run else "deleted"
        print(f"{what}: {entry.path} {quantity(entry.bytes)}B")
    if kinds:
        does = "would be" if args.dry_run else "are"
        print(f"{quantity(sum(entry.bytes for entry in gone))}B {does} free")
    else:
        print(
            f"delete of it: python mytrainer.py prepare --clean {' '.join(KINDS)} (or all; --dry_run only says it)"
        )
    return 0
