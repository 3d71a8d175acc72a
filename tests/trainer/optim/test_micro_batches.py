"""An optimizer steps once for all micro-batches of a step."""

import pytest
import torch

from tests.contract.tiny import session_of, trainer_of


def trained(architecture, rows, *words):
    """Weights after three steps of eight rows, `rows` of them at a time, in fp64."""
    sizes = ("global_batch_size=8", f"batch_size={rows}", "num_iterations=3", "mixed_precision=no")
    session = session_of(architecture, *sizes, *words)
    session.adapter.double()
    trainer = trainer_of(session)
    trainer.total = 3
    for step in range(3):
        batch = session.loader.load(step)
        assert len(batch.micro) == 8 // rows
        trainer._train_step(batch, trainer._agree(batch)[0])
    return {name: p.detach() for name, p in session.adapter.model.named_parameters()}


@pytest.mark.parametrize(("architecture", "optimizer"), [("gpt2", "muon"), ("current_best_gpt", "normuon")])
def test_weights_do_not_depend_on_how_a_step_is_cut(architecture, optimizer, monkeypatch):
    """Orthogonalised for each micro-batch, and added up, an update would be another one."""
    monkeypatch.setattr("trainer.optim.muon.iteration_dtype", lambda dtype, device: dtype)
    words = (f"optimizer={optimizer}", "weight_decay=0.1")
    whole, cut = (trained(architecture, rows, *words) for rows in (8, 2))
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, rtol=1e-6, atol=1e-9, msg=name)
