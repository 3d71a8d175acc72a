"""A copy of the project with edits, for tests of what an addition takes: a guide is tried by doing what it says."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    "adapters",
    "configs",
    "data",
    "kernels",
    "models",
    "trainer",
    "mytrainer.py",
    "mytrainer_guest.py",
    "naming.py",
)

Edit = tuple[
    str, str | None, str
]  # file, start of the line that the text goes behind (None: a new file), text


def edited_copy(folder: Path, edits: list[Edit]) -> Path:
    """The project in `folder/house`, edited."""
    house = folder / "house"
    house.mkdir()
    for name in PARTS:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, house / name)
    for file, start, more in edits:
        if start is None:
            (house / file).write_text(more)
            continue
        lines = (house / file).read_text().splitlines(keepends=True)
        (at,) = (i for i, line in enumerate(lines) if line.startswith(start))
        lines.insert(at + 1, more)
        (house / file).write_text("".join(lines))
    return house
