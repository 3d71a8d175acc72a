"""Which checkpoint a run goes on from, and whether it may; and a start from the weights of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.schema import redacted
from configs.validate import read_saved
from data import SOURCES
from trainer.run.checkpoint import checkpoints_in, find_checkpoint, load_json, load_tensors, newest_checkpoint
from trainer.run.facts import architecture, execution
from trainer.run.fitted import with_own_fits
from trainer.run.restore import load_weights, require_same_provenance

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from trainer.run.folder import RunFolder
    from trainer.session import Session
    from trainer.view.console import Console

__all__ = ["check_resumable", "checkpoint_to_resume", "start_from_weights"]

# Where a run is and how long it may go on do not make it another run.
# The architecture is compared apart.
_NOT_COMPARED = {
    "type",
    "model_cfg",
    "resume",
    "output_dir",
    "model_name",
    "preset",
    "env",
    "init_from_checkpoint",
}


def checkpoint_to_resume(cfg: RunConfig, folder: RunFolder, warn: Callable[[str], None]) -> Path | None:
    """What `resume` means in this folder; None = start anew."""
    if cfg.resume == "none":
        folder.refuse_to_overwrite()
        return None
    newest = newest_checkpoint(folder.path, warn)
    if cfg.resume == "auto":
        if newest is None and (damaged := checkpoints_in(folder.path)):
            raise ValueError(
                f"no checkpoint of {folder.path} is sound ({', '.join(p.name for p in damaged)}). Move them away to "
                f"start anew, or choose another output_dir"
            )
        return newest
    found = find_checkpoint(cfg.resume, warn)
    if newest is not None and found.resolve() != newest.resolve():
        raise ValueError(
            f"{folder.path} holds {newest.name}, which going on from {found} would overwrite. Choose a new output_dir "
            f"to branch off, or resume={folder.path}"
        )
    return found


def check_resumable(s: Session, checkpoint: Path, saved: dict[str, Any], note: Callable[[str], None]) -> None:
    """Refuse what would silently be another run; announce what changes results or rounding."""
    theirs = json.loads((checkpoint / "config.json").read_text())
    mine = architecture(s)
    # A field that is younger than the checkpoint had no effect then, as its default has none now.
    before, _ = read_saved(saved["training_config"], theirs["model_cfg"], str(checkpoint), [])
    then = before.model_cfg
    other = [k for k in mine["model_cfg"] if mine["model_cfg"][k] != then.get(k)]
    differing = [k for k in other if k not in s.adapter.model_cfg.free()]
    if theirs["type"] != mine["type"] or differing:
        what = ", ".join(f"{k} {then.get(k)} -> {mine['model_cfg'][k]}" for k in differing)
        raise ValueError(
            f"the architecture is fixed by {checkpoint}/config.json (type {theirs['type']}): {what}"
        )
    require_same_provenance(s.adapter, theirs, checkpoint)
    for key, now in (
        ("fingerprint", s.dataset.fingerprint),
        ("tokenizer_digest", s.dataset.tokenizer.digest),
    ):
        if saved["data"][key] != now:
            raise ValueError(
                f"the data is not what {checkpoint} was trained on ({key} {saved['data'][key][:12]} then, "
                f"{now[:12]} now). {_mended(before, saved['data'], s)}, or start a new run with "
                f"init_from_checkpoint={checkpoint}"
            )
    old = {**redacted(before), **{f"model_cfg.{k}": then.get(k) for k in other}}
    new = {**redacted(s.cfg), **{f"model_cfg.{k}": mine["model_cfg"][k] for k in other}}
    changed = [k for k in new if k not in _NOT_COMPARED and old[k] != new[k]]
    for key in changed:
        note(f"changed since the checkpoint: {key} {old[key]} -> {new[key]}")
    if "train_seq_len" in changed:
        twice, never = s.rows.changed_length(before.train_seq_len, saved["position"])
        note(f"with rows of another length {twice:.1%} of this epoch's text is read twice, {never:.1%} never")
    for key, now in execution(s).items():
        recorded = saved["execution"].get(key)
        if recorded != now:
            note(f"{key} was {recorded} and is {now}: equal to rounding from here, not bit for bit")


def _mended(before: RunConfig, data: dict[str, Any], s: Session) -> str:
    """How to have the data of a run again: what it set otherwise, else the text itself."""
    chosen = {"data", "near_copies", *(name for source in SOURCES.values() for name in source.reads)}
    then = [f"{n}={getattr(before, n)}" for n in sorted(chosen) if getattr(before, n) != getattr(s.cfg, n)]
    if then:
        return f"Set what it had: {' '.join(then)}"
    if data.get("name", s.dataset.name) != s.dataset.name:
        return f"Restore the data ({data['name']} then, {s.dataset.name} now)"
    return "Restore the data"


def start_from_weights(s: Session, source: Path, console: Console) -> None:
    """Take the weights of a checkpoint, and their average where both keep one; optimizer and step start anew."""
    saved = load_json(source, "config.json")
    if saved["type"] != s.cfg.type and s.cfg.eval_only:
        raise ValueError(
            f"init_from_checkpoint: {source} holds a {saved['type']}, and this run would score it as a {s.cfg.type}. "
            f"Set type={saved['type']}, or train from these weights (eval_only=false)"
        )
    if saved["type"] != s.cfg.type:
        console.warn(f"the weights of {source} were trained as {saved['type']}; this run is {s.cfg.type}")
    require_same_provenance(s.adapter, saved, source)
    state = with_own_fits(s, source, load_tensors(source, "model.pt"), console.note)
    load_weights(s.adapter, state, f"{source}/model.pt")
    s.adapter.constrain(torch.zeros((), device=s.world.device))
    if s.ema:
        averaged = source / "ema.pt"
        s.ema.restart(load_tensors(source, "ema.pt")["shadow"] if averaged.is_file() else None)
    console.note(f"weights from {source}; optimizer and step start anew")
