"""Next-token prediction: its loss terms, and text drawn from a model token by token."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from adapters import decoding
from adapters.base import DataSpec, GenerateOptions, LossTerm, Metric, StepOutput
from adapters.decoding import sample_next
from adapters.default import DefaultModelAdapter
from adapters.shaping import Shaping
from configs.schema import DefaultModelConfig
from kernels.choose import Kernels
from kernels.softcap import SigmoidCap, TanhCap
from models.layers.decoder import Hidden
from tests.contract.tiny import (
    Letters,
    adapter_of,
    batch_of,
    context,
    loss_and_gradients,
    move_away_from_uniform,
    random_batch,
)
from tests.models.tiny import VOCABULARY, Recurrent


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(logits, count, **options):
    shaping, source = Shaping(**options), generator()
    found = [sample_next(logits[None], shaping, [source])[0] for _ in range(count)]
    return np.bincount(found, minlength=len(logits))


def chi_square(counts, probabilities):
    """Pearson's statistic over the symbols that can occur; the others must not have."""
    expected = probabilities * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0 and (expected[possible] > 5).all()
    return float((((counts - expected) ** 2)[possible] / expected[possible]).sum())


# -- one token ---------------------------------------------------------------------------------------------------------

LAW = np.array([0.05, 0.4, 0.02, 0.25, 0.15, 0.13])
LOGITS = torch.from_numpy(np.log(LAW) + 3.0).float()
# 99.9 % points of the chi-square distribution by degrees of freedom; with fixed seeds the tests are repeatable.
CRITICAL = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52}


def kept(mask, law=LAW):
    return np.where(mask, law, 0) / law[mask].sum()


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({}, LAW),
        ({"temperature": 2.0}, LAW**0.5 / (LAW**0.5).sum()),
        ({"top_k": 3}, kept(LAW >= 0.15)),
        ({"top_p": 0.79}, kept(LAW >= 0.15)),
        ({"min_p": 0.1}, kept(LAW >= 0.05)),
        ({"top_k": 3, "top_p": 0.6}, kept(LAW >= 0.25)),
    ],
)
def test_tokens_are_drawn_from_the_chosen_law(options, law):
    """One set of each option; what every set makes of a law is exact, in test_choice.py."""
    counts = draws(LOGITS, 2000, **{"temperature": 1.0, **options})
    assert chi_square(counts, law) < CRITICAL[int((law > 0).sum()) - 1]


def test_greedy_ignores_the_seed():
    shaping = Shaping(temperature=0.0)
    assert {sample_next(LOGITS[None], shaping, [generator(seed)])[0] for seed in range(20)} == {1}


def test_each_row_is_drawn_as_torch_draws_it_from_its_own_generator():
    """What seeds mean must not change with the number of rows, nor with a rewrite of the draw."""
    logits = torch.randn(5, 300, generator=generator(), dtype=torch.float64)
    sources, twins = ([generator(10 + row) for row in range(5)] for _ in range(2))
    for _ in range(50):
        law = logits.softmax(1)
        expected = [int(torch.multinomial(law[row], 1, generator=twins[row])) for row in range(5)]
        assert sample_next(logits, Shaping(), sources) == expected


def test_equal_logits_do_not_widen_top_k():
    counts = draws(torch.zeros(8), 400, temperature=1.0, top_k=3)
    assert (counts > 0).sum() == 3


@pytest.mark.parametrize("temperature", [1e-320, 1e-12, 1e12])
def test_extreme_temperatures_stay_finite(temperature):
    counts = draws(LOGITS, 50, temperature=temperature)
    assert counts[1] == 50 if temperature < 1 else (counts > 0).sum() > 3


