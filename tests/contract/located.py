"""What names an architecture for the contract tests. Imports no torch: a wrong name is told before anything starts."""

from collections.abc import Iterable
from pathlib import Path

from configs.files import read_model
from configs.trust import NAMES_CODE, foreign_modules
from models import ARCHITECTURES
from naming import not_one_of


def located(name: str, folder: Path) -> str:
    """A type of the table as it is, the path of a YAML file in full. ValueError if it is neither."""
    if name in ARCHITECTURES:
        return name
    if not (folder / name).is_file():
        raise ValueError(f"no such file, and {not_one_of(name, sorted(ARCHITECTURES))}")
    return str((folder / name).resolve())


def code_of(names: Iterable[str]) -> str:
    """The modules outside of the table that such files name, which who names the files trusts."""
    nodes = [read_model(Path(name)) for name in names if name not in ARCHITECTURES]
    found = {m for node in nodes for f in NAMES_CODE for m in foreign_modules(f, [node.stated(f)])}
    return ",".join(sorted(found))
