"""Runs side by side: compare.html, which needs no network, no script library and no running server, compare.md beside
it, and all of it as JSON. Everything is read from run folders."""

from trainer.view.comparison.apart import set_apart
from trainer.view.comparison.pages import write_pages
from trainer.view.comparison.runs import Run, read_run

__all__ = ["Run", "read_run", "set_apart", "write_pages"]
