"""Logits, every loss term and every gradient of whole objectives against loops written from the equations
(tests/models/reference_*.py), in fp64."""

from functools import partial

import numpy as np
import pytest
import torch

from adapters.base import weighted_loss
from models import resolve
from models.mod import Predictor
from naming import load
from tests.contract.tiny import Letters, batch_of, context
from tests.models.reference import (
    ahead,
    gpt2_block,
    gpt2_states,
    layer_norm,
    mean_nats,
    nats,
    norm,
    vanilla_block,
    vanilla_states,
)
from tests.models.reference_mod import mod_row
from tests.models.reference_moe import Gate, balance, moe_block, moe_states, sequence_balance, z_loss
from tests.models.reference_mtm import Trunk, mtm_logits
from tests.models.reference_mtp import mtp_logits
from tests.models.reference_ngpt import ngpt_logits
from tests.models.reference_rd import rd_logits

VOCABULARY, LENGTH = 11, 7
SIZES = {"vocab_size": VOCABULARY, "n_ctx": 64, "d_model": 8, "n_heads": 2, "n_layers": 2}
ONE = np.zeros((2, 16), dtype=np.int32)
PACKED = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3], [5] + [6] * 8 + [7] * 7], dtype=np.int32)


def cases(**fields):
    """Every one in packed rows; the first also in rows of one document."""
    first, *_ = fields
    packed = [pytest.param(given, PACKED, id=name) for name, given in fields.items()]
    return pytest.mark.parametrize(
        ("fields", "docs"), [*packed, pytest.param(fields[first], ONE, id=f"{first}-one-document")]
    )


def build(type_, **fields):
    """An adapter whose parameters hide nothing: no gain is 1, no bias 0; and biases of experts are uneven."""
    row = resolve(type_)
    model_class, adapter_class = load(row.model), load(row.adapter)
    cfg = model_class.Config(**{**SIZES, **fields})
    adapter = adapter_class(adapter_class.build_model(model_class, cfg), cfg, Letters(VOCABULARY)).double()
    adapter.init_weights(torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*adapter.named_parameters(), *adapter.named_buffers()]:
            if tensor.is_floating_point():  # a layer's number stays
                tensor.normal_(0.0, 0.5 if name.endswith(("gate.weight", "bias")) else 0.3, generator=source)
        adapter.constrain(torch.zeros(()))
    return adapter


def some_rows(docs, n=1):
    batch = batch_of(np.random.default_rng(2).integers(0, VOCABULARY, (2, LENGTH + n)), n)
    batch.doc_ids[:] = docs[:, : LENGTH + n]
    return batch


def compare(adapter, docs, reference, **host):
    """`reference(p, buffers, tokens, docs)` -> (logits of each row by prediction, {term: (value, weight)}), both rows
    at once; p as the model names its parameters. `host`: what `prepare` would have drawn."""
    batch = some_rows(docs, adapter.data_spec().lookahead)
    tokens, docs = batch.tokens, batch.doc_ids
    adapter.on_step_start(context(2), 10)
    prepared = adapter.prepare(batch, context(2))
    prepared.host |= host
    hidden = adapter.hidden(prepared)
    output = adapter(prepared)

    p = {name: q.detach().clone().requires_grad_() for name, q in adapter.model.named_parameters()}
    buffers = {name: b.double() for name, b in adapter.model.named_buffers()}
    logits, terms = reference(p, buffers, tokens.tolist(), docs.tolist())
    states = [hidden.states, *(hidden.extra[k] for k in sorted(hidden.extra) if k.startswith("head_"))]
    for k, found in enumerate(states):
        expected = torch.stack([row[k][:, :VOCABULARY] for row in logits])
        torch.testing.assert_close(
            adapter.model.logits(found), expected, rtol=0, atol=1e-9, msg=f"logits {k}"
        )

    found = {name: t.sum / prepared.denominators[t.denominator] for name, t in output.terms.items()}
    assert found.keys() == terms.keys()
    for name, (value, weight) in terms.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9, msg=name)
        assert output.terms[name].weight == pytest.approx(weight), name
    weighted_loss(output.terms, prepared.denominators).backward()
    sum(weight * value for value, weight in terms.values()).backward()
    for name, parameter in adapter.model.named_parameters():
        assert parameter.grad.abs().max() > 0, f"{name} has no part in the loss"
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=0, atol=1e-7, msg=name)


