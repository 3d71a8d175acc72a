"""The chain over nearest neighbours of an embedding."""

import math

import numpy as np
import pytest
import torch

from adapters.diffusion.chains import SpectralChain
from adapters.diffusion.d3pm import build_chain
from adapters.diffusion.neighbors import generator_matrix, neighbor_graph, spectrum
from models.d3pm import D3PMConfig
from tests.adapters.diffusion.matrices import T, cumulative
from tests.adapters.diffusion.toy import F64

CIRCLE = torch.tensor([0.0, 10.0, 100.0, 110.0], dtype=F64) * math.pi / 180
EMBEDDING = torch.stack([CIRCLE.cos(), CIRCLE.sin()], 1)


def test_nearest_neighbors_on_a_circle():
    with pytest.raises(ValueError, match="2 components"):
        neighbor_graph(EMBEDDING, 1)
    rates = generator_matrix(neighbor_graph(EMBEDDING, 2), 2)
    off = rates - rates.diag().diag()
    assert off[0].tolist() == [0, 0.5, 0.25, 0] and off[1].tolist() == [0.5, 0, 0.5, 0.25]
    chain = SpectralChain(spectrum(rates, torch.ones(3, dtype=F64), "expm"))
    expected = torch.tensor([0.54742258, 0.23192519, 0.15650973, 0.06414250], dtype=F64)
    assert torch.allclose(chain.row(torch.tensor([0]), torch.tensor([1]))[0], expected, atol=1e-8)
    for t in (1, 2, 3):
        assert torch.allclose(cumulative(chain, t), torch.linalg.matrix_exp(t * rates), atol=1e-12)


def test_fields_of_the_neighbor_chain_change_it(tmp_path):
    for seed in (0, 1):
        table = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
        np.save(tmp_path / f"{seed}.npy", table.numpy())
        torch.save(table, tmp_path / f"{seed}.pt")

    def row(**fields):
        cfg = D3PMConfig(
            **{
                "num_timesteps": T,
                "sampling_timesteps": T,
                "vocab_size": 8,
                "transition_type": "nearest_neighbor",
                "noise_schedule": "cosine",
                "nn_embedding_path": str(tmp_path / "0.npy"),
                **fields,
            }
        )
        return cumulative(build_chain(cfg, 8, None, torch.arange(1, 9) / 36), 2)[0]

    base = row()
    assert torch.allclose(base, row(nn_embedding_path=str(tmp_path / "0.pt")))
    for change in (
        {"nearest_neighbors": 4},
        {"nn_embedding_path": str(tmp_path / "1.npy")},
        {"nn_construction": "sinkhorn"},
        {"noise_schedule": "mutual_info"},
    ):
        assert not torch.allclose(base, row(**change), atol=1e-9), change
    with pytest.raises(ValueError, match="dense_state_limit"):
        row(dense_state_limit=7)
    with pytest.raises(ValueError, match="no such file"):
        row(nn_embedding_path=str(tmp_path / "absent.npy"))
