"""The self-test, and what it says where it fails."""

import json
import sys

import pytest
import torch

from kernels import REFERENCE
from trainer.doctor import self_test
from trainer.run import checkpoint

OK = """
import json, sys
def say(step, **result):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps([step, result]) + chr(10))
"""


def instead(monkeypatch, program):
    """Its processes run this."""
    monkeypatch.setattr(self_test, "COMMAND", [sys.executable, "-c", program])
    return {line.about: line for line in self_test.check()}


def test_its_steps_pass_here(tmp_path):
    assert [step for step, _ in self_test.alone(tmp_path)] == list(self_test.ALONE)
    gradient = torch.load(tmp_path / "gradient.pt")
    assert any(tensor.any() for tensor in gradient.values())


def test_a_wrong_gradient(tmp_path, monkeypatch):
    """Of one tensor alone, in what runs here and not in the definition."""
    right = self_test._gradient

    def wrong(s):
        loss, found = right(s)
        if s.cfg.kernels.get("default") != REFERENCE:
            found["lm_head.weight" if "lm_head.weight" in found else next(iter(found))] *= 1.1
        return loss, found

    monkeypatch.setattr(self_test, "_gradient", wrong)
    steps = self_test.alone(tmp_path)
    assert next(steps)[0] == "forward"
    with pytest.raises(ArithmeticError, match="the gradient of .* is off by"):
        next(steps)


def test_a_wrong_loss(tmp_path, monkeypatch):
    losses = iter([5.0, 5.5])
    monkeypatch.setattr(self_test, "_gradient", lambda s: (next(losses), {}))
    with pytest.raises(ArithmeticError, match=r"the loss is 5.0000 on cpu, and 5.5000 in fp64"):
        next(self_test.alone(tmp_path))


def test_a_disk_that_changes_one_bit(tmp_path, monkeypatch):
    load = checkpoint.load_tensors

    def changed(folder, name):
        state = load(folder, name)
        first = next(iter(state.values())).view(torch.int32)
        first.view(-1)[0] ^= 1
        return state

    monkeypatch.setattr(checkpoint, "load_tensors", changed)
    assert self_test.main(str(tmp_path / "results.jsonl"), "alone") == 1
    steps = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [step for step, _ in steps] == list(self_test.ALONE)
    assert "comes back otherwise than it was saved" in steps[-1][1]["failed"]


def test_what_was_not_tried_is_said(monkeypatch):
    program = OK + "say('forward', said='fine'); say('backward', failed='it is off'); sys.exit(1)"
    found = instead(monkeypatch, program)
    assert found["forward"].state == "ok"
    assert (found["backward"].state, found["backward"].text) == ("problem", "it is off")
    assert found["save"].text == found["load"].text == "not tried, as backward failed"
    assert found["two processes (gloo)"].state == found["load"].state == "note"
    assert all(line.remedy for line in found.values() if line.state == "problem")


def test_a_process_that_ends_in_the_middle(monkeypatch):
    found = instead(monkeypatch, OK + "say('forward', said='fine'); sys.exit('Illegal instruction')")
    assert found["forward"].state == "ok"
    assert found["backward"].text == "the process ended with exit status 1: Illegal instruction"


def test_one_that_hangs(monkeypatch):
    monkeypatch.setattr(self_test, "SECONDS", 1.0)
    found = instead(monkeypatch, "import time; time.sleep(60)")
    assert found["forward"].text == "not done after 1 s, all steps together"


def test_processes_that_do_not_meet(monkeypatch):
    steps = "[say(s, said='fine') for s in ('forward', 'backward', 'save', 'load')]"
    bad = "say('shared', failed='RuntimeError: connection refused') if sys.argv[-1] == '1' else say('shared', said='x')"
    found = instead(monkeypatch, f"{OK}{steps} if sys.argv[2] == 'alone' else {bad}")
    assert all(found[step].state == "ok" for step in self_test.ALONE)
    line = found["two processes (gloo)"]
    assert (line.state, line.text) == (
        "problem",
        "RuntimeError: connection refused",
    ) and "loopback" in line.remedy
