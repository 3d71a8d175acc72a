"""Parts of native sparse attention against the equations."""

import numpy as np
import pytest
import torch

from kernels.choose import Kernels
from kernels.selected_attention import selected_attention
from models.sparse.blocks import block_starts, overlap
from models.sparse.compression import probabilities, visible
from models.sparse.gates import Gates
from models.sparse.selection import importance, select
from models.sparse.summaries import Summary
from tests.models import reference_nsa

FORCED = {"first": 1, "local": 2}


def begins(lengths):
    ends = np.cumsum([0, *lengths])
    return torch.tensor(np.repeat(ends[:-1], lengths))[None]


def run(q, k, v, begin, size, stride, block, count, **forced):
    """Summaries are the first token's key and value, so that they need no weights."""
    blocks = block_starts(begin, size, stride)
    selectable = block_starts(begin, block, block)
    at = blocks[0].clamp(min=0)
    p = probabilities(q, k[:, at], visible(blocks, begin, size))
    o = torch.einsum("btgjn,bngw->btgjw", p, v[:, at]).flatten(2, 3)
    scores = importance(p, overlap(blocks, selectable, size, stride, block))
    return o, select(scores, selectable, begin, block=block, count=count, **(forced or FORCED))


def draw(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, length, 4, 3), (1, length, 2, 3), (1, length, 2, 5)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("lengths", [[41], *([n, 41 - n] for n in range(15, 25)), [3, 1, 20, 2, 15]])
def test_documents_one_by_one(lengths):
    """A document's start stands at every offset in a block; blocks that end behind the query count for nothing."""
    size, stride, block, count = 4, 2, 8, 4
    q, k, v = draw(sum(lengths))
    o, starts = run(q, k, v, begins(lengths), size, stride, block, count)
    offset = 0
    for length in lengths:
        at = np.arange(0, length - size + 1, stride) + offset
        for t in range(length):
            for group in range(2):
                total = 0.0
                for head in (2 * group, 2 * group + 1):
                    summaries = k[0, at, group].numpy(), v[0, at, group].numpy()
                    query = q[0, offset + t, head].numpy()
                    out, p = reference_nsa.compressed(query, *summaries, t, size, stride)
                    np.testing.assert_allclose(o[0, offset + t, head], out, atol=1e-12)
                    total = total + reference_nsa.importance(p, -(-length // block), size, stride, block)
                expected = [
                    offset + block * j for j in reference_nsa.select(total, t, block, count, **FORCED)
                ]
                got = starts[0, offset + t, group].tolist()
                assert got == expected + [-1] * (len(got) - len(expected))
        offset += length


@pytest.mark.parametrize("size, stride, block", [(32, 16, 64), (8, 4, 16), (4, 4, 4), (6, 2, 6), (1, 1, 1)])
def test_weights_are_the_double_sum(size, stride, block):
    begin = begins([3 * block + 5])
    blocks, selectable = block_starts(begin, size, stride), block_starts(begin, block, block)
    count = int((selectable >= 0).sum())
    got = overlap(blocks, selectable, size, stride, block)[0, :, :count].numpy()
    for i, row in enumerate(got):
        one = np.eye(len(got))[i]
        np.testing.assert_array_equal(row, reference_nsa.importance(one, count, size, stride, block))


def test_nothing_later_reaches_a_query():
    q, k, v = (x.requires_grad_() for x in draw(41))
    o, starts = run(q, k, v, begins([41]), 4, 2, 8, 4)
    o[:, :20].sum().backward()
    for x in (q, k, v):
        assert not x.grad.isnan().any() and not x.grad[:, 20:].any()
    assert not o[:, :3].any() and o[:, 3].any()
    changed = [x.detach().clone() for x in (q, k, v)]
    for x in changed:
        x[:, 20:] += 1
    before, chosen = run(*changed, begins([41]), 4, 2, 8, 4)
    assert torch.equal(before[:, :20], o[:, :20]) and torch.equal(chosen[:, :20], starts[:, :20])


def test_of_equal_scores_the_earlier_block():
    begin = begins([64])
    starts = block_starts(begin, 8, 8)
    chosen = select(torch.zeros(1, 64, 1, starts.shape[1]), starts, begin, block=8, count=5, **FORCED)
    assert chosen[0, 63, 0].tolist() == [0, 8, 16, 48, 56]


def test_forced_blocks_need_room():
    begin = begins([64])
    with pytest.raises(ValueError, match="at least 3 selected"):
        starts = block_starts(begin, 8, 8)
        select(torch.zeros(1, 64, 1, starts.shape[1]), starts, begin, block=8, count=2, **FORCED)


def test_documents_share_no_weight():
    begin = begins([21, 3, 17])
    blocks, selectable = block_starts(begin, 4, 2), block_starts(begin, 8, 8)
    weights = overlap(blocks, selectable, 4, 2, 8)[0]
    assert (blocks < 0).any() and not weights[blocks[0] < 0].any() and not weights[:, selectable[0] < 0].any()
    for i, j in weights.nonzero().tolist():
        assert begin[0, blocks[0, i]] == begin[0, selectable[0, j]]


def test_importance_passes_no_gradient_on():
    probabilities = torch.rand(1, 4, 2, 2, 3, requires_grad=True)
    scores = importance(probabilities, torch.ones(1, 3, 2, dtype=torch.int64))
    assert not scores.requires_grad and scores.shape == (1, 4, 2, 2)


@pytest.mark.parametrize("lengths", [[21], *([n, 21 - n] for n in range(8, 13)), [2, 1, 9, 3, 6], [3]])
@pytest.mark.parametrize("size, stride", [(4, 2), (6, 2), (4, 4), (3, 1)])
def test_summaries_of_documents_one_by_one(lengths, size, stride):
    torch.manual_seed(0)
    layer = Summary(3, 5, 2, size, stride).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)  # tables and biases begin at 0, which would hide them
    begin = begins(lengths)
    x = torch.randn(1, sum(lengths), 2, 3, dtype=torch.float64)
    starts = block_starts(begin, size, stride)
    got = layer(x, begin, starts)
    expected = [
        a + i
        for a, n in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True)
        for i in range(0, n - size + 1, stride)
    ]
    assert starts[0, : len(expected)].tolist() == expected and (starts[0, len(expected) :] < 0).all()
    weights = [
        w.detach().numpy() for w in (layer.up.weight, layer.up.bias, layer.down.weight, layer.down.bias)
    ]
    for n, at in enumerate(expected):
        for group in range(2):
            places = layer.places[group].detach().numpy()
            one = reference_nsa.summary(x[0, at : at + size, group].numpy(), places, *weights)
            np.testing.assert_allclose(got[0, n, group].detach(), one, atol=1e-12)


