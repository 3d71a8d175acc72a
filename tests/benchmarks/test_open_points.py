"""Questions for a GPU: what is compared is what was meant."""

import pytest
import torch

from benchmarks import open_points
from tests.kernels.interpret import interpreted

CPU = torch.device("cpu")


def test_the_row_kernel_is_timed_with_and_without_its_second_pass(monkeypatch):
    monkeypatch.setattr(open_points, "TURNS", 2)
    assert open_points.row_kernel(CPU, tiny=True).keys() == {"copy"}
    monkeypatch.setattr(open_points, "interpreting", lambda: True)
    with interpreted():
        found = open_points.row_kernel(CPU, tiny=True)
    assert found.keys() == {"copy", "loss", "loss and gradient"}
    moved = {name: each["seconds"] * each["bytes_per_second"] for name, each in found.items()}
    assert moved == pytest.approx({"copy": 1600, "loss": 800, "loss and gradient": 1600})


@pytest.mark.slow
def test_the_compilers_chunks_are_made(monkeypatch):
    """Memory says so: with an option that it did not know it would be the same twice."""
    monkeypatch.setattr(open_points, "TURNS", 2)
    found = open_points.head_loss(CPU, tiny=True)
    assert found["compiled, auto_chunker"]["peak_bytes"] < 0.6 * found["compiled"]["peak_bytes"]
