"""Text that is written in no particular order: how a terminal shows it while it resolves, and how gaps are typed."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

from data.tokenizers import Tokenizer, text_of
from trainer.view.stream import of_our_own

__all__ = ["GAP", "TextView", "with_gaps"]

GAP = "____"
UNDECIDED = "░"
SECONDS_PER_FRAME = 0.04


class TextView:
    """The present state of one text, drawn over the last one. A token that is undecided is a shaded block.

    Only the last rows that fit the terminal are drawn: a cursor cannot move back to what has scrolled away.
    """

    def __init__(self, tokenizer: Tokenizer, stream: TextIO | None = None) -> None:
        self.tokenizer, self.stream = tokenizer, of_our_own(stream or sys.stdout)
        self.lines = 0  # of the last frame, above and including the cursor's
        self.shown_at = 0.0

    def show(self, tokens: list[int | None]) -> None:
        """Draw, at most 25 times a second; the last state may be left out, as the text is printed after it."""
        now = time.monotonic()
        if now - self.shown_at < SECONDS_PER_FRAME:
            return
        self.shown_at = now
        size = shutil.get_terminal_size()
        rows = wrap(self.render(tokens), max(1, size.columns - 1))[-max(1, size.lines - 2) :]
        self.wipe()
        self.stream.write("\n".join(rows))
        self.stream.flush()
        self.lines = len(rows)

    def render(self, tokens: list[int | None]) -> str:
        """The text, with undecided tokens as blocks; bytes that are no character yet become a replacement mark."""
        out, run = [], []
        for place, token in enumerate([*tokens, None]):
            if token is not None:
                run.append(token)
                continue
            begins = len(run) == place
            raw = text_of(self.tokenizer, run) if begins else self.tokenizer.decode(run)
            out.append(raw.decode("utf-8", errors="replace"))
            out.append(UNDECIDED)
            run = []
        return "".join(c if c == "\n" or c.isprintable() else " " for c in "".join(out[:-1]))

    def wipe(self) -> None:
        """Take the last frame off the screen."""
        if self.lines:
            up = f"\x1b[{self.lines - 1}A" if self.lines > 1 else ""
            self.stream.write(f"\r{up}\x1b[J")
            self.stream.flush()
        self.lines = 0


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; at least one."""
    rows: list[str] = []
    for line in text.split("\n"):
        rows += [line[i : i + width] for i in range(0, max(len(line), 1), width)]
    return rows


def with_gaps(text: str, tokenizer: Tokenizer, gap_tokens: int) -> list[int | None]:
    """Tokens of a text, or of the file of that name, with `gap_tokens` Nones for each `____` in it.

    Raises ValueError if there is no gap.
    """
    if gap_tokens < 1:
        raise ValueError(f"gap_tokens: must be at least 1, got {gap_tokens}")
    if _is_file(text):
        text = Path(text).read_text(encoding="utf-8")
    elif "/" in text and Path(text).suffix and not any(c.isspace() for c in text):
        raise ValueError(f"infill: no such file: {text}")
    pieces = text.split(GAP)
    if len(pieces) == 1:
        raise ValueError(f"infill: there is no gap in the text. Write {GAP} where it is to be filled")
    out: list[int | None] = list(tokenizer.encode(pieces[0]).tolist())
    for piece in pieces[1:]:
        out += [*[None] * gap_tokens, *tokenizer.encode_inside(piece).tolist()]
    return out


def _is_file(text: str) -> bool:
    """Text may be no possible name: too long, or with a null byte."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False
