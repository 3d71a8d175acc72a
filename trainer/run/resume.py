"""Which checkpoint a run goes on from, and whether it may; and a start from the weights of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs import trust
from configs.grammar import in_quotes, word
from configs.schema import redacted
from configs.validate import read_saved
from data import SOURCES
from data.mix_rows import MixedRows
from data.tokenizers import Tokenizer
from naming import command_line
from trainer.run.checkpoint import NotAsWritten, checkpoints_in, find_checkpoint, newest_checkpoint
from trainer.run.facts import architecture, execution
from trainer.run.source import Source, require_same_provenance

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from data.rows import TrainingRows
    from trainer.run.folder import RunFolder
    from trainer.session import Session
    from trainer.view.console import Console

__all__ = [
    "check_resumable",
    "checkpoint_to_resume",
    "go_on_mixing",
    "load_optimizers",
    "require_same_tokenizer",
    "scores_alike",
    "start_from_weights",
    "tokenizer_to_take",
]

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
    once = partial(folder.say_once, say=warn)
    newest = newest_checkpoint(folder.path, once, folder.wrong_with)
    if cfg.resume == "auto":
        if newest is None and (damaged := checkpoints_in(folder.path)):
            raise ValueError(
                f"no checkpoint of {folder.path} is sound ({', '.join(p.name for p in damaged)}). Move them away to "
                f"start anew, or choose another output_dir"
            )
        if newest is None and folder.holds_a_run():
            warn(
                f"{folder.path} holds no checkpoint: its run ended before the first one, and starts over at step 0"
            )
        return newest
    found = find_checkpoint(cfg.resume, once, folder.wrong_with)
    if newest is not None and found.resolve() != newest.resolve():
        again = " ".join([in_quotes("resume", folder.path), *trust.words(cfg.type, cfg.model_adapter)])
        raise ValueError(
            f"{folder.path} holds {newest.name}, which going on from {found} would overwrite. Choose a new output_dir "
            f"to branch off, or {again}"
        )
    return found


def tokenizer_to_take(cfg: RunConfig, source: Source) -> Tokenizer | None:
    """The tokenizer that weights were trained with, where the run leaves it open or names it as they do. None where it
    names another: that one is made, and refused unless it comes to the same."""
    return source.tokenizer if cfg.tokenizer in ("auto", *source.tokenizer_names) else None


def require_same_tokenizer(cfg: RunConfig, source: Source, mine: Tokenizer) -> None:
    """ValueError where the tokenizer of a run is not the one whose tokens the weights know."""
    theirs = source.tokenizer
    if theirs.digest != mine.digest:
        raise ValueError(
            f"tokenizer: '{cfg.tokenizer}' is another than the {theirs.name} of {source.path}, whose weights know "
            f"the tokens of that one alone. Leave it at tokenizer=auto, which takes theirs"
        )


def check_resumable(
    s: Session, checkpoint: Path, saved: dict[str, Any], note: Callable[[str], None]
) -> RunConfig:
    """Refuse what would silently be another run; announce what changes results or rounding. Returns the configuration
    that the checkpoint was trained with."""
    theirs = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    mine = architecture(s.cfg, s.adapter, s.plan.micro_rows)
    # A field that is younger than the checkpoint had no effect then, as its default has none now.
    before, _ = read_saved(saved["training_config"], theirs["model_cfg"], str(checkpoint), [])
    then = before.model_cfg
    other = [k for k in mine["model_cfg"] if mine["model_cfg"][k] != then.get(k)]
    differing = [k for k in other if k not in s.adapter.model_cfg.free()]
    if theirs["type"] != mine["type"] or differing:
        what = ", ".join(f"{k} {then.get(k)} -> {mine['model_cfg'][k]}" for k in differing)
        raise NotAsWritten(
            f"the architecture is fixed by {checkpoint}/config.json (type {theirs['type']}): {what}"
        )
    require_same_provenance(s.adapter, theirs, checkpoint)
    then_text, text = saved["data"]["fingerprint"], s.dataset.fingerprint
    renamed = saved["data"].get("content") == s.dataset.content
    if then_text != text and renamed:
        note("files of the text have other names than before; what is read, and in which order, is the same")
    elif then_text != text:
        raise ValueError(
            f"the data is not what {checkpoint} was trained on (fingerprint {then_text[:12]} then, {text[:12]} now). "
            f"{_mended(before, saved['data'], s)}, or start a new run with "
            f"{in_quotes('init_from_checkpoint', checkpoint)}"
        )
    if before.optimizer != s.cfg.optimizer:
        raise ValueError(
            f"optimizer: the state in {checkpoint} was written by another optimizer, {before.optimizer}, and means "
            f"nothing to {s.cfg.optimizer}. Go on with optimizer={before.optimizer}, or begin a new run from the "
            f"weights: {_begin_anew(checkpoint, s.cfg, f'optimizer={s.cfg.optimizer}')}"
        )
    if before.packing != s.cfg.packing and s.cfg.training_mode == "pretraining":
        was, now = (f"packing={str(cfg.packing).lower()}" for cfg in (before, s.cfg))
        raise ValueError(
            f"packing: a place in packed text is none in padded rows. Go on with {was}, or begin a new run from the "
            f"weights: {_begin_anew(checkpoint, s.cfg, now)}"
        )
    old = {**redacted(before), **{f"model_cfg.{k}": then.get(k) for k in other}}
    new = {**redacted(s.cfg), **{f"model_cfg.{k}": mine["model_cfg"][k] for k in other}}
    changed = [k for k in new if k not in _NOT_COMPARED and old[k] != new[k]]
    for key in changed:
        note(f"changed since the checkpoint: {key} {old[key]} -> {new[key]}")
    if "train_seq_len" in changed:
        note(s.rows.change_of_length(before.train_seq_len, saved["position"]))
    for key, now in execution(s).items():
        recorded = saved["execution"].get(key, now)  # what was not recorded yet is not known to differ
        if recorded != now:
            note(f"{key} was {recorded} and is {now}: equal to rounding from here, not bit for bit")
    return before


def go_on_mixing(rows: TrainingRows, saved: dict[str, Any]) -> str:
    """Let the stages of a mixture end where they were to end when the run began, whatever its length is now: its text
    goes on as it was. A note where that is another place, else nothing."""
    if not isinstance(rows, MixedRows):
        return ""
    now = rows.stage_ends
    rows.go_on(saved["mix"])
    if rows.stage_ends == now:
        return ""
    kept, new = (" and ".join(f"{end:,.0f}" for end in ends) for ends in (rows.stage_ends, now))
    return (
        f"the stages of the mixture end after {kept} bytes, as when the run began (a new run of this length: {new}); "
        f"the last one goes on to its end"
    )


def _begin_anew(checkpoint: Path, cfg: RunConfig, *words: str) -> str:
    """The command for a new run like that of a checkpoint, from its weights. `cfg`: of the run that needs it."""
    config, weights = checkpoint.parent / "config.yaml", word("init_from_checkpoint", checkpoint)
    trusted = trust.words(cfg.type, cfg.model_adapter)
    return command_line(config, *words, weights, "output_dir=NEW", *trusted)


def load_optimizers(s: Session, state: dict[str, Any], checkpoint: Path) -> None:
    """Go on with the optimizers' state. Where an architecture has changed, its weights may fit and this not."""
    try:
        s.optimizers.load_state_dict(state)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint}: {error}. Its parameters have other roles by now; a new run can begin from the weights: "
            f"{_begin_anew(checkpoint, s.cfg)}"
        ) from None


