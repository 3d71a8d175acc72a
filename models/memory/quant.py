"""A bank in 8 or 4 bits: what its numbers are once they are stored so, with the gradient of those that are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["levels", "packed", "packed_state", "quantized", "rounded", "unpacked", "unpacked_state"]

INTEGERS, SCALE = ".integers", ".scale"  # behind the name of what is stored so


def levels(bits: int) -> int:
    """The largest integer: 127 of 8 bits, 7 of 4; the least is its negative, so that scales are symmetric."""
    return 2 ** (bits - 1) - 1


def quantized(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """rows (N, m) -> integers (N, m) int8 and the scale c of each row (N, 1): row = c * integers, to c / 2 at most.

    c = max|row| / 127, or / 7 of 4 bits; 1 of a row of zeros.
    """
    most = levels(bits)
    scale = rows.abs().amax(1, keepdim=True) / most
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (rows / scale).round().clamp(-most, most).to(torch.int8), scale


def rounded(rows: Tensor, bits: int) -> Tensor:
    """What (N, m) is after that, with the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432)."""
    with torch.no_grad():
        integers, scale = quantized(rows, bits)
        stored = integers.to(rows.dtype) * scale
    return stored + (rows - rows.detach())


def packed(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """rows (N, m) as they are stored: integers (N, m) int8, or of 4 bits (N, m / 2) uint8, two of them in a byte, the
    first in its low half; and scales (N,) fp32. N m bytes, or N m / 2, and 4 N."""
    integers, scale = quantized(rows, bits)
    if bits == 4:
        low, high = (integers[:, first::2].view(torch.uint8) & 0xF for first in (0, 1))
        integers = low | high << 4
    return integers, scale.squeeze(1).float()


def unpacked(integers: Tensor, scale: Tensor) -> Tensor:
    """(N, m) fp32 of what `packed` gives: the very numbers of `rounded`, which rounding leaves as they are."""
    if integers.dtype == torch.uint8:
        halves = torch.stack((integers & 0xF, integers >> 4), 2).flatten(1).view(torch.int8)  # (N, m)
        integers = torch.where(halves > levels(4), halves - 16, halves)
    return integers * scale[:, None]


def packed_state(state: Mapping[str, Tensor], bits: Mapping[str, int]) -> dict[str, Tensor]:
    """Tensors by name, those that `bits` names in these bits: `<name>.integers` and `<name>.scale` in its place."""
    found = {name: tensor for name, tensor in state.items() if name not in bits}
    for name in state.keys() & bits.keys():
        found[f"{name}{INTEGERS}"], found[f"{name}{SCALE}"] = packed(state[name], bits[name])
    return found


def unpacked_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    found = dict(state)
    for name in [name.removesuffix(SCALE) for name in state if name.endswith(SCALE)]:
        if f"{name}{INTEGERS}" in state:
            found[name] = unpacked(found.pop(f"{name}{INTEGERS}"), found.pop(f"{name}{SCALE}"))
    return found