def test_a_long_tail_keeps_its_share():
    logits = torch.zeros(3001)
    logits[0] = math.log(3000 * 9.0)  # each of the others one in thirty thousand, together a tenth
    tail = 1 - draws(logits, 1000, temperature=1.0)[0] / 1000
    assert abs(tail - 0.1) < 4 * math.sqrt(0.09 / 1000)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_p": 0.0}, "top_p: must satisfy 0 < top_p <= 1, got 0.0"),
        ({"min_p": 1.0}, "min_p: must satisfy 0 <= min_p < 1"),
        ({"min_p": -0.1}, "min_p: .* got -0.1"),
        ({"top_p": 1.5}, "top_p: must satisfy 0 < top_p <= 1, got 1.5"),
        ({"top_p": math.nan}, "top_p: .* got nan"),
        ({"top_k": -1}, r"top_k: must be 0 \(off\) or more, got -1"),
        ({"temperature": -0.1}, r"temperature: must be 0 \(greedy\) or more, got -0.1"),
        ({"temperature": math.nan}, "temperature: .* got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GenerateOptions(**options)


# -- a text ------------------------------------------------------------------------------------------------------------

CONTEXT = 8
FULL = GenerateOptions(max_new_tokens=3 * CONTEXT + 5, temperature=1.0, stop_at_document_end=False)


@pytest.fixture(scope="module", params=["gpt2", "vanilla"])
def adapter(request):
    """In fp64, so that the cached and the whole computation draw the same tokens."""
    small = [f"model_cfg.n_ctx={CONTEXT}", f"train_seq_len={CONTEXT}", "model_cfg.tie_embeddings=false"]
    made = adapter_of(request.param, *small, dtype=torch.float64).eval()
    with torch.no_grad():  # untrained, it is all but uniform: make the text depend on what was said before
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 / math.sqrt(parameter.shape[1]), generator=generator())
    return made


def by_hand(adapter, prompt, row, options):
    """Every token from the whole window: the last half of the context is kept when it is full."""
    source = generator((options.seed * 1_000_003 + row) % 2**63)
    text, start = [adapter.tokenizer.eot, *prompt], 0
    for _ in range(options.max_new_tokens):
        if len(text) - start > CONTEXT:
            start = len(text) - CONTEXT // 2
        with torch.no_grad():
            hidden = adapter.model(torch.tensor([text[start:]]))
            text += sample_next(adapter.model.logits(hidden[:, -1]), adapter.shaping(options), [source])
    return text[1 + len(prompt) :]


@pytest.mark.parametrize("length", [0, 5, CONTEXT - 1, CONTEXT, 2 * CONTEXT + 3])
def test_text_goes_on_past_the_context(adapter, length):
    prompt = [i % 63 for i in range(7, 7 + length)]
    cached = adapter.generate([prompt], FULL)
    whole = adapter.generate([prompt], dataclasses.replace(FULL, use_cache=False))
    assert cached.tokens == whole.tokens == [by_hand(adapter, prompt, 0, FULL)]
    assert cached.network_calls == whole.network_calls == FULL.max_new_tokens
    assert len(set(cached.tokens[0])) > 3


def test_passes_tell_of_themselves(adapter, monkeypatch):
    """Means over all passes: of prompts too, and of whole windows where there is no cache."""
    monkeypatch.setattr(
        type(adapter),
        "text_metrics",
        lambda self, hidden: {"read": Metric(hidden.states.shape[1]), "ones": Metric(3.0, 3.0)},
    )
    some = dataclasses.replace(FULL, max_new_tokens=4)
    assert adapter.generate([[1, 2, 3]], some).metrics == {"read": (4 + 3 * 1) / 4, "ones": 1.0}
    whole = adapter.generate([[1, 2, 3]], dataclasses.replace(some, use_cache=False))
    assert whole.metrics["read"] == (4 + 5 + 6 + 7) / 4


def test_text_depends_on_what_went_before(adapter):
    one, other = (adapter.generate([p], FULL).tokens for p in ([3, 4], [5, 6]))
    assert one != other


