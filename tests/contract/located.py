"""What names an architecture for the contract tests. Imports no torch: a wrong name is told before anything starts."""

from pathlib import Path

from models import ARCHITECTURES
from naming import not_one_of


def located(name: str, folder: Path) -> str:
    """A type of the table as it is, the path of a YAML file in full. ValueError if it is neither."""
    if name in ARCHITECTURES:
        return name
    if not (folder / name).is_file():
        raise ValueError(f"no such file, and {not_one_of(name, sorted(ARCHITECTURES))}")
    return str((folder / name).resolve())
