"""Where rows lie in the stream of epochs: found by blocks, and only those that the rows are in."""

from __future__ import annotations

import threading
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import order, places
from data.order import DocumentOrder
from data.places import StreamPlaces


def plainly(
    lengths: list[int], seed: int, epoch: int, begins: list[int], width: int
) -> list[tuple[int, int, int]]:
    """(row, column of the start token, document) of all documents of which a row reads something."""
    starts, position = [], 0
    for document in DocumentOrder(len(lengths), seed).permutation(epoch).tolist():
        starts.append((position, document))
        position += 1 + lengths[document]
    return [
        (row, start - begin, document)
        for row, begin in enumerate(begins)
        for start, document in starts
        if start < begin + width and start + 1 + lengths[document] > begin
    ]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    block=st.integers(1, 9),
    readers=st.integers(1, 4),
    epochs=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    width=st.integers(1, 12),
    data=st.data(),
)
@settings(deadline=None)
def test_pieces_restate_the_stream(lengths, block, readers, epochs, width, data) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with patch.multiple(order, BLOCK=block, ONE_LEVEL=0), patch.object(places, "READERS", readers):
        found = StreamPlaces(offsets, seed=4)
        total = sum(lengths) + len(lengths)
        assert found.tokens_per_epoch == total
        for epoch in epochs:
            begins = data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=6))
            pieces = found.pieces(epoch, np.array(begins), width)
            listed = zip(*(array.tolist() for array in pieces), strict=True)
            assert list(listed) == plainly(lengths, 4, epoch, begins, width)


def test_only_the_blocks_of_the_rows_are_put_in_order() -> None:
    sorted_: list[int] = []
    block = DocumentOrder.block

    def counted(self: DocumentOrder, epoch: int, number: int) -> np.ndarray:
        sorted_.append(number)
        return block(self, epoch, number)

    with patch.multiple(order, BLOCK=100, ONE_LEVEL=0), patch.object(DocumentOrder, "block", counted):
        found = StreamPlaces(np.arange(10_001) * 5, seed=0)  # 100 blocks of 600 positions each
        assert sorted_ == []
        begins = np.array([50, 7 * 600 - 3, 80 * 600])
        found.pieces(0, begins, 8)
        assert sorted_ == sorted(found.order.blocks(0)[[0, 6, 7, 80]].tolist())
        found.pieces(0, begins + 5, 8)
        assert len(sorted_) == 4  # held


def test_what_is_held_does_not_grow() -> None:
    with patch.multiple(order, BLOCK=10, ONE_LEVEL=0), patch.object(places, "READERS", 4):
        found = StreamPlaces(np.arange(1001), seed=0)
        for epoch in range(3):
            found.pieces(epoch, np.arange(0, 2000, 7), 7)
        assert len(found._held) == 5 and found._starts.shape == (5, 10) and len(found._epochs) == 2


@pytest.mark.parametrize(("tokens", "dtype"), [(1 << 20, np.uint32), (1 << 33, np.int64)])
def test_blocks_of_more_than_2_to_the_32_tokens_keep_their_places(tokens, dtype) -> None:
    found = StreamPlaces(np.array([0, tokens, 2 * tokens]), seed=0)
    assert found._starts.dtype == dtype
    pieces = found.pieces(0, np.array([tokens + 1, 2 * tokens]), 1)
    assert pieces.start.tolist() == [0, 1 + tokens - 2 * tokens]


def test_threads_may_ask_at_once() -> None:
    with patch.multiple(order, BLOCK=50, ONE_LEVEL=0), patch.object(places, "READERS", 1):
        shared = StreamPlaces(np.arange(2001) * 3, seed=0)
        alone = [
            StreamPlaces(np.arange(2001) * 3, seed=0).pieces(e, np.arange(0, 8000, 40), 9) for e in (0, 1)
        ]
        wrong: list[int] = []

        def ask(epoch: int) -> None:
            for _ in range(15):
                found = shared.pieces(epoch, np.arange(0, 8000, 40), 9)
                if not all(np.array_equal(a, b) for a, b in zip(found, alone[epoch], strict=True)):
                    wrong.append(epoch)

        threads = [threading.Thread(target=ask, args=(epoch,)) for epoch in (0, 1, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