def nats_of(logits, k, tokens, docs):
    """Of the k-th next token (1-based), from the k-th of each row's logits; the mean over all positions of all rows."""
    pairs = [ahead(row, doc, k, LENGTH) for row, doc in zip(tokens, docs, strict=True)]
    return mean_nats([row[k - 1][:, :VOCABULARY] for row in logits], pairs)


def of_rows(function, tokens, docs):
    return [function(row, doc) for row, doc in zip(tokens, docs, strict=True)]


# -- ngpt --------------------------------------------------------------------------------------------------------------


def ngpt(cfg, p, buffers, tokens, docs):
    logits = of_rows(lambda row, doc: [ngpt_logits(p, row[:LENGTH], doc, cfg)], tokens, docs)
    return logits, {"ce": (nats_of(logits, 1, tokens, docs), 1.0)}


NGPT = {
    "default": {},
    "tied": {"tie_embeddings": True, "rope_theta": 50.0, "ffn_hidden": 12},
    "scales": {
        **{"alpha_init": 0.4, "alpha_scale": 0.2, "sqk_init": 1.5, "sqk_scale": 0.7},
        **{"suv_init": 0.8, "suv_scale": 1.2, "sz_init": 3.0, "sz_scale": 0.5},
    },
}


@cases(**NGPT)
def test_ngpt(fields, docs):
    adapter = build("ngpt", **fields)
    compare(adapter, docs, partial(ngpt, adapter.model_cfg))


# -- moe ---------------------------------------------------------------------------------------------------------------


MIXTRAL = {"num_experts": 4, "top_k": 2, "d_ff_expert": 8, "alpha": 0.7, "beta": 0.3}
DEEPSEEK = {
    "gate_type": "deepseek_v3",
    **{"num_experts": 8, "top_k": 3, "d_ff_expert": 8, "n_shared_experts": 2, "first_k_dense": 1},
    **{"n_group": 4, "topk_group": 2, "gate_norm_factor": 2.5, "seq_aux_alpha": 0.4, "n_layers": 3},
}
MOE = {
    "mixtral": MIXTRAL,
    "mixtral-lists": {
        **{"num_experts": 3, "top_k": 1, "d_ff_expert": 8, "n_kv_heads": 1, "qk_norm": True},
        **{"alphas": [0.7, 0.2], "betas": [0.1, 0.5], "aux_reduction": "sum", "n_shared_experts": 1},
    },
    "mixtral-micro-batch": {**MIXTRAL, "balance_over": "micro_batch", "moe_every": 2, "n_layers": 3},
    "deepseek": DEEPSEEK,
    "deepseek-balanced": {**DEEPSEEK, "n_group": 1, "topk_group": 1, "alpha": 0.2, "beta": 0.1},
}


def gate_of(cfg):
    mixtral = cfg.gate_type == "mixtral"
    groups = (1, 1) if mixtral else (cfg.n_group, cfg.topk_group)
    return Gate(cfg.gate_type, cfg.top_k, 1.0 if mixtral else cfg.gate_norm_factor or 1.0, *groups)


def expert_terms(cfg, gate, layers_of_rows):
    """Every loss of gates; `layers_of_rows`: what each row's layers with experts decided."""
    layers = [list(rows) for rows in zip(*layers_of_rows, strict=True)]  # by layer, then row
    rows = len(layers_of_rows)

    def total(losses, one, listed):
        weights = listed or [one or 0.0] * len(losses)
        together = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        return together / (len(losses) if cfg.aux_reduction == "mean" else 1), 1.0

    over_all = cfg.balance_over == "micro_batch"
    extents = [[sum(rows_of_one, [])] if over_all else rows_of_one for rows_of_one in layers]
    balanced = [sum(balance_of(gate, e) for e in extent) / len(extent) for extent in extents]
    terms = {
        "balance": total(balanced, cfg.alpha, cfg.alphas),
        "router_z": total([z_loss(sum(layer, [])) for layer in layers], cfg.beta, cfg.betas),
    }
    if gate.kind == "deepseek_v3":
        by_row = [sum(sequence_balance(row, gate.top_k) for row in layer) / rows for layer in layers]
        terms["sequence_balance"] = total(by_row, cfg.seq_aux_alpha, None)
    return terms


