"""Every row of every matrix in a block has norm 1, after every step and in every average of steps."""

import torch
from torch import Tensor, nn

from models.vanilla import Vanilla


class Sphere(Vanilla):
    def matrices(self) -> list[nn.Parameter]:
        return [p for p in self.layers.parameters() if p.ndim == 2]

    @torch.no_grad()
    def constrain(self, skipped: Tensor) -> None:
        for weight in self.matrices():
            unit = weight / weight.norm(dim=1, keepdim=True)
            weight.copy_(torch.where(skipped > 0, weight, unit))

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        self.constrain(torch.zeros(()))
