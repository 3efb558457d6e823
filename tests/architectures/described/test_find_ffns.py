"""Descriptions of FFNs, judged by what the stock modules compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from wrapped_models import SMALL, D, F, ffn_weights, inputs_of, output_of, relative_error, small_model

from upcycle.architectures.described.find_ffns import FoundFfn, find_ffns
from upcycle.errors import RefusalError
from upcycle.registry import load

pytestmark = pytest.mark.one_in(4)  # the other cases are long

ROUNDING = 2e-6  # relative, of two fp32 products and sums of up to 64 terms


STAGES = ("swin", "convnext", "dinov3-convnext")
WIDE = ("bloom", "convnext", "dinov3-convnext")


def formula(ffn: FoundFfn, weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``down(act(gate x) * up x)``, or ``down(act(up x))``."""
    act = ACT2FN[ffn.activation]
    up = functional.linear(x, weights["up"], weights.get("up_bias"))
    hidden = act(functional.linear(x, weights["gate"], weights.get("gate_bias"))) * up if ffn.place.gated else act(up)
    return functional.linear(hidden, weights["down"], weights.get("down_bias"))


def stock_calls(model: Any, name: str, ffn: FoundFfn) -> tuple[torch.Tensor, torch.Tensor]:
    """What an FFN's first module reads and its last one puts out while the stock model runs."""
    seen: list[torch.Tensor] = []
    first, last = (model.base_model.get_submodule(ffn.replaced[i]) for i in (0, -1))
    hooks = [
        first.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        last.register_forward_hook(lambda _, __, output: seen.append(output.clone())),  # Falcon adds to it in place
    ]
    output_of(model, inputs_of(name))
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("name", SMALL)
def test_the_described_formula_is_what_the_stock_modules_compute(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(name)
    found = find_ffns(model, load("described", SMALL[name][0]))
    towers = 2 if load("described", SMALL[name][0]).parts and name != "t5-encoder" else 1
    widths = [D, 2 * D, 2 * D] if name in STAGES else [D] * 2 * towers
    assert [ffn.hidden for ffn in found] == widths
    for ffn in found:
        assert ffn.width == (4 if name in WIDE else F // D) * ffn.hidden
        x, output = stock_calls(model, name, ffn)
        weights = ffn_weights(model.base_model, ffn)
        if ffn.place.learned:
            own = model.base_model.get_submodule(f"{ffn.layer}.{ffn.place.learned}")
            monkeypatch.setitem(ACT2FN, ffn.activation, lambda own=own: own)
        assert relative_error(formula(ffn, weights, x), output) < ROUNDING
        if ffn.place.gated:  # the other reading of the two matrices is told apart
            swapped = {**weights, "gate": weights["up"], "up": weights["gate"]}
            assert relative_error(formula(ffn, swapped, x), output) > 1e-2


@pytest.mark.parametrize("name", SMALL)
def test_the_norm_before_an_ffn_is_the_one_whose_output_it_reads(name: str) -> None:
    model = small_model(name)
    for ffn in find_ffns(model, load("described", SMALL[name][0])):
        if ffn.norm is None:
            continue
        seen: list[torch.Tensor] = []
        module = model.base_model.get_submodule(ffn.norm)
        hook = module.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        x, _ = stock_calls(model, name, ffn)
        hook.remove()
        assert any(torch.equal(x.reshape(-1), output.reshape(-1)) for output in seen), ffn.norm


def test_sizes_are_read_on_the_meta_device() -> None:
    config = AutoConfig.for_model(SMALL["gpt2"][0], **SMALL["gpt2"][2])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (first, second) = find_ffns(model, load("described", "gpt2"))
    assert first.replaced == ("h.0.mlp",)
    assert second.path("up") == "h.1.mlp.c_fc"
    assert first.biases == {"up", "down"}


def test_ffns_of_another_form_are_refused() -> None:
    with pytest.raises(RefusalError, match="'slow_but_exact' is True"):
        find_ffns(small_model("bloom", slow_but_exact=True), load("described", "bloom"))
    with pytest.raises(RefusalError, match="no FFN of the form"):
        find_ffns(small_model("dinov2", use_swiglu_ffn=True), load("described", "dinov2"))
