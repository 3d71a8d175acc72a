"""What is there, and what torch cannot use of it."""

import sys

import pytest
import torch

from trainer.doctor import devices
from trainer.doctor.lines import lines_of

DRIVER = "NVIDIA H100 80GB HBM3, 570.86.15"


class Properties:
    name, major, minor = "NVIDIA H100", 9, 0


def a_gpu(monkeypatch, free=70e9, properties=Properties, error=None):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 80e9))

    def ones(*args, **kwargs):
        if error:
            raise error
        return torch.zeros(1)

    fake = type("torch", (), {"cuda": torch.cuda, "version": torch.version, "ones": staticmethod(ones)})
    return devices._gpus(fake, DRIVER)


def test_this_machine():
    found = {line.about: line for line in lines_of("devices", "trainer.doctor.devices:check")}
    assert {"cpu", "memory", "a run"} <= found.keys()
    assert f"{torch.get_num_threads()} threads" in found["cpu"].text and " available" in found["memory"].text


def test_more_threads_than_cores(monkeypatch):
    monkeypatch.setattr(devices, "_cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    line = devices._cpu(torch)
    assert line.state == "problem" and "OMP_NUM_THREADS=3" in line.remedy


def test_a_gpu_that_works(monkeypatch):
    driver, gpu = a_gpu(monkeypatch)
    assert driver.text == DRIVER and gpu.state == "ok" and "sm_90, 70 GB of 80 GB free" in gpu.text


def test_one_that_others_use(monkeypatch):
    _, gpu = a_gpu(monkeypatch, free=3e9)
    assert gpu.state == "note" and "nvidia-smi" in gpu.remedy


def test_one_that_is_too_old(monkeypatch):
    _, gpu = a_gpu(monkeypatch, properties=type("Old", (), {"name": "K80", "major": 3, "minor": 7}))
    assert gpu.state == "problem" and "torch_compile=false" in gpu.remedy


def test_one_that_fails(monkeypatch):
    _, gpu = a_gpu(monkeypatch, error=RuntimeError("CUDA error: uncorrectable ECC error\nmore"))
    assert (gpu.state, gpu.text) == (
        "problem",
        "cannot be used: RuntimeError: CUDA error: uncorrectable ECC error",
    )


@pytest.mark.parametrize(
    "cuda, hidden, said, remedy",
    [
        (None, None, "was built without CUDA", "pytorch.org"),
        ("13.0", "", "hidden by CUDA_VISIBLE_DEVICES=''", "unset CUDA_VISIBLE_DEVICES"),
        ("13.0", None, "torch cannot use: RuntimeError: the driver is too old", "a driver for CUDA 13.0"),
    ],
)
def test_one_that_torch_does_not_see(monkeypatch, cuda, hidden, said, remedy):
    def init():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    driver, line = devices._gpus(torch, DRIVER)
    assert line.state == "problem" and said in line.text and remedy in line.remedy


def test_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (line,) = lines_of("devices", "trainer.doctor.devices:check")
    assert line.state == "problem" and "ModuleNotFoundError" in line.text
