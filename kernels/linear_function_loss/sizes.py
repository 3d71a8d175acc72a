"""What tests and the benchmark call a loss given as a function with: one such function, of D3PM's kind."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from kernels.spec import Sample, Size, Spec, drawn

__all__ = ["SPEC"]


def from_uniform(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """nats (m,) of a uniform state under the softmax of logits z (m, V); beside them those of state 0."""
    log_p = z.log_softmax(1)
    return -log_p.mean(1), -log_p[:, 0]


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width, V = (int(size[name]) for name in ("rows", "width", "states"))
    head = V + int(size.get("padding", 0))
    draw = partial(drawn, device=device, dtype=dtype, generator=generator)
    return Sample(
        {
            "hidden": draw(rows, width),
            "weight": draw(head, width, scale=width**-0.5),
            "bias": draw(head, scale=0.1),
            "weights": drawn(rows, device=device, dtype=torch.float32, generator=generator, grad=False),
        },
        {"function": from_uniform, "V": V, "aux_weight": 0.3},
    )


def _flops(size: Size) -> tuple[float, float]:
    """One product of the head; two for its gradients."""
    product = 2.0 * int(size["rows"]) * int(size["width"]) * int(size["states"])
    return product, 2 * product


def _bytes(size: Size, itemsize: int) -> tuple[float, float]:
    """Hidden states and the head in; both again, and their gradients out."""
    elements = (int(size["rows"]) + int(size["states"])) * int(size["width"])
    return 1.0 * elements * itemsize, 2.0 * elements * itemsize


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 12 x 33": {"rows": 5, "width": 12, "states": 33, "padding": 7},
        "one row": {"rows": 1, "width": 8, "states": 50},
        "no rows": {"rows": 0, "width": 8, "states": 20},
        "one state": {"rows": 4, "width": 8, "states": 1, "padding": 3},
    },
    large={"16,384 x 768 x 1,025": {"rows": 16_384, "width": 768, "states": 1_025}},
    timed_on_cpu={"4,096 x 192 x 1,025": {"rows": 4_096, "width": 192, "states": 1_025}},
    flops=_flops,
    bytes=_bytes,
    tolerance={"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2},
    gradients_in_forward=("chunked",),
)
