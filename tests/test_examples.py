"""The notebooks of examples/ run as they stand, by a kernel of somebody who has installed the project."""

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cells):
    return [[output.output_type for output in cell.outputs] for cell in cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_gave(path):
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("error" in kind for kind in kinds(cells))
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    from nbclient import NotebookClient

    shown, notebook = (nbformat.read(path, as_version=4) for _ in range(2))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "installed"), "OMP_WAIT_POLICY": "PASSIVE"}
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, coalesce_streams=True, resources=folder).execute(env=environment)
    assert kinds(code(notebook)) == kinds(code(shown))  # every figure and every table is there again
    assert list(tmp_path.glob("outputs/*/summary.json"))
