"""Arrays that are written to .npy files piece by piece, and mapped: they never lie in memory whole."""

from __future__ import annotations

from pathlib import Path
from typing import IO, BinaryIO

import numpy as np

__all__ = ["ArrayWriter", "array_header", "map_array"]

_HEADER = 128  # bytes: numpy leaves room in it for any length


class ArrayWriter:
    """Rows behind one another: the file that `np.save` writes of (n, *row) once `close` was called."""

    def __init__(self, file: BinaryIO, dtype: np.dtype | type, row: tuple[int, ...] = ()):
        self._file, self._dtype, self._row = file, np.dtype(dtype), row
        self._start = file.tell()
        self.length = 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """(k, *row) of the array's type."""
        assert rows.dtype == self._dtype and rows.shape[1:] == self._row
        self._file.write(rows.tobytes())
        self.length += len(rows)

    def close(self) -> None:
        """Say in the header how many rows there are; the file stays open."""
        end = self._file.tell()
        self._file.seek(self._start)
        self._write_header()
        self._file.seek(end)

    def _write_header(self) -> None:
        shape = (self.length, *self._row)
        described = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": described, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        assert self._file.tell() - self._start == _HEADER


def array_header(file: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], int]:
    """Type and shape of the array of a .npy file that was just opened, and the byte at which it begins. OSError or
    ValueError where it is none."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return dtype, shape, file.tell()


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped read-only. OSError or ValueError where it is none."""
    with open(path, "rb") as file:
        dtype, shape, _ = array_header(file)
    if 0 in shape:  # no bytes to map
        return np.zeros(shape, dtype=dtype)
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)  # which is quicker to index
