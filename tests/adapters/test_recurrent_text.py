"""Text of recurrent depth: exits and drafts, what is told of them, and that scores are of the same model."""

import dataclasses

import numpy as np
import pytest
import torch

from adapters import build_adapter
from adapters.base import GenerateOptions
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import adapter_of, batch_for, config, context, move_away_from_uniform

GREEDY = GenerateOptions(max_new_tokens=9, temperature=0.0, stop_at_document_end=False)
PROMPTS = [[5, 6, 7], [], list(range(9))]
CONTEXT = 12
SIZES = {"n_ctx": CONTEXT, "d_model": 16, "n_heads": 2, "n_layers": 3, "mean_recurrence": 4}
EXITS = {
    "states": {"exit_criterion": "latent-diff", "exit_threshold": 1.0},
    "laws": {"exit_criterion": "argmax-stability", "exit_threshold": 2},
}
every_exit = pytest.mark.parametrize("exits", ["states", pytest.param("laws", marks=pytest.mark.slow)])


def made(**fields):
    words = [f"model_cfg.{name}={value}" for name, value in {**SIZES, **fields}.items()]
    adapter = adapter_of("rd", f"train_seq_len={CONTEXT}", *words, dtype=torch.float64)
    move_away_from_uniform(adapter, std=0.5)
    return adapter.eval()


def speculative(**given):
    return dataclasses.replace(GREEDY, speculative=True, **given)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),  # tests/contract does so
        {**EXITS["states"], "draft_recurrence": 2},
    ],
    ids=str,
)
def test_greedy_text_is_that_of_plain_decoding_whatever_is_drafted(fields):
    """Of prompts of any length together, past the end of the context."""
    adapter = made(**fields)
    plain = adapter.generate(PROMPTS, GREEDY)
    found = adapter.generate(PROMPTS, speculative())
    assert found.tokens == plain.tokens and len({tuple(text) for text in plain.tokens}) == len(PROMPTS)
    drafted, accepted = found.speculation.drafted, found.speculation.accepted
    assert len(drafted) == 4 and 0 < accepted[0] < drafted[0], "it is right and wrong by turns"


def test_drafts_of_the_same_model_are_all_accepted():
    """Where all tokens leave after one recurrence, fewer of them are as good."""
    adapter = made(exit_criterion="latent-diff", exit_threshold=99.0, draft_recurrence=1)
    prompts, plain = [[1, 2]], dataclasses.replace(GREEDY, max_new_tokens=6)
    expected, found = (
        adapter.generate(prompts, plain),
        adapter.generate(prompts, speculative(max_new_tokens=6)),
    )
    assert found.tokens == expected.tokens and (expected.network_calls, found.network_calls) == (6, 2)
    assert found.speculation.accepted == found.speculation.drafted == [1, 1, 1, 1]
    assert found.speculation.tokens_per_pass == 6 / 2


@pytest.mark.slow
def test_a_rows_text_does_not_depend_on_the_others():
    adapter = made(**EXITS["states"])
    options = speculative(temperature=1.0)
    together = adapter.generate(PROMPTS, options).tokens
    assert adapter.generate(PROMPTS[:1], options).tokens == together[:1]
    assert adapter.generate([[1], [2] * 7, PROMPTS[2]], options).tokens[2] == together[2]


@every_exit
def test_text_is_what_scores_are_of(exits):
    """Written with the cache and without."""
    adapter, options = made(**EXITS[exits]), dataclasses.replace(GREEDY, max_new_tokens=6)
    (found,) = adapter.generate(PROMPTS[:1], options).tokens
    assert [found] == adapter.generate(PROMPTS[:1], dataclasses.replace(options, use_cache=False)).tokens
    text = [adapter.tokenizer.eot, *PROMPTS[0], *found]
    batch = batch_for(adapter, rows=1, length=len(text) - 1)
    batch.tokens[:] = text
    ctx = dataclasses.replace(context(1, phase="eval"), seed=0)  # whose noise text has
    likeliest = adapter.logits(adapter.clean_states(batch, ctx))[0].argmax(-1)
    assert likeliest[3:].tolist() == found


@every_exit
def test_recurrences_are_told(exits):
    """Of text by tokens, of held-out rows by what counts; without exits there is nothing to tell."""
    adapter, batch = made(**EXITS[exits]), None
    batch = batch_for(adapter, rows=4, length=10)
    ctx = context(4, phase="eval")
    with torch.no_grad():
        took = adapter.hidden(adapter.prepare(batch, ctx)).extra["recurrences"].numpy()
        batch.weights[0], batch.weights[1, 3:] = 0, 0
        metrics = adapter.likelihood(batch, ctx).metrics
    told = {name: float(metric.sum) / float(metric.count) for name, metric in metrics.items()}
    weights = batch.weights > 0
    assert told == pytest.approx(
        {"recurrences": took[weights].mean(), "full_depth": (took[weights] == 4).mean()}
    )
    assert 1 < told["recurrences"] < 4 and abs(told["recurrences"] - took.mean()) > 1e-3
    text = adapter.generate(PROMPTS, GREEDY).metrics
    assert text.keys() == told.keys() and 1 < text["recurrences"] < 4 and 0 < text["full_depth"] < 1
    assert made().generate([[]], dataclasses.replace(GREEDY, max_new_tokens=1)).metrics == {}


def test_other_depths_are_scored_without_exits():
    batch, ctx = None, dataclasses.replace(context(4, phase="eval"), estimates=True)
    found = []
    for fields in ({}, EXITS["states"], {"kv_budget": 1}):
        adapter = made(**fields)
        batch = batch_for(adapter, rows=2, length=6)
        with torch.no_grad():
            found.append(adapter.likelihood(batch, ctx))
    for other in found[1:]:
        assert other.estimates.keys() == found[0].estimates.keys()
        for name, nats in other.estimates.items():
            assert np.allclose(nats, found[0].estimates[name], rtol=0, atol=1e-9)
        assert not np.allclose(other.nats, found[0].nats, atol=1e-3)


@torch.no_grad()
def test_the_recurrences_that_are_drawn_are_those_that_are_counted():
    words = [f"model_cfg.{name}={value}" for name, value in {**SIZES, **EXITS["states"]}.items()]
    cfg = config("rd", "model_cfg.vocab_size=null", *words)
    adapter = build_adapter(*cfg, ByteTokenizer()).double().eval()
    move_away_from_uniform(adapter, std=0.5)

    def counted(text):  # of the start token and all but the last
        found = adapter.likelihood(adapter.one_row(text), context(1, phase="eval")).metrics["recurrences"]
        return float(found.sum)

    text = "to be, or"
    drawn = [int(span.label) for span in adapter.annotate(text).spans[0].spans]
    assert len(drawn) == len(text) and len(set(drawn)) > 1
    assert drawn[:-1] == [counted(text[: i + 1]) - counted(text[:i]) for i in range(1, len(text))]
    assert not build_adapter(*config("rd", "model_cfg.vocab_size=null"), ByteTokenizer()).annotate(text)
