"""What each option makes of a predicted distribution, exactly."""

import numpy as np
import pytest
import torch

from adapters.shaping import Shaping

LAW = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.13])
TEMPERED = LAW**0.5 / (LAW**0.5).sum()


def kept(mask, law=LAW):
    return np.where(mask, law, 0) / law[mask].sum()


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({}, LAW),
        ({"temperature": 2.0}, TEMPERED),
        ({"temperature": 0.0}, kept(LAW == 0.4)),
        ({"temperature": 0.5}, LAW**2 / (LAW**2).sum()),
        ({"top_k": 1}, kept(LAW == 0.4)),
        ({"top_k": 3}, kept(LAW >= 0.15)),
        ({"top_k": 6}, LAW),
        ({"top_k": 99}, LAW),
        ({"top_p": 0.39}, kept(LAW >= 0.4)),
        ({"top_p": 0.41}, kept(LAW >= 0.25)),  # the symbol that crosses the mass belongs to the set
        ({"top_p": 0.79}, kept(LAW >= 0.15)),
        ({"top_p": 0.94}, kept(LAW >= 0.05)),
        ({"min_p": 0.6}, kept(LAW >= 0.25)),  # of 0.4
        ({"min_p": 0.65}, kept(LAW >= 0.4)),
        ({"min_p": 0.1}, kept(LAW >= 0.05)),
        # top_p applies to what top_k has left: of 0.4, 0.25 and 0.15, which renormalise to 0.5, 0.3125, 0.1875.
        ({"top_k": 3, "top_p": 0.6}, kept(LAW >= 0.25)),
        # and to the tempered law.
        ({"temperature": 2.0, "top_p": 0.6}, kept(TEMPERED[4] <= TEMPERED, TEMPERED)),
    ],
)
def test_the_law_of_a_choice(options, law):
    """Of two rows at once, whatever constant their logits carry; symbols that are left out have no probability."""
    logits = torch.from_numpy(np.log(LAW))
    found = Shaping(**options)(torch.stack([logits + 3.0, logits.flip(0)])).exp()
    for row, expected in zip(found, (law, law[::-1].copy()), strict=True):
        assert torch.allclose(row, torch.from_numpy(expected), rtol=1e-12, atol=0)


def test_no_choice_changes_no_digit():
    logits = torch.from_numpy(np.log(LAW))[None]
    assert torch.equal(Shaping()(logits), logits.log_softmax(1))


def test_equal_logits_do_not_widen_top_k():
    assert int((Shaping(top_k=3)(torch.zeros(1, 8)).exp() > 0).sum()) == 3
