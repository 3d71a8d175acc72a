"""Chains of every kind, and their transition matrices from what a chain can be asked."""

import torch

from adapters.diffusion.chains import AbsorbingChain, GaussianChain, SpectralChain, UniformChain
from adapters.diffusion.neighbors import balance, generator_matrix, neighbor_graph, spectrum
from adapters.diffusion.schedules import absorbing_mutual_info_betas, cosine_betas, linear_betas
from tests.adapters.diffusion.toy import F64

T, STATES = 6, 5
CHAINS = ["absorbing", "uniform", "gaussian", "neighbors", "sinkhorn"]
SCHEDULES = {
    "cosine": cosine_betas(T),
    "linear": linear_betas(T, 0.02, 0.9),
    "1/(T-t+1)": absorbing_mutual_info_betas(T),
}


def random_embedding(states):
    return torch.randn(states, 3, dtype=F64, generator=torch.Generator().manual_seed(4))


def make_chain(kind, betas=None, states=STATES):
    betas = cosine_betas(T) if betas is None else betas
    if kind == "absorbing":
        return AbsorbingChain(states, betas, mask_id=states - 1)
    if kind == "uniform":
        return UniformChain(states, betas)
    if kind == "gaussian":
        return GaussianChain(states, betas, F64)
    graph = neighbor_graph(random_embedding(states), 3)
    if kind == "sinkhorn":
        return SpectralChain(spectrum(balance(graph), betas, "sinkhorn"))
    return SpectralChain(spectrum(generator_matrix(graph, 3), -torch.log1p(-betas.clamp_max(0.999)), "expm"))


def one_step(chain, t):
    """Q_t (K, K), from the columns that a chain reads."""
    ids = torch.arange(chain.states)
    return chain.column(ids, torch.full_like(ids, t - 1), torch.full_like(ids, t)).double().T


def cumulative(chain, t):
    ids = torch.arange(chain.states)
    return chain.row(ids, torch.full_like(ids, t)).double()