def test_seeds(adapter):
    texts = [adapter.generate([[1]], dataclasses.replace(FULL, seed=s)).tokens for s in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    state = torch.get_rng_state()
    adapter.generate([[1]], FULL)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


def test_rows_of_unequal_length_are_continued_together(adapter):
    """Each as if it were alone, beyond the context too, with and without the cache; in far fewer passes."""
    some = dataclasses.replace(FULL, max_new_tokens=CONTEXT + 4)
    prompts = [[i % 63 for i in range(n, n + n)] for n in (5, 0, CONTEXT, 2 * CONTEXT + 3, 5)]
    expected = [by_hand(adapter, prompt, row, some) for row, prompt in enumerate(prompts)]
    cached = adapter.generate(prompts, some)
    whole = adapter.generate(prompts, dataclasses.replace(some, use_cache=False))
    assert cached.tokens == whole.tokens == expected
    assert cached.network_calls == whole.network_calls <= some.max_new_tokens + CONTEXT


def test_equal_prompts_take_as_many_passes_as_one(adapter):
    assert adapter.generate([[1, 2]] * 5, FULL).network_calls == FULL.max_new_tokens


def test_finished_rows_leave_the_batch_and_nobody_notices(adapter, monkeypatch):
    full = dataclasses.replace(FULL, max_new_tokens=53)  # long enough for every row to meet a stop
    ending = dataclasses.replace(full, stop_ids=(3, 11, 40, 57, 63))
    prompts = [[i] for i in range(6)]
    widths = []
    forward = type(adapter.model).forward

    def watched(self, tokens, **given):
        widths.append(len(tokens))
        return forward(self, tokens, **given)

    monkeypatch.setattr(type(adapter.model), "forward", watched)
    found = adapter.generate(prompts, ending).tokens
    assert len({len(text) for text in found}) > 3 and max(map(len, found)) < full.max_new_tokens
    alone = []
    for row, whole in enumerate(adapter.generate(prompts, full).tokens):
        stop = next(i for i, token in enumerate(whole) if token in ending.stop_ids)
        alone.append(whole[:stop])
        assert len(found[row]) == stop
    assert found == alone
    ran = widths[: max(map(len, found)) + 1]
    assert ran == [sum(len(text) >= step for text in found) for step in range(len(ran))]


def test_more_rows_than_fit_at_once_are_taken_in_turn(adapter, monkeypatch):
    short = dataclasses.replace(FULL, max_new_tokens=4)
    prompts = [[i] for i in range(5)]
    together = adapter.generate(prompts, short)
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", 2)
    in_turn = adapter.generate(prompts, short)
    assert in_turn.tokens == together.tokens
    assert (together.network_calls, in_turn.network_calls) == (4, 12)


def test_rows_do_not_look_at_each_other(adapter):
    together = adapter.generate([[1], [2, 3], [1]], FULL).tokens
    assert adapter.generate([[9, 9], [2, 3]], FULL).tokens[1] == together[1]
    assert together[0] != together[2], "equal prompts have noise of their own"


def test_tokens_are_handed_out_as_they_come(adapter):
    heard: dict[int, list[int]] = {0: [], 1: []}
    found = adapter.generate([[1], [2]], FULL, lambda row, tokens: heard[row].extend(tokens))
    assert [heard[0], heard[1]] == found.tokens


@pytest.mark.parametrize("attention", [True, False])
def test_a_model_with_states_and_without_a_window(attention):
    """The same text as from the whole of it every time; the longest prompt is read at once when the others are done."""
    cfg = DefaultModelConfig(vocab_size=VOCABULARY)
    adapter = DefaultModelAdapter(Recurrent(attention), cfg, Letters(VOCABULARY))
    options = GenerateOptions(max_new_tokens=8, temperature=1.0, stop_at_document_end=False)
    prompts = [[1, 2], [], [i % 10 for i in range(60)], [7]]
    found = adapter.generate(prompts, options)
    assert found.network_calls == (8 + 2) + 8
    assert adapter.generate(prompts, dataclasses.replace(options, use_cache=False)) == found
    for row, prompt in enumerate(prompts):
        source, text = generator(row), [adapter.tokenizer.eot, *prompt]
        for _ in range(options.max_new_tokens):
            logits = adapter.model.logits(adapter.model(torch.tensor([text])))
            text += sample_next(logits[:, -1], adapter.shaping(options), [source])
        assert found.tokens[row] == text[1 + len(prompt) :]


class Ender(nn.Module):
    """A model that says a, b, then the document's end, whatever came before. It has no cache."""

    max_context = 8

    def __init__(self):
        super().__init__()
        self.device_is_here = nn.Parameter(torch.zeros(1))

    def forward(self, tokens, doc_ids=None, cache=None):
        hidden = torch.zeros(*tokens.shape, 4)
        hidden[..., min(tokens.shape[1] - 1, 2)] = 100.0  # position 0 -> token 0, 1 -> 1, then the end
        return hidden

    def logits(self, hidden):
        return hidden[..., :3]


def test_a_document_end_ends_the_text():
    adapter = DefaultModelAdapter(Ender(), DefaultModelConfig(vocab_size=3), Letters(3))
    options = GenerateOptions(max_new_tokens=5, temperature=0.0)
    heard = []
    assert adapter.generate([[]], options, lambda row, new: heard.extend(new)).tokens == [[0, 1]]
    assert heard == [0, 1], "the end is no text"
    on = dataclasses.replace(options, stop_at_document_end=False)
    assert adapter.generate([[]], on).tokens == [[0, 1, 2, 2, 2]]
    assert adapter.generate([[]], dataclasses.replace(options, stop_ids=(1,))).tokens == [[0]]


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact():
    return adapter_of("gpt2", dtype=torch.float64)


def with_weights(batch, weights):
    return dataclasses.replace(batch, weights=weights)


def test_the_denominator_counts_the_scored_targets(exact):
    batch = random_batch()
    weights = np.ones_like(batch.weights)
    weights[0, 3:] = 0
    assert exact.prepare(batch, context()).denominators == {"tokens": batch.weights.size}
    prepared = exact.prepare(with_weights(batch, weights), context())
    assert prepared.denominators == {"tokens": 3 + weights[1:].size}


def test_targets_of_weight_zero_give_no_gradient(exact):
    """The last target of a row is no input: with weight 0 its value must not matter at all."""
    batch = random_batch()
    weights = np.ones_like(batch.weights)
    weights[:, -1] = 0
    other = dataclasses.replace(batch, tokens=batch.tokens.copy())
    other.tokens[:, -1] = (other.tokens[:, -1] + 1) % 63
    for w, matters in ((weights, False), (batch.weights, True)):
        (loss, gradient), (loss_2, gradient_2) = (
            loss_and_gradients(exact, [with_weights(b, w)]) for b in (batch, other)
        )
        same = all(torch.equal(gradient[name], gradient_2[name]) for name in gradient)
        assert (loss != loss_2) is matters and same is not matters


def test_weights_scale_the_loss(exact):
    batch = random_batch()
    (one, gradient), (half, gradient_2) = (
        loss_and_gradients(exact, [with_weights(batch, w)]) for w in (batch.weights, batch.weights * 0.5)
    )
    assert one == pytest.approx(half), "the denominator is the sum of the weights"
    for name in gradient:
        torch.testing.assert_close(gradient[name], gradient_2[name])


class TwoMore(DefaultModelAdapter):
    """Each of three tokens from one state by the same head, with what the model tells of itself as a further term."""

    def data_spec(self):
        return DataSpec(lookahead=3)

    def hidden(self, prepared):
        hidden = super().hidden(prepared)
        return Hidden(hidden.states, {"size": hidden.states.square().sum()})

    def step_output(self, hidden, prepared):
        output = super().step_output(hidden, prepared)
        for k in (2, 3):
            output.terms[f"ce_{k}"] = self.cross_entropy(hidden.states, prepared, k, weight=0.5)
        output.terms["size"] = LossTerm(hidden.extra["size"], "tokens", 1e-3, likelihood=False)
        return output

    def heldout_metrics(self, hidden, prepared):
        return {"size": Metric(hidden.extra["size"], prepared.denominators["tokens"])}


@pytest.fixture(scope="module")
def two_more(exact):
    return TwoMore(exact.model, exact.model_cfg, exact.tokenizer)


def test_later_targets_end_with_their_document(two_more):
    """Documents a b c | d e | f g h of rows of 6 with three targets each; 9 stands before each document."""
    tokens = np.array([[9, 1, 2, 9, 3, 4, 9, 5, 6]])
    batch = dataclasses.replace(
        batch_of(tokens, n=3), doc_ids=np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2]], np.int32)
    )
    batch.weights[0, 1] = 0  # the token 2 is no target that counts, of whatever position
    found = two_more.prepare(batch, context())
    assert found.tensors.pop("cu_seqlens").unique().tolist() == [0, 3, 6]
    rows = {name: tensor.tolist()[0] for name, tensor in found.tensors.items()}
    assert rows == {
        "inputs": [9, 1, 2, 9, 3, 4],
        "doc_ids": [0, 0, 0, 1, 1, 1],
        "targets": [1, 2, 9, 3, 4, 9],
        "weights": [1, 0, 1, 1, 1, 1],
        "targets_2": [2, 9, 3, 4, 9, 5],
        "weights_2": [0, 1, 0, 1, 1, 0],
        "targets_3": [9, 3, 4, 9, 5, 6],
        "weights_3": [1, 0, 0, 1, 0, 0],
    }
    assert found.denominators == {"tokens": 5, "tokens_2": 3, "tokens_3": 2}