def balance_of(gate, routed):
    return balance(routed, gate.top_k)


def moe(cfg, p, buffers, tokens, docs):
    gate = gate_of(cfg)
    head = p.get("lm_head.weight", p["embed_tokens.weight"])
    found = of_rows(lambda row, doc: moe_states(p, row[:LENGTH], doc, cfg, gate, buffers), tokens, docs)
    logits = [[torch.stack([head @ norm(p, "norm", x, cfg) for x in xs])] for xs, _ in found]
    terms = expert_terms(cfg, gate, [layers for _, layers in found])
    return logits, {"ce": (nats_of(logits, 1, tokens, docs), 1.0), **terms}


@cases(**MOE)
def test_moe(fields, docs):
    adapter = build("moe", **fields)
    compare(adapter, docs, partial(moe, adapter.model_cfg))


# -- mtp and mtm -------------------------------------------------------------------------------------------------------


def mtp(cfg, p, buffers, tokens, docs):
    n = cfg.n_mtp_tokens
    trunk = cfg.n_layers - (n if cfg.isoparam else 1)
    logits = of_rows(lambda row, doc: mtp_logits(p, row[:LENGTH], doc, cfg, trunk), tokens, docs)
    names, weights = ["ce", *(f"head_{k}" for k in range(2, n + 1))], cfg.mtp_loss_weights or [1.0] * n
    return logits, {
        name: (nats_of(logits, k, tokens, docs), weight)
        for k, (name, weight) in enumerate(zip(names, weights, strict=True), 1)
    }


MTP = {
    "default": {},
    "three-heads": {
        "n_mtp_tokens": 3,
        "n_layers": 4,
        "tie_embeddings": False,
        "mtp_loss_weights": [1.0, 0.5, 2.0],
    },
    "causal": {"n_mtp_tokens": 3, "isoparam": False, "head_topology": "causal", "qk_norm": True},
    "anticausal": {"n_mtp_tokens": 3, "isoparam": False, "head_topology": "anticausal", "n_kv_heads": 1},
    "linear": {"head_type": "linear", "isoparam": False},
    "linear-anticausal": {
        "n_mtp_tokens": 3,
        "head_type": "linear",
        "head_topology": "anticausal",
        "n_layers": 4,
    },
}


@cases(**MTP)
def test_mtp(fields, docs):
    adapter = build("mtp", **{"n_layers": 3, **fields})
    compare(adapter, docs, partial(mtp, adapter.model_cfg))


def trunk_of(cfg, own, p, buffers, told):
    """The trunk as functions of `own`, its type's Config; decisions of gates go to the list `told`."""
    q = {name.removeprefix("trunk."): value for name, value in p.items()}
    biases = {name.removeprefix("trunk."): value for name, value in buffers.items()}
    tied = q["wte.weight" if cfg.trunk == "gpt2" else "embed_tokens.weight"]
    parts = {"embedding": tied, "head": q.get("lm_head.weight", tied)}
    if cfg.trunk == "gpt2":
        return Trunk(
            states=lambda tokens, docs: gpt2_states(q, tokens, docs, own.n_layers, own.n_heads),
            block=lambda name, xs, docs: gpt2_block(q, name, xs, docs, own.n_heads),
            norm=lambda name, x: layer_norm(q, name, x),
            last_norm="ln_f",
            **parts,
        )

    def states(tokens, docs):
        if cfg.trunk == "vanilla":
            return vanilla_states(q, tokens, docs, own)
        xs, layers = moe_states(q, tokens, docs, own, gate_of(own), biases)
        told.extend(layers)
        return xs

    def block(name, xs, docs):
        if cfg.trunk == "vanilla":
            return vanilla_block(q, name, xs, docs, own)
        xs, layer = moe_block(q, name, xs, docs, own, gate_of(own), biases)
        told.append(layer)
        return xs

    return Trunk(states, block, lambda name, x: norm(q, name, x, own), last_norm="norm", **parts)


