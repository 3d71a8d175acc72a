"""The diffusion adapters behind the trainer's contract: rows, invariance, likelihood, text."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.base import GenerateOptions
from data.store import TokenStore
from tests.adapters.diffusion.processes import WITHOUT_SUBS
from tests.adapters.diffusion.tiny import (
    EVAL,
    KINDS,
    SMALL,
    TOKENIZER,
    S,
    V,
    batch,
    build,
    objective,
    train_context,
)


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


@pytest.mark.parametrize(
    ("kind", "fields", "tau"),
    [
        ("mdl", {"sampling_eps": 0.02, "time_conditioning": True}, -math.log(1 - 0.02 * 0.999)),
        (
            "mdl",
            {"continuous_time": False, "num_timesteps": 20, "time_conditioning": True},
            -math.log(1 - 0.999 / 20),
        ),
        ("sedd", {"noise_eps": 1e-3, "sampling_eps": 0.02}, -math.log(1 - 0.02 * 0.999)),
        ("d3pm", {}, 1000 / 12),
        ("d3pm", {"transition_type": "uniform"}, 1000 / 12),
        ("bd3lm", {"time_conditioning": True}, 0.0),
    ],
)
def test_clean_text_is_read_without_noise_at_the_smallest_time(kind, fields, tau):
    adapter, given = build(kind, **fields), []
    adapter.model.time.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    adapter.model.embed.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    row = batch([3])
    states = adapter.clean_states(row, EVAL)
    assert states.shape == (1, S, SMALL["d_model"]) and states.dtype == torch.float64
    times, tokens = given
    assert torch.allclose(times.double(), torch.full_like(times, tau).double(), rtol=1e-5), times
    assert torch.equal(tokens, torch.from_numpy(row.tokens[:, :S]))


@pytest.mark.parametrize("kind", KINDS)
def test_clean_documents_in_a_row_do_not_see_each_other(kind):
    adapter = build(kind)
    one, other = batch([3], doc_starts=[4]), batch([3], doc_starts=[4])
    other.tokens[0, 5] = one.tokens[0, 5] % (V - 1) + 1
    before, after = (adapter.clean_states(b, EVAL) for b in (one, other))
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.equal(before, after)


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
    with pytest.raises(ValueError, match="absorbing_state_idx"):
        adapter.clean_states(b, EVAL)
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
        texts = adapter.generate([[1]] * 10, GenerateOptions(max_new_tokens=6)).tokens
        assert not any(5 in text for text in texts)


def test_a_reserved_token_in_the_training_text_is_found_before_the_first_step():
    store = TokenStore(np.array([1, 2, 5, 1], dtype=np.uint16), np.array([0, 4]), np.array([4]), TOKENIZER)
    build("mdl", absorbing_state_idx=4).on_training_text(store)
    for kind in ("mdl", "d3pm"):
        with pytest.raises(ValueError, match="occurs in the training text"):
            build(kind, absorbing_state_idx=5).on_training_text(store)


def test_the_token_between_documents_cannot_be_the_mask():
    with pytest.raises(ValueError, match="absorbing_state_idx .0. is the token between documents"):
        build("mdl", absorbing_state_idx=TOKENIZER.eot)


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


# -- text ----------------------------------------------------------------------------------------------


def test_samples_along_a_run_take_a_hundred_steps_at_most():
    assert build("sedd", sampling_timesteps=1024).sample_steps == 100
    assert build("mdl", num_sampling_steps=30).sample_steps == 30
    assert build("bd3lm").sample_steps == 0  # first hitting has no steps


@pytest.mark.parametrize("kind", KINDS)
def test_text_of_any_length_is_repeatable_and_independent_of_other_prompts(kind):
    adapter = build(kind)
    options = GenerateOptions(max_new_tokens=13, temperature=1.0, seed=3, stop_at_document_end=False)
    states = []
    both = adapter.generate([[1, 2], [5, 5]], options, on_state=lambda row, text: states.append((row, text)))
    assert [len(t) for t in both.tokens] == [13, 13] and both.network_calls > 0
    assert all(0 <= token < V for text in both.tokens for token in text)
    assert adapter.generate([[1, 2]], options).tokens[0] == both.tokens[0]
    assert adapter.generate([[1, 2], [5, 5]], options).tokens == both.tokens
    assert states[-1] == (1, [5, 5, *both.tokens[1]])
    assert all(text[:2] == ([1, 2], [5, 5])[row] for row, text in states)
    assert any(None in text for _, text in states)
    seed = GenerateOptions(max_new_tokens=13, temperature=1.0, seed=4, stop_at_document_end=False)
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
    options = GenerateOptions(max_new_tokens=13, stop_at_document_end=False)
    (whole,) = adapter.generate([[1, 2]], options).tokens
    stop = whole[7]
    assert adapter.generate([[1, 2]], replace(options, stop_ids=(stop,))).tokens == [
        whole[: whole.index(stop)]
    ]


SAMPLERS = [
    ("mdl", {}),
    ("mdl", {"sampler": "analytic"}),
    ("mdl", {"sampler": "first_hitting", "time_conditioning": True, "alpha_min": 0.0}),
    ("mdl", WITHOUT_SUBS),
    ("sedd", {}),
    ("sedd", {"transition_type": "uniform", "noise_schedule": "geometric"}),
    ("sedd", {"transition_type": "uniform", "predictor": "euler", "final_step": "argmax"}),
    ("d3pm", {}),
    ("d3pm", {"l0_mode": "x0", "reverse_param": "mixture", "final_step": "argmax"}),
    ("d3pm", {"transition_type": "uniform"}),
    ("d3pm", {"transition_type": "gaussian", "gaussian_beta_min": 1e-5, "gaussian_beta_max": 1e-4}),
    ("d3pm", {"transition_type": "gaussian", "reverse_param": "mixture"}),
    ("bd3lm", {}),
    ("bd3lm", {"sampler": "analytic"}),
]


@pytest.mark.parametrize("kind, fields", SAMPLERS, ids=str)
def test_no_sampler_writes_the_mask_or_an_id_that_the_tokenizer_lacks(kind, fields):
    """Of a network that is sure of them, with a vocabulary of four ids more than the tokenizer has."""
    steps = "num_sampling_steps" if kind in ("mdl", "bd3lm") else "sampling_timesteps"
    adapter = build(kind, **fields, **{steps: 4}, vocab_size=V + 4)
    # Elsewhere beyond what fp64 knows of the rest; scores are exponentials.
    adapter.model.head_bias.data[V:] += 30.0 if kind == "sedd" else 1000.0
    for shaping in ({}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5, "min_p": 0.5}):
        options = GenerateOptions(max_new_tokens=10, stop_at_document_end=False, **shaping)
        shown = []
        text = adapter.generate([[1, 2]], options, on_state=lambda row, x, seen=shown: seen.extend(x)).tokens
        filled = adapter.infill([[1, None, 3, None, None]], options).tokens
        if adapter.model.mask_id is not None:
            text += adapter.generate([[1, 2]], replace(options, by_confidence=True)).tokens
        assert all(len(row) == 10 for row in text) and filled[0][0] == 1 and filled[0][2] == 3
        assert all(0 <= token < V for row in [*text, *filled] for token in row), shaping
        assert all(token is None or token < V for token in shown), shaping


@pytest.mark.parametrize(
    "kind, fields",
    [
        ("mdl", {"alpha_type": "geometric", "sampler": "analytic"}),
        ("mdl", {"alpha_type": "linear_sigma", "sampler": "first_hitting", "time_conditioning": True}),
        ("sedd", {"noise_schedule": "geometric", "predictor": "euler"}),
        ("sedd", {"noise_schedule": "geometric", "transition_type": "uniform"}),
    ],
    ids=str,
)
def test_however_much_noise_is_asked_for_text_is_drawn(kind, fields):
    adapter = build(kind, trained=False, sigma_max=1000.0, **fields)
    options = GenerateOptions(max_new_tokens=10, stop_at_document_end=False)
    assert max(adapter.generate([[1, 2]], options).tokens[0]) < V


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
            [[1, 2]], GenerateOptions(max_new_tokens=7, stop_at_document_end=False, **more)
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
