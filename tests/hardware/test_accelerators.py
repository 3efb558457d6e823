"""What is known of accelerators."""

from __future__ import annotations

import pytest

from upcycle.errors import UsageError
from upcycle.hardware.accelerators import DEVICES, device, named_like
from upcycle.kernels.gpu.compile_gate.roofline import GPUS


def test_a_device_is_found_in_any_case() -> None:
    assert device("h100") is DEVICES["H100"]
    with pytest.raises(UsageError, match="unknown device 'H1000'") as error:
        device("H1000")
    assert "did you mean 'H100'?" in str(error.value.hint)


@pytest.mark.parametrize(
    ("full", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_the_drivers_name_tells_which_it_is(full: str, name: str | None) -> None:
    assert named_like(full) is (DEVICES[name] if name else None)


def test_facts_are_plausible_and_say_where_they_are_from() -> None:
    for known in DEVICES.values():
        assert known.source
        assert known.flops > 1e14
        assert known.network < known.bandwidth
        assert known.link < known.bandwidth


def test_the_kernels_floors_use_the_same_facts() -> None:
    assert [(gpu.flops, gpu.bandwidth) for gpu in GPUS] == [
        (known.flops, known.bandwidth) for known in (DEVICES["A100"], DEVICES["H100"], DEVICES["B200"])
    ]
