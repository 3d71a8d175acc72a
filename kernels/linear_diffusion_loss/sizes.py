"""What tests, the ahead-of-time check and the benchmark call the losses of diffusion with."""

from __future__ import annotations

from typing import Any

import torch

from kernels.linear_cross_entropy.sizes import flops, moved
from kernels.linear_diffusion_loss.rows import MODES
from kernels.spec import Sample, Size, Spec, drawn, ids

__all__ = ["SPEC"]

STEPS = 10  # of the chain whose survival falls linearly to 0


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    """`vocabulary` states, the last of them the mask where the mode has one; `noisy`: part of the rows that differ."""
    rows, width, V, mode = int(size["rows"]), int(size["width"]), int(size["vocabulary"]), str(size["mode"])
    kind = MODES[mode]
    n = V - kind.needs_mask
    head = V + int(size.get("padding", 0))
    hidden = drawn(rows, width, device=device, dtype=dtype, generator=generator)
    weight = drawn(head, width, device=device, dtype=dtype, generator=generator, scale=width**-0.5)
    bias = drawn(head, device=device, dtype=torch.float32, generator=generator)
    x0 = ids(n, rows, device=device, generator=generator)
    noise = torch.full_like(x0, n) if kind.needs_mask else ids(n, rows, device=device, generator=generator)
    changed = ids(1000, rows, device=device, generator=generator) < 1000 * float(size["noisy"])
    t = 1 + ids(STEPS, rows, device=device, generator=generator).double()
    a, b = 1 - (t - 1) / STEPS, 1 - t / STEPS
    known = {"a": a, "b": b, "beta": 1 - b / a, "first": t == 1, "sigma_bar": t / 3}
    options: dict[str, Any] = {"mode": mode, "V": V, "n": n, "mask_id": n if kind.needs_mask else None}
    options["coefficients"] = {name: known[name] for name in kind.names}
    options["aux_weight"] = (t / STEPS) if size.get("aux") else 0.0
    weights = (1 + t) / STEPS
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "x0": x0, "weights": weights}
    return Sample({**tensors, "xt": noise.where(changed, x0)}, options)


def _size(mode: str, rows: int, width: int, vocabulary: int, noisy: float = 0.5, **more: Any) -> Size:
    aux = {"aux": True} if MODES[mode].has_aux else {}
    return {
        "mode": mode,
        "rows": rows,
        "width": width,
        "vocabulary": vocabulary,
        "noisy": noisy,
        **aux,
        **more,
    }


SPEC = Spec(
    sample=_sample,
    small={
        **{f"{mode}, 7 x 8 x 37": _size(mode, 7, 8, 37, padding=11) for mode in MODES},
        **{f"{mode}, 3 x 8 x 130": _size(mode, 3, 8, 130) for mode in MODES},
        "subs, nothing masked": _size("subs", 5, 8, 20, 0.0),
        "subs, all masked": _size("subs", 5, 8, 20, 1.0),
        "sedd_absorb, without auxiliary": _size("sedd_absorb", 5, 8, 20, aux=False),
        "d3pm_uniform, without auxiliary": _size("d3pm_uniform", 5, 8, 20, aux=False),
        "one row": _size("d3pm_absorb", 1, 8, 50),
        "no rows": _size("sedd_uniform", 0, 8, 20),
    },
    large={f"{mode}, 16,384 x 768 x 50,258": _size(mode, 16_384, 768, 50_258) for mode in MODES},
    timed_on_cpu={
        f"{mode}, 4,096 x 192 x 1,025": _size(mode, 4_096, 192, 1_025) for mode in ("subs", "d3pm_uniform")
    },
    flops=flops,
    bytes=moved,
    gradients_in_forward=("chunked", "triton"),
    tolerance={"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2},
)
