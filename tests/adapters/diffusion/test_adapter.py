"""The diffusion adapters behind the trainer's contract: rows, invariance, likelihood, text, every field's effect."""

import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.base import Context, GenerateOptions
from adapters.diffusion.bd3lm import BD3LMAdapter, ClipSearch, _clipped_count, block_of
from adapters.diffusion.d3pm import D3PMAdapter
from adapters.diffusion.mdl import MDLAdapter
from adapters.diffusion.sedd import SEDDAdapter
from data.rows import Batch
from kernels.choose import Kernels
from kernels.linear_function_loss import chunked as function_chunks
from models.bd3lm import BD3LM
from models.d3pm import D3PM
from models.mdl import MDL
from models.sedd import SEDD

V, S = 11, 8
TOKENIZER = types.SimpleNamespace(eot=0, vocab_size=V, name="toy")
KINDS = {
    "mdl": (MDL, MDLAdapter),
    "sedd": (SEDD, SEDDAdapter),
    "d3pm": (D3PM, D3PMAdapter),
    "bd3lm": (BD3LM, BD3LMAdapter),
}
SMALL = {
    "vocab_size": V,
    "n_ctx": S,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 1,
    "cond_dim": 8,
    "dropout": 0.0,
}
STEPS = {
    "mdl": {"num_sampling_steps": 12},
    "sedd": {"sampling_timesteps": 12},
    "d3pm": {"num_timesteps": 12, "sampling_timesteps": 12},
    "bd3lm": {"num_sampling_steps": 12, "block_length": 4},
}


def build(kind, trained=True, **fields):
    model_class, adapter_class = KINDS[kind]
    cfg = model_class.Config(**{**SMALL, **STEPS[kind], "nelbo_draws": 4, **fields})
    adapter = adapter_class(model_class(cfg), cfg, TOKENIZER)
    adapter.init_weights(torch.Generator().manual_seed(0))
    adapter.double()
    if trained:  # a network that answers something
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapter.named_parameters():
            if not bool(parameter.any()) or "adaln" in name:
                parameter.data.normal_(0, 0.3, generator=generator)
    return adapter.eval()


def batch(ids, seq_len=S, doc_starts=()):
    """Rows by id; a document begins at each of `doc_starts`."""
    tokens = np.stack([np.random.default_rng(i).integers(1, V, seq_len + 1) for i in ids])
    doc_ids = np.zeros_like(tokens, dtype=np.int32)
    for start in doc_starts:
        doc_ids[:, start:] += 1
    ones = np.ones((len(ids), seq_len), dtype=np.float32)
    return Batch(tokens, doc_ids, ones, np.zeros_like(ones), np.asarray(ids), len(ids) * seq_len)


def train_context(rows_in_step=4, step=0):
    return Context(seed=1, step=step, phase="train", rows_in_step=rows_in_step)


EVAL = Context(seed=1, step=0, phase="eval", rows_in_step=4)


