"""Launch choices: those that are committed, and how the tuner comes by them, with a clock that we hold."""

from __future__ import annotations

import json

import pytest
import torch

from kernels import TRITON, tuned
from kernels.choose import Call, Kernels
from kernels.device import A100, H100, as_if
from kernels.spec import spec_of
from tests.kernels.interpret import interpreted
from tests.kernels.samples import FIRST, LAUNCHED, asked_by
from tests.kernels.test_triton import check
from trainer.commands.bench import tune

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
FIRST_OF = {op: size for op, _, size in FIRST}
KEY = {"width": 100, "dtype": "torch.float32"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.forget()
    yield tmp_path
    tuned.forget()


def commit(folder, name, **content):
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    tuned.forget()


def test_sizes_are_rounded_up_and_the_gpu_counts(folder):
    entry = {"key": {"width": 128, "dtype": "torch.float32"}, "choice": {"num_warps": 8}}
    commit(folder, "sm_90", launch={"toy": [entry]})
    default = {"ROWS": 4, "num_warps": 4}
    with as_if(H100):
        assert tuned.launch("toy", CUDA, KEY, default) == {"ROWS": 4, "num_warps": 8}
        assert tuned.launch("toy", CUDA, {**KEY, "width": 129}, default) == default
        assert tuned.launch("other", CUDA, KEY, default) == default
    with as_if(A100):
        assert tuned.launch("toy", CUDA, KEY, default) == default
    assert tuned.launch("toy", CPU, KEY, default) == default == {"ROWS": 4, "num_warps": 4}


def test_what_is_asked_and_forced():
    with tuned.asked() as found, tuned.forced("toy", {"num_warps": 2}):
        assert tuned.launch("toy", CPU, KEY, {"ROWS": 4, "num_warps": 4}, {"ROWS": (2, 4)})["num_warps"] == 2
    assert tuned.launch("toy", CPU, KEY, {"num_warps": 4}) == {"num_warps": 4} and len(found) == 1
    assert found[0].key == {"width": 128, "dtype": "torch.float32"}
    assert list(found[0].vary) == ["ROWS", "num_warps"]  # and no num_stages, which it does not have
    assert tune.candidates(found[0], {}, "ROWS") == [{"ROWS": 2}]
    assert tune.candidates(found[0], {"ROWS": 2}, "num_warps") == [
        {"ROWS": 2, "num_warps": warps} for warps in (2, 8, 16)
    ]
    assert tune.candidates(found[0], {"ROWS": 2}, "ROWS") == [{}]


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in sorted(tuned.FOLDER.glob("*.json"))])
def test_committed_choices_give_right_results(name):
    """Each on every operation that launches its kernel."""
    check_choices(tuned.read(name))


def check_choices(content):
    launched = {op: {a.kernel for a in asked_by(op, size)} for op, size in FIRST_OF.items() if op in LAUNCHED}
    for kernel, entries in content["launch"].items():
        users = [op for op in LAUNCHED if kernel in launched[op]]
        assert users, f"nothing launches {kernel}"
        for entry in entries:
            for op in users:
                for size in spec_of(op).small:
                    with tuned.forced(kernel, entry["choice"]):
                        check(op, TRITON, size)


@pytest.mark.slow
def test_a_choice_that_is_wrong_would_be_found():
    (asked, *_) = asked_by("rms_norm", FIRST_OF["rms_norm"])
    right, wrong = {"ROWS": 2}, {"WIDTH": 64}
    check_choices({"launch": {asked.kernel: [{"key": {}, "choice": right}]}})
    with pytest.raises(AssertionError):
        check_choices({"launch": {asked.kernel: [{"key": {}, "choice": wrong}]}})
    with pytest.raises(AssertionError, match="nothing launches gone"):
        check_choices({"launch": {"gone": []}})


def test_tuning_needs_the_gpu():
    with pytest.raises(ValueError, match="found on the GPU that they are for, and this is cpu"):
        tune.tune(["rms_norm"], CPU, {}, str)


@pytest.mark.slow
def test_the_tuner_writes_what_is_right_and_fastest_and_the_rule_reads_it(folder, monkeypatch):
    """16 warps are the fastest, stand-in clocks say; one width is wrong, and would be faster still."""
    spec = spec_of("rms_norm")
    size = FIRST_OF["rms_norm"]
    small = {size: spec.small[size]}
    for field in ("large", "small"):
        monkeypatch.setitem(spec.__dict__, field, small)
    launch = tuned.launch
    wrong = {"WIDTH": (64, 128, 512)}

    def with_a_wrong_one(kernel, device, key, default, vary=None):
        chosen = launch(kernel, device, key, default, wrong)
        if chosen["WIDTH"] == 512:
            raise RuntimeError("PassManager::run failed\nmore")
        return chosen

    monkeypatch.setattr("kernels.row_norms.launch", with_a_wrong_one)
    monkeypatch.setattr(tune, "DTYPE", torch.float32)
    monkeypatch.setattr(tune, "peak_bytes", lambda side, inputs, device: 100)
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    clock = {"num_warps": 16}
    timed = []

    def timer(calls, inputs, device):
        timed.append(list(calls))
        seconds = {}
        for name in calls:
            choice = json.loads(name) if name.startswith("{") else {}
            fast = name == "triton" or (choice.items() >= clock.items() and "num_stages" not in choice)
            seconds[name] = [0.5 if "WIDTH" in choice else 1.0 if fast else 2.0] * 3
        return seconds

    environment = {"device": "a stand-in", "git_commit": "abc", "torch": torch.__version__, "packages": {}}
    commit(folder, "sm_90", measured={"other": {}}, launch={})
    with interpreted(), as_if(H100):
        found = tune.tune(["rms_norm"], CPU, environment, str, timer)
        written = json.loads((folder / "sm_90.json").read_text(encoding="utf-8"))
        assert written["device"] == "a stand-in" and "other" in written["measured"]
        assert written["measured"]["rms_norm"]["triton"] == {
            "speedup": 2.0,
            "memory_saved": 0.0,
            "shapes": [size],
        }
        assert {k: [e["choice"] for e in v] for k, v in written["launch"].items()} == {
            asked.kernel: [clock] for asked in asked_by("rms_norm", size)
        }
        assert {each["why"] for each in found["refused"]} == {"RuntimeError: PassManager::run failed"}
        assert all(each["choice"]["WIDTH"] == 512 for each in found["refused"])
        assert "refused" not in written and not any(
            '"WIDTH": 512' in name for names in timed for name in names
        )
        assert not any('"WIDTH": 64' in name for names in timed for name in names)  # wrong: never timed
        assert Kernels().foresee("rms_norm", Call(CUDA, torch.bfloat16, columns=100))[0] == "triton"
        with tuned.asked() as launches:
            check("rms_norm", TRITON, size)
        assert all(tuned.launch(a.kernel, CUDA, a.key, dict(a.default))["num_warps"] == 16 for a in launches)
    assert "auto takes it" in tune.report(found) and list(folder.iterdir()) == [folder / "sm_90.json"]
