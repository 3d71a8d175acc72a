"""What the two records of the NanoGPT speedrun set (github.com/KellerJordan/modded-nanogpt, track 1), as the fields of
`models/current_best/config.py` with the values that a field of null takes.

`record89`: July 2026, commit f411b3d. `record26`: July 2025, U-net skips. Sizes are theirs: 128 dims a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["HEAD_WIDTH", "RECORDS", "STAGES", "Stage"]

HEAD_WIDTH = 128  # of a head of both
VOCABULARY = 50304  # rows of their embedding: what a table of hashes is sized for


class Stage(NamedTuple):
    """`start`: share of the run behind it when it begins; windows in blocks of `window_unit` tokens."""

    start: float
    short: int
    long: int


RECORDS: dict[str, dict[str, Any]] = {
    "record89": {
        "n_layers": 11,
        "attn_skip_layers": [6],
        "attn_scale_init": 0.1,
        "rope_layout": "pair",
        "yarn_windows": True,
        "window_pattern": "SSSLSS-SSSL",
        "window_schedule": "stages",
        "key_offset": "long",
        "paired_head_layers": [0, 2, 5, 9],
        "value_embeds": 5,
        "value_embed_layers": [1, 2, 8, 9, 10],
        "ve_gate": True,
        "unet_skips": False,
        "x0_inject": "gated",
        "resid_lambda_init": 1.1**0.5,
        "post_lambdas": True,
        "skip_link": [3, 6],
        "late_attn_source": [7, 8, 9, 10],
        "mudd": True,
        "mudd_gate": True,
        "xsa_layers": [1, 3, 4, 7],
        "attn_gate_layers": [3, 10],
        "dc_layers": [10],
        "smear": True,
        "bigram_vocab_size": 377280,
        "logit_softcap": [23.0, 5.0, 7.5],
        "tie_until": 0.667,
        "mtp_weights": [1.0, 0.5, 0.25],
        "prefix_weights": 0.25,
        "adam_every": 2,
    },
    "record26": {
        "n_layers": 12,
        "attn_skip_layers": [7],
        "attn_scale_init": 0.12,
        "rope_layout": "half",
        "yarn_windows": False,
        "window_pattern": "LSSSLSS-SSSL",
        "window_schedule": "linear",
        "key_offset": "off",
        "paired_head_layers": [],
        "value_embeds": 3,
        "value_embed_layers": [0, 1, 2, 9, 10, 11],
        "ve_gate": False,
        "unet_skips": True,
        "x0_inject": "scalar",
        "resid_lambda_init": "off",
        "post_lambdas": False,
        "skip_link": [],
        "late_attn_source": [],
        "mudd": False,
        "mudd_gate": False,
        "xsa_layers": [],
        "attn_gate_layers": [],
        "dc_layers": [],
        "smear": False,
        "bigram_vocab_size": 0,
        "logit_softcap": [30.0, 0.0, 7.5],  # the last times sqrt(d_model)
        "tie_until": 0.0,
        "mtp_weights": [1.0],
        "prefix_weights": 0.0,
        "adam_every": 1,
    },
}

# Of 1,270 steps and 15 more (record89), and of windows that grow evenly from 1 block to 14 (record26).
_THIRD, _EXTENSION = 1270 / 3 / 1285, 1270 / 1285
STAGES: dict[str, list[Stage]] = {
    "stages": [Stage(0.0, 1, 3), Stage(_THIRD, 3, 7), Stage(2 * _THIRD, 5, 11), Stage(_EXTENSION, 6, 13)],
    "linear": [Stage(max(0.0, (n - 1.5) / 13), max(1, n // 2), n) for n in range(1, 15)],
}
