"""Which implementation an operation takes, and why."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels import KERNELS, Implementation, Kernel, choose, problems
from kernels.choose import MIN_CHUNK_ROWS, Call, Kernels, rows_at_once
from kernels.layer_norm import layer_norm
from kernels.rms_norm import rms_norm
from naming import load

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CE, DIFFUSION = "linear_cross_entropy", "linear_diffusion_loss"


@pytest.fixture(autouse=True)
def _plain_only(monkeypatch):
    """Beside the real operations one that has nothing but its definition."""
    monkeypatch.setitem(
        KERNELS,
        "toy",
        Kernel("kernels.toy:toy", implementations={"reference": Implementation("kernels.toy:toy")}),
    )


# `kernels`, operation, rows, columns, device, dtype; implementation, why. On a CPU 24 MiB of fp32 logits with 1,024
# columns are 6,144 rows, which fit at once, and 8 MiB are 2,048, which are a chunk; 512 MiB
# of fp64 with 32,768 columns are 2,048 rows on a GPU.
NO_FP64 = "not triton: it computes bfloat16, float16, float32, and this is float64"
CHOICES = [
    ({}, CE, 6144, 1024, CPU, SINGLE, "reference", "auto: logits of 6,144 rows fit at once"),
    ({}, CE, 6145, 1024, CPU, SINGLE, "chunked", "auto: logits of 2,048 rows at a time"),
    ({}, CE, 6145, 1024, CPU, HALF, "chunked", "auto: logits of 2,048 rows at a time"),  # statistics are fp32
    ({}, CE, 6144, 1024, CPU, DOUBLE, "chunked", "auto: logits of 1,024 rows at a time"),
    ({}, CE, 512, 50_304, CPU, SINGLE, "reference", "auto: logits of 512 rows fit at once"),  # however wide
    ({}, CE, 513, 50_304, CPU, SINGLE, "chunked", "auto: logits of 512 rows at a time"),
    ({}, CE, 1, 32_768, CUDA, HALF, "triton", "auto: logits of all rows never exist"),
    ({}, CE, 2048, 32_768, CUDA, DOUBLE, "reference", f"auto: logits of 2,048 rows fit at once; {NO_FP64}"),
    ({}, CE, 2049, 32_768, CUDA, DOUBLE, "chunked", f"auto: logits of 2,048 rows at a time; {NO_FP64}"),
    ({}, CE, 2049, 32_768, MPS, SINGLE, "chunked", "auto: logits of 2,048 rows at a time"),
    ({}, DIFFUSION, 1, 1024, CPU, SINGLE, "chunked", "auto: logits of 512 rows at a time"),
    ({}, DIFFUSION, 9999, 128, CPU, SINGLE, "chunked", "auto: logits of 4,096 rows at a time"),
    ({}, DIFFUSION, 1, 32_768, CUDA, HALF, "triton", "auto: logits of all rows never exist"),
    ({}, DIFFUSION, 1, 32_768, CUDA, DOUBLE, "chunked", f"auto: logits of 2,048 rows at a time; {NO_FP64}"),
    ({}, "toy", 1, 1, CPU, SINGLE, "reference", "auto: the plain definition"),
    ({"default": "auto"}, CE, 1, 1024, CPU, SINGLE, "reference", "auto: logits of 1 rows fit at once"),
    ({"default": "reference"}, CE, 10**9, 1024, CPU, SINGLE, "reference", "kernels.default"),
    ({"default": "reference"}, DIFFUSION, 10**9, 1024, CUDA, HALF, "reference", "kernels.default"),
    ({"default": "chunked"}, CE, 1, 1024, CPU, SINGLE, "chunked", "kernels.default"),
    (
        {"default": "chunked"},
        "toy",
        1,
        1,
        CPU,
        SINGLE,
        "reference",
        "auto: the plain definition; kernels.default=chunked: there is none",
    ),
    ({CE: "chunked"}, CE, 1, 1024, CPU, SINGLE, "chunked", f"kernels.{CE}"),
    ({CE: "chunked"}, DIFFUSION, 1, 1024, CPU, SINGLE, "chunked", "auto: logits of 512 rows at a time"),
    ({"default": "chunked", CE: "reference"}, CE, 10**9, 1024, CPU, SINGLE, "reference", f"kernels.{CE}"),
    (
        {"default": "chunked", CE: "auto"},
        CE,
        1,
        1024,
        CPU,
        SINGLE,
        "reference",
        "auto: logits of 1 rows fit at once",
    ),
]


@pytest.mark.parametrize(("wanted", "op", "rows", "columns", "device", "dtype", "name", "why"), CHOICES)
def test_the_rule(wanted, op, rows, columns, device, dtype, name, why):
    kernels = Kernels(wanted)
    call = Call(device, dtype, rows, columns)
    assert kernels.foresee(op, call) == (name, why) and kernels.used == {}
    assert kernels.choose(op, call) == name and kernels.used == {op: {name: why}}


def test_everything_that_was_used_is_recorded_with_its_first_reason():
    kernels = Kernels()
    for rows in (100, 200, 9000):
        kernels.choose(CE, Call(CPU, SINGLE, rows, 1024))
    assert kernels.used[CE] == {
        "reference": "auto: logits of 100 rows fit at once",
        "chunked": "auto: logits of 2,048 rows at a time",
    }
    assert Kernels().used == {}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {CE: "chunkd"},
            f"kernels.{CE}: 'chunkd' is not one of auto, reference, chunked, triton. Did you mean 'chunked'?",
        ),
        ({"default": "fast"}, "kernels.default: 'fast' is not one of auto, reference, chunked"),
        ({"linear_crossentropy": "auto"}, f"Did you mean '{CE}'"),
        (
            {"toy": "chunked"},
            "kernels.toy: 'chunked' is not one of auto, reference",
        ),  # explicit, and not there
    ],
)
def test_what_does_not_exist_is_refused(wanted, message):
    (problem,) = problems(wanted)
    assert message in problem
    with pytest.raises(ValueError, match="is not one of"):
        Kernels(wanted)


def test_entries_of_operations_that_a_run_does_not_have():
    assert Kernels({CE: "chunked", DIFFUSION: "auto"}).unread([CE]) == [DIFFUSION]


def test_the_size_of_chunks_follows_the_table(monkeypatch):
    assert rows_at_once(CE, 1024, CPU, SINGLE) == 2048
    monkeypatch.setitem(KERNELS, CE, replace(KERNELS[CE], chunk_bytes={"cuda": 4 * 1024 * 700}))
    assert rows_at_once(CE, 1024, CPU, SINGLE) == 640
    assert rows_at_once(CE, 2048, CPU, SINGLE) == MIN_CHUNK_ROWS


def test_the_table_names_what_exists():
    for op, kernel in KERNELS.items():
        if op != "toy":
            assert callable(load(kernel.factory)) and "reference" in kernel.implementations
            assert all(callable(load(way.where)) for way in kernel.implementations.values())


@pytest.mark.slow
def test_one_graph_may_be_the_first_to_meet_two_operations(monkeypatch):
    """What is loaded for the second is not looked for in what there was when the first came."""
    monkeypatch.setattr(choose, "_loaded", SimpleNamespace())
    torch._dynamo.reset()
    kernels, x, one = Kernels(), torch.randn(3, 8), torch.ones(8)

    def both(x):
        return layer_norm(rms_norm(x, one, 1e-5, kernels), one, None, 1e-5, kernels)

    compiled = torch.compile(both, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), both(x))
