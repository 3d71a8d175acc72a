"""A launcher of Triton's or a library's as an operation of `torch.library`: opaque to the compiler, with shapes,
gradients and FLOPs.

Opaque (`custom_op`), because a traced kernel (`triton_op`) can neither be interpreted on a CPU nor compiled there with
`fullgraph=True` (torch 2.11 and 2.13). It costs some 20 microseconds a call outside of CUDA graphs: few, large
operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from kernels import aot

__all__ = ["opaque"]


def opaque(
    name: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
) -> Any:
    """`launch`, whose annotations are its schema, as `torch.ops.mytrainer.<name>`: the operation, callable.

    Outputs are new tensors that share nothing with inputs. `fake` has its signature and returns outputs without values
    (`new_empty`). `flops`: as torch's flop counter calls it, with shapes in place of tensors and `out_shape`; without
    one it counts 0. Gradients: `operation.register_autograd(backward, setup_context=...)`. On the meta device, while
    compiling ahead of time (kernels/aot.py), the launcher itself is called.
    """
    operation = torch.library.custom_op(f"mytrainer::{name}", launch, mutates_args=())

    @operation.register_fake
    def without_values(*args: Any, **kwargs: Any) -> Any:
        return (launch if aot.active() else fake)(*args, **kwargs)

    if flops is not None:
        register_flop_formula(getattr(torch.ops.mytrainer, name))(flops)
    return operation
