"""`bench kernels`: who is compared, what is said of them, files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mytrainer
from kernels import KERNELS, Implementation, Kernel
from kernels.newton_schulz.peers import torch_muon
from kernels.spec import Sample, Spec, drawn
from naming import load
from trainer.commands.bench import kernels as bench
from trainer.commands.bench import measure, optimizer, plot
from trainer.commands.bench.sides import Inputs

CPU = torch.device("cpu")


def plain(x):
    """The operation: a product with itself, of positive numbers."""
    return F.softplus(x) ** 2


def doubled(x):
    return 2 * F.softplus(x) ** 2


def coarse(x):
    return (F.softplus(x) ** 2).bfloat16().to(x.dtype)


def missing(x):
    raise ImportError(name="a_library")


def broken(x):
    raise RuntimeError("no kernel for this machine\nmore")


def greedy(x):
    """Writes into what it was given."""
    y = plain(x)
    with torch.no_grad():
        x.zero_()
    return y


def _sample(size, device, dtype, generator):
    return Sample({"x": drawn(size["rows"], 4, device=device, dtype=dtype, generator=generator)})


HERE = "tests.trainer.commands.test_bench_kernels"
SPEC = Spec(
    sample=_sample,
    small={"two": {"rows": 2}},
    large={"300": {"rows": 300}},
    timed_on_cpu={"200": {"rows": 200}},
    flops=lambda size: (8.0 * size["rows"], 8.0 * size["rows"]),
    bytes=lambda size, itemsize: (8.0 * size["rows"] * itemsize, 12.0 * size["rows"] * itemsize),
    tolerance={"float32": 1e-5, "bfloat16": 2e-2},
    peers={name: f"{HERE}:{name}" for name in ("coarse", "missing", "broken")} | {"liger": f"{HERE}:broken"},
    gradients_in_forward=("coarse",),
)
OPERATION = Kernel(
    f"{HERE}:plain",
    implementations={
        "reference": Implementation(f"{HERE}:plain"),
        "triton": Implementation(f"{HERE}:plain", devices=("cuda",)),
    },
)


@pytest.fixture(autouse=True)
def _toy(monkeypatch):
    monkeypatch.setitem(KERNELS, "toy", OPERATION)
    monkeypatch.setattr(bench, "ceilings", lambda *a: {"bytes_per_second": 1e10, "flops_per_second": 1e11})


def run(tmp_path, *more):
    output = tmp_path / "found.json"
    words = ["--ops", "toy", "--no_compile", "--turns", "3", "--dtype", "fp32", "--device", "cpu"]
    status = mytrainer.main(["bench", "kernels", *words, "--output", str(output), *more])
    return status, json.loads(output.read_text(encoding="utf-8"))


def test_a_table_and_a_file(tmp_path, capsys):
    status, found = run(tmp_path)
    out = capsys.readouterr().out
    assert status == 0 and found["environment"]["torch"] == torch.__version__
    (each,) = found["operations"]
    assert set(each["sides"]) == {"reference", "coarse"} and each["noise"] >= 0
    row = each["sides"]["reference"]
    both, best = row["both"], found["ceilings"]["fp32"]
    assert both["bytes_per_second"] == pytest.approx(20 * 200 * 4 / both["seconds"])
    assert both["flops_per_second"] == pytest.approx(16 * 200 / both["seconds"])
    floor = max(16_000 / best["bytes_per_second"], 3_200 / best["flops_per_second"])
    assert both["share_of_ceiling"] == pytest.approx(floor / both["seconds"])
    assert row["times_reference"] == 1 and row["times_best_peer"] > 0 and row["peak_bytes"] >= 200 * 4 * 4
    assert each["remarks"].keys() == {"triton", "missing", "broken", "coarse", "liger"}
    assert each["remarks"]["liger"] == "runs on cuda, and this is cpu"  # without being tried
    assert "it runs on cuda, and this is cpu" in each["remarks"]["triton"]
    assert each["remarks"]["missing"] == "not installed (a_library)"
    assert each["remarks"]["broken"] == "failed with RuntimeError: no kernel for this machine"
    assert each["remarks"]["coarse"].startswith("less exact: output 0 is off by 0.00")
    assert "forward" not in each["sides"]["coarse"]  # computes gradients there: compares with no other
    for said in (
        "toy · 200 · fp32",
        "the same twice differs by",
        "x best peer",
        "not installed",
        "GB/s",
        "fwd ceiling",
    ):
        assert said in out
    assert "both blank where gradients are computed in the forward pass" in out
    assert "graph ms" not in out and "x compiled" not in out


def test_one_of_ours_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    found_wrong = {"chunked": Implementation(f"{HERE}:doubled"), "triton": Implementation(f"{HERE}:broken")}
    wrong = {**OPERATION.implementations, **found_wrong}
    monkeypatch.setitem(KERNELS, "toy", replace(OPERATION, implementations=wrong))
    status, found = run(tmp_path)
    (each,) = found["operations"]
    assert status == 1 and each["sides"].keys() == {"reference", "coarse"}
    assert each["remarks"]["triton"] == "WRONG: failed with RuntimeError: no kernel for this machine"
    assert each["remarks"]["chunked"].startswith("WRONG: gradient of x is off by 1 of its")


def test_number_formats_that_a_cpu_does_not_have(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "choose_precision", lambda *a: ("no", "an old CPU"))
    run(tmp_path, "--dtype", "fp32,bf16")
    out = capsys.readouterr().out
    assert out.count("emulated: this CPU has no bf16") == 1 and "bf16 (emulated" in out


def test_inputs_are_put_back_before_they_are_used_again():
    """Some libraries write into them; the next side would compute with zeros."""
    inputs = measure.rotated(SPEC, {"rows": 3}, CPU, torch.float32, plain)
    assert len(inputs) == measure.MOST_BUFFERS
    kept = [each.sample.tensors["x"].detach().clone() for each in inputs]
    assert not torch.equal(kept[0], kept[1])
    seen = []

    def call(each: Inputs) -> None:
        seen.append(next(i for i, e in enumerate(inputs) if e is each))
        assert torch.equal(each.sample.tensors["x"], kept[seen[-1]])
        each.forward(greedy)

    measure.in_turns({"a": call, "b": call}, inputs, 20, CPU)
    assert len(seen) == 44 and set(seen) == set(range(len(inputs)))


def test_gradients_are_new_ones():
    """`.grad +=` would be timed with them."""
    inputs = Inputs(SPEC, {"rows": 3}, CPU, torch.float32, 0).complete(plain)
    (grad,) = inputs.both(plain)
    assert grad.shape == (3, 4) and inputs.sample.tensors["x"].grad is None


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    run(tmp_path, "--plot", str(tmp_path / f"shares.{suffix}"))
    assert (tmp_path / f"shares.{suffix}").stat().st_size > 5000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "rms_nrm"], "ops: 'rms_nrm' is not one of"),
        (["--dtype", "fp8"], "dtype: 'fp8' is not one of bf16, fp16, fp32"),
        (["--turns", "1"], "turns: must be at least 2, got 1"),
        (["--output", "no/such/x.json"], "output: cannot write no/such/x.json"),
        (["--plot", "x.pdf"], "plot: a file that ends in .png or .svg, got x.pdf"),
        (["--aot", "--plot", "x.png"], "aot: --plot would have no effect beside --aot; leave it out"),
        (["--aot", "--turns", "3", "--device", "cpu"], "aot: --device, --turns would have no effect"),
        (["--aot", "--tune"], "aot: --tune would have"),
        (["--aot", "--no_compile"], "aot: --no_compile would have"),
        (["--tune", "--plot", "x.png", "--no_compile"], "tune: --no_compile, --plot would have no effect"),
        (["--tune", "--dtype", "fp32"], "tune: --dtype would have"),
        (["--tune", "--turns", "9"], "tune: --turns would have"),
        (["--tune", "--device", "cpu"], "tune: launch choices are found on the GPU that they are for"),
    ],
)
def test_what_cannot_be_is_refused(capsys, words, message):
    assert mytrainer.main(["bench", "kernels", *words]) == 2
    assert message in capsys.readouterr().err


def test_only_what_can_be_measured_is_offered(monkeypatch, capsys):
    monkeypatch.setitem(
        KERNELS, "bare", replace(OPERATION, factory="kernels.precision:own_dtypes")
    )  # no SPEC
    with pytest.raises(SystemExit):
        mytrainer.main(["bench", "kernels", "--help"])
    offered = "".join(capsys.readouterr().out.split())
    assert "newton_schulz,layer_norm" in offered and "toy" in offered and "bare" not in offered
    assert mytrainer.main(["bench", "kernels", "--ops", "bare"]) == 2
    assert "ops: 'bare' is not one of" in capsys.readouterr().err


def test_backward_is_what_both_take_more_than_forward():
    seconds = {"forward": [1.0, 2.0, 3.0], "both": [6.0, 6.0, 6.0]}
    by_side = {part: {"reference": of_part} for part, of_part in seconds.items()}
    best = {"bytes_per_second": 4800.0, "flops_per_second": 1e9}
    (row,) = measure.figures(SPEC, {"rows": 200}, torch.float32, by_side, best).values()
    assert row["backward"]["seconds"] == 4.0
    assert row["backward"]["bytes_per_second"] == 12 * 200 * 4 / 4
    assert row["backward"]["share_of_ceiling"] == pytest.approx(0.5)
    by_side["both"]["reference"] = [2.0, 2.0, 2.0]  # noise: nothing left
    (row,) = measure.figures(SPEC, {"rows": 200}, torch.float32, by_side, best).values()
    assert "backward" not in row


def test_a_whole_step_of_muon_against_that_of_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(optimizer.SIZES, "cpu", {"blocks": 1, "width": 24})
    monkeypatch.setattr(bench, "_operation", lambda *a: {"noise": 0, "sides": {}, "remarks": {}})
    status, found = run(tmp_path, "--ops", "newton_schulz")
    out, step = capsys.readouterr().out, found["muon_step"]
    assert status == 0 and step["sides"].keys() == {"torch.optim.Muon", "reference"} and step["noise"] >= 0
    theirs, ours = step["sides"]["torch.optim.Muon"], step["sides"]["reference"]
    assert theirs["times_torch"] == 1 and min(ours.values()) > 0
    assert "it runs on cuda" in step["remarks"]["triton"]
    assert "a step of Muon · 1 blocks of width 24" in out and "x torch.optim.Muon" in out


def test_a_step_of_muon_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizer, "torch_muon", lambda weights: twice(torch_muon(weights)))
    monkeypatch.setattr(bench, "_operation", lambda *a: {"noise": 0, "sides": {}, "remarks": {}})
    monkeypatch.setitem(optimizer.SIZES, "cpu", {"blocks": 1, "width": 24})
    status, found = run(tmp_path, "--ops", "newton_schulz")
    assert status == 1 and found["muon_step"]["sides"].keys() == {"torch.optim.Muon"}
    assert found["muon_step"]["remarks"]["reference"].startswith(
        "WRONG: ValueError: its step differs from that of"
    )


def twice(step):
    return lambda: (step(), step())


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="matplotlib is not installed. pip install matplotlib"):
        plot.picture_file("x.png")


def test_every_peer_can_be_loaded():
    """It says itself that its library is not installed, when it is called."""
    from kernels.spec import spec_of

    for op in KERNELS:
        if spec := spec_of(op):
            assert all(callable(load(where)) for where in spec.peers.values())


@pytest.mark.slow
def test_compiled_ahead_of_time(capsys, tmp_path):
    output, words = tmp_path / "aot.json", "--aot --ops rms_norm --dtype fp32"
    assert mytrainer.main(["bench", "kernels", *words.split(), "--output", str(output)]) == 0
    rows = json.loads(output.read_text(encoding="utf-8"))["ahead_of_time"]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert {row["gpu"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert all(row["spilled_bytes"] == 0 < row["registers"] for row in rows)
    assert "LDGSTS.128" in capsys.readouterr().out
