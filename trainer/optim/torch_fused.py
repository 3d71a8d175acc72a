"""AdamW, Adam and SGD as torch has them, fused: these kernels read on the device whether to skip a step.

State is allocated at construction, where torch would wait for the first step: the search for the largest batch
sees it, and a fused SGD whose first step is skipped would keep an uninitialised momentum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from configs.schema import RunConfig

SGD_MOMENTUM = 0.9

Groups = list[dict[str, Any]]


def adamw(groups: Groups, cfg: RunConfig) -> torch.optim.Optimizer:
    """Loshchilov and Hutter (arXiv:1711.05101): weight decay apart from the gradient."""
    kind = CautiousAdamW if cfg.cautious_weight_decay else torch.optim.AdamW
    return _with_moments(kind(groups, **_adam_options(cfg)))


def adam(groups: Groups, cfg: RunConfig) -> torch.optim.Optimizer:
    """Kingma and Ba (arXiv:1412.6980): weight decay is L2 regularisation, inside the gradient."""
    return _with_moments(torch.optim.Adam(groups, **_adam_options(cfg)))


class CautiousAdamW(torch.optim.AdamW):
    """p <- p - lr u - lr wd p [u p > 0], u the update of Adam: only entries decay that it moves towards zero (Chen et
    al., arXiv:2510.12402). The sign of u is that of the first moment, which the fused kernel writes."""

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        decays = [group["weight_decay"] for group in self.param_groups]
        decayed = [p for group in self.param_groups if group["weight_decay"] for p in group["params"]]
        before = {p: p.detach().clone() for p in decayed}
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
            for p in group["params"] if decay else []:
                self._decay(p, before.pop(p), group["lr"] * decay)

    def _decay(self, p: torch.nn.Parameter, before: Tensor, amount: float) -> None:
        # 1 where they agree, else 0. By signs, as the product of the values may vanish; in floats, as a CPU is slow at
        # choosing by booleans.
        agree = self.state[p]["exp_avg"].sign().mul_(before.sign()).clamp_(min=0.0)
        shrinking = before.new_full((), amount)
        if self.found_inf is not None:
            shrinking.masked_fill_(self.found_inf > 0, 0.0)
        p.sub_(before.mul_(agree).mul_(shrinking))


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
