"""What a run is, as plain values: read off its session, written nowhere."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from adapters.rates import COMPONENTS
from configs.schema import redacted
from data.mix_rows import MixedRows
from kernels.choose import Call
from kernels.precision import compute_dtype
from trainer.bench.counting import Text, text_of_dataset
from trainer.bench.targets import told_of_length, told_of_size
from trainer.optim.optimizers import role_table
from trainer.precision import autocast
from trainer.run.checkpoint import FORMAT
from trainer.run.manifest import collect_environment
from trainer.run.progress import Progress
from trainer.view.format import quantity

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import RunConfig
    from trainer.evaluate import Score
    from trainer.session import Session

__all__ = [
    "Facts",
    "architecture",
    "checkpoint_contents",
    "execution",
    "facts_of",
    "kernels_of",
    "summary_of",
]


@dataclass(frozen=True)
class Facts:
    """What whoever keeps a record of a run is told before its first step."""

    path: Path  # the run folder
    step: int  # optimizer steps done: 0, or where a resumed run goes on
    config: dict[str, Any]  # every field of the run, without secrets
    manifest: dict[str, Any]
    banner: list[str]
    notes: list[str]  # of the data, and of what is not read
    console_metrics: tuple[str, ...] = ()  # those that the adapter wants on the live line


def facts_of(s: Session, path: Path, step: int) -> Facts:
    manifest = _manifest(s)
    ops = manifest["kernels"]
    unread = [
        f"kernels.{op} is not read by this run, which uses {', '.join(ops) or 'no such operation'}"
        for op in s.adapter.kernels.unread(ops)
    ]
    unread += [
        f"{names[0]} is not read by this run: no parameter of {s.cfg.type} plays the role {role}"
        for role, names in COMPONENTS.items()
        if role != "adapter" and role not in manifest["parameters"]["by_role"]
        if getattr(s.cfg, names[0]) != type(s.cfg).model_fields[names[0]].default
    ]
    if s.adapter.still:
        unread.append(f"at a rate of 0, these roles stay as they are: {', '.join(s.adapter.still)}")
    return Facts(
        path=path,
        step=step,
        config=redacted(s.cfg),
        manifest=manifest,
        banner=_banner(s, manifest, path),
        notes=[*s.dataset.notes, *unread],
        console_metrics=s.adapter.console_metrics,
    )


def kernels_of(s: Session) -> dict[str, dict[str, str]]:
    """Operation of `kernels/` -> implementation -> why: what has run so far, else what training is going to take."""
    kernels, device = s.adapter.kernels, s.world.device
    with autocast(s.precision, device):
        dtype = compute_dtype(next(s.adapter.parameters()))
    calls = s.adapter.kernel_calls(s.plan.micro_rows, s.cfg.train_seq_len)
    if not s.cfg.eval_only:
        calls |= s.optimizers.kernel_calls()
    expected = {}
    for op, known in calls.items():
        # What has rows of logits is called by the adapter; everything else by layers, which compiled blocks consist of.
        known = {"compiling": s.compiled and "rows" not in known, **known}
        expected[op] = dict([kernels.foresee(op, Call(device, dtype, **known))])
    return {**expected, **kernels.used}


def _manifest(s: Session) -> dict[str, Any]:
    roles = _roles(s)
    flops = s.adapter.cost(s.cfg.train_seq_len)
    return {
        "type": s.cfg.type,
        "host": socket.gethostname(),
        "began": time.time(),  # this life of it
        "environment": collect_environment(s.world.device),
        "kernels": kernels_of(s),
        "precision": s.precision,
        "compiled": s.compiled,
        "execution": execution(s),
        "depends_on_split": s.adapter.depends_on_split,
        "data": {
            "name": s.dataset.name,
            "fingerprint": s.dataset.fingerprint,
            "content": s.dataset.content,
            "train_bytes": s.dataset.train.total_bytes,
            "heldout_bytes": s.dataset.heldout.total_bytes,
            "tokenizer": s.dataset.tokenizer.name,
            "tokenizer_digest": s.dataset.tokenizer.digest,
            "overlap": s.dataset.overlap and s.dataset.overlap.as_dict(),
        },
        "parameters": {**parameters_of(s), "by_role": _by_role(roles)},
        "roles": roles,
        "flops_per_token": {"forward": flops.forward_per_token, "training": flops.training_per_token},
        **_targets(s, lambda name: _planned(s, name)),
        "argv": sys.argv,
    }


def _targets(s: Session, came_to: Callable[[str], float]) -> dict[str, Any]:
    """`match` and `budget` of a run that has them. `came_to`: what its length comes to, of a quantity of `budget`."""

    def text() -> Text:
        return text_of_dataset(s.dataset, s.cfg.train_seq_len)

    return {**told_of_size(s.cfg, s.adapter, text), **told_of_length(s.cfg, came_to)}


def _planned(s: Session, name: str) -> float:
    tokens = s.loader.stages.rows_before(s.total_steps) * s.cfg.train_seq_len
    if name == "flops":
        return tokens * s.adapter.cost(s.cfg.train_seq_len).training_per_token
    return (
        tokens * text_of_dataset(s.dataset, s.cfg.train_seq_len).bytes_per_token
        if name == "bytes"
        else tokens
    )


def _roles(s: Session) -> list[dict[str, Any]]:
    return role_table(s.adapter.counted_parameters(), s.adapter.param_roles(), s.cfg, s.adapter.width)


def _by_role(roles: list[dict[str, Any]]) -> dict[str, int]:
    """Parameters; they sum to the total."""
    found: dict[str, int] = {}
    for row in roles:
        found[row["role"]] = found.get(row["role"], 0) + row["parameters"]
    return found


def parameters_of(s: Session) -> dict[str, int]:
    """`total`, and `active` where not all of them act on a token."""
    active = s.adapter.active_parameters()
    total = s.adapter.parameter_count
    return {"total": total, **({} if active is None else {"active": active})}


def _banner(s: Session, manifest: dict[str, Any], path: Path) -> list[str]:
    cfg, plan, counts = s.cfg, s.plan, manifest["parameters"]
    active = f", {counts['active']:,} active per token" if "active" in counts else ""
    split = s.adapter.depends_on_split
    return [
        f"{cfg.type} · {counts['total']:,} parameters{active} "
        f"({', '.join(f'{role} {n:,}' for role, n in counts['by_role'].items())})",
        f"data {s.dataset.name}: {quantity(s.dataset.train.total_bytes)}B to train on, "
        f"{quantity(s.dataset.heldout.total_bytes)}B held out · tokenizer {s.dataset.tokenizer.name}, "
        f"{s.dataset.tokenizer.vocab_size:,} tokens",
        f"{s.total_steps:,} steps of {_rows_of(s)} x {cfg.train_seq_len} tokens = "
        f"{quantity(s.loader.stages.rows_before(s.total_steps) * cfg.train_seq_len)} tokens "
        f"({plan.world_size} process{'es' if plan.world_size > 1 else ''} x {plan.accumulation} x "
        f"{plan.micro_rows} rows)",
        f"{s.world.device} · {'fp32' if s.precision == 'no' else s.precision} ({s.precision_reason}) · "
        f"{'compiled blocks' if s.compiled else 'eager'}{s.not_compiled and f' ({s.not_compiled})'} · {cfg.optimizer}",
        f"kernels {_in_words(manifest['kernels'])}",
        *([f"depends on how a step is split: {split}"] if split else []),
        *s.adapter.notes,
        f"run folder {path}",
    ]


def _rows_of(s: Session) -> str:
    """Rows per step, by stage."""
    first, *later = s.loader.stages.rows
    begins = [f"{rows} from step {end}" for rows, end in zip(later, s.loader.stages.ends, strict=False)]
    return f"{first} rows" + (f" ({', '.join(begins)})" if begins else "")


def _in_words(kernels: Mapping[str, Mapping[str, str]]) -> str:
    """`name: operations (why)`, those of one name and reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for op, chosen in kernels.items():
        for taken in chosen.items():
            found.setdefault(taken, []).append(op)
    return " · ".join(f"{name}: {', '.join(ops)} ({why})" for (name, why), ops in found.items()) or "none"


