"""AdamW, Adam and SGD as torch has them, fused: these kernels read on the device whether to skip a step.

State is allocated at construction, where torch would wait for the first step: the search for the largest batch
sees it, and a fused SGD whose first step is skipped would keep an uninitialised momentum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from configs.schema import RunConfig

SGD_MOMENTUM = 0.9

Groups = list[dict[str, Any]]


def adamw(groups: Groups, cfg: RunConfig) -> torch.optim.Optimizer:
    """Loshchilov and Hutter (arXiv:1711.05101): weight decay apart from the gradient."""
    return _with_moments(torch.optim.AdamW(groups, **_adam_options(cfg)))


def adam(groups: Groups, cfg: RunConfig) -> torch.optim.Optimizer:
    """Kingma and Ba (arXiv:1412.6980): weight decay is L2 regularisation, inside the gradient."""
    return _with_moments(torch.optim.Adam(groups, **_adam_options(cfg)))


def sgd(groups: Groups, cfg: RunConfig) -> torch.optim.Optimizer:
    """With momentum 0.9; weight decay inside the gradient."""
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=SGD_MOMENTUM, fused=True)
    for p in _parameters(optimizer):
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _adam_options(cfg: RunConfig) -> dict[str, Any]:
    return {"betas": (cfg.adam_beta1, cfg.adam_beta2), "eps": cfg.adam_epsilon, "fused": True}


def _with_moments(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for p in _parameters(optimizer):
        optimizer.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
        optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
