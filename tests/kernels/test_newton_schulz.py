"""The Newton-Schulz iteration against its polynomials restated on singular values, in fp64."""

import math
from typing import get_args

import pytest
import torch

from configs.schema import RunConfig
from kernels.choose import Kernels
from kernels.newton_schulz import newton_schulz, peers
from kernels.newton_schulz import triton as ours
from kernels.newton_schulz.coefficients import COEFFICIENTS
from kernels.newton_schulz.reference import reference
from kernels.newton_schulz.work import operations
from tests.kernels.interpret import interpreted, poisoned
from tests.kernels.samples import LAYOUTS

# Algorithm 1 of Amsel et al. (arXiv:2505.16932), to seven digits; divided by 1.01, 1.01^3 and 1.01^5 but for the last.
POLAR_EXPRESS = [
    (8.2872120, -23.5958865, 17.3003873),
    (4.1070591, -2.9478499, 0.5448431),
    (3.9486909, -2.9089021, 0.5518191),
    (3.3184197, -2.4884880, 0.5100489),
    (2.3006520, -1.6689040, 0.4188073),
    (1.8913014, -1.2679958, 0.3768041),
    (1.8750015, -1.2500016, 0.3750002),
]


# The table of modded-nanogpt.
NANOGPT = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def restated(name: str, steps: int, x: torch.Tensor) -> torch.Tensor:
    """What becomes of singular values x of a matrix whose squares add up to 1."""
    if name == "polar_express":
        x = x / 1.01
        for a, b, c in POLAR_EXPRESS[:steps]:
            y = x / 1.01
            x = a * y + b * y**3 + c * y**5
        for _ in range(steps - len(POLAR_EXPRESS)):
            x = (15 * x - 10 * x**3 + 3 * x**5) / 8
        return x
    if name == "polar_express_nanogpt":
        x = x / 1.02
        for a, b, c in (NANOGPT + [NANOGPT[-1]] * 5)[:steps]:
            x = a * x + b * x**3 + c * x**5
        return x
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def with_singular_values(values: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    """(1, rows, columns), U, V^T."""
    u, v = orthonormal(rows, len(values), 1), orthonormal(columns, len(values), 2)
    return (u * values @ v.mT)[None], u, v.mT


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_values_go_through_the_polynomials(name, steps):
    values = torch.logspace(0, -3, 6, dtype=torch.float64)
    for rows, columns in ((6, 11), (11, 6)):
        stack, u, vt = with_singular_values(values, rows, columns)
        found = newton_schulz(7.0 * stack, Kernels(), coefficients=name, steps=steps)
        wanted = u * restated(name, steps, values / values.norm()) @ vt
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)


def test_polar_express_comes_nearer_to_one():
    """Down to the smallest singular value that its coefficients are made for."""
    stack, *_ = with_singular_values(torch.logspace(0, -3, 32, dtype=torch.float64), 32, 32)
    worst, typical = {}, {}
    for name in COEFFICIENTS:
        away = torch.linalg.svdvals(newton_schulz(stack, Kernels(), coefficients=name)) - 1
        worst[name], typical[name] = float(away.abs().max()), float(away.square().mean().sqrt())
    assert worst["polar_express"] < 0.5 < 0.7 < worst["classic"]
    assert typical["polar_express"] < 0.6 * typical["classic"]
    eight = newton_schulz(stack, Kernels(), coefficients="polar_express", steps=8)
    assert (torch.linalg.svdvals(eight) - 1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "smallest", "low", "high"),
    [
        ("classic", 5e-3, 0.67, 1.17),
        ("polar_express", 1e-3, 0.84, 1.15),
        ("polar_express_nanogpt", 1e-3, 0.84, 1.15),
    ],
)
def test_where_five_steps_bring_singular_values_in_fp32(name, smallest, low, high):
    """Those of at least so many times the Frobenius norm, a dense set of them, 12 in each matrix."""
    u, v = orthonormal(64, 12, 1), orthonormal(48, 12, 2)
    values = (
        torch.logspace(0, math.log10(smallest), 600, dtype=torch.float64).view(12, 50).T
    )  # (50, 12), each spread
    largest = (1 - values[:, 1:].square().sum(1)).clamp(min=0).sqrt()  # the norm is 1
    values = torch.cat([largest[:, None], values[:, 1:]], dim=1)[largest > 0.1]
    found = newton_schulz(
        ((u * values[:, None]) @ v.mT).float(), Kernels(), coefficients=name
    ).double()  # (B, 64, 48)
    brought = (u.mT @ found @ v).diagonal(dim1=1, dim2=2)
    assert len(values) > 10 and values.min() < 1.01 * smallest
    assert low <= brought.min() and brought.max() <= high


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_the_size_of_a_matrix_does_not_matter(name):
    """From 1e-2 to 1e3 times a norm of 1: what is added to the norm does not show; zeros stay zeros."""
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(1, 24, 40, generator=generator)
    matrix /= matrix.norm()
    base = newton_schulz(matrix, Kernels(), coefficients=name)
    for size in (1e-2, 1e-1, 1e1, 1e3):
        sized = newton_schulz(size * matrix, Kernels(), coefficients=name)
        torch.testing.assert_close(sized, base, rtol=0, atol=2e-3)
    assert not newton_schulz(torch.zeros(1, 4, 6), Kernels(), coefficients=name).any()