def execution(s: Session) -> dict[str, Any]:
    """What bit-exact resume depends on beside the configuration."""
    return {
        "device": str(s.world.device.type),
        "world_size": s.world.size,
        "micro_rows": s.plan.micro_rows,
        "precision": s.precision,
        "compiled": s.compiled,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def architecture(cfg: RunConfig, adapter: ModelAdapter, micro_rows: int) -> dict[str, Any]:
    """What it takes to build the model again: config.json of a checkpoint."""
    return {
        "format": FORMAT,
        "type": cfg.type,
        "model_adapter": cfg.model_adapter,
        "model_cfg": adapter.model_cfg.model_dump(mode="json"),
        "train_seq_len": cfg.train_seq_len,
        "batch_size": micro_rows,
        "preset": cfg.preset,
        "provenance": adapter.provenance(),
    }


def checkpoint_contents(
    s: Session, progress: Progress, meter: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(tensors, texts) by file name; `meter`: its global state."""
    tensors: dict[str, Any] = {
        "model.pt": s.adapter.trained_state(),
        "optimizer.pt": {
            "optimizers": s.optimizers.state_dict(),
            "scaler": s.scaler.state_dict(),
            "meter": meter,
        },
    }
    if s.ema:
        tensors["ema.pt"] = s.ema.state_dict()
    state = {
        "format": FORMAT,
        "step": progress.step,
        "tokens_seen": progress.tokens,
        "position": s.loader.position(progress.step),
        "optimizer_file": "optimizer.pt",
        "progress": progress.to_json(),
        "val_rows": s.val_rows,
        "execution": execution(s),
        "data": {**s.dataset.identity(), "tokenizer_digest": s.dataset.tokenizer.digest},
        "training_config": redacted(s.cfg),
    }
    if isinstance(s.rows, MixedRows):
        state["mix"] = s.rows.place(s.loader.row_of(progress.step))
    texts = {
        "config.json": json.dumps(architecture(s.cfg, s.adapter, s.plan.micro_rows), indent=2) + "\n",
        "training_state.json": json.dumps(state, indent=2) + "\n",
        "tokenizer.json": s.dataset.tokenizer.to_json(),
    }
    return tensors, texts


def summary_of(
    s: Session,
    progress: Progress,
    flops: float,
    score: Score,
    yardsticks: dict[str, float],
    best: dict[str, Any],
    stopped_early: bool,
    generation_speed: float | None,
) -> dict[str, Any]:
    """`flops`: operations of all steps, as they were. `best`: step and score of best_model/, if the run keeps one.
    `generation_speed`: new tokens a second of one text, None where this life of the run wrote none."""
    counts = parameters_of(s)
    return {
        "type": s.cfg.type,
        "score": score.as_dict(),
        **({"best": best} if best else {}),
        "weights": "averaged (EMA)" if s.ema else "raw",
        "precision": s.precision,
        "parameters": {"active": counts["total"], **counts, "by_role": _by_role(_roles(s))},
        "yardsticks": yardsticks,
        "steps": progress.step,
        "stopped_early": stopped_early,
        "evaluations_without_improvement": progress.evaluations_without_improvement,
        "tokens": progress.tokens,
        "bytes": progress.bytes,
        "seconds": round(progress.seconds, 3),
        "seconds_total": round(progress.seconds_total, 3),
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "generation_tokens_per_second": generation_speed,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "anonymous_memory_bytes": progress.anonymous_memory_bytes,
        "flops": flops,
        **_targets(s, {"flops": flops, "tokens": progress.tokens, "bytes": progress.bytes}.__getitem__),
        "ended": time.time(),
    }
