"""What every model of parts promises part by part: experts in its encoder of images and its connector compute the dense logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pico_towers import CASES
from safetensors.torch import load_file
from tower_runs import difference, loaded, with_image

import upcycle
import upcycle.models
from upcycle.cli.main import cli
from upcycle.conversion.expert_conversion import ExpertConversion
from upcycle.errors import RefusalError, UsageError, VerificationError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.own.moe_block import MoeBlock
from upcycle.planning.job import method_of
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.verification import media, verify_experts
from upcycle.verification.media import MediaCheck

pytestmark = pytest.mark.one_in(20)  # the other cases are long

Tower = Callable[..., Path]
FIRST = list({wrapper: (wrapper, text) for wrapper, text in reversed(CASES)}.values())[::-1]
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "tokenizer": "none"}
CHECKED: dict[str, Any] = {**COPIES, "verification": {"tokens": 64}}
TOLERANCE = 2e-6  # fp32, as in test_wrappers: a few roundings of 6e-8 in each of up to ten blocks
_ONE = "no MLP of two projections with an activation"
_GATE = "no MLP of two projections: it computes a gate itself"
# What has no such part, and why; all others take both.
REFUSED = {
    ("idefics3", "connector"): _ONE,
    ("smolvlm", "connector"): _ONE,
    ("aya_vision", "connector"): _GATE,
    ("cohere2_vision", "connector"): _GATE,
    ("got_ocr2", "connector"): _ONE,
    ("ovis2", "connector"): _ONE,
    ("gemma3", "connector"): _ONE,
    ("gemma4", "connector"): _ONE,
    ("gemma4", "vision"): "no FFN of a known form",
    ("voxtral", "vision"): "it reads no images",
    ("glmasr", "vision"): "it reads no images",
}


def blocks_of(model: Any, body: str = "language_model") -> dict[bool, list[str]]:
    """The paths of experts: False: in the text model, True: elsewhere."""
    names = [name for name, module in model.named_modules() if isinstance(module, MoeBlock)]
    return {other: [n for n in names if (body not in n and "text_model" not in n) == other] for other in (False, True)}


@pytest.mark.one_in(20)
@pytest.mark.parametrize(("wrapper", "text"), FIRST)
@torch.no_grad()
def test_all_parts_together_give_the_dense_logits_of_texts_and_images(
    wrapper: str, text: str, tower: Tower, tmp_path: Path
) -> None:
    source, out = tower(wrapper, text), tmp_path / "out"
    result = upcycle.convert(str(source), out, part="all", **CHECKED)
    assert result.verification is not None
    assert (result.plan.target, result.verification.verdict) == ("upcycle_moe", "exact")
    assert result.verification.media_error is not None
    assert max(result.verification.layer_errors) < 1e-6
    assert "adds nothing" not in result.verification.explanation  # every layer was reached by the text or the image
    dense, moe = loaded(source), loaded(out)
    found = blocks_of(moe)
    assert found[False]
    missing = {part for part in ("vision", "connector") if (wrapper, part) in REFUSED}
    assert len(found[True]) >= 1 or missing == {"vision", "connector"}
    inputs = with_image(dense, wrapper)
    assert difference(moe(**inputs).logits, dense(**inputs).logits) < TOLERANCE
    ids = inputs["input_ids"][:, :9]
    assert difference(moe(ids).logits, dense(ids).logits) < TOLERANCE
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    assert torch.equal(dense.generate(**inputs, **greedy), moe.generate(**inputs, **greedy))
    moe.save_pretrained(tmp_path / "again")
    again = loaded(tmp_path / "again")
    assert difference(again(**inputs).logits, moe(**inputs).logits) < TOLERANCE
    for path in found[
        True
    ]:  # each of them matters, or is one that the class computes for nothing (a last layer that it skips)
        block: Any = moe.get_submodule(path)
        assert block.router.rule.top_k == 2
    for path in found[True]:
        block: Any = moe.get_submodule(path)
        assert (block.router.rule.top_k, block.experts.count) == (2, 4)
        block.experts.down.mul_(1.5)
    assert not found[True] or difference(moe(**inputs).logits, dense(**inputs).logits) > 100 * TOLERANCE


@pytest.mark.one_in(20)
@pytest.mark.parametrize("part", ["vision", "connector"])
@pytest.mark.parametrize(("wrapper", "text"), FIRST)
def test_a_single_part_becomes_experts_or_is_refused_with_the_reason(
    wrapper: str, text: str, part: str, tower: Tower, tmp_path: Path
) -> None:
    source, out = tower(wrapper, text), tmp_path / "out"
    if (why := REFUSED.get((wrapper, part))) is not None:
        with pytest.raises(RefusalError, match=f"part: '{part}' of a {wrapper} model cannot be converted: .*{why}"):
            upcycle.convert(str(source), out, part=part, **CHECKED)
        assert not out.exists()
        return
    result = upcycle.convert(str(source), out, part=part, **CHECKED).verification
    assert result is not None
    assert result.verdict == "exact"
    assert result.media_error is not None
    assert 0 < result.media_error < TOLERANCE
    before, after = SafetensorsFolder(source), SafetensorsFolder(out)
    kept = set(before.specs) & set(after.specs)
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)
    made = set(after.specs) - kept
    assert all("experts" in name or "router" in name for name in made)
    assert not any(name.startswith(("language_model.", "model.language_model.", "model.text_model.")) for name in made)


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "random_split", "experts": 4, "top_k": 4},
        {"method": "random_split", "experts": 3, "shared": 1, "top_k": 3},
    ],
)
def test_splits_of_all_parts_are_exact_with_all_experts(keys: dict[str, Any], tower: Tower, tmp_path: Path) -> None:
    """Also of a connector whose stream is another one than the encoder's, and with a shared expert in it."""
    source = tower("llava", "llama", hidden_size=48, head_dim=12)
    checked: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}, "part": "all", **keys}
    result = upcycle.convert(str(source), tmp_path / "out", **checked).verification
    assert result is not None
    assert result.verdict == "exact"
    connector: Any = loaded(tmp_path / "out").model.multi_modal_projector.linear_1
    assert (connector.router.reads, connector.experts.down.shape[1]) == (32, 48)


