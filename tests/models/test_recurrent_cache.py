"""What blocks that run several times find of earlier tokens: turn by turn, also of tokens that left before."""

import pytest
import torch

from models.layers.recurrent_cache import RecurrentCache

ROWS, HEADS, WIDTH, LAYER = 3, 2, 4, 1


def entries(turn, first, tokens, rows=ROWS):
    """Keys that tell what they are: 1000 row + 100 turn + token."""
    row = 1000.0 * torch.arange(rows)[:, None]
    told = row + 100.0 * turn + torch.arange(first, first + tokens)  # (B, T)
    return told[:, None, :, None].expand(rows, HEADS, tokens, WIDTH)


def put(turn, first, tokens, rows=None):
    """(row, S): what is found there afterwards, as `entries` tells it."""
    given = entries(turn.number, first, tokens)
    given = given if rows is None else given[rows]
    keys, values = turn.append(LAYER, given, -given)
    assert torch.equal(keys, -values) and bool((keys == keys[:, :1, :, :1]).all())
    return keys[:, 0, :, 0]


def test_a_turn_finds_what_was_left_in_it():
    cache = RecurrentCache([1, 2], ROWS)
    for first, tokens in ((0, 3), (3, 1), (4, 6)):
        for number in range(2):
            found = put(cache.turn(number), first, tokens)
            assert torch.equal(found, entries(number, 0, first + tokens)[:, 0, :, 0])
        cache.advance(tokens)
    assert cache.length == 10


def left_early(cache):
    """Rows read two tokens in up to four turns: they take these many."""
    depths = torch.tensor([[4, 4], [2, 4], [1, 3]])
    for number in range(4):
        running = depths > number
        rows = running.any(1).nonzero()[:, 0]
        put(cache.turn(number, rows, running[rows]), 0, 2, rows)
    cache.close([LAYER], depths)
    cache.advance(2)
    return depths


def test_tokens_that_have_left_stand_as_they_did_in_their_last_turn():
    cache = RecurrentCache([1, 4], ROWS)
    depths = left_early(cache)
    for number in range(4):
        found = put(cache.turn(number), 2, 1)
        last = torch.minimum(torch.tensor(number), depths - 1)
        rows, tokens = 1000 * torch.arange(ROWS)[:, None], torch.arange(2)
        assert torch.equal(found[:, :2], rows + 100 * last + tokens)
        assert torch.equal(found[:, 2:], entries(number, 2, 1)[:, 0, :, 0])


def test_and_do_so_for_those_that_are_read_beside_them():
    cache = RecurrentCache([1, 4], ROWS)
    everyone = torch.ones(ROWS, 2, dtype=torch.bool)
    put(cache.turn(0, None, everyone), 0, 2)
    found = put(cache.turn(1, None, torch.tensor([[True, True], [False, True], [True, True]])), 0, 2)
    assert found[1].tolist() == [1000, 1101] and found[0].tolist() == [100, 101]
    found = put(cache.turn(2, torch.tensor([1]), torch.tensor([[False, True]])), 0, 2, [1])
    assert found.tolist() == [[1000, 1201]]


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_turns_share_slots(slots):
    """Of a token that was done before, a turn finds the last that it left in this slot."""
    cache = RecurrentCache([1, slots], ROWS)
    for number in range(5):
        put(cache.turn(number), 0, 1)
    cache.close([LAYER], torch.full((ROWS, 1), 5))
    cache.advance(1)
    for number in range(5):
        last = max(j for j in range(5) if j % slots == number % slots)
        assert put(cache.turn(number), 1, 1)[0, 0] == 100 * last


def test_a_token_with_fewer_turns_than_slots_fills_the_others():
    cache = RecurrentCache([1, 3], 1)
    for number in range(2):
        keys = entries(number, 0, 1, rows=1)
        cache.turn(number).append(LAYER, keys, keys)
    cache.close([LAYER], torch.tensor([[2]]))
    cache.advance(1)
    found = [
        float(cache.turn(n).append(LAYER, *[entries(n, 1, 1, rows=1)] * 2)[0][0, 0, 0, 0]) for n in range(5)
    ]
    assert found[:3] == [0, 100, 100]


def test_what_is_truncated_is_gone_in_every_turn():
    cache = RecurrentCache([1, 4], ROWS)
    left_early(cache)
    cache.truncate(1)
    for number in range(4):
        found = put(cache.turn(number), 7, 1)
        assert found.shape == (ROWS, 2) and torch.equal(found[:, 1:], entries(number, 7, 1)[:, 0, :, 0])
    cache.advance(1)
    with pytest.raises(ValueError, match="cannot truncate a cache of 2 tokens to 3"):
        cache.truncate(3)


def test_selected_rows_stay():
    cache = RecurrentCache([1, 4], ROWS)
    left_early(cache)
    cache.select(torch.tensor([2, 0]))
    given = entries(3, 2, 1)[[2, 0]]
    keys, _ = cache.turn(3).append(LAYER, given, given)
    assert keys[:, 0, :, 0].tolist() == [[2000, 2201, 2302], [300, 301, 302]]
    with pytest.raises(ValueError, match="made for 2 rows, got 3"):
        put(cache.turn(0), 2, 1)


def test_storage_does_not_grow_with_the_number_of_turns():
    def bytes_of(slots, turns):
        cache = RecurrentCache([1, slots], ROWS)
        for number in range(turns):
            put(cache.turn(number), 0, 8)
        return sum(t.numel() * t.element_size() for t in cache._stored if t is not None)

    one = 2 * ROWS * HEADS * 8 * WIDTH * 4
    assert bytes_of(2, 2) == bytes_of(2, 32) == 2 * one
    assert bytes_of(8, 8) == 8 * one
