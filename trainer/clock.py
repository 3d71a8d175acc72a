"""When a run began: before its imports, in whichever process was started first. Imports no torch."""

from __future__ import annotations

import os
import time

__all__ = ["seconds_since_start", "start"]

_BEGAN = "MYTRAINER_BEGAN"  # environment variable, for the worker processes: seconds of `time.time`


def start() -> None:
    os.environ[_BEGAN] = str(time.time())


def seconds_since_start() -> float:
    """0 where no command has started the run."""
    return max(0.0, time.time() - float(os.environ.get(_BEGAN, "inf")))
