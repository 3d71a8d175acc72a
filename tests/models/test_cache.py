"""What any cache must do: a model with a state of its own beside attention, through the one protocol."""

import pytest
import torch

from models.layers.cache import Cache, WindowedKVCache
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


WINDOWS = (4, 1, None)


def appended(cache, tokens):
    """What each layer gets to see, when these numbers are keys and values of all layers."""
    both = torch.as_tensor(tokens, dtype=torch.float64)[None, None, :, None]  # (1, 1, T, 1)
    found = [cache.append(layer, both, -both) for layer in range(len(WINDOWS))]
    cache.advance(len(tokens))
    for keys, values in found:
        assert torch.equal(keys, -values)
    return [keys.flatten().tolist() for keys, _ in found]


def test_a_window_gets_what_it_sees_and_keeps_no_more():
    cache, seen = WindowedKVCache(WINDOWS, rows=1), 0
    for count in (1, 5, 2, 1, 9, *[1] * 40):
        new = list(range(seen, seen + count))
        found = appended(cache, new)
        assert found == [list(range(max(0, seen - 3), seen)) + new, new, list(range(seen + count))]
        seen += count
    assert cache.length == seen
    assert [stored.shape[3] for stored, _ in cache._layers] == [8, 2, 64]


def test_a_snapshot_outlives_what_a_window_drops():
    """Also where storage was given up for another in between, and twice."""
    cache = WindowedKVCache(WINDOWS, rows=1)
    appended(cache, range(6))
    here = cache.snapshot()
    for draft in (range(60, 90), range(30, 33)):
        for each in draft:
            appended(cache, [each])
        cache.restore(here)
        assert cache.length == 6
        assert appended(cache, [7])[0] == [3, 4, 5, 7]
        cache.restore(here)


def test_rows_of_a_window_are_selected():
    cache = WindowedKVCache([3], rows=3)
    keys = torch.arange(12.0).view(3, 1, 4, 1)
    cache.append(0, keys, keys)
    cache.advance(4)
    cache.select(torch.tensor([2, 0]))
    found, _ = cache.append(0, keys[:2, :, :1], keys[:2, :, :1])
    assert found[:, 0, :, 0].tolist() == [[10, 11, 0], [2, 3, 4]]
    with pytest.raises(ValueError, match="made for 2 rows, got 3"):
        cache.append(0, keys, keys)
