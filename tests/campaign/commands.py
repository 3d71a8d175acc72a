"""Whole command lines of every command, with one to four accidents; nothing larger than tiny is trained."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from configs.files import CONFIGS
from tests.campaign import hostile
from tests.campaign.command import CLEAN, OK, outcome, say
from tests.campaign.folders import PROGRAMS
from tests.campaign.jail import SHARED, Campaign, Watch
from tests.campaign.lives import life, make_text, words_of

ASKED = "would write where it was told to"

_TINY = [
    "preset=none",
    "model_cfg.n_layers=1",
    "model_cfg.d_model=16",
    "model_cfg.n_heads=2",
    "model_cfg.n_ctx=32",
]
_TINY += [
    "data=synthetic",
    "synthetic_bytes=20000",
    "tokenizer=byte",
    "train_seq_len=32",
    "global_batch_size=2",
]
_TINY += ["num_iterations=1", "val_bytes=64", "sample_tokens=2", "device=cpu", "mixed_precision=no"]
_SIZED = [word for word in _TINY if not word.startswith(("model_cfg", "tokenizer"))]
_SIZED += ["model_cfg.n_layers=2", "model_cfg.d_model=64", "model_cfg.n_heads=4", "model_cfg.n_ctx=32"]
_GPT2 = "--hydra_model_cfg=gpt2"
# What a user types: of every command the lines that README.md has, in a folder with a run, a text and model files.
LINES: list[list[str]] = [
    [_GPT2, *_TINY, "output_dir=new"],
    ["train", _GPT2, *_TINY, "output_dir=new", "save_steps=1", "ema_decay=0.9"],
    ["resume=run", "num_iterations=7"],
    ["resume=run/checkpoint-6"],
    [_GPT2, *_SIZED, "tokenizer=auto", "init_from_checkpoint=run", "output_dir=new"],
    ["--hydra_model_cfg=mine.yaml", "output_dir=new"],
    [_GPT2, *_TINY, "data=text", "input_file=notes", "output_dir=new"],
    [_GPT2, *_TINY, "data=jsonl", "train_files=text.jsonl", "text_field=text", "output_dir=new"],
    [_GPT2, *_TINY, "learning_rate=1e-3,1e-4", "-m"],
    [_GPT2, *_TINY, "--cfg", "job"],
    [_GPT2, "--help"],
    ["generate", "--checkpoint", "run", "--prompt", "the ", "--max_new_tokens", "3", "--temperature", "0.5"],
    [
        "generate",
        "--checkpoint",
        "run/best_model",
        "--max_new_tokens",
        "2",
        "--top_k",
        "5",
        "--num_samples",
        "2",
    ],
    [
        "generate",
        "--checkpoint",
        "run",
        "--chat",
        "--prompt",
        "hello",
        "--system",
        "you",
        "--max_new_tokens",
        "2",
    ],
    ["generate", "--config", "mine.yaml", "--max_new_tokens", "2", "--seed", "3", "--no_cache"],
    ["eval", "--checkpoint", "run", "--val_bytes", "64", "--output", "eval.json"],
    ["eval", "--checkpoint", "run", "--input_file", "notes", "--val_seq_len", "16", "--batch_size", "2"],
    ["eval", "--checkpoint", "run", "--data", "jsonl", "--input_file", "text.jsonl", "--text_field", "text"],
    ["eval", "--checkpoint", "run", "--max_samples", "2", "--raw"],
    ["export", "--checkpoint", "run", "--to", "safetensors", "--output", "new", "--save_precision", "bf16"],
    ["export", "--checkpoint", "run", "--to", "hf", "--output", "new"],
    ["show", "--hydra_model_cfg=mine.yaml", "--json"],
    ["show", _GPT2, "preset=small", "train_seq_len=128", "--vocab_size", "100"],
    ["show"],
    ["convert", "mine.yaml", "out.config", "--to", "config"],
    ["convert", "mine.yaml", "-o", "out.yaml"],
    ["schema", "out.schema"],
    ["bench", "step", "--hydra_model_cfg=mine.yaml", "--steps", "1", "--no_compile", "--output", "out.json"],
    ["bench", "generate", "--checkpoint", "run", "--batch", "1", "--prompt", "4", "--max_new_tokens", "2"],
    ["bench", "kernels", "--ops", "rms_norm", "--dtype", "fp32", "--turns", "2", "--device", "cpu"],
    ["doctor", "--json"],
    ["prepare", "data=text", "input_file=notes", "tokenizer=byte", "--out", "new", "--processes", "1"],
    [
        "prepare",
        "data=jsonl",
        "train_files=text.jsonl",
        "tokenizer=bpe-300",
        "--out",
        "new",
        "--processes",
        "1",
        "--text",
    ],
    ["prepare", "--clean", "tokens", "--dry_run"],
]
_PLACES = [
    "run",
    "run/checkpoint-6",
    "run/config.yaml",
    "run/model.pt",
    "notes",
    "text.jsonl",
    "mine.yaml",
    "new",
    "no",
]
_PLACES += [
    "bait.py",
    "bait",
    "fifo",
    ".",
    "..",
    "/",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "/root",
    "a\nb",
    "",
]
_FLAGS = [
    "--trust",
    "--raw",
    "--help",
    "-h",
    "--output",
    "--device",
    "--checkpoint",
    "--model_name",
    "--seed",
    "--json",
]
_FLAGS += [
    "--no_such",
    "--",
    "-",
    "--out",
    "--to",
    "--val_bytes",
    "--batch_size",
    "--draft",
    "--infill",
    "--steps",
    "-m",
]


@dataclass(frozen=True)
class Case:
    kind: str  # the command
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"--- {list(self.words)!r}"


def make(seed: int, number: int) -> Case:
    rng = random.Random(f"{seed} {number}")
    line = LINES[number % len(LINES)]
    words = list(line)
    for _ in range(rng.choice([1, 1, 2, 4])):
        words = _mutated(rng, words)
    words = [word.replace("\0", "") for word in words]  # no shell can give one
    return Case(line[0] if line[0].isalpha() else "train", tuple(words))


def _mutated(rng: random.Random, words: list[str]) -> list[str]:
    """With one accident, mostly behind the name of the command."""
    at = rng.randrange(len(words)) if words else 0
    pick = rng.random()
    if not words or pick < 0.15:
        return [*words[:at], *hostile.words(rng), *words[at:]]
    if pick < 0.25:
        return [*words[:at], *words[at + 1 :]]
    if pick < 0.32:
        return [*words[: at + 1], *words[at:]]
    if pick < 0.4:
        return rng.sample(words, len(words))
    if pick < 0.5:
        return [*words[:at], rng.choice(_FLAGS), *words[at:]]
    key, equals, old = words[at].partition("=")
    new = rng.choice([_place, _place, _value, _cut])(rng, old or key)
    return [*words[:at], f"{key}={new}" if equals else new, *words[at + 1 :]]


def _place(rng: random.Random, old: str) -> str:
    return rng.choice(_PLACES)


def _value(rng: random.Random, old: str) -> str:
    return rng.choice([hostile.text(rng), str(hostile.number(rng)), "-1", "0", "99999999999999999999", "nan"])


def _cut(rng: random.Random, old: str) -> str:
    """A slip of the finger."""
    at = rng.randrange(len(old) + 1)
    return old[:at] + rng.choice(["", "x", " ", "=", ",", "é", "/"]) + old[at + rng.randrange(2) :]


def _told(case: Case, place: Path, folder: Path) -> bool:
    """Whether a word of the command line names this place, or one within or around it; the schema of the project, which
    the command writes where no other place is named, is left as it is."""
    if case.kind == "schema" and place == CONFIGS:
        return True
    given = {word.rpartition("=")[2] for word in case.words}
    named = [(folder / os.path.expanduser(word)).resolve() for word in given if "/" in word or ".." in word]
    return any(name == place or name in place.parents or place in name.parents for name in named)


def try_(case: Case, folder: Path, watch: Watch) -> tuple[str, str]:
    shared = folder.parent / SHARED
    shutil.copytree(_run(shared), folder / "run")
    shutil.copytree(shared / "notes", folder / "notes")
    shutil.copyfile(shared / "text.jsonl", folder / "text.jsonl")
    sizes = "model_cfg: {n_layers: 1, d_model: 16, n_heads: 2, n_ctx: 32}\n"
    rest = "".join(f"{key}: {value}\n" for key, value in _settings())
    (folder / "mine.yaml").write_text(
        f"defaults: [training, _self_]\ntype: gpt2\n{sizes}{rest}", encoding="utf-8"
    )
    (folder / "bait.py").write_text(hostile.BAIT, encoding="utf-8")
    os.mkfifo(folder / "fifo")
    os.environ["MYTRAINER_CACHE"] = str(folder / "cache")
    os.environ["HOME"] = str(folder)
    with _nothing_large():
        said = say(list(case.words), folder, watch, programs=PROGRAMS)
    found, detail = outcome(said, folder, watch, (1, 2))
    if found == "touched file" and _told(case, watch.place, folder):
        return ASKED, detail
    return found, detail


def _settings() -> Iterator[tuple[str, str]]:
    for word in _TINY:
        key, _, value = word.partition("=")
        if "." not in key and key != "preset":
            yield key, value


@contextlib.contextmanager
def _nothing_large() -> Iterator[None]:
    """Every command as it is, but for what measures, for several processes, and for runs that are not tiny: those end
    where they would begin."""
    from trainer.commands import doctor, launch, sweep, train
    from trainer.commands.bench import generate, kernels, step

    start = launch.start

    def begun(*args: Any, **kwargs: Any) -> Any:
        raise SystemExit(0)

    def start_tiny(cfg: Any, model_cfg: Any, folder: Path, **kwargs: Any) -> float:
        sizes = [getattr(model_cfg, name, 0) or 0 for name in ("n_layers", "d_model", "n_ctx")]
        steps = cfg.num_iterations or 1000
        small = steps <= 8 and sizes[0] <= 4 and sizes[1] <= 128 and sizes[2] <= 512
        alone = launch.process_count(cfg.num_gpus, cfg.device) == 1
        return start(cfg, model_cfg, folder, **kwargs) if small and alone else begun()

    with (
        mock.patch.object(launch, "start", start_tiny),
        mock.patch.object(sweep, "_status", lambda plan, settings: 0),
        mock.patch.object(train, "hand_over", lambda plan, task: None),
        mock.patch.object(doctor, "lines_of", lambda section, where: []),
        mock.patch.object(step, "_measure", begun),
        mock.patch.object(generate, "_measure", begun),
        mock.patch.object(kernels, "_shown", begun),
    ):
        yield


def _run(shared: Path) -> Path:
    path = shared / "run-of-commands"
    if not path.exists():
        mine = shared / f"{path.name}-{os.getpid()}"
        if (ended := life(mine, "gpt2", words_of("gpt2", "jsonl", shared))) != "ended":
            raise RuntimeError(f"{ended}: {mine.with_suffix('.log').read_text()[-2000:]}")
        with suppress(OSError):  # another was quicker
            mine.rename(path)
    return path


def _prepare(shared: Path) -> None:
    torch.set_num_threads(1)
    hostile.prepare(shared)
    if not (shared / "shards").exists():
        make_text(shared)


CAMPAIGN = Campaign(make, try_, (OK, CLEAN, ASKED), _prepare, patience=2, life=60)
