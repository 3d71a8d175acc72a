"""The `convert` command: a model file of any format as YAML, or as a file of directives."""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.choose import model_paths
from configs.convert import to_directives, to_yaml
from configs.files import EXTENSIONS, read_model, shown
from configs.messages import ConfigError
from configs.request import Request

__all__ = ["main"]

WRITERS = {"yaml": to_yaml, "config": to_directives}
ENDINGS = {**dict.fromkeys(EXTENSIONS, "yaml"), ".config": "config"}


def main(argv: list[str]) -> int:
    """`python mytrainer.py convert IN [OUT] [--to yaml|config]`."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py convert",
        description="Write a model file of any format (.yaml .json .config .py) as YAML, or as a file of directives, "
        "that composes to the same. Comments are not taken along, and what the other format cannot say is refused by "
        "name.",
    )
    parser.add_argument("file", metavar="IN", help="a model file, as --hydra_model_cfg takes it")
    parser.add_argument("out", metavar="OUT", nargs="?", help="where to write to; left out, it is printed")
    parser.add_argument("-o", "--output", metavar="OUT", help="the same")
    parser.add_argument(
        "--to",
        choices=[*WRITERS],
        help="left out: what OUT ends in, else config of YAML and yaml of all others",
    )
    args = parser.parse_args(argv)
    if args.out and args.output:
        raise ConfigError("command line: OUT is given twice. Leave out -o")
    out = Path(args.out or args.output).expanduser() if args.out or args.output else None
    (path, *others), _ = model_paths(Request(models=[f"'{args.file}'"]))
    if others:
        raise ConfigError(f"command line: {args.file}: one file is converted at a time")
    to = args.to or _meant(path, out)
    if out is not None:
        _check(out, to)
    text = WRITERS[to](read_model(path), out or Path("stdout"))
    if out is None:
        print(text, end="")
        return 0
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    print(f"{shown(path)} -> {shown(out.absolute())}")
    return 0


def _meant(path: Path, out: Path | None) -> str:
    if out is not None and out.suffix in ENDINGS:
        return ENDINGS[out.suffix]
    return "config" if path.suffix in EXTENSIONS else "yaml"


def _check(out: Path, to: str) -> None:
    """ConfigError where nothing can be written, or not under this name."""
    if ENDINGS.get(out.suffix) != to:
        endings = " or ".join(e for e, name in ENDINGS.items() if name == to)
        raise ConfigError(
            f"command line: {out}: a file of {to} ends in {endings}. Nearest: {out.with_suffix('.' + to)}"
        )
    if out.exists():
        raise ConfigError(f"command line: {out} is there already. Choose another name, or remove it")
    if not out.parent.is_dir():
        raise ConfigError(f"command line: {out}: there is no folder {out.parent}")
