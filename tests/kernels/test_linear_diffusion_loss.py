"""The chunked diffusion losses against their definition, and the definition against explicit state spaces."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import chunks
from kernels.choose import Kernels
from kernels.linear_diffusion_loss import MODES, linear_diffusion_loss, reference
from tests.kernels.interpret import interpreted

MASKED = ("subs", "sedd_absorb", "d3pm_absorb", "d3pm_absorb_zero_mask")
T = 10
F64 = torch.float64


def survival() -> Tensor:
    """alpha_bar_0 .. alpha_bar_T of an arbitrary chain."""
    return torch.cat(
        (torch.ones(1, dtype=F64), torch.cumprod(1 - torch.linspace(0.05, 0.6, T, dtype=F64), 0))
    )


def case(
    mode: str, dtype: torch.dtype = F64, *, rows: int = 37, n: int = 19, noisy: float = 0.5, pad: int = 5
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments; the same numbers in every dtype. `noisy`: fraction of changed
    rows."""
    g = torch.Generator().manual_seed(1)
    masked = mode in MASKED
    V, mask_id = (n + 1, n) if masked else (n, None)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = scale * torch.randn(*shape, generator=g, dtype=F64)
        return values.float().to(dtype).requires_grad_()

    hidden, weight, bias = draw(rows, 8), draw(V + pad, 8, scale=0.5), draw(V + pad)
    x0 = torch.randint(0, n, (rows,), generator=g)
    noise = torch.full_like(x0, n) if masked else torch.randint(0, n, (rows,), generator=g)
    xt = torch.where(torch.rand(rows, generator=g) < noisy, noise, x0)
    t = torch.randint(1, T + 1, (rows,), generator=g)
    a, b = survival()[t - 1], survival()[t]
    sigma = 0.05 + 3 * torch.rand(rows, generator=g, dtype=F64)
    known = {"sigma_bar": sigma, "a": a, "b": b, "beta": 1 - b / a, "first": t == 1}
    weights = 2 * torch.rand(rows, generator=g, dtype=F64)
    aux = torch.rand(rows, generator=g, dtype=F64)
    coefficients = {name: known[name] for name in MODES[mode].names}
    options = {"mode": mode, "V": V, "n": n, "mask_id": mask_id}
    options["aux_weight"] = aux if MODES[mode].has_aux else 0.0
    return (hidden, weight, bias, x0, xt, weights, coefficients), options


def close(found: Tensor, wanted: Tensor, relative: float) -> bool:
    """Largest difference relative to the largest value."""
    return bool(
        (found.double() - wanted.double()).abs().max() <= relative * wanted.double().abs().max() + 1e-30
    )


@pytest.mark.parametrize("noisy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("dtype", "loss_error", "gradient_error"), [(F64, 1e-13, 1e-12), (torch.float32, 1e-5, 1e-4)]
)
def test_chunked_equals_reference(
    mode: str, noisy: float, dtype: torch.dtype, loss_error: float, gradient_error: float
) -> None:
    """37 rows in chunks of 7, 20 or 19 states, 5 padded columns; fp32 against the reference in fp64."""
    args, options = case(mode, dtype, noisy=noisy)
    wide, _ = case(mode, F64, noisy=noisy)
    total, nats, aux = linear_diffusion_loss(*args, **options, chunk_rows=7)
    expected, expected_nats, expected_aux = reference(*wide, **options)
    assert total.dtype == nats.dtype == dtype
    assert not nats.requires_grad
    assert close(total, expected, loss_error)
    assert close(nats, expected_nats, loss_error)
    assert (aux is None) == (expected_aux is None)
    assert aux is None or close(aux, expected_aux, loss_error)
    # A factor behind the loss must reach the stored gradients.
    found = torch.autograd.grad(3 * total, args[:3])
    wanted = torch.autograd.grad(3 * expected, wide[:3])
    for one, other in zip(found, wanted, strict=True):
        assert close(one, other, gradient_error)


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    args, options = case(mode, rows=6, n=5, pad=2)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_diffusion_loss(hidden, weight, bias, *args[3:], **options, chunk_rows=4)[0]

    assert torch.autograd.gradcheck(loss, args[:3])


