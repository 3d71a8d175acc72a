"""Attention by the flash-attn packages of Dao and others: of versions 4, 3 and 2 the newest that is installed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kernels.attention.offsets import Built, build, joined, refusal, rows_again
from kernels.attention.plan import Backend, Options
from kernels.choose import Call

__all__ = ["BACKEND", "MODULES", "installed", "refuses"]

MODULES = ("flash_attn.cute", "flash_attn_interface", "flash_attn")  # of versions 4, 3 and 2


@cache
def _function() -> Callable[..., Any] | None:
    for name in MODULES:
        try:
            return import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
    return None


def installed() -> bool:
    return _function() is not None


def _takes(option: str) -> bool:
    function = _function()
    return function is not None and option in inspect.signature(function).parameters


def refuses(call: Call) -> str | None:
    """Why a call is beyond what is installed."""
    if not installed():
        return f"none of {', '.join(MODULES)} can be imported here"
    for fact, option in (("dropout", "dropout_p"), ("softcap", "softcap")):
        if fact in call.facts and not _takes(option):
            return f"the installed version has no {fact}"
    if torch.are_deterministic_algorithms_enabled() and not _takes("deterministic"):
        return "the installed version adds floats in no fixed order, and deterministic=true"
    return refusal(call.facts, call.columns)


def attend(q: Tensor, k: Tensor, v: Tensor, built: Built, options: Options) -> Tensor:
    function = _function()
    assert function is not None, "chosen only where it is installed"
    more: dict[str, Any] = {}
    if options.dropout:
        more["dropout_p"] = options.dropout
    if options.softcap is not None:
        more["softcap"] = options.softcap
    if torch.are_deterministic_algorithms_enabled():
        more["deterministic"] = True
    # What stands for no limit is -1 in some versions and None in others.
    unlimited = inspect.signature(function).parameters["window_size"].default[0]
    window = tuple(unlimited if side < 0 else side for side in built.window)
    found = function(
        joined(q),
        joined(k),
        joined(v),
        cu_seqlens_q=built.queries,
        cu_seqlens_k=built.keys,
        max_seqlen_q=built.longest_queries,
        max_seqlen_k=built.longest_keys,
        softmax_scale=options.scale,
        causal=built.window[1] == 0,
        window_size=window,
        **more,
    )
    return rows_again(found[0] if isinstance(found, tuple) else found, q.shape[0])


BACKEND = Backend(build, attend)
