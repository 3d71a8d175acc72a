"""Operations of models that are made of parts."""

from dataclasses import replace

import pytest

from models.layers.flops import Flops, decoder_flops, matmul_flops


def test_parts_add_up_and_repeat() -> None:
    block, head = decoder_flops(100, [8.5], 4, [16]), matmul_flops(30)
    assert block * 3 + head == decoder_flops(330, [8.5] * 3, 4, [16] * 3)
    assert head == Flops(60, 180, weights=30)


def test_weights_that_stay_cost_four_operations_and_not_six() -> None:
    model = decoder_flops(100, [8.5], 4, [16]) * 3 + matmul_flops(30)
    still = model.without_gradients(330)
    assert still.training_per_token == model.training_per_token - 2 * 330
    assert still.forward_per_token == model.forward_per_token
    assert model.without_gradients(30) == replace(
        model, training_per_token=model.training_per_token - 2 * 30, weights=300
    )
    assert model.frozen.without_gradients(330) == model.frozen, "what has none cannot spare any"


def test_the_plain_path_multiplies_masked_keys_too() -> None:
    block = decoder_flops(100, [8.5], 4, [16])
    assert (block.forward_per_token, block.training_per_token) == (200 + 16 * 8.5, 600 + 48 * 8.5)
    assert block.reference == decoder_flops(100, [16], 4, [16])


def test_a_frozen_part_is_read_forwards_only() -> None:
    base = decoder_flops(100, [8.5], 4, [16]).frozen
    assert base.training_per_token == base.forward_per_token
    assert base.reference.training_per_token == pytest.approx(base.reference.forward_per_token)
