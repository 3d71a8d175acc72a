"""Output projection and diffusion loss in one op: logits of all rows never exist at once.

`reference` is the definition, with all logits; `chunked` computes a few rows at a time, and so does `triton`,
where one kernel does what follows the product.

Shapes: M rows (positions of all sequences, or the masked ones among them), D width, V states, V_p rows of the
head (V, or more with padding), n real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.choose import Kernels
from kernels.chunks import States
from kernels.linear_diffusion_loss import chunked
from kernels.linear_diffusion_loss.reference import product_dtype, reference
from kernels.linear_diffusion_loss.rows import MODES
from kernels.linear_diffusion_loss.sizes import SPEC
from naming import not_one_of

__all__ = ["MODES", "SPEC", "linear_diffusion_loss", "reference"]

OP = "linear_diffusion_loss"


def linear_diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    xt: Tensor,
    weights: Tensor,
    coefficients: Mapping[str, Tensor],
    *,
    mode: str,
    V: int,
    n: int,
    mask_id: int | None,
    aux_weight: float | Tensor = 0.0,
    chunk_rows: int | None = None,
    kernels: Kernels | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns `sum_i weights_i nats_i + aux_weight_i ce_i`, (), differentiable in hidden, weight and bias;
    nats, (M,) detached, what each row adds to the bound; ce, (M,) detached, or None without an auxiliary
    term.

    hidden (M, D); weight (V_p, D); bias (V_p,) or None; x0, xt (M,) int64 clean and noisy ids; weights (M,).
    `mode` is a key of `MODES`, whose class documents the loss and its per-row `coefficients` (M,); give these
    in fp64 where the device has it. aux_weight: a tensor (M,) weighs the cross-entropy of each row by itself,
    a number does so relative to `weights`. Rows whose weights are 0 may be
    padding, their ids any states. Columns from V on never count. Statistics and sums are in at least fp32
    (fp64 for fp64), matrix products in autocast's dtype; fp16 is raised to fp32, because exp(logits)
    overflows it and the loss scale is not known here.

    `kernels` of the run choose the implementation; None = automatically. `chunk_rows` given: chunks of that many.
    ValueError on misuse.
    """
    _check(hidden, weight, bias, x0, xt, weights, coefficients, mode, States(V, n, mask_id))
    _check_auxiliary(aux_weight, weights, mode)
    if mask_id is not None:
        x0 = _known(x0, weights, aux_weight, mask_id, V)
    args = (hidden, weight, bias, x0, xt, weights, coefficients)
    kind: dict[str, Any] = {"mode": mode, "V": V, "n": n, "mask_id": mask_id, "aux_weight": aux_weight}
    if chunk_rows is not None:
        return chunked.chunked(*args, **kind, chunk_rows=chunk_rows)
    run = (kernels or Kernels()).implementation(
        OP, rows=hidden.shape[0], columns=V, device=hidden.device, dtype=product_dtype(hidden)
    )
    return run(*args, **kind)


def _known(x0: Tensor, weights: Tensor, aux_weight: float | Tensor, mask_id: int, V: int) -> Tensor:
    """Clean ids, with another state for the mask in padding: it may cost infinitely much there, and 0 times that is
    NaN. Anywhere else a mask stays what it is, so that it is seen."""
    padding = weights == 0
    if isinstance(aux_weight, Tensor):
        padding = padding & (aux_weight == 0)
    return torch.where(padding & (x0 == mask_id), (mask_id + 1) % V, x0)


def _check_auxiliary(aux_weight: float | Tensor, weights: Tensor, mode: str) -> None:
    if not isinstance(aux_weight, Tensor):
        if aux_weight == 0:
            return
    elif aux_weight.shape != weights.shape:
        raise ValueError(f"aux_weight: expected {tuple(weights.shape)}, got {tuple(aux_weight.shape)}")
    if not MODES[mode].has_aux:
        raise ValueError(f"aux_weight: mode '{mode}' has no auxiliary cross-entropy")


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x0: Tensor,
    xt: Tensor,
    weights: Tensor,
    coefficients: Mapping[str, Tensor],
    mode: str,
    states: States,
) -> None:
    if mode not in MODES:
        raise ValueError(f"mode: {not_one_of(mode, MODES)}")
    rows = (hidden.shape[0],)
    matrices = hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    vectors = {"x0": x0, "xt": xt, "weights": weights, **coefficients}
    wrong = [f"{name} {tuple(v.shape)}" for name, v in vectors.items() if v.shape != rows]
    if not matrices or wrong or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [
            f"hidden {tuple(hidden.shape)}",
            f"weight {tuple(weight.shape)}",
            f"bias {None if bias is None else tuple(bias.shape)}",
        ]
        raise ValueError(
            "linear_diffusion_loss: expected hidden (M, D), weight (V_p, D), bias (V_p,) or None, all else "
            f"(M,); got {', '.join(shapes + wrong)}"
        )
    if any(v.requires_grad for v in (weights, *coefficients.values())):
        raise ValueError("linear_diffusion_loss: weights and coefficients are constants; detach them")
    known = (*MODES[mode].names, *MODES[mode].optional)
    missing = [name for name in MODES[mode].names if name not in coefficients]
    unknown = [name for name in coefficients if name not in known]
    if missing or unknown:
        raise ValueError(
            f"coefficients: mode '{mode}' takes {', '.join(known) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    _check_states(states, weight.shape[0], MODES[mode].needs_mask, mode)


def _check_states(states: States, rows: int, needs_mask: bool, mode: str) -> None:
    if not 0 < states.V <= rows:
        raise ValueError(f"V: must be 1 to {rows} (rows of the head), got {states.V}")
    if needs_mask != (states.mask_id is not None):
        raise ValueError(
            f"mask_id: mode '{mode}' needs {'a mask' if needs_mask else 'None'}, got {states.mask_id}"
        )
    if states.n != states.V - needs_mask or (
        states.mask_id is not None and not 0 <= states.mask_id < states.V
    ):
        raise ValueError(f"V, n, mask_id: inconsistent: {states.V}, {states.n}, {states.mask_id}")
