"""The order of documents: a function of (seed, epoch), not a state.

It knows nothing of tokenizers, row lengths, batches or processes, so a byte model and a BPE model see the
same documents in the same order, and a resumed run needs no more than a position.
"""

from __future__ import annotations

import numpy as np

_U64 = (1 << 64) - 1


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _key(*words: int) -> np.ndarray:
    key = np.zeros(1, dtype=np.uint64)
    for word in words:
        key = _mix((key ^ np.uint64(word & _U64)) + np.uint64(0x9E3779B97F4A7C15))
    return key


READERS = 256


def reading_place(visit: np.ndarray, n_rows: int) -> np.ndarray:
    """Which row of an epoch's stream is read at a visit number 0 to n_rows - 1 (both (B,) int64): a bijection.

    The stream is read at READERS equally spaced places in turn. Read from one place, the rows of a step would come
    from one or two documents, and its gradient would be that of a file, not of the text. Equal fractions of the
    stream are read at equal fractions of the epoch, so the text seen so far still does not depend on the tokenizer.
    """
    readers = min(READERS, n_rows)
    rounds = n_rows // readers
    turn, reader = np.divmod(visit, readers)
    # Reader k owns rows floor(k n / K) to floor((k + 1) n / K) - 1: `rounds` of them, some one more.
    longer = np.flatnonzero(np.diff(np.arange(readers + 1) * n_rows // readers) > rounds)
    last = np.maximum(
        visit - rounds * readers, 0
    )  # after all full rounds: the extra row of each longer share
    extra = (
        (longer[np.minimum(last, max(len(longer) - 1, 0))] + 1) * n_rows // readers - 1 if len(longer) else 0
    )
    return np.where(turn < rounds, reader * n_rows // readers + turn, extra)


BLOCK = 65_536  # consecutive documents
# So many documents are put in order by one sort in 0.3 s and 25 MB; ten million would take 4.4 s and 229 MB, for every
# epoch and on every process, before the first row is there.
ONE_LEVEL = 1 << 20


class DocumentOrder:
    """Permutations of `n_docs` documents, one per epoch.

    Documents are sorted by a keyed hash instead of shuffled by a library generator, whose streams may change
    between releases. More than `ONE_LEVEL` are sorted at two levels: blocks of `BLOCK` consecutive ones, whatever files
    they lie in, then the documents of each; any block can be had without the others. Up to there all are one block.
    """

    def __init__(self, n_docs: int, seed: int):
        self.n_docs = n_docs
        self.seed = seed
        self.block_size = BLOCK if n_docs > ONE_LEVEL else max(n_docs, 1)
        self.n_blocks = -(-n_docs // self.block_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """Document indices (n_docs,) int64 in the order of this epoch."""
        blocks = [self.block(epoch, int(number)) for number in self.blocks(epoch)]
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)

    def blocks(self, epoch: int) -> np.ndarray:
        """Numbers of the blocks (n_blocks,) int64 in the order of this epoch."""
        return np.argsort(_hashes(0, self.n_blocks, _key(self.seed, epoch, 1)), kind="stable")

    def block(self, epoch: int, number: int) -> np.ndarray:
        """Indices of the documents of one block (k,) int64 in the order of this epoch."""
        first = number * self.block_size
        behind = min(first + self.block_size, self.n_docs)
        order = np.argsort(_hashes(first, behind, _key(self.seed, epoch)), kind="stable")
        order += first
        return order


def first_documents(sizes: np.ndarray, seed: int, limit: int) -> np.ndarray:
    """The documents (k,) int64 that a sort of all by the hash of epoch 0 puts first, as many as fit whole into `limit`,
    at least one if there is one; sizes (n_docs,), each 0 or more. They are spread evenly over the text however many
    documents it has, where the first of a `DocumentOrder` of two levels are neighbours. A block is looked at at a time.
    """
    key = _key(seed, 0)
    kept, hashes = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)  # smallest hash first
    beyond = np.uint64(_U64)  # nothing behind this hash fits
    fresh: list[tuple[np.ndarray, np.ndarray]] = []
    fitting = waiting = 0
    for start in range(0, len(sizes), BLOCK):
        behind = min(start + BLOCK, len(sizes))
        here = _hashes(start, behind, key)
        chosen = np.flatnonzero(here <= beyond)
        fresh.append((chosen + start, here[chosen]))
        waiting += len(chosen)
        if waiting < len(kept) and behind < len(sizes):
            continue  # each sort is of twice as many as the one before it, at least
        kept, hashes = (np.concatenate(two) for two in zip((kept, hashes), *fresh, strict=True))
        order = np.argsort(hashes, kind="stable")
        kept, hashes = kept[order], hashes[order]
        fresh, waiting = [], 0
        fitting = max(1, int(np.searchsorted(np.cumsum(sizes[kept]), limit, side="right")))
        if fitting < len(kept):
            kept, hashes, beyond = kept[: fitting + 1], hashes[: fitting + 1], hashes[fitting]
    return kept[:fitting]


def _hashes(first: int, behind: int, key: np.ndarray) -> np.ndarray:
    """Of the numbers first, ..., behind - 1 (behind - first,) uint64."""
    numbers = np.arange(first + 1, behind + 1, dtype=np.uint64)
    return _mix(_mix(numbers * np.uint64(0x9E3779B97F4A7C15)) ^ key)
