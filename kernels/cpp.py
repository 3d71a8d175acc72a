"""Kernels for CPUs in C++, compiled by this machine's compiler when they are first needed: a source to a library.

As Triton does on a GPU: of what eager torch has no operation for, and where a pass over memory for every product is
what takes the time. Plain C++ without torch's headers, so that it is compiled in a second, for exactly this processor.
Functions take a range of items of work, which threads share out; each item is computed alike whoever computes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.cache import cache_root, write_atomic

__all__ = ["Library", "compiler", "library", "missing", "named", "pointer", "shared_out"]

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
HEADERS = ("vectors.h",)
WORTH_A_THREAD = 100_000  # numbers: a thread takes as long to begin as some ten thousand of them


class CompilerError(RuntimeError):
    """There is no compiler, or it refuses; the message says which."""


class Library:
    """A compiled source. Its functions: `(first item, last item + 1, *arguments)`."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))

    def run(self, name: str, items: int, work: int, *arguments: Any) -> None:
        """Call `name` on all items, on as many threads as torch computes with; on one where `work`, the numbers that it
        computes, is little. The calls release the interpreter."""
        function = getattr(self._loaded, name)
        function.restype = None

        def compute(first: int, last: int) -> None:
            function(ctypes.c_int64(first), ctypes.c_int64(last), *arguments)

        shared_out(compute, items, work)


def shared_out(compute: Callable[[int, int], None], items: int, work: int) -> None:
    """`compute(first, last + 1)` of all items. Threads are begun for each call: a pool would not survive a fork."""
    threads = min(torch.get_num_threads(), items, work // WORTH_A_THREAD)
    if threads <= 1:
        return compute(0, items)
    borders = [items * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compute, borders[:-1], borders[1:]))


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    """To the first number of a contiguous tensor; null for None and for a tensor without numbers."""
    if t is None or not t.numel():
        return ctypes.c_void_p()
    assert t.is_contiguous()
    return ctypes.c_void_p(t.data_ptr())


def named(function: str, t: Tensor) -> str:
    """Of the functions of a source, the one for numbers of this kind."""
    return f"{function}_{str(t.dtype).removeprefix('torch.')}"


def missing(source: str) -> str | None:
    """Why `source`, a file below kernels/, cannot be had on this machine; None if it can. Compiles it."""
    try:
        library(source)
    except CompilerError as e:
        return str(e)
    return None


def compiler() -> str:
    """The one that compiles, with its arguments. CompilerError where there is none."""
    return " ".join(_compiler()[0])


@cache
def library(source: str) -> Library:
    """`source`, a file below kernels/, compiled: once for every version of it, compiler and kind of processor."""
    compiler, target = _compiler()
    says = " ".join(compiler)
    files = [FOLDER / source, *(FOLDER / header for header in HEADERS)]
    text = b"".join(file.read_bytes() for file in files)
    name = hashlib.sha256("\n".join((*compiler, target, *FLAGS)).encode() + text).hexdigest()[:20]
    built = cache_root() / "cpp" / f"{Path(source).stem}-{name}.so"
    with suppress(OSError):  # not there, or cut short
        return Library(built)
    made = _compile(compiler, files[0])
    try:
        try:
            write_atomic(built, lambda file: file.write(made))
        except OSError:  # nothing can be kept there: for this process alone
            with tempfile.TemporaryDirectory() as folder:
                (alone := Path(folder) / built.name).write_bytes(made)
                return Library(alone)
        return Library(built)
    except OSError as e:
        raise CompilerError(f"what {says} made of {source} cannot be loaded ({e})") from e


def _compile(compiler: tuple[str, ...], source: Path) -> bytes:
    try:
        with tempfile.TemporaryDirectory() as folder:
            to = Path(folder) / "library.so"
            run = _run(*compiler, *FLAGS, "-march=native", str(source), "-o", str(to))
            if not run.returncode:
                return to.read_bytes()
    except OSError as e:
        raise CompilerError(f"{' '.join(compiler)} made no library of {source.name} ({e})") from e
    said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip())
    raise CompilerError(f"{' '.join(compiler)} cannot compile {source.name}: {said}")


@cache
def _compiler() -> tuple[tuple[str, ...], str]:
    """(its path and arguments, what it says of this processor and itself): $CXX, or the system's."""
    wanted = (
        [shlex.split(os.environ["CXX"])]
        if os.environ.get("CXX", "").strip()
        else [["c++"], ["g++"], ["clang++"]]
    )
    found = next(((path, *words[1:]) for words in wanted if (path := shutil.which(words[0]))), None)
    if found is None:
        raise CompilerError(f"there is no C++ compiler ({', '.join(map(' '.join, wanted))})")
    try:
        answer = _run(*found, "-march=native", "-dM", "-E", "-x", "c++", os.devnull)
    except OSError as e:
        raise CompilerError(f"{' '.join(found)} cannot be run ({e})") from e
    if answer.returncode:
        raise CompilerError(f"{' '.join(found)} does not know -march=native: {answer.stderr.strip()}")
    return found, answer.stdout


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