def test_sparse_splits_are_measured_on_images(tower: Tower, tmp_path: Path) -> None:
    keys: dict[str, Any] = {**CHECKED, "method": "random_split", "top_k": 2, "part": "vision,connector"}
    result = upcycle.convert(str(tower("llava", "llama")), tmp_path / "out", **keys).verification
    assert result is not None
    assert (result.verdict, result.relative_logit_error) == ("approximate", 0.0)  # texts meet no expert
    assert result.all_experts_error is not None
    assert result.all_experts_error < 1e-6
    assert result.media_error is not None
    assert 1e-3 < result.media_error < 2


@torch.no_grad()
def test_bfloat16_is_no_worse_than_the_dense_models_own(tower: Tower, tmp_path: Path) -> None:
    source = tower("llava", "llama")
    upcycle.convert(str(source), tmp_path / "out", part="all", **COPIES, verification={"enabled": False})
    exact = loaded(source)
    inputs = with_image(exact, "llava")
    expected = exact(**inputs).logits
    errors = []
    for folder in (source, tmp_path / "out"):
        model = loaded(folder).bfloat16()
        halved = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
        errors.append(difference(model(**halved).logits.float(), expected))
    # Sums of two halves of equal outputs are rounded once more, in each of seven blocks beside several products.
    assert 0 < errors[1] < 1.5 * errors[0]


def test_layers_are_counted_within_every_part(tower: Tower, tmp_path: Path) -> None:
    """MoE-LLaVA's alternate layers, in the encoder, too; a part with one FFN has it converted."""
    upcycle.convert(str(tower("llava", "llama")), tmp_path / "out", part="all", layers="odd", **CHECKED)
    found = blocks_of(loaded(tmp_path / "out"))
    assert [name.split(".")[-2] for name in found[False]] == ["1"]
    assert [name.split(".")[-2] for name in found[True]] == ["1", "multi_modal_projector"]
    with pytest.raises(UsageError, match=r"layers: \[0, 2\] does not say of which of 3 parts"):
        upcycle.convert(str(tower("llava", "llama")), tmp_path / "no", part="all", layers=[0, 2], **CHECKED)
    numbered = {"part": ["vision"], "layers": [0, 2]}
    upcycle.convert(str(tower("llava", "llama")), tmp_path / "two", **numbered, **CHECKED)
    assert [name.split(".")[-2] for name in blocks_of(loaded(tmp_path / "two"))[True]] == ["0", "2"]