def objective(adapter, batches, rows_in_step=4):
    """Loss and gradients of a step made of several micro-batches, as the trainer adds them up."""
    adapter.zero_grad()
    prepared = [adapter.prepare(b, train_context(rows_in_step)) for b in batches]
    totals = {k: sum(p.denominators[k] for p in prepared) for k in prepared[0].denominators}
    value = 0.0
    for p in prepared:
        out = adapter(p)
        loss = sum(term.weight * term.sum / totals[term.denominator] for term in out.terms.values())
        loss.backward()
        value += loss.item()
    return value, [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_how_it_is_split(kind):
    adapter = build(kind)
    whole, gradients = objective(adapter, [batch([0, 1, 2, 3])])
    split, pieces = objective(adapter, [batch([0]), batch([1, 2]), batch([3])])
    assert split == pytest.approx(whole, rel=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients, pieces, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_is_given_and_only_scored_positions_are_noised(kind):
    b = batch(range(64))
    b.weights[:, 5] = 0
    for given in (True, False):
        adapter = build(kind, ignore_bos=given)
        prepared = adapter.prepare(b, train_context(64))
        changed = prepared.tensors["xt"] != torch.from_numpy(b.tokens)
        assert not bool(changed[:, 6].any())
        assert bool(changed[:, 0].any()) is not given
        assert bool(changed[:, 1:6].any()) and prepared.denominators["tokens"] == 64 * (S - given)
        index = prepared.tensors["rows.index"] % (S + 1)
        assert 6 not in index.tolist() and (0 in index.tolist()) is not given


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_network_scores_the_uniform_law(kind):
    """At a zero output the bound's integrand is log n: with exact mask counts also each estimate of it."""
    adapter = build(kind, trained=False)
    found = adapter.likelihood(batch(range(200)), EVAL)
    error = math.sqrt(float(found.variance.sum())) / (200 * S)
    slack = 0.02 if kind == "d3pm" else 1e-3  # a dozen steps and a network that believes in the mask
    assert float(found.nats.mean()) / S == pytest.approx(math.log(V), abs=4 * error + slack)
    if kind in ("mdl", "bd3lm"):
        assert torch.allclose(found.nats, torch.full_like(found.nats, S * math.log(V)))
    assert found.kind == "bound" and "4 noise draws" in found.estimator
    assert torch.allclose(sum(found.parts.values()), found.nats) and [*found.estimates] == ["paper"]
    assert found.end_nats is None


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_text_is_scored_given_its_first_token_whatever_training_does(kind):
    """The same positions as an autoregressive model's, so that tokens and bytes are those of the score."""
    adapter = build(kind, trained=False, ignore_bos=False)
    other = batch(range(8))
    other.tokens[:, 0] = 1 + other.tokens[:, 0] % (V - 1)
    found, changed = (adapter.likelihood(b, EVAL).nats for b in (batch(range(8)), other))
    assert torch.allclose(found, changed)
    if kind in ("mdl", "bd3lm"):
        assert torch.allclose(found, torch.full_like(found, S * math.log(V)))


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_depends_on_the_row_and_not_on_its_neighbours(kind):
    adapter = build(kind)
    together = adapter.likelihood(batch([0, 1, 2]), EVAL).nats
    alone = torch.cat([adapter.likelihood(batch([i]), EVAL).nats for i in (0, 1, 2)])
    assert torch.allclose(together, alone, atol=1e-9)
    again = adapter.likelihood(batch([0, 1, 2]), EVAL).nats
    assert torch.equal(together, again)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_neither_scored_nor_seen(kind):
    """A short row beside a long one, and a row of padding."""
    adapter = build(kind)
    short = batch([0, 1], seq_len=4)
    wide = batch([0, 1], seq_len=S)
    wide.tokens[0, :5], wide.tokens[0, 5:] = short.tokens[0], 0
    wide.weights[0, 4:] = 0
    wide.doc_ids[0, 5:] = [1, 2, 3, 4]
    wide.weights[1] = 0
    nats = adapter.likelihood(wide, EVAL).nats
    assert nats[1] == 0
    if kind != "bd3lm":  # there, noise is drawn per block, and a wider row has more of them
        expected = adapter.likelihood(short, EVAL).nats[0]
        assert torch.allclose(nats[0], expected, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_a_row_do_not_see_each_other(kind):
    adapter = build(kind)
    one, other = batch([3], doc_starts=[4]), batch([3], doc_starts=[4])
    other.tokens[0, 5] = one.tokens[0, 5] % (V - 1) + 1
    values = []
    for b in (one, other):
        prepared = adapter.prepare(b, train_context(1))
        t = prepared.tensors
        extra = {k.removeprefix("extra."): v for k, v in t.items() if k.startswith("extra.")}
        values.append(adapter.model(t["xt"], t["tau"], doc_ids=t["doc_ids"], **extra)[0, :4])
    assert torch.equal(*values)


def test_text_with_the_reserved_mask_token_is_refused():
    adapter = build("mdl", absorbing_state_idx=V - 1)
    assert adapter.model.V == V and adapter.model.n == V - 1
    b = batch([0])
    b.tokens[0, 3] = V - 1
    with pytest.raises(ValueError, match="absorbing_state_idx"):
        adapter.prepare(b, train_context())
    b.tokens[:] = 1
    assert adapter(adapter.prepare(b, train_context())).terms["nelbo"].sum > 0


def test_given_text_with_the_reserved_mask_token_is_refused():
    for kind in ("mdl", "sedd", "bd3lm", "d3pm"):
        adapter = build(kind, absorbing_state_idx=5)
        for text in ([[5, None, 3]], [[None, 5]]):
            with pytest.raises(ValueError, match="absorbing_state_idx"):
                adapter.infill(text, GenerateOptions())
        with pytest.raises(ValueError, match="absorbing_state_idx"):
            adapter.generate([[5]], GenerateOptions(max_new_tokens=3))
        assert 5 not in adapter.generate([[1]], GenerateOptions(max_new_tokens=30)).tokens[0]


def test_a_reserved_token_in_the_training_text_is_found_before_the_first_step():
    store = types.SimpleNamespace(tokens=np.array([1, 2, 5, 1], dtype=np.uint16), n_docs=1)
    build("mdl", absorbing_state_idx=4).on_training_text(store)
    for kind in ("mdl", "d3pm"):
        with pytest.raises(ValueError, match="occurs in the training text"):
            build(kind, absorbing_state_idx=5).on_training_text(store)


def test_samples_along_a_run_take_a_hundred_steps_at_most():
    assert build("sedd", sampling_timesteps=1024).sample_steps == 100
    assert build("mdl", num_sampling_steps=30).sample_steps == 30
    assert build("bd3lm").sample_steps == 0  # first hitting has no steps


def test_the_token_between_documents_cannot_be_the_mask():
    with pytest.raises(ValueError, match="absorbing_state_idx .0. is the token between documents"):
        build("mdl", absorbing_state_idx=TOKENIZER.eot)


CHAINS = {
    "absorbing": {},
    "uniform": {"transition_type": "uniform"},
    "absorbing, mixture": {"reverse_param": "mixture"},
    "gaussian": {"transition_type": "gaussian"},
    "nearest_neighbor": {
        "transition_type": "nearest_neighbor",
        "noise_schedule": "cosine",
        "nearest_neighbors": 3,
    },
}


@pytest.mark.parametrize("chain", CHAINS)
def test_the_loss_of_a_chain_keeps_its_digits_where_products_have_eight_bits(chain, tmp_path):
    """Under autocast only the network is narrow: with the same logits, loss, gradient and bound are those of fp64."""
    fields = {"num_timesteps": 1000, "sampling_timesteps": 12, **CHAINS[chain]}
    if chain == "nearest_neighbor":
        np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(V, 4)))
        fields["nn_embedding_path"] = str(tmp_path / "table.npy")

    found = []
    for narrow in (False, True):
        adapter = build("d3pm", **fields)
        adapter.to(torch.float32 if narrow else torch.float64)
        # Logits that eight bits hold exactly: a zero output layer with a bias.
        adapter.model.output.weight.data.zero_()
        adapter.model.output.bias.data = (
            torch.linspace(-1, 1, 9).repeat(2)[: adapter.model.V].to(adapter.model.output.bias)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            prepared = adapter.prepare(batch(range(64)), train_context(64))
            prepared.tensors["rows.weights"] = prepared.tensors["rows.weights"].to(adapter.model.output.bias)
            out = adapter(prepared)
            bound = adapter.likelihood(batch(range(8)), EVAL)
        out.terms["objective"].sum.backward()
        grad = adapter.model.output.bias.grad.double()
        found.append((float(out.terms["objective"].sum.detach()), grad, bound.nats.sum()))
    (loss, grad, nats), (narrow_loss, narrow_grad, narrow_nats) = found
    assert narrow_loss == pytest.approx(loss, rel=1e-3)
    assert float((narrow_grad - grad).norm() / grad.norm()) < 5e-3
    assert float(narrow_nats) == pytest.approx(float(nats), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_by_time_add_up_to_the_bound(kind):
    adapter = build(kind, **({"clip_search": False} if kind == "bd3lm" else {}))
    prepared = adapter.prepare(batch(range(32)), train_context(32))
    out = adapter(prepared)
    by_time = [out.metrics[f"nelbo_t{d}"] for d in range(10)]
    assert sum(float(m.sum.detach()) for m in by_time) == pytest.approx(
        float(out.terms["nelbo"].sum.detach()), rel=1e-9
    )
    assert sum(m.count for m in by_time) == out.metrics["noised_fraction"].count == 32 * S
    share = float(out.metrics["noised_fraction"].sum) / (32 * S)
    assert 0.2 < share < 0.8
    assert ("score_total" in out.metrics) is (kind == "sedd")


@pytest.mark.parametrize("scaled", [True, False])
def test_the_score_total_is_the_networks_own(scaled):
    adapter = build("sedd", scale_by_sigma=scaled)
    prepared = adapter.prepare(batch(range(8)), train_context(8))
    metric = adapter(prepared).metrics["score_total"]
    t = prepared.tensors
    logits = adapter.model.logits(adapter.model(t["xt"], t["tau"], doc_ids=t["doc_ids"])).flatten(0, 1)[
        t["rows.index"], :V
    ]
    shift = 0.0 if scaled else t["rows.c.shift"]
    expected = torch.exp(logits.logsumexp(1) + shift - math.log(V)).sum()
    assert float(metric.sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert metric.count == len(t["rows.index"])


# -- text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_any_length_is_repeatable_and_independent_of_other_prompts(kind):
    adapter = build(kind)
    options = GenerateOptions(max_new_tokens=21, temperature=1.0, seed=3, stop_at_document_end=False)
    states = []
    both = adapter.generate([[1, 2], [5, 5]], options, on_state=lambda row, text: states.append((row, text)))
    assert [len(t) for t in both.tokens] == [21, 21] and both.network_calls > 0
    assert all(0 <= token < V for text in both.tokens for token in text)
    assert adapter.generate([[1, 2]], options).tokens[0] == both.tokens[0]
    assert adapter.generate([[1, 2], [5, 5]], options).tokens == both.tokens
    assert states[-1] == (1, [5, 5, *both.tokens[1]])
    assert all(text[:2] == ([1, 2], [5, 5])[row] for row, text in states)
    assert any(None in text for _, text in states)
    seed = GenerateOptions(max_new_tokens=21, temperature=1.0, seed=4, stop_at_document_end=False)
    assert adapter.generate([[1, 2]], seed).tokens[0] != both.tokens[0]


@pytest.mark.parametrize("kind", KINDS)
def test_gaps_are_filled_and_the_rest_comes_back(kind):
    adapter = build(kind)
    texts = [[1, None, 3, None, None, 6], [None] * 6, [4, 4, 4]]
    filled = adapter.infill(texts, GenerateOptions(temperature=1.0)).tokens
    for text, out in zip(texts, filled, strict=True):
        assert len(text) == len(out) and None not in out
        assert all(a == b for a, b in zip(text, out, strict=True) if a is not None)
    with pytest.raises(ValueError, match="context is 8"):
        adapter.infill([[None] * (S + 1)], GenerateOptions())


@pytest.mark.parametrize("kind", KINDS)
def test_text_ends_before_a_stop_token(kind):
    adapter = build(kind)
    options = GenerateOptions(max_new_tokens=21, stop_at_document_end=False)
    (whole,) = adapter.generate([[1, 2]], options).tokens
    stop = whole[7]
    assert adapter.generate([[1, 2]], replace(options, stop_ids=(stop,))).tokens == [
        whole[: whole.index(stop)]
    ]


def test_generation_stops_at_a_document_end_and_reports_tokens():
    adapter = build("mdl")
    adapter.model.head_bias.data[TOKENIZER.eot] = 3.0
    heard = []
    options = GenerateOptions(max_new_tokens=7, temperature=1.0)
    out = adapter.generate([[1]], options, on_tokens=lambda row, new: heard.append((row, new)))
    assert TOKENIZER.eot not in out.tokens[0] and len(out.tokens[0]) < 7
    assert heard[-1] == (0, out.tokens[0]) and (0, []) in heard  # asked now and then whether to stop


@pytest.mark.parametrize("kind", KINDS)
def test_confidence_reveals_an_equal_share_at_each_step(kind):
    adapter = build(kind, **({"kv_cache": False} if kind == "bd3lm" else {}))
    options = GenerateOptions(max_new_tokens=4, by_confidence=True, steps=2, stop_at_document_end=False)
    left = []
    adapter.generate([[]], options, on_state=lambda row, text: left.append(text.count(None)))
    assert left == [2, 0]


def test_options_that_would_not_be_heeded_are_refused():
    options = GenerateOptions(max_new_tokens=4, by_confidence=True, steps=2)
    for kind in ("sedd", "d3pm"):
        with pytest.raises(ValueError, match="no mask"):
            build(kind, transition_type="uniform").generate([[1]], options)
    for adapter in (build("bd3lm"), build("mdl", sampler="first_hitting")):
        with pytest.raises(ValueError, match="steps: .*first_hitting"):
            adapter.generate([[1]], GenerateOptions(steps=2))
    with pytest.raises(ValueError, match="steps: must be 1 to 12"):
        build("d3pm").generate([[1]], GenerateOptions(steps=13))
    with pytest.raises(ValueError, match="steps: must be 1 to 12"):
        build("d3pm").infill([[1, None]], GenerateOptions(steps=13))


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_drawn_from_the_models_own_distribution_unless_told_otherwise(kind):
    adapter = build(kind)
    plain, one, low = (
        adapter.generate(
            [[1, 2]], GenerateOptions(max_new_tokens=21, stop_at_document_end=False, **more)
        ).tokens
        for more in ({}, {"temperature": 1.0}, {"temperature": 0.3})
    )
    assert plain == one != low


@pytest.mark.parametrize("kind", ["mdl", "bd3lm"])
def test_without_a_cache_the_same_text_takes_more_calls(kind):
    adapter = build(kind, sampler="ancestral_cache")
    options = GenerateOptions(max_new_tokens=14, stop_at_document_end=False)
    cached, plain = (adapter.generate([[1, 2]], replace(options, use_cache=c)) for c in (True, False))
    assert cached.tokens == plain.tokens and cached.network_calls < plain.network_calls


@pytest.mark.parametrize(
    "more", [{"by_confidence": True, "steps": 3}, {}], ids=["confidence", "argmax at the end"]
)
def test_rows_with_different_gaps_do_not_disturb_each_other(more):
    adapter = build("mdl", sampler="first_hitting", final_step="argmax")
    texts = [[1, None, 3, 4, 5, 6], [None] * 6]
    for seed in range(8):
        options = GenerateOptions(seed=seed, **more)
        together = adapter.infill(texts, options).tokens
        assert together[0] == adapter.infill(texts[:1], options).tokens[0]


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral_cache", "ancestral", "analytic"])
def test_blocks_with_and_without_a_cache_are_the_same_text(sampler):
    options = GenerateOptions(max_new_tokens=14, temperature=1.0, stop_at_document_end=False)
    cached, plain = (
        build("bd3lm", kv_cache=c, sampler=sampler).generate([[1, 2]], options) for c in (True, False)
    )
    assert cached.tokens == plain.tokens
    assert cached.network_calls < plain.network_calls


# -- every field has an effect -------------------------------------------------------------------------


def fingerprint(adapter):
    """What a configuration does: a training step, a bound, a text."""
    value, gradients = objective(adapter, [batch([0, 1, 2, 3])])
    assert math.isfinite(value) and all(bool(g.isfinite().all()) for g in gradients)
    bound = adapter.likelihood(batch([0, 1]), EVAL)
    assert all(
        bool(v.isfinite().all()) for v in [bound.nats, *bound.parts.values(), *bound.estimates.values()]
    )
    options = GenerateOptions(max_new_tokens=20, temperature=1.0, stop_at_document_end=False)
    text = adapter.generate([[1, 2, 3], [4, 5, 6]], options)
    return {
        "loss": value,
        "gradient": float(sum(g.abs().sum() for g in gradients)),
        "bound": float(bound.nats.sum()),
        "paper": float(bound.estimates["paper"].sum()),
        "estimator": bound.estimator,
        "text": text.tokens,
        "calls": text.network_calls,
    }


LINEAR = {"transition_type": "uniform", "noise_schedule": "linear", "linear_beta_max": 0.9}
GEOMETRIC = {"alpha_type": "geometric"}
TIMED = {"time_conditioning": True, "sampler": "ancestral"}
DISCRETE = {"continuous_time": False, "num_timesteps": 10}
FIELDS = [
    ("mdl", {}, {"alpha_type": "cosine"}, "loss"),
    ("mdl", {}, {"alpha_type": "cosine_sq"}, "loss"),
    ("mdl", {}, {"alpha_type": "linear_sigma"}, "loss"),
    ("mdl", {}, {"alpha_min": 0.3}, "loss"),
    ("mdl", {}, {"alpha_max": 0.7}, "loss"),
    ("mdl", GEOMETRIC, {"sigma_min": 1e-2}, "loss"),
    ("mdl", GEOMETRIC, {"sigma_max": 5.0}, "loss"),
    ("mdl", {}, {"sampling_eps": 0.2}, "loss"),
    ("mdl", {}, {"sampling_eps": 0.2}, "paper"),
    ("mdl", {}, DISCRETE, "bound"),
    ("mdl", DISCRETE, {"num_timesteps": 3}, "loss"),
    ("mdl", {**DISCRETE, "sampler": "ancestral"}, {"use_subs_parameterization": False}, "loss"),
    ("mdl", {**DISCRETE, "sampler": "ancestral"}, {"use_subs_parameterization": False}, "text"),
    ("mdl", {}, {"use_low_discrepancy_sampler": False}, "loss"),
    ("mdl", {}, {"num_sampling_steps": 3}, "calls"),
    ("mdl", {}, {"sampler": "ancestral"}, "calls"),
    ("mdl", {}, {"sampler": "analytic"}, "text"),
    ("mdl", {}, {"sampler": "first_hitting"}, "text"),
    ("mdl", {}, {"sar_chunk_size": 2}, "text"),
    ("mdl", {"sampler": "ancestral"}, {"time_conditioning": True}, "loss"),
    ("mdl", {}, {"nelbo_draws": 8}, "bound"),
    ("mdl", {"num_sampling_steps": 1}, {"final_step": "argmax"}, "text"),
    ("sedd", {}, {"transition_type": "uniform"}, "loss"),
    ("sedd", {}, {"noise_schedule": "geometric"}, "loss"),
    ("sedd", {"noise_schedule": "geometric"}, {"sigma_min": 1e-2}, "loss"),
    ("sedd", {"noise_schedule": "geometric"}, {"sigma_max": 5.0}, "loss"),
    ("sedd", {}, {"noise_eps": 0.2}, "loss"),
    ("sedd", {}, {"sampling_eps": 0.2}, "loss"),
    ("sedd", {}, {"use_low_discrepancy_sampler": False}, "loss"),
    ("sedd", {}, {"se_loss_weight": 2.0}, "loss"),
    ("sedd", {}, {"lm_loss_weight": 0.5}, "loss"),
    ("sedd", {"lm_loss_weight": 0.5}, {"se_loss_weight": 2.0}, "loss"),
    ("sedd", {}, {"scale_by_sigma": False}, "loss"),
    ("sedd", {"noise_schedule": "geometric"}, {"predictor": "euler"}, "text"),
    ("sedd", {}, {"sampling_timesteps": 3}, "calls"),
    ("sedd", {}, {"time_conditioning": False}, "loss"),
    ("sedd", {}, {"nelbo_draws": 8}, "bound"),
    ("sedd", {"nelbo_draws": None, "num_timesteps": 4}, {"num_timesteps": 9}, "estimator"),
    ("d3pm", {}, {"noise_schedule": "cosine"}, "loss"),
    ("d3pm", {}, {"num_timesteps": 20}, "loss"),
    ("d3pm", {}, {"auxiliary_loss_weight": 0.5}, "loss"),
    ("d3pm", {}, {"transition_type": "gaussian", "noise_schedule": "linear"}, "loss"),
    ("d3pm", LINEAR, {"linear_beta_min": 0.3}, "loss"),
    ("d3pm", LINEAR, {"linear_beta_max": 0.5}, "loss"),
    ("d3pm", {}, {"sampling_timesteps": 3}, "calls"),
    ("d3pm", {}, {"reverse_param": "mixture"}, "loss"),
    ("d3pm", LINEAR, {"reverse_param": "mixture"}, "loss"),
    ("d3pm", LINEAR, {"reverse_param": "mixture"}, "text"),
    ("d3pm", LINEAR, {"l0_mode": "x0"}, "loss"),
    ("d3pm", {**LINEAR, "sampling_timesteps": 2}, {"l0_mode": "x0"}, "text"),
    ("d3pm", {}, {"zero_mask_logit": True}, "loss"),
    ("d3pm", {}, {"zero_mask_logit": True}, "text"),
    ("d3pm", {}, {"nelbo_steps": 3}, "bound"),
    ("d3pm", {}, {"nelbo_draws": 8}, "bound"),
    ("d3pm", {"sampling_timesteps": 1}, {"final_step": "argmax"}, "text"),
    ("d3pm", {}, {"time_conditioning": False}, "loss"),
    ("bd3lm", {}, {"block_length": 2}, "loss"),
    ("bd3lm", {}, {"nelbo_draws": 8}, "bound"),
    ("bd3lm", {}, {"final_step": "argmax"}, "text"),
    ("bd3lm", {"clip_search": False}, {"sampling_eps_min": 0.45}, "loss"),
    ("bd3lm", {"clip_search": False}, {"sampling_eps_max": 0.5}, "loss"),
    ("bd3lm", {"sampling_eps_min": 0.45}, {"resample_masks": False}, "loss"),
    ("bd3lm", {}, {"use_low_discrepancy_sampler": False}, "loss"),
    ("bd3lm", {}, {"sampler": "analytic"}, "text"),
    ("bd3lm", {"sampler": "ancestral_cache"}, {"num_sampling_steps": 2}, "text"),
    ("bd3lm", {}, {"kv_cache": False}, "calls"),
    ("bd3lm", {}, {"time_conditioning": True}, "loss"),
]


@pytest.mark.parametrize("kind, base, change, what", FIELDS, ids=lambda v: str(v).replace(" ", "")[:40])
def test_every_field_changes_something(kind, base, change, what):
    assert fingerprint(build(kind, **base))[what] != fingerprint(build(kind, **{**base, **change}))[what]


def test_the_auxiliary_loss_is_not_part_of_the_bound():
    values = [fingerprint(build("d3pm", auxiliary_loss_weight=w)) for w in (0.0, 0.5)]
    assert values[0]["bound"] == values[1]["bound"] and values[0]["loss"] < values[1]["loss"]
    terms = [build("d3pm", auxiliary_loss_weight=w) for w in (0.0, 0.5)]
    nelbo = [float(a(a.prepare(batch([0, 1, 2, 3]), train_context())).terms["nelbo"].sum) for a in terms]
    assert nelbo[0] == pytest.approx(nelbo[1], rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunked_and_the_plain_loss_agree(kind):
    found = []
    for implementation in ("chunked", "reference"):
        adapter = build(kind)
        adapter.kernels = Kernels({"default": implementation})
        found.append(objective(adapter, [batch([0, 1, 2, 3])]))
    chunked, plain = found
    assert chunked[0] == pytest.approx(plain[0], rel=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(chunked[1], plain[1], strict=True))


def test_the_dense_loss_has_the_gradient_of_its_definition(monkeypatch):
    """In chunks of one row and of all rows."""
    values = []
    for chunk in (1, 2**20):
        monkeypatch.setattr(function_chunks, "rows_at_once", lambda *args, chunk=chunk: chunk)
        values.append(objective(build("d3pm", reverse_param="mixture"), [batch([0, 1, 2, 3])]))
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(values[0][1], values[1][1], strict=True))
    adapter = build("d3pm", reverse_param="mixture")
    value, _ = objective(adapter, [batch([0, 1, 2, 3])])
    weight = adapter.model.output.weight
    slope = float(weight.grad[3, 5])
    with torch.no_grad():
        weight[3, 5] += 1e-6
    moved, _ = objective(adapter, [batch([0, 1, 2, 3])])
    assert (moved - value) / 1e-6 == pytest.approx(slope, rel=1e-3)


def test_a_schedule_fitted_to_the_text_travels_with_the_weights():
    fields = {"transition_type": "uniform", "noise_schedule": "mutual_info", "auxiliary_loss_weight": 0.0}
    adapter = build("d3pm", **fields)
    flat = adapter.process.chain.alpha_bar.clone()
    store = types.SimpleNamespace(tokens=np.repeat([1, 2, 3], [90, 9, 1]).astype(np.uint16), n_docs=2)
    adapter.on_training_text(store)
    fitted = adapter.process.chain.alpha_bar
    assert not torch.allclose(flat, fitted)
    other = build("d3pm", **fields)
    other.model.load_state_dict(adapter.model.state_dict())
    assert torch.equal(other.process.chain.alpha_bar, fitted)


# -- blocks --------------------------------------------------------------------------------------------


def test_blocks_begin_behind_the_given_token():
    assert block_of(8, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert block_of(4, 1).tolist() == [0, 0, 1, 2]


def test_one_block_is_masked_diffusion():
    whole, blocks = build("mdl"), build("bd3lm", block_length=S)
    blocks.model.load_state_dict(whole.model.state_dict(), strict=False)
    found, wanted = (a.likelihood(batch(range(6)), EVAL) for a in (blocks, whole))
    assert torch.allclose(found.nats, wanted.nats, atol=1e-9)
    assert torch.allclose(found.variance, wanted.variance, atol=1e-9)


def test_blocks_of_one_token_need_one_draw():
    adapter = build("bd3lm", block_length=1)
    found = adapter.likelihood(batch(range(6)), EVAL)
    assert (found.kind, found.estimator) == ("exact", "exact") and not bool(found.variance.any())
    other = adapter.likelihood(batch(range(6)), replace(EVAL, seed=7))
    assert torch.allclose(found.nats, other.nats, atol=1e-9)


def test_nothing_is_clipped_before_a_range_has_been_found():
    """The search alone changes no step: training starts on the bound itself, which is log n at a zero output."""
    rows = batch(range(512))
    values = []
    for search in (True, False):
        adapter = build("bd3lm", trained=False, clip_search=search)
        prepared = adapter.prepare(rows, train_context(512))
        (term,) = adapter(prepared).terms.values()
        values.append(float(term.sum.detach()) / prepared.denominators["tokens"])
        assert term.likelihood is not search
    assert values[0] == values[1] == pytest.approx(math.log(V), rel=0.1)


def test_clipped_losses_are_not_called_bounds():
    out = (adapter := build("bd3lm"))(adapter.prepare(batch([0, 1]), train_context(2)))
    assert [*out.terms] == ["clipped_loss"] and not any("nelbo" in name for name in out.metrics)


def test_times_are_counted_where_they_lie():
    adapter = build("bd3lm", clip_search=False, sampling_eps_min=0.3, sampling_eps_max=0.8)
    out = adapter(adapter.prepare(batch(range(64)), train_context(64)))
    counts = [out.metrics[f"clipped_loss_t{d}"].count for d in range(10)]
    assert [c > 0 for c in counts] == [False] * 3 + [True] * 5 + [False] * 2


def test_clipped_counts_are_the_binomial_law_given_the_range():
    n, t = torch.full((1, 4000), 4.0, dtype=torch.float64), torch.full((1, 4000), 0.3, dtype=torch.float64)
    u = torch.rand(1, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = _clipped_count(n, t, u, (0.25, 0.75)).flatten().long()
    mass = torch.tensor([math.comb(4, j) * 0.3**j * 0.7 ** (4 - j) for j in (1, 2, 3)])
    expected = mass / mass.sum() * 4000
    counts = torch.bincount(k, minlength=5).double()
    assert counts[0] == counts[4] == 0
    assert float(((counts[1:4] - expected) ** 2 / expected).sum()) < 18.42  # 2 degrees of freedom


def test_the_search_finds_the_quiet_range():
    search = ClipSearch()
    assert ClipSearch.best(search.take()) is None
    tokens = torch.full((4000,), 16.0, dtype=torch.float64)
    fraction = torch.rand(4000, generator=torch.Generator().manual_seed(0)).clamp_min(1e-6).double()
    spread = torch.where((fraction > 0.25) & (fraction <= 0.75), 0.1, 2.0)
    nats_per_mask = spread * torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    search.add(fraction * tokens, tokens, nats_per_mask * fraction * tokens)
    assert ClipSearch.best(search.take()) == (5, 15)  # twentieths
    assert not bool(search.take().any())  # used up


@pytest.mark.parametrize("fields", [{}, TIMED], ids=["exact counts", "over time"])
def test_a_range_found_in_an_evaluation_reaches_training_and_survives_a_checkpoint(fields):
    adapter = build("bd3lm", **fields)
    assert adapter.process_at(0).clip == (1e-3, 1.0)
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(5)
    resumed = build("bd3lm", **fields)  # as from a checkpoint saved right here
    resumed.model.load_state_dict(adapter.model.state_dict())
    for a in (adapter, resumed):
        assert a.process_at(5 + a.AHEAD - 1).clip == (1e-3, 1.0)
        found = a.process_at(5 + a.AHEAD).clip
        assert 0.45 <= found[1] - found[0] <= 0.9
    assert adapter.process_at(99).clip == resumed.process_at(99).clip
    prepared = adapter.prepare(batch([0, 1, 2, 3]), train_context(step=99))
    before = adapter.prepare(batch([0, 1, 2, 3]), train_context(step=5))
    assert not torch.equal(prepared.tensors["xt"], before.tensors["xt"])


def test_a_range_that_waits_is_not_replaced_and_one_from_another_run_is():
    adapter = build("bd3lm")
    limits = (1e-3, 1.0)
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(5)
    planned = adapter.plan()
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(9)  # steps up to 25 may have been prepared
    assert adapter.plan() == planned
    adapter.model.clip_plan[4] = 1_000_000  # weights of a long run, at step 0 of a new one
    assert adapter.clip_at(0) == limits
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(3)
    assert adapter.plan()[4] == 3 + adapter.AHEAD and adapter.clip_at(3) == limits
