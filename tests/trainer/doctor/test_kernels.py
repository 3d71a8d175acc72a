"""Which implementation is taken and why, with a compiler and without."""

import sys

import pytest
import torch

from kernels import KERNELS, cpp
from trainer.doctor import kernels
from trainer.doctor.lines import lines_of

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch):
    for known in (cpp.library, cpp._compiler):
        known.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    yield
    for known in (cpp.library, cpp._compiler):
        known.cache_clear()


def test_every_operation_has_its_line():
    found = {line.about: line for line in lines_of("kernels", "trainer.doctor.kernels:check")}
    assert {f"{op} on cpu" for op in KERNELS} <= found.keys()
    for op, kernel in KERNELS.items():
        line = found[f"{op} on cpu"]
        assert line.state == "ok", line
        assert all(name in line.text for name in kernel.implementations)
    assert "triton: it runs on cuda, and this is cpu" in found["rms_norm on cpu"].text


def test_no_compiler(no_compiler):
    line = kernels._compiler()
    assert line.state == "problem" and "there is no C++ compiler (/nowhere/c++)" in line.text
    assert "apt install g++" in line.remedy
    scan = kernels._operation("selective_scan", CPU)
    assert scan.state == "ok" and scan.text.startswith("chunked")
    assert "cpp: there is no C++ compiler" in scan.text


@pytest.mark.parametrize("wanted, state", [(False, "note"), (True, "problem")])
def test_no_triton(monkeypatch, wanted, state):
    """Where there is a GPU it is missed."""
    monkeypatch.setitem(sys.modules, "triton", None)
    line = kernels._triton(wanted)
    assert line.state == state and "not installed" in line.text
    assert wanted == ("pip install" in line.remedy)


def test_a_broken_triton(monkeypatch, tmp_path):
    """Torch imports it too."""
    (tmp_path / "triton.py").write_text("raise RuntimeError('broken')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    line = kernels._triton(False)
    assert (line.state, line.text) == ("problem", "cannot be imported: RuntimeError: broken")
    assert "uninstall triton" in line.remedy


@pytest.mark.parametrize("how", ["wrong", "failing"])
def test_an_implementation_that_does_not_work_here(monkeypatch, how):
    from kernels.rms_norm import closed_form

    def broken(*args, **kwargs):
        if how == "failing":
            raise RuntimeError("illegal instruction")
        found = right(*args, **kwargs)
        return tuple(1.5 * t for t in found) if isinstance(found, tuple) else 1.5 * found

    right = closed_form.closed_form
    monkeypatch.setattr(closed_form, "closed_form", broken)
    line = kernels._operation("rms_norm", CPU)
    assert line.state == "problem" and "closed_form is WRONG" in line.text
    assert "kernels.rms_norm=reference" in line.remedy


def test_an_operation_that_cannot_be_looked_at_costs_no_other(monkeypatch):
    from kernels import unit_norm

    monkeypatch.setattr(unit_norm, "SPEC", None)
    found = {line.about: line.state for line in kernels.check()}
    assert found["unit_norm on cpu"] == "problem" and found["rms_norm on cpu"] == "ok"
