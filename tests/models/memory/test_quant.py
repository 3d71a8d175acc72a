"""Banks in few bits as they are stored."""

from __future__ import annotations

import pytest
import torch

from models.memory.bank import bits_of
from models.memory.quant import packed, packed_state, quantized, rounded, unpacked, unpacked_state
from tests.models.memory.test_memory import FACTORIZED, model_of


def rows(n, m, seed=0):
    return torch.randn(n, m, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_stored_is_what_was_computed_with(bits):
    """To the bit, and rounding it again changes nothing."""
    weight = rows(40, 6)
    weight[3] = 0.0
    weight[4] *= 1e-20
    integers, scale = packed(weight, bits)
    assert integers.nbytes + scale.nbytes == 40 * 6 * bits // 8 + 4 * 40
    stored = unpacked(integers, scale)
    assert torch.equal(stored, rounded(weight, bits)) and torch.equal(rounded(stored, bits), stored)


def test_every_pair_of_four_bits():
    pairs = torch.cartesian_prod(torch.arange(-7, 8), torch.arange(-7, 8))  # (225, 2)
    weight = torch.cat((pairs, torch.full((225, 2), 7)), 1).float()  # scales of 1
    integers, scale = packed(weight, 4)
    assert torch.equal(quantized(weight, 4)[0], weight.to(torch.int8)) and (scale == 1).all()
    assert torch.equal(unpacked(integers, scale), weight)
    low, high = integers[:, 0] & 0xF, integers[:, 0] >> 4
    assert torch.equal(low, (pairs[:, 0] % 16).to(torch.uint8)), "the first lies low"
    assert torch.equal(high, (pairs[:, 1] % 16).to(torch.uint8))
    assert len(set(integers[:, 0].tolist())) == 225


@pytest.mark.parametrize("fields", [{}, FACTORIZED, {"memory_sharing": "per_layer"}], ids=str)
def test_state_there_and_back(fields):
    """The sides of a product, not it; nothing but banks, and nothing of those that are not rounded."""
    model = model_of(quantize_memory=True, memory_quant_bits=4, **fields).float()
    state, bits = model.state_dict(), bits_of(model)
    assert bits == {name: 4 for name in state if name.startswith("banks.")}
    there = packed_state(state, bits)
    assert sum(t.nbytes for n, t in there.items() if n.startswith("banks.")) == sum(
        state[name].numel() // 2 + 4 * len(state[name]) for name in bits
    )
    back = unpacked_state(there)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], rounded(tensor, 4) if name in bits else tensor)
    assert not bits_of(model_of(**fields))
