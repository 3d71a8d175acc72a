"""Floating-point operations of a decoder, by the formula that reports quote.

Per trained token `F = 6 N_mm + 12 sum_l s_l H h`: N_mm weights that multiply each token (the head once, also
when tied; table look-ups cost nothing), s_l keys that a token attends to on average in layer l, H heads of
width h. A multiply-add is two operations; the backward costs twice the forward; recomputation of activations
does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Flops", "decoder_flops", "mean_keys"]


@dataclass(frozen=True)
class Flops:
    """Operations per token: of a forward pass, and of a training step (forward and backward)."""

    forward_per_token: float
    training_per_token: float


def decoder_flops(matmul_weights: int, keys_per_layer: Iterable[float], attention_width: int) -> Flops:
    """`keys_per_layer`: s_l of each layer; `attention_width`: H h."""
    training = 6.0 * matmul_weights + 12.0 * sum(keys_per_layer) * attention_width
    return Flops(forward_per_token=training / 3, training_per_token=training)


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a token attends to, itself included, averaged over a row: token t sees min(t + 1, window)."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
