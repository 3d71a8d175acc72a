from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapters.base import Prepared
from data.rows import TrainingRows
from trainer.batching import BatchPlan, StepLoader, plan_batch
from trainer.optim.stages import Stages


def test_derivations():
    assert plan_batch(48, 6, None, 2, 128) == BatchPlan(48, 6, 4, 2)
    assert plan_batch(48, None, 3, 2, 128) == BatchPlan(48, 8, 3, 2)
    assert plan_batch(48, None, None, 1, 1024) == BatchPlan(48, 16, 3, 1), "16,384 tokens per micro-batch"
    assert plan_batch(48, None, None, 1, 100_000).micro_rows == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((10, None, None, 4, 8), ["global_batch_size (10)", "nearest: 8, 12"]),
        ((12, 5, None, 1, 8), ["batch_size (5)", "1, 2, 3, 4, 6, 12"]),
        ((12, None, 5, 1, 8), ["gradient_accumulation_steps (5)", "1, 2, 3, 4, 6, 12"]),
        ((12, 3, 3, 1, 8), ["global_batch_size=9", "gradient_accumulation_steps=4"]),
    ],
)
def test_inconsistent_numbers_name_the_nearest_legal(args, words):
    with pytest.raises(ValueError) as error:
        plan_batch(*args)
    assert all(word in str(error.value) for word in words)


class FakeRows:
    seq_len = 3
    position_of, row_at = TrainingRows.position_of, TrainingRows.row_at

    def batch(self, rows):
        tokens = np.repeat(rows[:, None], 4, axis=1)
        return SimpleNamespace(
            tokens=tokens, weights=np.ones((len(rows), 3), np.float32), rows=rows, bytes=7 * len(rows)
        )


class FakeAdapter:
    def prepare(self, batch, ctx):
        assert ctx.rows_in_step == 12
        return Prepared({"rows": torch.from_numpy(batch.rows)}, {"tokens": float(batch.weights.sum())})


def rows_of(plan, rank, step):
    batch = StepLoader(FakeRows(), FakeAdapter(), plan, rank, seed=0).load(step)
    assert batch.first_rows == [int(m.tensors["rows"][0]) for m in batch.micro]
    return torch.cat([m.tensors["rows"] for m in batch.micro]).tolist()


@pytest.mark.parametrize(("micro", "world"), [(12, 1), (1, 1), (3, 2), (2, 3)])
def test_every_split_covers_the_same_rows(micro, world):
    plan = plan_batch(12, micro, None, world, 3)
    for step in (0, 5):
        seen = [row for rank in range(world) for row in rows_of(plan, rank, step)]
        assert seen == list(range(12 * step, 12 * step + 12))


class AnyRows(FakeAdapter):
    def prepare(self, batch, ctx):
        return Prepared({"rows": torch.from_numpy(batch.rows)}, {"rows": float(ctx.rows_in_step)})


@pytest.mark.parametrize(("micro", "world"), [(4, 1), (2, 1), (1, 2), (2, 2)])
def test_steps_of_stages_follow_each_other_through_the_text(micro, world):
    """Every row once, whatever the split; where a step stands follows from its number, wherever a run goes on."""
    stages = Stages((2, 5, 9), (4, 12, 8), (1.0, 1.0, 1.0))
    plan = plan_batch(8, micro, None, world, 3)

    def seen(step, first=0, position=0):
        loaders = [StepLoader(FakeRows(), AnyRows(), plan, rank, 0, stages) for rank in range(world)]
        for loader in loaders:
            loader.start_at(first, position)
        batches = [loader.load(step) for loader in loaders]
        assert {m.denominators["rows"] for b in batches for m in b.micro} == {stages.rows_at(step)}
        assert {len(m.tensors["rows"]) for b in batches for m in b.micro} == {micro}, (
            "one shape in all stages"
        )
        return [row for b in batches for m in b.micro for row in m.tensors["rows"].tolist()]

    rows = [seen(step) for step in range(11)]
    assert [len(r) for r in rows] == [4, 4, 12, 12, 12, 8, 8, 8, 8, 8, 8]
    assert sum(rows, []) == list(range(sum(len(r) for r in rows)))
    loader = StepLoader(FakeRows(), AnyRows(), plan, 0, 0, stages)
    for first in (0, 1, 3, 6):
        assert [seen(step, first, loader.position(first)) for step in range(first, 11)] == rows[first:]


def test_thread_delivers_in_order_counts_and_stops():
    loader = StepLoader(FakeRows(), FakeAdapter(), plan_batch(12, 4, None, 1, 3), 0, 0)
    got = list(loader.steps(3, 8))
    assert [b.step for b in got] == [3, 4, 5, 6, 7]
    assert got[0].tokens == 36 and got[0].bytes == 84 and got[0].denominators == {"tokens": 36.0}
    for batch in loader.steps(0, 10**9):  # leaving early must not hang
        assert batch.step == 0
        break


def test_an_error_in_the_thread_is_raised_in_the_loop():
    loader = StepLoader(FakeRows(), FakeAdapter(), plan_batch(12, 4, None, 1, 3), 0, 0)
    loader.adapter = SimpleNamespace(prepare=lambda batch, ctx: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader.steps(0, 1)))
