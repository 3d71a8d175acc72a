"""Kernels that are compiled for this CPU: when there is no compiler, threads, forks. What they compute is asked by
test_triton.py and test_library.py, as of every operation of torch.library."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from kernels import CPP, KERNELS, cpp
from kernels.causal_conv1d.cpp import _reach
from kernels.choose import Call, Kernels
from kernels.documents import runs
from kernels.spec import spec_of
from tests.kernels.samples import drawn, gradients, run_of, upstream

OPS = [op for op, kernel in KERNELS.items() if CPP in kernel.implementations]
CPU = Call(torch.device("cpu"), torch.float32, columns=8)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing compiled yet; a folder for what will be."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(tmp_path))
    for found in (cpp.library, cpp._compiler):
        found.cache_clear()
    yield tmp_path
    for found in (cpp.library, cpp._compiler):
        found.cache_clear()


def compiler_that(folder, does: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("op", OPS)
def test_without_a_compiler_others_run_and_say_why(op, fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    name, why = Kernels().foresee(op, CPU)
    assert name in KERNELS[op].implementations and name != CPP
    assert "there is no C++ compiler (no-such-compiler)" in why
    asked_for = (
        f"kernels.{op}={CPP} is not possible here: there is no C\\+\\+ compiler \\(no-such-compiler\\)"
    )
    with pytest.raises(ValueError, match=asked_for):
        Kernels({op: CPP}).foresee(op, CPU)
    assert Kernels({"default": CPP}).foresee(op, CPU)[0] == name
    assert "no-such-compiler" in Kernels({"default": CPP}).foresee(op, CPU)[1]
    assert not (fresh / "cpp").exists()


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    failing = 'case "$*" in *-dM*) echo "#define __x86_64__ 1";; *) echo "x.cpp:3: error: bad thing" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", compiler_that(fresh, failing))
    why = cpp.missing("selective_scan/scan.cpp")
    assert "cannot compile scan.cpp: x.cpp:3: error: bad thing" in why
    cpp._compiler.cache_clear()
    monkeypatch.setenv("CXX", compiler_that(fresh, "exit 1"))
    assert "does not know -march=native" in cpp.missing("selective_scan/scan.cpp")


def test_what_is_no_library_is_not_loaded(fresh, monkeypatch):
    monkeypatch.setenv(
        "CXX", compiler_that(fresh, 'for to; do :; done; echo text > "$to" 2>&1; echo "#define A 1"')
    )
    assert "cannot be loaded" in cpp.missing("selective_scan/scan.cpp")


def test_a_compiler_may_have_arguments(fresh, monkeypatch):
    """As make and cmake read $CXX."""
    launcher = compiler_that(fresh, 'exec "$@"')
    monkeypatch.setenv("CXX", f"{launcher} c++ -DWITH='a b'")
    assert cpp.missing("gated_rms_norm/norm.cpp") is None
    assert len([*(fresh / "cpp").iterdir()]) == 1


def test_what_cannot_be_run_is_no_compiler(fresh, monkeypatch):
    path = fresh / "compiler"
    path.write_bytes(b"\x7fELF of another machine")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    assert "cannot be run" in cpp.missing("selective_scan/scan.cpp")


def test_a_library_that_was_cut_short_is_made_again(fresh, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpp, "_compile", lambda *args: b"cut sh")
        assert "cannot be loaded" in cpp.missing("gated_rms_norm/norm.cpp")
    (built,) = (fresh / "cpp").iterdir()
    assert cpp.missing("gated_rms_norm/norm.cpp") is None
    assert built.stat().st_size > 1000


def test_a_source_is_compiled_once(fresh, monkeypatch):
    assert cpp.missing("selective_scan/scan.cpp") is None
    (built,) = (fresh / "cpp").iterdir()
    cpp.library.cache_clear()
    monkeypatch.setattr(cpp, "_compile", lambda *args: pytest.fail("compiled again"))
    assert cpp.missing("selective_scan/scan.cpp") is None
    assert [built] == [*(fresh / "cpp").iterdir()] and built.name.startswith("scan-")


def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(fresh, monkeypatch):
    (fresh / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("MYTRAINER_CACHE", str(fresh / "file" / "cache"))
    assert cpp.missing("gated_rms_norm/norm.cpp") is None
    assert all(t.isfinite().all() for t in everything("gated_rms_norm"))


@pytest.mark.parametrize("setting", ["FLAGS", "source"])
def test_another_version_is_another_library(setting, fresh, monkeypatch):
    monkeypatch.setattr(cpp, "_compile", lambda *args: b"no library")
    source = cpp.FOLDER / "selective_scan/scan.cpp"
    cpp.missing("selective_scan/scan.cpp")
    if setting == "FLAGS":
        monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-g"))
    else:
        copy = fresh / "copy" / "selective_scan" / "scan.cpp"
        copy.parent.mkdir(parents=True)
        copy.write_bytes(source.read_bytes() + b"\n")
        (fresh / "copy" / "vectors.h").write_bytes((cpp.FOLDER / "vectors.h").read_bytes())
        monkeypatch.setattr(cpp, "FOLDER", fresh / "copy")
    cpp.library.cache_clear()
    cpp.missing("selective_scan/scan.cpp")
    assert len([*(fresh / "cpp").iterdir()]) == 2


def everything(op, size="", dtype=torch.float32):
    """Outputs and gradients of a call."""
    _, sample = drawn(op, size or next(iter(spec_of(op).small)), dtype)
    found = sample.call(run_of(op, CPP))
    return *(t.detach() for t in found), *gradients(found, sample, upstream(found)).values()


@pytest.mark.parametrize("op", OPS)
def test_results_do_not_depend_on_threads(op, monkeypatch):
    monkeypatch.setattr(cpp, "WORTH_A_THREAD", 1)
    before = torch.get_num_threads()
    try:
        for size in spec_of(op).small:
            found = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(everything(op, size))
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), size
    finally:
        torch.set_num_threads(before)


def test_every_item_is_computed_once(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for items in (0, 1, 2, 3, 7, 64):
        seen = []
        cpp.shared_out(lambda first, last, seen=seen: seen.extend(range(first, last)), items, 10**9)
        assert sorted(seen) == [*range(items)]


def test_an_error_in_a_thread_is_not_lost(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def fail(first, last):
        raise RuntimeError(f"of {first}")

    with pytest.raises(RuntimeError, match="of 0"):
        cpp.shared_out(fail, 4, 10**9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_computes_too(monkeypatch):
    """With threads of its own: those of the parent are gone in it."""
    monkeypatch.setattr(cpp, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = everything("gated_rms_norm")
    child = os.fork()
    if not child:
        same = all(torch.equal(a, b) for a, b in zip(everything("gated_rms_norm"), expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["y", "z"])
def test_nan_stays_one(name, dtype):
    """Also when it is rounded, and when it was an exponent."""
    _, sample = drawn("gated_rms_norm", "7 x 100", dtype)
    with torch.no_grad():
        sample.tensors[name][3, 50] = torch.nan
    (out,) = sample.call(run_of("gated_rms_norm", CPP))
    assert out[3].isnan().all() and not out[:3].isnan().any() and not out[4:].isnan().any()


def test_numbers_are_rounded_to_the_nearest():
    """Halves to even, as torch does; the gate is 1 at 40, the norm of one column its sign, so the weight comes out."""
    weight = torch.tensor([1.0, 1.00390625, 1.01171875, 3e38, 1e-40, -2.7182817, 65504.0])
    one = torch.ones(len(weight), dtype=torch.bfloat16)
    gates = torch.full_like(one, 40.0)
    out = run_of("gated_rms_norm", CPP)(one[None], gates[None], weight, groups=len(weight), eps=0.0)
    assert torch.equal(out[0], weight.bfloat16())


def test_documents_of_a_convolution_reach_as_far_as_they_go():
    ids = torch.tensor([[4, 4, 7, 7, 7, 7, 4]])
    assert _reach(runs(ids).int(), 1, 7, 4).tolist() == [[3, 3, 0, 1, 2, 3, 0]]