def mtm(cfg, own, p, buffers, tokens, docs):
    told, modules = [[] for _ in tokens], cfg.n_mtp_modules
    logits = [
        mtm_logits(p, trunk_of(cfg, own, p, buffers, told[b]), row, docs[b], LENGTH, cfg)
        for b, row in enumerate(tokens)
    ]
    terms = {"ce": (nats_of(logits, 1, tokens, docs), 1.0)}
    for k in range(2, modules + 2):
        terms[f"head_{k}"] = (nats_of(logits, k, tokens, docs), cfg.mtp_lambda / modules)
    if cfg.trunk == "moe":
        terms |= expert_terms(own, gate_of(own), told)
    return logits, terms


UNTIED = {"tie_embeddings": False}
MTM = {
    "default": {"mtp_lambda": 0.7},
    "three-modules": {
        "n_mtp_modules": 3,
        "n_layers": 1,
        "concat_order": "embed_first",
        "mtp_hidden": "pre_norm",
    },
    "shared-norm": {"n_mtp_modules": 2, "n_layers": 1, "mtp_share_head_norm": True, "trunk_cfg": UNTIED},
    "gpt2": {"trunk": "gpt2", "n_mtp_modules": 2, "n_layers": 1},
    "gpt2-plain": {"trunk": "gpt2", "mtp_share_head_norm": True, "trunk_cfg": {"bias": False, **UNTIED}},
    "mixtral": {"trunk": "moe", "n_mtp_modules": 2, "trunk_cfg": MIXTRAL},
    "deepseek": {
        "trunk": "moe",
        "n_layers": 3,
        "trunk_cfg": {k: v for k, v in DEEPSEEK.items() if k != "n_layers"},
    },
}


@cases(**MTM)
def test_mtm(fields, docs):
    adapter = build("mtm", **fields)
    compare(adapter, docs, partial(mtm, adapter.model_cfg, adapter.model.trunk.cfg))


# -- mod ---------------------------------------------------------------------------------------------------------------


def mod(cfg, p, buffers, tokens, docs):
    rows = of_rows(lambda row, doc: mod_row(p, row[:LENGTH], doc[:LENGTH], cfg, causal=False), tokens, docs)
    logits, errors = [[row[0]] for row in rows], [row[2] for row in rows]
    error = sum(map(sum, errors)) / sum(map(len, errors))
    terms = {"ce_topk": (nats_of(logits, 1, tokens, docs), 1.0), "bce": (error, cfg.mod_bce_weight)}
    return logits, terms


HALF = {"capacity": 0.5, "mod_bce_weight": 0.7, "pred_hidden": 5}
MOD = {
    "window": {**HALF, "mod_offset": 0, "n_layers": 3, "router_act": "sigmoid", "sliding_window": 2},
    "default": HALF,
    "every-block": {**HALF, "every_other": False, "router_act": "tanh", "n_kv_heads": 1, "qk_norm": True},
    "aux-loss": {**HALF, "causal_method": "aux_loss", "tie_embeddings": False, "attn_softcap": 2.0},
    "learned-positions": {
        **{**HALF, "use_rope": False, "use_rmsnorm": False, "use_swiglu": False, "bias": True},
        **{"every_other": False, "n_layers": 1},
    },
}


@cases(**MOD)
def test_mod(fields, docs):
    adapter = build("mod", **fields)
    compare(adapter, docs, partial(mod, adapter.model_cfg))


