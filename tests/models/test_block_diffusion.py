"""Block diffusion: who sees whom, one pass against a cache, and its two limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import block_diffusion
from kernels.attention.block_diffusion import cached_mask, one_pass_groups, one_pass_mask, one_pass_pairs
from models.bd3lm import BD3LM, BD3LMConfig
from models.mdl import MDL, MDLConfig

L, BLOCK, MASK = 8, 2, 11
SIZES = {
    "vocab_size": 11,
    "n_ctx": L,
    "d_model": 12,
    "n_layers": 2,
    "n_heads": 2,
    "cond_dim": 8,
    "dropout": 0.0,
}


def build(**fields: Any) -> BD3LM:
    model = BD3LM(BD3LMConfig(**{**SIZES, "block_length": BLOCK, **fields})).double()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Clean and noisy tokens (2, L), and one time per block (2, L)."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(0, 11, (2, L), generator=generator)
    noisy = torch.where(torch.rand(2, L, generator=generator) < 0.5, MASK, clean)
    tau = torch.rand(2, L // BLOCK, generator=generator).repeat_interleave(BLOCK, 1)
    return clean, noisy, tau


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_number_of_pairs(block: int) -> None:
    mask = one_pass_mask(torch.arange(L) // block)
    assert mask.sum() == L * L + L * block


def test_mask_pair_by_pair() -> None:
    """Same half and block; noisy to earlier clean; clean to clean not later. Nothing else."""
    blocks = [0, 1, 1, 2, 2, 2]
    mask = one_pass_mask(torch.tensor(blocks))
    for i in range(12):
        for j in range(12):
            noisy_query, noisy_key = i >= 6, j >= 6
            q, k = blocks[i % 6], blocks[j % 6]
            same_half = noisy_query == noisy_key
            allowed = (same_half and q == k) or (not noisy_key and q > k)
            assert mask[i, j] == allowed, (i, j)
    assert torch.equal(
        cached_mask(torch.tensor([0, 0, 1]), 2), torch.tensor([[1, 1, 1, 1, 0]] * 2 + [[1] * 5]) > 0
    )


@pytest.mark.parametrize("noisy_only", [False, True])
@pytest.mark.parametrize(
    ("length", "block", "offset"), [(8, 2, 0), (300, 16, 0), (257, 16, 15), (385, 200, 199), (300, 300, 0)]
)
def test_groups_are_the_mask(length: int, block: int, offset: int, noisy_only: bool) -> None:
    """Outside of its groups a mask allows nothing, and inside it is the same."""
    blocks = (torch.arange(length) + offset) // block
    mask = one_pass_mask(blocks) & torch.rand(2, 1, 2 * length, 2 * length).gt(
        0.2
    )  # as documents restrict it
    groups = one_pass_groups(mask, block, torch.float64, noisy_only)
    found = torch.zeros_like(mask)
    for (start, end), ranges, bias in zip(*groups, strict=True):
        keys = torch.cat([torch.arange(*r) for r in ranges])
        found[:, :, torch.arange(start, end)[:, None], keys] = bias == 0
    wanted = mask.clone()
    if noisy_only:
        wanted[:, :, :length] = False
        rows = one_pass_groups(mask[:, :, length:], block, torch.float64, noisy_only)
        assert all(torch.equal(a, b) for a, b in zip(rows.biases, groups.biases, strict=True))
        assert rows.queries == [(start - length, end - length) for start, end in groups.queries]
    assert torch.equal(found, wanted)
    numbers = [q for start, end in groups.queries for q in range(start, end)]
    assert numbers == list(range(length * noisy_only, 2 * length))


def test_groups_leave_out_half_of_the_pairs() -> None:
    length = 1024
    mask = one_pass_mask(torch.arange(length) // 16)[None, None]
    looked_at = sum(bias.numel() for bias in one_pass_groups(mask, 16, torch.float32).biases)
    assert looked_at < 0.36 * (2 * length) ** 2


@pytest.mark.parametrize("time", [False, True])
def test_several_groups_give_the_states_of_one(time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(time_conditioning=time)
    clean, noisy, tau = inputs()
    blocks, doc_ids = (
        torch.tensor([0, 1, 1, 2, 2, 3, 3, 4]),
        torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [1] * 2]),
    )
    wanted = model(noisy, tau, clean=clean, blocks=blocks, doc_ids=doc_ids)
    monkeypatch.setattr(block_diffusion, "QUERY_GROUP", 3)
    found = model(noisy, tau, clean=clean, blocks=blocks, doc_ids=doc_ids)
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("time", [False, True])
def test_dependence(time: bool) -> None:
    """Clean tokens of block b move noisy blocks after b only; noisy tokens of block b move block b only."""
    model = build(time_conditioning=time)
    clean, noisy, tau = inputs()
    before = model(noisy, tau, clean=clean)
    for position in range(L):
        b = position // BLOCK
        changed = clean.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        moved = (model(noisy, tau, clean=changed) - before).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [p // BLOCK > b for p in range(L)]
        changed = noisy.clone()
        changed[:, position] = (changed[:, position] + 1) % 12
        moved = (model(changed, tau, clean=clean) - before).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [p // BLOCK == b for p in range(L)]


@pytest.mark.parametrize("time", [False, True])
def test_clean_text_read_once_equals_one_pass(time: bool) -> None:
    """In two passes, with documents and a partition of its own, for several noisy versions."""
    model = build(time_conditioning=time)
    clean, noisy, tau = inputs()
    blocks, doc_ids = (
        torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]),
        torch.tensor([[0] * 3 + [1] * 5, [0] * 6 + [1] * 2]),
    )
    for more in ({}, {"blocks": blocks, "doc_ids": doc_ids}):
        read = model.read(clean, **more)
        for version in (noisy, torch.full_like(noisy, MASK), clean):
            wanted = model(version, tau, clean=clean, **more)
            assert (model(version, tau, clean=read, **more) - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("time", [False, True])
def test_cache_equals_one_pass(time: bool) -> None:
    """A block at a time over the cache of the clean blocks before it, as sampling does."""
    model = build(time_conditioning=time)
    clean, noisy, tau = inputs()
    wanted = model(noisy, tau, clean=clean)
    cache = model.init_cache(2)
    for start in range(0, L, BLOCK):
        block = slice(start, start + BLOCK)
        for _ in range(2):  # trying a block leaves nothing behind
            found = model(noisy[:, block], tau[:, block], cache=cache)
            assert (found - wanted[:, block]).abs().max() < 1e-10
        model(clean[:, block], torch.zeros(2), cache=cache, store=True)
        assert cache.length == start + BLOCK


def test_prompt_of_several_blocks_fills_the_cache() -> None:
    model = build()
    clean, noisy, tau = inputs()
    wanted = model(noisy, tau, clean=clean)[:, 6:]
    cache = model.init_cache(2)
    model(clean[:, :6], torch.zeros(2), cache=cache, store=True)
    assert (model(noisy[:, 6:], tau[:, 6:], cache=cache) - wanted).abs().max() < 1e-10


def test_one_block_is_masked_diffusion() -> None:
    model = build(block_length=L)
    clean, noisy, _ = inputs()
    whole = MDL(MDLConfig(**SIZES)).double().eval()
    whole.load_state_dict(model.state_dict())
    tau = torch.zeros(2)
    assert (model(noisy, tau, clean=clean) - whole(noisy, tau)).abs().max() < 1e-10


def test_blocks_of_one_are_autoregressive() -> None:
    """All positions masked: the state at i equals that of a mask token put behind the clean prefix, under a
    causal mask in a network without clean half."""
    model = build(block_length=1)
    clean, _, _ = inputs()
    tau = torch.zeros(2)
    found = model(torch.full_like(clean, MASK), tau, clean=clean)
    plain = MDL(MDLConfig(**SIZES)).double().eval()
    plain.load_state_dict(model.state_dict())
    for i in range(L):
        prefix = torch.cat((clean[:, :i], torch.full((2, 1), MASK)), dim=1)
        causal = torch.ones(i + 1, i + 1, dtype=torch.bool).tril()
        assert (plain(prefix, tau, attention=causal)[:, -1] - found[:, i]).abs().max() < 1e-10


def test_own_partition_into_blocks() -> None:
    """A context token as a block of its own shifts all other blocks by one position."""
    model = build()
    clean, noisy, tau = inputs()
    blocks = torch.tensor([0, 1, 1, 2, 2, 3, 3, 4])
    before = model(noisy, tau, clean=clean, blocks=blocks)
    changed = noisy.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 12
    moved = (model(changed, tau, clean=clean, blocks=blocks) - before).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [p in (3, 4) for p in range(L)]


def test_documents() -> None:
    model = build()
    clean, noisy, tau = inputs()
    doc_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]] * 2)
    found = model(noisy, tau, doc_ids=doc_ids, clean=clean)
    alone = model(noisy[:, 4:], tau[:, 4:], clean=clean[:, 4:])
    assert (found[:, 4:] - alone).abs().max() < 1e-10


def test_clean_half_has_time_zero() -> None:
    """The time of a block acts on its own noisy tokens and on nothing else."""
    model = build(time_conditioning=True)
    clean, noisy, tau = inputs()
    later = tau.clone()
    later[:, 2:4] += 0.3
    moved = (model(noisy, later, clean=clean) - model(noisy, tau, clean=clean)).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [p in (2, 3) for p in range(L)]
    row = model(noisy, tau[:, 0], clean=clean)
    assert (row - model(noisy, tau[:, :1].expand(2, L), clean=clean)).abs().max() < 1e-12


@pytest.mark.parametrize("time", [False, True])
def test_flops_equal_the_counter_up_to_masked_pairs(time: bool) -> None:
    """The counter sees all pairs of a group: noisy queries with 2L keys, clean ones with L, in the last layer only the
    former. Allowed are L^2 + L L' and, in the last layer, half of these. Without time conditioning, it is computed once
    and counts as nothing."""
    model = build(time_conditioning=time).float()
    clean, noisy, tau = (t[:1] for t in inputs())
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.logits(model(noisy, tau, clean=clean))
    flops = model.flops(L)
    assert (flops.reference_keys, flops.keys) == (5 * L, 1.5 * (L + BLOCK))
    once = 0 if time else model._conditioning()
    assert counter.get_total_flops() - once == L * flops.reference.forward_per_token


@pytest.mark.parametrize("length", [8, 300, 1000])
def test_counted_pairs_are_those_of_the_groups(length: int) -> None:
    mask = torch.ones(1, 1, 2 * length, 2 * length, dtype=torch.bool)
    for noisy_only in (False, True):
        groups = one_pass_groups(mask, 5, torch.float32, noisy_only)
        pairs = sum(bias.shape[2] * bias.shape[3] for bias in groups.biases)
        assert one_pass_pairs(length, 5, noisy_only) == pairs


def test_misuse() -> None:
    model = build()
    clean, noisy, tau = inputs()
    with pytest.raises(ValueError, match="either the clean tokens"):
        model(noisy, tau)
    with pytest.raises(ValueError, match="either the clean tokens"):
        model(noisy, tau, clean=clean, cache=model.init_cache(2))
    with pytest.raises(ValueError, match="doc_ids cannot"):
        model(noisy, tau, doc_ids=noisy, cache=model.init_cache(2))
