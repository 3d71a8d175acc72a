"""One depth per step for all, noise from row and place, and scores at several depths."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters.base import Context
from adapters.recurrent_depth import ALSO_AFTER
from tests.contract.tiny import adapter_of, batch_for, context, session_of, split
from trainer.batching import StepLoader, plan_batch
from trainer.evaluate import evaluate

STEPS = 6


def depths(adapter, rows, processes, micro_rows, steps=STEPS):
    """Of every micro-batch of every process, by step."""
    plan = plan_batch(4, micro_rows, None, processes, 32)
    loaders = [StepLoader(rows, adapter, plan, rank, seed=1337) for rank in range(processes)]
    return [
        {prepared.host["recurrences"] for loader in loaders for prepared in loader.load(step).micro}
        for step in range(steps)
    ]


def test_one_depth_per_step_whatever_the_process_and_the_micro_batch():
    """A function of seed and step: two processes of two micro-batches draw what one draws at once."""
    session = session_of("rd", "model_cfg.mean_recurrence=32")
    adapter, rows = session.adapter, session.rows
    alone = depths(adapter, rows, processes=1, micro_rows=4)
    assert depths(adapter, rows, processes=2, micro_rows=1) == alone
    assert all(len(of_step) == 1 for of_step in alone) and len(set.union(*alone)) > 3
    other_seed = [adapter.recurrences(Context(1, step, "train", 4)) for step in range(STEPS)]
    assert other_seed != [drawn for (drawn,) in alone]


def test_drawn_depths_follow_the_law():
    adapter = adapter_of("rd", "model_cfg.mean_recurrence=32", "model_cfg.r_max=60")
    drawn = np.array([adapter.recurrences(context(step=step)) for step in range(500)])
    law = adapter.model_cfg.depth_law
    assert drawn.min() >= 1 and drawn.max() == 60
    assert drawn.mean() == pytest.approx(law.expected(), abs=4 * drawn.std() / 500**0.5)


def test_steps_that_are_timed_or_probed_take_no_draw():
    words = ("model_cfg.mean_recurrence=32", "model_cfg.k_trunc=8")
    adapter, ctx = adapter_of("rd", *words), context(step=3)
    law = adapter.model_cfg.depth_law
    assert adapter.recurrences(replace(ctx, of_draws="mean")) == law.typical(8) == 33
    assert adapter.recurrences(replace(ctx, of_draws="most")) == 8
    short = adapter_of("rd", *words, "model_cfg.mean_recurrence=5", "model_cfg.r_max=5")
    assert short.recurrences(replace(ctx, of_draws="most")) == 5


def test_noise_in_training_is_that_of_the_row_and_the_step():
    adapter = adapter_of("rd")
    batch = batch_for(adapter)
    seeds = adapter.prepare(batch, context()).tensors["seeds"]
    assert len(seeds.unique()) == len(batch.rows)
    parts = [adapter.prepare(part, context()).tensors["seeds"] for part in split(batch, [1, 3])]
    assert torch.equal(torch.cat(parts), seeds)
    assert not torch.isin(adapter.prepare(batch, context(step=1)).tensors["seeds"], seeds).any()


def test_noise_in_evaluation_is_the_same_for_all_rows():
    """So that a row's score depends on no other, and on where it stands in the text on the disk neither."""
    adapter = adapter_of("rd", dtype=torch.float64).eval()
    batch = batch_for(adapter)
    batch.tokens[1] = batch.tokens[0]
    nats = adapter.likelihood(batch, context(phase="eval")).nats
    assert nats[0] == pytest.approx(float(nats[1]), rel=1e-12)
    for other in ({"seed": 1}, {"step": 7}):
        assert torch.equal(nats, adapter.likelihood(batch, replace(context(phase="eval"), **other)).nats)


def test_how_training_cuts_its_backward_does_not_reach_the_score():
    """Nor what a caller differentiates in evaluation, which goes through all iterations."""
    scores, gradients = [], []
    for k in (1, 8):
        adapter = adapter_of("rd", f"model_cfg.k_trunc={k}", "model_cfg.mean_recurrence=4").eval()
        batch = batch_for(adapter)
        scores.append(adapter.likelihood(batch, context(phase="eval")).nats)
        adapter.hidden(adapter.prepare(batch, context(phase="eval"))).states.square().sum().backward()
        gradients.append(adapter.model.adapter.weight.grad)
        assert adapter.prepare(batch, context()).host["retained"] == k
    assert torch.equal(*scores) and torch.equal(*gradients)


def test_the_command_scores_other_depths_beside_its_own():
    adapter = adapter_of("rd").eval()
    batch, ctx = batch_for(adapter), context(phase="eval")
    batch.weights[:, 7:] = 0
    plain, found = (adapter.likelihood(batch, replace(ctx, estimates=asked)) for asked in (False, True))
    assert torch.equal(plain.nats, found.nats) and not plain.estimates
    assert list(found.estimates)[:2] == ["at 1 recurrence", "at 4 recurrences"]
    for r, nats in zip(ALSO_AFTER, found.estimates.values(), strict=True):
        one = adapter_of("rd", f"model_cfg.eval_recurrence={r}").eval().likelihood(batch, ctx)
        assert torch.equal(nats, one.nats), r


def test_what_a_step_reports():
    """Its depth, the operations of that depth, and how far the last iteration moved; an evaluation no operations."""
    adapter = adapter_of("rd", "model_cfg.k_trunc=3")
    prepared = adapter.prepare(batch_for(adapter), context())
    costs = {}
    for r in (1, 3, 4, 8):
        prepared.host["recurrences"] = r
        output = adapter(prepared)
        assert output.metrics["recurrences"].sum == r
        costs[r] = output.flops
        assert output.flops == adapter.model.flops(32, r).training_per_token * 4 * 32
    assert costs[8] - costs[4] == pytest.approx(4 * (costs[4] - costs[3]), rel=1e-9)
    assert costs[3] - costs[1] == pytest.approx(2 * 3 * (costs[4] - costs[3]), rel=1e-9)
    metrics = adapter.eval().likelihood(batch_for(adapter), context(phase="eval")).metrics
    assert list(metrics) == ["recurrences", "state_change"]


def test_the_change_of_states_dies_away_and_padding_counts_in_none():
    session, found = session_of("rd", "val_tokens=96"), {}
    rows = session.heldout(None)
    for r in (1, 16):
        adapter = adapter_of(
            "rd", f"model_cfg.eval_recurrence={r}", vocabulary=session.dataset.tokenizer.vocab_size
        )
        scores = [evaluate(adapter, rows, session.world, batch_rows=n, seed=0).metrics for n in (1, 4)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
        found[r] = scores[0]["state_change"]
    assert 0 < found[16] < 0.2 * found[1]


def test_scores_and_text_begin_from_the_same_noise():
    adapter = adapter_of("rd", "model_cfg.eval_recurrence=1", dtype=torch.float64).eval()
    batch = batch_for(adapter)
    scored = adapter.hidden(adapter.prepare(batch, Context(99, 0, "eval", 4))).states
    tokens = torch.from_numpy(batch.tokens[:, : scored.shape[1]])
    assert torch.equal(adapter.next_hidden(tokens, None).states, scored)


def test_a_score_says_at_which_depth_it_stands():
    adapter = adapter_of("rd", "model_cfg.eval_recurrence=3").eval()
    told = adapter.likelihood(batch_for(adapter), context(phase="eval")).metrics["recurrences"]
    assert told.sum / told.count == 3
