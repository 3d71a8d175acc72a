"""Adapters on every architecture: `python -m benchmarks.lora OUTPUT.json TEXT [TYPE,TYPE | all] [overrides]`

A base of each type is trained on Python's own library, and then, with its weights as they are, adapters on TEXT, a
file or folder, for as many steps (`num_iterations=100`). Told are the matrices that are adapted, the share of numbers
that is trained, sizes of both checkpoints, bits per byte of the held-out part of TEXT before and after, and how far
adapters that were added to their weights are from adapters beside them.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mytrainer
from benchmarks.sessions import without_a_base, write
from data.scored import text_to_score
from trainer.run.checkpoint import checkpoints_in
from trainer.run.restore import restore

WORDS = ["preset=nano", "num_iterations=100", "val_loss_every=0", "sample_tokens=0", "save_minutes=null"]
LORA = ["use_lora=true", "lora_rank=8", "lora_alpha=16", "lora_dropout=0", "lora_lr=0.003"]


def main(output: str, text: str, types: str = "all", *words: str) -> int:
    found: dict[str, Any] = {"text": text, "overrides": words, "architectures": {}}
    for type_ in without_a_base() if types == "all" else types.split(","):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            f = adapted(type_, text, [*WORDS, *words], Path(folder))
        found["architectures"][type_] = {**f, "seconds": time.perf_counter() - began}
        print(
            f"{type_:<17}{', '.join(f['targets']):<40}{f['share']:>7.2%}   {f['before']:.3f} -> {f['after']:.3f} "
            f"bits/byte   merged {f['merged_off']:.1e} off",
            flush=True,
        )
        write(output, found)
    return 0


def adapted(type_: str, text: str, words: list[str], folder: Path) -> dict[str, Any]:
    """Figures of one architecture, whose runs lie in `folder` afterwards."""
    base, run = folder / "base", folder / "adapted"
    file = f"--hydra_model_cfg=configs/{type_}.yaml"
    with redirect_stdout(sys.stderr):
        mytrainer.train([file, *words, f"output_dir={base}"])
        more = [f"init_from_checkpoint={base}", f"input_file={text}", f"output_dir={run}"]
        mytrainer.train([file, *LORA, *words, *more])
    beside, before = (restore(path, changes={"mixed_precision": "no"}) for path in (run, base))
    rows = beside.rows(text_to_score(beside.cfg, beside.cfg, beside.tokenizer).store, beside.cfg.val_bytes)
    targets = [target.path for target in beside.adapter.adapted]
    trained = sum(p.numel() for p in beside.adapter.parameters() if p.requires_grad)
    total = beside.adapter.parameter_count
    scores = [before.score(rows), beside.score(rows)]
    beside.merge()
    first, after, merged = (found.bits_per_byte for found in [*scores, beside.score(rows)] if found)
    return {
        "targets": list(dict.fromkeys(path.rpartition(".")[2] for path in targets)),
        "matrices": len(targets),
        "parameters": total,
        "trained": trained,
        "share": trained / total,
        "checkpoint_bytes": {"base": sizes_of(base), "adapted": sizes_of(run)},
        "before": first,
        "after": after,
        "merged_off": abs(merged / after - 1),
        "bytes": rows.total_bytes,
    }


def sizes_of(run: Path) -> dict[str, int]:
    """Bytes of weights and of the optimizer's state in its last checkpoint."""
    return {name: (checkpoints_in(run)[-1] / name).stat().st_size for name in ("model.pt", "optimizer.pt")}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
