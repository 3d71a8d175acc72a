"""No field of a Config is accepted and ignored, and a choice of execution is nothing else."""

from configs.schema import Execution
from models.gpt2 import GPT2Config
from tests.contract.fields import complaints
from tests.contract.tiny import config


def test_every_field_changes_something(architecture, tmp_path):
    """Shapes of weights, operations, loss, score or text; but for choices of execution, which change none of them."""
    assert not complaints(*config(architecture), tmp_path)


class Careless(GPT2Config):
    """Its model reads no field but those of GPT-2."""

    ignored: int = 3
    named: str = "so"
    way: Execution[int] = 1
    wpe_init_std: Execution[float] = 0.02

    def unread(self) -> dict[str, str]:
        return {"ignored": "named=so"}


def test_careless_fields_are_noticed(tmp_path):
    cfg, model_cfg = config("gpt2")
    found = complaints(cfg, Careless(**model_cfg.model_dump()), tmp_path)
    assert sorted(found) == [
        "ignored changes nothing that can be seen (with named=so it means nothing: give it an example)",
        "named has no other legal value that could be guessed: give it an example",
        "wpe_init_std is a choice of execution, and changes the loss",
    ]
