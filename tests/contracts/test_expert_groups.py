"""Routers that choose groups of experts first (DeepSeek-V3): cuts keep as many experts of every group, each group by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_oracle import block_of, layers_of, some_windows, stock, watch, without_experts
from pico_models import LATENT
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stored_moe import MoeModel, expert_index
from upcycle.calibration.compressing.observe_moe import observe_layers
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import RefusalError, UsageError
from upcycle.methods.compressing.observations import Observations
from upcycle.progress import SILENT
from upcycle.registry import METHODS, load

GROUPS, SIZE = 2, 4
E = GROUPS * SIZE
GROUPED: dict[str, Any] = {
    **{"n_routed_experts": E, "n_group": GROUPS, "topk_group": 1, "norm_topk_prob": True, "first_k_dense_replace": 0},
    **{**LATENT, "num_key_value_heads": 4, "head_dim": 4, "routed_scaling_factor": 1.5},
}
TEXT: dict[str, Any] = {"text": "demo", "tokens": 1024, "window": 32}  # with 512, two experts are used equally often
QUICK: dict[str, Any] = {"keep": 0.75, "calibration": TEXT, "verification": {"tokens": 64}}
BY_GROUP = ["frequency", "reap", "random_experts", "hc_smoe", "m_smoe", "ream"]
WHOLE = {
    "lower_top_k": 0.5,
    "sparse_experts": 0.5,
    "qmoe": 0.5,
    "block_drop": 0.5,
}  # all experts stay, or whole layers go


@pytest.fixture(scope="module")
def grouped(moe_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moe_maker(tmp_path_factory.mktemp("grouped"), "deepseek_v3", GROUPED)


def rows_of(out: Path) -> dict[int, list[int]]:
    content = json.loads((out / "compression.json").read_text())["experts"]
    return {int(layer): cut["rows"] for layer, cut in content.items()}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(some_windows(2, 24), use_cache=False).logits)


def test_all_that_keep_groups_are_here() -> None:
    assert {name for name in METHODS if getattr(load("method", name), "grouped", False)} == set(BY_GROUP)


def test_what_is_observed_is_what_such_a_router_does(grouped: Path, tmp_path: Path) -> None:
    """Restated token by token in fp64: two largest per group add up, the best group's experts alone are chosen."""
    windows = some_windows(3, 24)
    model = stock(grouped)
    seen, whole = (
        watch(model, windows),
        observe_layers(MoeCheckpoint.open(str(grouped)), "keep", windows, {}, SILENT, tmp_path / "s"),
    )
    for index, layer in seen.items():
        bias = block_of(layers_of(model)[index]).gate.e_score_correction_bias.tolist()
        expected = torch.zeros(len(layer.x), E)
        for token, own in enumerate(layer.logits.sigmoid().tolist()):
            choice = [score + added for score, added in zip(own, bias, strict=True)]
            sums = [sum(sorted(choice[g * SIZE : (g + 1) * SIZE])[-2:]) for g in range(GROUPS)]
            group = sums.index(max(sums))
            chosen = sorted(range(group * SIZE, (group + 1) * SIZE), key=lambda e: -choice[e])[:2]
            for expert in chosen:
                expected[token, expert] = 1.5 * own[expert] / sum(own[e] for e in chosen)
        torch.testing.assert_close(whole.layers[index].sample_weights, expected, rtol=1e-4, atol=1e-5)
        chosen_often = whole.layers[index].load
        assert torch.equal(chosen_often, (expected > 0).sum(0).double())


