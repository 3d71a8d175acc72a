"""Noise is a function of (phase, seed, step, stream, row, place) and of nothing else."""

import numpy as np
import pytest
import torch

from adapters.randomness import Noise, philox, stratum


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        (0, 0, ("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (0xFFFFFFFF, 0xFFFFFFFF, ("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd")),
    ],
)
def test_philox_gives_the_published_test_vectors(counter, key, expected):
    """Random123's known answers for philox4x32-10."""
    word = np.full(1, counter, dtype=np.uint64)
    got = philox((word, word, word, word), (key, key))
    assert tuple(f"{int(w[0]):08x}" for w in got) == expected


def noise(rows, **changes):
    return Noise(**{"seed": 1, "step": 2, "phase": "train", **changes}, rows=np.asarray(rows))


def test_a_row_has_its_numbers_whoever_is_beside_it():
    together = noise(range(8)).uniform("mask", 33)
    alone = torch.cat([noise([row]).uniform("mask", 33) for row in range(8)])
    assert torch.equal(together, alone)
    assert torch.equal(together[:, :7], noise(range(8)).uniform("mask", 7))


@pytest.mark.parametrize("change", [{"seed": 9}, {"step": 9}, {"phase": "eval"}])
def test_every_part_of_the_key_matters(change):
    assert not torch.equal(noise([0]).uniform("mask", 4), noise([0], **change).uniform("mask", 4))
    assert not torch.equal(noise([0]).uniform("mask", 4), noise([0]).uniform("time", 4))
    assert not torch.equal(noise([0]).uniform("mask", 4), noise([2**32]).uniform("mask", 4))


def test_numbers_are_uniform_and_inside_the_open_interval():
    u = noise(range(100)).uniform("x", 1000)
    assert u.min() > 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # 49 degrees of freedom
    assert abs(torch.corrcoef(torch.stack([u[:, :-1].flatten(), u[:, 1:].flatten()]))[0, 1]) < 0.02


def test_strata_cover_the_step_once_however_it_is_split():
    whole = noise(range(32, 64)).stratified("time", 32)
    split = torch.cat(
        [noise(range(32 + 8 * part, 40 + 8 * part)).stratified("time", 32) for part in range(4)]
    )
    assert torch.equal(whole, split)
    assert sorted((whole.flatten() * 32).long().tolist()) == list(range(32))
    assert (whole.flatten() * 32).long().tolist() != list(range(32))  # dealt out by a permutation
    per_block = noise(range(4)).stratified("time", 4, per_row=5)
    assert sorted((per_block.flatten() * 20).long().tolist()) == list(range(20))


def test_a_stratum_is_its_part_of_the_interval():
    assert torch.allclose(stratum(torch.tensor([0.0, 0.5]), 2, 4), torch.tensor([0.5, 0.625]))
