"""Rotation against transformers', and positions: what the generic tests of kernels do not ask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kernels.against import deviations
from kernels.choose import Call, Kernels
from kernels.qk_norm_rope import SPEC, qk_norm_rope, reference, rotation_call
from kernels.qk_norm_rope.closed_form import closed_form
from models.layers.decoder import document_positions
from models.layers.rotary import rotary_tables
from tests.kernels import samples
from tests.kernels.interpret import interpreted
from tests.kernels.samples import transposed

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


@pytest.mark.parametrize("layout", [torch.clone, transposed])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [name for name, size in SPEC.small.items() if size.get("interleaved")])
def test_complex_numbers_give_what_the_definition_does(size, dtype, layout):
    spec, sample = samples.drawn("qk_norm_rope", size, getattr(torch, dtype))
    found = deviations(closed_form, reference, sample.map(layout))
    assert max(found.values()) <= spec.tolerance[dtype], found


def test_rows_with_positions_of_their_own_turn_by_these():
    q, k = queries_and_keys()
    tables = rotary_tables(torch.tensor([[0, 1, 2, 3, 4, 5], [7, 3, 0, 0, 1, 9]]), 8, THETA, torch.float64)
    found, expected = (
        form(q, k, *tables, None, None, eps=0.0, interleaved=True) for form in (closed_form, reference)
    )
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_a_cpu_takes_complex_numbers_of_neighbours_where_nothing_is_compiled():
    neighbours, halves = (
        Call(torch.device("cpu"), torch.float32, **rotation_call(8, interleaved=given))
        for given in (True, False)
    )
    assert Kernels().foresee("qk_norm_rope", neighbours)[0] == "closed_form"
    assert Kernels().foresee("qk_norm_rope", replace(neighbours, compiling=True))[0] == "reference"
    assert Kernels().foresee("qk_norm_rope", halves)[0] == "reference"
    with pytest.raises(ValueError, match="as long as the definition. Possible: auto, reference"):
        Kernels({"qk_norm_rope": "closed_form"}).foresee("qk_norm_rope", halves)


def test_angles_of_long_positions():
    """In fp32 an angle of a million radians keeps six hundredths of one; slow dims, which tell such positions apart,
    keep all digits that matter."""
    position, width = 1_000_003, 64
    cos, sin = rotary_tables(torch.tensor([position]), width, THETA, torch.float32)
    for i in range(width // 2):
        angle = position * THETA ** (-2 * i / width)
        error = abs(math.remainder(math.atan2(sin[0, 0, i], cos[0, 0, i]) - angle, 2 * math.pi))
        assert error <= 2**-23 * angle + 1e-6, (i, error)