def test_mod_where_scores_are_drawn():
    """Nothing foretells them: who enters elsewhere is above the quantile."""
    adapter = build("mod", **HALF, router_type="random")
    drawn = adapter.hidden(adapter.prepare(some_rows(PACKED), context(2))).extra["score"]  # (R, B, S)

    def reference(p, buffers, tokens, docs):
        rows = [
            mod_row(p, row[:LENGTH], doc[:LENGTH], adapter.model_cfg, causal=False, scores=scores)
            for row, doc, scores in zip(tokens, docs, drawn.unbind(1), strict=True)
        ]
        logits = [[row[0]] for row in rows]
        return logits, {"ce_topk": (nats_of(logits, 1, tokens, docs), 1.0)}

    compare(adapter, PACKED, reference)


def test_mod_where_all_scores_are_equal():
    adapter = build("mod", **HALF, router_act="sigmoid", n_layers=3)
    with torch.no_grad():
        adapter.model.layers[1].router.proj.weight.zero_()
    compare(adapter, PACKED, partial(mod, adapter.model_cfg))


@pytest.mark.parametrize("name", MOD)
def test_mod_as_text_is_scored(name):
    """Every token decides for itself; the loss under the choice stands beside it."""
    adapter = build("mod", **MOD[name]).eval()
    for module in adapter.modules():
        if isinstance(module, Predictor):
            torch.nn.init.normal_(module.up.weight, generator=torch.Generator().manual_seed(4))
            torch.nn.init.zeros_(module.down.bias)  # so that some enter, and some do not
    cfg, batch = adapter.model_cfg, some_rows(PACKED)
    found = adapter.likelihood(batch, context(2, phase="eval"))
    p, tokens, docs = dict(adapter.model.named_parameters()), batch.tokens.tolist(), batch.doc_ids.tolist()
    with torch.no_grad():
        rows = of_rows(
            lambda row, doc: mod_row(p, row[:LENGTH], doc[:LENGTH], cfg, causal=True), tokens, docs
        )
        expected = [
            [nats(logits[t, :VOCABULARY], row[t + 1]) for t in range(LENGTH)]
            for (logits, *_), row in zip(rows, tokens, strict=True)
        ]
        _, terms = mod(cfg, p, {}, tokens, docs)
    torch.testing.assert_close(found.per_token, torch.tensor(expected), rtol=0, atol=1e-9)
    entered = sum(len(part) for _, parts, _ in rows for part in parts)
    told = {name: float(m.sum.detach()) / float(m.count) for name, m in found.metrics.items()}
    assert 0 < told["used_share"] < 1
    assert told["used_share"] == pytest.approx(entered / sum(LENGTH * len(parts) for _, parts, _ in rows))
    assert told["ce_topk"] == pytest.approx(float(terms["ce_topk"][0]), abs=1e-9)


# -- rd ----------------------------------------------------------------------------------------------------------------


def rd(cfg, start, parts, depth, p, buffers, tokens, docs):
    logits = [
        [rd_logits(p, row[:LENGTH], doc, list(s), cfg, parts, depth, cfg.k_trunc)]
        for row, doc, s in zip(tokens, docs, start, strict=True)
    ]
    return logits, {"ce": (nats_of(logits, 1, tokens, docs), 1.0)}


RD = {
    "default": ({"n_layers": 3}, (1, 1, 1)),
    "two-in-the-core": ({"n_layers": 4, "qk_bias": False, "tie_embeddings": False, "s0_std": 0.1}, (1, 2, 1)),
    "add": (
        {"n_layers": None, "l_p": 2, "l_core": 1, "l_c": 1, "adapter_mode": "add", "ffn_hidden": 12},
        (2, 1, 1),
    ),
}


@pytest.mark.parametrize("depth", [1, 3, 9])
@pytest.mark.parametrize("name", RD)
def test_rd(name, depth):
    """Of nine recurrences the last four have a gradient."""
    fields, parts = RD[name]
    adapter = build("rd", k_trunc=4, **fields)
    start = 0.6 * torch.randn(2, LENGTH, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    adapter.model.start = lambda like, past, seeds: start.to(like)
    reference = partial(rd, adapter.model_cfg, start, parts, depth)
    compare(adapter, ONE if name == "add" else PACKED, reference, recurrences=depth)
