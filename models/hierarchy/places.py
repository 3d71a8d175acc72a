"""Which positions of a stage hold what: those of the outermost are the bytes of rows, those of the next their chunks.

Chunks are laid in one of three ways that give the same to rounding. Packed: all chunks of all rows end to end, as many
as there are, which the host must be told. Masked: each row has as many places as the stage before has, of which those
behind its chunks are empty; nothing waits for the device. Padded: the same, but for as many places as the row with most
chunks needs, in whole buckets, so that there are few shapes; this too the host must be told.

Shapes: B rows of the batch, R rows of places, M places in each, W places of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.choose import Kernels
from kernels.compaction import compaction
from kernels.documents import runs

__all__ = ["Places", "bytes_of"]

EMPTY = -1  # the document of empty places, which see each other alone
BUCKET = 128  # places of padded rows are a multiple of it


@dataclass(frozen=True)
class ByRow:
    """Where the chunks of a packed stage stand if each row of the batch has a row of its own."""

    index: Tensor  # (B, W) int64: the place, any where a row has fewer
    there: Tensor  # (B, W) bool: whether it has so many
    back: Tensor  # (M,) int64: of each place, where it stands among the B W


@dataclass(frozen=True)
class Places:
    """`ids` (R, M) int64: documents, neighbours of one number; `bytes` (R, M) int64: the byte that each place begins
    with, of all rows end to end; `valid` (R, M) bool: places that are not empty (None: all); `by_row`: of packed ones
    (None: the R rows are those of the batch); `longest`: positions of a row at most; `bucket`: of how many places rows
    of chunks that are not packed are a multiple (None: they have as many as this stage's)."""

    ids: Tensor
    bytes: Tensor
    valid: Tensor | None
    by_row: ByRow | None
    longest: int
    bucket: int | None = None

    @property
    def begins(self) -> Tensor:
        """(R, M) bool: where a document begins, the first place of a row included."""
        return F.pad(self.ids[:, 1:] != self.ids[:, :-1], (1, 0), value=True)

    def rows(self, x: Tensor) -> Tensor:
        """(R, M, ...) -> (B, W, ...): of each row of the batch its own places."""
        return x if self.by_row is None else x[0][self.by_row.index]

    def back(self, x: Tensor) -> Tensor:
        """(B, W, ...) -> (R, M, ...)"""
        return x if self.by_row is None else x.flatten(0, 1)[self.by_row.back][None]

    @property
    def in_rows(self) -> tuple[Tensor, Tensor | None]:
        """`ids` and `valid` of `rows`, (B, W). What stands in empty places is behind a row's chunks, where none
        of these looks."""
        if self.by_row is None:
            return self.ids, self.valid
        return self.rows(self.ids), self.by_row.there

    def total(self, x: Tensor) -> Tensor:
        """(R, M) -> (B,): the sum over each row's places that are not empty. The same whatever the way of laying."""
        _, valid = self.in_rows
        x = self.rows(x)
        return (x if valid is None else x.where(valid, 0)).sum(1)

    def at_bytes(self, opens: Tensor) -> Tensor:
        """opens (R, M) bool, False at empty places -> (B, T) bool: the bytes that begin what opens."""
        every = self.in_rows[0].shape[0] * self.longest
        found = opens.new_zeros(every + 1)
        found.scatter_(0, self.bytes.where(opens, every).flatten(), True)
        return found[:-1].view(-1, self.longest)

    def chunks(self, opens: Tensor, packed: bool, kernels: Kernels) -> tuple[Places, Tensor, Tensor]:
        """Of `opens` (R, M) bool, which is False at empty places: the places of chunks (R', M'), `source` (R', M')
        int64, the place that opens each, and `chunk` (R, M) int64, which chunk each place belongs to. Packed ones are
        of R' = 1 row, whose places stand end to end here too."""
        longest = self.longest
        if not packed:
            room = opens.shape[1]
            if self.bucket is not None:
                most = int(opens.sum(1).max())  # waits for the device
                room = min(room, -(-most // self.bucket) * self.bucket)
            source, chunk = compaction(opens, room, kernels=kernels)
            order = torch.arange(room, device=opens.device)
            valid = order < opens.sum(1, keepdim=True)
            ids = self.ids.gather(1, source).where(valid, EMPTY)
            within = Places(ids, self.bytes.gather(1, source), valid, None, longest, self.bucket)
            return within, source, chunk.clamp(min=0)
        counts = self.total(opens)  # (B,)
        chunks, most = torch.stack((counts.sum(), counts.max())).tolist()  # waits for the device
        source, chunk = compaction(opens.flatten()[None], chunks, kernels=kernels)
        ids, bytes_ = (t.flatten()[source] for t in (self.ids, self.bytes))
        order = torch.arange(most, device=opens.device)
        first = counts.cumsum(0) - counts
        row = torch.arange(len(counts), device=opens.device).repeat_interleave(counts, output_size=chunks)
        back = row * most + torch.arange(chunks, device=opens.device) - first[row]
        index = (first[:, None] + order).clamp(max=chunks - 1)
        by_row = ByRow(index, order < counts[:, None], back)
        return Places(ids, bytes_, None, by_row, longest), source, chunk


def bytes_of(tokens: Tensor, doc_ids: Tensor | None, padded: bool = False) -> Places:
    """The places of bytes (B, T). `doc_ids` (B, T) None: each row is one document. `padded`: where chunks
    are not packed."""
    rows, length = tokens.shape
    every = torch.arange(rows * length, device=tokens.device).view(rows, length)
    inside = torch.zeros_like(tokens) if doc_ids is None else runs(doc_ids)
    return Places(every[:, :1] + inside, every, None, None, length, BUCKET if padded else None)
