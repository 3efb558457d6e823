"""Layer Drop: which layers lose their experts, what stands in their place, and what stock transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from any_moe import auto_class_of
from moe_oracle import block_of, layers_of, some_windows, stock
from safetensors.torch import load_file

import upcycle
from upcycle.calibration.compressing import refit_cut, refit_dense
from upcycle.calibration.compressing.refit_cut import down_file
from upcycle.calibration.compressing.refit_mixed import refit_mixed
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.compressing.observations import Observations
from upcycle.planning.compress_job import read_cuts
from upcycle.progress import SILENT

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 256, "window": 32}
KEYS: dict[str, Any] = {"method": "layer_drop", "keep": 0.5, "calibration": TEXT, "verification": {"tokens": 64}}
STRENGTH = 0.3


def cuts_of(folder: Path) -> dict[int, dict[str, Any]]:
    content = json.loads((folder / "compression.json").read_text())["experts"]
    return {int(layer): found for layer, found in content.items()}


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "width"), [("qwen2_moe-softmax", 24), ("qwen3_moe", None), ("mellum", 40), ("qwen3_vl_moe", None)]
)
def test_the_layer_that_changes_the_stream_least_gets_the_neurons_that_add_most(
    name: str, width: int | None, pico_moe: Models, tmp_path: Path
) -> None:
    source, out, seen = pico_moe(name), tmp_path / "out", tmp_path / "seen.safetensors"
    keys = {**KEYS, "parameters": {} if width is None else {"width": width}}
    result = upcycle.convert(str(source), out, refit="none", **keys)
    upcycle.observe(str(source), seen, "demo", 256, window=32)
    similar = {layer: float(found.similarity) for layer, found in Observations.read(seen).layers.items()}
    ((dropped, cut),) = [(layer, found) for layer, found in cuts_of(out).items() if "parts" in found]
    assert dropped == max(similar, key=lambda layer: similar[layer])
    model, loading = auto_class_of(out).from_pretrained(out, dtype=torch.float64, output_loading_info=True)
    assert not any(loading.values()), loading
    model.set_experts_implementation("eager")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (
        1,
        6,
    )
    before, after = layers_of(stock(source)), layers_of(model)
    ffn, block = after[dropped].mlp, block_of(before[dropped])
    neurons = block.experts.down_proj.shape[-1]
    assert ffn.gate_proj.weight.shape == (width or neurons, 32)
    first = 0
    for part in cut["parts"]:
        (term,) = part["terms"]
        order = torch.tensor(term["order"])
        if term["expert"] == "shared":
            gate, down = block.shared_expert.gate_proj.weight, block.shared_expert.down_proj.weight
        else:
            gate = block.experts.gate_up_proj[term["expert"]][:neurons]
            down = block.experts.down_proj[term["expert"]]
        own = slice(first, first := first + len(order))
        assert torch.equal(ffn.gate_proj.weight[own], gate[order])
        torch.testing.assert_close(ffn.down_proj.weight[:, own], part["scale"] * down[:, order], rtol=1e-6, atol=0)
    kept = 1 - dropped
    assert all(map(torch.equal, before[kept].state_dict().values(), after[kept].state_dict().values()))
    assert result.plan.parameters_total == sum(t.numel() for t in load_file(out / "model.safetensors").values())
    assert result.plan.summary == "1 layers with experts from 2"
    assert upcycle.verify(out, tokens=64) == result.verification


def behind(model: Any, index: int, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stream behind a layer, and what its FFN's last projection reads, where it has one."""
    seen: dict[str, Any] = {}
    layer = layers_of(model)[index]
    handles = [layer.register_forward_hook(lambda _, __, made: seen.update(after=made))]
    if hasattr(layer.mlp, "down_proj"):
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.update(hidden=given[0])))
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    after = seen["after"][0] if isinstance(seen["after"], tuple) else seen["after"]
    hidden = seen.get("hidden")
    return after.reshape(-1, after.shape[-1]), None if hidden is None else hidden.reshape(-1, hidden.shape[-1])


def test_the_ffn_is_fitted_to_the_uncut_stream_and_experts_above_it_too(
    pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (refit_cut, refit_dense):
        monkeypatch.setattr(module, "REFIT_STRENGTHS", (STRENGTH,))
    source, out, windows = pico_moe("qwen3_moe"), tmp_path / "out", some_windows(48, 16)
    upcycle.convert(str(source), out, refit="none", **KEYS)
    cuts, config = read_cuts(out), json.loads((out / "config.json").read_text())
    (dropped,) = config["mlp_only_layers"]
    reports = refit_mixed(MoeCheckpoint.open(str(source)), config, cuts, "keep", windows, tmp_path, SILENT)
    assert [*reports] == [*range(dropped, 2)]
    target, _ = behind(stock(source), dropped, windows)
    made, features = behind(stock(out), dropped, windows)
    assert features is not None
    a, y = features.numpy(), (target - made).numpy()
    held = np.arange(len(a)) // 16 % 8 == 7
    scale = np.sqrt(STRENGTH * np.square(a[~held]).sum(0).mean())
    rows = np.vstack([a[~held], scale * np.eye(a.shape[1])])
    update = np.linalg.lstsq(rows, np.vstack([y[~held], np.zeros((a.shape[1], y.shape[1]))]), rcond=None)[0]
    expected = layers_of(stock(out))[dropped].mlp.down_proj.weight.detach().numpy() + update.T
    found = load_file(down_file(tmp_path, dropped))["down"].double().numpy()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)  # a ridge system in fp32
    assert all(report["missing_after"] <= report["missing_before"] for report in reports.values())


@pytest.mark.long
def test_same_bytes_again_after_a_stop_and_the_order_of_experts(
    pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(pico_moe("qwen3_moe"))
    upcycle.convert(source, tmp_path / "one", **KEYS)

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(refit_dense.FfnFit, "solve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(source, tmp_path / "two", **KEYS)
    assert not (tmp_path / "two").exists()
    monkeypatch.undo()
    upcycle.convert(source, tmp_path / "two", **KEYS)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    result = upcycle.convert(source, tmp_path / "whole", **{**KEYS, "keep": 1.0})
    assert result.verification is not None
    assert (result.verification.verdict, result.verification.relative_logit_error) == ("exact", 0.0)


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("mixtral", {}, r"a 'mixtral' model all have experts: no key of config\.json says which"),
        ("glm4_moe", {}, r"a 'glm4_moe' model all, but the first ones, have experts"),
        ("cohere2_moe", {}, "attend in another way where they have none"),
    ],
)
def test_architectures_that_cannot_hold_such_layers_are_refused(
    name: str, keys: dict[str, Any], said: str, pico_moe: Models
) -> None:
    with pytest.raises(RefusalError, match=said) as caught:
        upcycle.plan(str(pico_moe(name)), **{**KEYS, **keys})
    assert "block_drop" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"parameters": {"width": 100}}, "width 100 is larger than there are neurons in a layer: 64"),
        ({"keep": 0.2}, "keep 0.2 of 2 layers with experts leaves 0"),
        ({"keep": 0.9}, "keep 0.9 of 2 layers with experts leaves 2"),
        ({"keep": None}, "layer_drop needs to know how many layers keep their experts"),
    ],
)
def test_what_cannot_be_kept_is_refused(keys: dict[str, Any], said: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match=said):
        upcycle.plan(str(pico_moe("qwen3_moe")), **{k: v for k, v in {**KEYS, **keys}.items() if v is not None})
