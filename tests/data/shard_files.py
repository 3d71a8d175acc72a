"""Token shards as llm.c, nanoGPT and Megatron write them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEADERS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}


def llm_c(path: Path, ids: np.ndarray | Sequence[int], magic: int = 20240520, **changes: int) -> Path:
    """As dev/data/data_common.py of llm.c does; `changes`: `version` and `tokens` of its header."""
    version, dtype = HEADERS[magic]
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, changes.get("version", version), changes.get("tokens", len(ids))
    return _write(path, header.tobytes() + np.asarray(ids).astype(dtype).tobytes())


def headerless(path: Path, ids: np.ndarray | Sequence[int], dtype: str = "<u2") -> Path:
    """As data/openwebtext/prepare.py of nanoGPT does."""
    return _write(path, np.asarray(ids).astype(dtype).tobytes())


def megatron(path: Path, documents: Sequence[np.ndarray], dtype: str = "<u2", sequences: int = 1) -> Path:
    """As IndexedDatasetBuilder does, each document in that many sequences."""
    parts = [part for document in documents for part in np.array_split(document, sequences)]
    _write(path, b"".join(part.astype(dtype).tobytes() for part in parts))
    starts = np.arange(len(documents) + 1) * sequences
    megatron_index(path, [len(part) for part in parts], starts, dtype)
    return path


def megatron_index(
    path: Path, lengths: Sequence[int], starts: np.ndarray | Sequence[int], dtype: str
) -> None:
    code = {"<u1": 1, "<i4": 4, "<u2": 8}[dtype]
    sizes = np.array(lengths, dtype=np.int64) * np.dtype(dtype).itemsize
    _write(
        path.with_suffix(".idx"),
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(lengths), len(starts))
        + np.array(lengths, dtype="<i4").tobytes()
        + (np.cumsum(sizes) - sizes).astype("<i8").tobytes()
        + np.array(starts, dtype="<i8").tobytes(),
    )


def _write(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path
