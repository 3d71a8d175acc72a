"""Posteriors and reverse steps of every chain against Bayes' rule, and the paper's numbers."""

import pytest
import torch

from adapters.diffusion.chains import AbsorbingChain, UniformChain
from adapters.diffusion.process import Sampling
from adapters.diffusion.reverse import log_posterior, log_reverse, reverse_kl, shape_prediction
from adapters.diffusion.schedules import absorbing_mutual_info_betas, cosine_betas
from tests.adapters.diffusion.matrices import CHAINS, STATES, cumulative, make_chain
from tests.adapters.diffusion.toy import F64


@pytest.mark.parametrize("kind", CHAINS)
def test_the_posterior_is_bayes_rule_on_the_enumerated_joint(kind):
    chain = make_chain(kind)
    ids = torch.arange(STATES)
    for s, t in ((0, 1), (2, 3), (1, 4), (0, 6)):
        between = chain.column(ids, torch.full_like(ids, s), torch.full_like(ids, t)).double().T
        joint = cumulative(chain, s)[:, :, None] * between[None]  # (x0, xs, xt)
        for x0 in range(STATES):
            for xt in range(STATES):
                mass = joint[x0, :, xt].sum()
                if mass < 1e-14:
                    continue
                arguments = (torch.tensor([v]) for v in (x0, xt, s, t))
                posterior = log_posterior(chain, *arguments).exp()[0]
                assert torch.allclose(posterior, joint[x0, :, xt] / mass, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", CHAINS)
def test_the_reverse_step_weights_clean_tokens_by_the_joint_and_the_mixture_does_not(kind):
    chain = make_chain(kind)
    p = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0], dtype=F64)  # a clean token is never the mask
    ids, s, t, xt = torch.arange(STATES), 2, 3, 1 if kind != "absorbing" else STATES - 1
    between = chain.column(ids, torch.full_like(ids, s), torch.full_like(ids, t)).double().T
    joint = cumulative(chain, s)[:, :, None] * between[None]  # (x0, xs, xt)
    together = (p[:, None] * joint[:, :, xt]).sum(0)
    posteriors = joint[:, :, xt] / joint[:, :, xt].sum(1, keepdim=True)
    averaged = (p[:, None] * posteriors).sum(0)
    log_p = p.clamp_min(1e-300).log()[None]
    arguments = (log_p, torch.tensor([xt]), torch.tensor([s]), torch.tensor([t]))
    assert torch.allclose(log_reverse(chain, *arguments).exp()[0], together / together.sum(), atol=1e-12)
    assert torch.allclose(log_reverse(chain, *arguments, "mixture").exp()[0], averaged, atol=1e-9)


@pytest.mark.parametrize("kind", CHAINS)
def test_a_certain_prediction_has_no_loss(kind):
    chain = make_chain(kind)
    x0 = torch.tensor([0, 1, 2, 3])
    log_p = torch.nn.functional.one_hot(x0, STATES).to(F64).clamp_min(1e-300).log()
    for t in (1, 2, 6):
        xt = x0 if kind != "absorbing" else torch.full_like(x0, STATES - 1)
        kl = reverse_kl(chain, log_p, x0, xt, torch.full_like(x0, t - 1), torch.full_like(x0, t), "joint")
        assert kl.abs().max() < 1e-9


def test_absorbing_step_with_a_predicted_mask():
    chain = AbsorbingChain(4, absorbing_mutual_info_betas(10), mask_id=3)
    x0, xt, s, t = (torch.tensor([v]) for v in (0, 3, 3, 4))
    log_p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=F64).log()
    q = log_posterior(chain, x0, xt, s, t).exp()[0]
    assert torch.allclose(q, torch.tensor([0.25, 0, 0, 0.75], dtype=F64), atol=1e-12)
    expected = torch.tensor([0.1086956522, 0.0434782609, 0.0434782609, 0.8043478261], dtype=F64)
    assert torch.allclose(log_reverse(chain, log_p, xt, s, t).exp()[0], expected, atol=1e-10)
    assert reverse_kl(chain, log_p, x0, xt, s, t, "joint").item() == pytest.approx(
        0.1557583392785932, abs=1e-12
    )


def test_uniform_step_in_both_parameterisations():
    chain = UniformChain(4, cosine_betas(10))
    assert chain.alpha_bar[3].item() == pytest.approx(0.8870797659, abs=1e-10)
    assert chain.betas[4].item() == pytest.approx(0.0929109886, abs=1e-10)
    xt, s, t = (torch.tensor([v]) for v in (2, 3, 4))
    log_p = torch.tensor([[0.5, 0.2, 0.2, 0.1]], dtype=F64).log()
    expected = torch.tensor([0.05223965, 0.02277143, 0.91204024, 0.01294869], dtype=F64)
    assert torch.allclose(log_reverse(chain, log_p, xt, s, t).exp()[0], expected, atol=1e-8)
    for x0, joint, mixture in ((0, 0.6324208070611266, 0.1638013049), (2, 0.0815412318470344, 0.4477216876)):
        kl = [
            reverse_kl(chain, log_p, torch.tensor([x0]), xt, s, t, kind).item()
            for kind in ("joint", "mixture")
        ]
        assert kl[0] == pytest.approx(joint, abs=1e-12) and kl[1] == pytest.approx(mixture, abs=1e-9)


def test_what_a_caller_asks_of_tokens_leaves_the_mask_its_probability():
    """Three tokens, one id that is none, and the mask, which is likelier than all of them."""
    p = torch.tensor([[0.1, 0.2, 0.05, 0.05, 0.6]], dtype=torch.float64)
    greedy = shape_prediction(p.log(), 4, Sampling(temperature=0.0, tokens=3)).exp()
    assert torch.allclose(greedy, torch.tensor([[0.0, 0.4, 0.0, 0.0, 0.6]], dtype=torch.float64))
    plain = shape_prediction(p.log(), 4, Sampling(tokens=3)).exp()
    assert torch.allclose(plain[0, :3], 0.4 * p[0, :3] / 0.35) and plain[0, 3] == 0
    assert torch.allclose(shape_prediction(p.log(), 4, Sampling()), p.log())
