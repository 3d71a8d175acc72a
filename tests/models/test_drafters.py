"""What models draft with behind their caches is what they say of whole texts."""

import re

import pytest
import torch

from adapters.default import as_hidden
from models.layers.decoder import further
from models.rd import RD
from tests.models.tiny import VOCABULARY, build, tokens_of

MODELS = {
    "mtp": ("mtp", {"n_mtp_tokens": 4, "n_layers": 5}),
    "mtp-linear": ("mtp", {"n_mtp_tokens": 3, "n_layers": 4, "head_type": "linear"}),
    "mtp-causal": ("mtp", {"n_mtp_tokens": 3, "n_layers": 4, "head_topology": "causal"}),
    "mtp-anticausal": ("mtp", {"n_mtp_tokens": 3, "n_layers": 4, "head_topology": "anticausal"}),
    "mtm-1": ("mtm", {"n_mtp_modules": 1}),
    "mtm-3": ("mtm", {"n_mtp_modules": 3, "trunk_cfg": {"sliding_window": 4}}),
    "mtm-moe": ("mtm", {"n_mtp_modules": 2, "trunk": "moe"}),
    "mtm-gpt2": ("mtm", {"n_mtp_modules": 2, "trunk": "gpt2", "mtp_hidden": "pre_norm"}),
}
SMALL = {"n_layers": 4, "mean_recurrence": 4}
DEPTHS = {
    "three": {**SMALL, "draft_recurrence": 3},
    "exits": {**SMALL, "draft_recurrence": 2, "exit_criterion": "latent-diff", "exit_threshold": 1.0},
}
every_model = pytest.mark.parametrize("name", MODELS)
# (tokens read, tokens kept of them) in turn: prompts of any length, chunks, everything and nothing accepted.
ROUNDS = {
    "token by token": [(1, 1)] * 8,
    "a long prompt": [(11, 11), (4, 4), (4, 1), (4, 4)],
    "a short prompt": [(1, 1), (4, 3), (4, 1), (4, 4), (4, 4)],
    "chunks": [(7, 7), (1, 1), (5, 2), (2, 2), (1, 1), (5, 5)],
    "going back": [(6, 2), (5, 1), (5, 4), (4, 4)],
}


def of_whole_texts(model, texts, ats, depth):
    """Logits of the draft at a depth, by a forward pass without a cache over each row's text up to `at`; of recurrent
    depth, by one over all that is known, of as many recurrences as drafts take."""
    found = []
    for text, at in zip(texts, ats, strict=True):
        if isinstance(model, RD):
            hidden = model(text[None, : at + 1 + depth], recurrences=model.cfg.draft_depth)
            found.append(model.logits(hidden.states)[0, -1])
            continue
        ahead = [text[None, k : k + at + 1] for k in range(1, 1 + depth)]
        hidden = model(text[None, : at + 1], ahead=ahead)
        found.append(model.logits(hidden.extra[further(1 + depth)])[0, at])
    return torch.stack(found)


@every_model
@pytest.mark.parametrize("rounds", ROUNDS.values(), ids=ROUNDS)
def test_drafts_are_those_of_whole_texts(name, rounds):
    type_, fields = MODELS[name]
    model = build(type_, **fields)
    assert model.max_drafts == fields.get("n_mtp_modules", fields.get("n_mtp_tokens", 0) - 1)
    draft_in_rounds(model, model.max_drafts, rounds)


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize(
    "rounds",
    [[(3, 3), (4, 2), (3, 1)], pytest.param([(1, 1), (2, 1), (3, 3), (1, 1)], marks=pytest.mark.slow)],
    ids=str,
)
def test_drafts_are_those_of_whole_texts_read_less_deeply(name, rounds):
    model = build("rd", std=0.5, **DEPTHS[name])
    assert model.max_drafts == 4
    draft_in_rounds(model, 2, rounds)


@torch.no_grad()
def draft_in_rounds(model, drafts, rounds):
    """Whatever was drafted, read in vain and taken back before; rows' texts end at unequal places of what was read."""
    texts, source = tokens_of(rows=3, length=40), torch.Generator().manual_seed(2)
    drafter = model.init_drafter(3, drafts)
    for read, kept in rounds:
        start = drafter.length
        fed = texts[:, start : start + read].clone()
        others = torch.randint(VOCABULARY, (2, read - kept), generator=source)
        fed[:2, kept:] = others  # of the third row everything is accepted
        states = as_hidden(drafter.read(fed)).states
        whole = torch.cat((texts[:, :start], fed), 1)
        torch.testing.assert_close(
            model.logits(states), model.logits(as_hidden(model(whole)).states)[:, start:], rtol=0, atol=1e-9
        )
        at = torch.tensor([kept - 1, kept - 1, read - 1])  # the one behind it is the newest token known
        tokens = texts[:, start : start + read + drafts].clone()
        for depth in range(1, drafts + 1):
            there = torch.cat((texts[:, :start], tokens), 1)
            expected = of_whole_texts(model, there, (at + start).tolist(), depth)
            for row, end in enumerate(at + 1 + depth):
                tokens[row, end:] = row  # means nothing yet, and must change nothing
            said = drafter.draft(depth, tokens, at)
            torch.testing.assert_close(said, expected, rtol=0, atol=1e-9)
            drafted = torch.randint(VOCABULARY, (3,), generator=source)
            if depth < drafts:
                tokens[torch.arange(3), at + 1 + depth] = drafted
        drafter.forget(start + kept)
        assert drafter.length == start + kept


