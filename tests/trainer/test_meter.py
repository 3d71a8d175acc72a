import math

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
