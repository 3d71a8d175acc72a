"""What part a parameter plays, which decides its optimizer, learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from naming import not_one_of

__all__ = ["ROLES", "SCALED_ROLES", "Rule", "parameters_by_role", "rule_for"]

ROLES = ("matrix", "embedding", "head", "scalar", "router", "recurrent", "adapter", "memory", "memory_bank")
SCALED_ROLES = (
    "matrix",
    "router",
    "recurrent",
)  # matrices that read a hidden state: rates may follow its width


@dataclass(frozen=True)
class Rule:
    """Gives `role` to the parameters whose whole name matches `pattern`; of several rules the first counts.

    `lr_mult`, `wd_mult` scale learning rate and weight decay; `every` n: stepped on every n-th step only, with the mean
    gradient; `betas`: of Adam where it steps them, in place of the run's `adam_beta1` and `adam_beta2`;
    `split`: n equal matrices stacked along dim 0 (a fused qkv), or the rows of each part, to be orthogonalised one by
    one; `width`: what the learning rate scales with where it is not the model's width (the fan-in of this matrix);
    `width_power`: p of a rate that goes as width^-p, where it is neither 1 (matrices that read a hidden state) nor 0
    (all others).
    """

    pattern: str
    role: str
    lr_mult: float = 1.0
    wd_mult: float = 1.0
    every: int = 1
    split: int | tuple[int, ...] = 1
    width: int | None = None
    width_power: float | None = None
    betas: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: {not_one_of(self.role, ROLES)}")
        parts = self.split if isinstance(self.split, tuple) else (self.split,)
        if self.every < 1 or not parts or min(parts) < 1 or (self.width is not None and self.width < 1):
            raise ValueError(f"rule '{self.pattern}': every, split and width must be at least 1")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"rule '{self.pattern}': betas must be at least 0 and less than 1, got {self.betas}"
            )
        if self.width_power is not None and self.width_power < 0:
            raise ValueError(f"rule '{self.pattern}': width_power must be 0 or more")
        if self.width is not None and not self.power_for(ndim=2):
            raise ValueError(
                f"rule '{self.pattern}': rates of role {self.role} follow no width; leave width out"
            )
        re.compile(self.pattern)

    def power_for(self, ndim: int) -> float:
        """p of the rate width^-p that a parameter of so many dimensions has.

        An update of unit scale per entry, such as Adam's, changes what a hidden layer gives in proportion to its
        fan-in, and the rate must shrink with it (Yang et al., Tensor Programs V, arXiv:2203.03466, table 8).
        Embeddings and vectors have a fan-in of one.
        """
        if self.width_power is not None:
            return self.width_power
        return 1.0 if self.role in SCALED_ROLES and ndim >= 2 else 0.0


def rule_for(rules: Sequence[Rule], name: str) -> Rule:
    """The first rule that matches. ValueError if there is none."""
    for rule in rules:
        if re.fullmatch(rule.pattern, name):
            return rule
    raise ValueError(f"parameter '{name}' matches none of the {len(rules)} role rules")


def parameters_by_role(rules: Sequence[Rule], named: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Number of parameters of each role that occurs, in the order of `ROLES`. Works on meta tensors."""
    counts = dict.fromkeys(ROLES, 0)
    for name, parameter in named:
        counts[rule_for(rules, name).role] += parameter.numel()
    return {role: count for role, count in counts.items() if count}
