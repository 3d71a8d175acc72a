"""Attention by the flash-attn packages of Dao and others: of versions 4, 3 and 2 the newest that is installed and made
for the GPU.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import offsets
from kernels.attention.offsets import joined, refusal, rows_again
from kernels.attention.plan import Backend, Options
from kernels.attention.visible import Visible
from kernels.choose import Call
from kernels.device import Gpu, gpu_of

__all__ = ["BACKEND", "MODULES", "function_for", "refuses"]

# Modules of versions 4, 3 and 2 -> the major capabilities they are made for, None for all: 4 and 3 use instructions of
# Hopper, 4 those of Blackwell too.
MODULES: dict[str, tuple[int, ...] | None] = {
    "flash_attn.cute": (9, 10),
    "flash_attn_interface": (9,),
    "flash_attn": None,
}


def function_for(gpu: Gpu | None) -> Callable[..., Any] | None:
    """What is called on this GPU (None: unknown, anything installed), or None."""
    for name, majors in MODULES.items():
        if gpu is None or majors is None or gpu.capability[0] in majors:
            found = _imported(name)
            if found is not None:
                return found
    return None


@cache
def _imported(name: str) -> Callable[..., Any] | None:
    try:
        function: Callable[..., Any] = import_module(name).flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None
    return function


def refuses(call: Call) -> str | None:
    """Why a call is beyond what is installed."""
    function = function_for(call.gpu)
    if function is None:
        where = "" if call.gpu is None else f" and is made for {call.gpu.name}"
        return f"none of {', '.join(MODULES)} can be imported here{where}"
    options = inspect.signature(function).parameters
    for fact, option in (("dropout", "dropout_p"), ("softcap", "softcap")):
        if fact in call.facts and option not in options:
            return f"the installed version has no {fact}"
    if {"dropout", "softcap"} <= set(call.facts):
        return "flash-attn has no softcap with dropout"
    if "dropout of all" in call.facts:
        return "flash-attn takes dropout below 1"
    if torch.are_deterministic_algorithms_enabled() and "deterministic" not in options:
        return "the installed version adds floats in no fixed order, and deterministic=true"
    return refusal(call.facts, call.columns)


class Built(NamedTuple):
    function: Callable[..., Any]
    offsets: offsets.Built
    options: dict[str, Any]  # of the function, beside tensors


def build(visible: Visible, options: Options) -> Built:
    """Here, as a compiler of layers follows neither imports nor signatures."""
    function = function_for(gpu_of(visible.device))
    assert function is not None, "chosen only where it is installed"
    built = offsets.build(visible, options)
    # What stands for no limit is -1 in some versions and None in others.
    unlimited = inspect.signature(function).parameters["window_size"].default[0]
    given: dict[str, Any] = {
        "softmax_scale": options.scale,
        "causal": built.window[1] == 0,
        "window_size": tuple(unlimited if side < 0 else side for side in built.window),
    }
    if options.dropout:
        given["dropout_p"] = options.dropout
    if options.softcap is not None:
        given["softcap"] = options.softcap
    if torch.are_deterministic_algorithms_enabled():
        given["deterministic"] = True
    return Built(function, built, given)


def attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    at = built.offsets
    found = built.function(
        joined(q),
        joined(k),
        joined(v),
        cu_seqlens_q=at.queries,
        cu_seqlens_k=at.keys,
        max_seqlen_q=at.longest_queries,
        max_seqlen_k=at.longest_keys,
        **built.options,
    )
    return rows_again(found[0] if isinstance(found, tuple) else found, q.shape[0])


BACKEND = Backend(build, attend)
