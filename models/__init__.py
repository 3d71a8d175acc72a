"""The table of architectures. Imports no torch: a class is named by a string and imported on use.

Adding an architecture is one file here, one YAML in `configs/` and one row below.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["ARCHITECTURES", "Architecture", "load", "resolve"]


@dataclass(frozen=True)
class Architecture:
    """`model` and `adapter` are "module:Class"; the model class carries its `Config`."""

    model: str
    adapter: str = "adapters.default:DefaultModelAdapter"
    description: str = ""


ARCHITECTURES: dict[str, Architecture] = {
    "bd3lm": Architecture(
        "models.bd3lm:BD3LM",
        "adapters.diffusion.bd3lm:BD3LMAdapter",
        "block diffusion (Arriola et al. 2025)",
    ),
    "d3pm": Architecture(
        "models.d3pm:D3PM",
        "adapters.diffusion.d3pm:D3PMAdapter",
        "discrete diffusion (Austin et al. 2021)",
    ),
    "gpt2": Architecture("models.gpt2:GPT2", description="GPT-2 (Radford et al. 2019)"),
    "mdl": Architecture(
        "models.mdl:MDL", "adapters.diffusion.mdl:MDLAdapter", "masked diffusion (Sahoo et al. 2024)"
    ),
    "sedd": Architecture(
        "models.sedd:SEDD",
        "adapters.diffusion.sedd:SEDDAdapter",
        "score entropy diffusion (Lou et al. 2024)",
    ),
    "vanilla": Architecture(
        "models.vanilla:Vanilla", description="Llama-style decoder (Touvron et al. 2023): the control"
    ),
}


def resolve(type_: str) -> Architecture:
    """The row of a registered type, or a row for "package.module:Class", which needs no registration."""
    if type_ in ARCHITECTURES:
        return ARCHITECTURES[type_]
    if ":" in type_:
        _split(type_)
        return Architecture(type_)
    close = difflib.get_close_matches(type_, ARCHITECTURES, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    registered = ", ".join(sorted(ARCHITECTURES))
    raise ValueError(
        f"unknown type '{type_}'.{hint} Registered: {registered}; or a class as package.module:Class"
    )


def load(spec: str) -> Any:
    """Import the object that "package.module:Name" names. ValueError if either part does not exist."""
    module_name, name = _split(spec)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency of an existing module is that module's error, not a wrong name.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(f"'{spec}': no module named '{error.name}'") from None
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, dir(module), n=1)
        hint = f". Did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"'{spec}': module '{module_name}' has no '{name}'{hint}")
    return getattr(module, name)


def _split(spec: str) -> tuple[str, str]:
    module_name, _, name = spec.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"'{spec}': expected package.module:Class")
    return module_name, name
