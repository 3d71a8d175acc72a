"""Packages that are missing, broken or of another version."""

import importlib.metadata
import os

import pytest

from trainer.doctor import importing, versions


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Modules by name and source, found before all others."""

    def plant(**sources):
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")

    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    return plant


def test_modules_that_cannot_be_imported(planted, monkeypatch):
    planted(
        fine="print('hello')",
        raises="raise ImportError('libcudart.so.13: cannot open shared object file')",
        leaves="import sys; sys.exit(3)",
        dies="import os; os._exit(7)",
        late="x = 1",
    )
    found = importing.broken(["fine", "raises", "leaves", "dies", "late", "nowhere"])
    assert found == {
        "raises": "ImportError: libcudart.so.13: cannot open shared object file",
        "leaves": "SystemExit: 3",
        "dies": "importing it ends the process (exit status 7)",
        "nowhere": "ModuleNotFoundError: No module named 'nowhere'",
    }


def test_a_module_that_hangs(planted, monkeypatch):
    planted(hangs="import time; time.sleep(60)", fine="")
    monkeypatch.setattr(importing, "SECONDS", 2.0)
    assert importing.broken(["hangs", "fine"]) == {"hangs": "importing it takes more than 2 s"}


def report(monkeypatch, versions_here=None, broken=None):
    """Lines by what they are about; as if just these packages were there."""
    if versions_here is not None:
        monkeypatch.setattr(versions, "_version", versions_here.get)
    monkeypatch.setattr(versions, "broken", lambda modules: broken or {})
    return {line.about: line for line in versions.check()}


def test_this_installation_is_sound():
    found = {line.about: line for line in versions.check()}
    assert {"mytrainer", "python", "torch", "hydra-core", "optional: hf", "optional: gpu"} <= found.keys()
    assert found["torch"].text == importlib.metadata.version("torch")
    assert all(line.state == "ok" for name, line in found.items() if not name.startswith("optional"))


def test_a_broken_import_is_named_with_what_mends_it(monkeypatch):
    found = report(monkeypatch, broken={"torch": "OSError: libcuda.so", "safetensors": "ImportError: x"})
    assert found["torch"].state == found["optional: hf"].state == "problem"
    assert "cannot be imported: OSError: libcuda.so" in found["torch"].text
    assert '--force-reinstall "torch>=' in found["torch"].remedy
    assert "safetensors" in found["optional: hf"].text and "[hf]" in found["optional: hf"].remedy


def test_what_is_missing(monkeypatch):
    here = {"torch": "2.12.0", "numpy": "2.0", "tensorboard": "2.20"}
    found = report(monkeypatch, here)
    assert found["torch"].state == found["optional: tensorboard"].state == "ok"
    assert found["hydra-core"].state == "problem" and found["hydra-core"].remedy.endswith(
        "-m pip install -e ."
    )
    wandb = found["optional: wandb"]
    assert (wandb.state, wandb.text) == ("note", "wandb is not installed") and wandb.remedy.endswith(
        '[wandb]"'
    )


def test_a_version_that_was_not_tested(monkeypatch):
    found = report(monkeypatch, {"torch": "2.3.0", "wandb": "0.1"})
    assert found["torch"].state == "problem" and "2.3.0 was not tested" in found["torch"].text
    assert found["optional: wandb"].state == "problem"


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(versions.sys, "version_info", (3, 10, 1))
    line = versions._python(">=3.11")
    assert line.state == "problem" and "3.11 or later" in line.remedy
