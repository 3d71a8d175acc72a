"""The `doctor` command: what it prints, and its exit status."""

import importlib.util
import json
import sys

import pytest

import mytrainer
from trainer.commands import doctor
from trainer.doctor import SECTIONS, SELF_TEST, self_test


@pytest.fixture
def sections(monkeypatch):
    """A function that has it look at those of this file alone."""

    def choose(**functions):
        names = {"one": "test", "self_test": SELF_TEST}
        chosen = {names.get(name, name): f"{__name__}:{f}" for name, f in functions.items()}
        monkeypatch.setattr(doctor, "SECTIONS", chosen)

    return choose


def fine():
    yield doctor.Line("ok", "this", "works")


def broken():
    yield doctor.Line("problem", "that", "does not", "do this")


def raises():
    raise RuntimeError("never seen before")


def test_a_sound_machine(command, sections):
    sections(versions="fine", self_test="fine")
    out, _ = command("doctor")
    assert "versions\n  ok       this: works\n" in out and out.endswith("the self-test passed; no problems\n")


def test_a_problem_comes_with_what_to_do(command, sections):
    sections(versions="broken", devices="raises", self_test="fine")
    out, err = command("doctor")
    assert "  problem  that: does not\n           -> do this\n" in out
    assert "cannot be looked at: RuntimeError: never seen before" in out and "Traceback" not in out + err
    assert out.endswith("the self-test passed; 2 problems, each with what to do (->)\n")


@pytest.mark.parametrize("failing", ["broken", "raises"])
def test_the_status_is_that_of_the_self_test(command, sections, failing):
    sections(versions="fine", self_test=failing)
    out, _ = command("doctor", status=1)
    assert "the self-test FAILED; 1 problem," in out


def test_as_json(command, sections):
    sections(versions="broken", self_test="fine")
    found = json.loads(command("doctor", "--json")[0])
    assert found["self_test_passed"] is True and found["problems"] == 1
    assert found["versions"] == [
        {"state": "problem", "about": "that", "text": "does not", "remedy": "do this"}
    ]
    sections(self_test="raises")
    assert json.loads(command("doctor", "--json", status=1)[0])["self_test_passed"] is False


def test_an_unknown_option(command):
    assert "--jason" in command("doctor", "--jason", status=2)[1]


def test_it_runs_where_what_every_command_needs_is_missing(command, sections, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hydra" else find(name))
    sections(self_test="fine")
    assert command("doctor")[0].endswith("no problems\n")


def test_a_torch_that_cannot_be_imported(command, monkeypatch):
    """All sections, none of which may raise: what imports torch says so."""
    monkeypatch.setitem(sys.modules, "torch", None)
    fails = "import sys; sys.exit('ImportError: torch')"
    monkeypatch.setattr(self_test, "COMMAND", [sys.executable, "-c", fails])
    found = json.loads(command("doctor", "--json", status=1)[0])
    for section in ("devices", "kernels", SELF_TEST):
        assert "problem" in {line["state"] for line in found[section]}
    lines = [line for section in SECTIONS for line in found[section]]
    assert all(line["remedy"] for line in lines if line["state"] == "problem")


@pytest.mark.slow
def test_all_of_it_here(command):
    found = json.loads(command("doctor", "--json")[0])
    assert found["self_test_passed"], found[SELF_TEST]
    assert [line["about"] for line in found[SELF_TEST]][:5] == [*self_test.ALONE, "two processes (gloo)"]
    assert mytrainer.COMMANDS["doctor"]
