"""What every registered pruning promises: a smaller dense model of the same family, as its blueprint says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import upcycle
from upcycle.errors import UsageError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.registry import FAMILIES, METHODS, load

Pico = Callable[[str], Path]
NAMES = [name for name in METHODS if load("method", name).kind == "pruning"]
WIDTH = 48  # of 96
QUICK: dict[str, Any] = {
    "active": 0.5,
    "calibration": {"text": "demo", "tokens": 512, "window": 64},
    "verification": {"tokens": 64},
}
CELLS = [(method, name) for method in NAMES for name in PICO]


def neurons(block: Any, kept: torch.Tensor | None, x: torch.Tensor, act: Any) -> torch.Tensor:
    """What (some) neurons of a stock FFN put out, whatever it calls its projections, in fp64."""
    tensors = {name: tensor.double() for name, tensor in block.named_parameters()}
    some: Any = slice(None) if kept is None else kept
    for fused in ("gate_up_proj", "input_linear"):
        if f"{fused}.weight" in tensors:
            gate, up = tensors[f"{fused}.weight"].chunk(2)
            return act(linear(x, gate[some])) * linear(x, up[some])
    outs = []
    for module in ("w1", "w3", "gate_proj", "up_proj", "c_fc", "dense_h_to_4h"):
        if f"{module}.weight" in tensors:
            bias = tensors.get(f"{module}.bias")
            outs.append(linear(x, tensors[f"{module}.weight"][some], None if bias is None else bias[some]))
    return act(outs[0]) * outs[1] if len(outs) == 2 else act(outs[0])


def bias_of_down(block: Any) -> torch.Tensor | None:
    """Of the projection whose output the FFN gives."""
    for module in ("down_proj", "c_proj", "dense_4h_to_h"):
        bias = getattr(getattr(block, module, None), "bias", None)
        if bias is not None:
            return torch.as_tensor(bias.double())
    return None


def test_every_family_is_here() -> None:
    assert NAMES
    assert {PICO[name][0] for _, name in CELLS} == set(FAMILIES)


@pytest.mark.one_in(32)
@pytest.mark.parametrize(("method", "name"), CELLS)
def test_stock_transformers_runs_the_kept_neurons(method: str, name: str, pico: Pico, tmp_path: Path) -> None:
    """Every FFN is the formula of the saved blueprint and the dense weights, and all other tensors are the dense ones."""
    result = upcycle.convert(str(pico(name)), tmp_path / "out", method=method, **QUICK)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.relative_logit_error > 1e-3  # something is missing: the comparison sees it
    pruned, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    dense = AutoModelForCausalLM.from_pretrained(pico(name), dtype=torch.float32)
    assert type(pruned) is type(dense)
    paths = load("family", PICO[name][0]).module_paths
    saved = BlueprintFile(tmp_path / "out" / "blueprint.safetensors")
    raw = json.loads((pico(name) / "config.json").read_text(encoding="utf-8"))
    act, changed = ACT2FN[load("family", PICO[name][0])().config(raw).hidden_act], set()
    for layer in range(len(paths.layers_in(dense))):
        blueprint = saved.layer(layer)
        assert saved.shape(layer) == (0, 1, WIDTH)
        kept, down = blueprint.neurons, blueprint.down
        assert down is not None
        assert kept.tolist() == sorted(set(kept.tolist()))
        before, after = (model.get_submodule(paths.block_of(layer)) for model in (dense, pruned))
        x = torch.randn(16, down.shape[0], dtype=torch.float64)
        expected = linear(neurons(before, kept, x, act), down.double(), bias_of_down(before))
        with torch.no_grad():
            found = after(x.float()[None])[0]
        assert torch.linalg.norm(found - expected) <= 1e-6 * torch.linalg.norm(expected)
        changed |= {f"{paths.block_of(layer)}.{part}" for part, _ in before.named_parameters()}
    files = [load_file(folder / "model.safetensors") for folder in (pico(name), tmp_path / "out")]
    assert set(files[0]) == set(files[1])
    assert all(torch.equal(files[0][key], tensor) for key, tensor in files[1].items() if key not in changed)


@pytest.mark.one_in(32)
@pytest.mark.parametrize(("method", "name"), CELLS)
def test_the_configuration_says_the_width_and_nothing_else_changes(
    method: str, name: str, pico: Pico, tmp_path: Path
) -> None:
    upcycle.convert(str(pico(name)), tmp_path / "out", method=method, refit="none", **QUICK)
    before, after = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (pico(name), tmp_path / "out")
    )
    different = {key for key in {*before, *after} if before.get(key) != after.get(key)}
    assert different <= {
        *("intermediate_size", "shared_intermediate_size", "block_ff_dim", "block_auto_adjust_ff_dim"),
        *("dtype", "transformers_version"),
    }
    family = load("family", PICO[name][0])()
    assert family.config(after).intermediate_size == WIDTH
    assert after["dtype"] == before.get("dtype", "float32")


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("experts", 4),
            ("top_k", 1),
            ("shared", 1),
            ("shared_unheld", "route"),
            ("router", "zero"),
            ("scale", "sum"),
        ),
        *(("pieces", 8), ("always_on", 0.5), ("pad", True), ("target", "llama"), ("layout", "fused")),
    ],
)
def test_keys_that_mean_nothing_are_refused(method: str, key: str, value: Any, pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"does not read the key '{key}'") as caught:
        upcycle.convert(str(pico("llama")), tmp_path / "out", method=method, **QUICK, **{key: value})
    assert "leave it out" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", NAMES)
def test_several_sources_are_refused(method: str, pico: Pico, tmp_path: Path) -> None:
    sources = [str(pico("llama"))] * 2
    with pytest.raises(UsageError, match="converts one source"):
        upcycle.convert(None, tmp_path / "out", method=method, sources=sources, **QUICK)


@pytest.mark.parametrize("method", NAMES)
def test_no_text_no_pruning(method: str, pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs calibration text") as caught:
        upcycle.convert(str(pico("llama")), tmp_path / "out", method=method, active=0.5)
    assert "--calibration" in str(caught.value.hint)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("method", NAMES)
def test_what_is_planned_is_written_and_verified_again(method: str, pico: Pico, tmp_path: Path) -> None:
    keys = {"method": method, **QUICK, "max_shard_size": "60KB"}
    plan = upcycle.plan(str(pico("llama")), **keys)
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **keys)
    assert result.plan == plan
    assert (plan.kind, plan.target, plan.router) == ("pruning", "llama", "none")
    assert plan.summary == "48 of 96 neurons are kept in every layer"
    assert plan.parameters_active == plan.parameters_total == plan.parameters_dense - 3 * 3 * 32 * (96 - WIDTH)
    written = [tensor for path in tmp_path.glob("out/model*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.numel() for tensor in written) == plan.parameters_total
    assert len(plan.shards) > 1
    assert upcycle.verify(tmp_path / "out", tokens=64) == result.verification
