"""Values that are read when they are there."""

import pytest
import torch

from trainer.fetch import Fetched


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_value_is_what_it_was_when_it_was_sent(device):
    value = torch.ones((), device=device)
    sent = Fetched(value * 3)
    assert sent.item() == 3 and sent.item() == 3


@pytest.mark.gpu
def test_reading_waits_for_no_later_work():
    value = torch.full((), 2.0, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = Fetched(value)
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
        later = torch.cuda.Event()
        later.record()
        assert sent.item() == 2 and not later.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
