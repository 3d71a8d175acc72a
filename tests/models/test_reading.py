"""How recurrent depth reads text: exits, shared entries and carried states, through any cache and without one."""

import functools

import pytest
import torch

from models.layers.exits import CRITERIA
from models.rd import RD, RDConfig
from models.reading import ReadingConfig
from tests.models.reference_rd import read
from tests.models.tiny import SIZES, VOCABULARY, build, tokens_of

LENGTH, DEPTH = 6, 4
LATENT = {
    "latent-diff": {"exit_criterion": "latent-diff", "exit_threshold": 1.0},
    "cosine": {"exit_criterion": "cosine", "exit_threshold": 0.5},
}
OF_LAWS = {
    "kl": {"exit_criterion": "kl", "exit_threshold": 0.05},
    "minp-kl": {"exit_criterion": "minp-kl", "exit_threshold": 0.05},
    "entropy-diff": {"exit_criterion": "entropy-diff", "exit_threshold": 0.05},
    "argmax-stability": {"exit_criterion": "argmax-stability", "exit_threshold": 2},
}
EXITS = LATENT | OF_LAWS
OPTIONS = {
    "states": LATENT["latent-diff"],
    "laws": OF_LAWS["kl"],
    "budget": {"kv_budget": 2},
    "carried": {"continuous_compute": True},
    "budget and states": {**LATENT["cosine"], "kv_budget": 2},
    "all": {**OF_LAWS["argmax-stability"], "kv_budget": 3, "continuous_compute": True},
}


