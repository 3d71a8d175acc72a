"""Rotation, positions within documents, grouped heads of a model. Attention itself: tests/kernels/test_attention.py."""

import torch

from kernels.choose import Kernels
from kernels.qk_norm_rope import qk_norm_rope
from models.layers.decoder import document_positions
from models.layers.rotary import rotary_tables
from tests.models.tiny import build, tokens_of


def test_document_positions_restart():
    ids = torch.tensor([[7, 7, 7, 2, 2, 9], [1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    assert document_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


def test_rotation_is_relative_and_keeps_lengths():
    x = torch.randn(1, 12, 2, 8, dtype=torch.float64)
    y = torch.randn(1, 12, 2, 8, dtype=torch.float64)

    def products(shift):
        tables = rotary_tables(torch.arange(shift, shift + 12), 8, 10000.0, torch.float64)
        a, b = qk_norm_rope(x, y, *tables, Kernels())
        torch.testing.assert_close(a.norm(dim=-1), x.norm(dim=-1))
        return torch.einsum("bqhd,bkhd->bhqk", a, b)

    torch.testing.assert_close(products(0), products(1000), rtol=0, atol=1e-9)
    assert (products(0) - torch.einsum("bqhd,bkhd->bhqk", x, y)).abs().max() > 0.1


def test_rotation_tables_are_fp32_for_narrow_models():
    cos, sin = rotary_tables(torch.arange(4), 8, 10000.0, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    x = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
    assert {y.dtype for y in qk_norm_rope(x, x, cos, sin, Kernels())} == {torch.bfloat16}


def test_adding_a_constant_to_all_positions_changes_no_logit(monkeypatch):
    import models.vanilla as vanilla

    model, tokens = build("vanilla", torch.float32), tokens_of(length=40)
    before = model.logits(model(tokens))
    monkeypatch.setattr(
        vanilla, "rotary_tables", lambda positions, *rest: rotary_tables(positions + 500, *rest)
    )
    torch.testing.assert_close(model.logits(model(tokens)), before, rtol=0, atol=1e-4)


def test_grouped_heads_equal_multi_head_with_copied_weights():
    grouped, full = build("vanilla", n_kv_heads=2), build("vanilla", n_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    tokens = tokens_of(length=20)
    torch.testing.assert_close(full(tokens), grouped(tokens), rtol=0, atol=1e-12)
    same = build("vanilla", n_kv_heads=None)
    assert torch.equal(same(tokens), build("vanilla", n_kv_heads=4)(tokens))
