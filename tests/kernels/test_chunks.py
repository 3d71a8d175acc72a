"""The one path of the head losses: what it holds, whatever its row step."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.choose import rows_at_once
from kernels.chunks import Rows, in_chunks


class Held(TorchDispatchMode):
    """Bytes of what was made in the body and is alive: `most` at any time."""

    now = most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage())._cdata not in given:
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, bytes_):
        self.now += bytes_
        self.most = max(self.most, self.now)


@pytest.mark.parametrize(("rows", "width", "columns"), [(65_536, 768, 50_304), (16_384, 768, 50_258)])
def test_a_step_in_place_holds_less_than_a_gigabyte_at_the_size_of_a_model(rows, width, columns):
    """Logits in bf16, gradients and converted head included; without memory or a GPU."""
    meta = torch.device("meta")
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device=meta)
    head = torch.empty(columns, width, device=meta)
    chunk_rows = rows_at_once("linear_cross_entropy", columns, torch.device("cuda"), torch.bfloat16)
    seen = []

    def step(z, part, gradient):
        seen.append(z.shape[0])
        return part.weights, None

    given = Rows((), torch.empty(rows, device=meta))
    with Held() as held:
        found = in_chunks(
            hidden,
            head,
            None,
            given,
            step,
            V=columns,
            chunk_rows=chunk_rows,
            needed=(True, True, False),
            in_place=True,
        )
    assert sum(seen) == rows and max(seen) == chunk_rows
    assert found.weight.dtype == torch.float32 and found.hidden.dtype == torch.bfloat16
    logits = chunk_rows * columns * 2
    assert logits < held.most <= 10**9
