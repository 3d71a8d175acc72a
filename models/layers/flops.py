"""Floating-point operations of a decoder, by the formula that reports quote.

Per trained token `F = 6 N_mm + 12 sum_l s_l H h`: N_mm weights that multiply each token (the head once, also
when tied; table look-ups cost nothing), s_l keys that a token attends to on average in layer l, H heads of
width h. A multiply-add is two operations; the backward costs twice the forward; recomputation of activations
does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

__all__ = ["Flops", "decoder_flops", "mean_keys"]


@dataclass(frozen=True)
class Flops:
    """Operations per token: of a forward pass, and of a training step (forward and backward).

    `keys`: those that a token attends to on average, summed over the layers, as the two figures count them;
    `reference_keys`: those that the plain path multiplies, masked ones too; `per_key`: forward operations of a key,
    4 H h.
    """

    forward_per_token: float
    training_per_token: float
    keys: float = 0.0
    reference_keys: float = 0.0
    per_key: float = 0.0

    @property
    def reference(self) -> Flops:
        """What the plain path multiplies: what a counter of operations finds."""
        masked = (self.reference_keys - self.keys) * self.per_key
        return replace(
            self,
            forward_per_token=self.forward_per_token + masked,
            training_per_token=self.training_per_token + 3 * masked,
            keys=self.reference_keys,
        )


def decoder_flops(
    matmul_weights: int,
    keys_per_layer: Iterable[float],
    attention_width: int,
    reference_keys_per_layer: Iterable[float],
) -> Flops:
    """`keys_per_layer`: s_l of each layer; `reference_keys_per_layer`: those that the plain path multiplies, all T of a
    row where it masks; `attention_width`: H h."""
    keys, per_key = sum(keys_per_layer), 4.0 * attention_width
    forward = 2.0 * matmul_weights + keys * per_key
    return Flops(forward, 3 * forward, keys, sum(reference_keys_per_layer), per_key)


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a token attends to, itself included, averaged over a row: token t sees min(t + 1, window)."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
