"""Where does a hierarchy cut? `python -m benchmarks.boundaries RUN OUTPUT.json [BYTES]`

Of each stage that cuts chunks, in as many bytes of held-out text: the share of its boundaries that lie where an
identifier or white space begins or ends, beside the share of all places that do, which is chance; and how long its
chunks are. Documents are read in pieces of the run's context.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from adapters.base import Annotation
from benchmarks.sessions import write
from data import load_dataset
from data.rows import select_heldout
from trainer.loaded import load

__all__ = ["edges", "shares"]

_BYTES = [chr(value) for value in range(256)]
IDENTIFIER = np.array([value >= 128 or c.isalnum() or c == "_" for value, c in enumerate(_BYTES)])
SPACE = np.array([value < 128 and c.isspace() for value, c in enumerate(_BYTES)])


def main(run: str, output: str, limit: str = "300000") -> int:
    model = load(run)
    if not model.annotate("a").spans:
        raise SystemExit(f"{run}: {model.config.type} cuts no chunks. Nearest: a run of hnet or hnet_x_nsa")
    store = load_dataset(model.config, unit="byte").heldout
    texts = (store.text(int(document)) for document in select_heldout(store, int(limit)))
    size = (model.config.val_seq_len or model.config.train_seq_len) - 1
    pieces = (text[first : first + size] for text in texts for first in range(0, len(text), size))
    found = shares(model.annotate, pieces)
    for name, figures in found["stages"].items():
        said = f"{figures['at_edges']:.1%} of boundaries at edges, {figures['bytes_per_chunk']:.2f} bytes a chunk"
        print(f"{name}: {said} (chance {found['chance']:.1%})", flush=True)
    write(output, {"run": run, "type": model.config.type, **found})
    return 0


def edges(text: bytes) -> np.ndarray:
    """(L,) bool: places at which an identifier or white space begins or ends; never the first."""
    codes = np.frombuffer(text, np.uint8)
    found = np.zeros(len(codes), dtype=bool)
    for kind in (IDENTIFIER[codes], SPACE[codes]):
        found[1:] |= kind[1:] != kind[:-1]
    return found


def shares(annotate: Callable[[bytes], Annotation], texts: Iterable[bytes]) -> dict[str, Any]:
    """`chance`, and of each stage `at_edges`, `boundaries` and `bytes_per_chunk`. The first byte of a text has no place
    in front of it, and counts in none of them but the last."""
    places = at_edges = size = 0
    counts: dict[str, list[int]] = {}  # of each stage: boundaries, those at edges, chunks
    for text in texts:
        edge = edges(text)
        places, at_edges, size = places + len(edge) - 1, at_edges + int(edge.sum()), size + len(text)
        for number, stage in enumerate(annotate(text).spans, 1):
            cut = np.array([span.start for span in stage.spans if span.start])
            so_far = counts.setdefault(f"stage {number}", [0, 0, 0])
            for n, more in enumerate((len(cut), int(edge[cut.astype(int)].sum()), len(stage.spans))):
                so_far[n] += more
    stages = {
        name: {"at_edges": at / max(cut, 1), "boundaries": cut, "bytes_per_chunk": size / chunks}
        for name, (cut, at, chunks) in counts.items()
    }
    return {"bytes": size, "chance": at_edges / places, "stages": stages}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
