"""Which chapters a token reads, by what it may know; and that they are read as all of a masked bank would be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.memory import attention
from models.memory.attention import chapter_attention
from models.memory.router import Pooling, auxiliary, balance, best, squared_normaliser
from tests.models.memory.reference import memory_layer
from tests.models.memory.test_memory import (
    CHAPTERS,
    LENGTH,
    PACKED,
    ROWS,
    added_by,
    every_strategy,
    model_of,
    states,
)
from tests.models.tiny import build, tokens_of


def routed(strategy, **fields):
    return model_of(
        **{**CHAPTERS, "routing_strategy_inference": strategy, "routing_strategy_train": strategy, **fields}
    )


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_alike(out, expected, given):
    """Values, and the gradients of what they were made from."""
    torch.testing.assert_close(out, expected)
    weight = drawn(*out.shape, seed=6)
    mine, theirs = (torch.autograd.grad((made * weight).sum(), given) for made in (out, expected))
    torch.testing.assert_close(mine, theirs)


# -- reading chapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [2**22, 20], ids=["whole", "in pieces"])
@pytest.mark.parametrize("factors", [False, True], ids=["", "factors"])
def test_chapters_are_read_as_through_a_mask(factors, scores, monkeypatch):
    """Values, and gradients of everything; also of chapters that no token chose, which are 0."""
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v = drawn(2, 5, 4, 3), drawn(6, 2, 2, 3, seed=1), drawn(6, 2, 2, 3, seed=2)
    logits = drawn(2, 5, 6, seed=3)
    logits[..., 4] = -9  # nobody's
    chapters, bias = logits.argsort(-1)[..., 3:], drawn(2, 5, 3, seed=4)
    factor = drawn(2, 5, 3, seed=5).exp() if factors else None
    given = [t.requires_grad_() for t in (q, k, v, bias, *([] if factor is None else [factor]))]

    def masked():
        added = torch.full((2, 5, 6), -torch.inf, dtype=q.dtype).scatter(2, chapters, bias)
        scale = torch.ones(2, 5, 6, dtype=q.dtype)
        scale = scale if factor is None else scale.scatter(2, chapters, factor)
        keys, values = (t.repeat_interleave(2, 2) for t in (k, v))  # (C, P, H, e)
        weights = torch.einsum("bthe,cphe->bthcp", q, keys) / math.sqrt(3) * scale[:, :, None, :, None]
        weights = (weights + added[:, :, None, :, None]).flatten(3).softmax(-1).unflatten(3, (6, 2))
        return torch.einsum("bthcp,cphe->bthe", weights * scale[:, :, None, :, None], values)

    out, expected = chapter_attention(q, k, v, chapters, bias, factor), masked()
    assert_alike(out, expected, given)


@pytest.mark.parametrize("scores", [2**22, 20], ids=["whole", "in pieces"])
def test_dropout_is_of_the_probabilities_of_all_tokens_of_the_chapters(scores, monkeypatch):
    """Values and gradients, of the same factors: found of values that are one-hot, which leave the probabilities."""
    monkeypatch.setattr(attention, "SCORES", scores)
    q, k, v, bias = drawn(2, 40, 4, 3), drawn(6, 2, 2, 3, seed=1), drawn(6, 2, 2, 3, seed=2), drawn(2, 40, 3)
    chapters = drawn(2, 40, 6, seed=3).argsort(-1)[..., 3:]
    given = [t.requires_grad_() for t in (q, k, v, bias)]

    def softmax():
        added = torch.full((2, 40, 6), -torch.inf, dtype=q.dtype).scatter(2, chapters, bias)
        weights = torch.einsum("bthe,cphe->bthcp", q, k.repeat_interleave(2, 2)) / math.sqrt(3)
        return (weights + added[:, :, None, :, None]).flatten(3).softmax(-1)  # (B, T, H, C P)

    one_hot = torch.eye(12, dtype=q.dtype).view(6, 2, 1, 12).expand(6, 2, 2, 12)
    wide = [torch.nn.functional.pad(t, (0, 9)) * 2 for t in (q, k)]  # as wide, of the same scores
    torch.manual_seed(4)
    left = chapter_attention(wide[0], wide[1] / 2, one_hot, chapters, bias, dropout=0.25).detach()
    factors = torch.where(softmax() > 0, left / softmax(), 0.0).detach()
    read = factors[softmax() > 0]
    assert ((read == 0) | ((read - 4 / 3).abs() < 1e-9)).all()
    assert abs((read == 0).double().mean() - 0.25) < 0.04  # of 1920: three deviations
    torch.manual_seed(4)
    out = chapter_attention(q, k, v, chapters, bias, dropout=0.25)
    values = v.repeat_interleave(2, 2).flatten(0, 1)  # (C P, H, e)
    expected = torch.einsum("bthn,nhe->bthe", softmax() * factors, values)
    assert_alike(out, expected, given)


def test_dropout_reaches_probabilities_in_training_alone(monkeypatch):
    found = []

    def chapter_attention(*args):
        found.append(args[-1])
        return attention_of_chapters(*args)

    attention_of_chapters = attention.chapter_attention
    monkeypatch.setattr(attention, "chapter_attention", chapter_attention)
    model = routed("token", dropout=0.25)
    for training in (True, False):
        model.train(training)
        states(model, tokens_of(ROWS, LENGTH))
    layers = len(model.memories)
    assert found == [0.25] * layers + [0.0] * layers


@pytest.mark.parametrize("weighting", ["none", "log_bias", "scale_memory"])
def test_all_chapters_are_all_of_the_memory(weighting):
    """Whatever the router says without weights; with them where it says nothing."""
    model = routed("token", top_k_chapters=4, chapter_weighting=weighting)
    plain = model_of()
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens = tokens_of(ROWS, LENGTH)
    same = torch.allclose(states(model, tokens), states(plain, tokens), rtol=1e-9)
    assert same == (weighting == "none")
    with torch.no_grad():
        for layer in model.memories:
            layer.router.weight.zero_(), layer.router.bias.zero_()
    same = torch.allclose(states(model, tokens), states(plain, tokens), rtol=1e-9)
    assert same == (weighting != "scale_memory")


def test_rows_of_other_chapters_change_nothing_and_do_not_move():
    model = routed("token", memory_layer_placement="first_k", memory_layer_k=1)
    with torch.no_grad():
        model.memories[0].router.bias.copy_(torch.tensor([0.0, 100.0, 0.0, 100.0]))
    tokens, bank = tokens_of(ROWS, LENGTH), model.banks[0].weight
    before = states(model, tokens)
    optimizer = torch.optim.AdamW([bank], 0.1, weight_decay=0.0)  # as the role of a bank is stepped
    was = bank.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        states(model, tokens).square().sum().backward()
        optimizer.step()
    moved = (bank != was).any(1).view(4, 2).all(1)
    assert moved.tolist() == [False, True, False, True]
    with torch.no_grad():
        bank.copy_(was)
        bank[:2] += 1.0
    assert torch.equal(states(model, tokens), before)


def test_of_equal_logits_the_first_are_chosen():
    assert best(torch.zeros(1, 2000), 3).tolist() == [[0, 1, 2]]
    assert best(torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [1, 3, 2]
    model = build(
        "memory", std=None, num_memory_tokens=8, **CHAPTERS
    )  # biases 0: nothing is known of the text
    assert (model(tokens_of(1, 3)).extra["chosen"] == torch.tensor([0, 1])).all()


def test_one_chapter_teaches_its_router():
    """Its weight is 1 whatever the router says; the gradient is that of the probability."""
    model = routed("token", top_k_chapters=1)
    tokens = tokens_of(ROWS, LENGTH)
    states(model, tokens).square().sum().backward()
    assert all(layer.router.weight.grad.any() for layer in model.memories)
    model = routed("token", top_k_chapters=4, chapter_weighting="none")
    states(model, tokens).square().sum().backward()
    assert all(layer.router.weight.grad.abs().max() < 1e-9 for layer in model.memories)


# -- what decisions know ----------------------------------------------------------------------------------------------


@every_strategy
def test_no_decision_looks_ahead(strategy):
    model, tokens = routed(strategy), tokens_of(ROWS, LENGTH)
    before = states(model, tokens)
    for place in range(1, LENGTH):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 11
        after = states(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


def test_lookahead_does_and_says_so():
    model, tokens = routed("sequence", routing_causality="lookahead"), tokens_of(ROWS, LENGTH)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    assert not torch.allclose(states(model, tokens)[:, :-1], states(model, changed)[:, :-1])
    assert model.non_causal_routing and model.init_cache(2) is None
    assert not routed("token", routing_causality="lookahead").non_causal_routing
    assert not routed("sequence").non_causal_routing


def test_lookahead_pools_what_is_text():
    x = drawn(2, 6, 3)
    first = torch.tensor([[0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    z, decided = Pooling("sequence", 4, lookahead=True, first=first, valid=valid)(x, 0, None)
    torch.testing.assert_close(z[0, 1], x[0, :3].mean(0))
    torch.testing.assert_close(z[0, 5], x[0, 3:].mean(0))
    torch.testing.assert_close(z[1, 0], x[1, :4].mean(0))
    assert decided.nonzero().tolist() == [[0, 0], [0, 3], [1, 0]]


@every_strategy
@pytest.mark.parametrize("sizes", [[1] * LENGTH, [2, 1, 4, 2], [5, 4]], ids=str)
def test_text_through_the_cache_pools_as_the_whole(strategy, sizes):
    """Also where tokens were tried and taken back, and rows dropped."""
    model, tokens = routed(strategy), tokens_of(3, LENGTH)
    whole, cache, found = states(model, tokens), model.init_cache(3), []
    for piece in tokens.split(sizes, 1):
        here = cache.snapshot()
        states(model, (piece + 1) % 11, cache=cache)
        cache.restore(here)
        found.append(states(model, piece, cache=cache))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-9)
    more = tokens_of(3, 2, seed=5)
    longer = states(model, torch.cat((tokens, more), 1))[:, LENGTH:]
    kept = torch.tensor([2, 0])
    cache.select(kept)
    torch.testing.assert_close(states(model, more[kept], cache=cache), longer[kept], rtol=1e-9, atol=1e-9)
    with (
        pytest.raises(ValueError, match="restore a snapshot")
        if cache.pooled
        else pytest.raises(StopIteration)
    ):
        cache.truncate(3)
        raise StopIteration


@every_strategy
def test_packed_documents_are_read_as_alone(strategy):
    model, tokens = routed(strategy), tokens_of(ROWS, LENGTH)
    packed = states(model, tokens, doc_ids=PACKED)
    torch.testing.assert_close(packed[0, 5:], states(model, tokens[:1, 5:])[0])
    torch.testing.assert_close(packed[1, 2:7], states(model, tokens[1:, 2:7])[0])


def test_a_window_of_one_is_the_token():
    tokens = tokens_of(ROWS, LENGTH)
    one, token = routed("rolling", routing_window_size=1), routed("token")
    assert torch.equal(states(one, tokens), states(token, tokens))


def test_training_decides_by_its_own_strategy():
    model = routed("sequence", routing_strategy_train="token")
    tokens = tokens_of(ROWS, LENGTH)
    x, added = added_by(model.train(), tokens)
    assert added.shape == memory_layer(model.memories[0], model.banks[0], x, model.cfg, None, "token").shape
    torch.testing.assert_close(
        added, memory_layer(model.memories[0], model.banks[0], x, model.cfg, None, "token")
    )
    assert not torch.allclose(added_by(model.eval(), tokens)[1], added)


def test_decisions_are_counted_once_for_a_document():
    """Those of 0 are no decisions."""
    model, tokens = routed("sequence"), tokens_of(ROWS, LENGTH)
    told = model(tokens, doc_ids=PACKED).extra
    assert told["decided"][0].nonzero().tolist() == [[0, 3], [0, 8], [1, 5]]
    assert told["load"].sum(1).tolist() == [3 * 2] * 2
    everywhere = routed("rolling")(tokens, doc_ids=PACKED).extra
    assert everywhere["decided"].all() and everywhere["load"].sum(1).tolist() == [ROWS * LENGTH * 2] * 2


# -- losses -----------------------------------------------------------------------------------------------------------


def test_losses_at_their_known_values():
    n, chapters = 12, 4
    alike = torch.zeros(n, chapters, dtype=torch.float64)
    one_each = 50.0 * torch.eye(chapters, dtype=torch.float64).repeat(n // chapters, 1)
    collapsed = 50.0 * torch.eye(chapters, dtype=torch.float64)[:1].repeat(n, 1)
    two = torch.tensor([[50.0, 50.0, 0.0, 0.0]], dtype=torch.float64).repeat(n, 1)

    def importance(logits):
        return logits.softmax(-1).sum(0)[None]

    def balance_of(logits, k):
        load = best(logits, k).flatten().bincount(minlength=chapters)[None]
        return balance(load, importance(logits))

    def z_of(logits):
        return squared_normaliser((logits.logsumexp(-1) ** 2).sum()[None], importance(logits))

    for logits, k, expected in ((alike, 2, 1.0), (one_each, 1, 1.0), (collapsed, 1, 4.0), (two, 2, 2.0)):
        assert float(balance_of(logits, k)) == pytest.approx(expected)
    assert float(auxiliary(importance(alike))) == 0
    assert float(auxiliary(importance(one_each))) == pytest.approx(0, abs=1e-12)
    assert float(auxiliary(importance(collapsed))) == pytest.approx(3.0)
    assert float(z_of(alike - math.log(chapters))) == pytest.approx(0, abs=1e-20)
    assert float(z_of(alike)) == pytest.approx(math.log(chapters) ** 2)
    nothing = torch.zeros(0, chapters, requires_grad=True)
    total = (balance_of(nothing, 1) + auxiliary(importance(nothing)) + z_of(nothing)).sum()
    assert float(total.detach()) == 0
    total.backward()


def test_layers_are_balanced_each_by_itself():
    """Two that collapse on disjoint chapters are unbalanced both; thrown together they would seem better."""
    model = routed("token")
    with torch.no_grad():
        for layer, kept in zip(model.memories, ([0, 1], [2, 3]), strict=True):
            layer.router.weight.zero_(), layer.router.bias.zero_()
            layer.router.bias[kept] = 50.0
    told = model.train()(tokens_of(ROWS, LENGTH)).extra
    assert balance(told["load"], told["importance"]).tolist() == pytest.approx([2.0, 2.0])
    together = balance(told["load"].sum(0)[None], told["importance"].sum(0)[None])
    assert float(together.detach()) == pytest.approx(1.0)
    torch.testing.assert_close(
        told["entropy"] / (ROWS * LENGTH), torch.full((2,), math.log(2), dtype=torch.float64)
    )


def test_scores_are_not_kept():
    """What a step keeps does not grow with the chapters that nobody reads, and no token has a copy of its keys."""
    q, k = drawn(1, 64, 2, 4).requires_grad_(), drawn(50, 20, 2, 4, seed=1).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        chapter_attention(q, k, k, torch.arange(64)[None, :, None] % 50, torch.zeros(1, 64, 1))
    assert max(kept) <= k.numel() < 64 * 2 * 50 * 20


def test_of_all_chapters_backward_keeps_logits_and_shares_alone():
    """Of a layer, whatever it tells: no order of all, and no further probabilities."""
    fields = {**CHAPTERS, "num_chapters": 64, "routing_strategy_train": "token", "num_memory_tokens": 64}
    model = build("memory", **fields)
    model.train()
    kept, every = {}, ROWS * LENGTH * 64

    def keep(t):
        if t.untyped_storage().nbytes() >= every * t.itemsize and t.shape[:2] == (ROWS, LENGTH):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    layer, x = model.memories[0], drawn(ROWS, LENGTH, model.cfg.d_model)
    reading = model.reading(tokens_of(ROWS, LENGTH), 0, None, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x, reading, None)
    assert len(kept) == 2


def test_places_of_a_pooling_follow_its_past():
    x = drawn(2, 7, 3)
    whole, _ = Pooling("rolling", 3)(x, 0, None)
    torch.testing.assert_close(whole[:, 4], x[:, 2:5].mean(1))
    later = replace(Pooling("rolling", 3), first=torch.tensor([[0, 0, 0, 3, 3, 3, 3]] * 2))(x, 0, None)[0]
    torch.testing.assert_close(later[:, 3], x[:, 3])
