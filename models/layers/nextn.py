"""Sequential modules under the names of DeepSeek-V3's checkpoints (`num_nextn_predict_layers`; GLM-4.5's are alike).

Behind the L layers of the trunk, module k is layer L + k - 1: its block as any layer, and `enorm`, `hnorm`, `eh_proj`
on [embedding; hidden], `shared_head.norm`, with copies of the embedding and the output matrix. So vLLM reads them
(`deepseek_mtp.py`; it zeroes the embedding at a text's first position); transformers passes over these layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.layers.huggingface import HEAD, HuggingFaceDecoder
from naming import require_fit, shapes

if TYPE_CHECKING:
    from models.mtm import MTM

__all__ = ["from_nextn", "to_nextn"]

TABLE, NORM = "model.embed_tokens.weight", "model.norm.weight"
MIX = "eh_proj.weight"
_OWN = re.compile(r"model\.layers\.\d+\.(enorm|hnorm|eh_proj|shared_head|embed_tokens)\.")


def to_nextn(model: MTM) -> dict[str, Tensor]:
    """Copies of all weights. ValueError if the trunk has no layers of this form."""
    found = _deeper(model).to_hf_state_dict()
    for layer, parts in _parts(model):
        own = {name: _turned(model, name, tensor) for name, tensor in parts.items()}
        own |= {name: found[source] for name, source in _copies(model).items()}
        found |= {layer + name: tensor.clone() for name, tensor in own.items()}
    return found


def from_nextn(model: MTM, given: Mapping[str, Tensor]) -> None:
    """Load such weights; copies may be left out. ValueError if a tensor is missing or left over, if a shape differs, or
    if a copy is none. Nothing is loaded then."""
    own = {name: tensor for name, tensor in given.items() if _OWN.match(name)}
    rest = {name: tensor for name, tensor in given.items() if name not in own}
    wanted: dict[str, Tensor] = {}
    for layer, parts in _parts(model):
        wanted |= {layer + name: tensor for name, tensor in parts.items()}
        for name, source in _copies(model).items():
            theirs = own.pop(layer + name, None)
            shared = rest.get(source, rest.get(TABLE))  # a tied output matrix may be left out
            if theirs is not None and (shared is None or not torch.equal(theirs, shared)):
                raise ValueError(
                    f"{layer}{name} is no copy of {source}: these modules have none of their own"
                )
    require_fit("what this state dict has of modules", shapes(wanted), shapes(own))
    _deeper(model).from_hf_state_dict(rest)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(_turned(model, name, own[name]))


def _deeper(model: MTM) -> HuggingFaceDecoder:
    """The trunk with the modules' blocks behind its own: the same parameters, under the names of further layers."""
    trunk = model.trunk
    if not isinstance(trunk, HuggingFaceDecoder) or not hasattr(trunk, "layers"):
        raise ValueError(
            f"model_cfg.trunk={model.cfg.trunk}: checkpoints of this form have trunks of Llama's layers, which vanilla "
            f"and moe have"
        )
    deeper, own = copy.copy(trunk), list(model.stack[0])
    layers = nn.ModuleList([*own, *(module.block for module in model.depths)])
    deeper._modules = {**trunk._modules, "layers": layers}
    return deeper


def _parts(model: MTM) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Of each module (prefix of its layer, what no other layer has)."""
    for depth, module in enumerate(model.depths):
        norm = {} if module.norm is None else {"shared_head.norm.weight": module.norm.weight.detach()}
        parts = {
            f"{name}.weight": getattr(module, name).weight.detach() for name in ("enorm", "hnorm", "eh_proj")
        }
        yield f"model.layers.{model.cfg.n_layers + depth}.", parts | norm


def _copies(model: MTM) -> dict[str, str]:
    """What each module repeats -> what it repeats."""
    found = {"embed_tokens.weight": TABLE, "shared_head.head.weight": HEAD}
    return found | ({"shared_head.norm.weight": NORM} if model.cfg.mtp_share_head_norm else {})


def _turned(model: MTM, name: str, tensor: Tensor) -> Tensor:
    """Both ways between our order of the pair and theirs."""
    turn = name.endswith(MIX) and model.cfg.concat_order == "hidden_first"
    return tensor.roll(model.cfg.d_model, dims=1) if turn else tensor