def test_a_summary_is_of_its_own_tokens():
    torch.manual_seed(0)
    layer, begin = Summary(3, 5, 2, 4, 2), begins([9, 12])
    layer.init_weights(torch.Generator().manual_seed(0))
    x = torch.randn(1, 21, 2, 3, requires_grad=True)
    starts = block_starts(begin, 4, 2)
    at = int(starts[0, 2])
    (gradient,) = torch.autograd.grad(layer(x, begin, starts)[0, 2, 1].sum(), x)
    reached = gradient.abs().sum((0, 3)) > 0  # (T, G)
    assert reached[:, 1].nonzero().flatten().tolist() == list(range(at, at + 4)) and not reached[:, 0].any()


def test_summaries_need_whole_strides():
    with pytest.raises(ValueError, match="divisor of 6"):
        Summary(3, 5, 2, 6, 4)


def test_gates_begin_as_said_and_do_not_compete():
    gates = Gates(6, 4, 2, [-2.0, -2.0, 2.0])
    gates.init_weights(torch.Generator().manual_seed(0), 0.02)
    x = torch.randn(1, 5, 6)
    expected = torch.tensor([-2.0, -2.0, 2.0]).sigmoid().expand(1, 5, 2, 3)
    torch.testing.assert_close(gates(x), expected)
    torch.nn.init.normal_(gates.out.weight)
    assert (gates(x) - expected).abs().max() > 1e-3 and (gates(x).sum(-1) - 1).abs().max() > 1e-3


def test_parameters_of_the_default_sizes():
    """A layer of the 124M default: keys' and values' summaries, and gates of 16 heads."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert 2 * count(Summary(64, 128, 1, 32, 16)) == 545_152
    assert count(Gates(768, 128, 16, [0.0, 0.0, 0.0])) == 104_624


@pytest.mark.parametrize("lengths", [[41], *([n, 41 - n] for n in range(15, 24)), [3, 1, 20, 2, 15]])
def test_what_is_selected_is_attended_to_within_its_document(lengths):
    """Equations 9 to 12 together: a query's own block, cut short by its document's end, reaches into no other."""
    size, stride, block, count = 4, 2, 8, 4
    q, k, v = draw(sum(lengths))
    begin = begins(lengths)
    _, starts = run(q, k, v, begin, size, stride, block, count)
    o = selected_attention(q, k, v, starts, block=block, kernels=Kernels())
    for t, offset in enumerate(begin[0].tolist()):
        for head in range(4):
            chosen = [int(s) for s in starts[0, t, head // 2] if s >= 0]
            seen = [s for first in chosen for s in range(first, min(first + block, t + 1))]
            assert min(seen) >= offset and seen == sorted(set(seen)) and seen[-1] == t
            keys, values = k[0, seen, head // 2].numpy(), v[0, seen, head // 2].numpy()
            expected = reference_nsa.attend(q[0, t, head].numpy(), keys, values)
            np.testing.assert_allclose(o[0, t, head], expected, atol=1e-12)