def test_further_terms_by_one_method(two_more, exact):
    batch = random_batch(n=3)
    plain = dataclasses.replace(batch, tokens=batch.tokens[:, :-2], doc_ids=batch.doc_ids[:, :-2])
    losses, _ = loss_and_gradients(two_more, [batch])
    tokens, length = torch.from_numpy(batch.tokens), batch.weights.shape[1]
    with torch.no_grad():
        hidden = exact.model(tokens[:, :length])
        logits = exact.model.logits(hidden).flatten(0, 1)
        expected = {
            name: nn.functional.cross_entropy(logits, tokens[:, k : k + length].flatten()).item()
            for k, name in ((1, "ce"), (2, "ce_2"), (3, "ce_3"))
        }
        expected["size"] = hidden.square().sum().item() / batch.weights.size
    assert losses == pytest.approx(expected, rel=1e-12)
    terms = two_more(two_more.prepare(batch, context())).terms
    assert [(t.weight, t.likelihood) for t in terms.values()] == [
        (1, True),
        (0.5, False),
        (0.5, False),
        (1e-3, False),
    ]
    with torch.no_grad():
        found, next_alone = (
            a.likelihood(b, context(phase="eval")) for a, b in ((two_more, batch), (exact, plain))
        )
    assert torch.equal(found.nats, next_alone.nats), "the score is that of the next token alone"
    assert float(found.metrics["size"].sum) == pytest.approx(hidden.square().sum().item(), rel=1e-12)


