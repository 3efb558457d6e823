"""MoNDE's rule and the balance, written down again with exact numbers; and the command on observed loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from math import comb
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import upcycle
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.planning.near_data import ComputingUnit, Expert, LinkedMemories, parse_rate, plan_layer, plan_run, used

EXPERT = Expert(parameters=3 * 64 * 128, nbytes=3 * 64 * 128 * 2, state_bytes=64 * 2)
MACHINE = LinkedMemories(device=ComputingUnit(3e12, 2e11), near=ComputingUnit(2e10, 2e10), link=1e9)


def restated(tokens: Fraction) -> tuple[Fraction, Fraction]:
    """The two sides of the rule: ``bytes / BW + t_gpu(n)`` and ``2 n d bytes / BW + t_ndp(n)``."""
    numbers, nbytes, state = 3 * 64 * 128, 3 * 64 * 128 * 2, 64 * 2
    flops = 2 * numbers * tokens
    gpu = max(flops / Fraction(3 * 10**12), Fraction(nbytes, 2 * 10**11))
    near = max(flops / Fraction(2 * 10**10), Fraction(nbytes, 2 * 10**10))
    return Fraction(nbytes, 10**9) + gpu, 2 * tokens * Fraction(state, 10**9) + near


def test_the_rule() -> None:
    """Few tokens move, many do not: the number between is that of the formula."""
    for tokens in range(1, 200):
        device, near = restated(Fraction(tokens))
        assert MACHINE.on_device(EXPERT, tokens) == pytest.approx(float(device), rel=1e-12)
        assert MACHINE.near_data(EXPERT, tokens) == pytest.approx(float(near), rel=1e-12)
        assert MACHINE.moves_parameters(EXPERT, tokens) == (device < near)
    moved = [tokens for tokens in range(1, 200) if MACHINE.moves_parameters(EXPERT, tokens)]
    assert moved == list(range(moved[0], 200))
    assert 1 < moved[0] < 199


def test_how_often_an_expert_is_used_and_by_how_many_tokens() -> None:
    """Against the binomial distribution, summed up."""
    for share, tokens in ((0.3, 5), (0.01, 40), (1.0, 3)):
        chances = [comb(tokens, n) * share**n * (1 - share) ** (tokens - n) for n in range(tokens + 1)]
        part, count = used(share, tokens)
        assert part == pytest.approx(1 - chances[0])
        assert count == pytest.approx(sum(n * chance for n, chance in enumerate(chances)) / (1 - chances[0]))
    assert used(0.0, 8) == (0.0, 0.0)


@pytest.mark.parametrize("tokens", [1, 40, 4000])
def test_both_sides_are_done_together(tokens: int) -> None:
    """H of the smallest time, over all of them, with experts sorted by their tokens."""
    shares = [0.02, 0.9, 0.3, 0.0, 0.05, 0.4, 0.2, 0.13]
    plan = plan_layer(3, shares, tokens, EXPERT, MACHINE)
    order = [1, 5, 2, 6, 7, 4, 0, 3]
    sides = []
    for expert in order:
        part = 1 - (1 - Fraction(shares[expert])) ** tokens
        times = restated(tokens * Fraction(shares[expert]) / part) if part else (Fraction(0), Fraction(0))
        sides.append([part * time for time in times])
    times = [max(sum(d for d, _ in sides[:h]), sum(n for _, n in sides[h:])) for h in range(9)]
    best = times.index(min(times))
    assert plan.device == tuple(order[:best])
    assert plan.share == pytest.approx(sum(shares[e] for e in order[:best]) / sum(shares))
    assert plan.seconds == pytest.approx(float(times[best]), rel=1e-9)
    assert (plan.all_on_device, plan.all_near_data) == pytest.approx((float(times[-1]), float(times[0])), rel=1e-9)
    assert plan.seconds <= min(plan.all_on_device, plan.all_near_data)
    assert plan.layer == 3


def test_a_fast_link_moves_everything_and_a_slow_one_nothing_hot_alone() -> None:
    """With equal units, only the link decides; a side that costs nothing takes all."""
    fast = LinkedMemories(ComputingUnit(1e15, 1e15), ComputingUnit(1e9, 1e9), link=1e15)
    assert len(plan_layer(0, [0.5] * 4, 64, EXPERT, fast).device) == 4
    slow = LinkedMemories(ComputingUnit(1e15, 1e15), ComputingUnit(1e15, 1e15), link=1e6)
    assert plan_layer(0, [0.01] * 4, 1, EXPERT, slow).device == ()


def test_rates() -> None:
    assert parse_rate("16GB/s", "--link", "B/s") == 16e9
    assert parse_rate("1.5 t", "--link", "B/s") == 1.5e12
    assert parse_rate("300tflops", "--device-flops", "FLOPS") == 300e12
    for wrong in ("16GB", "fast", "0", "-1GB/s", ""):
        with pytest.raises(UsageError, match=f"--link: '{wrong}' is no rate"):
            parse_rate(wrong, "--link", "B/s")


@pytest.fixture
def seen(pico_moe: Callable[..., Path], tmp_path: Path) -> tuple[str, str]:
    """A model of two layers with four experts of 2304 numbers each, and observations of it: layer 1 is skewed."""
    folder, path = pico_moe("mixtral"), tmp_path / "seen.safetensors"
    upcycle.observe(folder, path, "demo", 512, window=32)
    about, tensors = SafetensorsFile(path).metadata, load_file(path)
    tensors["1.tokens"], tensors["1.load"] = torch.tensor([100.0]).double(), torch.tensor([100.0, 60, 30, 10]).double()
    save_file(tensors, path, about)
    return str(folder), str(path)


def test_the_command_reads_observed_loads(seen: tuple[str, str]) -> None:
    folder, path = seen
    arguments = ["plan", "run", folder, "--observations", path, "--tokens", "50", "--link", "100MB/s"]
    arguments += ["--near-flops", "100MFLOPS"]
    told = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    spec = MoeCheckpoint.open(folder).model
    assert told["expert_bytes"] * 8 == spec.expert_elements * 4
    expert = Expert(spec.expert_elements // 8, spec.expert_elements // 8 * 4, spec.hidden_size * 4)
    machine = LinkedMemories(ComputingUnit(300e12, 2e12), ComputingUnit(100e6, 200e9), 100e6)
    expected = plan_layer(1, [1.0, 0.6, 0.3, 0.1], 50, expert, machine)
    assert told["layers"][1] == {**vars(expected), "device": list(expected.device)}
    assert 0 < len(expected.device) < 4
    assert told["seconds"] == pytest.approx(sum(layer["seconds"] for layer in told["layers"]))
    shown = CliRunner().invoke(cli, arguments).stdout
    assert f"{len(expected.device)} of 4" in shown
    assert "faster than moving all parameters" in shown


def test_observations_of_another_model(seen: tuple[str, str], pico_moe: Callable[..., Path]) -> None:
    other = str(pico_moe("qwen3_moe"))
    with pytest.raises(UsageError, match="was observed on other weights") as error:
        plan_run(other, seen[1], MACHINE)
    assert error.value.hint == f"upcycle observe {other} FILE --calibration TEXT"
    with pytest.raises(UsageError, match="at least 1 token, got 0"):
        plan_run(seen[0], seen[1], MACHINE, tokens=0)
