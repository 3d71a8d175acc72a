"""Recurrent depth restated from its equations (Geiping et al. 2025, arXiv:2502.05171), token by token.

A token passes a block behind the entries, keys and values of every head, of the earlier tokens that it sees. A
recurrence reads what the prelude made of the tokens, `e`, in every turn.
"""

import math

import torch

from tests.models.reference import linear, rms_norm, rotate_pairs, silu, softmax


def sandwich(p, block, x, at, seen, cfg):
    """(state, entry) of one token at place `at` of its row: x <- n2(x + attention(n1(x))); x <- n4(x + mlp(n3(x))), the
    outer norms of the sums. Entries: [(key, value)] by head."""
    h, attn = cfg.d_model // cfg.n_heads, f"{block}.self_attn"

    def norm(name, x):
        return rms_norm(p, f"{block}.{name}_norm", x, cfg.norm_eps)

    normed, own, heads = norm("attn", x), [], []
    for j in range(cfg.n_heads):
        q, k, v = (linear(p, f"{attn}.{n}_proj", normed)[j * h : (j + 1) * h] for n in "qkv")
        q, k = (rotate_pairs(y, at, cfg.rope_theta) for y in (q, k))
        own.append((k, v))
        entries = [entry[j] for entry in seen] + [(k, v)]
        weights = softmax([(q * key).sum() / math.sqrt(h) for key, _ in entries])
        heads.append(sum(w * value for w, (_, value) in zip(weights, entries, strict=True)))
    x = norm("attn_sum", x + p[f"{attn}.o_proj.weight"] @ torch.cat(heads))
    y = norm("mlp", x)
    a, b = (p[f"{block}.mlp.{n}_proj.weight"] @ y for n in ("gate", "up"))
    return norm("mlp_sum", x + p[f"{block}.mlp.down_proj.weight"] @ (silu(a) * b)), own


def through(p, blocks, x, at, seen, cfg):
    """(state, entries by block) of one token behind several blocks; `seen`: by block."""
    own = []
    for block, entries in zip(blocks, seen, strict=True):
        x, entry = sandwich(p, block, x, at, entries, cfg)
        own.append(entry)
    return x, own


def row_through(p, blocks, xs, docs, cfg):
    """States of a row behind several blocks; a token sees those of its document in front of it."""
    kept, out = [], []
    for t, x in enumerate(xs):
        before = [own for s, own in enumerate(kept) if docs[s] == docs[t]]
        x, own = through(
            p, blocks, x, t, [[entries[b] for entries in before] for b in range(len(blocks))], cfg
        )
        kept.append(own)
        out.append(x)
    return out


def names(part, blocks):
    return [f"{part}.{i}" for i in range(blocks)]


def embedded(p, token, cfg):
    return math.sqrt(cfg.d_model) * p["embed_tokens.weight"][token]


def injected(p, s, e, cfg):
    """What a turn's blocks read: A [s; e], state first; or the sum."""
    return p["adapter.weight"] @ torch.cat([s, e]) if cfg.adapter_mode == "concat" else s + e


def last_norm(p, x, cfg):
    """One norm stands on both sides of the coda."""
    return rms_norm(p, "norm", x, cfg.norm_eps)


def to_logits(p, x, cfg):
    return p.get("lm_head.weight", p["embed_tokens.weight"]) @ last_norm(p, x, cfg)


def rd_logits(p, tokens, docs, s, cfg, parts, recurrences, retained=None):
    """(T, V_p) from the start states `s` after so many recurrences. Of these the last `retained` have a gradient: the
    states in front of them are constants, `e` is none. `parts`: how many blocks prelude, core and coda have."""
    prelude, core, coda = (names(*given) for given in zip(("prelude", "core", "coda"), parts, strict=True))
    e = row_through(p, prelude, [embedded(p, token, cfg) for token in tokens], docs, cfg)
    for i in range(recurrences):
        if retained is not None and i <= recurrences - retained:
            s = [x.detach() for x in s]
        s = row_through(p, core, [injected(p, *pair, cfg) for pair in zip(s, e, strict=True)], docs, cfg)
    xs = row_through(p, coda, [last_norm(p, x, cfg) for x in s], docs, cfg)
    return torch.stack([to_logits(p, x, cfg) for x in xs])


