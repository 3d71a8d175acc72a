"""Configurations of strangers: every loader and the command line, up to where a run would start."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from configs.files import CONFIGS, FORMATS, options
from configs.formats.memory_sections import SECTIONS, defaults
from tests.campaign import hostile
from tests.campaign.command import CLEAN, OK, outcome, say
from tests.campaign.jail import Campaign, Watch


@dataclass
class Case:
    """Files of a folder, and the words of a command line that is given in it."""

    kind: str
    files: dict[str, bytes]
    words: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        files = [
            f"--- {name}\n{data.decode('utf-8', 'backslashreplace')[:3000]}"
            for name, data in self.files.items()
        ]
        return "\n".join([*files, f"--- {self.kind}: {self.words!r}"])


# --- what is tried ---------------------------------------------------------------------------------------


def make(seed: int, number: int) -> Case:
    """The case of this number."""
    rng = random.Random(f"{seed} {number}")
    case = _KINDS[number % len(_KINDS)](rng)
    case.files.setdefault("bait.py", hostile.BAIT.encode())
    if case.kind != "run" and rng.random() < 0.1:
        case.words = [
            "convert",
            *(w for w in case.files if w.startswith("mine")),
            *rng.choice([[], ["out.yaml"], ["out.config"]]),
        ]
    elif rng.random() < 0.3:
        case.words += hostile.words(rng)
    return case


def _of_bytes(rng: random.Random) -> Case:
    name = f"mine{rng.choice(FORMATS)}"
    return Case("bytes", {name: hostile.random_bytes(rng)}, [f"--hydra_model_cfg={name}"])


def _of_tree(rng: random.Random) -> Case:
    write, ending = rng.choice(
        [
            (hostile.as_yaml, ".yaml"),
            (hostile.as_yaml, ".yml"),
            (hostile.as_json, ".json"),
            (hostile.as_directives, ".config"),
            (hostile.as_python, ".py"),
        ]
    )
    data = write(rng, hostile.tree(rng)).encode("utf-8", "surrogatepass")
    other = hostile.as_yaml(rng, {hostile.key(rng): hostile.value(rng)}).encode()
    files = {f"mine{ending}": data, "other.yaml": other}
    return Case("tree", files, [f"--hydra_model_cfg=mine{ending}"])


def _of_mutation(rng: random.Random) -> Case:
    path = rng.choice(_shipped())
    name = f"mine{path.suffix}"
    return Case(
        "mutated file", {name: hostile.mutated(rng, path.read_bytes())}, [f"--hydra_model_cfg={name}"]
    )


def _of_words(rng: random.Random) -> Case:
    model = rng.choice(
        [
            *(p.name for p in _shipped() if p.suffix != ".yaml"),
            *options(),
            "gpt2",
            "vanilla",
            "mine.yaml",
            "no",
            "*.yaml",
            "gpt2,mamba",
        ]
    )
    mine = b"defaults: [training, _self_]\ntype: gpt2\n"
    words = [f"--hydra_model_cfg={model}", *hostile.words(rng)]
    if rng.random() < 0.3:
        words.append("-m")
    rng.shuffle(words)
    return Case("words", {"mine.yaml": mine}, words)


def _of_run(rng: random.Random) -> Case:
    """A run of somebody else, one of its two files damaged."""
    config = b"defaults: [training, _self_]\ntype: gpt2\npreset: nano\nenv: {}\n"
    config += b"model_cfg: {n_layers: 2, d_model: 32, n_heads: 2, n_ctx: 32}\ntrain_seq_len: 32\n"
    locked = b'{"format": 1, "type": "gpt2", "train_seq_len": 32, "batch_size": 4,\n'
    locked += b'"model_cfg": {"n_layers": 2, "d_model": 32,\n "n_heads": 2, "n_ctx": 32}}\n'
    files = {"run/config.yaml": config, "run/checkpoint-1/config.json": locked, "run/manifest.json": b"{}"}
    name = rng.choice(["run/config.yaml", "run/checkpoint-1/config.json"])
    files[name] = hostile.mutated(rng, files[name])
    return Case("run", files, [rng.choice(["resume=run", "resume=run/checkpoint-1", "output_dir=run"])])


def _of_sections(rng: random.Random) -> Case:
    """A file of `model:`, `memory:` and `training:`, with keys of these sections and others, some of the values as they
    are meant."""
    sections: dict[str, Any] = {}
    for name in rng.sample(SECTIONS, rng.randrange(1, 4)):
        keys = list(defaults()[name]) + [hostile.key(rng) for _ in range(3)]
        keys += defaults()[rng.choice(SECTIONS)] if rng.random() < 0.2 else []
        known = {k: v for section in SECTIONS for k, v in defaults()[section].items()}
        sections[name] = {
            k: known[k] if k in known and rng.random() < 0.6 else hostile.value(rng)
            for k in rng.sample(keys, min(len(keys), rng.choice([0, 1, 2, 4, 12])))
        }
    if rng.random() < 0.15:
        sections[rng.choice([*SECTIONS, hostile.key(rng)])] = hostile.value(rng)
    data = hostile.as_yaml(rng, sections).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        data = hostile.mutated(rng, data)
    words = ["data=embedded", "training_mode=pretraining", "dataset_name=null", "preset=nano"]
    return Case(
        "sections", {"mine.yaml": data}, ["--hydra_model_cfg=mine.yaml", *words[: rng.choice([0, 4])]]
    )


_KINDS: list[Callable[[random.Random], Case]] = [
    *(_of_bytes, _of_tree, _of_mutation, _of_words, _of_run, _of_sections),
]


def _shipped() -> list[Path]:
    """Model files of every format."""
    return sorted(p for p in CONFIGS.iterdir() if p.suffix in FORMATS[:-1]) + [
        CONFIGS / "preset" / "nano.yaml"
    ]


# --- how it is tried -------------------------------------------------------------------------------------


def try_(case: Case, folder: Path, watch: Watch) -> tuple[str, str]:
    """The command of a case, up to where a run would start."""
    for name, data in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with _nothing_starts():
        said = say(case.words, folder, watch, writes=case.words[:1] == ["convert"])
    return outcome(said, folder, watch)


@contextlib.contextmanager
def _nothing_starts() -> Iterator[None]:
    """The command line as it is, without what comes behind the checks: a run, its folder, Hydra's own pages."""
    from configs.compose import check
    from trainer.commands import launch, sweep, train

    with (
        mock.patch.object(train, "_checked", lambda plan, tree: (check(plan, tree), Path())),
        mock.patch.object(train, "_start", lambda plan, checked, folder: None),
        mock.patch.object(train, "hand_over", lambda plan, task: None),
        mock.patch.object(sweep, "_status", lambda plan, settings: 0),
        mock.patch.object(sweep.study, "settings", lambda *args: []),
        mock.patch.object(launch, "require_writable", lambda folder: None),
    ):
        yield


CAMPAIGN = Campaign(make, try_, (OK, CLEAN), hostile.prepare)
