"""The size that `preset: auto` stands for, and the time that a preset gives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import CONFIGS, Node, describe, options, shown
from configs.frontend import SIZE_KEYS
from configs.hardware import uses_cuda
from configs.messages import ConfigError
from configs.request import Request
from configs.schema import STEPS
from configs.weights import on_a_base
from naming import command_line

if TYPE_CHECKING:
    from configs.weights import Sizes


def automatic_preset(
    request: Request, nodes: list[Node], saved: tuple[dict[str, Any], Path] | None, begun_from: list[Sizes]
) -> str:
    """The preset that `auto` stands for; nothing where the command line or the file names one. `saved`: the
    architecture of the run that goes on; `begun_from`: what weights say of their sizes."""
    if request.values.get("preset", "auto") != "auto" or not nodes:
        return ""
    stated = {n.stated("preset") for n in nodes} - {None, "auto"}
    if stated and "preset" not in request.values:
        return ""
    if saved:
        begun_with = str(saved[0].get("preset"))
        return begun_with if begun_with in options("preset") else "none"
    if begun_from:
        sources = ", ".join(str(sizes.source) for sizes in begun_from)
        request.notices.append(f"preset auto: none, as {sources} gives the sizes")
        return "none"
    shipped = all(n.path.parent == CONFIGS and n.stated("type") == n.path.stem for n in nodes)
    sized = [k for k in SIZE_KEYS if f"model_cfg.{k}" in request.keys]
    data = request.values.get("data") or next(
        (n.stated("data") for n in nodes if n.stated("data")), "embedded"
    )
    if shipped and data == "embedded" and sized:
        request.notices.append(
            f"preset auto: the file's own full size, as model_cfg.{sized[0]} is given. Add preset=nano (or another) to "
            f"change that one and have a small run"
        )
    if not shipped or sized or data != "embedded":
        return "none"
    on_cuda = uses_cuda(str(request.values.get("device", "auto")))
    preset, why = ("small", "CUDA") if on_cuda else ("nano", "no CUDA device")
    if any(on_a_base(n.stated("type"), n.stated("model_adapter")) for n in nodes):
        request.notices.append(f"preset auto: {preset} ({why}): rows and steps; sizes are those of the base")
        return preset
    size = describe("preset", preset).split(".")[0].split(",")[0]
    command = command_line(f"--hydra_model_cfg={','.join(shown(n.path) for n in nodes)}", "preset=none")
    request.notices.append(f"preset auto: {preset} ({why}, embedded corpus; {size}). Full size: {command}")
    return preset


def without_preset_budget(request: Request, nodes: list[Node]) -> list[str]:
    """What switches a preset's `time_budget` off, where the command line asks for a number of steps, or for several
    runs, which are to be alike. One that the command line or a file states stays."""
    asked = request.multirun or not request.keys.isdisjoint(STEPS)
    if not nodes or not asked or "time_budget" in request.keys:
        return []
    budgets = {node.stated("time_budget", presets=False) for node in nodes}
    if len(budgets) > 1:
        raise ConfigError(
            f"command line: the files of this sweep state different time budgets ({', '.join(map(str, budgets))}). "
            f"Add time_budget=<minutes> or time_budget=null for all of them"
        )
    (budget,) = budgets
    return [f"time_budget={'null' if budget is None else budget}"]
