"""All optimizers of a run behind one `step`; `trainer.optim.OPTIMIZERS` is the table of them.

A step takes a device-side flag that turns it into an exact no-op, so that the loop need not wait for the
device to learn whether a gradient was finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.choose import Kernels
from models.layers.roles import Rule
from naming import require_fit, shapes_and_dtypes, shorten
from trainer.optim import OPTIMIZERS
from trainer.optim.groups import FROZEN, ParameterGroup, assign_groups, role_table

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["Optimizers", "build_optimizers", "clip_gradients", "role_table"]


def build_optimizers(
    named_parameters: Iterable[tuple[str, Parameter]],
    rules: list[Rule],
    cfg: RunConfig,
    width: int,
    kernels: Kernels | None = None,
) -> Optimizers:
    """Optimizers for every trainable parameter; see `assign_groups` for arguments and errors. `kernels`: the run's
    choice of implementations; None = automatic."""
    groups = assign_groups(named_parameters, rules, cfg, width)
    trained = [group for group in groups if group.treatment.optimizer != FROZEN]
    return Optimizers(trained, cfg, kernels or Kernels())


def clip_gradients(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / norm); return their global 2-norm before that, on the device.

    `max_norm` 0 only measures. A non-finite norm leaves non-finite gradients: the step's `found_inf` covers
    that.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Optimizers:
    """Steps every group with its optimizer; state is keyed by parameter name."""

    def __init__(self, groups: list[ParameterGroup], cfg: RunConfig, kernels: Kernels) -> None:
        self._groups = groups
        self._cfg = cfg
        self._kernels = kernels
        self._names: dict[Tensor, str] = {p: name for group in groups for name, p in group.parameters.items()}
        self._kinds = {name: group.treatment.optimizer for group in groups for name in group.parameters}
        self._members: list[_Member] = []

    def allocate(self) -> None:
        """Allocate all state now (so that a search for the largest batch sees it). Later calls do nothing."""
        if self._members:
            return
        kinds: dict[tuple[str, int], list[ParameterGroup]] = {}
        for group in self._groups:
            kinds.setdefault((group.treatment.optimizer, group.treatment.every), []).append(group)
        for (kind, every), groups in kinds.items():
            row = OPTIMIZERS[kind]
            optimizer = row.load()([_torch_group(group) for group in groups], self._cfg)
            if row.kernels:
                optimizer.kernels = self._kernels
            follows = self._cfg.weight_decay_follows_rate and "weight_decay_follows_rate" in row.reads
            self._members.append(_Member(optimizer, every, follows, row.momentum))

    def kernel_calls(self) -> dict[str, dict[str, Any]]:
        """Operations of `kernels/` that a step calls, as `ModelAdapter.kernel_calls` has them. Allocates nothing."""
        kinds = dict.fromkeys(group.treatment.optimizer for group in self._groups)
        return {op: {"compiling": False} for kind in kinds for op in OPTIMIZERS[kind].kernels}

    def state_bytes(self) -> int:
        """Memory of all state; on the `meta` device too, where nothing is really allocated."""
        self.allocate()
        kept = {
            id(t): t for _, entries in self._live_state() for t in entries.values()
        }  # `every` shares a counter
        return sum(tensor.nbytes for tensor in kept.values())

    @torch.no_grad()
    def step(
        self, lr_factor: float = 1.0, found_inf: Tensor | None = None, momentum: float | None = None
    ) -> None:
        """One update with every learning rate multiplied by `lr_factor`.

        Args:
            lr_factor: from `schedule_factor`.
            momentum: from `momentum_at`, for those optimizers that have one to schedule; None = the run's.
            found_inf: float32 scalar on the parameters' device; 1 leaves parameters and state (step counters
                included) exactly as they are. None = 0.
        Raises:
            RuntimeError: a parameter has no gradient. A part that is switched off must get a zero gradient
                (weight 0), or data-parallel training would hang or diverge on it.
        """
        self.allocate()
        without = [name for p, name in self._names.items() if p.grad is None]
        if without:
            raise RuntimeError(f"no gradient for {shorten(without)}: not used in this step's loss")
        for member in self._members:
            member.step(lr_factor, found_inf, momentum)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._names:
            parameter.grad = None

    def learning_rates(self, lr_factor: float = 1.0) -> dict[str, float]:
        """Learning rate per role; a role with several multipliers has one entry for each (`matrix x0.5`), and so has
        one whose parts follow the width in several ways."""
        found: dict[str, float] = {}
        for treatment in (group.treatment for group in self._groups):
            label = treatment.label
            if found.get(label, treatment.lr) != treatment.lr:
                label += f" x{treatment.lr / found[label]:.3g}"
            found[label] = treatment.lr
        return {label: lr * lr_factor for label, lr in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """{"optimizer": {name: kind}, "state": {name: {key: tensor}}}: the live tensors, not copies."""
        self.allocate()
        state = {self._names[p]: dict(entries) for p, entries in self._live_state()}
        return {"optimizer": dict(self._kinds), "state": state}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy a saved state in place. Raises ValueError, before any change, where it does not fit."""
        self.allocate()
        require_fit("the optimizer state", dict.fromkeys(self._kinds), dict.fromkeys(saved["optimizer"]))
        changed = [
            f"{name} ({saved['optimizer'][name]}, now {kind})"
            for name, kind in self._kinds.items()
            if saved["optimizer"][name] != kind
        ]
        if changed:
            raise ValueError(f"the optimizer state was written by another optimizer: {shorten(changed)}")
        pairs: list[tuple[Tensor, Tensor]] = []  # live, saved
        for parameter, entries in self._live_state():
            name = self._names[parameter]
            given = saved["state"][name]
            require_fit(
                f"the optimizer state of {name}", shapes_and_dtypes(entries), shapes_and_dtypes(given)
            )
            pairs += [(live, given[key]) for key, live in entries.items()]
        if not all(bool(torch.isfinite(value).all()) for _, value in pairs):
            raise ValueError("the optimizer state holds numbers that are not finite")
        for live, value in pairs:
            live.copy_(value)

    def _live_state(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        return [item for member in self._members for item in member.optimizer.state.items()]


class _Member:
    """One torch optimizer, stepped every step or, with `every` = n, on the mean gradient of n steps.

    With n > 1 the gradient is collected in the optimizer's state. Whether a step is due is known only on the
    device (skipped steps do not count), so the optimizer is launched each time and told to skip.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, every: int, decay_follows: bool, has_momentum: bool
    ) -> None:
        self.optimizer = optimizer
        self._every = every
        self._decay_follows, self._has_momentum = decay_follows, has_momentum
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if every > 1:
            self._collected_steps = torch.zeros((), device=self._parameters[0].device)
            for parameter in self._parameters:
                optimizer.state[parameter]["collected_gradient"] = torch.zeros_like(parameter)
                optimizer.state[parameter]["collected_steps"] = self._collected_steps

    def step(self, lr_factor: float, found_inf: Tensor | None, momentum: float | None) -> None:
        if found_inf is None:
            found_inf = torch.zeros((), device=self._parameters[0].device)
        skip = found_inf if self._every == 1 else self._collect(found_inf)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
            if self._decay_follows:
                group["weight_decay"] = group["peak_weight_decay"] * lr_factor
            if self._has_momentum and momentum is not None:
                group["momentum"] = momentum
        self.optimizer.found_inf = skip  # type: ignore[attr-defined]
        self.optimizer.step()
        if self._every > 1:
            self._clear_where_stepped(skip)

    def _collect(self, found_inf: Tensor) -> Tensor:
        """Add this step's gradient; replace `.grad` by the mean so far; return 1 unless an update is due."""
        for parameter in self._parameters:
            collected = self.optimizer.state[parameter]["collected_gradient"]
            collected.copy_(torch.where(found_inf > 0, collected, collected + parameter.grad))
            parameter.grad.copy_(collected / self._every)  # type: ignore[union-attr]
        self._collected_steps += 1 - found_inf
        # The count is below `every` between steps, so a skipped step is never due.
        return (self._collected_steps < self._every).to(torch.float32)

    def _clear_where_stepped(self, skipped: Tensor) -> None:
        for parameter in self._parameters:
            self.optimizer.state[parameter]["collected_gradient"].mul_(skipped)
        self._collected_steps.mul_(skipped)


def _torch_group(group: ParameterGroup) -> dict[str, Any]:
    return {
        "params": list(group.parameters.values()),
        "splits": group.splits,
        "lr": group.treatment.lr,
        "peak_lr": group.treatment.lr,
        "weight_decay": group.treatment.weight_decay,
        "peak_weight_decay": group.treatment.weight_decay,
        **({"betas": group.treatment.betas} if group.treatment.betas else {}),
    }
