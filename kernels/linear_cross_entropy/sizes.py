"""What tests, the ahead-of-time check and the benchmark call the head loss with."""

from __future__ import annotations

import torch

from kernels.linear_cross_entropy.reference import IGNORED
from kernels.softcap import SigmoidCap, Softcap, TanhCap
from kernels.spec import Sample, Size, Spec, drawn, ids

__all__ = ["SPEC", "flops", "moved"]

CAPS: dict[str, Softcap | None] = {"": None, "tanh": TanhCap(1.5), "sigmoid": SigmoidCap(3.0, 0.5, 1.0)}


def _sample(size: Size, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    rows, width, V, k = (int(size.get(name, 1)) for name in ("rows", "width", "vocabulary", "targets"))
    padded = V + int(size.get("padding", 0))
    hidden = drawn(rows, width, device=device, dtype=dtype, generator=generator)
    weight = drawn(padded, width, device=device, dtype=dtype, generator=generator, scale=width**-0.5)
    shape = (rows,) if k == 1 else (rows, k)
    targets = ids(V, *shape, device=device, generator=generator)
    if size.get("ignored"):
        targets = targets.where(ids(2, *shape, device=device, generator=generator) == 0, IGNORED)
    weights = None
    if size.get("weighted"):
        weights = drawn(*shape, device=device, dtype=torch.float32, generator=generator)
    return Sample(
        {"hidden": hidden, "weight": weight, "targets": targets, "weights": weights},
        {
            "vocab_size": V,
            "softcap": CAPS[str(size.get("softcap", ""))],
            "z_loss": float(size.get("z_loss", 0)),
        },
    )


def flops(size: Size) -> tuple[float, float]:
    """One product of the head; two for its gradients."""
    product = 2.0 * int(size["rows"]) * int(size["width"]) * int(size["vocabulary"])
    return product, 2 * product


def moved(size: Size, itemsize: int) -> tuple[float, float]:
    """Hidden states and the head in; both again, and their gradients out."""
    elements = (int(size["rows"]) + int(size["vocabulary"])) * int(size["width"])
    return 1.0 * elements * itemsize, 2.0 * elements * itemsize


SPEC = Spec(
    sample=_sample,
    small={
        "5 x 12 x 33": {
            "rows": 5,
            "width": 12,
            "vocabulary": 33,
            "padding": 7,
            "targets": 2,
            "ignored": True,
            "weighted": True,
            "softcap": "tanh",
            "z_loss": 0.1,
        },
        "plain": {"rows": 7, "width": 16, "vocabulary": 129},
        "sigmoid cap": {"rows": 9, "width": 8, "vocabulary": 100, "weighted": True, "softcap": "sigmoid"},
        "z-loss": {"rows": 3, "width": 8, "vocabulary": 64, "ignored": True, "z_loss": 0.3},
        "three targets of three": {"rows": 6, "width": 8, "vocabulary": 3, "targets": 3, "weighted": True},
        "one row": {"rows": 1, "width": 8, "vocabulary": 50},
        "no rows": {"rows": 0, "width": 8, "vocabulary": 20, "weighted": True},
        "one column": {"rows": 4, "width": 8, "vocabulary": 1, "padding": 3},
    },
    large={
        "65,536 x 768 x 50,304": {"rows": 65_536, "width": 768, "vocabulary": 50_304},
        "16,384 x 2,048 x 50,304": {"rows": 16_384, "width": 2_048, "vocabulary": 50_304},
    },
    timed_on_cpu={
        "4,096 x 192 x 1,025": {"rows": 4_096, "width": 192, "vocabulary": 1_025},
        "1,024 x 384 x 8,192": {"rows": 1_024, "width": 384, "vocabulary": 8_192},
    },
    flops=flops,
    bytes=moved,
    tolerance={"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2},
    peers={
        "torch": "kernels.linear_cross_entropy.peers:of_torch",
        "liger": "kernels.linear_cross_entropy.peers:of_liger",
        "cut_cross_entropy": "kernels.linear_cross_entropy.peers:of_cut_cross_entropy",
    },
    gradients_in_forward=("chunked", "triton", "torch", "liger"),
)
