"""Low-rank adapters: y = W x + b + (alpha / r) B A drop(x), where W and b stay as they are.

Hu et al. 2021, "LoRA" (arXiv:2106.09685), eq. 3. A (r, in) is drawn as the layers of torch are, B (out, r) is zero, so
that the first step is that of the base.

A module that is adapted keeps its class's name and its parameters' names. Whoever reads its matrix instead of calling
it (a fused output layer, grouped products of experts, a factor on the weights) reads W + (alpha / r) B A, so that no
path goes past an adapter.

Shapes: r rank, E experts; a stack of experts (E, out, in) has an A (E, r, in) and a B (E, out, r).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.precision import at_least_fp32, own_dtypes
from models.layers.experts import Experts
from models.layers.roles import Rule, rule_for
from naming import did_you_mean, shorten

__all__ = [
    "LOW_RANK",
    "LowRank",
    "Target",
    "adapt",
    "is_adapted",
    "is_transposed",
    "matrices",
    "merge_all",
    "scaled_linear",
    "targets_of",
]

LOW_RANK = r"(.*\.)?lora_[AB](_\w+)?"  # names of the parameters of adapters


@dataclass(frozen=True)
class LowRank:
    """`rank` r; `alpha`, of which alpha / r scales the product; `dropout` of what A reads."""

    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def _names(parameter: str) -> tuple[str, str]:
    """What the matrices beside a parameter of a module are called."""
    suffix = "" if parameter == "weight" else f"_{parameter}"
    return f"lora_A{suffix}", f"lora_B{suffix}"


class _Adapted(nn.Module):
    """Of a module some of whose parameters are adapted; `_adapted_class` puts it in front of the module's own class."""

    low_rank: LowRank
    own_class: ClassVar[type[nn.Module]]
    adapted: ClassVar[tuple[str, ...]]  # names of its parameters
    path: str  # in the model

    def _own(self, parameter: str) -> Tensor:
        """A parameter as it is kept."""
        found = self._parameters[parameter]
        assert found is not None
        return found

    def _low_rank_part(self, parameter: str) -> Tensor:
        """(alpha / r) B A, as the matrix lies."""
        a, b = map(self._own, _names(parameter))
        with own_dtypes(a.device):
            return self.low_rank.scale * (b @ a)

    def _matrix(self, parameter: str) -> Tensor:
        base = self._own(parameter)
        if self.training and self.low_rank.dropout and torch.is_grad_enabled():
            raise ValueError(
                f"lora_dropout: {self.low_rank.dropout:g} acts on what a matrix is given, and that of {self.path} is "
                f"multiplied elsewhere. Set lora_dropout=0, or leave it out of lora_targets"
            )
        return (base + self._low_rank_part(parameter)).to(base.dtype)


