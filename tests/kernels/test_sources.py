"""What can be read off the text of kernels/: what a GPU would do otherwise, and who imports Triton."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from kernels import KERNELS
from tests.test_house import MODULES, imported_at_once

FOLDER = Path(kernels.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))


def faults(source: str) -> list[str]:
    """Calls of tl.dot without `input_precision` (fp32 is TF32 on a GPU, exact in the interpreter), masked tl.load
    without `other` (anything on a GPU, 0 in the interpreter)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg for word in node.keywords}
        if name == "tl.dot" and "input_precision" not in given:
            found.append(f"line {node.lineno}: tl.dot without input_precision")
        masked = "mask" in given or len(node.args) > 1
        if name == "tl.load" and masked and "other" not in given and len(node.args) < 3:
            found.append(f"line {node.lineno}: a masked tl.load without other")
    return found


def test_kernels_say_what_a_gpu_would_guess():
    wrong = ("tl.dot(a, b)", "tl.load(p, mask=m)", "tl.load(p, m)", "x = f(tl.dot(a, b, acc=c))")
    right = (
        "tl.dot(a, b, input_precision='ieee')",
        "tl.load(p)",
        "tl.load(p, mask=m, other=0)",
        "tl.load(p, m, 0)",
    )
    assert all(map(faults, wrong)) and not any(map(faults, right))
    texts = {str(path.relative_to(FOLDER)): path.read_text(encoding="utf-8") for path in SOURCES}
    assert not {name: lines for name, text in texts.items() if (lines := faults(text))}


def test_operations_need_no_triton():
    """On a Mac there is none: what models and the rule of choice import may reach no file that imports it at once."""

    def reached(module: str, done: set[str]) -> set[str]:
        if module not in done:
            done.add(module)
            for other in imported_at_once(module):
                reached(other, done)
        return done

    with_triton = {m for m, path in MODULES.items() if "triton" in packages_of(path)}
    assert {"kernels.row_norms", "kernels.newton_schulz.triton"} <= with_triton  # it sees what is imported
    factories = [kernel.factory.partition(":")[0] for kernel in KERNELS.values()]
    for module in (
        *factories,
        "kernels.choose",
        "kernels.spec",
        "kernels.tuned",
        "kernels.aot",
        "models.vanilla",
    ):
        assert not reached(module, set()) & with_triton, module


def packages_of(path: Path) -> set[str]:
    """Packages that a file imports at its top."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.slow
def test_operations_answer_without_triton():
    """In a process of its own, where an import of it fails."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels import KERNELS
from tests.test_house import MODULES, imported_at_once
from kernels.choose import Call, Kernels
from kernels.device import interpreting
from kernels.spec import spec_of
for op in KERNELS:
    spec_of(op)
    Kernels().foresee(op, Call(torch.device("cpu"), torch.float32, 8, 16))
assert not interpreting() and "kernels.library" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_triton_is_here():
    """Its tests would fail one by one, or not at all."""
    assert importlib.import_module("triton").__version__