@pytest.mark.one_in(5)
@pytest.mark.parametrize("method", [*BY_GROUP, *WHOLE])
def test_the_result_has_the_same_groups_loads_and_writes(method: str, grouped: Path, tmp_path: Path) -> None:
    keys = {**QUICK, "keep": WHOLE.get(method, 0.75)}
    result = upcycle.convert(str(grouped), tmp_path / "out", method=method, **keys)
    assert result.verification is not None
    assert result.verification.relative_logit_error > 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"]) == (GROUPS, 1)
    if method in BY_GROUP:
        assert config["n_routed_experts"] == 6
        for rows in rows_of(tmp_path / "out").values():
            assert [row // SIZE for row in rows] == [0, 0, 0, 1, 1, 1]
        terms = json.loads((tmp_path / "out" / "compression.json").read_text())["experts"].values()
        for cut in terms:
            for place, own in enumerate(cut["experts"]):
                assert {term["expert"] // SIZE for term in own} == {place // 3}, "merged within its group"
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)


@pytest.mark.long
def test_a_dense_model_comes_of_groups_as_of_others(grouped: Path, tmp_path: Path) -> None:
    result = upcycle.convert(str(grouped), tmp_path / "out", method="to_dense", **{**QUICK, "keep": 0.25})
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "youtu"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("method", ["reap", "naee", "hc_smoe"])
def test_keeping_all_changes_nothing(method: str, grouped: Path, tmp_path: Path) -> None:
    found = upcycle.convert(str(grouped), tmp_path / "out", method=method, keep=1.0, verification={"tokens": 64})
    assert found.verification is not None
    assert (found.verification.verdict, found.verification.relative_logit_error) == ("exact", 0.0)
    before, after = load_file(grouped / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_the_best_of_each_group_stay_and_nothing_else_changes(grouped: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen.safetensors"
    upcycle.observe(str(grouped), seen, "demo", 512)
    keys = {"keep": 0.5, "refit": "none", "observations": str(seen), "verification": {"tokens": 64}}
    upcycle.convert(str(grouped), tmp_path / "out", method="reap", **keys)
    kept = rows_of(tmp_path / "out")
    for layer, own in Observations.read(seen).layers.items():
        scores = (own.saliency / own.load.clamp(min=1)).tolist()
        ranked = [sorted(range(g * SIZE, (g + 1) * SIZE), key=lambda e: -scores[e]) for g in range(GROUPS)]
        assert kept[layer] == [expert for group in ranked for expert in sorted(group[:2])]
    expected = logits(without_experts(stock(grouped), grouped, kept))
    assert torch.dist(logits(stock(tmp_path / "out")), expected) < 1e-9 * torch.linalg.norm(expected)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("method", ["reap", "hc_smoe", "m_smoe", "ream"])
def test_the_order_of_groups_and_inside_them_does_not_matter(method: str, grouped: Path, tmp_path: Path) -> None:
    order = [6, 4, 7, 5, 1, 3, 0, 2]
    other = shutil.copytree(grouped, tmp_path / "permuted")
    tensors, changed = load_file(other / "model.safetensors"), {}
    model = MoeModel.read(
        json.loads((other / "config.json").read_text()), MoeCheckpoint.open(str(other)).store.specs, ""
    )
    for name, tensor in tensors.items():
        role, expert = model.role(name), expert_index(name)
        if role == "expert" and expert is not None:
            changed[name.replace(f".experts.{expert}.", f".experts.{order.index(expert)}.")] = tensor
        else:
            changed[name] = tensor[order].contiguous() if role in ("router", "bias") else tensor
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    assert torch.dist(logits(stock(other)), logits(stock(grouped))) < 1e-9
    for source, out in ((grouped, "one"), (other, "two")):
        upcycle.convert(str(source), tmp_path / out, method=method, **{**QUICK, "verification": {"enabled": False}})
    one, two = (logits(stock(tmp_path / out)) for out in ("one", "two"))
    assert torch.dist(one, two) < 1e-4 * torch.linalg.norm(one)


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "naee"},
        {"method": "eep"},
        {"method": "moe_i2"},
        {"method": "reap", "target": "upcycle_moe"},
        {"method": "expert_upcycling", "experts": 16},
    ],
    ids=lambda keys: keys["method"],
)
def test_what_would_change_groups_is_refused(keys: dict[str, Any], grouped: Path) -> None:
    quick = {} if keys["method"] == "expert_upcycling" else QUICK
    with pytest.raises(RefusalError, match="routers choose among 2 groups of experts first") as caught:
        upcycle.plan(str(grouped), **{**quick, **keys})
    assert "frequency, reap, hc_smoe" in str(caught.value.hint)


def test_groups_of_deepseek_v2_are_not_read(moe_maker: Callable[..., Path], tmp_path: Path) -> None:
    changes = {**GROUPED, "q_lora_rank": None, "topk_method": "group_limited_greedy"}
    folder = moe_maker(tmp_path / "moe", "deepseek_v2", changes)
    with pytest.raises(RefusalError, match="what the router of this 'deepseek_v2' model does is none of the rules"):
        upcycle.convert(str(folder), tmp_path / "out", method="reap", **QUICK)


@pytest.mark.parametrize("keep", [0.625, 0.25])
def test_groups_of_different_sizes_or_too_small_are_refused_with_what_divides(keep: float, grouped: Path) -> None:
    with pytest.raises(UsageError, match=r"each of 2 groups .* must have as many, and 2 at least") as caught:
        upcycle.plan(str(grouped), method="reap", **{**QUICK, "keep": keep})
    assert "--keep 0.75, 0.5" in str(caught.value.hint)
