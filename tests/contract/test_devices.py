"""What a GPU would refuse or its host wait for, found without one."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapters import build_adapter
from adapters.base import GenerateOptions, weighted_loss
from tests.contract import tiny
from tests.contract.tiny import adapter_of, batch_for, config, context, overrides, tokenizer_for

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
TRANSFERS = {"_to_copy", "copy_"}


class OnDevice(TorchDispatchMode):
    """Refuses operations that wait for `device`, but for `allowed` ones (a function of their names: which of kernels/
    are used is known when they are), and those that mix its tensors with others.

    `reads`: results may be fetched from it, as scores and texts are; where it holds no data, they are zeros.
    """

    def __init__(
        self, device: str, allowed: Callable[[], Iterable[str]] = tuple, reads: bool = False
    ) -> None:
        super().__init__()
        self.device, self.allowed, self.reads = device, allowed, reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in INDEXING and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None):
            name = "nonzero"  # which a boolean index is made of
        if any(t.device.type == self.device for t in tensors):
            waits = name in WAITING and name not in self.allowed()
            assert not waits, f"{name} waits for the device"
            if name == "_to_copy" and self.device != "cpu" and str(kwargs.get("device")) == "cpu":
                return self._fetch(func, args, kwargs)
            devices = sorted({t.device.type for t in tensors if t.ndim})
            mixed = len(devices) > 1 and name not in TRANSFERS
            assert not mixed, f"{name} was given tensors on {' and '.join(devices)}"
        return func(*args, **kwargs)

    def _fetch(self, func, args, kwargs):
        assert self.reads or "_to_copy" in self.allowed(), "a tensor is fetched from the device"
        if self.device == "meta":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def without_data(architecture):
    cfg, model_cfg = config(architecture)
    return build_adapter(cfg, model_cfg, tokenizer_for(cfg, model_cfg), "meta")


def put_on(adapter, device):
    """As `adapter.to(device)`, which fake tensors do not allow; shared parameters stay so."""
    moved = {}
    for module in adapter.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and value not in moved:
                    empty = torch.empty_like(value, device=device)
                    moved[value] = torch.nn.Parameter(empty) if store is module._parameters else empty
                store[name] = moved.get(value)


def train_on(adapter, prepared, device):
    """Forward and backward of a step."""
    with OnDevice(device, lambda: adapter.waits):
        weighted_loss(adapter(prepared.to(torch.device(device))).terms, prepared.denominators).backward()


def score_read_and_continue_on(adapter, batch, device):
    """A score, logits of clean text, and a text over the cache: what is fetched of them is 0."""
    with OnDevice(device, reads=True), torch.no_grad():
        adapter.eval().likelihood(batch, context(phase="eval"))
        adapter.generate([[1, 2, 3]], GenerateOptions(max_new_tokens=2))
        adapter.logits(adapter.clean_states(batch, context(phase="eval")))


def test_no_tensor_is_left_on_the_host_and_nothing_waits_for_the_device(architecture):
    adapter, at_home = without_data(architecture), adapter_of(architecture)
    batch = batch_for(at_home)
    adapter.on_step_start(context(), 1)
    train_on(adapter, at_home.prepare(batch, context()), "meta")
    score_read_and_continue_on(adapter, batch, "meta")


@pytest.mark.gpu
def test_a_step_of_a_cuda_device_without_data(architecture):
    """Fake tensors know what CUDA's own operations ask for. Of the host's they hold no data either, so that scores and
    texts, which compute there too, are left to the meta device."""
    adapter, at_home = without_data(architecture), adapter_of(architecture)
    adapter.on_step_start(context(), 1)
    prepared = at_home.prepare(batch_for(at_home), context())
    train_on(adapter, prepared, "meta")  # makes what is made of host values at the first call
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_on(adapter, "cuda")
        try:
            train_on(adapter, prepared, "cuda")
        except DataDependentOutputException:
            if not adapter.waits:
                raise
            pytest.skip(f"it waits by declaration: {', '.join(adapter.waits)}")


def test_no_host_synchronisation_in_forward_and_backward(architecture):
    """With data, so that what is done with it runs too."""
    adapter = adapter_of(architecture)
    prepared = adapter.prepare(batch_for(adapter), context()).to(tiny.device())
    with OnDevice(tiny.device().type, lambda: adapter.waits):
        weighted_loss(adapter(prepared).terms, prepared.denominators).backward()


def test_the_device_that_was_asked_for_is_that_of_runs_and_models(monkeypatch):
    config("gpt2")  # kept, as there is no run on the meta device
    monkeypatch.setattr(tiny, "_devices", [torch.device("meta")])
    assert adapter_of("gpt2").device.type == "meta"
    assert {"device=meta", "torch_compile=false"} <= set(overrides("gpt2"))


def test_what_waits_or_was_left_behind_is_noticed():
    here, there = torch.ones(3), torch.ones(3, device="meta")
    for device, wrong, message in (
        ("cpu", lambda: here[0].item(), "waits for the device"),
        ("cpu", lambda: here[here > 0], "nonzero waits for the device"),
        ("meta", lambda: here[there.long()], "on cpu and meta"),
        ("meta", lambda: there.cpu(), "fetched from the device"),
    ):
        with pytest.raises(AssertionError, match=message), OnDevice(device):
            wrong()
    with OnDevice("cpu", allowed=lambda: ["nonzero"]):
        here[here > 0].sum()
    with OnDevice("meta", reads=True):
        assert here[0].item() == 1 and there.cpu().sum() == 0
