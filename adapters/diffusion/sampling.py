"""Text of any length from windows of limited length, with any known positions.

A window has the model's context and the token before it. Longer text is semi-autoregressive (Sahoo et al. 2024,
section 4.2): each round keeps the end of the text as a known prefix and draws the next chunk behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from adapters.diffusion.network import Network
from adapters.diffusion.process import Process, Sampling, Window
from adapters.randomness import Noise

__all__ = ["continue_text", "fill", "same_length"]

# (index among the rows of the call, tokens of the window with None where undecided)
OnStep = Callable[[int, list[int | None]], None]


def same_length(texts: Sequence[Sequence[object]]) -> list[list[int]]:
    """Indices of texts in groups of equal length, in order of first appearance. Rows of a window share a shape; their
    noise does not depend on who else is in it."""
    groups: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(len(text), []).append(i)
    return list(groups.values())


def fill(
    process: Process,
    network: Network,
    windows: list[list[int | None]],
    rows: Sequence[int],
    seed: int,
    part: int,
    sampling: Sampling,
    on_step: OnStep,
) -> list[list[int]]:
    """Draw the None positions of equally long windows. `rows` and `part` key the noise."""
    if process.mask_id is not None and any(process.mask_id in window for window in windows):
        raise ValueError(
            f"the text contains token {process.mask_id}, which model_cfg.absorbing_state_idx reserves for the mask"
        )
    unknown = torch.tensor([[token is None for token in window] for window in windows])
    known = [[0 if token is None else token for token in window] for window in windows]
    noise = Noise(seed, part, "generate", np.asarray(rows))
    window = Window(torch.tensor(known, dtype=torch.int64), unknown, noise, sampling)
    x = window.x

    def undecided(token: int) -> bool:
        """The mask, or noise that stands for no token."""
        return token == process.mask_id or (sampling.tokens is not None and token >= sampling.tokens)

    if bool(unknown.any()):
        for x in process.resolve(network, window):
            for i, row in enumerate(x.tolist()):
                on_step(i, [None if undecided(token) else token for token in row])
    return x.tolist()


def continue_text(
    process: Process,
    network: Network,
    texts: list[list[int]],
    rows: Sequence[int],
    new_tokens: int,
    window: int,
    chunk: int,
    seed: int,
    sampling: Sampling,
    on_step: OnStep,
) -> list[list[int]]:
    """`new_tokens` behind each of several equally long texts, in windows of at most `window` positions and, where one
    window is not enough, chunks of `chunk` new ones."""
    out = [list(text) for text in texts]
    wanted = len(out[0]) + new_tokens
    part = 0
    while len(out[0]) < wanted:
        # The first window is full of new text if that suffices to fill it; later ones bring a chunk each.
        prefix = (
            len(out[0]) if part == 0 and len(out[0]) <= window - chunk else min(len(out[0]), window - chunk)
        )
        fresh = min(window - prefix, wanted - len(out[0]))
        done = [text[: len(text) - prefix] for text in out]
        windows: list[list[int | None]] = [[*text[-prefix:], *[None] * fresh] for text in out]

        def show(i: int, tokens: list[int | None], done: list[list[int]] = done) -> None:
            on_step(i, [*done[i], *tokens])

        filled = fill(process, network, windows, rows, seed, part, sampling, show)
        out = [before + new for before, new in zip(done, filled, strict=True)]
        part += 1
    return out
