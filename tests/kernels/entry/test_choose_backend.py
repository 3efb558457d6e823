"""Which path is taken, what is said of it, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from upcycle.errors import EnvironmentFault, UsageError
from upcycle.kernels.cpu import backend
from upcycle.kernels.entry import choose_backend
from upcycle.kernels.entry.process_state import forget
from upcycle.kernels.layout import devices, reference

HOST, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("UPCYCLE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine that says it has one; ``capability``, ``triton`` and ``hip`` can be changed."""
    state: dict[str, Any] = {"capability": (9, 0), "triton": True, "hip": None}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: state["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    monkeypatch.setattr(devices, "find_spec", lambda name: state["triton"] or None)
    return state


def test_the_cpus_is_the_default_there_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "upcycle.kernels"):
        for _ in range(3):
            assert choose_backend.chosen(HOST, torch.float32) == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "experts in float32 on cpu run on the cpu path: the tensors are there"
    ]
    assert choose_backend.backend(HOST, torch.float32) is backend


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("UPCYCLE_KERNELS", "reference")
    assert choose_backend.backend(HOST, torch.float32) is reference
    assert choose_backend.chosen(GPU, torch.float32) == "reference"
    assert "UPCYCLE_KERNELS asks for it" in caplog.text
    monkeypatch.setenv("UPCYCLE_KERNELS", "cpu")
    assert choose_backend.chosen(HOST, torch.float32) == "cpu"


@pytest.mark.parametrize(
    ("value", "device", "message"),
    [("cuda", HOST, "UPCYCLE_KERNELS is 'cuda'"), ("triton", HOST, "tensors are on the CPU"), ("cpu", GPU, "on cuda")],
)
def test_what_cannot_be_had(value: str, device: torch.device, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPCYCLE_KERNELS", value)
    with pytest.raises(UsageError, match=message) as caught:
        choose_backend.chosen(device, torch.float32)
    assert caught.value.hint


def test_a_gpu(gpu: dict[str, Any]) -> None:
    assert choose_backend.chosen(GPU, torch.bfloat16) == "triton"


@pytest.mark.parametrize(
    ("changes", "device", "dtype", "reason"),
    [
        ({"capability": (7, 5)}, GPU, torch.float16, "need sm_80 or newer, and T4 is sm_75"),
        ({"triton": False}, GPU, torch.float16, "Triton is not installed"),
        ({"hip": "6.4"}, GPU, torch.float16, "verified for NVIDIA GPUs only"),
        ({}, GPU, torch.float64, "the Triton kernels sum in fp32"),
        ({}, torch.device("mps"), torch.float32, "need a CUDA device, and this is mps"),
    ],
)
def test_without_triton_the_reference_runs_and_it_is_said_aloud(
    changes: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    reason: str,
    gpu: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu.update(changes)
    monkeypatch.setattr(torch.version, "hip", gpu["hip"])
    assert choose_backend.chosen(device, dtype) == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    monkeypatch.setenv("UPCYCLE_KERNELS", "triton")
    with pytest.raises(EnvironmentFault, match=reason):
        choose_backend.chosen(device, dtype)


def test_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("UPCYCLE_KERNELS", "triton")
    assert choose_backend.chosen(HOST, torch.float32) == "triton"
