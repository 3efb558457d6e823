"""What every target promises: pico models of every family convert, load in stock transformers and give the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import COMMON, PICO
from transformers import AutoConfig, AutoModelForCausalLM

import upcycle
from upcycle.architectures.dense.base import DenseConfig, Feature
from upcycle.architectures.moe.base import refuse_unheld
from upcycle.errors import RefusalError
from upcycle.files import hashing, records
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.registry import FAMILIES, TARGETS, load
from upcycle.verification import verify_experts

RANDOM_IDS = {"tokenizer": "none"}  # to verify on: tokenizing the embedded texts would take longer than all the rest
UPCYCLED = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, **RANDOM_IDS}
SPLIT = {"method": "random_split", "experts": 8, "top_k": 8, **RANDOM_IDS}
SLICED = {"method": "contiguous_split", "experts": 8, "top_k": 8, **RANDOM_IDS}
SHARED = {"shared": 4}


def dense_config(name: str) -> DenseConfig:
    """Of a pico model, which need not be made for it."""
    model_type, changes = PICO[name]
    config: DenseConfig = load("family", model_type)().config({**COMMON, **changes, "model_type": model_type})
    return config


def cells() -> list[tuple[str, str]]:
    """Every pico model with every target of its family that holds it."""
    return [
        (name, target)
        for name, (family, _) in PICO.items()
        for target in load("family", family).targets
        if not load("target", target)().lacks(dense_config(name))
    ]


def split_for(target: str) -> dict[str, Any]:
    """With shared experts where they can be held, and as many experts as the router can choose at once."""
    most = load("target", target).top_k
    split = SPLIT | ({"experts": most, "top_k": most} if most else {})
    return split | SHARED if Feature.SHARED_EXPERTS in load("target", target).holds else split


# pico model, target, keys: every cell with copies, every family and target (their first cell) with a split too
FIRST = {(PICO[name][0], target): name for name, target in reversed(cells())}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *((name, target, UPCYCLED) for name, target in cells()),
    *((name, target, split_for(target)) for (_, target), name in FIRST.items()),
    *((name, target, SLICED) for name in ("llama", "mistral-window") for target in ("mixtral", "qwen2_moe")),
    ("qwen2-windows", "qwen2_moe", SLICED | SHARED),
]
ONE_PER_TARGET = {target: name for name, target in reversed(cells())}
# fp32, three layers: a few roundings of 6e-8 each; a wrong rope, window or norm gives errors of order one. The 1e-6 that
# LFM2-MoE adds to the sum of the chosen scores is as large as all of them.
TOLERANCE = {"lfm2_moe": 1e-5}


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of a folder loaded as any user would."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


@pytest.mark.one_in(36)
@pytest.mark.parametrize(
    ("name", "target", "keys"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_stock_transformers_gives_the_dense_logits(
    name: str, target: str, keys: dict[str, Any], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    checked = {"tokens": 64} if keys is UPCYCLED else {"enabled": False}
    result = upcycle.convert(str(pico(name)), tmp_path / "out", target=target, verification=checked, **keys)
    assert result.plan.target == target
    if result.verification is not None:
        assert result.verification.verdict == "exact"
    ids = torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3))
    expected, actual = logits(pico(name), ids), logits(tmp_path / "out", ids)
    assert torch.linalg.norm(actual - expected) < TOLERANCE.get(target, 2e-6) * torch.linalg.norm(expected)


def test_every_family_and_target_has_a_cell() -> None:
    listed = {(family, target) for family in FAMILIES for target in load("family", family).targets}
    assert set(FIRST) == listed
    assert {target for _, target in listed} == set(TARGETS)


@pytest.mark.one_in(60)
@pytest.mark.parametrize("target", TARGETS)
def test_both_layouts_load_bit_equal_and_stream(
    target: str, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    source, states = str(pico(ONE_PER_TARGET[target])), []
    keys = split_for(target) | {"target": target, "verification": {"tokens": 64}}
    for layout in ("per-expert", "fused"):
        result = upcycle.convert(source, tmp_path / layout, layout=layout, **keys).verification
        assert result is not None
        assert result.streamed
        assert result.verdict == "exact"
        states.append(AutoModelForCausalLM.from_pretrained(tmp_path / layout).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.one_in(16)
@pytest.mark.parametrize("target", TARGETS)
def test_sparse_splits_add_up_with_every_expert_active(
    target: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    sparse = {"experts": 8, "top_k": load("target", target).top_k or 3}
    keys = split_for(target) | {"target": target, **sparse, "verification": {"tokens": 64}}
    result = upcycle.convert(str(pico(ONE_PER_TARGET[target])), tmp_path / "out", **keys).verification
    assert result is not None
    assert result.verdict == "approximate"
    assert result.all_experts_error is not None
    assert result.all_experts_error < 1e-6


@pytest.mark.one_in(12)
@pytest.mark.parametrize("target", TARGETS)
def test_the_cool_router_keeps_its_bound_on_every_target(
    target: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    keys = {"target": target, "router": {"name": "cool", "parameters": {"tolerance": 0.01}}, **UPCYCLED}
    upcycle.convert(str(pico(ONE_PER_TARGET[target])), tmp_path / "out", verification={"enabled": False}, **keys)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and hasattr(module, "top_k"):
            module.register_forward_hook(lambda _, __, output: seen.append(output[1]))
    with torch.no_grad():
        model(torch.randint(4096, (2, 48), generator=torch.Generator().manual_seed(3)))
    weights = torch.cat([found.view(-1, 2) for found in seen])
    assert len(weights) == 3 * 96
    assert (weights.max(dim=1).values <= 1.01 * weights.min(dim=1).values).all()
    assert (weights.sum(dim=1) - load("target", target)().weight_sum).abs().max() < 1e-5


@pytest.mark.one_in(16)
@pytest.mark.parametrize("target", [t for t in TARGETS if Feature.DENSE_FIRST in load("target", t).holds])
def test_dense_layers_come_first(target: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    keys = {"target": target, "layers": [1, 2], **UPCYCLED}
    result = upcycle.convert(str(pico(ONE_PER_TARGET[target])), tmp_path / "out", **keys)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    names = SafetensorsFolder(tmp_path / "out").specs
    assert not any(".experts." in name for name in names if name.startswith("model.layers.0."))


@pytest.mark.parametrize(("name", "layers"), [("qwen2", "every-other"), ("qwen3", "except-last:1"), ("llama", [0, 2])])
def test_dense_layers_are_mixed_in(name: str, layers: Any, pico: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", layers=layers, **UPCYCLED)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_only_layers"] == {"every-other": [0, 2], "except-last:1": [2]}.get(str(layers), [1])


def test_config_is_complete_for_old_and_new_loaders(pico: Callable[[str], Path], tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama-rope")), tmp_path / "out", **UPCYCLED)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    dense = AutoConfig.from_pretrained(pico("llama-rope"))
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert loaded.rope_parameters == dense.rope_parameters
    assert raw["rope_theta"] == dense.rope_parameters["rope_theta"]
    assert raw["rope_scaling"]["rope_type"] == "llama3"
    assert loaded.tie_word_embeddings is True
    assert loaded.num_local_experts == 4
    assert "auto_map" not in raw


REFUSED = [
    ("llama", {"target": "mixtral", "shared": 4, **SPLIT}, "cannot hold shared experts", "--target qwen2_moe"),
    ("llama", {"target": "mixtral", "layers": [0], **UPCYCLED}, "dense layers", "--target qwen2_moe"),
    ("llama", {"target": "qwen3_moe", **UPCYCLED}, "without norms", "--target mixtral"),
    ("qwen2", {"target": "mixtral", **UPCYCLED}, "biases on the q, k and v", "--target qwen2_moe"),
    ("qwen2-windows", {"target": "mixtral", **UPCYCLED}, "some layers only", "--target qwen2_moe"),
    ("qwen3", {"target": "qwen3_moe", "shared": 4, **SPLIT}, "cannot hold shared experts", "--target dots1"),
    ("qwen3-windows", {"target": "qwen3_moe", **UPCYCLED}, "some layers only", "--target mellum"),
    ("llama-bias", {"target": "mixtral", **UPCYCLED}, "a bias on the attention output", "--target granitemoe"),
    ("phi3-partial", {"target": "solar_open", **UPCYCLED}, "partial_rotary_factor 0.5", "--target mixtral"),
    ("granite", {"target": "mixtral", **UPCYCLED}, "embedding_multiplier 3.0", "--target granitemoe"),
    ("olmo2", {"target": "qwen3_moe", **UPCYCLED}, "norms behind attention", "--target flex_olmo"),
    ("llama", {"target": "glm4_moe", "layers": [0], **UPCYCLED}, "dense layers between", "--target qwen2_moe"),
    ("mistral", {"target": "granitemoe", **UPCYCLED}, "not a conversion this version was tested", "--target mixtral"),
    ("qwen3", {"target": "mixtral", **UPCYCLED}, "per-head query and key norms", "--target qwen3_moe"),
    ("stablelm", {**UPCYCLED, "top_k": 3}, "always runs 2 experts per token, and 'top_k' is 3", "--top-k 2"),
    ("stablelm", {"target": "mixtral", **UPCYCLED}, "LayerNorms instead of RMSNorms", "--target phimoe"),
    ("stablelm", {"layers": [0], **UPCYCLED}, "dense layers", "no target that can"),
]


@pytest.mark.parametrize(("name", "keys", "what", "hint"), REFUSED)
def test_what_cannot_be_held_is_refused_with_the_target_that_could(
    name: str, keys: dict[str, Any], what: str, hint: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusalError, match=what) as caught:
        upcycle.convert(str(pico(name)), tmp_path / "out", **keys)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


TRAPS: list[tuple[str, str, dict[str, Any]]] = [
    ("qwen2", "qwen2_moe", {"norm_topk_prob": False}),
    ("qwen3", "qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3", "dots1", {"norm_topk_prob": False}),
    ("qwen3", "dots1", {"routed_scaling_factor": 2.5}),
    ("qwen3-windows", "mellum", {"layer_types": ["full_attention"] * 3}),
    # Not norm_topk_prob: the norm behind FlexOlmo's experts takes any common factor out again.
    ("olmo2", "flex_olmo", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("lfm2", "lfm2_moe", {"norm_topk_prob": False}),
    ("granite-plain", "granitemoe", {"attention_multiplier": 1.0}),
    ("granite", "granitemoe", {"residual_multiplier": 1.0}),
    ("gemma", "granitemoe", {"embedding_multiplier": 1.0}),
    ("gemma", "mixtral", {"hidden_act": "gelu"}),  # without the tanh
    ("gemma", "qwen2_moe", {"rms_norm_eps": 1e-5}),
    (
        "llama-rope",
        "mixtral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rope_scaling": None},
    ),
    ("llama", "mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0}),
    (
        "phi3-partial",
        "glm4_moe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "partial_rotary_factor": 1.0},
    ),
    ("youtu", "deepseek_v3", {"rope_interleave": False}),
    (
        "minicpm3",
        "deepseek_v3",
        {"rms_norm_eps": 0.01},
    ),  # the model's own, before its residuals' multiplier was taken out
    (
        "phi3-partial-longrope",
        "mixtral",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": None},
    ),
    ("cohere2", "cohere2_moe", {"rms_norm_eps": 1e-5}),
    ("cohere2", "cohere2_moe", {"logit_scale": 1.0}),
]
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 500.0}
# For every other family that goes there.
TRAP_OF: dict[str, dict[str, Any]] = {
    "mixtral": ROPE,
    "ernie4_5_moe": ROPE,
    "hunyuan_v1_moe": ROPE,
    "qwen2_moe": {"norm_topk_prob": False},
    "glm4_moe": {"norm_topk_prob": False},
    "solar_open": {"norm_topk_prob": False},
    "dots1": {"norm_topk_prob": False},
    "deepseek_v3": {"routed_scaling_factor": 2.5},
    "mellum": {"norm_topk_prob": False},
    "granitemoe": {"attention_multiplier": 1.0},
    "granitemoeshared": {"attention_multiplier": 1.0},
    "granitemoe_swa": {"layer_rope_theta": [500.0] * 3},
    "qwen3_5_moe_text": {"rms_norm_eps": 1e-4},
    "cohere2_moe": {"logit_scale": 1.0},
    "gpt_oss": {"swiglu_alpha": 1.702},
    "phimoe": {"router_jitter_noise": 0.3},
}
SET = {(PICO[name][0], target) for name, target, _ in TRAPS}
TRAPS += [(name, cell[1], TRAP_OF.get(cell[1], {})) for cell, name in FIRST.items() if cell not in SET]


@pytest.mark.one_in(80)
@pytest.mark.parametrize(("name", "target", "changes"), TRAPS)
def test_a_wrong_key_is_found_by_verify(
    name: str, target: str, changes: dict[str, Any], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    assert changes, f"TRAP_OF has no key of {target} with a wrong value for it"
    out, keys = tmp_path / "out", {"target": target, "verification": {"enabled": False}, **UPCYCLED}
    upcycle.convert(str(pico(name)), out, **keys)
    config = json.loads((out / "config.json").read_text())
    assert set(changes) <= set(config) | {"rope_scaling"}  # nothing that matters was left to a default
    (out / "config.json").write_text(json.dumps(config | changes))
    record = records.read_record(out)
    record["files"]["config.json"] = hashing.hash_file(out / "config.json")
    (out / records.FILE).write_text(json.dumps(record))
    assert upcycle.verify(out, tokens=64).verdict == "broken"


def test_a_window_that_is_never_reached_is_left_out_where_there_is_none(pico: Callable[[str], Path]) -> None:
    plan = upcycle.plan(str(pico("phi3-idle-window")), experts=2)
    assert plan.target == "glm4_moe"
    assert any("sliding window of 512 is never reached within 512 positions" in warning for warning in plan.warnings)
    dense = replace(dense_config("phi3-idle-window"), windows=(511,) * 3)
    family, target = load("family", "phi3")(), load("target", "glm4_moe")()
    assert target.lacks(dense) == [Feature.WINDOW]
    assert load("target", "mixtral")().stored(dense).windows == dense.windows
    with pytest.raises(RefusalError, match="a sliding window on every layer") as caught:
        refuse_unheld(target, family, dense, (), [load("target", name)() for name in ("solar_open", "glm4_moe")])
    assert "solar_open: a sliding window on every layer, a rotary embedding of a part of each head" in str(
        caught.value.hint
    )
    assert "glm4_moe: a sliding window on every layer" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"mlp_gated": False}, "an FFN without a gate"), ({"mlp_bias": True}, r"biases in the FFN \(mlp_bias True\)")],
)
@pytest.mark.parametrize("name", TARGETS)
def test_ffns_that_no_expert_of_a_target_can_be_are_refused_by_name(
    name: str, changes: dict[str, Any], what: str
) -> None:
    family, target = load("family", "llama")(), load("target", name)()
    dense = replace(dense_config("llama"), **changes)
    if target.holds >= dense.features:
        pytest.skip(f"{name} has such experts")
    assert (dense.ffn_form.gated, bool(dense.ffn_form.biases)) == ("mlp_gated" not in changes, "mlp_bias" in changes)
    with pytest.raises(RefusalError, match=f"{name} cannot hold .*{what}"):
        refuse_unheld(target, family, dense, (), [target])
