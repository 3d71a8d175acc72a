"""The tables of optimizers and schedules. Import no torch: what a row names is imported on use.

A row names its factory and the generic fields that it reads and others do not. A field of its own also needs its line
in `configs/schema.py` and `configs/training.yaml`; nothing else lists optimizers or schedules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from naming import Entry

__all__ = ["OFF_UNLESS_SET", "OPTIMIZERS", "SCHEDULES", "OptimizerEntry"]


@dataclass(frozen=True)
class OptimizerEntry(Entry):
    """An optimizer and what it is given.

    `factory` is `(groups, cfg) -> torch.optim.Optimizer`. A group has `params`, `splits`, `lr` and `weight_decay`, and
    `betas` where `betas` is set and a rule states them; `lr`, with `weight_decay_follows_rate` also `weight_decay`, and
    with `momentum` the group's `momentum` are set anew before every step. What comes back must

    - hold in `state[parameter]` tensors only, all of them from the start (memory is measured before the first step,
      and a checkpoint keeps exactly these),
    - leave parameters and state bit for bit as they are in a `step()` while its attribute `found_inf`, a float32
      scalar on the parameters' device, is 1; without asking the device, and whatever the gradients hold.

    `roles`: those that it steps, () = every role; the rest goes to the optimizer `rest`, whose fields stand in `reads`
    too. `rate`: the field with its learning rate; `decay`: that with its weight decay, or null for `weight_decay`.
    `width_scaled`: its update has unit scale per entry, so that rates follow `lr_scaling: width`. `kernels`: operations
    of kernels/ that a step calls; it hands them `self.kernels`, the run's, set before the first step.
    """

    roles: tuple[str, ...] = ()
    rest: str = "adamw"
    rate: str = "learning_rate"
    decay: str = "weight_decay"
    width_scaled: bool = False
    betas: bool = False
    momentum: bool = False
    kernels: tuple[str, ...] = ()


_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WIDTH = ("lr_scaling", "lr_base_width")
_DECAY = ("cautious_weight_decay", "weight_decay_follows_rate")
_MOMENTUM = ("muon_momentum_ends", "muon_momentum_rise", "muon_momentum_fall")
_MUON = (
    *("muon_learning_rate", "muon_momentum", "muon_scale", "muon_ns_steps", "muon_coefficients"),
    *(*_MOMENTUM, "muon_weight_decay", *_DECAY, *_ADAM, *_WIDTH),
)
_FALL = ("min_lr_ratio", "min_lr", "lr_decay_steps")

# Fields below that are off unless a file sets them, so that no recipe has to state them.
OFF_UNLESS_SET = {*_DECAY, *_MOMENTUM, "muon_weight_decay"}

_MATRICES: dict[str, Any] = {
    "roles": ("matrix",),
    "rate": "muon_learning_rate",
    "decay": "muon_weight_decay",
    "momentum": True,
    "kernels": ("newton_schulz",),
}

# `optimizer=<name>`
OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(
        "trainer.optim.torch_fused:adamw",
        (*_ADAM, *_WIDTH, *_DECAY),
        "Adam with decoupled weight decay",
        width_scaled=True,
        betas=True,
    ),
    "adam": OptimizerEntry(
        "trainer.optim.torch_fused:adam",
        (*_ADAM, *_WIDTH),
        "weight decay inside the gradient",
        width_scaled=True,
        betas=True,
    ),
    "sgd": OptimizerEntry(
        "trainer.optim.torch_fused:sgd", (), "momentum 0.9, weight decay inside the gradient"
    ),
    "muon": OptimizerEntry(
        "trainer.optim.muon:muon",
        _MUON,
        "orthogonalised momentum for matrices, AdamW for the rest",
        **_MATRICES,
    ),
    "normuon": OptimizerEntry(
        "trainer.optim.normuon:normuon",
        (*_MUON, "normuon_beta2"),
        "muon with updates of one size per neuron, AdamW for the rest",
        **_MATRICES,
    ),
}

# `scheduler=<name>`: `(step, warmup, end, floor, cfg) -> factor`, see trainer/optim/schedules.py
SCHEDULES: dict[str, Entry] = {
    "cooldown": Entry("trainer.optim.schedules:cooldown", ("cooldown_frac", *_FALL), "flat, then linear"),
    "cooldown_inverse_sqrt": Entry(
        "trainer.optim.schedules:cooldown_inverse_sqrt", ("cooldown_frac", *_FALL), "flat, then 1 / sqrt"
    ),
    "cosine": Entry("trainer.optim.schedules:cosine", _FALL, "half a cosine"),
    "linear": Entry("trainer.optim.schedules:linear", _FALL, "a straight line"),
    "constant": Entry("trainer.optim.schedules:constant", (), "flat"),
    "inverse_sqrt": Entry("trainer.optim.schedules:inverse_sqrt", _FALL, "1 / sqrt(step)"),
}
