"""The `bench` command: what things cost, measured side by side in one process. One file for each thing measured."""

from __future__ import annotations

import argparse

from naming import load, not_one_of

__all__ = ["BENCHMARKS", "main"]

BENCHMARKS = {  # name -> "module:function", called with the words that follow; and what it measures
    "step": ("trainer.commands.bench.step:main", "a training step against a bare one and a plain loop"),
    "generate": (
        "trainer.commands.bench.generate:main",
        "generation against a plain cached loop, and what the machine allows",
    ),
    "kernels": (
        "trainer.commands.bench.kernels:main",
        "operations: ours, the definition, compiled, other libraries'",
    ),
}


def main(argv: list[str]) -> int:
    named = next((i for i, word in enumerate(argv) if word in BENCHMARKS), None)
    if named is not None:
        return load(BENCHMARKS[argv[named]][0])([*argv[:named], *argv[named + 1 :]])
    listed = "\n".join(f"  {name:<10}{what}" for name, (_, what) in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py bench",
        description=f"Benchmarks, each with a --help of its own:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", help=f"one of {', '.join(BENCHMARKS)}")
    args, _ = parser.parse_known_args(argv)
    raise ValueError(f"bench: {not_one_of(args.what, BENCHMARKS)}")
