"""What `--help` and `show` list: the model files, sizes and sources of data, a line each."""

from __future__ import annotations

from configs.files import CONFIGS, choices, describe, description, options
from configs.formats import json_preset


def list_configs() -> list[tuple[str, str]]:
    """(name, one-line description) of every model file in configs/: those of sizes alone, of directives, and YAML."""
    found = [(path.name, json_preset.description(path)) for path in sorted(CONFIGS.glob("*.json"))]
    found += [(path.name, description(path)) for path in sorted(CONFIGS.glob("*.config"))]
    return [*found, *((name, description(CONFIGS / f"{name}.yaml")) for name in options())]


def help_text() -> str:
    """What `--help` says before it shows the composed config."""

    def listing(folder: str) -> str:
        lines = [f"  {n:<12} {describe(folder, n)}" for n in choices(folder)]
        return "\n".join(lines)

    return f"""Train:  python mytrainer.py --hydra_model_cfg=configs/<name>.yaml [preset=<size>] [key=value]
Sweep:  python mytrainer.py --hydra_model_cfg=a,b learning_rate=1e-3,3e-4 -m    (a process per point)
Go on:  python mytrainer.py --model_name <name> [--num_iterations N]           (checkpoints/<name>)
Other:  python mytrainer.py generate | eval | export | show | convert | schema | bench | doctor | prepare --help
        python mytrainer.py compare | leaderboard | attribute --help            (which is better, and why)

Show instead of run: --cfg job [--resolve] [--package model_cfg], --info defaults-tree

Models (--hydra_model_cfg=configs/<name>.yaml, or any YAML file of yours):
{listing("")}

Sizes (preset=<name>):
{listing("preset")}

Data (data=<name>):
{listing("data")}
"""
