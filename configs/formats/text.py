"""Text of a file that somebody's editor wrote."""

from __future__ import annotations

from pathlib import Path

from configs.messages import ConfigError


def read_text(path: Path, where: str) -> str:
    """What a file says, a byte order mark left out. `where`: the path as people know it. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from None
