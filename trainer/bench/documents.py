"""Scores document by document: kept beside a run's score, so that two runs are compared on each of them.

Most of what a score owes to its text two models owe alike, and it cancels. What is left of it, the noise of the text,
is that of a difference of ratios over documents; the noise of seeds is another, and is shown apart.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING

import numpy as np

from trainer.bench.statistics import ratio_standard_error

if TYPE_CHECKING:
    from data.rows import HeldoutRows

__all__ = ["FILE", "DocumentScores", "PerDocument", "read_document_scores", "same_documents", "text_noise"]

FILE = "document_scores.npy"
# Each row says the step too: the file alone tells what it is of.
_ROW = np.dtype([("document", "u1", (16,)), ("nats", "<f8"), ("bytes", "<i8"), ("step", "<i8")])


@dataclass(frozen=True, eq=False)
class PerDocument:
    """What an evaluation found of each document of `rows`: nats (N,), and `sizes` (N,), the bytes that were scored."""

    rows: HeldoutRows
    nats: np.ndarray
    sizes: np.ndarray

    def content(self, step: int) -> bytes:
        """The file, of the weights at `step`."""
        table = np.zeros(len(self.nats), dtype=_ROW)
        table["document"], table["step"] = self.rows.digests, step
        table["nats"], table["bytes"] = self.nats, self.sizes
        file = io.BytesIO()
        np.save(file, table, allow_pickle=False)
        return file.getvalue()


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Of the score that a run's summary gives, best or last: of each document, in one order for all runs, the digest of
    its text, nats (N,) float64 and the bytes that these are of (N,) int64."""

    document: list[str]
    nats: np.ndarray
    bytes: np.ndarray
    step: int


def read_document_scores(run: str | Path) -> DocumentScores | None:
    """Those of a run folder; None where it has none, or they are not of the score that its summary gives.

    Raises ValueError where the file is none that this trainer writes. Nothing in it is executed.
    """
    path = Path(run) / FILE
    if not path.is_file():
        return None
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)  # no larger than the file is
        if table.dtype != _ROW or table.ndim != 1 or not len(table) or len(set(table["step"].tolist())) > 1:
            raise ValueError("other columns")
    except (ValueError, EOFError, OSError, OverflowError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path}: is no table of documents ({error})") from None
    step = int(table["step"][0])
    if step != _step_of_score(Path(run)):
        return None
    names = [row.tobytes().hex() for row in table["document"]]
    return DocumentScores(names, np.array(table["nats"]), np.array(table["bytes"]), step)


def _step_of_score(run: Path) -> int | None:
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        return summary.get("best", {}).get("step", summary["steps"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def same_documents(scores: Sequence[DocumentScores]) -> bool:
    """Whether all are of the same bytes of the same documents."""
    first = scores[0]
    return all(
        one.document == first.document and np.array_equal(one.bytes, first.bytes) for one in scores[1:]
    )


def text_noise(first: Sequence[DocumentScores], second: Sequence[DocumentScores]) -> float | None:
    """Standard error, in bits per byte, of how much better one is than the other, for other documents of the kind: of
    the mean over the runs of each side, so that what a seed did to a document is averaged out.

    None where they are not of the same documents, or of a single one.
    """
    if not first or not second or not same_documents([*first, *second]):
        return None
    difference = np.mean([one.nats for one in second], axis=0) - np.mean([one.nats for one in first], axis=0)
    scored = first[0].bytes > 0
    error = ratio_standard_error(difference[scored], first[0].bytes[scored])
    return None if error is None else error / math.log(2)
