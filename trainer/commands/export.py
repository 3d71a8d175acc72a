"""The `export` command: trained weights in files for elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from configs.trust import trusting
from naming import expand_path, look_up, shorten
from trainer.errors import StopRequested
from trainer.export import FORMS
from trainer.export.form import Contents, Form
from trainer.export.rounding import PRECISIONS, Rounding
from trainer.run.checkpoint import write_digests, write_file
from trainer.run.files import new_folder
from trainer.run.restore import add_source_arguments, named, restore, say
from trainer.run.source import open_source
from trainer.run.tensor_files import safetensors_library, write_tensors
from trainer.signals import StopSignal
from trainer.view.console import Console
from trainer.view.format import quantity

__all__ = ["main"]

_AS_TRAINED = "null"  # of save_precision, as in a model file


def main(argv: list[str]) -> int:
    """`python mytrainer.py export`: the weights that `eval` and `generate` use, in a folder of their own."""
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py export",
        description="Write trained weights, their architecture and tokenizer into a folder: the weights that eval and "
        "generate use. " + ". ".join(f"{name}: {row.description}" for name, row in FORMS.items()) + ".",
    )
    add_source_arguments(parser)
    parser.add_argument("--to", required=True, metavar=f"{{{','.join(FORMS)}}}", help="the form")
    parser.add_argument("--output", required=True, help="the folder to make; it may exist if it is empty")
    parser.add_argument(
        "--save_precision",
        choices=[*PRECISIONS, _AS_TRAINED],
        help=f"of the weights; {_AS_TRAINED}: as trained (default: the run's save_precision)",
    )
    args = parser.parse_args(argv)
    given = named(args)
    if given is None:
        raise ValueError("nothing to export. Give --checkpoint <run folder> or --model_name <name>")
    form: Form = look_up(FORMS, args.to, "to").load()()
    folder = _new(args.output)
    safetensors_library()

    console = Console(live=False, stream=sys.stderr)
    with trusting(args.trust), console.doing("reading the weights"):
        source = open_source(given, say)
        form.check(*source.config(lambda text: None))  # what there is to note, `restore` says
        restored = restore(source, raw=args.raw, device="cpu")
        if form.adds_up(restored.adapter):
            restored.merge()
    precision = args.save_precision or restored.cfg.save_precision
    rounding = Rounding(None if precision == _AS_TRAINED else precision)
    contents = form.contents(restored, rounding)
    with StopSignal("leaving without an export") as stop:
        try:
            with console.doing("writing them"), stop.at_once():
                sizes = _write(folder, contents, form)
        except StopRequested:
            print(f"{stop.name} received: stopped before {folder} was written", file=sys.stderr)
            return 130
    for note in (*contents.notes, *filter(None, [str(rounding)])):
        say(note)
    print(f"{folder}: {restored.weights} weights of {source.path} ({source.type}, {_precisions(contents)})")
    print(f"  {', '.join(f'{name} {quantity(size)}B' for name, size in sizes.items())}")
    print("open it with")
    for line in form.opened_by(folder, contents):
        print(f"  {line}")
    return 0


def _precisions(contents: Contents) -> str:
    """Those of the weights."""
    there = {tensor.dtype for tensor in contents.tensors.values()}
    return ", ".join(name for name, dtype in PRECISIONS.items() if dtype in there)


def _new(output: str) -> Path:
    """The folder to write. ValueError where it cannot be one: now, not when the work is done."""
    if not output:
        raise ValueError("output: no folder is named. Give one that is not there yet")
    path = expand_path(output)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output: {path} is a file. Give a folder that is not there yet")
    if path.is_dir() and (there := sorted(p.name for p in path.iterdir())):
        raise ValueError(
            f"output: {path} is not empty (it holds {shorten(there)}). Give a new or an empty folder"
        )
    if path.is_dir() and path.samefile(Path.cwd()):
        raise ValueError("output: the folder that you are in cannot be replaced. Give the name of one in it")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise ValueError(f"output: {above} is a file, and no folder can be made in it. Give another folder")
    try:
        with tempfile.TemporaryDirectory(
            dir=above
        ):  # rights alone say little: to root, of /proc, of a full disk
            return path
    except OSError as error:
        raise ValueError(f"output: cannot write in {above}: {error.strerror}. Give another folder") from None


def _write(folder: Path, contents: Contents, form: Form) -> dict[str, int]:
    """Put everything there in one go; bytes by name."""
    with new_folder(folder.resolve()) as made:
        digests = {form.file: write_tensors(made / form.file, contents.tensors)}
        for name, content in contents.files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            digests[name] = write_file(made / name, text.encode())
        if form.digests:
            write_digests(made, digests)
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
