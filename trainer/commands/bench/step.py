"""`bench step`: what this trainer costs, measured side by side in one process.

It compares, interleaved and by medians,

- the training loop (loader, denominators, clipping, finite check, meter) against a bare forward, backward and
  optimizer step of the same model on the same batches: the loop's overhead;
- `gpt2` against a plain GPT-2 loop (fp32, eager, all logits at once, a loop of the kind everybody has written), for
  fp32, bf16 and compiled blocks: tokens per second;

with --profile, where the time of a step of this configuration goes, by the name of what runs;

and, each in a process of its own, peak memory, and the time from starting the command to the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.compose import compose
from trainer.commands.bench import profile
from trainer.commands.bench.baseline import PlainGPT2
from trainer.commands.bench.turns import interleaved, median_ratio
from trainer.distributed import World, choose_device
from trainer.optim.optimizers import clip_gradients
from trainer.precision import autocast
from trainer.run.files import output_file, write_atomically
from trainer.run.manifest import collect_environment, peak_flops, peak_memory_bytes
from trainer.session import open_session
from trainer.view.console import Console

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from trainer.session import Session

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[3]
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"mixed_precision": "no", "torch_compile": False},
    "bf16": {"mixed_precision": "bf16", "torch_compile": False},
    "bf16 compiled": {"mixed_precision": "bf16", "torch_compile": True},
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py bench step",
        description="A training step. Extra arguments are Hydra overrides: preset=small train_seq_len=512 ...",
    )
    parser.add_argument("--hydra_model_cfg", "--config", default="configs/gpt2.yaml")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    parser.add_argument("--no_compile", action="store_true", help="leave out the compiled variant")
    parser.add_argument("--no_processes", action="store_true", help="leave out memory and start-up time")
    parser.add_argument(
        "--profile",
        type=int,
        nargs="?",
        const=20,
        metavar="N",
        help="also the time of a step by the name of the kernel: the N dearest (20)",
    )
    parser.add_argument("--output", help="write the figures to this JSON file")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # child: run one variant and report its peak memory
    args, overrides = parser.parse_known_args(argv)
    if args.steps < 1:
        raise ValueError(f"steps: must be at least 1, got {args.steps}")
    if args.profile is not None and args.profile < 1:
        raise ValueError(f"profile: must be at least 1, got {args.profile}")
    output = output_file(args.output) if args.output else None
    overrides = [f"--hydra_model_cfg={args.hydra_model_cfg}", "resume=none", *overrides]
    configs = compose(
        overrides, notify=lambda text: None if args.one else print(f"note: {text}", file=sys.stderr)
    )
    if args.one:
        print(json.dumps({"peak_memory_bytes": _memory_child(args.one, configs)}))
        return 0
    result: dict[str, Any] = {
        "environment": collect_environment(choose_device("auto")),
        "overrides": overrides,
    }
    console = Console(live=False, stream=sys.stderr)
    with console.doing("preparing and measuring the loop") as tell:
        _measure(result, args, configs, overrides, tell)
    if output:  # before anything is printed: whoever reads that may leave
        write_atomically(output, json.dumps(result, indent=2) + "\n")
    print(
        "\n".join(
            [_report(result), *(profile.report(result["profile"], args.profile) if args.profile else [])]
        )
    )
    return 0


def _measure(
    result: dict[str, Any],
    args: argparse.Namespace,
    configs: tuple[RunConfig, Any],
    overrides: list[str],
    tell: Callable[[str], object],
) -> None:
    """Add to `result` what the arguments ask for; `tell` what is being measured."""
    result["loop"] = _loop_overhead(configs, args.steps)
    if configs[0].type == "gpt2":
        names = [n for n in VARIANTS if not (args.no_compile and "compiled" in n)]
        tell("measuring a plain loop beside it")
        result["against_plain_loop"] = _against_plain(configs, names, args.steps)
    if args.profile:
        tell("profiling a step")
        session = _open(configs)
        result["profile"] = profile.by_name(partial(_bare_step, session), session.world.device)
    if not args.no_processes:
        tell("measuring memory and start-up")
        result["peak_memory_bytes"] = _memory(
            overrides, ["plain loop"] * (configs[0].type == "gpt2") + ["fp32", "bf16"]
        )
        result["seconds_to_first_step"] = _start_up(overrides)


def _open(configs: tuple[RunConfig, Any], variant: str | None = None) -> Session:
    cfg, model_cfg = configs
    # Steps of one size: those of `global_batch_size` rows.
    cfg = cfg.model_copy(update={"batch_stages": None, **(VARIANTS[variant] if variant else {})})
    return open_session(cfg, model_cfg, World(choose_device(cfg.device)))


def _bare_step(s: Session, index: int) -> None:
    """Forward, backward, clip, optimizer: what no training can leave out."""
    batch = s.loader.load(index, "mean")
    for prepared in batch.micro:
        with autocast(s.precision, s.world.device):
            output = s.adapter(prepared.to(s.world.device))
        terms = output.terms.values()
        sum(t.weight * t.sum / batch.denominators[t.denominator] for t in terms).backward()
    clip_gradients(s.parameters, s.cfg.max_grad_norm)
    s.optimizers.step(1.0)
    s.optimizers.zero_grad()


def _loop_overhead(configs: tuple[RunConfig, Any], steps: int) -> dict[str, float]:
    """The real Trainer's step against the bare one, on the same kind of session."""
    from trainer.loop import Trainer
    from trainer.run.record import RunRecord
    from trainer.signals import StopSignal

    with tempfile.TemporaryDirectory() as scratch:
        bare, ours = _open(configs), _open(configs)
        with RunRecord(Path(scratch), ours.world) as record:
            trainer = Trainer(ours, record, StopSignal())

            def real(index: int) -> None:
                batch = ours.loader.load(index, "mean")
                denominators, _, _ = trainer._agree(batch)
                trainer._train_step(batch, denominators)
                if (index + 1) % ours.cfg.logging_steps == 0:
                    trainer._log()

            seconds = interleaved(
                {"bare": lambda i: _bare_step(bare, i), "loop": real}, steps, ours.world.device
            )
    tokens = ours.plan.rows * ours.cfg.train_seq_len
    found = {
        "overhead_percent": 100 * (median_ratio(seconds["loop"], seconds["bare"]) - 1),
        "bare_tokens_per_second": tokens / statistics.median(seconds["bare"]),
        "loop_tokens_per_second": (speed := tokens / statistics.median(seconds["loop"])),
    }
    if peak := peak_flops(ours.world.device):
        found["mfu"] = ours.adapter.cost(ours.cfg.train_seq_len).training_per_token * speed / peak
    return found


