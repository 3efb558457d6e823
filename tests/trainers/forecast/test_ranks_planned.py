"""--world."""

from __future__ import annotations

import pytest
import torch

from upcycle.errors import UsageError
from upcycle.hardware.accelerators import DEVICES
from upcycle.trainers.forecast.ranks_planned import World, parse_world


@pytest.mark.parametrize(
    ("text", "nodes", "per_node"),
    [("8xH100", 1, 8), ("2x8xH100", 2, 8), ("4xh100", 1, 4), ("4096xH100", 512, 8), ("3x4xA100-40GB", 3, 4)],
)
def test_machines_and_devices(text: str, nodes: int, per_node: int) -> None:
    world = parse_world(text)
    assert (world.nodes, world.per_node, world.size) == (nodes, per_node, nodes * per_node)
    assert parse_world(str(world)) == world


@pytest.mark.parametrize("text", ["2", "2xcpu"])
def test_ranks_on_this_machines_cpus_share_it(text: str) -> None:
    alone, both = parse_world("1"), parse_world(text)
    assert (both.size, both.nodes, both.device.name) == (2, 1, "cpu")
    assert both.device.memory == pytest.approx(alone.device.memory / 2, rel=0.2)
    assert 1e8 < both.device.flops < 1e14
    assert 1e8 < both.device.bandwidth < 1e13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eight", "cannot read 'eight'"),
        ("8xH900", "unknown device 'H900'"),
        ("0xH100", "no ranks"),
        ("0x8xH100", "no ranks"),
        ("12xH100", "12 devices do not fill machines of 8"),
        ("2x2xcpu", "for this machine alone"),
    ],
)
def test_bad_worlds_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        parse_world(text)
    assert error.value.hint


def test_without_a_world_the_plan_is_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (parse_world(None).device.name, parse_world(None).size) == ("cpu", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert str(parse_world(None)) == "4xH200"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    with pytest.raises(UsageError, match="the speed and memory of this machine's NVIDIA T4 are not known"):
        parse_world(None)


def test_how_groups_spread_over_machines() -> None:
    world = World(DEVICES["H100"], 4, 8)
    groups = {
        (32, 1): (4, 8),
        (8, 1): (1, 8),
        (4, 1): (1, 4),
        (16, 1): (2, 8),
        (8, 4): (4, 2),
        (4, 8): (4, 1),
        (2, 16): (2, 1),
    }
    for (ranks, stride), found in groups.items():
        members = {rank * stride // 8 for rank in range(ranks)}  # the group of rank 0
        assert world.spread(ranks, stride) == found
        assert len(members) == found[0]
