"""Schedules that are fitted to the text lose information linearly."""

import pytest
import torch

from adapters.diffusion.mutual_information import (
    exponents,
    lost_information_spectral,
    lost_information_uniform,
)
from adapters.diffusion.neighbors import generator_matrix, neighbor_graph
from tests.adapters.diffusion.matrices import random_embedding
from tests.adapters.diffusion.toy import F64


def test_lost_information_of_a_coin():
    p = torch.tensor([0.7, 0.3], dtype=F64)
    assert lost_information_uniform(p, 0.5) == pytest.approx(0.7256692995628501, abs=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "neighbors"])
def test_fitted_schedules_lose_information_linearly(kind):
    p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=F64)
    if kind == "uniform":

        def lost(exponent):
            return lost_information_uniform(p, exponent)
    else:
        rates = generator_matrix(neighbor_graph(random_embedding(5), 3), 3)
        lost = lost_information_spectral(p, *torch.linalg.eigh(rates))
    total = exponents(lost, 30)
    assert total[0] == 0 and bool((total.diff() > 0).all())
    for t in range(1, 31):
        assert lost(float(total[t])) == pytest.approx(t / 31, abs=1e-3)


def test_information_of_the_two_forms_agrees():
    """The uniform chain is also a spectral one: R = 11'/K - 1."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    rates = torch.full((3, 3), 1 / 3, dtype=F64) - torch.eye(3, dtype=F64)
    spectral = lost_information_spectral(p, *torch.linalg.eigh(rates))
    for exponent in (1e-3, 0.4, 3.0):
        assert spectral(exponent) == pytest.approx(lost_information_uniform(p, exponent), abs=1e-12)