def _plain_side(s: Session) -> Callable[[int], None]:
    """The loop everybody has written: fp32, eager, all logits, torch's AdamW."""
    torch.manual_seed(s.cfg.seed)
    model = PlainGPT2(s.adapter.model_cfg).to(s.world.device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=s.cfg.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )

    def step(index: int) -> None:
        batch = s.loader.load(index, "mean")
        for prepared in batch.micro:
            tensors = prepared.to(s.world.device).tensors
            loss = model(tensors["inputs"], tensors["targets"]) / len(batch.micro)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _against_plain(configs: tuple[RunConfig, Any], names: list[str], steps: int) -> dict[str, Any]:
    sessions = {name: _open(configs, name) for name in names}
    first = sessions[names[0]]
    sides: dict[str, Callable[[int], None]] = {"plain loop": _plain_side(first)}
    sides |= {name: partial(_bare_step, s) for name, s in sessions.items()}
    seconds = interleaved(sides, steps, first.world.device)
    tokens = first.plan.rows * first.cfg.train_seq_len
    return {
        "tokens_per_second": {name: tokens / statistics.median(t) for name, t in seconds.items()},
        "times_plain_loop": {name: median_ratio(seconds["plain loop"], seconds[name]) for name in names},
    }


def _memory_child(which: str, configs: tuple[RunConfig, Any]) -> int:
    s = _open(configs, "fp32" if which == "plain loop" else which)
    step = _plain_side(s) if which == "plain loop" else partial(_bare_step, s)
    for index in range(3):
        step(index)
    return peak_memory_bytes(s.world.device)


def _memory(overrides: list[str], sides: list[str]) -> dict[str, int]:
    found = {}
    for which in sides:
        command = [sys.executable, "mytrainer.py", "bench", "step", "--one", which]
        done = subprocess.run(
            [*command, *overrides], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            raise ValueError(f"the memory run of {which!r} failed: {done.stderr.strip().splitlines()[-1:]}")
        found[which] = json.loads(done.stdout.splitlines()[-1])["peak_memory_bytes"]
    return found


def _start_up(overrides: list[str]) -> float:
    """Seconds from starting the command to its first logged step, with the tokenizer and tokens cached."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        extra = [
            f"output_dir={run}",
            "num_iterations=2",
            "logging_steps=1",
            "val_loss_every=0",
            "val_bytes=2000",
        ]
        started = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "mytrainer.py", *overrides, *extra, "sample_tokens=0"],
            cwd=ROOT,
            env={**os.environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        metrics = run / "metrics.jsonl"
        seconds = None
        while child.poll() is None:
            if seconds is None and metrics.exists() and metrics.stat().st_size:
                seconds = time.perf_counter() - started
            time.sleep(0.02)
        if child.returncode or seconds is None:
            assert child.stderr is not None
            raise ValueError(
                f"the start-up run failed: {child.stderr.read().decode('utf-8', 'replace').strip()[-300:]}"
            )
    return seconds


def _report(result: dict[str, Any]) -> str:
    e = result["environment"]
    lines = [f"{e['device']}, {e['threads']} threads, torch {e['torch']}, load average {e['load_average']}"]
    loop = result["loop"]
    lines.append(
        f"loop overhead        {loop['overhead_percent']:+.1f} %   (bare {loop['bare_tokens_per_second']:,.0f}, "
        f"loop {loop['loop_tokens_per_second']:,.0f} tokens/s)"
    )
    if "mfu" in loop:
        lines.append(f"share of the peak    {loop['mfu']:.1%}")
    if plain := result.get("against_plain_loop"):
        speeds = plain["tokens_per_second"]
        lines.append(f"plain loop           {speeds['plain loop']:>9,.0f} tokens/s")
        for name, ratio in plain["times_plain_loop"].items():
            lines.append(f"gpt2 {name:<16}{speeds[name]:>9,.0f} tokens/s   {ratio:.2f} x plain loop")
    for name, peak in result.get("peak_memory_bytes", {}).items():
        lines.append(f"peak memory          {peak / 2**20:>9,.0f} MiB  {name}")
    if "seconds_to_first_step" in result:
        lines.append(f"start to first step  {result['seconds_to_first_step']:>9.1f} s")
    return "\n".join(lines)
