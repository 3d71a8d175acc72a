"""What do documents cost attention? `python -m benchmarks.documents OUTPUT.json [overrides]`

A step as trained, on text of documents of 100 to 500 bytes, takes turns with one that sees each row as a single
document. The kernels of both are listed by name, which says what attention ran on. More than 10 % is too much.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from adapters.base import Prepared
from benchmarks.sessions import opened, step, write
from models.layers.decoder import Hidden
from trainer.commands.bench import profile
from trainer.commands.bench.turns import interleaved, median_ratio
from trainer.session import Session

TURNS = 10
DOCUMENTS = 5000
SEPARATOR = "----"


def main(output: str, *words: str) -> int:
    found: dict[str, Any] = {"overrides": list(words), "architectures": {}}
    with tempfile.TemporaryDirectory() as scratch:
        text = [f"input_file={_text(Path(scratch))}", f"document_separator={SEPARATOR}", "tokenizer=byte"]
        return _both(output, found, [*words, "data=text", *text])


def _both(output: str, found: dict[str, Any], words: list[str]) -> int:
    for type_ in ("gpt2", "vanilla"):
        found["architectures"][type_] = figures = _compare(type_, words)
        print(f"{type_:<10}with documents {figures['times_without']:.3f} times one without", flush=True)
        write(output, found)
    return 0


def _text(folder: Path) -> Path:
    """Documents of random letters, of a length that lets some of them stand in a row."""
    draw = random.Random(0)
    documents = ("".join(draw.choices("abcdefgh ", k=draw.randint(100, 500))) for _ in range(DOCUMENTS))
    file = folder / "documents.txt"
    file.write_text(f"\n{SEPARATOR}\n".join(documents), encoding="utf-8")
    return file


def _compare(type_: str, words: list[str]) -> dict[str, Any]:
    s, plain = opened(type_, words), opened(type_, words)
    _see_one_document(plain)
    sides: dict[str, Callable[[int], object]] = {"with": partial(step, s), "without": partial(step, plain)}
    seconds = interleaved(sides, TURNS, s.world.device)
    tokens = s.plan.rows * s.cfg.train_seq_len
    ids = s.loader.load(0).micro[0].tensors["doc_ids"]
    return {
        "documents_per_row": 1 + float((ids[:, 1:] != ids[:, :-1]).sum(1).float().mean()),
        "tokens_per_second": {side: tokens / statistics.median(t) for side, t in seconds.items()},
        "times_without": median_ratio(seconds["with"], seconds["without"]),
        "profile": {side: profile.by_name(run, s.world.device) for side, run in sides.items()},
    }


def _see_one_document(s: Session) -> None:
    model = s.adapter.model

    def hidden(prepared: Prepared) -> Hidden:
        return Hidden(model(prepared.tensors["inputs"]))

    s.adapter.hidden = hidden  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
