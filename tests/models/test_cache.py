"""What any cache must do: a model with a state of its own beside attention, through the one protocol."""

import pytest
import torch
from torch import nn

from models.layers.cache import Cache, KVCache, StateCache

WIDTH = 4
every_cache = pytest.mark.parametrize("attention", [True, False])


class Recurrent(nn.Module):
    """h_t = tanh(A h_{t-1} + x_t), then (or not) attention over all h so far. No window."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention
        source = torch.Generator().manual_seed(0)
        self.table = torch.randn(11, WIDTH, generator=source, dtype=torch.float64)
        self.step = torch.randn(WIDTH, WIDTH, generator=source, dtype=torch.float64)

    def init_cache(self, rows):
        parts = {"attention": KVCache(1, rows)} if self.attention else {}
        return StateCache(state=torch.zeros(rows, WIDTH, dtype=torch.float64), **parts)

    def forward(self, tokens, cache=None):
        cache = self.init_cache(len(tokens)) if cache is None else cache
        states = []
        for x in self.table[tokens].unbind(1):
            cache["state"] = torch.tanh(cache["state"] @ self.step + x)
            states.append(cache["state"])
        hidden = torch.stack(states, 1)  # (B, T, D)
        if self.attention:
            one_head = hidden[:, None]  # (B, 1, T, D)
            keys, values = cache["attention"].append(0, one_head, one_head)
            ahead = torch.arange(keys.shape[2]) > cache.length + torch.arange(tokens.shape[1])[:, None]
            scores = (one_head @ keys.mT).masked_fill(ahead, -torch.inf)
            hidden = (scores.softmax(-1) @ values)[:, 0]
            cache["attention"].advance(tokens.shape[1])
        cache.advance(tokens.shape[1])
        return hidden


def tokens_of(rows=3, length=12, seed=1):
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


@every_cache
def test_pieces_equal_the_whole(attention):
    model, tokens = Recurrent(attention), tokens_of()
    cache: Cache = model.init_cache(3)
    pieces = [model(part, cache) for part in tokens.split([1, 5, 2, 4], 1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-12)


@every_cache
def test_selected_rows_go_on(attention):
    model, tokens, kept = Recurrent(attention), tokens_of(), torch.tensor([2, 0])
    cache = model.init_cache(3)
    model(tokens[:, :7], cache)
    cache.select(kept)
    torch.testing.assert_close(model(tokens[kept, 7:], cache), model(tokens)[kept, 7:], rtol=0, atol=1e-12)


@every_cache
def test_what_was_tried_is_taken_back(attention):
    """More than once from the same state, and to a state before."""
    model, tokens = Recurrent(attention), tokens_of()
    cache = model.init_cache(3)
    empty = cache.snapshot()
    model(tokens[:, :7], cache)
    here = cache.snapshot()
    for draft in (tokens_of(seed=2), tokens_of(seed=3)):
        model(draft, cache)
        cache.restore(here)
        assert cache.length == 7
    torch.testing.assert_close(model(tokens[:, 7:], cache), model(tokens)[:, 7:], rtol=0, atol=1e-12)
    cache.restore(empty)
    torch.testing.assert_close(model(tokens, cache), model(tokens), rtol=0, atol=1e-12)
