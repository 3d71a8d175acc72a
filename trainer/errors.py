"""Failures that a person should read as one message, not as a traceback."""

from __future__ import annotations

__all__ = [
    "LostPeer",
    "StopRequested",
    "TrainingError",
    "of_a_lost_peer",
    "of_the_machine",
    "sentence",
]


class TrainingError(RuntimeError):
    """A run cannot go on: the message says what happened, what was kept, and what to do. Exit status 1."""


class LostPeer(TrainingError):
    """An exchange broke off as another process of the run has ended: why, that one or its launcher can say better."""


class StopRequested(BaseException):
    """A signal asked for it: save and leave with exit status 0. No `except Exception` on its way may swallow it."""


def of_the_machine(error: BaseException) -> str:
    """What a person can do about a failure that lies in the machine: too little memory, no compiler; "" for any other.

    Such failures are RuntimeErrors of torch, known by their module, name and text, and may be the cause of another.
    """
    cause: BaseException | None = error
    while cause is not None:
        kind = type(cause)
        memory = isinstance(cause, MemoryError) or "OutOfMemoryError" in [k.__name__ for k in kind.__mro__]
        if memory or "DefaultCPUAllocator" in str(cause):
            return (
                f"out of memory ({sentence(cause)}). Less takes a smaller batch_size (rows at a time: results do not "
                f"depend on it), gradient_checkpointing=true, a shorter train_seq_len or a smaller preset"
            )
        if kind.__module__.startswith(("torch._inductor", "torch._dynamo", "triton")):
            return (
                f"torch_compile: the model could not be compiled ({sentence(cause)}). Set torch_compile=false"
            )
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return ""


def of_a_lost_peer(error: BaseException) -> str:
    """What a person should know of an exchange that broke off; "" for any other failure. Torch has no type of its own
    for all of them."""
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    broken = isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
    if broken or kinds & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return f"another process of the run has ended, or cannot be reached ({sentence(error)})"
    return ""


def sentence(error: BaseException) -> str:
    """Kind and first line of a failure, for a note about something that the run does without."""
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