def every(names, quick):
    """Over names, of which the `quick` ones stand for the others in the fast tier."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in names}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


every_option = every(OPTIONS, {"states", "all"})
every_exit = every(EXITS, {"latent-diff", "kl"})


@functools.cache
def with_fields(fields):
    return build("rd", std=0.5, **{"n_layers": 4, "mean_recurrence": DEPTH, **dict(fields)})


def made(**fields):
    """Blocks 1, 2 and 1 of the parts."""
    return with_fields(tuple(fields.items()))


@torch.no_grad()
def logits_of(model, tokens, doc_ids=None, cache=None):
    return model.logits(model(tokens, doc_ids=doc_ids, cache=cache).states)


@torch.no_grad()
def depths_of(model, tokens):
    return model(tokens).extra["recurrences"]


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@every_exit
def test_tokens_leave_at_unequal_depths(name):
    """Else the tests below show nothing."""
    depths = depths_of(made(**EXITS[name]), tokens_of(rows=3, length=LENGTH))
    assert len(depths.unique()) >= 3 and 0.1 < (depths == DEPTH).double().mean() < 0.9
    assert any(len(at.unique()) > 1 for at in depths.T), "also those of one place"


# -- text and scores are of one model ----------------------------------------------------------------------------------


@functools.cache
def whole(name):
    """Logits of all tokens given at once, without a cache."""
    return logits_of(made(**OPTIONS[name]), tokens_of(rows=3, length=LENGTH))


@every_option
def test_single_tokens_through_the_cache_equal_the_whole(name):
    model, cache = made(**OPTIONS[name]), made(**OPTIONS[name]).init_cache(3)
    pieces = tokens_of(rows=3, length=LENGTH).split(1, 1)
    close(torch.cat([logits_of(model, piece, cache=cache) for piece in pieces], 1), whole(name))


@every_option
def test_longer_pieces_too_where_drafts_were_tried_and_taken_back(name):
    model, tokens = made(**OPTIONS[name]), tokens_of(rows=3, length=LENGTH)
    cache, found = model.init_cache(3), []
    for piece in tokens.split([2, 3, 1], 1):
        here = cache.snapshot()
        logits_of(model, (piece + 1) % VOCABULARY, cache=cache)
        cache.restore(here)
        found.append(logits_of(model, piece, cache=cache))
    close(torch.cat(found, 1), whole(name))
    cache.truncate(1)
    close(logits_of(model, tokens[:, 1:2], cache=cache), whole(name)[:, 1:2])
    assert cache.length == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", EXITS | OPTIONS)
@pytest.mark.parametrize("sizes", [[7] + [1] * 5, [11, 1], [5, 2, 1, 2, 2]], ids=str)
def test_pieces_of_any_size_equal_the_whole(name, sizes):
    model, tokens = made(**(EXITS | OPTIONS)[name]), tokens_of(rows=3, length=12)
    cache = model.init_cache(3)
    pieces = [logits_of(model, piece, cache=cache) for piece in tokens.split(sizes, 1)]
    close(torch.cat(pieces, 1), logits_of(model, tokens))


@every_option
def test_rows_alone_are_as_together_and_those_selected_go_on(name):
    model, tokens = made(**OPTIONS[name]), tokens_of(rows=3, length=LENGTH)
    kept, cache = torch.tensor([2, 0]), model.init_cache(3)
    close(logits_of(model, tokens[:1]), whole(name)[:1])
    logits_of(model, tokens[:, :4], cache=cache)
    cache.select(kept)
    close(logits_of(model, tokens[kept, 4:], cache=cache), whole(name)[kept, 4:])


@every_option
def test_a_token_changes_nothing_before_it(name):
    changed = tokens_of(rows=3, length=LENGTH)
    changed[:, 3] = (changed[:, 3] + 1) % VOCABULARY
    after = logits_of(made(**OPTIONS[name]), changed)
    close(after[:, :3], whole(name)[:, :3])
    assert (after - whole(name))[:, 3:].abs().amax() > 1e-3


@every_option
def test_packed_documents_are_as_alone(name, monkeypatch):
    """Where the noise of a place in the window is that of any other."""
    model, tokens = made(**OPTIONS[name]), tokens_of(rows=2, length=LENGTH)
    start = RD.start
    monkeypatch.setattr(
        RD, "start", lambda self, like, past, seeds: start(self, like[:, :1], 0, seeds).expand_as(like)
    )
    doc_ids = torch.zeros(2, LENGTH, dtype=torch.int32)
    doc_ids[0, 2:], doc_ids[0, 4:], doc_ids[1, 3:] = 1, 2, 1
    packed = logits_of(model, tokens, doc_ids)
    for row, begin, end in [(0, 2, 4), (0, 4, 6), (1, 3, 6)]:
        alone = logits_of(model, tokens[row : row + 1, begin:end])
        close(packed[row : row + 1, begin:end], alone)
    assert (packed - logits_of(model, tokens))[0, 2:].abs().amax() > 1e-3


@every(EXITS | OPTIONS, {"cosine", "kl", "all"})
@torch.no_grad()
def test_what_is_read_is_what_the_equations_say(name):
    fields = (EXITS | OPTIONS)[name]
    model, tokens, row = made(**fields), tokens_of(rows=3, length=LENGTH), 1
    start = model.start(torch.zeros(1, LENGTH, SIZES["d_model"], dtype=torch.float64), 0, None)
    expected, depths = read(
        dict(model.named_parameters()),
        tokens[row].tolist(),
        list(start[0]),
        model.cfg,
        model.cfg.parts,
        DEPTH,
        vocabulary=VOCABULARY,
        criterion=fields.get("exit_criterion"),
        threshold=fields.get("exit_threshold"),
        budget=fields.get("kv_budget"),
        carry=fields.get("continuous_compute", False),
    )
    found = model(tokens)
    close(model.logits(found.states)[row], expected)
    if "exit_criterion" in fields:
        assert found.extra["recurrences"][row].tolist() == depths and len(set(depths)) > 1


# -- and that of fixed depth in the limit ------------------------------------------------------------------------------


@every(sorted(set(CRITERIA) - {"argmax-stability"}), {"cosine"})
def test_a_threshold_of_zero_is_fixed_depth(name):
    tokens = tokens_of(rows=2, length=LENGTH)
    fixed = logits_of(made(), tokens)
    assert torch.equal(logits_of(made(exit_criterion=name, exit_threshold=0.0), tokens), fixed)
    close(logits_of(made(exit_criterion=name, exit_threshold=1e-300), tokens), fixed)


def test_no_recurrence_shares_entries_where_there_are_enough():
    tokens = tokens_of(rows=2, length=LENGTH)
    fixed, cached = made(), made(kv_budget=DEPTH)
    assert torch.equal(logits_of(cached, tokens), logits_of(fixed, tokens))
    caches = fixed.init_cache(2), cached.init_cache(2)
    for piece in tokens.split([4, 1, 1], 1):
        one, other = (logits_of(m, piece, cache=c) for m, c in zip((fixed, cached), caches, strict=True))
        assert torch.equal(one, other)
    assert (logits_of(made(kv_budget=DEPTH - 1), tokens) - logits_of(fixed, tokens)).abs().amax() > 1e-3


@every_option
def test_training_heeds_none_of_it(name):
    tokens, seeds = tokens_of(rows=2, length=LENGTH), torch.tensor([5, 6])
    found, expected = (
        m(tokens, recurrences=3, retained=2, seeds=seeds).states.square().sum()
        for m in (made(**OPTIONS[name]), made())
    )
    assert torch.equal(found, expected) and found.requires_grad


# -- nothing is computed that is not needed ----------------------------------------------------------------------------


def counted(request, module):
    """Shapes (rows, tokens) of what it is called with, from now on."""
    calls = []
    request.addfinalizer(
        module.register_forward_pre_hook(lambda _, given: calls.append(tuple(given[0].shape[:2]))).remove
    )
    return calls


@every_exit
def test_a_tokens_last_recurrence_is_its_rows_last(name, request):
    """In text, one token of each row at a time: as many recurrences as the row that needs most, each of the rows that
    still need it; prelude once; the coda where its law is asked for, and never once more."""
    model, tokens = made(**EXITS[name]), tokens_of(rows=3, length=LENGTH)
    depths = depths_of(model, tokens)  # (B, T)
    prelude, core, coda = (counted(request, part[0]) for part in (model.prelude, model.core, model.coda))
    cache = model.init_cache(3)
    for t in range(LENGTH):
        for calls in (prelude, core, coda):
            calls.clear()
        logits_of(model, tokens[:, t : t + 1], cache=cache)
        needed = [int((depths[:, t] > i).sum()) for i in range(int(depths[:, t].max()))]
        assert core == [(rows, 1) for rows in needed]
        assert prelude == [(3, 1)] and coda == (core if name in OF_LAWS else [(3, 1)])


def test_rows_that_are_done_leave_a_long_piece_too(request):
    model, tokens = made(**LATENT["cosine"]), tokens_of(rows=9, length=2)
    depths = depths_of(model, tokens).amax(1)
    core = counted(request, model.core[0])
    depths_of(model, tokens)
    assert core == [(int((depths > i).sum()), 2) for i in range(int(depths.max()))]
    assert len({rows for rows, _ in core}) > 1


@pytest.mark.parametrize("budget", [1, 2, 4])
def test_a_budget_bounds_the_cache_whatever_the_depth(budget):
    """l_p + l_c + m l_core layers of keys and values."""
    for depth in (4, 9):
        model = made(l_p=2, l_core=3, l_c=1, n_layers=None, mean_recurrence=depth, kv_budget=budget)
        cache = model.init_cache(2)
        logits_of(model, tokens_of(rows=2, length=2), cache=cache)
        layer = 2 * 2 * 2 * SIZES["d_model"]  # keys and values, rows, tokens, width
        assert sum(stored.numel() for stored in cache._stored) == (2 + 1 + 3 * budget) * layer


def test_scores_keep_the_entries_of_one_recurrence(monkeypatch):
    """Of tokens that go through them together no other is needed."""
    caches, init_cache = [], RD.init_cache
    monkeypatch.setattr(RD, "init_cache", lambda *given: caches.append(init_cache(*given)) or caches[-1])
    logits_of(made(**LATENT["cosine"]), tokens_of())
    assert [cache.slots for cache in caches] == [[1] * 4]


# -- what may be asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"exit_threshold": "exit_criterion=none"}),
        ({"exit_criterion": "cosine"}, {}),
        ({"exit_criterion": "kl"}, {"draft_recurrence": "exit_criterion=kl"}),
        ({"exit_criterion": "cosine", "kv_budget": 2}, {"draft_recurrence": "kv_budget=2"}),
        ({"exit_criterion": "cosine", "kv_budget": 32}, {"kv_budget": "a depth of 32 recurrences"}),
        ({"exit_criterion": "kl", "exit_threshold": 0.0}, {}),
    ],
)
def test_fields_that_mean_nothing_beside_others(fields, expected):
    assert RDConfig(**fields).unread() == expected


@pytest.mark.parametrize(("threshold", "nearest"), [(0.001, 1), (4.6, 5), (0.0, 1)])
def test_a_number_of_recurrences_is_a_whole_one(threshold, nearest):
    cfg = RDConfig(exit_criterion="argmax-stability", exit_threshold=threshold)
    (problem,) = ReadingConfig.problems(cfg, None)
    assert problem.endswith(f"a whole one, at least 1. Nearest: {nearest}") and f"({threshold:g})" in problem
    assert not ReadingConfig.problems(RDConfig(exit_criterion="argmax-stability", exit_threshold=3.0), None)
    assert not ReadingConfig.problems(RDConfig(exit_criterion="kl", exit_threshold=threshold), None)


def test_exits_by_states_need_no_room_for_laws(monkeypatch):
    """Of all tokens of a batch these are larger than the model."""
    sizes, new_zeros = [], torch.Tensor.new_zeros
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda self, *size, **k: sizes.append(size) or new_zeros(self, *size, **k)
    )
    logits_of(made(**LATENT["cosine"]), tokens_of())
    assert not any(VOCABULARY in size for size in sizes)
    logits_of(made(**OF_LAWS["kl"]), tokens_of(length=2))
    assert (2, 1, VOCABULARY) in sizes
