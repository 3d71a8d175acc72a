"""Which optimizer, learning rate and weight decay every parameter gets, decided by its role.

Roles come from the adapter's rules; everything here follows from them and the config, without touching a
device, so that `show` prints the same table that a run uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.nn import Parameter

from adapters.rates import COMPONENTS, stated_rate
from models.layers.roles import Rule
from naming import look_up, shorten
from trainer.optim import OPTIMIZERS
from trainer.optim.muon import pieces_of

if TYPE_CHECKING:
    from configs.schema import RunConfig

FROZEN = "frozen"
# Roles whose matrices do not decay either: rows of a bank that no token chose would fade.
UNDECAYED = ("scalar", "memory_bank")


@dataclass(frozen=True)
class Treatment:
    """How parameters of one kind are stepped."""

    role: str
    optimizer: str  # a name of `OPTIMIZERS`; "frozen" = never stepped
    lr: float = 0.0  # peak, with multipliers and width scaling; the schedule multiplies it
    lr_mult: float = 1.0
    weight_decay: float = 0.0
    every: int = 1
    betas: tuple[float, float] | None = None  # None = the run's

    @property
    def label(self) -> str:
        """Name of the learning rate in logs: the role, with the multiplier where it is not 1."""
        return self.role if self.lr_mult == 1 else f"{self.role} x{self.lr_mult:g}"


@dataclass
class ParameterGroup:
    """Parameters that are treated alike: one row of the role table."""

    treatment: Treatment
    parameters: dict[str, Parameter] = field(default_factory=dict)
    splits: list[int | tuple[int, ...]] = field(default_factory=list)  # per parameter: see `Rule.split`


def assign_groups(
    named_parameters: Iterable[tuple[str, Parameter]], rules: list[Rule], cfg: RunConfig, width: int
) -> list[ParameterGroup]:
    """Group every parameter by the first rule whose pattern matches its whole name.

    Args:
        named_parameters: each parameter once, as `Module.named_parameters` gives them.
        rules: first match wins.
        cfg: the generic fields `optimizer`, `lr_scaling`, `lr_base_width`, those of rates and of weight decay.
        width: the model's d_model, for `lr_scaling: width`.
    Raises:
        ValueError: a trainable parameter matches no rule, or a `matrix` is none.
    """
    groups: dict[Treatment, ParameterGroup] = {}
    unmatched: list[str] = []
    for name, parameter in named_parameters:
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if not parameter.requires_grad:
            treatment = Treatment(rule.role if rule else "none", FROZEN)
        elif rule is None:
            unmatched.append(name)
            continue
        else:
            treatment = _treatment(name, parameter, rule, cfg, width)
        group = groups.setdefault(treatment, ParameterGroup(treatment))
        group.parameters[name] = parameter
        group.splits.append(rule.split if rule else 1)
    if unmatched:
        roles = ", ".join(dict.fromkeys(rule.role for rule in rules)) or "none"
        raise ValueError(
            f"no parameter role for {shorten(unmatched)}: add a Rule to the adapter's param_roles() "
            f"(roles it names now: {roles})"
        )
    return list(groups.values())


def _treatment(name: str, parameter: Parameter, rule: Rule, cfg: RunConfig, width: int) -> Treatment:
    matrix = rule.role == "matrix"
    if matrix:
        try:
            pieces_of(parameter, rule.split)
        except ValueError as error:
            raise ValueError(f"{name} has the role matrix: {error}") from None
    chosen = look_up(OPTIMIZERS, cfg.optimizer, "optimizer")
    optimizer = cfg.optimizer if not chosen.roles or rule.role in chosen.roles else chosen.rest
    if rule.role in COMPONENTS:
        optimizer = "adamw"
    row = OPTIMIZERS[optimizer]
    stated = stated_rate(rule.role, cfg)
    lr = (getattr(cfg, row.rate) if stated is None else stated) * rule.lr_mult
    # Muon's scale accounts for the shape already. Decoupled decay shrinks with the rate.
    if row.width_scaled and cfg.lr_scaling == "width" and cfg.lr_base_width:
        lr *= (cfg.lr_base_width / (rule.width or width)) ** rule.power_for(parameter.ndim)
    decay = getattr(cfg, row.decay)
    decayed = rule.role not in UNDECAYED and parameter.ndim >= 2
    return Treatment(
        role=rule.role,
        optimizer=optimizer,
        lr=lr,
        lr_mult=rule.lr_mult,
        weight_decay=(cfg.weight_decay if decay is None else decay) * rule.wd_mult if decayed else 0.0,
        every=rule.every,
        betas=rule.betas if row.betas else None,
    )


def role_table(
    named_parameters: Iterable[tuple[str, Parameter]], rules: list[Rule], cfg: RunConfig, width: int
) -> list[dict[str, Any]]:
    """Rows {role, optimizer, tensors, parameters, lr, weight_decay, every}, and `betas` where a rule states them;
    `parameters` sum to the total."""
    return [
        {
            "role": group.treatment.role,
            "optimizer": group.treatment.optimizer,
            "tensors": len(group.parameters),
            "parameters": sum(p.numel() for p in group.parameters.values()),
            "lr": group.treatment.lr,
            "weight_decay": group.treatment.weight_decay,
            "every": group.treatment.every,
            **({"betas": group.treatment.betas} if group.treatment.betas else {}),
        }
        for group in assign_groups(named_parameters, rules, cfg, width)
    ]
