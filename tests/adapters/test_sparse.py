"""What is drawn of a text that sparse attention reads."""

import torch

from adapters import build_adapter
from data.tokenizers import ByteTokenizer
from models.sparse.mixer import Ranking
from tests.contract.tiny import config


@torch.no_grad()
def test_the_blocks_that_are_drawn_are_those_that_tokens_selected():
    """Of blocks of 4, the start token in the first: 3 at most and a token's own, never one behind it."""
    adapter = build_adapter(*config("nsa", "model_cfg.vocab_size=null"), ByteTokenizer()).eval()
    chosen, text = [], "whose is it, and which?"
    for module in adapter.modules():
        if isinstance(module, Ranking):
            module.register_forward_hook(lambda ranking, given, starts: chosen.append(starts[0]))
    maps = adapter.annotate(text).maps
    assert [one.name for one in maps] == [
        f"layer {layer}, group {group}: selected blocks" for layer in range(2) for group in range(2)
    ]
    for number, drawn in enumerate(maps):
        starts = chosen[number // 2][1:, number % 2]  # (L, n)
        assert drawn.values.shape == (len(text), 6)
        for t, (row, of) in enumerate(zip(drawn.values, starts.tolist(), strict=True), start=1):
            assert row.nonzero().flatten().tolist() == [start // 4 for start in of if start >= 0]
            assert row[t // 4] == 1 and row[0] == 1 and not row[t // 4 + 1 :].any()