class _AdaptedLinear(_Adapted):
    """In front of an `nn.Linear`: the product with A goes first, which costs r (in + out) instead of in out."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._own("weight"), self.bias) + self.beside(x)

    def beside(self, x: Tensor) -> Tensor:
        """(alpha / r) B A drop(x)"""
        a, b = map(self._own, _names("weight"))
        x = F.dropout(x, self.low_rank.dropout, self.training)
        return self.low_rank.scale * F.linear(F.linear(x, a), b)


class _AdaptedTransposed(_AdaptedLinear):
    """In front of a `Conv1D` of transformers, whose weight lies as (in, out)."""

    nf: int
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        product = torch.addmm(self.bias, x.flatten(0, -2), self._own("weight"))
        return product.view(*x.shape[:-1], self.nf) + self.beside(x)

    def _low_rank_part(self, parameter: str) -> Tensor:
        return super()._low_rank_part(parameter).t()


def is_transposed(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2 in transformers, which is known here by name alone."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_adapted(module: nn.Module) -> bool:
    """Whether an adapter stands beside one of its matrices."""
    return isinstance(module, _Adapted)


def scaled_linear(linear: nn.Linear, x: Tensor, factor: Tensor | float) -> Tensor:
    """F.linear(x, factor * W) of a layer without biases."""
    if isinstance(linear, _AdaptedLinear):
        return F.linear(x, factor * linear._own("weight")) + factor * linear.beside(x)
    return F.linear(x, factor * linear.weight)


@cache
def _adapted_class(cls: type[nn.Module], parameters: tuple[str, ...]) -> type[nn.Module]:
    """`cls`, whose `parameters` are read with what stands beside them. One for all modules: what is compiled for a
    block is compiled for the classes within it."""
    calls = issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward
    front = _AdaptedLinear if calls else _AdaptedTransposed if cls.__name__ == "Conv1D" else _Adapted
    bases = (front, cls)
    read = {name: _read(name) for name in parameters}
    return type(cls.__name__, bases, {**read, "own_class": cls, "adapted": parameters})


def _read(parameter: str) -> property:
    def read(module: _Adapted) -> Tensor:
        return module._matrix(parameter)

    return property(read)


# -- which ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A matrix, or a stack of them, by the module that holds it."""

    module: str
    parameter: str  # "weight" of a linear layer
    sides: tuple[int, int]  # (out, in)

    @property
    def name(self) -> str:
        """Of the parameter."""
        return f"{self.module}.{self.parameter}"

    @property
    def path(self) -> str:
        """As people name it."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"


def targets_of(model: nn.Module, wanted: str | Sequence[str], rules: Sequence[Rule]) -> list[Target]:
    """The matrices of `model` that `wanted` names: paths or ends of paths behind a dot ("q_proj"); a text alone is a
    regular expression on the whole path, but for "all-linear", all linear layers of the role `matrix`, which output
    layers, gates and routers do not have.

    Raises:
        ValueError: something matches nothing, or what cannot be adapted: an embedding, a router, a matrix that another
            module has too.
    """
    memory = ("memory", "memory_bank")
    able = {
        path: target
        for path, target in _able(model).items()
        if rule_for(rules, target.name).role not in memory
    }
    if wanted == "all-linear":
        linear = [target for target in able.values() if target.parameter == "weight"]
        return [target for target in linear if rule_for(rules, target.name).role == "matrix"]
    if isinstance(wanted, str):
        try:
            fitting = [path for path in able if re.fullmatch(wanted, path)]
        except re.error as error:
            raise ValueError(f"lora_targets: {wanted!r} is no regular expression: {error}") from None
        if not fitting:
            raise ValueError(f"lora_targets: {wanted!r} matches no path.{_there(able)}")
    else:
        fitting = []
        for word in wanted:
            found = [path for path in able if path == word or path.endswith(f".{word}")]
            if not found:
                raise ValueError(f"lora_targets: {_nothing(model, word, able)}")
            fitting += [path for path in found if path not in fitting]
    chosen = [able[path] for path in able if path in set(fitting)]
    refused = {target.path: why for target in chosen if (why := _why_not(model, target, rules))}
    if refused:
        path, why = next(iter(refused.items()))
        raise ValueError(f"lora_targets: {path} {why}")
    return chosen


def matrices(model: nn.Module) -> list[Target]:
    """The linear layers and stacks of experts of a model."""
    return list(_able(model).values())


def _able(model: nn.Module) -> dict[str, Target]:
    """By path: linear layers and stacks of experts."""
    found: dict[str, Target] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = Target(name, "weight", (module.out_features, module.in_features))
        elif is_transposed(module):
            into, out = module._parameters["weight"].shape  # type: ignore[union-attr]
            found[name] = Target(name, "weight", (out, into))
        elif isinstance(module, Experts):
            for parameter, stack in module.named_parameters(recurse=False):
                found[f"{name}.{parameter}"] = Target(name, parameter, (stack.shape[1], stack.shape[2]))
    return found


def _why_not(model: nn.Module, target: Target, rules: Sequence[Rule]) -> str:
    named = dict(model.named_parameters(remove_duplicate=False))
    elsewhere = [n for n, p in named.items() if p is named[target.name] and n != target.name]
    if elsewhere:
        return f"is one matrix with {elsewhere[0]}, which would change with it. Untie them, or leave it out"
    if rule_for(rules, target.name).role == "router":
        return "decides where tokens go, and is never adapted. Leave it out"
    return ""


def _nothing(model: nn.Module, word: str, able: Mapping[str, Target]) -> str:
    others = [
        name
        for name, module in model.named_modules()
        if (name == word or name.endswith(f".{word}")) and name not in able
    ]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        return f"{others[0]} is no linear layer but {kind}.{_there(able)}"
    return f"nothing is called {word!r}.{did_you_mean(word, _leaves(able))}{_there(able)}"


def _leaves(able: Mapping[str, Target]) -> list[str]:
    return list(dict.fromkeys(path.rpartition(".")[2] for path in able))


def _there(able: Mapping[str, Target]) -> str:
    return f" There are: {shorten(_leaves(able), 20)}"


# -- making and merging --------------------------------------------------------------------------------------------


def adapt(
    model: nn.Module, targets: Sequence[Target], low_rank: LowRank, generator: torch.Generator | None
) -> None:
    """Put adapters beside the matrices and freeze all that was there. `generator`: on the CPU; None on "meta".

    Raises:
        ValueError: the rank exceeds a side of a matrix.
    """
    model.requires_grad_(False)
    of_module: dict[str, list[str]] = {}
    for target in targets:
        of_module.setdefault(target.module, []).append(target.parameter)
    for path, parameters in of_module.items():
        module = model.get_submodule(path)
        for name in parameters:
            base = module._parameters[name]
            assert base is not None
            *stack, out, into = base.shape
            if is_transposed(module):
                out, into = into, out
            if low_rank.rank > min(out, into):
                raise ValueError(
                    f"lora_rank: {low_rank.rank} exceeds the smaller side of {path} ({out} x {into}); nearest "
                    f"{min(out, into)}"
                )
            # As `base` lies; adapters of narrow weights are wide, as optimizers step them.
            wide = at_least_fp32(base.dtype)
            a = torch.empty((*stack, low_rank.rank, into), dtype=wide, device=base.device)
            b = torch.zeros((*stack, out, low_rank.rank), dtype=wide, device=base.device)
            if generator is not None:
                bound = 1 / math.sqrt(into)  # Kaiming-uniform with a = sqrt(5)
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
            for own, value in zip(_names(name), (a, b), strict=True):
                module.register_parameter(own, nn.Parameter(value))
        module.low_rank, module.path = low_rank, path  # type: ignore[assignment]
        module.__class__ = _adapted_class(type(module), tuple(parameters))  # type: ignore[arg-type]


@torch.no_grad()
def merge_all(model: nn.Module) -> None:
    """Add every adapter to its matrix, in fp32 and rounded once, and take it away. All weights can be trained then."""
    for module in list(model.modules()):
        if not isinstance(module, _Adapted):
            continue
        for name in module.adapted:
            base = module._own(name)
            exact = at_least_fp32(base.dtype)
            base.copy_((base.to(exact) + module._low_rank_part(name).to(exact)).to(base.dtype))
            for own in _names(name):
                del module._parameters[own]
        del module.low_rank, module.path
        module.__class__ = module.own_class  # type: ignore[assignment]
    model.requires_grad_(True)
