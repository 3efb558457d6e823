"""Recycled experts hold neurons of the dense FFNs, drawn by importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import gelu
from wrapped_models import inputs_of, small_model

from upcycle.errors import RefusalError, UsageError
from upcycle.models.own.recycling import recycle
from upcycle.models.own.slots import SlotBlock


def blocks_of(model: Any) -> list[SlotBlock]:
    return [module for module in model.modules() if isinstance(module, SlotBlock)]


def dense_rows(name: str, model: Any, layer: int) -> tuple[torch.Tensor, ...]:
    """up ``[F, d]``, its bias, down's rows and bias: by the stock names."""
    state = model.state_dict()
    ends = {"vit": ("mlp.fc1", "mlp.fc2"), "bert": ("intermediate.dense", "output.dense")}[name]
    found = []
    for end in ends:
        (key,) = [k for k in state if k.endswith(f"{end}.weight") and f".{layer}." in k and "attention" not in k]
        found += [state[key], state[key.replace("weight", "bias")]]
    return found[0], found[1], found[2].T, found[3]


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_experts_hold_neurons_of_the_sources_in_turn(name: str) -> None:
    first, second = small_model(name), small_model(name)
    with torch.no_grad():
        for weight in second.parameters():
            weight.mul_(1.5)
    model = recycle([first, second], core=2, universal=2, width=32, seed=3)
    (block,) = blocks_of(model)
    start = 0
    for expert, width in enumerate(block.experts.widths):
        up, up_bias, down, down_bias = dense_rows(name, (first, second)[expert % 2], 1)
        rows = block.experts.up[start : start + width]
        taken = torch.cdist(rows.double(), up.double()).argmin(1)
        assert len(taken.unique()) == width  # without replacement
        assert torch.equal(rows, up[taken])
        assert torch.equal(block.experts.up_bias[start : start + width], up_bias[taken])
        assert torch.equal(block.experts.down[start : start + width], down[taken])
        assert torch.equal(block.experts.down_bias[expert], down_bias)
        start += width
    kept, ours = first.state_dict(), model.state_dict()
    assert all(torch.equal(kept[key], ours[key]) for key in kept if key in ours)
    assert len(kept) - len([key for key in kept if key in ours]) == 4  # one FFN's
    again = recycle([first, second], core=2, universal=2, width=32, seed=3).state_dict()
    assert all(torch.equal(again[key], ours[key]) for key in ours)


def drawn(model: Any, dense: Any, chances: torch.Tensor) -> float:
    """How much more important the neurons of the experts are than the mean one."""
    (block,) = blocks_of(model)
    up = dense_rows("vit", dense, 1)[0]
    taken = torch.cdist(block.experts.up.detach().double(), up.double()).argmin(1)
    return float(chances[taken].mean() / chances.mean())


def test_neurons_are_drawn_by_their_activation_on_inputs_or_by_their_weights() -> None:
    dense, inputs = small_model("vit"), inputs_of("vit")
    up, up_bias, down, _ = (part.double() for part in dense_rows("vit", dense, 1))
    read: list[torch.Tensor] = []
    module = next(m for key, m in dense.named_modules() if key.endswith("1.mlp.fc1"))
    hook = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        dense(**inputs)
    hook.remove()
    activation = gelu(read[0].reshape(-1, 32).double() @ up.T + up_bias).square().sum(0).sqrt()
    weight = up.norm(dim=1) * down.norm(dim=1)
    sizes = {"core": 0, "universal": 2000, "width": 16}
    for given, chances in (((inputs,), activation), ((), weight)):
        found = drawn(recycle([dense], given, **sizes), dense, chances)
        # Four of 64 without replacement are nearly four draws in proportion to the chances.
        expected = float((chances**2).mean() / chances.mean() ** 2)
        assert found == pytest.approx(expected, rel=0.03)
        assert expected > 1.02


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_models_that_write_are_refused(name: str) -> None:
    with pytest.raises(RefusalError, match="SpheroMoE mixes all tokens"):
        recycle([small_model(name)], core=1, universal=1)


@pytest.mark.parametrize("keys", [{"width": 200}, {"width": 10}, {"core": 0, "universal": 0}])
def test_impossible_numbers_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be drawn from FFNs of 64 neurons"):
        recycle([small_model("vit")], **{"core": 1, "universal": 1, **keys})


def test_sources_of_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="of one size and form only"):
        recycle([small_model("vit"), small_model("vit", intermediate_size=48)], core=1, universal=1)
