"""The `schema` command: JSON Schema of our YAML files, for editors."""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.files import shown
from configs.json_schema import FILE, HEADER, text
from trainer.run.files import write_atomically

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """`python mytrainer.py schema [OUT]`."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py schema",
        description="Write the JSON Schema of YAML model files, by which editors complete and check them. Those of the "
        "project name it in their first lines.",
    )
    parser.add_argument(
        "out", metavar="OUT", nargs="?", type=Path, default=FILE, help=f"left out: {shown(FILE)}"
    )
    out = parser.parse_args(argv).out.expanduser().absolute()
    write_atomically(out, text())
    print(f"{shown(out)}. In a file of yours, as its first line: {HEADER}{out}")
    return 0
