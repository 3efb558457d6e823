"""What a recipe asks of one source's expert: always on, scaled, with noise; against the formula in fp64 loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import RefusalError, UsageError

Branches = Callable[..., list[Path]]
MLP = "model.layers.1.mlp.{}_proj.weight"
MIX: dict[str, Any] = {"method": "branch_train_mix", "verification": {"tokens": 128}}


def told(sources: list[Path], *roles: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": str(source), **role} for source, role in zip(sources, roles, strict=True)]


def ffn(parent: dict[str, np.ndarray], token: np.ndarray) -> np.ndarray:
    gate, up, down = (parent[MLP.format(part)] for part in ("gate", "up", "down"))
    z = gate @ token
    return down @ (z / (1 + np.exp(-z)) * (up @ token))


def fp64(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("name", "target", "chunks"), [("llama", "qwen2_moe", 1), ("llama", "glm4_moe", 2), ("qwen3", "dots1", 1)]
)
def test_the_layer_is_the_routed_average_and_the_shared_ones(
    name: str, target: str, chunks: int, branches: Branches, tmp_path: Path
) -> None:
    sources, scales = branches(4, 0.3, name), (2.0, 1.0, 0.5, 3.0)
    listed = told(sources, {"scale": 2.0}, {"shared": True}, {"scale": 0.5}, {"shared": True, "scale": 3.0})
    router = {"name": "random", "parameters": {"std": 1e-6}}
    keys = {**MIX, "router": router, "target": target, "top_k": 2 * chunks, "parameters": {"chunks": chunks}}
    result = upcycle.convert(None, tmp_path / "out", sources=listed, **keys)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    # Verification computes the same from the sources again: fp32's roundings are all that may be left.
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < 1e-6
    assert result.verification.all_experts_reference == "the mean of the sources' FFNs and the shared ones"
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    x = np.random.default_rng(0).standard_normal((8, 32))
    with torch.no_grad():
        actual = model.model.layers[1].mlp(torch.from_numpy(x).float()[None])[0].double().numpy()
    parents = [fp64(source) for source in sources]
    expected = np.zeros_like(x)
    for t, token in enumerate(x):
        parts = [scale * ffn(parent, token) for scale, parent in zip(scales, parents, strict=True)]
        expected[t] = (parts[0] + parts[2]) / 2 + parts[1] + parts[3]  # both routed ones, at equal weight
    # fp32 sums of 96 and 32 products, and router weights that differ by 1e-6 * ||x|| at most.
    assert np.linalg.norm(actual - expected) < 3e-5 * np.linalg.norm(expected)


@pytest.mark.long
def test_shared_sources_count_in_the_average_of_the_rest(branches: Branches, tmp_path: Path) -> None:
    sources, name = branches(3), "model.layers.1.self_attn.q_proj.weight"
    upcycle.convert(None, tmp_path / "out", sources=told(sources, {}, {}, {"shared": True}), **MIX)
    mean = sum(fp64(source)[name] for source in sources) / 3
    assert np.allclose(fp64(tmp_path / "out")[name], mean, rtol=2.0**-23, atol=0)


@pytest.mark.long
def test_noise_is_as_large_as_asked_for_on_its_own_expert(branches: Branches, tmp_path: Path) -> None:
    sources = branches(3)
    listed = told(sources, {}, {"noise": 0.05, "scale": 4.0}, {"noise": 0.01, "shared": True})
    upcycle.convert(None, tmp_path / "out", sources=listed, **MIX)
    made, parents = fp64(tmp_path / "out"), [fp64(source) for source in sources]
    experts = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    shared = "model.layers.1.mlp.shared_expert.{}_proj.weight"
    for part in ("gate", "up", "down"):
        assert np.array_equal(made[experts.format(0, part)], parents[0][MLP.format(part)])
        factor = 4.0 if part == "down" else 1.0
        # 3072 normal numbers: the sample deviation is within four standard errors. Scales come after the noise.
        close = pytest.approx(0.05, rel=4 / (2 * 3072) ** 0.5)
        assert (made[experts.format(1, part)] / factor - parents[1][MLP.format(part)]).std() == close
        switch = 2.0 if part == "down" else 1.0  # Qwen2-MoE halves its shared expert
        close = pytest.approx(0.01, rel=4 / (2 * 3072) ** 0.5)
        assert (made[shared.format(part)] / switch - parents[2][MLP.format(part)]).std() == close


@pytest.mark.long
def test_a_blueprint_repeats_it(branches: Branches, tmp_path: Path) -> None:
    listed = told(branches(3), {"scale": 0.3}, {"noise": 0.1}, {"shared": True, "scale": 0.7, "noise": 0.2})
    upcycle.convert(None, tmp_path / "one", sources=listed, **MIX)
    upcycle.convert(None, tmp_path / "two", blueprint=tmp_path / "one" / "blueprint.safetensors", sources=listed)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.long
def test_half_precision_rounds_a_scaled_expert_once(branches: Branches, tmp_path: Path) -> None:
    sources = branches(3)
    listed = told(sources, {"scale": 0.1}, {}, {"shared": True, "scale": 0.1})
    result = upcycle.convert(None, tmp_path / "out", sources=listed, dtype="bfloat16", **MIX)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    made = load_file(tmp_path / "out" / "model.safetensors")
    for where, source, factor in (("experts.0", 0, 0.1), ("shared_expert", 2, 0.2)):
        dense = load_file(sources[source] / "model.safetensors")[MLP.format("down")].bfloat16()
        assert torch.equal(made[f"model.layers.1.mlp.{where}.down_proj.weight"], dense * factor)


@pytest.mark.long
def test_copies_of_one_model_with_a_shared_one_are_not_promised_exact(branches: Branches, tmp_path: Path) -> None:
    listed = told(branches(3, 0.0), {}, {}, {"shared": True})
    result = upcycle.convert(None, tmp_path / "out", sources=listed, **MIX)
    assert result.plan.promise == "approximate"
    assert "has 'shared': the layer is not the average of the sources' FFNs" in result.plan.promise_reason
    assert result.verification is not None
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < 1e-6


@pytest.mark.long
def test_symphony_aligns_the_shared_one_too(branches: Branches, tmp_path: Path) -> None:
    listed = told(branches(3), {}, {}, {"shared": True})
    keys = {**MIX, "method": "symphony", "calibration": {"text": "demo", "tokens": 256, "window": 64}}
    result = upcycle.convert(None, tmp_path / "out", sources=listed, **keys)
    assert result.plan.target == "qwen2_moe"
    assert result.verification is not None
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < 1e-6


@pytest.mark.parametrize(
    ("roles", "keys", "message"),
    [
        ([{"shared": True}, {"shared": True}, {}], {}, "1 of 3 are not 'shared'"),
        ([{}, {}, {"shared": True}], {"shared": 2}, "has 1 shared experts, not 2: a recipe's sources say"),
        ([{}, {}, {"scale": 0.0}], {}, "key 'sources.scale'"),
        ([{}, {}, {"noise": -1.0}], {}, "key 'sources.noise'"),
        ([{}, {}, {"shared": True}], {"method": "model_glue", "calibration": "demo"}, "has 'shared', and model_glue"),
        ([{}, {"scale": 2.0}, {}], {"method": "branch_train_merge"}, "has 'scale', and branch_train_merge"),
    ],
)
def test_bad_input(roles: list[dict[str, Any]], keys: dict[str, Any], message: str, branches: Branches) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(None, sources=told(branches(3), *roles), **{"method": "branch_train_mix", **keys})


def test_a_target_without_shared_experts_is_refused(branches: Branches) -> None:
    listed = told(branches(3), {}, {}, {"shared": True})
    with pytest.raises(RefusalError, match="mixtral cannot hold shared experts") as caught:
        upcycle.plan(None, sources=listed, method="branch_train_mix", target="mixtral")
    assert "--target qwen2_moe" in str(caught.value.hint)
