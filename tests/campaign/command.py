"""A command of the project in the process of a case, under the eyes of its watch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from configs.files import CONFIGS
from tests.campaign.hostile import MARKER
from tests.campaign.jail import Watch

OK, CLEAN, FAULT, EXECUTED = "ok", "clean error", "traceback", "executed code"


@dataclass(frozen=True)
class Said:
    """How a command ended. `fault` is the traceback that it ended with."""

    status: Any
    out: str
    err: str
    fault: str = ""


def say(
    words: list[str],
    folder: Path,
    watch: Watch,
    *,
    writes: bool = True,
    also: tuple[Path, ...] = (),
    programs: tuple[str, ...] = (),
) -> Said:
    """Run one command line in `folder`, within what `Watch.arm` allows."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")  # as in a terminal
    fault, status = "", None
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(logging.root, "handlers", []),
        mock.patch.object(tempfile, "tempdir", str(folder)),
    ):
        import mytrainer

        words = [os.fsdecode(os.fsencode(w)) if w.isprintable() else w for w in words]
        watch.arm(folder, writes=writes, also=also, programs=programs)
        try:
            status = mytrainer.main(words)
        except SystemExit as leaving:
            status = leaving.code
        except BaseException:
            fault = traceback.format_exc()
        watch.armed = False
    return Said(status, _written(out), _written(err), fault)


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode(errors="backslashreplace")  # type: ignore[attr-defined]


def outcome(said: Said, folder: Path, watch: Watch, statuses: tuple[int, ...] = (2,)) -> tuple[str, str]:
    """(outcome, what was seen) of a command, which may end well or with a message and one of `statuses`."""
    if watch.seen is not None:
        return watch.seen.outcome, str(watch.seen)
    if (folder / MARKER).exists():
        return EXECUTED, "the bait was run"
    if said.fault or "Traceback (most recent call last)" in said.err:
        return FAULT, _where(said.fault or said.err)
    if said.status in (0, None):
        return OK, ""
    told = said.err.strip()
    if said.status in statuses and told:
        return CLEAN, ""
    return FAULT, f"status {said.status!r}: {told[-300:]}"


def _where(fault: str) -> str:
    """The last place in the project of a traceback, and its last line."""
    places = [line.strip() for line in fault.splitlines() if line.strip().startswith("File ")]
    ours = [p for p in places if str(CONFIGS.parent) in p and "/tests/campaign/" not in p] or places
    last = ours[-1].replace(str(CONFIGS.parent) + "/", "") if ours else ""
    return f"{last}: {fault.strip().splitlines()[-1][:300]}"
