"""Who may see what: causality, documents, rows, and the cache of both architectures."""

import pytest
import torch

from tests.models.tiny import VARIANT_NAMES, VARIANTS, VOCABULARY, build, tokens_of

LENGTH = 48
every_variant = pytest.mark.parametrize(("type_", "fields"), VARIANTS, ids=VARIANT_NAMES)


def logits_of(model, tokens, doc_ids=None, cache=None):
    with torch.no_grad():
        return model.logits(model(tokens, doc_ids=doc_ids, cache=cache))


@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_a_token_changes_nothing_before_it_and_something_from_it_on(type_, fields, seed):
    model, tokens = build(type_, torch.float32, seed=seed, **fields), tokens_of(length=LENGTH, seed=seed)
    at = 7 + 13 * seed
    changed = tokens.clone()
    changed[:, at] = (changed[:, at] + 1) % VOCABULARY
    before, after = logits_of(model, tokens), logits_of(model, changed)
    torch.testing.assert_close(after[:, :at], before[:, :at], rtol=0, atol=1e-6)
    assert (after - before)[:, at:].abs().amax() > 1e-3


@every_variant
def test_no_gradient_flows_back_from_earlier_logits(type_, fields):
    model, tokens = build(type_, **fields), tokens_of(rows=1, length=LENGTH)
    table = model.embedding_weight.detach()
    embedded = table[tokens].requires_grad_()
    model.get_submodule("wte" if type_ == "gpt2" else "embed_tokens").forward = lambda _: embedded
    hidden = model(tokens)
    (gradient,) = torch.autograd.grad(hidden[:, :20].square().sum(), embedded)
    assert gradient[:, 20:].abs().max() == 0
    assert gradient[:, :20].abs().amax(dim=-1).min() > 0


@every_variant
def test_packed_documents_equal_documents_alone(type_, fields):
    model, tokens = build(type_, **fields), tokens_of(rows=2, length=LENGTH)
    doc_ids = torch.zeros(2, LENGTH, dtype=torch.int32)
    doc_ids[0, 10:], doc_ids[0, 30:], doc_ids[1, 25:] = 1, 2, 1
    packed = logits_of(model, tokens, doc_ids)
    for row, start, end in [(0, 0, 10), (0, 10, 30), (0, 30, 48), (1, 0, 25), (1, 25, 48)]:
        alone = logits_of(model, tokens[row : row + 1, start:end])
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, rtol=0, atol=1e-9)


@every_variant
def test_a_row_does_not_see_other_rows(type_, fields):
    model, tokens = build(type_, torch.float32, **fields), tokens_of(rows=4, length=LENGTH)
    together = logits_of(model, tokens)
    for row in range(4):
        alone = logits_of(model, tokens[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@every_variant
@pytest.mark.parametrize("prefill", [1, 7, LENGTH - 1])
def test_cached_steps_equal_one_forward(type_, fields, prefill):
    model, tokens = build(type_, **fields), tokens_of(rows=3, length=LENGTH)
    cache = model.init_cache(3)
    steps = [logits_of(model, tokens[:, :prefill], cache=cache)]
    steps += [logits_of(model, tokens[:, t : t + 1], cache=cache) for t in range(prefill, LENGTH)]
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat(steps, 1), logits_of(model, tokens), rtol=0, atol=1e-9)


@every_variant
def test_cache_takes_chunks_and_forgets_on_truncate(type_, fields):
    model, tokens = build(type_, **fields), tokens_of(rows=2, length=LENGTH)
    cache = model.init_cache(2)
    logits_of(model, tokens[:, :20], cache=cache)
    logits_of(model, (tokens[:, 20:35] + 1) % VOCABULARY, cache=cache)  # drafts that are then rejected
    cache.truncate(20)
    rest = logits_of(model, tokens[:, 20:], cache=cache)
    torch.testing.assert_close(rest, logits_of(model, tokens)[:, 20:], rtol=0, atol=1e-9)


def test_cache_in_bf16_is_close():
    with torch.autocast("cpu", torch.bfloat16):
        model, tokens = build("vanilla", torch.float32, std=None), tokens_of(rows=2, length=LENGTH)
        cache = model.init_cache(2)
        steps = [logits_of(model, tokens[:, t : t + 1], cache=cache) for t in range(LENGTH)]
        assert steps[0].dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat(steps, 1), logits_of(model, tokens), rtol=0, atol=3e-2)


@every_variant
def test_cache_goes_on_with_the_rows_selected(type_, fields):
    model, tokens = build(type_, **fields), tokens_of(rows=4, length=LENGTH)
    cache = model.init_cache(4)
    logits_of(model, tokens[:, :20], cache=cache)
    kept = torch.tensor([3, 1])
    cache.select(kept)
    rest = logits_of(model, tokens[kept, 20:], cache=cache)
    torch.testing.assert_close(rest, logits_of(model, tokens[kept])[:, 20:], rtol=0, atol=1e-9)


def test_cache_stores_each_kv_head_once_and_grows_with_the_text():
    model = build("vanilla", n_kv_heads=2)
    cache = model.init_cache(3)
    shapes = []
    for tokens in (5, 3, 1):
        logits_of(model, tokens_of(rows=3, length=tokens), cache=cache)
        shapes.append({tuple(stored.shape) for stored in cache._layers})
    # of each layer: keys and values, rows, kv heads, tokens, width
    assert shapes == [{(2, 3, 2, 8, 4)}, {(2, 3, 2, 8, 4)}, {(2, 3, 2, 16, 4)}]


def test_cache_refuses_what_does_not_fit():
    model = build("vanilla")
    cache = model.init_cache(2)
    logits_of(model, tokens_of(length=4), cache=cache)
    with pytest.raises(ValueError, match="made for 2 rows, got 3"):
        logits_of(model, tokens_of(rows=3, length=1), cache=cache)
    with pytest.raises(ValueError, match="cannot truncate a cache of 4 tokens to 5"):
        cache.truncate(5)
    with pytest.raises(ValueError, match="doc_ids"):
        logits_of(model, tokens_of(length=1), doc_ids=torch.zeros(2, 1, dtype=torch.int32), cache=cache)


@pytest.mark.parametrize(("type_", "fields"), [("gpt2", {}), ("vanilla", {"use_rope": False})])
def test_learned_positions_refuse_longer_input(type_, fields):
    model = build(type_, n_ctx=8, **fields)
    assert model.max_context == 8
    with pytest.raises(ValueError, match=r"9 tokens exceeds n_ctx \(8\)"):
        model(tokens_of(length=9))
    cache = model.init_cache(2)
    logits_of(model, tokens_of(length=8), cache=cache)
    with pytest.raises(ValueError, match="n_ctx"):
        logits_of(model, tokens_of(length=1), cache=cache)


def test_rotary_positions_take_longer_input():
    model = build("vanilla", n_ctx=8)
    assert logits_of(model, tokens_of(length=20)).shape == (2, 20, VOCABULARY)


@every_variant
def test_padded_rows_of_the_vocabulary_never_count(type_, fields):
    model, tokens = build(type_, **fields), tokens_of()
    before = logits_of(model, tokens)
    with torch.no_grad():
        model.head_weight[VOCABULARY:] = 1e6
        model.embedding_weight[VOCABULARY:] = 1e6
    assert before.shape[-1] == VOCABULARY
    assert torch.equal(logits_of(model, tokens), before)
    expected_rows = VOCABULARY if fields.get("pad_vocab") is False else 128
    assert model.head_weight.shape[0] == expected_rows