@pytest.mark.parametrize("mode", MODES)
def test_padded_columns_and_chunking_do_not_count(mode: str) -> None:
    (hidden, weight, bias, *rest), options = case(mode)
    total, nats, _ = linear_diffusion_loss(hidden, weight, bias, *rest, **options)
    gradients = torch.autograd.grad(total, (weight, bias))
    assert all(g[options["V"] :].abs().max() == 0 for g in gradients)
    with torch.no_grad():
        spoiled = weight.clone()
        spoiled[options["V"] :] = 1e6
        loud = bias.clone()
        loud[options["V"] :] = 1e6
    for chunk_rows in (1, 5, 37, 1000):
        same, same_nats, _ = linear_diffusion_loss(
            hidden, spoiled, loud, *rest, **options, chunk_rows=chunk_rows
        )
        assert close(same, total, 1e-14) and close(same_nats, nats, 1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_without_bias_without_rows_and_without_gradient(mode: str) -> None:
    (hidden, weight, bias, *rest), options = case(mode)
    total, nats, _ = linear_diffusion_loss(hidden, weight, None, *rest, **options, chunk_rows=7)
    expected, _, _ = reference(hidden, weight, torch.zeros_like(bias), *rest, **options)
    assert close(total, expected, 1e-13)
    assert close(*(torch.autograd.grad(x, weight)[0] for x in (total, expected)), 1e-12)

    (_, _, _, x0, xt, weights, coefficients) = case(mode)[0]
    none = slice(0, 0)
    if isinstance(options["aux_weight"], Tensor):
        options = {**options, "aux_weight": options["aux_weight"][none]}
    empty = {name: c[none] for name, c in coefficients.items()}
    total, nats, _ = linear_diffusion_loss(
        hidden[none], weight, bias, x0[none], xt[none], weights[none], empty, **options
    )
    total.backward()
    assert total.item() == 0 and nats.shape == (0,)
    assert weight.grad is not None and weight.grad.abs().max() == 0


@pytest.mark.parametrize("of_rows", [True, False])
@pytest.mark.parametrize("path", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_padding_does_not_count(mode: str, path: str, of_rows: bool) -> None:
    """Rows of weight 0 beside others, wherever their ids are from: as if they were not there, and no NaN."""
    if path == "triton":
        pytest.importorskip("triton")
    (hidden, weight, bias, x0, xt, weights, coefficients), options = case(mode, torch.float32, rows=9, n=6)
    aux = options["aux_weight"] if of_rows or not MODES[mode].has_aux else 0.5
    known = {name: value for name, value in options.items() if name != "aux_weight"}
    kept = torch.tensor([True, False, True] * 3)
    mask_id = options["mask_id"]
    last = options["V"] - 1 if mask_id is None else mask_id
    padded = [torch.where(kept, ids, last) for ids in (x0, xt)]
    zeroed = [torch.where(kept, w, 0.0) if isinstance(w, Tensor) else w for w in (weights, aux)]
    kernels = Kernels({"linear_diffusion_loss": path})
    args = (hidden, weight, bias, *padded, zeroed[0], coefficients)
    with interpreted() if path == "triton" else nullcontext():
        total, nats, ce = linear_diffusion_loss(*args, **known, aux_weight=zeroed[1], kernels=kernels)
    alone = [t[kept] for t in (hidden, x0, xt, weights)]
    few = {name: c[kept] for name, c in coefficients.items()}
    expected, _, _ = reference(
        alone[0],
        weight,
        bias,
        *alone[1:],
        few,
        **known,
        aux_weight=aux[kept] if isinstance(aux, Tensor) else aux,
    )
    assert close(total, expected, 1e-5)
    assert nats.isfinite().all() and (ce is None or ce.isfinite().all())  # others weigh them by themselves
    found = torch.autograd.grad(total, (hidden, weight, bias))
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))
    for one, other in zip(found, wanted, strict=True):
        assert close(one, other, 1e-4)
    assert found[0][~kept].abs().max() == 0


