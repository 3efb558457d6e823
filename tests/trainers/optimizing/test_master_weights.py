"""fp32 weights beside 16-bit ones: what an optimizer does on them, against the same written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import recipe_for, run, steps

from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.trainers.checkpoints.read import latest
from upcycle.trainers.optimizing.master_weights import follow_masters, stepped_on, with_masters

Model = Callable[[str], Path]


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    model[0].bfloat16()
    return model  # the second stays fp32, as weights that a class keeps so do


def output(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return model[1](model[0](x.bfloat16()).float()).square().mean()


def test_gradients_of_passes_add_up_in_fp32_and_weights_follow_rounded() -> None:
    model, by_hand = two_layers(), two_layers()
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(with_masters([{"params": list(model.parameters()), "lr": 1e-3}]), **settings)
    follow_masters(optimizer, model.parameters())
    weights = list(by_hand.parameters())
    masters = [nn.Parameter(weight.detach().float()) for weight in weights]
    plain = torch.optim.AdamW(masters, lr=1e-3, **settings)
    for step in range(5):
        passes = [torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + part)) for part in range(3)]
        sums = [torch.zeros_like(master) for master in masters]
        for x in passes:
            output(model, x).backward()
            assert all(weight.grad is None for weight in model[0].parameters())  # handed over, and freed
            for total, grad in zip(sums, torch.autograd.grad(output(by_hand, x), weights), strict=True):
                total.add_(grad.float())
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        optimizer.step()
        plain.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
        for weight, own, master in zip(model.parameters(), weights, masters, strict=True):
            assert torch.equal(weight, own)
            assert torch.equal(stepped_on(weight), master)


def test_steps_too_small_for_bfloat16_are_not_lost() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(with_masters([{"params": [weight], "lr": 1e-4}]))
    follow_masters(optimizer, [weight])
    for _ in range(100):
        weight.float().sum().backward()
        optimizer.step()
    assert stepped_on(weight).tolist() == pytest.approx([0.99] * 3, abs=1e-5)
    assert weight.tolist() == [float(torch.tensor(0.99).bfloat16())] * 3


@pytest.mark.parametrize("passes", [1, 2])
def test_a_bfloat16_run_without_zero_goes_as_one_with_it(pico_moe: Model, tmp_path: Path, passes: int) -> None:
    """Both keep fp32 weights and fp32 sums; what differs is the order in which numbers of bfloat16 are added up."""
    shape: dict[str, Any] = {"dtype": "bfloat16", "global_batch": 4, "micro_batch": 4 // passes}
    runs = [
        recipe_for(pico_moe("mixtral"), tmp_path / f"zero-{stage}", **shape, zero={"stage": stage}) for stage in (0, 1)
    ]
    for each in runs:
        run(each)
    plain, divided = (steps(each) for each in runs)
    # Losses are read in bfloat16, whose numbers lie 2^-8 apart, relatively, and are means over many tokens.
    assert [line["loss"] for line in plain] == pytest.approx([line["loss"] for line in divided], rel=2**-8)
    first, second = (latest(Path(each.output)) for each in runs)
    assert first
    assert second
    weights = [SafetensorsFolder(each.folder) for each in (first, second)]
    start = SafetensorsFolder(pico_moe("mixtral"))
    name = next(name for name in weights[0].specs if name.endswith("embed_tokens.weight"))
    plain_end, divided_end, begun = (folder.read(name) for folder in (*weights, start))
    moved = (divided_end - begun.float()).norm()
    assert moved > 0
    assert (plain_end - divided_end).norm() < 0.1 * moved
