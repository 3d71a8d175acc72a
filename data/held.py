"""Folders of the cache that are being read: nobody deletes them meanwhile.

A reader shares a lock on the folder itself (flock), which ends with whoever holds it, however that ends; who deletes it
must have the lock alone. It reaches as far as flock does: not to other machines where a folder lies on a network.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Held", "alone", "hold"]

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class Held:
    """A folder, as long as this lives. Raises OSError."""

    def __init__(self, folder: Path):
        handle = os.open(folder, _FOLDER)
        weakref.finalize(self, os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_SH)  # waits while it is being deleted


def hold(folder: Path) -> Held | None:
    """None where there is no such folder, or nothing can be locked there: what was opened is read all the same."""
    try:
        return Held(folder)
    except OSError:
        return None


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether nobody else reads the folder, who else waits until this is over; True of what is no folder, or cannot be
    locked."""
    try:
        handle = os.open(folder, _FOLDER)
    except OSError:
        yield True
        return
    try:
        yield _is_free(handle)
    finally:
        os.close(handle)


def _is_free(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks there
        return True
    return True