@pytest.mark.parametrize("path", ["reference", "chunked"])
@pytest.mark.parametrize("mode", ["subs", "d3pm_absorb_zero_mask"])
def test_a_mask_among_clean_tokens_is_no_padding(mode: str, path: str) -> None:
    """A model that is given one by mistake hears of it."""
    (hidden, weight, bias, x0, xt, *rest), options = case(mode)
    x0, xt = x0.clone(), xt.clone()
    x0[0] = xt[0] = options["mask_id"]
    kernels = Kernels({"linear_diffusion_loss": path})
    total, _, _ = linear_diffusion_loss(hidden, weight, bias, x0, xt, *rest, **options, kernels=kernels)
    assert not total.isfinite()


@pytest.mark.parametrize("mask_id", [0, 7, 18])
@pytest.mark.parametrize("mode", MASKED)
def test_a_mask_inside_the_vocabulary_is_a_relabelled_one_behind_it(mode: str, mask_id: int) -> None:
    """A reserved token as the mask: the same losses and gradients as with an appended one, of both implementations."""
    (hidden, weight, bias, x0, xt, weights, coefficients), options = case(mode)
    n = options["n"]
    moved = {**options, "mask_id": mask_id}
    real = torch.arange(n)
    label = torch.cat((real + (real >= mask_id), torch.tensor([mask_id])))  # of each state
    source = torch.cat((label.argsort(), torch.arange(n + 1, len(weight))))  # padding stays where it is
    other, shifted = (t.detach()[source].requires_grad_() for t in (weight, bias))
    rest = (label[x0], label[xt], weights, coefficients)
    total, nats, aux = linear_diffusion_loss(hidden, weight, bias, x0, xt, weights, coefficients, **options)
    wanted = torch.autograd.grad(total, (hidden, weight, bias))
    for implementation in (linear_diffusion_loss, reference):
        found, found_nats, found_aux = implementation(hidden, other, shifted, *rest, **moved)
        assert close(found, total, 1e-13) and close(found_nats, nats, 1e-13)
        assert (found_aux is None) == (aux is None) and (aux is None or close(found_aux, aux, 1e-13))
        gradients = torch.autograd.grad(found, (hidden, other, shifted))
        assert close(gradients[0], wanted[0], 1e-12)
        assert all(close(g, w[source], 1e-12) for g, w in zip(gradients[1:], wanted[1:], strict=True))


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("gradients in evaluation")

    monkeypatch.setattr(chunks._Gradients, "add", refuse)
    args, options = case("subs")
    with torch.no_grad():
        linear_diffusion_loss(*args, **options)
    with pytest.raises(AssertionError, match="gradients in evaluation"):
        linear_diffusion_loss(*args, **options)


@pytest.mark.parametrize("which", range(8))
@pytest.mark.parametrize("mode", ["subs", "d3pm_uniform"])
def test_every_combination_of_what_needs_a_gradient(mode: str, which: int) -> None:
    args, options = case(mode)
    inputs = [t.requires_grad_(bool(which & bit)) for t, bit in zip(args[:3], (1, 2, 4), strict=True)]
    total, plain = (
        run(*args, **options, **how)[0]
        for run, how in ((linear_diffusion_loss, {"chunk_rows": 7}), (reference, {}))
    )
    assert total.requires_grad == bool(which) and close(total, plain, 1e-13)
    if alive := [t for t in inputs if t.requires_grad]:
        for a, b in zip(*(torch.autograd.grad(t, alive) for t in (total, plain)), strict=True):
            assert close(a, b, 1e-12)


def test_gradients_are_of_first_order() -> None:
    args, options = case("sedd_absorb")
    total, nats, aux = linear_diffusion_loss(*args, **options, chunk_rows=7)
    assert aux is not None and not nats.requires_grad and not aux.requires_grad
    with pytest.raises(RuntimeError, match="kernels=reference has them"):
        torch.autograd.grad(total, args[0], create_graph=True)


# -- against explicit sums over states -----------------------------------------------------------------------


