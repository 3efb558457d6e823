"""Models of parts: what is refused, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_towers import changed, reconfigured

import upcycle
from upcycle.checkpoints.find_family import family_of
from upcycle.errors import CheckpointError, RefusalError, UpcycleError, UsageError
from upcycle.trainers.forecast.plan_training import plan_training

COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "tokenizer": "none"}
CHECKED: dict[str, Any] = {**COPIES, "verification": {"tokens": 64}}
UNCHECKED: dict[str, Any] = {**COPIES, "verification": {"enabled": False}}


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        (
            {"model_type": "bitnet"},
            "a 'llava' model: its text model is a 'bitnet' model, and of that, it norms inside its FFN",
            "llama",
        ),
        (
            {"model_type": "mixtral"},
            "its text model is a 'mixtral' model, and of that, it is a Mixture-of-Experts",
            "qwen3",
        ),
        (
            {"model_type": "xglm"},
            "its text model is a 'xglm' model, and of that, this version has no family for it",
            "",
        ),
        ({"hidden_act": "x"}, r"config\.json: text_config: 'hidden_act' must be one of", "correct"),
        (
            {"num_key_value_heads": 3},
            "text_config: 'num_attention_heads' 4 is not a multiple of 'num_key_value_heads' 3",
            "",
        ),
    ],
)
def test_text_models_that_cannot_be_converted_are_refused_by_name(
    changes: dict[str, Any], message: str, hint: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    source = reconfigured(tower("llava", "llama"), tmp_path / "source", text_config=changes)
    with pytest.raises(UpcycleError, match=message) as caught:
        upcycle.convert(str(source), tmp_path / "out", **COPIES)
    assert hint in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "qwen3_vl_moe"}, "'qwen3_vl_moe' model: it is a Mixture-of-Experts already"),
        ({"model_type": "glm46v"}, "'glm46v' model: this version has no family for it"),
        (
            {"model_type": "paligemma", "text_config": {"model_type": "gemma"}},
            "reads image and prompt in both directions",
        ),
        ({"model_type": "qwen2_audio", "text_config": {"model_type": "qwen2"}}, "no conversion can be verified on one"),
        ({"model_type": "other", "text_config": {"model_type": "qwen2"}}, "it is multimodal .*'qwen2'"),
    ],
)
def test_models_of_parts_that_are_no_wrapper_of_a_dense_text_model_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(RefusalError, match=message):
        family_of(raw, "here")


TOWER = "vision_tower.encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(TOWER), r"tensor 'model\.vision_tower\.encoder\.layers\.1\.mlp\.fc1\.weight' is missing"),
        (lambda t: t.pop("multi_modal_projector.linear_1.bias"), "projector.linear_1.bias' is missing"),
        (lambda t: t.update({TOWER: t[TOWER][:-1]}), r"fc1\.weight' has shape \[39, 32\], config.json says \[40, 32\]"),
        (
            lambda t: t.pop("language_model.model.layers.2.mlp.up_proj.weight"),
            "layers.2.mlp.up_proj.weight' is missing",
        ),
        (lambda t: t.update({"vision_tower.extra": torch.ones(2)}), "'vision_tower.extra'"),
        (lambda t: t.update({TOWER: t[TOWER].to(torch.int8)}), "the weights are quantized"),
    ],
)
def test_tensors_that_do_not_belong_to_the_parts_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    source = changed(tower("llava", "llama"), tmp_path / "source", change)
    with pytest.raises(UpcycleError, match=message):
        upcycle.convert(str(source), tmp_path / "out", **COPIES)
    assert not (tmp_path / "out").exists()


def test_a_tower_with_nan_is_refused_with_its_file(tower: Callable[..., Path], tmp_path: Path) -> None:
    source = changed(tower("llava", "llama"), tmp_path / "source", lambda t: t[TOWER].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor '.*fc1\.weight' holds NaN"):
        upcycle.convert(str(source), tmp_path / "out", **COPIES)


@pytest.mark.parametrize(
    ("part", "why"), [("vision", "encoder of images has FFNs with biases"), ("connector", "projection between")]
)
def test_other_parts_are_refused_with_the_reason(
    part: str, why: str, tower: Callable[..., Path], pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RefusalError, match=f"part: the {part} of a llava model cannot be converted: .*{why}") as caught:
        upcycle.convert(str(tower("llava", "llama")), tmp_path / "out", part=part, **COPIES)
    assert "part: language" in str(caught.value.hint)
    with pytest.raises(UsageError, match=f"a llama model is a text model, and has no part '{part}'"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", part=part, **COPIES)
    with pytest.raises(RefusalError, match=f"part: the {part}"):
        upcycle.convert(
            str(tower("llava", "llama")), tmp_path / "out", part=part, method="static_prune", width=64,
            calibration={"text": "demo", "tokens": 512, "window": 64},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "changes", "target"),
    [
        ("gemma", {}, "granitemoe"),
        ("granite", {"attention_multiplier": 8**-0.5, "residual_multiplier": 1.0, "attention_bias": False}, "mixtral"),
    ],
)
def test_targets_that_would_multiply_images_otherwise_are_refused(
    text: str, changes: dict[str, Any], target: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    """Gemma's table multiplies words alone, Granite's text model multiplies images, too."""
    with pytest.raises(RefusalError, match=f"{target} cannot hold .*(images beside embeddings|multipliers on)"):
        upcycle.convert(str(tower("llava", text, **changes)), tmp_path / "out", target=target, **COPIES)


def test_what_takes_text_models_alone_says_so(tower: Callable[..., Path], tmp_path: Path) -> None:
    source = str(tower("llava", "llama"))
    with pytest.raises(RefusalError, match="depth_stack does not take a 'llava' model"):
        upcycle.convert(source, tmp_path / "out", method="depth_stack", tokenizer="none")
    with pytest.raises(RefusalError, match="the forecast counts text models alone; upcycle train takes it"):
        plan_training({"model": source, "stages": [{"steps": 1, "learning_rate": 1e-4}]}, world="1xH100")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