def test_cumos_recipe_makes_four_copies_of_every_ffn_in_three_parts(tower: Tower, tmp_path: Path) -> None:
    """Exact, and every expert is its dense FFN: weights of two copies sum to 1, whatever the random routers say."""
    source, out = tower("llava", "llama"), tmp_path / "out"
    shared = ["--tokenizer", "none", "--verify-tokens", "64", "-q"]
    done = CliRunner().invoke(cli, ["convert", "cumo", str(out), "--source", str(source), *shared])
    assert done.exit_code == 0, done.output
    dense, moe = loaded(source), loaded(out)
    found = blocks_of(moe)
    assert (len(found[False]), len(found[True])) == (3, 4)
    for path in found[False] + found[True]:
        block: Any = moe.get_submodule(path)
        rule = block.router.rule
        assert (block.experts.count, rule.top_k, rule.scores, rule.normalized) == (4, 2, "softmax", True)
        copies = block.experts.down.unflatten(0, (4, -1))
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        assert len(block.router.weight.unique(dim=0)) == 4
    inputs = with_image(dense, "llava")
    with torch.no_grad():
        assert difference(moe(**inputs).logits, dense(**inputs).logits) < TOLERANCE


def test_tensors_keep_the_names_of_the_sources_files(tower: Tower, tmp_path: Path) -> None:
    """Also the experts, whose modules have other names in the stock class."""
    source = tower("llava", "llama")
    upcycle.convert(str(source), tmp_path / "out", part="all", **CHECKED)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    begins = ("language_model.model.layers.", "vision_tower.encoder.layers.", "multi_modal_projector.linear_1.")
    made = set(after) - set(before)
    assert all(name.startswith(begins) for name in made)
    assert all(any(name.startswith(begin) for name in made) for begin in begins)


def test_a_streamed_comparison_says_the_same(tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    result = upcycle.convert(str(tower("llava_next", "mistral")), tmp_path / "out", part="all", **CHECKED).verification
    assert result is not None
    assert (result.verdict, result.streamed) == ("exact", True)
    assert max(result.layer_errors) < 1e-6
    assert min(result.layer_errors) > 0


def test_experts_that_read_no_text_must_be_compared(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = MediaCheck(None, "images were not compared: no image")
    monkeypatch.setattr(media, "compare_media", lambda *_: nothing)
    source = str(tower("llava", "llama"))
    with pytest.raises(VerificationError, match="1 layers of experts read no text, and images were not compared"):
        upcycle.convert(source, tmp_path / "out", part="connector", **CHECKED)
    texts = upcycle.convert(source, tmp_path / "text", part="language", **CHECKED).verification
    assert texts is not None
    assert texts.verdict == "exact"


@pytest.mark.parametrize("part", ["all", ["vision", "connector"]])
def test_a_plan_needs_no_weights(part: Any, tower: Tower, tmp_path: Path) -> None:
    source = tower("llava_next", "mistral")
    keys: dict[str, Any] = {**COPIES, "part": part, "verification": {"enabled": False}}
    recipe = parse_recipe({"source": str(source), **keys}, "here")
    plan = ExpertConversion.of_configs(recipe, method_of(recipe)).cost()
    result = upcycle.convert(str(source), tmp_path / "out", **keys)
    written = SafetensorsFolder(tmp_path / "out").specs.values()
    assert plan.parameters_total == result.plan.parameters_total == sum(spec.elements for spec in written)
    names = load_file(tmp_path / "out" / "model.safetensors")
    experts = sum(t.numel() for name, t in names.items() if name.endswith((".up", ".gate_up", ".down")))
    assert plan.parameters_active == plan.parameters_total - experts // 2  # 2 of 4


def test_parts_that_do_not_exist_are_refused(tower: Tower, pico: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(tower("llava", "llama"))
    for part, message in (
        ("encoder", "a llava model has no part 'encoder'"),
        ("both", "a llava model has no part 'both'"),
        (["vision", "text"], "a llava model has no part 'text'"),
        (["all", "vision"], "a list names single parts"),
        ("eyes", "key 'part'"),
    ):
        with pytest.raises(UsageError, match=message):
            upcycle.convert(source, tmp_path / "out", part=part, **CHECKED)
    with pytest.raises(RefusalError, match="llava to mixtral is not a conversion"):
        upcycle.convert(source, tmp_path / "out", part="all", target="mixtral", **CHECKED)
    with pytest.raises(RefusalError, match="importance runs the layers of a decoder one by one"):
        text = {"text": "demo", "tokens": 512}
        keys: dict[str, Any] = {**CHECKED, "method": "importance", "part": "vision", "calibration": text}
        upcycle.convert(source, tmp_path / "out", **keys)
    for part in ("all", "language"):
        upcycle.convert(str(pico("llama")), tmp_path / f"plain-{part}", part=part, **CHECKED)
