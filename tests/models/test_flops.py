"""Operations of models that are made of parts."""

import pytest

from models.layers.flops import Flops, decoder_flops, matmul_flops


def test_parts_add_up_and_repeat() -> None:
    block, head = decoder_flops(100, [8.5], 4, [16]), matmul_flops(30)
    assert block * 3 + head == decoder_flops(330, [8.5] * 3, 4, [16] * 3)
    assert head == Flops(60, 180)


def test_the_plain_path_multiplies_masked_keys_too() -> None:
    block = decoder_flops(100, [8.5], 4, [16])
    assert (block.forward_per_token, block.training_per_token) == (200 + 16 * 8.5, 600 + 48 * 8.5)
    assert block.reference == decoder_flops(100, [16], 4, [16])


def test_a_frozen_part_is_read_forwards_only() -> None:
    base = decoder_flops(100, [8.5], 4, [16]).frozen
    assert base.training_per_token == base.forward_per_token
    assert base.reference.training_per_token == pytest.approx(base.reference.forward_per_token)
