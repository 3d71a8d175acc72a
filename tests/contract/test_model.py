"""Parameters: roles, names, initialisation, FLOPs, scale with width; generation."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adapters import build_adapter
from adapters.base import GenerateOptions, weighted_loss
from adapters.default import DefaultModelAdapter
from models.layers.decoder import Hidden
from tests.contract.record import golden_groups
from tests.contract.tiny import (
    adapter_of,
    batch_for,
    config,
    context,
    device,
    is_exact,
    move_away_from_uniform,
    session_of,
    tokenizer_for,
    train_on,
)
from trainer.optim.optimizers import build_optimizers, role_table

SHORT, LONG = 16, 64  # rows that operations are counted on
TEXT = 24  # tokens that go through a cache


def test_every_parameter_has_exactly_one_role_and_the_counts_add_up(architecture):
    adapter = adapter_of(architecture)
    cfg, _ = config(architecture)
    table = role_table(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    assert sum(row["parameters"] for row in table) == sum(p.numel() for p in adapter.parameters())
    frozen = sum(row["parameters"] for row in table if row["optimizer"] == "frozen")
    assert frozen == sum(
        p.numel() for name, p in adapter.named_model_parameters() if adapter.is_external(name)
    )
    assert len({row["role"] for row in table}) > 1


def test_names_and_shapes_are_those_recorded(architecture, recorded):
    found = {name: list(p.shape) for name, p in adapter_of(architecture).model.state_dict().items()}
    assert found == recorded["state"], "checkpoints would no longer load; record anew only on purpose"


def test_every_parameter_is_stepped_as_recorded(architecture, recorded):
    """By the right optimizer, at the right rate, one matrix at a time: no table of positions under Muon, no fused qkv
    as one matrix."""
    assert golden_groups(architecture) == recorded.get("groups"), "record anew only on purpose"


def test_initialisation_leaves_nothing_out_and_depends_on_the_seed_alone(architecture):
    cfg, model_cfg = config(architecture)
    tokenizer = tokenizer_for(cfg, model_cfg)
    adapter = build_adapter(cfg, model_cfg, tokenizer)
    twin = build_adapter(cfg, model_cfg, tokenizer)
    other = build_adapter(cfg.model_copy(update={"seed": 1}), model_cfg, tokenizer)
    state = adapter.state_dict()
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in state.items())
    drawn = any(not torch.equal(value, other.state_dict()[name]) for name, value in state.items())
    assert drawn or adapter.model_cfg.elsewhere
    for tensor in [*twin.parameters(), *twin.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    twin.init_weights(torch.Generator().manual_seed(cfg.seed))
    for name, value in state.items():
        assert torch.equal(value, twin.state_dict()[name]), f"{name} is not set by init_weights"


def counted_flops(architecture, rows, length):
    """(counted, by the formula) operations per token, forward and backward, and what a key more costs of that."""
    # Another implementation passes over the blocks that a query did not select, and multiplies fewer.
    words = [f"train_seq_len={length}", "kernels.selected_attention=reference", *longest_row(architecture)]
    adapter = adapter_of(architecture, *words, vocabulary=128)
    ctx = context(rows)
    adapter.on_step_start(ctx, 1)
    prepared = adapter.prepare(batch_for(adapter, rows, length), ctx).to(device())
    adapter(prepared)  # loads its kernels: the counter knows the operations that there are when it is made
    # Only plain products are counted: the counter does not know the fused attention of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = adapter(prepared)
        weighted_loss(output.terms, prepared.denominators).backward()
    plan = adapter.flops(length)
    expected = plan.reference.training_per_token
    if (
        output.flops is not None
    ):  # decided by the data or by a draw: masked keys grow with what was really done
        expected *= float(output.flops) / (rows * length) / plan.training_per_token
    return counter.get_total_flops() / (rows * length), expected


def longest_row(architecture):
    """A context for the longer of the two rows that are counted, where the architecture has such a size."""
    _, model_cfg = config(architecture)
    return [f"model_cfg.n_ctx={LONG}"] if "n_ctx" in type(model_cfg).model_fields else []


def test_flops_formula_against_the_counter(architecture):
    """What the formula says of the plain path, masked keys included, is what is multiplied, and so is what it says of
    longer rows. Equally many positions at both lengths, and many, as some objectives draw how many reach the head; a
    vocabulary that needs no padding, as padded columns are not multiplied."""
    short, short_formula = counted_flops(architecture, 4 * LONG // SHORT * 4, SHORT)
    long, long_formula = counted_flops(architecture, 16, LONG)
    assert short_formula == pytest.approx(short, rel=0.05)
    assert long_formula == pytest.approx(long, rel=0.05)
    assert long_formula - short_formula == pytest.approx(long - short, rel=0.1, abs=0.01 * short)
    plan = adapter_of(architecture).flops(SHORT)
    assert 0 <= plan.keys <= plan.reference_keys and plan.training_per_token >= plan.forward_per_token


def test_overfits_one_batch(architecture):
    """Through the architecture's own optimizer grouping and hooks; rates meant for a million noisy steps replaced."""
    # Unit vectors have entries of 0.1 at this width, other weights of 0.02: the same rate turns them less.
    rate = 0.02 if adapter_of(architecture).fixed_norm else 0.003
    words = ["scheduler=constant", "warmup_ratio=0.05", "optimizer=adamw", f"learning_rate={rate}"]
    session = session_of(architecture, *words, "lr_scaling=none")
    adapter = session.adapter
    batch, exact = batch_for(adapter), is_exact(adapter)

    def score() -> float:
        """Always from the same noise: a weight of 1/t makes the losses of steps scatter."""
        adapter.eval()
        return float(adapter.likelihood(batch, context(phase="eval")).nats.sum())

    enough, before, now = (0.1 if exact else 0.75), score(), 1.0
    for first in range(0, 200, 20):
        train_on(session, batch, range(first, first + 20), total=200)
        now = score() / before
        if now < enough:
            return
    raise AssertionError(f"after 200 steps it still scores {now:.2f} of what it did untrained")


