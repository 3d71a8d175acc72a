"""Which implementation an operation takes on which GPU, and why: no GPU is needed to know."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kernels import KERNELS, Implementation, Kernel, by_triton, choose, device, tuned
from kernels.choose import Call, Kernels
from kernels.device import A100, B200, H100, Gpu, as_if
from naming import load
from tests.kernels.interpret import interpreted

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
T4 = Gpu((7, 5), 40, 64 * 1024)
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
FUSED = Kernel(
    "kernels.toy:fused",
    implementations={
        "reference": Implementation("kernels.toy:reference"),
        "chunked": Implementation("kernels.toy:chunked"),
        "triton": by_triton("kernels.toy:triton"),
        "liger": Implementation("kernels.toy:liger", devices=("cuda",), package="no_such_library"),
    },
    chunk_bytes={"cuda": 2**20},
)
NO_CHUNKS = replace(FUSED, implementations={n: w for n, w in FUSED.implementations.items() if n != "chunked"})
TOYS = {
    "fused": FUSED,
    "norm": replace(NO_CHUNKS, compiled_with_neighbours=True),
    "head": replace(FUSED, for_memory=True),
    "atomics": replace(
        NO_CHUNKS,
        implementations={
            **NO_CHUNKS.implementations,
            "triton": by_triton("kernels.toy:triton", adds_in_any_order=True),
        },
    ),
    "small": replace(
        NO_CHUNKS,
        implementations={
            **NO_CHUNKS.implementations,
            "triton": by_triton("kernels.toy:triton", refuses="tests.kernels.test_choose_gpu:too_wide"),
        },
    ),
    "ruled": replace(FUSED, rule="tests.kernels.test_choose_gpu:by_facts"),
}
MEASURED = {
    "fused": (1.5, 0.0),
    "norm": (1.04, 0.29),
    "small": (2.0, 0.0),
    "atomics": (1.05, 0.0),
}  # on sm_90


def too_wide(call: Call) -> str | None:
    return f"rows of {call.columns:,} numbers do not fit" if call.columns > 1024 else None


def by_facts(call: Call, lacking) -> tuple[str, str]:
    return ("triton", "documents") if "documents" in call.facts else ("reference", "no documents")


@pytest.fixture(autouse=True)
def _toys(monkeypatch, tmp_path):
    for name, kernel in TOYS.items():
        monkeypatch.setitem(KERNELS, name, kernel)
    figures = {op: {"triton": {"speedup": s, "memory_saved": m}} for op, (s, m) in MEASURED.items()}
    (tmp_path / "sm_90.json").write_text(json.dumps({"measured": figures}), encoding="utf-8")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.forget()
    yield
    tuned.forget()


FAST = "auto: 1.50 x the compiled reference, 0% less memory on sm_90"
PLAIN, CHUNKS = "auto: the plain definition", "auto: logits of 512 rows at a time"
# operation, GPU or device, dtype, more of the call; implementation, why
AUTOMATIC = [
    ("fused", H100, HALF, {}, "triton", FAST),
    ("fused", H100, SINGLE, {}, "triton", FAST),
    ("fused", H100, HALF, {"compiling": True}, "triton", FAST),
    ("fused", A100, HALF, {}, "chunked", f"{CHUNKS}; not triton: not measured on sm_80"),
    ("fused", B200, HALF, {}, "chunked", f"{CHUNKS}; not triton: not measured on sm_100"),
    ("fused", T4, HALF, {}, "chunked", f"{CHUNKS}; not triton: it needs sm_80, and this is sm_75"),
    (
        "fused",
        H100,
        DOUBLE,
        {},
        "chunked",
        f"{CHUNKS}; not triton: it computes bfloat16, float16, float32, and this is float64",
    ),
    ("fused", CPU, HALF, {}, "chunked", CHUNKS),
    ("fused", MPS, SINGLE, {}, "chunked", CHUNKS),
    (
        "norm",
        H100,
        HALF,
        {},
        "reference",
        f"{PLAIN}; not triton: 1.04 x the compiled reference, 29% less memory on sm_90",
    ),
    ("norm", H100, HALF, {"compiling": True}, "reference", "auto: the compiler fuses it with its neighbours"),
    (
        "norm",
        CPU,
        SINGLE,
        {"compiling": True},
        "reference",
        "auto: the compiler fuses it with its neighbours",
    ),
    ("norm", CPU, SINGLE, {}, "reference", PLAIN),
    (
        "head",
        A100,
        HALF,
        {},
        "triton",
        "auto: logits of all rows never exist",
    ),  # unmeasured: it is for memory
    ("head", T4, HALF, {}, "chunked", f"{CHUNKS}; not triton: it needs sm_80, and this is sm_75"),
    ("atomics", H100, HALF, {}, "triton", "auto: 1.05 x the compiled reference, 0% less memory on sm_90"),
    (
        "small",
        H100,
        HALF,
        {"columns": 1024},
        "triton",
        "auto: 2.00 x the compiled reference, 0% less memory on sm_90",
    ),
    (
        "small",
        H100,
        HALF,
        {"columns": 2048},
        "reference",
        f"{PLAIN}; not triton: rows of 2,048 numbers do not fit",
    ),
    ("ruled", H100, HALF, {"facts": ("documents",)}, "triton", "auto: documents"),
    ("ruled", H100, HALF, {}, "reference", "auto: no documents"),
]


def foreseen(kernels: Kernels, op: str, where: Gpu | torch.device, dtype: torch.dtype, more: dict):
    call = Call(CUDA if isinstance(where, Gpu) else where, dtype, **{"rows": 4096, "columns": 1024, **more})
    if not isinstance(where, Gpu):
        return kernels.foresee(op, call)
    with as_if(where):
        return kernels.foresee(op, call)


@pytest.mark.parametrize(("op", "where", "dtype", "more", "name", "why"), AUTOMATIC)
def test_automatic(op, where, dtype, more, name, why):
    assert foreseen(Kernels(), op, where, dtype, more) == (name, why)


def test_deterministic_leaves_out_what_adds_in_any_order():
    kernels = Kernels({"default": "auto"}, deterministic=True)
    because = "it adds floats in no fixed order, and deterministic=true"
    assert foreseen(kernels, "atomics", H100, HALF, {}) == ("reference", f"{PLAIN}; not triton: {because}")
    with pytest.raises(
        ValueError, match=f"kernels.atomics=triton is not possible here: {because}. Possible: auto"
    ):
        foreseen(Kernels({"atomics": "triton"}, deterministic=True), "atomics", H100, HALF, {})
    assert foreseen(kernels, "fused", H100, HALF, {})[0] == "triton"


@pytest.mark.parametrize(
    ("wanted", "where", "dtype", "message"),
    [
        ("triton", CPU, HALF, "it runs on cuda, and this is cpu"),
        ("triton", MPS, HALF, "it runs on cuda, and this is mps"),
        ("triton", T4, HALF, "it needs sm_80, and this is sm_75"),
        ("triton", H100, DOUBLE, "it computes bfloat16, float16, float32, and this is float64"),
        ("liger", H100, HALF, "the package no_such_library is not installed"),
    ],
)
def test_an_explicit_choice_is_followed_or_refused(wanted, where, dtype, message):
    with pytest.raises(ValueError) as refused:
        foreseen(Kernels({"fused": wanted}), "fused", where, dtype, {})
    said = str(refused.value)
    assert said.startswith(f"kernels.fused={wanted} is not possible here: {message}")
    assert "Possible: auto, reference, chunked" in said
    assert foreseen(Kernels({"fused": "chunked"}), "fused", where, dtype, {})[0] == "chunked"


def test_a_default_is_followed_where_it_can_be():
    kernels = Kernels({"default": "triton"})
    assert foreseen(kernels, "norm", A100, HALF, {}) == (
        "triton",
        "kernels.default",
    )  # unmeasured, but asked for
    name, why = foreseen(kernels, "fused", CPU, SINGLE, {})
    assert name == "chunked" and why.startswith(f"{CHUNKS}; kernels.default=triton: it runs on cuda")
    name, why = foreseen(Kernels({"default": "liger"}), "norm", H100, HALF, {})
    assert (name, why) == (
        "reference",
        f"{PLAIN}; not triton: 1.04 x the compiled reference, 29% less memory on sm_90; "
        "kernels.default=liger: the package no_such_library is not installed",
    )


def test_without_triton_it_is_a_missing_package(monkeypatch):
    monkeypatch.setattr(choose, "_installed", lambda package: False)
    because = "the package triton is not installed"
    assert foreseen(Kernels(), "fused", H100, HALF, {}) == ("chunked", f"{CHUNKS}; not triton: {because}")
    with pytest.raises(ValueError, match=because):
        foreseen(Kernels({"fused": "triton"}), "fused", H100, HALF, {})


def test_interpreted_on_a_cpu_where_asked_for(monkeypatch):
    """TRITON_INTERPRET=1: explicit choices and defaults are followed, `auto` stays as it is."""
    monkeypatch.setattr(device, "interpreting", lambda: True)
    for wanted in ({"norm": "triton"}, {"default": "triton"}):
        assert foreseen(Kernels(wanted), "norm", CPU, SINGLE, {})[0] == "triton"
    assert "this is float64" in foreseen(Kernels({"default": "triton"}), "norm", CPU, DOUBLE, {})[1]
    assert foreseen(Kernels(), "fused", CPU, SINGLE, {})[0] == "chunked"


def test_the_environment_is_what_says_so(monkeypatch):
    knobs = pytest.importorskip("triton").knobs
    assert not device.interpreting()
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert device.interpreting()
    with interpreted():
        assert device.interpreting()


def test_a_refusal_is_at_hand_before_anything_starts():
    with pytest.raises(ValueError, match=r"kernels\.norm=triton is not possible here"):
        Kernels({"norm": "triton"}, device=CPU)
    Kernels({"norm": "auto", "default": "triton"}, device=CPU)


REAL = [op for op, kernel in KERNELS.items() if op not in TOYS]


@pytest.mark.parametrize("gpu", [T4, A100, H100, B200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("op", REAL)
def test_every_operation_has_an_answer_everywhere(op, gpu):
    """With nothing measured: `auto` takes Triton for memory only, and what it takes can be run there."""
    for where in (gpu, CPU, MPS):
        for dtype in (HALF, SINGLE, DOUBLE):
            for compiling in (False, True):
                name, why = foreseen(Kernels(), op, where, dtype, {"compiling": compiling, "columns": 64})
                assert why.startswith("auto: ") and callable(load(KERNELS[op].implementations[name].where))
                call = Call(CUDA if isinstance(where, Gpu) else where, dtype, 4096, 64)
                with as_if(gpu):
                    assert not Kernels().lacking(op, name, call)
                if name == "triton":
                    assert KERNELS[op].for_memory or KERNELS[op].rule
                    assert isinstance(where, Gpu) and gpu.capability >= (8, 0)
