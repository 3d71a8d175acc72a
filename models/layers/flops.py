"""Floating-point operations of a decoder, by the formula that reports quote.

Per trained token `F = 6 N_mm + 12 sum_l s_l H h`: N_mm weights that multiply each token (the head once, also
when tied; table look-ups cost nothing), s_l keys that a token attends to on average in layer l, H heads of
width h. A multiply-add is two operations; the backward costs twice the forward; recomputation of activations
does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

__all__ = ["Flops", "decoder_flops", "matmul_flops", "mean_keys"]


@dataclass(frozen=True)
class Flops:
    """Operations per token: of a forward pass, and of a training step (forward and backward).

    `keys`: those that a token attends to on average, summed over the layers, as the two figures count them;
    `reference_keys`: those that the plain path multiplies, masked ones too, which costs it `masked_forward` and
    `masked_training` operations more. All of it adds up over the parts of a model, and a part that runs r times, or
    for a share r of the tokens, costs r times as much: `blocks * depth + head`. `weights`: those that multiply a token,
    N_mm, of which a training step makes gradients at two operations each.
    """

    forward_per_token: float
    training_per_token: float
    keys: float = 0.0
    reference_keys: float = 0.0
    masked_forward: float = 0.0
    masked_training: float = 0.0
    weights: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Flops:
        return Flops(*(value * times for value in astuple(self)))

    @property
    def reference(self) -> Flops:
        """What the plain path multiplies: what a counter of operations finds."""
        return Flops(
            self.forward_per_token + self.masked_forward,
            self.training_per_token + self.masked_training,
            self.reference_keys,
            self.reference_keys,
            weights=self.weights,
        )

    @property
    def training_only(self) -> Flops:
        """Of a part that scores and text do without."""
        return replace(self, forward_per_token=0.0, masked_forward=0.0)

    @property
    def frozen(self) -> Flops:
        """Of a part that is read in training, and through which nothing has to be propagated back."""
        training, masked = self.forward_per_token, self.masked_forward
        return replace(self, training_per_token=training, masked_training=masked, weights=0.0)

    def without_gradients(self, weights: float) -> Flops:
        """Where so many of the weights stay as they are, and gradients go back through them to others: 4 operations
        each, not 6."""
        weights = min(max(weights, 0.0), self.weights)
        return replace(
            self, training_per_token=self.training_per_token - 2 * weights, weights=self.weights - weights
        )


def matmul_flops(weights: float) -> Flops:
    """Of weights that multiply each token."""
    return Flops(2.0 * weights, 6.0 * weights, weights=weights)


def decoder_flops(
    matmul_weights: float,
    keys_per_layer: Iterable[float],
    attention_width: float,
    reference_keys_per_layer: Iterable[float],
) -> Flops:
    """`keys_per_layer`: s_l of each layer; `reference_keys_per_layer`: those that the plain path multiplies, all T of a
    row where it masks; `attention_width`: H h, or H (h + w) / 2 where values are w wide."""
    keys, reference_keys = sum(keys_per_layer), sum(reference_keys_per_layer)
    forward = 4.0 * attention_width * keys
    masked = 4.0 * attention_width * (reference_keys - keys)
    return matmul_flops(matmul_weights) + Flops(
        forward, 3 * forward, keys, reference_keys, masked, 3 * masked
    )


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys a token attends to, itself included, averaged over a row: token t sees min(t + 1, window)."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
