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


class DocumentOrder:
    """Permutations of `n_docs` documents, one per epoch.

    Documents are sorted by a keyed hash instead of shuffled by a library generator, whose streams may change
    between releases.
    """

    def __init__(self, n_docs: int, seed: int):
        self.n_docs = n_docs
        self.seed = seed

    def permutation(self, epoch: int) -> np.ndarray:
        """Document indices (n_docs,) int64 in the order of this epoch."""
        documents = np.arange(1, self.n_docs + 1, dtype=np.uint64)
        hashes = _mix(_mix(documents * np.uint64(0x9E3779B97F4A7C15)) ^ _key(self.seed, epoch))
        return np.argsort(hashes, kind="stable")
