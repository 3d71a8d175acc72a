import math

import pytest
import torch

from adapters.base import LossTerm, Metric, StepOutput
from trainer.distributed import World
from trainer.meter import Meter

CPU = torch.device("cpu")
WORLD = World(CPU)


def output(ce, aux, largest):
    return StepOutput(
        terms={"ce": LossTerm(torch.tensor(ce), "tokens"), "aux": LossTerm(torch.tensor(aux), "rows", 0.5)},
        metrics={
            "gate": Metric(torch.tensor(largest), 2.0),
            "peak": Metric(torch.tensor(largest), reduce="max"),
            "last": Metric(torch.tensor(largest), reduce="last"),
        },
    )


def fill(meter):
    meter.add_output(output(6.0, 1.0, 5.0))
    meter.add_output(output(2.0, 3.0, 3.0))
    meter.add_step({"tokens": 4.0, "rows": 2.0}, tokens=4, bytes_=10)


def test_means_are_sums_over_denominators():
    meter = Meter(CPU)
    fill(meter)
    assert meter.steps == 1
    read = meter.read(WORLD)
    assert read["loss_ce"] == read["loss"] == 2.0
    assert read["loss_aux"] == 2.0
    assert read["bits_per_byte"] == 8.0 / math.log(2) / 10
    assert (read["gate"], read["peak"], read["last"]) == (2.0, 5.0, 3.0)
    assert meter.steps == 0, "reading starts anew"


def test_saved_and_restored_in_the_middle_reads_the_same():
    whole, first, second = Meter(CPU), Meter(CPU), Meter(CPU)
    fill(whole), fill(whole), fill(first)
    second.load_state_dict(first.state_dict(WORLD), WORLD)
    fill(second)
    assert second.read(WORLD) == whole.read(WORLD)


def test_nothing_that_is_added_waits_for_the_device(monkeypatch):
    """Counts and operations may be tensors too."""

    def wait(self):
        raise AssertionError("a number was asked for")

    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    nothing = torch.zeros(())
    with pytest.raises(AssertionError, match="asked for"):
        float(nothing)
    meter = Meter(CPU)
    for kind in ("mean", "sum", "max", "last"):
        metrics = {kind: Metric(nothing, nothing, reduce=kind)}
        for flops in (None, nothing, 3.0):
            meter.add_output(StepOutput({"ce": LossTerm(nothing, "tokens")}, metrics, flops), 5.0)


def test_counts_on_the_device_and_on_the_host_are_the_same():
    meter = Meter(CPU)
    meter.add_metrics(
        {"a": Metric(torch.tensor(6.0), torch.tensor(1.0)), "b": Metric(torch.tensor(6.0), 1.0)}
    )
    meter.add_metrics({"a": Metric(torch.tensor(2.0), 3), "b": Metric(torch.tensor(2.0), torch.tensor(3))})
    assert meter.read(WORLD) == {"a": 2.0, "b": 2.0}


def test_operations_are_those_of_the_output_or_the_plan():
    meter = Meter(CPU)
    for flops in (None, 10.0, torch.tensor(4.0)):
        meter.add_output(StepOutput({}, flops=flops), planned_flops=100.0)
    assert meter.flops(WORLD) == meter.read(WORLD)["flops"] == 114.0
    assert meter.flops(WORLD) == 0.0


def test_a_state_from_before_operations_were_counted():
    new, old = Meter(CPU), Meter(CPU)
    fill(new)
    state = new.state_dict(WORLD)
    sums = {k: v for k, v in state["sums"].items() if not k.startswith(("count/", "flops/"))}
    counts = {k.removeprefix("count/"): v for k, v in state["sums"].items() if k.startswith("count/")}
    old.load_state_dict({**state, "sums": sums, "counts": counts}, WORLD)
    fill(old), fill(new)
    assert old.read(WORLD) == new.read(WORLD)
