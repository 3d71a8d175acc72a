"""Parameters: roles, names, initialisation, FLOPs, scale with width; generation."""

from statistics import median

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adapters import build_adapter
from adapters.base import GenerateOptions
from tests.contract.tiny import (
    SIZES,
    VOCABULARY,
    Letters,
    adapter_of,
    config,
    context,
    golden,
    is_exact,
    random_batch,
    train_on,
)
from trainer.distributed import World
from trainer.optim.optimizers import build_optimizers, role_table
from trainer.session import open_session


def test_every_parameter_has_exactly_one_role_and_the_counts_add_up(type_):
    adapter = adapter_of(type_)
    cfg, _ = config(type_)
    table = role_table(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    assert sum(row["parameters"] for row in table) == sum(p.numel() for p in adapter.parameters())
    assert {row["role"] for row in table} >= {"matrix", "embedding", "scalar"}


def test_names_and_shapes_are_those_recorded(type_):
    found = {name: list(p.shape) for name, p in adapter_of(type_).model.state_dict().items()}
    assert found == golden(type_)["state"], "checkpoints would no longer load; record anew only on purpose"


def test_initialisation_leaves_nothing_out_and_depends_on_the_seed_alone(type_):
    cfg, model_cfg = config(type_)
    adapter = build_adapter(cfg, model_cfg, Letters())
    twin = build_adapter(cfg, model_cfg, Letters())
    other = build_adapter(cfg.model_copy(update={"seed": 1}), model_cfg, Letters())
    state = adapter.state_dict()
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in state.items())
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    twin.init_weights(torch.Generator().manual_seed(cfg.seed))
    for name, value in state.items():
        assert torch.equal(value, twin.state_dict()[name]), f"{name} is not set by init_weights"


def test_flops_formula_against_the_counter(type_):
    """Short rows, so that the formula's causal discount on attention (absent from the counter) and a context token that
    is computed too stay below 10 %; many, as some objectives draw how many positions reach the head; a vocabulary that
    needs no padding, as padded columns are not multiplied."""
    length = 16
    adapter = adapter_of(type_, f"train_seq_len={length}", vocabulary=128)
    prepared = adapter.prepare(random_batch(rows=64, length=length), context(64))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter(prepared)
    counted = counter.get_total_flops() / (64 * length)
    formula = adapter.flops(length)
    assert formula.training_per_token / 3 == pytest.approx(counted, rel=0.1)
    assert formula.training_per_token <= 3 * formula.forward_per_token


def test_overfits_one_batch(type_):
    """Through the architecture's own optimizer grouping and hooks."""
    cfg, model_cfg = config(type_, "scheduler=constant", "warmup_ratio=0.05")
    exact = is_exact(adapter_of(type_))
    if not exact:  # learning rates meant for a million noisy steps
        cfg = cfg.model_copy(update={"optimizer": "adamw", "learning_rate": 0.003, "lr_scaling": "none"})
    session = open_session(cfg, model_cfg, World(torch.device("cpu")))
    losses = train_on(session, random_batch(), 200)
    if exact:
        assert losses[-1] < 0.1 * losses[0], losses[::20]
    else:  # medians: a weight of 1/t makes single steps scatter
        assert median(losses[-60:]) < 0.85 * median(losses[:20]), losses[::10]


def test_activations_keep_their_scale_over_four_times_the_width(type_):
    """Learning rates follow the width: what a few steps do to the hidden states must not grow with it."""

    def change(width: int, *more: str) -> float:
        size = [f"model_cfg.d_model={width}", "lr_base_width=64", *more]
        cfg, model_cfg = config(type_, *size, "optimizer=adamw", "learning_rate=0.003", "warmup_ratio=0.0")
        adapter = build_adapter(cfg, model_cfg, Letters())
        generator = torch.Generator().manual_seed(0)
        for parameter in adapter.parameters():
            if not bool(parameter.any()):  # gates and outputs that start at zero let nothing through at first
                std = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
                nn.init.normal_(parameter, std=std, generator=generator)
        optimizers = build_optimizers(
            adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width
        )
        prepared = adapter.prepare(random_batch(), context())
        blocks = adapter.blocks()
        seen: list[torch.Tensor] = []
        last = adapter.model.get_submodule(blocks[-1])
        hook = last.register_forward_hook(
            lambda m, i, o: seen.append((o[0] if isinstance(o, tuple) else o).detach())
        )
        for _ in range(5):
            output = adapter(prepared)
            sum(
                t.weight * t.sum / prepared.denominators[t.denominator] for t in output.terms.values()
            ).backward()
            optimizers.step(1.0)
            optimizers.zero_grad()
        hook.remove()
        return float((seen[-1] - seen[0]).pow(2).mean().sqrt())

    assert any(s.startswith("model_cfg.d_model") for s in SIZES)
    narrow, wide, unscaled = change(64), change(256), change(256, "lr_scaling=none")
    assert 1 / 2.5 < wide / narrow < 2.5, (narrow, wide)
    assert unscaled > 1.5 * wide, "without scaling it moves further: the check can see it"


def test_generation_is_repeatable_and_the_cache_changes_nothing(type_):
    adapter = adapter_of(type_, dtype=torch.float64).eval()
    prompts = [[1, 2, 3], []]

    def text(**changes):
        return adapter.generate(
            prompts, GenerateOptions(**{"max_new_tokens": 12, "seed": 5, **changes})
        ).tokens

    first = text(stop_at_document_end=False)
    assert [len(t) for t in first] == [12, 12]
    assert all(0 <= token < VOCABULARY for row in first for token in row)
    assert first == text(stop_at_document_end=False), "the same seed gives the same text"
    assert first != text(stop_at_document_end=False, seed=6)
    assert first == text(stop_at_document_end=False, use_cache=False)
    assert text(temperature=0.0) == text(temperature=0.0, seed=9)