# -- reading one token after the other ---------------------------------------------------------------------------------


def _log_law(logits):
    return logits - torch.log(torch.exp(logits).sum())


def _entropy(log_law):
    return -(torch.exp(log_law) * log_law).sum()


def _kl(one, other):
    """KL(one || other) of logarithms of laws."""
    return (torch.exp(one) * (one - other)).sum()


def _without_unlikely(log_law):
    """The law in which tokens that are less than a tenth as likely as the likeliest get 1 / V in place of it, made to
    sum to 1."""
    law, v = torch.exp(log_law), len(log_law)
    kept = torch.stack([q if q >= 0.1 * law.max() else torch.full_like(q, 1 / v) for q in law])
    return torch.log(kept / kept.sum())


class Exit:
    """Whether a token is done, asked after each of its recurrences; a new one for every token."""

    def __init__(self, criterion, threshold, vocabulary):
        self.criterion, self.threshold = criterion, threshold
        self.law = torch.full(
            (vocabulary,), -math.log(vocabulary), dtype=torch.float64
        )  # before the first: uniform
        self.best, self.equal = None, 1

    def reached(self, before, s, logits):
        """`before`, `s`: states before and behind the recurrence; `logits` (V,) that it would end with."""
        last, self.law = self.law, _log_law(logits)
        if self.criterion == "latent-diff":
            return (s - before).norm() / s.norm() < self.threshold
        if self.criterion == "cosine":
            return 1 - (s * before).sum() / (s.norm() * before.norm()) < self.threshold
        if self.criterion == "kl":
            return _kl(last, self.law) < self.threshold
        if self.criterion == "minp-kl":
            self.law = _without_unlikely(self.law)
            return _kl(last, self.law) < self.threshold
        if self.criterion == "entropy-diff":
            return (_entropy(self.law) - _entropy(last)).abs() < self.threshold
        assert self.criterion == "argmax-stability"
        best = int(logits.argmax())
        self.equal = self.equal + 1 if best == self.best else 1
        self.best = best
        return self.equal >= self.threshold


def read(
    p,
    tokens,
    s,
    cfg,
    parts,
    recurrences,
    *,
    vocabulary,
    criterion=None,
    threshold=None,
    budget=None,
    carry=False,
):
    """(logits (T, V), recurrences of each token) of one document, each token done before the next is begun: it exits by
    the `criterion`; recurrence i reads and writes what is kept as number i mod `budget`; with `carry` it starts from
    the last token's final state in place of its own of `s`.

    A block in recurrence i sees of an earlier token what that one left under this number, or the last that it left
    under any, where it had fewer.
    """
    prelude, core, coda = (names(*given) for given in zip(("prelude", "core", "coda"), parts, strict=True))
    of_prelude, of_coda = [[] for _ in prelude], [[] for _ in coda]
    of_core = [[] for _ in core]  # by block and token: {number: entry}, in the order of writing
    out, used, carried = [], [], None
    for t, token in enumerate(tokens):
        e, own = through(p, prelude, embedded(p, token, cfg), t, of_prelude, cfg)
        for kept, entry in zip(of_prelude, own, strict=True):
            kept.append(entry)
        state = carried if carry and t else s[t]
        mine, done = [{} for _ in core], Exit(criterion, threshold, vocabulary)
        for i in range(recurrences):
            number = i if budget is None else i % budget
            seen = [[k.get(number, deepest(k)) for k in kept] for kept in of_core]
            before = state
            state, own = through(p, core, injected(p, state, e, cfg), t, seen, cfg)
            for kept, entry in zip(mine, own, strict=True):
                kept.pop(number, None)
                kept[number] = entry
            x, of_this = through(p, coda, last_norm(p, state, cfg), t, of_coda, cfg)
            logits = to_logits(p, x, cfg)[:vocabulary]
            if criterion is not None and bool(done.reached(before, state, logits)):
                break
        for kept, entry in zip([*of_core, *of_coda], [*mine, *of_this], strict=True):
            kept.append(entry)
        out.append(logits)
        used.append(i + 1)
        carried = state
    return torch.stack(out), used


def deepest(kept):
    """Of {number: entry} that which was written last."""
    return list(kept.values())[-1]
