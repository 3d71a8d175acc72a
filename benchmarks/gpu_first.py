"""The steps of gpu_first.sh, and what runs them: `python -m benchmarks.gpu_first list`

A step is a few commands; what one of them writes as JSON, or as lines of it by test, becomes its figures. After each
command the step's file is written anew, so that whoever is stopped half way has the first half.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import pytest_results
from benchmarks.open_points import QUESTIONS
from benchmarks.sessions import without_a_base
from kernels import KERNELS
from kernels.spec import spec_of
from models import ARCHITECTURES
from trainer.distributed import choose_device
from trainer.run.files import write_atomically
from trainer.run.manifest import collect_environment

__all__ = ["Part", "Step", "main", "steps"]

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 570  # of a step: its command is stopped by others after ten minutes
TAIL = 3000  # characters of a failing command's output that its file keeps
FULL = [
    *("preset=none", "model_cfg.vocab_size=50304", "model_cfg.n_ctx=1024", "train_seq_len=1024"),
    *("global_batch_size=16", "batch_size=16", "data=synthetic"),
]
TINY = [
    *(
        "preset=none",
        "model_cfg.d_model=32",
        "model_cfg.n_layers=3",
        "model_cfg.n_heads=2",
        "model_cfg.n_ctx=32",
    ),
    *("train_seq_len=32", "global_batch_size=2", "batch_size=2", "data=synthetic", "synthetic_bytes=20000"),
]


@dataclass(frozen=True)
class Part:
    """A command; `figures`: the file that it writes its figures to."""

    name: str
    command: list[str]
    figures: Path | None = None


@dataclass(frozen=True)
class Step:
    what: str
    parts: list[Part]


class Commands:
    """The commands that steps consist of, for a device, at full or tiny size. `work`: an empty folder for what they
    leave behind."""

    def __init__(self, device: str, tiny: bool, work: Path) -> None:
        self.device, self.tiny, self.work = device, tiny, work
        self.sizes = [*(TINY if tiny else FULL), f"device={device}"]
        self.bf16 = [*self.sizes, "mixed_precision=bf16"]
        self.compiled = ["torch_compile=false"] if tiny else []

    def pytest(self, name: str, *words: str) -> Part:
        lines = self.work / f"{name}.jsonl"
        plugin = ("-p", "benchmarks.pytest_results", "--results", lines)
        settings = (
            "-c",
            ROOT / "pyproject.toml",
        )  # not what lies beside the results, which it would look for
        return Part(name, _python("-m", "pytest", "-q", *settings, *plugin, *words), lines)

    def gpu_tests(self, name: str, workers: int, *words: str) -> Part:
        workers = 0 if self.tiny else workers  # each collects all tests, of which none runs without a GPU
        return self.pytest(name, "-m", "gpu", "-n", str(workers), "--dist", "load", *words)

    def ours(self, name: str, *words: str) -> Part:
        """A command of mytrainer.py that writes JSON."""
        file = self.work / f"{name}.json"
        return Part(name, _python("mytrainer.py", *words, "--output", file), file)

    def train(self, name: str, *words: str, folder: str | None = None) -> Part:
        run = self.work / (folder or name)
        where = [] if any(word.startswith("resume=") for word in words) else [f"output_dir={run}"]
        return Part(name, _python("mytrainer.py", *words, *where), run / "summary.json")

    def driver(self, name: str, *words: str) -> Part:
        """A module of this folder."""
        file = self.work / f"{name}.json"
        return Part(name, _python("-m", f"benchmarks.{name.partition('-')[0]}", file, *words), file)

    def bench_step(self, type_: str) -> Part:
        file = f"--hydra_model_cfg=configs/{type_}.yaml"
        turns = ["--steps", "2", "--no_compile"] if self.tiny else ["--steps", "10"]
        return self.ours(f"step-{type_}", "bench", "step", file, "--profile", "40", *turns, *self.bf16)

    def kernels(self, ops: list[str], *words: str) -> list[Part]:
        """One by one, so that the last ones alone are lost where time ends."""
        quick = self.tiny and "--tune" not in words
        few = ["--turns", "2", "--no_compile", "--dtype", "fp32"] if quick else []
        command = ["bench", "kernels", "--device", self.device, *few, *words]
        return [self.ours(f"{op}{''.join(words)}", *command, "--ops", op) for op in ops]

    def against_gpt2(self, types: Iterable[str]) -> list[Part]:
        return [
            self.driver(f"architectures-{group}", group, *self.bf16, *self.compiled)
            for group in self._apart(sorted(types))
        ]

    def open_points(self) -> list[Part]:
        words = ("--device", self.device, *(["--tiny"] if self.tiny else []))
        return [
            self.driver(f"open_points-{group}", *group.split(","), *words) for group in self._apart(QUESTIONS)
        ]

    def _apart(self, names: Iterable[str]) -> list[str]:
        """One to a process, for memory of its own and so that the last alone are lost where time ends; all in one at
        tiny size, where starting takes longer than all of them."""
        return [",".join(names)] if self.tiny else list(names)


def _python(*words: str | Path) -> list[str]:
    return [sys.executable, *map(str, words)]


def steps(device: str, tiny: bool, work: Path) -> dict[str, Step]:
    """All of them, by name."""
    run = Commands(device, tiny, work)
    sizes, compiled = run.sizes, run.compiled
    model = "--hydra_model_cfg=configs/gpt2.yaml"
    short = [
        model,
        *sizes,
        "sample_tokens=0",
        "val_bytes=2000",
        "num_iterations=4",
        "save_steps=2",
        *compiled,
    ]
    only = ["--architecture", "gpt2", "-n", "0", "-k", "test_model"] if tiny else ["-n", "8"]
    as_a_user = [*short] if tiny else [model, "time_budget=8", f"device={device}"]
    texts = ["--turns", "1", "--max_new_tokens", "2", "--batch", "1,2", "--prompt", "4"] if tiny else []
    decoders = [word for word in sizes if not word.startswith(("device=", "batch_size="))]
    measurable = set(without_a_base())
    next_token = {n for n in measurable if ARCHITECTURES[n].adapter.startswith("adapters.default:")}
    of_kernels, small_sizes = "tests/kernels", "test_small_sizes"  # 700 of 800 tests
    on_gpu = device != "cpu"
    measured = [op for op in KERNELS if spec_of(op) is not None]
    of_losses = [op for op in measured if op.startswith("linear_")][: 1 if tiny else None]
    others = [op for op in measured if not op.startswith("linear_")][: 1 if tiny else None]
    return {
        "1a": Step(
            "the fp16 scaler, a checkpoint that changes the device, the largest batch",
            [
                run.train("fp16", *short, f"mixed_precision={'no' if tiny else 'fp16'}"),
                run.train("run", *short, "mixed_precision=no", folder="moving"),
                run.train(
                    "elsewhere",
                    f"resume={work / 'moving'}",
                    "device=cpu",
                    "num_iterations=6",
                    folder="moving",
                ),
                run.train("batch", *short, "batch_size=auto"),
            ],
        ),
        "1b": Step(
            "the contract of every architecture on the device",
            [run.pytest("contract", "tests/contract", "--device", device, *only)],
        ),
        "1c": Step(
            "kernels at small sizes on the GPU",
            [run.gpu_tests("kernels-small", 8, of_kernels, "-k", small_sizes)],
        ),
        "1d": Step(
            "kernels at the sizes of models, and their launch choices",
            [run.gpu_tests("kernels-large", 2, of_kernels, "-k", f"not {small_sizes}")],
        ),
        "1e": Step("the other tests that need a GPU", [run.gpu_tests("others", 8, f"--ignore={of_kernels}")]),
        "2": Step("a run as a user starts it", [run.train("first-run", *as_a_user)]),
        "3": Step("waits for the GPU in a step", [run.driver("host_syncs", *sizes, *compiled)]),
        "4a": Step("a step of gpt2 at 124M, bf16", [run.bench_step("gpt2")]),
        "4b": Step("a step of vanilla at 124M, bf16", [run.bench_step("vanilla")]),
        "4c": Step("what documents cost attention", [run.driver("documents", *run.bf16, *compiled)]),
        "5a": Step("output layers with their losses against their peers", run.kernels(of_losses)),
        "5b": Step("the other operations against their peers", run.kernels(others)),
        "5c": Step(
            "launch choices for this GPU", run.kernels([*of_losses, *others], "--tune") if on_gpu else []
        ),
        "6a": Step("next-token architectures against gpt2", run.against_gpt2(next_token)),
        "6b": Step("the other architectures against gpt2", run.against_gpt2(measurable - next_token)),
        "7": Step("open points", run.open_points()),
        "8": Step(
            "generation of gpt2 at 124M",
            [run.ours("generate", "bench", "generate", model, "--device", device, *texts, *decoders)],
        ),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_first.sh")
    parser.add_argument("step", nargs="+", help="names or beginnings of names, `all`, or `list`")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tiny", action="store_true", help="sizes that measure nothing, to try the script")
    parser.add_argument("--out", type=Path, help="default: $OUT, else benchmarks/results/<device>-<date>")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        known = steps(args.device, args.tiny, Path(scratch))
        if args.step == ["list"]:
            print("\n".join(f"{name:<4}{step.what}" for name, step in known.items()))
            return 0
        chosen = _chosen(args.step, known)
        environment = collect_environment(choose_device(args.device))
        out = args.out or Path(os.environ.get("OUT") or _folder(environment["device"]))
        out.mkdir(parents=True, exist_ok=True)
        failures = [failure for name in chosen for failure in _run(name, known[name], out, environment)]
    print(f"figures in {out}")
    print("\n".join(["failed:", *failures]) if failures else "nothing failed")
    return 1 if failures else 0


def _chosen(given: Iterable[str], known: dict[str, Step]) -> list[str]:
    chosen = []
    for word in given:
        found = [name for name in known if word == "all" or name.startswith(word)]
        if not found:
            raise SystemExit(f"step {word!r}: not one of all, {', '.join(known)}")
        chosen += found
    return chosen


def _folder(device: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"{device.replace(' ', '-')}-{date.today().isoformat()}"


def _run(name: str, step: Step, out: Path, environment: dict[str, Any]) -> list[str]:
    """The commands of a step, one after the other; returns what failed."""
    print(f"== {name}: {step.what}", flush=True)
    ends, failures = time.monotonic() + SECONDS, []
    found: dict[str, Any] = {"step": name, "what": step.what, "environment": environment, "parts": []}

    def keep() -> None:
        write_atomically(out / f"{name}.json", json.dumps(found, indent=2) + "\n")

    keep()  # some step has nothing to do on a CPU
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        for part in step.parts:
            result = _part(part, log, ends - time.monotonic())
            found["parts"].append(result)
            keep()
            print(f"   {part.name:<24}{result['status']:<16}{result['seconds']:>6.0f} s", flush=True)
            if result["status"] != "done":
                failures.append(f"   {name} {part.name}: {result['status']}, see {out / f'{name}.log'}")
    return failures


def _part(part: Part, log: Any, seconds: float) -> dict[str, Any]:
    if seconds <= 1:
        return {
            "name": part.name,
            "command": shlex.join(part.command),
            "status": "no time left",
            "seconds": 0,
        }
    log.write(f"$ {shlex.join(part.command)}\n")
    log.flush()
    before, started = log.tell(), time.monotonic()
    try:
        code = subprocess.run(
            part.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds
        ).returncode
        status = "done" if code == 0 else f"exit {code}"
    except subprocess.TimeoutExpired:
        status = "out of time"
    result: dict[str, Any] = {
        "name": part.name,
        "command": shlex.join(part.command),
        "status": status,
        "seconds": time.monotonic() - started,
        "figures": _figures(part.figures),
    }
    if status != "done":
        printed = Path(log.name).read_bytes()[before:].decode("utf-8", "replace")
        result["output"] = printed[-TAIL:]
    elif part.figures and result["figures"] is None:
        result["status"] = "no figures"
    return result


def _figures(file: Path | None) -> Any:
    if file is None or not file.exists():
        return None
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    return pytest_results.figures(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
