"""What every model of parts promises: its text model is a MoE with the same logits, on text and images; the rest is untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO
from pico_towers import CASES, PARTS
from safetensors.torch import load_file
from tower_runs import difference, loaded, with_image

import upcycle
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.conversion.expert_conversion import ExpertConversion
from upcycle.errors import RefusalError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.planning.job import method_of
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.registry import WRAPPERS, load
from upcycle.verification import verify_experts

RANDOM_IDS = {"tokenizer": "none"}
UPCYCLED = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, **RANDOM_IDS}
STREAMED = [
    case for case in CASES if case[0] in ("llava", "mistral3", "smolvlm", "voxtral", "lfm2_vl", "qwen3_vl", "qwen3_5")
][::2]
# fp32, three layers: a few roundings of 6e-8 each, as in test_targets; LFM2-MoE adds 1e-6 to the sum of the chosen scores.
TOLERANCE = {"lfm2_moe": 1e-5}


@pytest.mark.one_in(24)
@pytest.mark.parametrize(("wrapper", "text"), CASES)
@torch.no_grad()
def test_stock_transformers_gives_the_dense_logits_of_texts_and_images(
    wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = tower(wrapper, text), tmp_path / "out"
    result = upcycle.convert(str(source), out, verification={"tokens": 64}, **UPCYCLED)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.media_error is not None
    assert "made by its configuration" in result.verification.media
    allowed = TOLERANCE.get(result.plan.target, 2e-6)
    dense, moe = loaded(source), loaded(out)
    assert any(name.endswith(("experts.gate_up_proj", "experts.gate_up")) for name in moe.state_dict())
    ids = torch.randint(4000, (2, 48), generator=torch.Generator().manual_seed(3))
    assert difference(moe(ids).logits, dense(ids).logits) < allowed
    inputs = with_image(dense, wrapper)
    expected = dense(**inputs).logits
    assert difference(moe(**inputs).logits, expected) < allowed
    name = "pixel_values" if "pixel_values" in inputs else "input_features"
    other = {name: torch.randn(inputs[name].shape)}
    assert difference(dense(**{**inputs, **other}).logits, expected) > 100 * allowed  # the image matters
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    assert torch.equal(dense.generate(**inputs, **greedy), moe.generate(**inputs, **greedy))
    moe.save_pretrained(tmp_path / "again")
    assert difference(loaded(tmp_path / "again")(**inputs).logits, moe(**inputs).logits) < allowed


@pytest.mark.one_in(36)
@pytest.mark.parametrize(("wrapper", "text"), CASES)
def test_other_parts_are_copied_bit_by_bit_under_their_names(
    wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    source = tower(wrapper, text)
    upcycle.convert(str(source), tmp_path / "out", verification={"enabled": False}, **UPCYCLED)
    body = load("wrapper", wrapper).body
    dense, moe = loaded(source).state_dict(), loaded(tmp_path / "out").state_dict()
    parts = {name for name in dense if not name.startswith((f"{body}.", "lm_head."))}
    assert parts == {name for name in moe if not name.startswith((f"{body}.", "lm_head."))}
    assert all(torch.equal(dense[name], moe[name]) for name in parts)
    if load("wrapper", wrapper).moe is not None:
        assert set(load_file(tmp_path / "out" / "model.safetensors")) >= parts  # as the modules of the result's class
        return
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefixes = ("language_model.", "model.language_model.", "model.text_model.")
    (prefix,) = {each for each in prefixes if any(name.startswith(each) for name in before)}
    others = {name for name in before if not name.startswith((prefix, "lm_head."))}
    assert len(others) > 10
    assert all(torch.equal(before[name], after[name]) for name in others)
    made = set(after) - set(before)
    assert made
    assert all(name.startswith(prefix) and (".layers." in name or "lm_head" in name) for name in made)
    assert {name for name in after if not name.startswith((prefix, "lm_head."))} == others


@pytest.mark.one_in(24)
@pytest.mark.parametrize(("wrapper", "text"), STREAMED)
def test_both_layouts_load_bit_equal_and_stream(
    wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    states = []
    for layout in ("per-expert", "fused"):
        keys: dict[str, Any] = {"layout": layout, "verification": {"tokens": 64}, **UPCYCLED}
        result = upcycle.convert(str(tower(wrapper, text)), tmp_path / layout, **keys).verification
        assert result is not None
        assert (result.verdict, result.streamed) == ("exact", True)
        assert result.media_error is not None
        states.append(loaded(tmp_path / layout).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.one_in(16)
@pytest.mark.parametrize(("wrapper", "text"), STREAMED[::2])
def test_text_models_are_split_on_text(wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path) -> None:
    calibration = {"text": "demo", "tokens": 1024, "window": 64}
    keys: dict[str, Any] = {"method": "importance", "experts": 4, "top_k": 2, "refit": "none", "scale": "exact"}
    checked = {"verification": {"tokens": 64}, "calibration": calibration}
    result = upcycle.convert(str(tower(wrapper, text)), tmp_path / "out", **keys, **checked).verification
    assert result is not None
    assert result.verdict == "approximate"
    assert result.all_experts_error is not None
    assert result.all_experts_error < 1e-6
    assert result.media_error is not None
    assert 1e-3 < result.media_error < 2  # a sparse split is another function
    loaded(tmp_path / "out")


@pytest.mark.one_in(36)
@pytest.mark.parametrize("text", PICO)
def test_text_models_of_every_family_fit(text: str, tower: Callable[..., Path], tmp_path: Path) -> None:
    """In one wrapper, as it is one mechanism: names, biases, windows and multipliers are those of the text model alone."""
    if text == "minicpm3":  # its stream is divided for DeepSeek-V3, and images are not
        with pytest.raises(RefusalError, match="images beside embeddings"):
            upcycle.convert(str(tower("llava", text)), tmp_path / "out", **UPCYCLED)
        return
    result = upcycle.convert(str(tower("llava", text)), tmp_path / "out", verification={"tokens": 64}, **UPCYCLED)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.media_error is not None
    assert result.verification.media_error < TOLERANCE.get(result.plan.target, 2e-6)


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_is_tested_and_says_where_its_text_model_is(name: str) -> None:
    wrapper = load("wrapper", name)
    assert name in (wrapper.name, wrapper.result)
    assert wrapper.name in PARTS
    texts = [text for tested, text in CASES if tested == wrapper.name]
    assert len(texts) == (1 if wrapper.name == "qwen3_5" else 2)


@pytest.mark.one_in(36)
@pytest.mark.parametrize(("wrapper", "text"), CASES)
def test_a_plan_needs_no_weights(wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path) -> None:
    """What is planned from config.json alone is what is written."""
    source = tower(wrapper, text)
    recipe = parse_recipe({"source": str(source), "verification": {"enabled": False}, **UPCYCLED}, "here")
    plan = ExpertConversion.of_configs(recipe, method_of(recipe)).cost()
    result = upcycle.convert(str(source), tmp_path / "out", verification={"enabled": False}, **UPCYCLED)
    written = SafetensorsFolder(tmp_path / "out").specs.values()
    assert plan.parameters_total == result.plan.parameters_total == sum(spec.elements for spec in written)
    stored = DenseCheckpoint.open(str(source)).store.specs.values()
    assert plan.parameters_dense == sum(spec.elements for spec in stored)


OWN = [
    ("llava", "llama"),
    ("llava_next", "gemma2"),
    ("idefics3", "gpt2"),
    ("qwen3_5", "qwen3.5-vl"),
    ("smolvlm", "olmo2"),
]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("wrapper", "text"), OWN)
@torch.no_grad()
def test_text_models_of_parts_can_be_wrapped(
    wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    """Also those that no stock MoE holds, which no other target takes."""
    source, out = tower(wrapper, text), tmp_path / "out"
    keys: dict[str, Any] = {"method": "random_split", "experts": 4, "top_k": 4, "target": "upcycle_moe", **RANDOM_IDS}
    result = upcycle.convert(str(source), out, verification={"tokens": 64}, **keys).verification
    assert result is not None
    assert result.verdict == "exact"
    assert result.media_error is not None
    dense, moe = loaded(source), loaded(out)
    inputs = with_image(dense, wrapper)
    assert difference(moe(**inputs).logits, dense(**inputs).logits) < 2e-6
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    made = {name for name in after if name not in before}
    assert all("experts" in name or "router" in name for name in made)
    assert all(torch.equal(before[name], after[name]) for name in after if name not in made)


@pytest.mark.long
@pytest.mark.parametrize(("wrapper", "text"), [("gemma3", "gemma3"), ("llava", "gemma2"), ("llava", "llama")])
def test_wrapped_text_models_of_parts_are_calibrated(
    wrapper: str, text: str, tower: Callable[..., Path], tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 4, "target": "upcycle_moe"}
    keys |= {"calibration": {"text": "prose", "tokens": 4096}, "verification": {"tokens": 256}}
    errors = []
    for refit in ("down", "none"):
        result = upcycle.convert(str(tower(wrapper, text)), tmp_path / refit, refit=refit, **keys).verification
        assert result is not None
        errors.append(result.relative_logit_error)
    assert errors[0] < errors[1]
