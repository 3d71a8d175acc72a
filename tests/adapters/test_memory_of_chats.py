"""Of chats a memory chooses its chapters by what stands before the first answer: in training, in scores and in text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adapters.base import GenerateOptions
from adapters.memory import openings
from data.chats.messages import Message
from data.chats.template import UNLEARNED, ChatTemplate
from data.rows import Batch
from data.tokenizers import ByteTokenizer
from models.memory.router import Pooling
from tests.contract.tiny import adapter_of, batch_of, context, move_away_from_uniform
from tests.models.memory.test_on_a_base import reading, routed
from tests.pretrained import base_of

pytestmark = pytest.mark.xdist_group("transformers")

QUESTIONS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
ANSWERS = [[8, 9, 7], [9, 3, 2], [3, 8]]
CHATS = list(zip(QUESTIONS, ANSWERS, strict=True))
GREEDY = GenerateOptions(max_new_tokens=6, temperature=0.0, stop_at_document_end=False)


def adapter_with(kind, *more):
    """One that decides once for a text, by its own words of 3 tokens or by the opening of a chat."""
    if kind == "memory_adapter":
        return reading(base_of("gpt2"), *routed("sequence"), *more, dtype=torch.float64)
    words = ("use_chapters=true", "num_chapters=4", "top_k_chapters=1", "routing_window_size=3")
    words = [f"model_cfg.{word}" for word in words]
    found = adapter_of("memory", *words, *more, dtype=torch.float64).eval()
    move_away_from_uniform(found)
    return found


every_kind = pytest.mark.parametrize("kind", ["memory", "memory_adapter"])


def packed(adapter, chats, padding=0) -> Batch:
    """Chats as (question, answer) in one row, with single start tokens behind them."""
    eot, tokens, ids, weights = adapter.tokenizer.eot, [], [], []
    for number, (question, answer) in enumerate(chats):
        tokens += [eot, *question, *answer]
        ids += [number] * (1 + len(question) + len(answer))
        weights += [0] * len(question) + [1] * len(answer) + [0]
    tokens += [eot] * padding
    ids += range(len(chats), len(chats) + padding)
    weights += [0] * padding
    batch = replace(batch_of(torch.tensor([tokens]).numpy()), chats=True)
    batch.doc_ids[0], batch.weights[0] = ids, weights[: batch.weights.shape[1]]
    return batch


def hidden(adapter, batch):
    return adapter.hidden(adapter.prepare(batch, context(1)))


def test_openings_by_hand():
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2, 3]])
    weights = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0, 0]])
    assert openings(ids, weights).tolist() == [[3] * 4 + [1] * 2 + [11] * 4], "without an answer all is given"


def test_what_is_pooled_is_the_opening():
    x = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, decided = Pooling("sequence", 3, openings=torch.tensor([[2], [5]]))(x, 0, None)
    assert decided.nonzero().tolist() == [[0, 2], [1, 5]]
    for row, size in enumerate((2, 5)):
        assert not z[row, :size].any()
        torch.testing.assert_close(z[row, size:], x[row, :size].mean(0).expand(7 - size, 3))


@every_kind
@pytest.mark.parametrize("sizes", [[1, 3, 2, 4], [10]], ids=str)
def test_text_of_a_chat_is_routed_as_in_its_packed_row(kind, sizes):
    """Chosen chapters and states, of prompts of unequal lengths that are read together and in pieces."""
    adapter = adapter_with(kind)
    whole = hidden(adapter, packed(adapter, CHATS, padding=2))
    cache, eot, seen = adapter.model.init_cache(3), adapter.tokenizer.eot, []
    texts = [[eot, *q, *a, *[0] * 9][:10] for q, a in CHATS]
    told = torch.tensor([[1 + len(question)] for question in QUESTIONS])
    for piece in torch.tensor(texts).split(sizes, 1):
        here = cache.snapshot()
        adapter.next_hidden((piece + 1) % 60, cache, openings=told)
        cache.restore(here)
        seen.append(adapter.next_hidden(piece, cache, openings=told))
    chosen = torch.cat([part.extra["chosen"] for part in seen], 2)  # (R, B, T, K)
    states = torch.cat([part.states for part in seen], 1)
    first = 0
    for row, (question, answer) in enumerate(CHATS):
        size = min(10, 1 + len(question) + len(answer))
        there = slice(first, first + size)
        assert torch.equal(whole.extra["chosen"][:, 0, there], chosen[:, row, :size])
        torch.testing.assert_close(whole.states[0, there], states[row, :size], rtol=1e-8, atol=1e-8)
        decided = whole.extra["decided"][0, 0, first : first + 1 + len(question) + len(answer)]
        assert decided.nonzero().tolist() == [[1 + len(question)]]
        first += 1 + len(question) + len(answer)
    apart = hidden(adapter, replace(packed(adapter, CHATS, 2), chats=False))
    assert not torch.allclose(apart.states, whole.states), "text is pooled otherwise"


@every_kind
def test_answers_are_those_of_the_rows_that_are_trained_on(kind):
    """Greedy ones, together and alone, with and without a cache; as plain text they would be others."""
    adapter = adapter_with(kind)
    asked = replace(GREEDY, openings=tuple(map(len, QUESTIONS)))
    found = adapter.generate(QUESTIONS, asked).tokens
    assert found == adapter.generate(QUESTIONS, replace(asked, use_cache=False)).tokens
    for question, answer in zip(QUESTIONS, found, strict=True):
        one = replace(asked, openings=(len(question),))
        assert adapter.generate([question], one).tokens == [answer]
        states = hidden(adapter, packed(adapter, [(question, answer)])).states[0, len(question) :]
        logits = adapter.model.logits(states)[:, : adapter.tokenizer.vocab_size]
        assert logits.argmax(-1).tolist() == answer
    assert found != adapter.generate(QUESTIONS, GREEDY).tokens


@every_kind
def test_a_second_question_is_behind_the_opening(kind):
    """A chat of two answers is read by what stands before its first one."""
    adapter = adapter_with(kind)
    (question, answer), second = (QUESTIONS[1], ANSWERS[1]), [7, 7]
    asked = replace(GREEDY, openings=(len(question),))
    prompt = [*question, *answer, *second]
    (found,) = adapter.generate([prompt], asked).tokens
    row = packed(adapter, [(question, [*answer, *second, *found])])
    row.weights[0, len(question) + len(answer) :][: len(second)] = 0
    logits = adapter.model.logits(hidden(adapter, row).states[0, len(prompt) :])
    assert logits[:, : adapter.tokenizer.vocab_size].argmax(-1).tolist() == found


@every_kind
def test_a_window_that_starts_anew_takes_what_it_has_as_its_opening(kind):
    adapter = adapter_with(kind, "model_cfg.n_ctx=10", "train_seq_len=10")
    asked = replace(GREEDY, max_new_tokens=12, openings=(3, 7, 12))
    prompts = [*QUESTIONS[:2], [2] * 12]
    found = adapter.generate(prompts, asked).tokens
    assert found == adapter.generate(prompts, replace(asked, use_cache=False)).tokens
    for prompt, answer in zip(prompts, found, strict=True):
        assert adapter.generate([prompt], replace(asked, openings=(len(prompt),))).tokens == [answer]
    text = [adapter.tokenizer.eot, *prompts[2], *found[2]]
    window = torch.tensor([text[13 - 5 : 13]])  # the first one of a prompt that is longer
    logits = adapter.next_hidden(window, None, openings=torch.tensor([[5]])).states[:, -1]
    assert int(adapter.model.logits(logits)[0, : adapter.tokenizer.vocab_size].argmax()) == text[13]


def test_openings_that_are_none_of_the_prompts_are_refused():
    adapter = adapter_with("memory")
    with pytest.raises(ValueError, match="openings: one for each of 3 prompts, got 2"):
        adapter.generate(QUESTIONS, replace(GREEDY, openings=(1, 2)))
    with pytest.raises(ValueError, match="openings: prompt 2 has 1 tokens, got 2"):
        adapter.generate(QUESTIONS, replace(GREEDY, openings=(1, 2, 2)))


def test_an_opening_ends_where_training_learns_first():
    template = ChatTemplate(ByteTokenizer())
    chat = [
        Message("system", "Be kind."),
        Message("user", "Who?"),
        Message("assistant", "I."),
        Message("user", "Why?"),
    ]
    learned = template.encode(chat).answers != UNLEARNED
    assert template.opening(chat) == int(learned.argmax()) > 0
    assert template.opening(chat[:2]) == len(template.prompt(chat[:2])) == template.opening(chat)
