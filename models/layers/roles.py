"""What part a parameter plays, which decides its optimizer, learning rate and weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from naming import not_one_of

__all__ = ["ROLES", "Rule", "parameters_by_role", "rule_for"]

ROLES = ("matrix", "embedding", "head", "scalar", "router", "recurrent", "adapter", "memory")


@dataclass(frozen=True)
class Rule:
    """Gives `role` to the parameters whose whole name matches `pattern`; of several rules the first counts.

    `lr_mult`, `wd_mult` scale learning rate and weight decay; `every` n: stepped on every n-th step only;
    `split` n: n matrices stacked along dim 0 (a fused qkv), to be orthogonalised one by one.
    """

    pattern: str
    role: str
    lr_mult: float = 1.0
    wd_mult: float = 1.0
    every: int = 1
    split: int = 1

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role: {not_one_of(self.role, ROLES)}")
        if self.every < 1 or self.split < 1:
            raise ValueError(f"rule '{self.pattern}': every and split must be at least 1")
        re.compile(self.pattern)


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
