"""The table of architectures: torch-free, and helpful about wrong names."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from models import ARCHITECTURES, load, resolve

ROOT = Path(__file__).resolve().parents[2]


def test_reading_the_table_does_not_import_torch():
    code = "import sys, models; models.resolve('gpt2'); print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("type_", ARCHITECTURES)
def test_every_row_names_a_module_with_a_config(type_):
    row = ARCHITECTURES[type_]
    model_class = load(row.model)
    assert issubclass(model_class, nn.Module)
    assert "d_model" in model_class.Config.model_fields
    assert row.description


def test_a_class_outside_the_table_needs_no_row():
    assert resolve("collections.abc:Mapping").model == "collections.abc:Mapping"


@pytest.mark.parametrize(
    ("call", "name", "message"),
    [
        (resolve, "gtp2", "unknown type 'gtp2'. Did you mean 'gpt2'"),
        (resolve, "zzz", "Registered: .*gpt2"),
        (resolve, "a-b:C", "expected package.module:Class"),
        (load, "models.gpt2", "expected package.module:Class"),
        (load, "models.gpt2:GTP2", "no 'GTP2'. Did you mean 'GPT2'"),
        (load, "models.nowhere:X", "no module named 'models.nowhere'"),
        (load, "no_such_package.inside:X", "no module named 'no_such_package'"),
    ],
)
def test_wrong_names(call, name, message):
    with pytest.raises(ValueError, match=message):
        call(name)


def test_a_missing_dependency_is_not_taken_for_a_wrong_name(tmp_path, monkeypatch):
    (tmp_path / "module_with_a_gap.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load("module_with_a_gap:Model")