def change_in_a_few_steps(architecture, width, *more):
    """How far a few steps move what the last block returns, in units of its size at first (root mean squares): blocks
    that start with weights of one size, whatever the width, return more where they are wider. Of states of fixed norm
    what is read of them, the logits, in their own unit: that of a state says nothing there."""
    size = [f"model_cfg.d_model={width}", "lr_base_width=64", *more]
    cfg, model_cfg = config(architecture, *size, "optimizer=adamw", "learning_rate=0.003", "warmup_ratio=0.0")
    adapter = build_adapter(cfg, model_cfg, tokenizer_for(cfg, model_cfg))
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        if not bool(parameter.any()):  # gates and outputs that start at zero let nothing through at first
            std = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.1
            nn.init.normal_(parameter, std=std, generator=generator)
    adapter.to(device())
    optimizers = build_optimizers(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    adapter.on_step_start(context(), 1)
    prepared = adapter.prepare(batch_for(adapter, rows=2), context(2)).to(device())
    latest: list[torch.Tensor] = []
    last = adapter.model.get_submodule(adapter.blocks()[-1])
    last.register_forward_hook(lambda m, i, o: latest.append((o[0] if isinstance(o, tuple) else o).detach()))
    seen = []
    for step in range(5):
        latest.clear()
        output = adapter(prepared)
        seen.append(adapter.logits(latest[-1]).detach() if adapter.fixed_norm else latest[-1])
        weighted_loss(output.terms, prepared.denominators).backward()
        optimizers.step(1.0)
        adapter.end_step(step, torch.zeros((), device=device()))
        optimizers.zero_grad()
    unit = seen[0].numel() ** 0.5 if adapter.fixed_norm else seen[0].norm()
    return float((seen[-1] - seen[0]).norm() / unit)


def test_activations_keep_their_scale_over_four_times_the_width(architecture):
    """Learning rates follow the width: what a few steps do to hidden states, or to logits, must not grow with it."""
    model_cfg = config(architecture)[1]
    if "d_model" not in type(model_cfg).model_fields or model_cfg.elsewhere:
        pytest.skip("its Config has no d_model to vary")
    narrow, wide, unscaled = (
        change_in_a_few_steps(architecture, *given) for given in ((64,), (256,), (256, "lr_scaling=none"))
    )
    assert 1 / 2.5 < wide / narrow < 2.5, (narrow, wide)
    assert unscaled > 1.5 * wide, "without scaling it moves further: the check can see it"


def test_generation_is_repeatable_and_the_cache_changes_nothing(architecture):
    adapter = adapter_of(architecture, dtype=torch.float64).eval()
    prompts = [[1, 2, 3], []]

    def text(**changes):
        return adapter.generate(
            prompts, GenerateOptions(**{"max_new_tokens": 12, "seed": 5, **changes})
        ).tokens

    first = text(stop_at_document_end=False)
    assert [len(t) for t in first] == [12, 12]
    assert all(0 <= token < adapter.tokenizer.vocab_size for row in first for token in row)
    assert first == text(stop_at_document_end=False), "the same seed gives the same text"
    assert first != text(stop_at_document_end=False, seed=6)
    assert first == text(stop_at_document_end=False, use_cache=False)
    assert text(temperature=0.0) == text(temperature=0.0, seed=9)


def test_drafts_leave_text_as_it_is_or_are_refused(architecture):
    adapter = adapter_of(architecture, dtype=torch.float64).eval()
    # Past the end of the context, of prompts that accept and end at unequal places.
    plain = GenerateOptions(max_new_tokens=40, temperature=0.0, stop_at_document_end=False)
    drafting, prompts = replace(plain, speculative=True), [[1, 2, 3], [], [5]]
    if not getattr(adapter.model, "max_drafts", 0):
        with pytest.raises(ValueError, match="speculative: .* nothing to draft tokens with"):
            adapter.generate(prompts, drafting)
        return
    move_away_from_uniform(adapter)
    found = adapter.generate(prompts, drafting)
    assert found.tokens == adapter.generate(prompts, plain).tokens
    assert len(found.speculation.drafted) == adapter.model.max_drafts and found.speculation.drafted[0] > 0
    sampled = replace(drafting, temperature=1.0)
    assert adapter.generate(prompts, sampled).tokens == adapter.generate(prompts, sampled).tokens


@pytest.mark.parametrize(
    "sizes", [[1] * TEXT, [7] + [1] * (TEXT - 7), [TEXT - 1, 1], [5, 2, 1, 2, 5, 1, 1, 7]], ids=str
)
def test_pieces_through_the_cache_equal_the_whole(architecture, sizes):
    """Also where drafts were tried and taken back in between."""
    adapter = adapter_of(architecture, dtype=torch.float64).eval()
    if not isinstance(adapter, DefaultModelAdapter) or getattr(adapter.model, "init_cache", None) is None:
        pytest.skip("its text is not written through a cache of tokens")
    move_away_from_uniform(adapter)
    tokens = torch.from_numpy(batch_for(adapter, rows=2, length=TEXT).tokens[:, :TEXT]).to(device())
    drafts = (tokens + 1) % adapter.tokenizer.vocab_size

    def logits(piece, cache=None):
        out = adapter.model(piece, cache=cache)
        return adapter.model.logits(out.states if isinstance(out, Hidden) else out)

    with torch.no_grad():
        cache, found = adapter.model.init_cache(2), []
        for piece, draft in zip(tokens.split(sizes, 1), drafts.split(sizes, 1), strict=True):
            here = cache.snapshot()
            logits(draft, cache)
            cache.restore(here)
            found.append(logits(piece, cache))
        torch.testing.assert_close(torch.cat(found, 1), logits(tokens), rtol=0, atol=1e-9)
    assert cache.length == TEXT


def test_text_is_made_of_the_tokenizers_ids_where_the_vocabulary_is_larger(architecture, monkeypatch):
    """As where a preset says 50304. Not even a model that is sure of an id which is no token, or of a mask, writes
    one; scores go on counting what it gives to them."""
    adapter, more = adapter_of(architecture), 20
    known = adapter.tokenizer.vocab_size
    model_cfg = adapter.model_cfg
    if "vocab_size" not in type(model_cfg).model_fields or adapter.external() or model_cfg.elsewhere:
        pytest.skip("its vocabulary is not the run's to choose")
    adapter = adapter_of(architecture, f"model_cfg.vocab_size={known + more}", dtype=torch.float64).eval()
    move_away_from_uniform(adapter, std=0.1)
    logits = adapter.model.logits

    def sure_of_no_token(hidden):
        out = logits(hidden)
        out[..., known:] += 50.0
        return out

    adapter.model.logits = sure_of_no_token
    for given in ({}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.9}, {"min_p": 0.1}):
        options = GenerateOptions(max_new_tokens=6, stop_at_document_end=False, **given)
        (text,) = adapter.generate([[1, 2, 3]], options).tokens
        assert len(text) == 6 and max(text) < known, given
    batch = batch_for(adapter)
    before = adapter.likelihood(batch, context(phase="eval")).nats
    head = adapter.model.head_weight.detach().clone()
    head[known : known + more] += 1.0
    monkeypatch.setattr(type(adapter.model), "head_weight", head)  # a parameter, or made of several
    assert not torch.allclose(before, adapter.likelihood(batch, context(phase="eval")).nats)
