"""Failures that a person should read as one message, not as a traceback."""

from __future__ import annotations

__all__ = ["StopRequested", "TrainingError", "sentence"]


class TrainingError(RuntimeError):
    """A run cannot go on: the message says what happened, what was kept, and what to do. Exit status 1."""


class StopRequested(BaseException):
    """A signal asked for it: save and leave with exit status 0. No `except Exception` on its way may swallow it."""


def sentence(error: BaseException) -> str:
    """Kind and first line of a failure, for a note about something that the run does without."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