@every_model
@torch.no_grad()
def test_rows_selected_go_on(name):
    type_, fields = MODELS[name]
    model = build(type_, **fields)
    texts, kept = tokens_of(rows=4, length=20), torch.tensor([3, 1])
    drafter = model.init_drafter(4, model.max_drafts)
    last = torch.full((4,), 4)
    drafter.read(texts[:, :5])
    for depth in range(1, model.max_drafts + 1):
        drafter.draft(depth, texts[:, : 5 + model.max_drafts], last)
    drafter.forget(5)
    drafter.select(kept)
    drafter.read(texts[kept, 5:8])
    for depth in range(1, model.max_drafts + 1):
        said = drafter.draft(depth, texts[kept, 5 : 8 + model.max_drafts], last[:2] - 2)
        torch.testing.assert_close(said, of_whole_texts(model, texts[kept], [7, 7], depth), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "expected"), [("mtp", [0, 1]), ("mtm-3", [0])])
@torch.no_grad()
def test_fewer_drafts_run_fewer_heads_and_modules(name, expected):
    type_, fields = MODELS[name]
    model = build(type_, **fields)
    ran = []
    for i, part in enumerate(model.heads if type_ == "mtp" else model.mtp_modules):
        part.register_forward_hook(lambda *_, i=i: ran.append(i))
    texts = tokens_of(rows=2, length=8)
    drafter = model.init_drafter(2, 1)
    drafter.read(texts[:, :5])
    drafter.draft(1, texts[:, :6], torch.tensor([4, 4]))
    assert ran == expected


# -- by fewer recurrences ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_selected_draft_on_with_fewer_recurrences():
    model = build("rd", std=0.5, **DEPTHS["exits"])
    texts, kept = tokens_of(rows=4, length=20), torch.tensor([3, 1])
    drafter = model.init_drafter(4, 1)
    drafter.read(texts[:, :5])
    drafter.draft(1, texts[:, :6], torch.full((4,), 4))
    drafter.forget(5)
    drafter.select(kept)
    drafter.read(texts[kept, 5:8])
    said = drafter.draft(1, texts[kept, 5:9], torch.tensor([2, 2]))
    torch.testing.assert_close(said, of_whole_texts(model, texts[kept], [7, 7], 1), rtol=0, atol=1e-9)


@torch.no_grad()
def test_what_is_kept_is_not_written_again():
    """Not even as the same, and not by rows that are ahead: in no recurrence of any block, of text or of drafts."""
    model, texts = build("rd", std=0.5, **DEPTHS["exits"]), tokens_of(rows=2, length=20)
    drafter = model.init_drafter(2, 2)
    drafter.read(texts[:, :6])
    before = [stored[..., :4, :].clone() for stored in drafter.cache._stored]
    for depth in (1, 2):
        drafter.draft(depth, texts[:, :8], torch.tensor([3, 5]))
    drafter.forget(4)
    for then, stored in zip(before, drafter.cache._stored, strict=True):
        assert torch.equal(then, stored[..., :4, :])


@torch.no_grad()
def test_a_draft_of_one_row_is_one_token_at_the_depth_of_drafts():
    model, texts = build("rd", **SMALL), tokens_of(rows=1, length=20)
    drafter, calls = model.init_drafter(1, 3), []
    for part in (model.prelude, model.core, model.coda):
        part[0].register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[1]))
    drafter.read(texts[:, :5])
    assert calls == [5] * (1 + 4 + 1 + 1), "the coda twice: of the states that drafts are made of, too"
    for depth in (1, 2, 3):
        calls.clear()
        drafter.draft(depth, texts[:, :8], torch.tensor([4]))
        assert calls == [1] * (1 + 1 + 1)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"draft_recurrence": 4}, r"draft_recurrence, 4, would .* below model_cfg.eval_recurrence, 4"),
        ({"eval_recurrence": 1}, r"draft_recurrence, 1, would .* below model_cfg.eval_recurrence, 1"),
        (
            {"kv_budget": 2},
            "model_cfg.kv_budget=2 reads tokens one by one: drafts cannot be verified together",
        ),
        ({"continuous_compute": True}, "model_cfg.continuous_compute=true reads"),
        ({"exit_criterion": "kl"}, "model_cfg.exit_criterion=kl reads"),
        ({"exit_criterion": "cosine", "kv_budget": 4}, ""),
    ],
)
def test_where_fewer_recurrences_draft_nothing(fields, why):
    model = build("rd", **{**SMALL, **fields})
    assert model.max_drafts == (0 if why else 4)
    assert re.search(why or "^$", model.no_drafts)
