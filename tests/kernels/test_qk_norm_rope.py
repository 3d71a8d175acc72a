"""Rotation against transformers', and positions: what the generic tests of kernels do not ask."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.choose import Kernels
from kernels.qk_norm_rope import qk_norm_rope
from models.layers.decoder import document_positions
from models.layers.rotary import rotary_tables
from tests.kernels.interpret import interpreted

THETA = 10_000.0
theirs = pytest.mark.xdist_group("transformers")  # whose modules take a second to import, in one worker only


def queries_and_keys(batch: int = 2, tokens: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """As views of one projection, 4 heads and 2."""
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(batch, tokens, 8, width, generator=g, dtype=torch.float64)
    return fused[:, :, :4], fused[:, :, 4:6]


@theirs
def test_layout_half_is_llamas():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = queries_and_keys()
    cos, sin = rotary_tables(torch.arange(6), 8, THETA, torch.float64)
    both = (torch.cat((t, t), -1)[None, :, 0] for t in (cos, sin))  # (1, T, h)
    torch.testing.assert_close(
        qk_norm_rope(q, k, cos, sin, Kernels()), apply_rotary_pos_emb(q, k, *both, unsqueeze_dim=2)
    )


@theirs
def test_interleaved_and_partial_is_gpt_js():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    q, k = queries_and_keys()
    cos, sin = rotary_tables(torch.arange(6), 4, THETA, torch.float64)  # `rotary_dim` 4 of 8
    found = qk_norm_rope(q, k, cos, sin, Kernels(), interleaved=True)
    for x, y in zip((q, k), found, strict=True):
        turned = apply_rotary_pos_emb(x[..., :4], sin[None, :, 0], cos[None, :, 0])
        torch.testing.assert_close(y, torch.cat((turned, x[..., 4:]), -1))


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_that_restart_are_those_of_documents_alone(interleaved):
    q, k = (x.float() for x in queries_and_keys(batch=2, tokens=6))
    positions = document_positions(torch.tensor([[3, 3, 5, 5, 5, 5], [1, 1, 1, 1, 1, 2]]))
    weights = torch.linspace(0.5, 2, 8), torch.linspace(2, 0.5, 8)

    def turned(q, k, positions, kernels):
        tables = rotary_tables(positions, 8, THETA, q.dtype)
        return qk_norm_rope(q, k, *tables, kernels, weights=weights, eps=1e-5, interleaved=interleaved)

    with interpreted():
        found = turned(q, k, positions, Kernels({"qk_norm_rope": "triton"}))
    for row, document in ((0, slice(0, 2)), (0, slice(2, 6)), (1, slice(0, 5)), (1, slice(5, 6))):
        index = torch.arange(document.stop - document.start)
        alone = turned(q[row : row + 1, document], k[row : row + 1, document], index, Kernels())
        for whole, part in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[row, document], part[0])


def test_angles_of_long_positions():
    """In fp32 an angle of a million radians keeps six hundredths of one; slow dims, which tell such positions apart,
    keep all digits that matter."""
    position, width = 1_000_003, 64
    cos, sin = rotary_tables(torch.tensor([position]), width, THETA, torch.float32)
    for i in range(width // 2):
        angle = position * THETA ** (-2 * i / width)
        error = abs(math.remainder(math.atan2(sin[0, 0, i], cos[0, 0, i]) - angle, 2 * math.pi))
        assert error <= 2**-23 * angle + 1e-6, (i, error)