def test_the_field_knows_the_table():
    assert set(get_args(RunConfig.model_fields["muon_coefficients"].annotation)) == COEFFICIENTS.keys()


@pytest.mark.parametrize(
    ("stack", "options", "message"),
    [
        (torch.ones(3, 4), {}, r"\(B, m, n\) is needed, got shape \(3, 4\)"),
        (torch.ones(1, 3, 4), {"coefficients": "clasic"}, "Did you mean 'classic'"),
    ],
)
def test_what_cannot_be(stack, options, message):
    with pytest.raises(ValueError, match=message):
        newton_schulz(stack, Kernels(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_tall_stacks_of_any_strides(layout):
    """They are iterated as transposed views."""
    stack = torch.randn(2, 36, 20, generator=torch.Generator().manual_seed(3))
    options = {"coefficients": "classic", "steps": 5}
    wanted = reference(stack.double(), **options, dtype=torch.float64)
    with interpreted(), poisoned():
        found = ours.newton_schulz(layout(stack), **options, dtype=torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [{"BLOCK": 128, "BLOCK_K": 64}, {"BLOCK": 64, "BLOCK_K": 128}, {"BLOCK": 16}]
)
def test_tiles_of_any_size(monkeypatch, choice):
    """Two rows of tiles of 128, the second hardly begun; columns that end within a step."""
    x = torch.randn(2, 130, 70, generator=torch.Generator().manual_seed(4))
    default = {"BLOCK": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    monkeypatch.setattr(ours, "launch", lambda *args: {**default, **choice})
    with interpreted(), poisoned():
        gram = ours._symmetric(x)
        again = ours._symmetric(gram, 2.0, -3.0)
    exact = x.double() @ x.double().mT
    torch.testing.assert_close(gram.double(), exact, rtol=0, atol=1e-4)
    assert torch.equal(gram, gram.mT) and torch.equal(again, again.mT), "symmetric to the bit"
    exact = 2 * exact @ exact - 3 * exact
    torch.testing.assert_close(again.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


def test_operations_are_those_of_the_products():
    plain = operations(12, 768, 3072, steps=5, symmetric=False)
    assert plain == 12 * 5 * (2 * 768 * 768 * (3072 + 768 + 3072))
    half = operations(12, 3072, 768, steps=5)
    assert half == 12 * 5 * (768 * 769 * (3072 + 768) + 2 * 768 * 768 * 3072)


def test_torchs_own_is_the_same_iteration():
    stack = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(5))
    options = {"coefficients": "classic", "steps": 5, "dtype": torch.bfloat16}
    theirs, plain = peers.of_torch(stack, **options), reference(stack, **options)
    assert (theirs - plain).norm() < 0.05 * plain.norm()


def test_torchs_whole_step_moves_what_it_is_given():
    parameters = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p)
    peers.torch_muon(parameters)()
    assert all(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
