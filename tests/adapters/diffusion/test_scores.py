"""Reverse steps from ratios."""

import itertools

import pytest
import torch

from adapters.diffusion.scores import AbsorbingGraph, UniformGraph
from tests.adapters.diffusion.processes import sedd
from tests.adapters.diffusion.toy import F64, K


@pytest.mark.parametrize("graph", ["absorbing", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_analytic_step_is_exact_for_one_token_in_any_number_of_steps(graph, steps):
    """Composed over the states of one token, from the true p_T; Euler's step is not exact, and converges like 1/S."""
    p0 = torch.tensor([0.6, 0.3, 0.1], dtype=F64)
    process = sedd(transition_type=graph, noise_schedule="geometric", sigma_min=0.2, sigma_max=3.0)
    euler_error = [one_token_error(process, p0, s, "euler") for s in (steps, 8 * steps)]
    assert one_token_error(process, p0, steps, "analytic") < 1e-9
    assert euler_error[0] > 1e-3 and (steps < 7 or euler_error[1] < euler_error[0] / 4)


def one_token_error(process, p0, steps, predictor):
    graph: AbsorbingGraph | UniformGraph = process.graph
    states = process.V
    times = torch.linspace(1, 0.05, steps + 1, dtype=F64)

    def law_at(t):
        kept = process.schedule.alpha(t)
        if process.mask_id is None:
            return kept * p0 + (1 - kept) / K
        return torch.cat([kept * p0, (1 - kept)[None]])

    law = law_at(times[0])
    for t, s in itertools.pairwise(times):
        p = law_at(t)
        now = torch.arange(states)
        log_s = (p[None, :] / p[:, None]).log()  # [x, y] = p(y)/p(x)
        delta = float(process.schedule.sigma(t) - process.schedule.sigma(s))
        amount = float((t - s) * process.schedule.rate(t))
        step = (
            graph.analytic(log_s, now, delta) if predictor == "analytic" else graph.euler(log_s, now, amount)
        )
        step = step / step.sum(1, keepdim=True)
        if process.mask_id is not None:  # only the mask moves
            step = torch.cat([torch.eye(states, dtype=F64)[:-1], step[-1:]])
        assert step.min() >= 0
        law = law @ step
    return float((law - law_at(times[-1])).abs().sum())
