"""What any cache must do: a model with a state of its own beside attention, through the one protocol."""

import pytest
import torch

from models.layers.cache import Cache
from tests.models.tiny import Recurrent, tokens_of

every_cache = pytest.mark.parametrize("attention", [True, False])


@every_cache
def test_pieces_equal_the_whole(attention):
    model, tokens = Recurrent(attention), tokens_of(rows=3, length=12)
    cache: Cache = model.init_cache(3)
    pieces = [model(part, cache) for part in tokens.split([1, 5, 2, 4], 1)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-12)


@every_cache
def test_selected_rows_go_on(attention):
    model, tokens, kept = Recurrent(attention), tokens_of(rows=3, length=12), torch.tensor([2, 0])
    cache = model.init_cache(3)
    model(tokens[:, :7], cache)
    cache.select(kept)
    torch.testing.assert_close(model(tokens[kept, 7:], cache), model(tokens)[kept, 7:], rtol=0, atol=1e-12)


@every_cache
def test_what_was_tried_is_taken_back(attention):
    """More than once from the same state, and to a state before."""
    model, tokens = Recurrent(attention), tokens_of(rows=3, length=12)
    cache = model.init_cache(3)
    empty = cache.snapshot()
    model(tokens[:, :7], cache)
    here = cache.snapshot()
    for draft in (tokens_of(3, 12, seed=2), tokens_of(3, 12, seed=3)):
        model(draft, cache)
        cache.restore(here)
        assert cache.length == 7
    torch.testing.assert_close(model(tokens[:, 7:], cache), model(tokens)[:, 7:], rtol=0, atol=1e-12)
    cache.restore(empty)
    torch.testing.assert_close(model(tokens, cache), model(tokens), rtol=0, atol=1e-12)
