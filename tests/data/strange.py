"""What a stranger's folder of data, of a tokenizer or of weights may have in it, to see that none of it runs."""

import pickle
from pathlib import Path


def code(folder: Path, name: str) -> Path:
    """A module there that leaves a mark when it is imported; the mark."""
    mark = folder / "executed"
    (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n", encoding="utf-8")
    return mark


def pickled(path: Path) -> Path:
    """A pickle that leaves a mark when it is loaded; the mark."""
    mark = path.parent / "executed"

    class Reduced:
        def __reduce__(self):
            return Path.touch, (mark,)

    path.write_bytes(pickle.dumps(Reduced()))
    return mark
