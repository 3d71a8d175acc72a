"""The `show` command: what a configuration would cost, before any data or device is touched.

Without a model file: the list of configurations. With one: parameters by role, FLOPs, memory, tokens and, where a
speed is given or can be looked up in an earlier run, time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.compose import compose
from configs.files import CONFIGS
from configs.help import list_configs
from trainer.batching import plan_run
from trainer.optim.stages import stages_of

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig
    from trainer.optim.stages import Stages

__all__ = ["describe", "main", "memory_estimate"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python mytrainer.py show",
        description="Sizes and costs of a configuration. Extra arguments are Hydra overrides: preset=small n=v ...",
        allow_abbrev=False,  # a word that is no option is the configuration's
    )
    parser.add_argument("--hydra_model_cfg", "--config", help="the model file; none: list what there is")
    parser.add_argument("--vocab_size", type=int, help="vocabulary where the file leaves it to the tokenizer")
    parser.add_argument("--json", action="store_true")
    args, overrides = parser.parse_known_args(argv)
    if args.vocab_size is not None and args.vocab_size < 2:
        raise ValueError(f"vocab_size: must be at least 2, got {args.vocab_size}")
    named = [] if args.hydra_model_cfg is None else [f"--hydra_model_cfg={args.hydra_model_cfg}"]
    if not named and not overrides:
        rows = [_list_row(name, text, args.vocab_size) for name, text in list_configs()]
        print(json.dumps(rows, indent=2) if args.json else _table(rows))
        return 2 if any(row["problem"] for row in rows) else 0
    cfg, model_cfg = compose([*named, *overrides])
    if model_cfg.lacking():  # which `compose` has said
        print(json.dumps({"type": cfg.type, "preset": cfg.preset, "lacking": model_cfg.lacking()}, indent=2))
        return 0
    found = describe(cfg, model_cfg, args.vocab_size)
    print(json.dumps(found, indent=2) if args.json else _page(found))
    return 0


def describe(cfg: RunConfig, model_cfg: ModelConfig, vocab_size: int | None = None) -> dict[str, Any]:
    """Counts from the model built without storage, costs by the documented formulas."""
    from adapters import adapter_class
    from trainer.bench.counting import unbuilt
    from trainer.bench.text import known_vocabulary
    from trainer.optim.optimizers import role_table

    unit = adapter_class(cfg).unit(model_cfg)
    left_open = getattr(model_cfg, "vocab_size", None) is None
    given = vocab_size if left_open else None
    adapter = unbuilt(cfg, model_cfg, known_vocabulary(cfg, model_cfg, unit) if given is None else given)
    roles = role_table(adapter.counted_parameters(), adapter.param_roles(), cfg, adapter.width)
    flops = adapter.cost(cfg.train_seq_len)
    given = cfg.batch_size if isinstance(cfg.batch_size, int) else None
    world = cfg.num_gpus if isinstance(cfg.num_gpus, int) else 1
    plan = plan_run(cfg, given, world)
    tokens_per_step = plan.rows * cfg.train_seq_len
    total = adapter.parameter_count
    active = adapter.active_parameters()
    stages = stages_of(cfg, cfg.num_iterations)
    tokens = (
        None if cfg.num_epochs is not None else stages.rows_before(cfg.num_iterations) * cfg.train_seq_len
    )
    return {
        "type": cfg.type,
        "preset": cfg.preset,
        "vocab_size": adapter.model_cfg.vocab_size,
        "blocks": len(adapter.blocks()),
        "parameters": {
            "total": total,
            **({} if active is None else {"active": active}),
            "trainable": sum(r["parameters"] for r in roles if r["optimizer"] != "frozen"),
        },
        "roles": roles,
        "notes": list(adapter.notes),
        "flops_per_token": {"forward": flops.forward_per_token, "training": flops.training_per_token},
        "tokens_per_step": tokens_per_step,
        "steps": None if tokens is None else cfg.num_iterations,
        "tokens": tokens,
        "time_budget": cfg.time_budget,
        "training_flops": None if tokens is None else flops.training_per_token * tokens,
        "batch": {
            "global": plan.rows,
            "micro": plan.micro_rows,
            "accumulation": plan.accumulation,
            "processes": plan.world_size,
        },
        **({} if cfg.batch_stages is None else {"batch_stages": _stages(cfg, stages)}),
        "memory_bytes": memory_estimate(adapter, cfg, plan.micro_rows),
        "measured_tokens_per_second": _measured_speed(cfg, adapter.model_cfg),
    }


def _stages(cfg: RunConfig, stages: Stages) -> list[dict[str, Any]]:
    """`until`: a part of the run, or the step where the number of steps is known."""
    known = cfg.num_epochs is None
    return [
        {
            "until": end if known else stage.until,
            "rows": rows,
            "tokens_per_step": rows * cfg.train_seq_len,
            "rate": rate,
        }
        for stage, end, rows, rate in zip(
            cfg.batch_stages or [], stages.ends, stages.rows, stages.rates, strict=True
        )
    ]


def memory_estimate(adapter: Any, cfg: RunConfig, micro_rows: int) -> dict[str, int]:
    """Bytes of one process: fp32 weights and gradients, optimizer state, EMA, and the larger activations.

    `adapter` lives on the meta device, and so do its optimizers: they are asked for what they would allocate.
    Activations per block and token: about 34 D bytes in 16-bit and twice that in fp32 with fused attention
    (Korthikanti et al., 2022, arXiv 2205.05198, equation 2 without the attention matrices); with recompute only the
    block's input of D. Logits of one micro-batch in fp32 are the other large tensor.
    """
    from trainer.optim.optimizers import build_optimizers

    trained = 4 * sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    weights = 4 * sum(t.numel() for t in [*adapter.parameters(), *adapter.buffers()])
    optimizers = build_optimizers(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    rows = micro_rows * cfg.train_seq_len
    item = 4 if cfg.mixed_precision == "no" else 2
    per_token = adapter.width * item * (1 if cfg.gradient_checkpointing else 17)
    out = {
        "weights": weights,
        "gradients": trained,
        "optimizer": optimizers.state_bytes(),
        "ema": trained if cfg.ema_decay else 0,
        "activations": round(rows * per_token * adapter.kept_passes),
        "logits": 2 * 4 * rows * adapter.model_cfg.vocab_size,
    }
    return {**out, "total": sum(out.values())}


def _measured_speed(cfg: RunConfig, model_cfg: ModelConfig) -> dict[str, Any] | None:
    """Tokens per second of the newest finished run of this very model and row length here, if there is one."""
    wanted = {
        "type": cfg.type,
        "model_cfg": model_cfg.model_dump(mode="json"),
        "train_seq_len": cfg.train_seq_len,
    }
    found = []
    for summary in [*Path("outputs").glob("*/summary.json"), *Path("checkpoints").glob("*/summary.json")]:
        try:
            done = json.loads(summary.read_text(encoding="utf-8"))
            config = json.loads((summary.parent / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if all(config.get(key) == value for key, value in wanted.items()) and done["tokens_per_second"]:
            found.append((summary.stat().st_mtime, done["tokens_per_second"], str(summary.parent)))
    if not found:
        return None
    _, speed, run = max(found)
    return {"tokens_per_second": speed, "run": run}


def _page(d: dict[str, Any]) -> str:
    lines = [f"{d['type']} (preset {d['preset']}, vocabulary {d['vocab_size']:,})", "", "parameters by role"]
    for row in d["roles"]:
        rate = (
            "frozen" if row["optimizer"] == "frozen" else f"{row['optimizer']}, learning rate {row['lr']:.3g}"
        )
        lines.append(f"  {row['role']:<12}{row['parameters']:>15,}  {row['tensors']:>4} tensors  {rate}")
    lines.append(f"  {'total':<12}{d['parameters']['total']:>15,}  ({human(d['parameters']['total'])})")
    if (active := d["parameters"].get("active")) is not None:
        lines.append(f"  {'active':<12}{active:>15,}  ({human(active)}) per token")
    lines += d["notes"]
    f = d["flops_per_token"]
    lines += [
        "",
        f"FLOPs per token   forward {f['forward']:.4g}, training {f['training']:.4g}",
    ]
    b = d["batch"]
    lines.append(
        f"step              {b['global']} rows = {b['processes']} x {b['accumulation']} x {b['micro']}, "
        f"{d['tokens_per_step']:,} tokens"
    )
    for stage in d.get("batch_stages", []):
        until = (
            f"step {stage['until']:,}"
            if isinstance(stage["until"], int)
            else f"{stage['until']:g} of the run"
        )
        step = f"{stage['rows']} rows, {stage['tokens_per_step']:,} tokens"
        lines.append(f"  until {until:<15} {step} a step, scheduled rates x {stage['rate']:g}")
    if d["tokens"]:
        lines.append(
            f"run               {d['steps']:,} steps, {d['tokens']:,} tokens, {d['training_flops']:.3g} FLOPs"
        )
    else:
        lines.append("run               as many steps as num_epochs needs, which depends on the text")
    if d["time_budget"] is not None:
        lines.append(f"time budget       {d['time_budget']:g} minutes, fewer steps where not all fit")
    m = d["memory_bytes"]
    parts = ", ".join(f"{k} {v / 2**20:,.0f}" for k, v in m.items() if k != "total" and v)
    lines.append(f"memory (estimate) {m['total'] / 2**20:,.0f} MiB a process ({parts})")
    speed = d["measured_tokens_per_second"]
    if speed and d["tokens"]:
        seconds = d["tokens"] / speed["tokens_per_second"]
        rate = f"{speed['tokens_per_second']:,.0f} tokens/s of {speed['run']}"
        lines.append(f"time              {seconds / 60:.1f} min at the {rate}")
    elif d["tokens"]:
        lines.append("time              unknown until a run of this model has finished here")
    return "\n".join(lines)


def _list_row(name: str, text: str, vocab_size: int | None) -> dict[str, Any]:
    try:
        file = CONFIGS / name if (CONFIGS / name).is_file() else name
        cfg, model_cfg = compose([f"--hydra_model_cfg={file}", "preset=none"], notify=lambda text: None)
        if model_cfg.lacking():
            return {"file": name, "description": text, "parameters": None, "problem": None}
        found = describe(cfg, model_cfg, vocab_size)
    except ValueError as error:
        return {"file": name, "description": text, "problem": str(error)}
    sizes = {k: getattr(model_cfg, k, None) for k in ("n_layers", "n_heads", "d_model")}
    if "n_layers" in type(model_cfg).model_fields and sizes["n_layers"] is None:  # follows from another field
        sizes["n_layers"] = found["blocks"]
    return {
        "file": name,
        "description": text,
        "parameters": found["parameters"]["total"],
        "active": found["parameters"].get("active"),
        **sizes,
        "problem": None,
    }


def _table(rows: Sequence[dict[str, Any]]) -> str:
    wide = 2 + max(len(row["file"]) for row in rows)
    head = f"{'File':<{wide}}{'Params':>10}{'Layers':>8}{'Heads':>7}{'Embed':>7}  Description"
    lines = ["=" * 70, "Available Model Configurations", "=" * 70, head]
    for row in rows:
        if row["problem"]:
            lines.append(f"{row['file']:<{wide}}invalid: {row['problem']}")
            continue
        layers, heads, width = (
            row[k] if row.get(k) is not None else "-" for k in ("n_layers", "n_heads", "d_model")
        )
        size = "-" if row["parameters"] is None else human(row["parameters"])
        active = f" ({human(row['active'])} active per token)" if row.get("active") is not None else ""
        lines.append(
            f"{row['file']:<{wide}}{size:>10}{layers:>8}{heads:>7}{width:>7}  {row['description']}{active}"
        )
    lines += [
        "",
        "Details:  python mytrainer.py show --hydra_model_cfg=configs/gpt2.yaml preset=small",
        "Train:    python mytrainer.py --hydra_model_cfg=configs/150M.json",
    ]
    return "\n".join(lines)


def human(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
