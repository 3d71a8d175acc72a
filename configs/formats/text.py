"""Text of a file that somebody's editor wrote."""

from __future__ import annotations

import stat
from pathlib import Path

from configs.messages import ConfigError

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(path: Path, where: str) -> None:
    """ConfigError for what is no file: reading a pipe waits for a writer, and a device may have no end."""
    try:
        kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    except OSError:
        return  # who opens it says why that cannot be done
    if kind:
        raise ConfigError(f"{where}: is {kind}, and a configuration is a file. Copy what it says into one")


def read_text(path: Path, where: str) -> str:
    """What a file says, a byte order mark left out. `where`: the path as people know it. Raises ConfigError."""
    require_file(path, where)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
