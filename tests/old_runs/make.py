"""Record one small run of each architecture, which all later code must resume, score and sample from.

    python tests/old_runs/make.py <type> ...

Run it for a new architecture, or to record one anew on purpose. The archives stand for the runs on people's disks:
whoever replaces one gives up the proof that those still work, and says so in CHANGELOG.md.

`<type>.tar.xz` is a run folder whose newest checkpoint is in the middle of the run, as if what came after had been
lost. `expected.json` holds, by type, what the code that recorded it makes of that folder: its score, a text, and how
the run ends when it goes on.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXPECTED = HERE / "expected.json"
KEPT_STEP = 4
KEPT = [
    "config.yaml",
    "manifest.json",
    "metrics.jsonl",
    "summary.json",
    "samples.txt",
    f"checkpoint-{KEPT_STEP}",
]

SIZES = ["model_cfg.n_ctx=32", "model_cfg.d_model=16", "model_cfg.n_layers=2", "model_cfg.n_heads=2"]
# Few noise draws and sampler steps, so that the tests are quick; the rest is what the model files say.
_DIT = ["model_cfg.cond_dim=16", "model_cfg.nelbo_draws=4"]
EXTRA: dict[str, list[str]] = {
    "d3pm": [*_DIT, "model_cfg.num_timesteps=50", "model_cfg.sampling_timesteps=8"],
    "mdl": [*_DIT, "model_cfg.num_sampling_steps=8"],
    "sedd": [*_DIT, "model_cfg.sampling_timesteps=8"],
    "bd3lm": [*_DIT, "model_cfg.num_sampling_steps=8", "model_cfg.block_length=8"],
}
# An evaluation before the kept checkpoint (bd3lm learns from it), accumulation, and an average that has moved. High
# rates: what optimizer, average or dropout get wrong must show in a few steps.
RUN = [
    "preset=none",
    "data=synthetic",
    "synthetic_bytes=20000",
    "train_seq_len=32",
    "global_batch_size=4",
    "batch_size=2",
    "num_iterations=8",
    f"val_loss_every={KEPT_STEP}",
    "logging_steps=1",
    "learning_rate=0.01",
    "muon_learning_rate=0.04",
    "ema_decay=0.9",
    "sample_tokens=8",
    f"save_steps={KEPT_STEP}",
    "save_minutes=null",
    "device=cpu",
    "mixed_precision=no",
]


def eval_words(run: str) -> list[str]:
    return ["eval", "--checkpoint", run, "--device", "cpu"]


def generate_words(run: str) -> list[str]:
    return ["generate", "--checkpoint", run, "--max_new_tokens", "16", "--seed", "0", "--device", "cpu"]


def unpack(type_: str, folder: Path) -> Path:
    """The run folder of the archive, made in `folder`."""
    with tarfile.open(HERE / f"{type_}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / type_


def losses_after(run: Path, step: int) -> dict[str, float]:
    """Training losses of the steps after `step`. Keys are text, as in JSON."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {str(line["step"]): line["loss"] for line in lines if "loss" in line and line["step"] > step}


def token_count(stderr: str) -> int:
    """How many tokens `generate` says it made."""
    found = re.search(r"^(\d+) tokens, ", stderr, re.MULTILINE)
    assert found, stderr
    return int(found[1])


def record(type_: str) -> dict[str, Any]:
    """Train a run and archive it; returns what is expected of the archive."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # A link, so that the recorded command line names no folder of this machine.
        (work / "mytrainer.py").symlink_to(ROOT / "mytrainer.py")
        model = [f"--hydra_model_cfg=configs/{type_}.yaml", *SIZES, *EXTRA.get(type_, [])]
        _command(work, *model, *RUN, f"output_dir={type_}")
        _pack(work / type_)
        (work / type_).rename(work / "whole")
        run = unpack(type_, work)
        score = json.loads(_command(work, *eval_words(type_)).stdout)["score"]
        text = _command(work, *generate_words(type_))
        _command(work, f"resume={type_}")
        return {
            "bits_per_byte": score["bits_per_byte"],
            "text": text.stdout,
            "tokens": token_count(text.stderr),
            "losses": losses_after(run, KEPT_STEP),
            "final_bits_per_byte": json.loads((run / "summary.json").read_text())["score"]["bits_per_byte"],
        }


def _command(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "mytrainer.py", *words], cwd=work, env=env, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done


def _pack(run: Path) -> None:
    """Archive what `resume`, `eval` and `generate` read and a person keeps, without owners and times."""
    # The only place where a run names the checkout it came from: the comment on the model file.
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"{ROOT}/", ""))

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(HERE / f"{run.name}.tar.xz", "w:xz", preset=9) as archive:
        for name in KEPT:
            archive.add(run / name, f"{run.name}/{name}", filter=anonymous)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for type_ in sys.argv[1:]:
        expected[type_] = record(type_)
    EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
