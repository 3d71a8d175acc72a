"""Mixture of depths restated from its equations (Raposo et al. 2024, arXiv:2404.02258), token by token.

Nothing is gathered into tensors: a routed block is the control's block over the list of tokens that take part.
"""

import math

import torch

from tests.models.reference import linear, norm, places, silu, vanilla_block


def is_routed(cfg, layer):
    return not cfg.every_other or (layer >= cfg.mod_offset and (layer - cfg.mod_offset) % 2 == 0)


def _gate(cfg, score):
    """What a token's update is multiplied by."""
    if cfg.router_act == "sigmoid":
        return 1 / (1 + torch.exp(-score))
    if cfg.router_act == "tanh":
        return (torch.exp(score) - torch.exp(-score)) / (torch.exp(score) + torch.exp(-score))
    return score


def _best(scores, k):
    """The places of the k highest scores, in ascending order; of equal ones the first."""
    return sorted(sorted(range(len(scores)), key=lambda t: (-float(scores[t].detach()), t))[:k])


def _forecast(p, name, x):
    """The logit of a token's own forecast that it is among the best: of its state, scaled to a mean square of 1, which
    gets no gradient."""
    x = x.detach() / torch.sqrt((x.detach() ** 2).sum() / len(x) + 1e-6)
    return linear(p, f"{name}.down", silu(linear(p, f"{name}.up", x)))[0]


def _bce(logit, is_in):
    """-ln of the probability of what is the case."""
    return torch.log(1 + torch.exp(-logit if is_in else logit))


def mod_block(p, block, xs, docs, cfg, causal, scores=None):
    """(states behind a routed block, who took part, mean over tokens of the forecast's error). `causal`: by the
    forecast, not by the best scores; `scores`: those of a router that draws them."""
    k, error = max(1, int(cfg.capacity * len(xs))), None
    if scores is not None:  # above which the share C of a standard normal law lies
        forecasts = [
            0.5 * (1 + math.erf(score / math.sqrt(2))) - (1 - cfg.capacity) for score in scores.tolist()
        ]
        best = _best(scores, k)
    else:
        scores = [p[f"{block}.router.proj.weight"].flatten() @ x for x in xs]
        forecasts, best = scores, _best(scores, k)
        if cfg.causal_method == "predictor":
            forecasts = [_forecast(p, f"{block}.router.predictor", x) for x in xs]
        error = sum(_bce(logit, t in best) for t, logit in enumerate(forecasts)) / len(xs)
    part = [t for t in range(len(xs)) if float(forecasts[t]) > 0] if causal else best
    out = list(xs)
    if part:
        given = [xs[t] for t in part]
        passed = vanilla_block(p, block, given, [docs[t] for t in part], cfg, at=part)
        for t, x, y in zip(part, given, passed, strict=True):
            out[t] = x + _gate(cfg, scores[t]) * (y - x)
    return out, part, error


def mod_row(p, tokens, docs, cfg, causal, scores=None):
    """(logits (T, V_p), who took part in each routed block, error of each one's forecast) of a row of tokens;
    `scores`: by routed block, of a router that draws them."""
    xs = [p["embed_tokens.weight"][token] for token in tokens]
    if not cfg.use_rope:
        xs = [x + p["positions.weight"][at] for x, at in zip(xs, places(docs), strict=True)]
    parts, errors = [], []
    for layer in range(cfg.n_layers):
        if not is_routed(cfg, layer):
            xs = vanilla_block(p, f"layers.{layer}", xs, docs, cfg)
            continue
        given = None if scores is None else scores[len(parts)]
        xs, part, error = mod_block(p, f"layers.{layer}", xs, docs, cfg, causal, given)
        parts.append(part)
        errors.append(error)
    head = p.get("lm_head.weight", p["embed_tokens.weight"])
    return torch.stack([head @ norm(p, "norm", x, cfg) for x in xs]), parts, errors
