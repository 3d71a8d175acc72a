"""Native sparse attention from the paper's equations: token by token, in fp64, slow and obvious.

Yuan et al. 2025 (arXiv:2502.11089), equations 5 to 12. Of one document; what is packed is taken apart first.
"""

import math

import numpy as np


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def attend(q, k, v):
    """q (h), k (S, h), v (S, w): (w), and 0 where there is nothing to attend to."""
    return softmax(k @ q / np.sqrt(len(q))) @ v if len(k) else np.zeros(v.shape[1])


def compressed(q, k, v, t, size, stride):
    """Equations 5 and 8 of one head: q (h), summaries k (N, h), v (N, w) of blocks i of tokens i stride to i stride +
    size - 1. Output and probabilities."""
    seen = [i for i in range(len(k)) if i * stride + size - 1 <= t]
    p = np.zeros(len(k))
    if seen:
        p[seen] = softmax(k[seen] @ q / np.sqrt(len(q)))
    return p @ v if len(v) else np.zeros(v.shape[1]), p


def importance(p, blocks, size, stride, block):
    """Equation 9, counted from 0: the double sum over m and r."""
    scores = np.zeros(blocks)
    for j in range(blocks):
        for m in range(block // stride):
            for r in range(size // stride):
                i = block // stride * j + m - r
                if 0 <= i < len(p):
                    scores[j] += p[i]
    return scores


def select(scores, t, block, count, first, local):
    """Equations 11 and 12 of one group: numbers of the selected blocks, ascending."""
    own = t // block
    forced = {j for j in range(first) if j <= own} | {own - d for d in range(local) if own >= d}
    rest = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-scores[j], j))
    return sorted(forced | set(rest[: count - len(forced)]))


def summary(x, places, up, up_bias, down, down_bias):
    """Equation 7 of one block and group: x and places (l, h), up (o, l h), down (h, o). The MLP's GELU is exact."""
    hidden = up @ (x + places).reshape(-1) + up_bias
    gelu = np.array([y * 0.5 * (1 + math.erf(y / math.sqrt(2))) for y in hidden])
    return down @ gelu + down_bias
