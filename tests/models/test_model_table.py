"""The table of architectures: torch-free, and helpful about wrong names."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from models import ARCHITECTURES, resolve
from naming import load

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
    assert "d_model" in {*model_class.Config.model_fields, *model_class.Config.own_sizes}
    assert row.description


def test_a_class_outside_the_table_needs_no_row():
    assert resolve("collections.abc:Mapping").model == "collections.abc:Mapping"


@pytest.mark.parametrize(
    ("name", "message"),
    [("gtp2", "unknown type 'gtp2'. Did you mean 'gpt2'"), ("zzz", "Registered: .*gpt2")],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        resolve(name)
