"""Which devices run Triton kernels, and what is said of the others."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from upcycle.errors import EnvironmentFault
from upcycle.kernels.layout import devices

CUDA = torch.device("cuda", 0)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: importlib.util.find_spec("torch"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_cpu(with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "need a CUDA device, and this is cpu" in str(devices.why_not(torch.device("cpu")))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert devices.why_not(torch.device("cpu")) is None


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)])
def test_old_gpus(capability: tuple[int, int], fits: bool, with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    reason = devices.why_not(CUDA)
    assert reason is None if fits else "T4 is sm_75" in str(reason)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert devices.why_not(CUDA) == "Triton is not installed"
    with pytest.raises(EnvironmentFault, match="Triton is not installed") as raised:
        devices.gpu()
    assert raised.value.hint == "pip install 'upcycle[kernels]'"


def test_without_a_gpu(with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="needs a CUDA device"):
        devices.gpu()


def test_with_an_old_gpu(with_triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "V100")
    with pytest.raises(EnvironmentFault, match="V100 is sm_70"):
        devices.gpu()
