"""The average of the weights: recursion, skipped steps, swapping, resume."""

import io

import pytest
import torch
from torch import nn

from trainer.optim.ema import EMA


def model(value: float | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    if value is not None:
        for p in net.parameters():
            nn.init.constant_(p, value)
    return net


def move(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in net.parameters():
            p += torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def test_golden_recursion():
    net = model(0.0)
    ema = EMA(net.named_parameters(), 0.9999)
    for p in net.parameters():
        nn.init.ones_(p)
    for golden in (0.8181818182, 0.9545454545, 0.9860139860):
        ema.update()
        for shadow in ema.shadow.values():
            torch.testing.assert_close(shadow, torch.full_like(shadow, golden), rtol=0, atol=1e-10)


def test_decay_is_bounded_by_the_setting():
    """With decay 0.8 the bound (1 + k) / (10 + k) reaches it in update 35."""
    net = model(0.0)
    ema = EMA(net.named_parameters(), 0.8)
    average = 0.0
    for k in range(1, 51):
        for p in net.parameters():
            nn.init.constant_(p, k**2)
        ema.update()
        d = min(0.8, (1 + k) / (10 + k))
        average = d * average + (1 - d) * k**2
        assert ema.shadow["0.weight"][0, 0].item() == pytest.approx(average, rel=1e-6)


def test_a_new_start_takes_the_weights_or_a_given_average():
    net = model()
    ema = EMA(net.named_parameters(), 0.9)
    for step in range(5):
        move(net, step)
        ema.update()
    old = {name: s.clone() for name, s in ema.shadow.items()}
    ema.restart()
    for name, p in net.named_parameters():
        assert torch.equal(ema.shadow[name], p.to(ema.shadow[name].dtype)) and not torch.equal(p, old[name])
    ema.restart(old)
    assert all(torch.equal(ema.shadow[name], s) for name, s in old.items()) and int(ema._updates) == 0
    with pytest.raises(ValueError, match="average"):
        ema.restart({"other": torch.zeros(1)})


def test_skipped_update_never_happened():
    clean, net = model(), model()
    reference, ema = EMA(clean.named_parameters(), 0.9), EMA(net.named_parameters(), 0.9)
    for step in range(4):
        for module in (clean, net):
            move(module, step)
        if step == 2:
            before = {name: s.clone() for name, s in ema.shadow.items()}
            ema.update(torch.ones(()))
            assert all(torch.equal(before[name], s) for name, s in ema.shadow.items())
        reference.update()
        ema.update(torch.zeros(()))
    assert all(torch.equal(reference.shadow[name], s) for name, s in ema.shadow.items())
    assert ema.state_dict()["updates"].item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_shows_the_average_and_restores_bit_for_bit(dtype):
    net = model(dtype=dtype)
    ema = EMA(net.named_parameters(), 0.9)
    move(net, 0)
    ema.update()
    assert all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    raw = {name: p.detach().clone() for name, p in net.named_parameters()}
    shadow = {name: s.clone() for name, s in ema.shadow.items()}

    def check_raw():
        assert all(torch.equal(p, raw[name]) for name, p in net.named_parameters())
        assert all(torch.equal(s, shadow[name]) for name, s in ema.shadow.items())

    with ema.swap():
        assert all(torch.equal(p, shadow[name].to(dtype)) for name, p in net.named_parameters())
        assert not torch.equal(net[0].weight, raw["0.weight"])
        with ema.swap():
            pass
        assert torch.equal(net[0].weight, shadow["0.weight"].to(dtype))
        with pytest.raises(AssertionError, match="average the average"):
            ema.update()
    check_raw()
    with pytest.raises(KeyboardInterrupt), ema.swap():
        raise KeyboardInterrupt
    check_raw()
    ema.update()


def test_frozen_parameters_have_no_shadow():
    net = model()
    net[0].weight.requires_grad_(False)
    assert list(EMA(net.named_parameters(), 0.9).shadow) == ["0.bias", "1.weight", "1.bias"]


def test_resume_is_exact():
    net = model(dtype=torch.float32)
    ema = EMA(net.named_parameters(), 0.999)
    for step in range(6):
        move(net, step)
        ema.update()
        if step == 2:
            file = io.BytesIO()
            torch.save(ema.state_dict(), file)
            weights = {name: t.clone() for name, t in net.state_dict().items()}
    file.seek(0)
    again = model(7.0, dtype=torch.float32)
    again.load_state_dict(weights)
    resumed = EMA(again.named_parameters(), 0.999)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(3, 6):
        move(again, step)
        resumed.update()
    assert all(torch.equal(ema.shadow[name], s) for name, s in resumed.shadow.items())


def test_misfits_are_explained():
    ema = EMA(model().named_parameters(), 0.9)
    other = EMA(nn.Sequential(nn.Linear(3, 4)).double().named_parameters(), 0.9)
    with pytest.raises(ValueError, match=r"missing 2: 1\.bias, 1\.weight"):
        ema.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight is \(4, 3\) torch\.float32"):
        ema.load_state_dict(EMA(model(dtype=torch.float32).named_parameters(), 0.9).state_dict())
    with pytest.raises(ValueError, match="0 < decay < 1 to be on, got 1.0"):
        EMA(model().named_parameters(), 1.0)