def test_the_loss_is_the_mean_negative_log_likelihood(exact):
    batch = random_batch()
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        logits = exact.model.logits(exact.model(tokens[:, :-1]))
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    losses, _ = loss_and_gradients(exact, [batch])
    assert losses == {"ce": pytest.approx(expected.item(), rel=1e-12)}
    found = exact.likelihood(batch, context(phase="eval"))
    assert found.nats.sum().item() == pytest.approx(expected.item() * batch.weights.size, rel=1e-12)
    assert (found.kind, found.end_nats.tolist()) == ("exact", [0.0] * 4)


@pytest.fixture
def regularised(exact):
    """The same model, z_loss = 0.1."""
    adapter = TwoMore(exact.model, exact.model_cfg, exact.tokenizer)
    adapter.z_loss = 0.1
    return adapter


def test_the_z_loss_is_trained_on_and_reported_beside_the_likelihood(regularised, two_more):
    batch = random_batch(n=3)
    (plain, gradient), (losses, found) = (loss_and_gradients(a, [batch]) for a in (two_more, regularised))
    tokens = torch.from_numpy(batch.tokens)[:, : batch.weights.shape[1]]
    model = regularised.model
    squares = model.logits(model(tokens)).logsumexp(-1).square()  # (B, S), all of weight 1
    mean = squares.mean().item()
    zs = dict.fromkeys(("z_loss", "ce_2_z_loss", "ce_3_z_loss"), pytest.approx(0.1 * mean, rel=1e-9))
    assert losses == {**{name: pytest.approx(value, rel=1e-12) for name, value in plain.items()}, **zs}
    named = dict(model.named_parameters())
    extra = torch.autograd.grad((1 + 0.5 + 0.5) * 0.1 * squares.mean(), list(named.values()))
    for name, more in zip(named, extra, strict=True):
        torch.testing.assert_close(found[name], gradient[name] + more, rtol=1e-9, atol=1e-12)
    terms = regularised(regularised.prepare(batch, context())).terms
    assert next(iter(terms)) == "ce" and not terms["z_loss"].likelihood and terms["z_loss"].weight == 0


