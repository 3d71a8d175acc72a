"""What can be read off the text of kernels/: what a GPU would do otherwise, and who imports Triton."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

import kernels
from kernels import KERNELS

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


def test_operations_are_imported_without_triton(monkeypatch):
    """On a Mac there is none: what models and the rule of choice import answers all the same."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("kernels", "triton"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    for name in ("choose", "device", "spec", "tuned", "aot"):
        importlib.import_module(f"kernels.{name}")
    for op in KERNELS:
        sys.modules["kernels.spec"].spec_of(op)
    assert sys.modules["kernels.device"].interpreting() is False
    assert "kernels.library" not in sys.modules  # nothing was registered a second time


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_triton_is_here():
    """Its tests would fail one by one, or not at all."""
    assert importlib.import_module("triton").__version__