def logits_only(z: Tensor, x0: Tensor, xt: Tensor, coefficients: dict[str, Tensor], **options: Any) -> Tensor:
    """nats of both implementations for given logits, as an identity output layer passes them through."""
    rows, V = z.shape
    head = torch.eye(V, dtype=z.dtype)
    args = (z, head, None, x0, xt, torch.ones(rows, dtype=z.dtype), coefficients)
    _, nats, _ = linear_diffusion_loss(*args, **options)
    _, defined, _ = reference(*args, **options)
    assert torch.allclose(nats, defined, rtol=1e-10, atol=1e-10)
    return nats


def every_pair(states: int, real: int) -> tuple[Tensor, Tensor]:
    pairs = torch.cartesian_prod(torch.arange(real), torch.arange(states))
    return pairs[:, 0], pairs[:, 1]


@pytest.mark.parametrize("sigma_bar", [1e-4, 0.05, 0.7, 3.0, 20.0])
@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_score_entropy_equals_sum_over_states(kind: str, sigma_bar: float) -> None:
    """`sum_{y != x} Q(y -> x) (s_y - r_y log s_y + r_y (log r_y - 1))` with r from the matrix exponential of
    the rates, for every clean and noisy state (Lou et al. 2024, equations 5 and 10)."""
    n = 4
    V = n + (kind == "absorb")
    rates = torch.full((V, V), 1 / n, dtype=F64)  # rates[i, j]: from i to j
    if kind == "absorb":
        rates = torch.zeros(V, V, dtype=F64)
        rates[:n, n] = 1.0
    rates -= torch.diag(rates.sum(1))
    law = torch.linalg.matrix_exp(sigma_bar * rates)  # law[x0, x]
    x0, xt = every_pair(V, n)
    z = 2 * torch.randn(len(x0), V, dtype=F64, generator=torch.Generator().manual_seed(0))
    scale = 1 / (math.expm1(sigma_bar) * n) if kind == "absorb" else 1.0
    unit = 1 / math.expm1(sigma_bar) if kind == "absorb" else 1.0  # what the op leaves to the row's weight

    expected = []
    for i in range(len(x0)):
        total = torch.zeros((), dtype=F64)
        for y in range(V):
            rate = rates[y, xt[i]]
            if y == xt[i] or rate == 0 or law[x0[i], xt[i]] == 0:
                continue
            score = scale * z[i, y].exp()
            ratio = law[x0[i], y] / law[x0[i], xt[i]]
            total += rate * (score - torch.xlogy(ratio, score) + torch.xlogy(ratio, ratio) - ratio)
        expected.append(total / unit)
    options = {"V": V, "n": n, "mask_id": n if kind == "absorb" else None}
    given = {} if kind == "absorb" else {"sigma_bar": torch.full((len(x0),), sigma_bar, dtype=F64)}
    nats = logits_only(z, x0, xt, given, mode=f"sedd_{kind}", **options)
    assert torch.allclose(nats, torch.stack(expected), rtol=1e-10, atol=1e-10)
    # fp32 end to end, relative to the size of the terms
    single = {name: c.float() for name, c in given.items()}
    nats = linear_diffusion_loss(
        z.float(), torch.eye(V), None, x0, xt, torch.ones(len(x0)), single, mode=f"sedd_{kind}", **options
    )[1]
    assert torch.allclose(nats.double(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_unscaled_absorbing_scores_by_shift() -> None:
    """log-scores z as they are: r^{-1} (sum_y e^z_y - r z_x0 + r (log r - 1)), r = 1 / (e^sigma - 1)."""
    n, sigma = 3, 0.7
    r = 1 / math.expm1(sigma)
    z = torch.tensor([[0.3, -0.4, 1.1, 7.0]], dtype=F64)
    expected = (z[0, :n].exp().sum() - r * z[0, 1] + r * (math.log(r) - 1)) / r
    shift = {"shift": torch.tensor([math.log(n) - math.log(r)], dtype=F64)}
    x0, xt = torch.tensor([1]), torch.tensor([n])
    nats = logits_only(z, x0, xt, shift, mode="sedd_absorb", V=n + 1, n=n, mask_id=n)
    assert torch.allclose(nats[0], expected, rtol=1e-12)


def test_published_values_of_score_entropy() -> None:
    """z = (1, 0, -1), sigma = 0.7: values computed once by brute force in fp64."""
    z = torch.tensor([[1.0, 0.0, -1.0]], dtype=F64)
    padded = torch.cat((z, torch.full((1, 1), 5.0, dtype=F64)), 1)
    zero, one = torch.tensor([0]), torch.tensor([1])
    absorb = logits_only(padded, zero, torch.tensor([3]), {}, mode="sedd_absorb", V=4, n=3, mask_id=3)
    assert absorb.item() / math.expm1(0.7) == pytest.approx(0.4544165868232925, abs=1e-12)
    given = {"sigma_bar": torch.tensor([0.7], dtype=F64)}
    for x0, value in ((zero, 0.2052749663423348), (one, 0.6286384745422988)):
        nats = logits_only(z, x0, one, given, mode="sedd_uniform", V=3, n=3, mask_id=None)
        assert nats.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("t", [1, 2, 5, T])
@pytest.mark.parametrize("kind", ["absorb", "uniform"])
def test_divergence_equals_explicit_matrices(kind: str, t: int) -> None:
    """KL between q(x_{t-1} | x_t, x0) and `p(x_{t-1} = j | x_t) ~ [Q_t]_{j, x_t} [p Qbar_{t-1}]_j`, both as
    vectors over all states (Austin et al. 2021, equations 3 and 4); -log p(x0 | x1) at t = 1."""
    n = 5
    K = n + (kind == "absorb")
    alpha = survival()

    def matrix(keep: Tensor) -> Tensor:
        stationary = torch.full((K,), 1 / K, dtype=F64)
        if kind == "absorb":
            stationary = torch.eye(K, dtype=F64)[n]
        return keep * torch.eye(K, dtype=F64) + (1 - keep) * stationary.expand(K, K)

    a, b = alpha[t - 1], alpha[t]
    step, before = matrix(b / a), matrix(a)
    x0, xt = every_pair(K, n)
    z = torch.randn(len(x0), K, dtype=F64, generator=torch.Generator().manual_seed(2))
    posterior = step[:, xt].T * before[x0]  # (M, K)
    reachable = posterior.sum(1) > 0
    q = posterior / posterior.sum(1, keepdim=True).where(reachable[:, None], 1.0)
    p = step[:, xt].T * (z.softmax(1) @ before)
    p = p / p.sum(1, keepdim=True)
    expected = (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(1)
    if t == 1:
        expected = -p.gather(1, x0[:, None]).squeeze(1).log()

    rows = torch.ones(len(x0), dtype=F64)
    known = {"a": a * rows, "b": b * rows, "beta": (1 - b / a) * rows, "first": rows * t == 1}
    given = {name: known[name] for name in MODES[f"d3pm_{kind}"].names}
    mask_id = n if kind == "absorb" else None
    nats = logits_only(z, x0, xt, given, mode=f"d3pm_{kind}", V=K, n=n, mask_id=mask_id)
    assert torch.allclose(nats[reachable], expected[reachable], rtol=1e-10, atol=1e-10)


def test_published_divergences() -> None:
    """K = 4, p = (.5, .2, .2, .1), T = 10, t = 4; values computed once by brute force in fp64."""
    z = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=F64).log()
    one = torch.ones(1, dtype=F64)
    x0 = torch.tensor([0])
    absorb = {"a": 0.7 * one, "b": 0.6 * one, "first": one == 0}  # 1 - t/T
    nats = logits_only(z, x0, torch.tensor([3]), absorb, mode="d3pm_absorb", V=4, n=3, mask_id=3)
    assert nats.item() == pytest.approx(0.1557583392785932, abs=1e-12)

    f = [math.cos((t / 10 + 0.008) / 1.008 * math.pi / 2) for t in range(5)]  # cosine schedule
    a, b, beta = f[3] / f[0], f[4] / f[0], 1 - f[4] / f[3]
    uniform = {"a": a * one, "b": b * one, "beta": beta * one, "first": one == 0}
    for clean, value in ((0, 0.6324208070611266), (2, 0.0815412318470344)):
        nats = logits_only(
            z, torch.tensor([clean]), torch.tensor([2]), uniform, mode="d3pm_uniform", V=4, n=4, mask_id=None
        )
        assert nats.item() == pytest.approx(value, abs=1e-9)


def test_certain_and_right_costs_nothing() -> None:
    x0, xt = torch.tensor([1, 1]), torch.tensor([3, 2])
    rows = torch.ones(2, dtype=F64)
    for first in (False, True):
        a = 1.0 if first else 0.8
        known = {"a": a * rows, "b": 0.7 * rows, "beta": (1 - 0.7 / a) * rows, "first": rows == first}
        z = torch.full((2, 4), -800.0, dtype=F64)
        z[:, 1] = 0.0
        absorb = {name: known[name] for name in ("a", "b", "first")}
        nats = logits_only(z, x0, torch.full_like(xt, 3), absorb, mode="d3pm_absorb", V=4, n=3, mask_id=3)
        assert nats.abs().max() < 1e-12
        nats = logits_only(z, x0, xt, known, mode="d3pm_uniform", V=4, n=4, mask_id=None)
        assert nats.abs().max() < 1e-12


def test_uniform_predictions_at_initialisation() -> None:
    """Zero logits: log n exactly for masked diffusion and absorbing score entropy; the closed form for
    D3PM."""
    n = 50
    z = torch.zeros(3, n + 1, dtype=F64)
    x0, xt = torch.tensor([0, 7, 49]), torch.full((3,), n)
    sizes = {"V": n + 1, "n": n, "mask_id": n}
    for mode in ("subs", "sedd_absorb"):
        nats = logits_only(z, x0, xt, {}, mode=mode, **sizes)
        assert torch.allclose(nats, torch.full((3,), math.log(n), dtype=F64), rtol=1e-14)
    a, b = (torch.tensor(v, dtype=F64) for v in ([0.9, 0.5, 0.1], [0.8, 0.4, 0.0]))
    w, K = (a - b) / (1 - b), n + 1
    expected = torch.log1p(b / (K * (1 - b))) + w * math.log(K) - (1 - w) * torch.log1p(a / (K * (1 - a)))
    nats = logits_only(z, x0, xt, {"a": a, "b": b, "first": a > 1}, mode="d3pm_absorb", **sizes)
    assert torch.allclose(nats, expected, rtol=1e-12)


def test_zero_mask_logit_is_weighted_cross_entropy() -> None:
    """Without mass on the mask the divergence is -w log p_x0 (w = 1/t for survival 1 - t/T)."""
    (hidden, weight, bias, x0, _, weights, _), options = case("d3pm_absorb_zero_mask")
    xt = torch.full_like(x0, options["mask_id"])
    t = torch.randint(1, T + 1, x0.shape, generator=torch.Generator().manual_seed(3)).double()
    given = {"a": 1 - (t - 1) / T, "b": 1 - t / T, "first": t == 1}
    options["aux_weight"] = 0.0
    total, nats, _ = linear_diffusion_loss(hidden, weight, bias, x0, xt, weights, given, **options)
    options["mode"] = "subs"
    same, ce, _ = linear_diffusion_loss(hidden, weight, bias, x0, xt, weights / t, {}, **options)
    assert close(total, same, 1e-13) and close(nats, ce / t, 1e-13)


def test_score_entropy_is_cross_entropy_plus_normalisation_penalty() -> None:
    """exp(LSE - log n) - 1 - (LSE - log n) >= 0 is what SEDD pays beyond MDLM."""
    args, options = case("sedd_absorb", noisy=1.0)
    _, nats, ce = linear_diffusion_loss(*args, **options)
    assert ce is not None
    excess = nats - ce
    z = (args[0] @ args[1].T + args[2])[:, : options["n"]]
    log_z = z.logsumexp(1) - math.log(options["n"])
    assert torch.allclose(excess, log_z.exp() - 1 - log_z, rtol=1e-9)
    assert excess.min() > 0


# -- numerical range, precision, misuse ------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mode", MODES)
def test_extreme_logits_stay_finite_in_fp32(mode: str, sign: float) -> None:
    """|z| <= 60, where exponentials reach 1e26, alternating and all at one end."""
    (_, _, _, x0, xt, weights, coefficients), options = case(mode, torch.float32)
    V = options["V"]
    signs = torch.where(torch.rand(len(x0), V, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)
    signs[: len(x0) // 2] = 1.0
    z = (60 * sign * signs).requires_grad_()
    head = torch.eye(V).requires_grad_()
    total, nats, _ = linear_diffusion_loss(
        z, head, None, x0, xt, weights, coefficients, **options, chunk_rows=8
    )
    gradients = torch.autograd.grad(total, (z, head))
    assert torch.isfinite(total) and torch.isfinite(nats).all()
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    """bf16 products, fp32 statistics: near the fp32 result, and gradients in the parameters' dtype."""
    args, options = case(mode, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, nats, _ = linear_diffusion_loss(*args, **options, chunk_rows=7)
    exact, _, _ = linear_diffusion_loss(*args, **options)
    assert total.dtype == nats.dtype == torch.float32
    assert close(total, exact, 0.05)
    found, wanted = (torch.autograd.grad(x, args[:3]) for x in (total, exact))
    assert all(g.dtype == torch.float32 for g in found)
    assert all(close(f, w, 0.1) for f, w in zip(found, wanted, strict=True))
    # fp16 would overflow at e^60 and flush small probabilities: raised to fp32.
    with torch.autocast("cpu", torch.float16):
        total, _, _ = linear_diffusion_loss(args[0].half(), *args[1:], **options)
    assert close(total, exact, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode: str) -> None:
    args, options = case(mode)

    def loss(hidden: Tensor) -> Tensor:
        return linear_diffusion_loss(hidden, *args[1:], **options, chunk_rows=16)[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, wanted = compiled(args[0]), loss(args[0])
    assert close(found, wanted, 1e-14)
    assert close(torch.autograd.grad(found, args[0])[0], torch.autograd.grad(wanted, args[0])[0], 1e-13)


def test_scalar_auxiliary_weight_is_relative_to_row_weights() -> None:
    args, options = case("d3pm_absorb")
    total, _, aux = linear_diffusion_loss(*args, **{**options, "aux_weight": 0.01})
    plain, _, none = linear_diffusion_loss(*args, **{**options, "aux_weight": 0.0})
    assert none is None and aux is not None
    assert torch.allclose(total, plain + 0.01 * (args[5] * aux).sum(), rtol=1e-13)


@pytest.mark.parametrize(
    ("mode", "changed", "message"),
    [
        ("subs", {"mode": "sub"}, "mode: 'sub' is not one of"),
        ("subs", {"mask_id": None}, "needs a mask"),
        ("subs", {"n": 20}, "inconsistent"),
        ("subs", {"V": 99}, "rows of the head"),
        ("subs", {"aux_weight": 0.1}, "no auxiliary"),
        ("sedd_uniform", {"mask_id": 3}, "needs None"),
    ],
)
def test_misuse_is_named(mode: str, changed: dict[str, Any], message: str) -> None:
    args, options = case(mode)
    with pytest.raises(ValueError, match=message):
        linear_diffusion_loss(*args, **{**options, **changed})


def test_wrong_coefficients_are_named() -> None:
    (*rest, given), options = case("d3pm_absorb")
    with pytest.raises(ValueError, match="missing: first; unknown: frist"):
        linear_diffusion_loss(*rest, {"a": given["a"], "b": given["b"], "frist": given["first"]}, **options)
    with pytest.raises(ValueError, match=r"a \(1,\)"):
        linear_diffusion_loss(*rest, {**given, "a": given["a"][:1]}, **options)
    with pytest.raises(ValueError, match="constants"):
        linear_diffusion_loss(*rest, {**given, "a": given["a"].clone().requires_grad_()}, **options)
