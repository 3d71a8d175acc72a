"""What an architecture is seen to do, and the values its fields can be given instead of their own."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from adapters import build_adapter, complete_model_config
from adapters.base import GenerateOptions, ModelAdapter, StepOutput, weighted_loss
from configs.schema import ModelConfig, RunConfig
from tests.contract.tiny import (
    SEQ_LEN,
    batch_for,
    context,
    device,
    move_away_from_uniform,
    needs_base,
    of_tests,
    tokenizer_for,
)
from tests.pretrained import base_of
from trainer.optim.optimizers import build_optimizers

# In the order in which they are looked at: the cheapest first.
SIGHTS = ("shapes", "flops", "loss", "score", "text", "next_loss")


@dataclass
class Sighting:
    """One configuration; each thing to be seen of it is looked at once, and only when it is asked for."""

    cfg: RunConfig
    model_cfg: ModelConfig

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_for(self.cfg, self.model_cfg)

    def _build(self, where: str | torch.device) -> ModelAdapter:
        return build_adapter(self.cfg, self.model_cfg, self.tokenizer, where)

    @cached_property
    def on_meta(self) -> ModelAdapter:
        return self._build("meta")

    @cached_property
    def adapter(self) -> ModelAdapter:
        """In fp64, so that rounding is told from a difference, and away from the uniform predictions of its start, but
        not so far that one token is certain: samplers must show."""
        adapter = self._build(device()).to(torch.float64)
        move_away_from_uniform(adapter, std=0.1)
        return adapter

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.on_meta.model.state_dict().items()}

    @cached_property
    def flops(self) -> tuple[Any, ...]:
        return self.on_meta.flops(SEQ_LEN), self.on_meta.active_parameters()

    @cached_property
    def loss(self) -> dict[str, Any]:
        """Of a training step: each term, the sum that is minimised, and what is reported."""
        with torch.no_grad():
            total, output = self._step(0)
        named = {name: term.sum for name, term in output.terms.items()}
        named |= {f"metric {name}": metric.sum for name, metric in output.metrics.items()}
        return {"": float(total), **{name: torch.as_tensor(value).tolist() for name, value in named.items()}}

    @cached_property
    def next_loss(self) -> float:
        """After a step and its hooks, which may have moved a buffer."""
        adapter, nothing_skipped = self.adapter, torch.zeros((), device=device())
        optimizers = build_optimizers(
            adapter.named_model_parameters(), adapter.param_roles(), self.cfg, adapter.width
        )
        self._step(0)[0].backward()
        optimizers.step(1.0)
        adapter.end_step(0, nothing_skipped)
        with torch.no_grad():
            return float(self._step(1)[0])

    def _step(self, step: int) -> tuple[Tensor, StepOutput]:
        adapter, ctx = self.adapter.train(), context(step=step)
        adapter.on_step_start(ctx, 2)
        prepared = adapter.prepare(batch_for(adapter), ctx)
        torch.manual_seed(step)  # dropout
        output = adapter(prepared.to(adapter.device))
        return weighted_loss(output.terms, prepared.denominators), output

    @cached_property
    def score(self) -> list[float]:
        with torch.no_grad():
            return (
                self.adapter.eval().likelihood(batch_for(self.adapter), context(phase="eval")).nats.tolist()
            )

    @cached_property
    def text(self) -> list[list[int]]:
        """Past the end of the context, so that its length shows."""
        prompts = [batch_for(self.adapter, rows=1, length=SEQ_LEN - 8).tokens[0, 1:].tolist()]
        options = GenerateOptions(max_new_tokens=16, stop_at_document_end=False, temperature=1.0)
        return self.adapter.eval().generate(prompts, options).tokens


def first_difference(one: Sighting, other: Sighting) -> str | None:
    """Where the two are seen to differ by more than rounding, or None."""
    for sight in SIGHTS:
        if not _same(getattr(one, sight), getattr(other, sight)):
            return sight
    return None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-9 * max(abs(one), abs(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def complaints(cfg: RunConfig, model_cfg: ModelConfig, folder: Path) -> list[str]:
    """Fields that change nothing, choices of execution that change something, and fields of which no other value is
    known, each in a sentence."""
    variations, found = Variations(cfg, model_cfg, folder), []
    for name in type(model_cfg).model_fields:
        if name in variations.rare:
            continue
        execution = name in type(model_cfg).execution()
        tried, difference = 0, None
        for pair in variations.of(name):
            tried, difference = tried + 1, first_difference(*pair)
            if difference or execution:  # one other value tells
                break
        if not tried:
            found.append(f"{name} has no other legal value that could be guessed: give it an example")
        elif execution and difference:
            found.append(f"{name} is a choice of execution, and changes the {difference}")
        elif not execution and not difference:
            because = variations.base.unread().get(name)
            why = f" (with {because} it means nothing: give it an example)" if because else ""
            found.append(f"{name} changes nothing that can be seen{why}")
    return found


# -- other values ------------------------------------------------------------------------------------------------


class Variations:
    """The tiny configuration of an architecture, and others that differ from it in one field."""

    def __init__(self, cfg: RunConfig, model_cfg: ModelConfig, folder: Path) -> None:
        self.cfg, self.folder, self.config_class = cfg, folder, type(model_cfg)
        self.base = complete_model_config(model_cfg, tokenizer_for(cfg, model_cfg))
        self.examples = of_tests(self.config_class, "examples")
        if needs_base(self.config_class):
            self.examples["base_model_name"] = str(base_of(seed=1))
        self.rare = of_tests(self.config_class, "rare")
        self._sightings: dict[str, Sighting] = {}

    def of(self, name: str) -> Iterator[tuple[Sighting, Sighting]]:
        """Pairs of legal configurations that differ in field `name` alone: its example, or other values of its
        type."""
        if name in self.examples:
            example = self.examples[name]
            value, others = example if isinstance(example, tuple) else (example, {})
            values, base = [self._made(value)], {k: self._made(v) for k, v in others.items()}
        else:
            own, base = getattr(self.base, name), {}
            values = [
                v for v in other_values(self.config_class.model_fields[name].annotation, own) if v != own
            ]
        if (before := self._legal(base)) is None:
            raise ValueError(f"the example of {name} needs {base}, which is not legal")
        for value in values:
            if (after := self._legal({**base, name: value})) is not None:
                yield self._sighting(before), self._sighting(after)

    def _made(self, value: Any) -> Any:
        """A value that is a file is given as a function that makes it."""
        return value(self.folder, self.base.vocab_size) if callable(value) else value

    def _legal(self, changes: dict[str, Any]) -> ModelConfig | None:
        values = {name: getattr(self.base, name) for name in self.config_class.model_fields}
        try:
            changed = self.config_class.model_validate({**values, **changes})
            complete_model_config(changed, tokenizer_for(self.cfg, changed))
        except (ValidationError, ValueError):
            return None
        return None if changed.problems(self.cfg) else changed

    def _sighting(self, model_cfg: ModelConfig) -> Sighting:
        values = model_cfg.model_dump_json()  # a field may be a list
        if values not in self._sightings:
            self._sightings[values] = Sighting(self.cfg, model_cfg)
        return self._sightings[values]


def other_values(annotation: Any, own: Any) -> list[Any]:
    """Values to try, the likeliest to show first; some may be illegal."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return other_values(arguments[0], own)
    if origin in (typing.Union, types.UnionType):
        return [value for part in arguments for value in other_values(part, own)]
    if origin is typing.Literal:
        return list(arguments)
    if annotation is bool:
        return [True, False]
    number = own if isinstance(own, int | float) and not isinstance(own, bool) else 1
    if annotation is int:
        return [2 * number, number + 1, number // 2, number - 1, 4, 8]
    if annotation is float:
        return [2.0 * number, 0.5 * number, 0.5, 0.1]
    return [None] if annotation is type(None) else []
