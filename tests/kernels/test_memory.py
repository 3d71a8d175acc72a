"""The bands around what kernels write to notice what they are there for."""

import pytest
import torch

from tests.kernels.memory import BAND, guarded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize(
    "make", [lambda *a, **k: torch.empty(*a, **k), lambda *a, **k: torch.zeros(1).new_empty(*a, **k)]
)
def test_a_write_beside_it_is_noticed(dtype, make):
    with guarded():
        make((3, 5), dtype=dtype).fill_(7)
        torch.empty_like(torch.ones(4, 3).T).fill_(7)
    for before, after in ((1, 0), (0, 1)):
        with pytest.raises(AssertionError, match="wrote beside"), guarded():
            t = make((3, 5), dtype=dtype)
            t.as_strided((15 + before + after,), (1,), BAND - before).fill_(7)


def test_layouts_are_kept():
    like = torch.ones(4, 3).T
    with guarded():
        assert torch.empty_like(like).stride() == like.stride()
        assert torch.empty(0, 3).shape == (0, 3) and torch.empty((), dtype=torch.bool).shape == ()
