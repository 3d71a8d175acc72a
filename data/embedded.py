"""The corpus that is already there: the source of the Python standard library on the user's disk.

Nothing is shipped or downloaded. The text differs between Python versions, so scores compare only where the
fingerprint agrees. Left out: tests, third-party packages, generated files (`pydoc_data`, build settings), and
byte-identical copies.
"""

from __future__ import annotations

import os
import platform
import sysconfig
from pathlib import Path

from data.config import DataConfig
from data.corpus import Corpus, Document, drop_duplicates, fingerprint, is_held_out
from data.errors import DataError

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
)
# Written by the build or the distributor of this one Python, with local paths inside.
SKIPPED_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")


def load(cfg: DataConfig | None = None, root: Path | None = None) -> Corpus:
    """The standard library as a corpus; `root` replaces its folder in tests.

    Raises:
        DataError: this Python has no source files (an embeddable or frozen distribution).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    documents, undecodable = _read(root)
    documents, duplicates = drop_duplicates(documents)
    train = [document for document in documents if not is_held_out(document.name)]
    heldout = [document for document in documents if is_held_out(document.name)]
    if not train or not heldout:
        raise DataError(
            f"data=embedded needs the Python standard library's source, but {root} has {len(documents)} "
            f"usable .py files. Use a full Python installation, or data=text input_file=<file or folder>."
        )
    notes = (f"left out: {duplicates} duplicates, {undecodable} files that are not UTF-8",)
    name = f"standard library of Python {platform.python_version()}"
    return Corpus(name, train, heldout, fingerprint(train, heldout), notes)


def _read(root: Path) -> tuple[list[Document], int]:
    documents, undecodable = [], 0
    for relative in sorted(_source_files(root)):
        text = (root / relative).read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
            continue
        if text:
            documents.append(Document(relative, text))
    return documents, undecodable


def _source_files(root: Path) -> list[str]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_FILES):
                found.append(Path(folder, name).relative_to(root).as_posix())
    return found
