"""Where derived files (trained tokenizers, token arrays, yardsticks) are kept, and how they are written.

Everything in the cache can be deleted at any time: it is rebuilt from the text. Files are written beside
their place and renamed, so several processes may build the same entry at once: each writes the same bytes,
and a reader sees a complete file or none. What a process killed meanwhile has left goes with the next write of that
entry.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

from naming import expand_path

ABANDONED = 3600  # seconds since anything was written to a temporary file


def cache_root() -> Path:
    """$MYTRAINER_CACHE, else $XDG_CACHE_HOME/mytrainer, else ~/.cache/mytrainer; without a home, a folder of this
    user's among the temporary files."""
    if explicit := os.environ.get("MYTRAINER_CACHE"):
        return expand_path(explicit).absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mytrainer"
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        return Path(home) / ".cache" / "mytrainer"
    return Path(tempfile.gettempdir()) / f"mytrainer-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it into place. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _remove_abandoned(path: Path) -> None:
    """Temporary files of writes of `path` that never ended. There is no lock: others may be writing it right now."""
    for temporary in path.parent.glob(f".{escape(path.name)}.{'?' * 8}"):  # as mkstemp names them
        with suppress(OSError):  # another process was quicker
            if time.time() - temporary.stat().st_mtime > ABANDONED:
                temporary.unlink()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kept_digest(path: Path) -> str:
    """`file_digest`, for which a file is read once on this machine as long as its size and time of change stay."""
    path, status = path.resolve(), path.stat()
    told = json.dumps([str(path), status.st_size, status.st_mtime_ns])
    record = (
        cache_root() / "checked" / hashlib.sha256(told.encode("utf-8", "backslashreplace")).hexdigest()[:32]
    )
    with suppress(OSError, ValueError):
        if len(bytes.fromhex(kept := record.read_text(encoding="ascii"))) == 32:
            return kept
    found = file_digest(path)
    with suppress(OSError):  # where nothing can be kept it is read each time
        write_atomic(record, lambda file: file.write(found.encode("ascii")))
    return found