def scores_alike(before: RunConfig, now: RunConfig) -> bool:
    """Whether evaluations along the way score the same text with weights of the same kind, so that the best score of
    the one is one of the other."""

    def scored(cfg: RunConfig) -> tuple[object, ...]:
        length = cfg.val_seq_len or cfg.train_seq_len
        return (
            length,
            cfg.val_bytes_interim or cfg.val_bytes,
            cfg.val_tokens,
            cfg.val_steps,
            cfg.ema_decay > 0,
        )

    return scored(before) == scored(now)


def _mended(before: RunConfig, data: dict[str, Any], s: Session) -> str:
    """How to have the data of a run again: what it set otherwise, else the text itself."""
    chosen = {
        "data",
        "near_copies",
        "training_mode",
        *(name for source in SOURCES.values() for name in source.reads),
    }
    other = [n for n in sorted(chosen) if getattr(before, n) != getattr(s.cfg, n)]
    if "mix" in other:
        return "Leave its mix (sources, files and weights) as its config.yaml has it"
    if other:
        return f"Set what it had: {' '.join(f'{n}={getattr(before, n)}' for n in other)}"
    now = s.dataset.identity()
    changed = [
        f"{k} {data[k]} then, {now[k]} now"
        for k in ("name", "documents", "bytes")
        if data.get(k, now[k]) != now[k]
    ]
    return f"Restore the data ({'; '.join(changed) or 'its bytes, names and files'})"


def start_from_weights(s: Session, source: Source, console: Console) -> None:
    """Take the weights of a source, and their average where both keep one; optimizer and step start anew."""
    if source.type != s.cfg.type and s.cfg.eval_only:
        raise ValueError(
            f"init_from_checkpoint: {source.path} holds a {source.type}, and this run would score it as a "
            f"{s.cfg.type}. Set type={source.type}, or train from these weights (eval_only=false)"
        )
    if source.type != s.cfg.type:
        console.warn(f"the weights of {source.path} were trained as {source.type}; this run is {s.cfg.type}")
    took = f"weights and tokenizer ({s.dataset.tokenizer.name})"
    if s.cfg.use_lora:  # the model was made with them
        console.note(f"adapters beside the {took} of {source.path}, which stay as they are")
        return
    source.begin(s, console.note)
    s.adapter.constrain(torch.zeros((), device=s.world.device))
    if s.ema:
        average = None if source.adapts else source.average()
        s.ema.restart(average and s.adapter.with_added(average))
    console.note(f"{took} from {source.path}; optimizer and step start anew")