def test_no_score_has_a_z_loss(regularised, two_more):
    batch = random_batch(n=3)
    with torch.no_grad():
        found, plain = (a.likelihood(batch, context(phase="eval")) for a in (regularised, two_more))
    assert torch.equal(found.nats, plain.nats) and torch.equal(found.per_token, plain.per_token)


def test_a_z_loss_that_no_term_heeds_is_refused(exact):
    class Other(DefaultModelAdapter):
        def step_output(self, hidden, prepared):
            total, _, _ = self.head_loss(hidden.states, prepared.tensors["targets"], None)
            return StepOutput({"own": LossTerm(total, "tokens")})

    adapter = Other(exact.model, exact.model_cfg, exact.tokenizer)
    batch = adapter.prepare(random_batch(), context())
    assert adapter(batch).terms.keys() == {"own"}
    adapter.z_loss = 0.1
    with pytest.raises(ValueError, match="z_loss=0.1: no loss term of Other is a `cross_entropy`"):
        adapter(batch)


@pytest.mark.parametrize("cap", [TanhCap(0.3), SigmoidCap(0.5, 0.1, 0.7)])
def test_a_capped_head_trains_scores_and_speaks_capped(cap, monkeypatch):
    adapter = adapter_of("gpt2", dtype=torch.float64)
    move_away_from_uniform(adapter)
    batch = random_batch()
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        bare = adapter.model.logits(adapter.model(tokens[:, :-1]))
        monkeypatch.setattr(type(adapter.model), "logit_softcap", cap)
        logits = adapter.model.logits(adapter.model(tokens[:, :-1]))
        torch.testing.assert_close(logits, cap(bare))
        torch.testing.assert_close(adapter.next_logits(tokens[:, :-1], None), logits[:, -1])
    expected = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    assert not torch.allclose(expected, nn.functional.cross_entropy(bare.mT, tokens[:, 1:], reduction="none"))
    for implementation in ("reference", "chunked"):
        adapter.kernels = Kernels({"default": implementation})
        losses, _ = loss_and_gradients(adapter, [batch])
        assert losses == {"ce": pytest.approx(expected.mean().item(), rel=1e-12)}
        found = adapter.likelihood(batch, context(phase="eval"))
        torch.testing.assert_close(found.per_token, expected, rtol=1e-12, atol=0)


def test_the_score_of_every_position(exact):
    batch = random_batch()
    batch.weights[1, 5:], batch.end_weights[1, 5] = 0, 1
    found = exact.likelihood(batch, context(phase="eval"))
    tokens = torch.from_numpy(batch.tokens)
    with torch.no_grad():
        logits = exact.model.logits(exact.model(tokens[:, :-1]))
    expected = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    torch.testing.assert_close(found.per_token, expected, rtol=1e-12, atol=0)
    assert found.nats[1] == pytest.approx(expected[1, :5].sum().item(), rel=1e-12)
    assert found.end_nats[1] == pytest.approx(expected[1, 5].item(), rel=1e-12)


def test_a_text_ends_at_every_token_that_ends_one():
    adapter = adapter_of("gpt2")
    adapter.tokenizer.ends = frozenset({adapter.tokenizer.eot, 7})
    options = GenerateOptions(stop_ids=(3,))
    assert adapter.stop_tokens(options) == {adapter.tokenizer.eot, 7, 3}
    assert adapter.stop_tokens(dataclasses.replace(options, stop_at_document_end=False)) == {3}
