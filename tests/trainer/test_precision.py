import re
import shutil

import pytest
import torch

from trainer.precision import CXX, LossScaler, choose_precision, should_compile

CPU = torch.device("cpu")


def test_explicit_choice_is_kept_and_auto_gives_a_reason():
    assert choose_precision("no", CPU)[0] == "no"
    chosen, reason = choose_precision("auto", CPU)
    assert chosen == ("bf16" if torch.cpu._is_avx512_bf16_supported() else "no") and "bf16" in reason.lower()


def test_compile_is_automatic_on_cuda_only(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert not should_compile("auto", CPU)[0]
    assert should_compile("auto", torch.device("cuda"))[0]
    assert should_compile(True, CPU)[0] and not should_compile(False, torch.device("cuda"))[0]


@pytest.mark.parametrize(("given", "looked_for"), [(None, CXX), ("mine++ -O2", "mine++")])
def test_compilation_without_a_compiler(monkeypatch, given, looked_for):
    if given:
        monkeypatch.setenv("CXX", given)
    else:
        monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=f"no {re.escape(looked_for)} on PATH.*torch_compile=false"):
        should_compile(True, CPU)
    assert should_compile("auto", torch.device("cuda")) == (False, "not compiled: no gcc or clang on PATH")
    assert should_compile("auto", CPU) == should_compile(False, CPU) == (False, "")


def test_scaler_halves_on_overflow_and_doubles_after_good_steps():
    scaler = LossScaler(True, CPU, growth_interval=3)
    good, bad = torch.zeros(()), torch.ones(())
    start = scaler.scale.item()
    scaler.update(bad)
    assert scaler.scale == start / 2
    for _ in range(3):
        scaler.update(good)
    assert scaler.scale == start
    scaler.update(good)
    scaler.update(bad)
    assert scaler.scale == start / 2 and scaler.good_steps == 0
    copy = LossScaler(True, CPU)
    copy.load_state_dict(scaler.state_dict())
    assert copy.scale == scaler.scale
    grad = [torch.full((2,), 3.0)]
    scaler.unscale(grad)
    assert torch.equal(grad[0], torch.full((2,), 3.0 / (start / 2)))


def test_scaler_off_changes_nothing():
    scaler = LossScaler(False, CPU)
    scaler.update(torch.ones(()))
    grad = [torch.ones(2)]
    scaler.unscale(grad)
    assert scaler.scale == 1 and torch.equal(grad[0], torch.ones(2))
