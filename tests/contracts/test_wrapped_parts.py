"""Every described model that is no causal language model: encoders, two towers, an encoder with a decoder, stages.

The oracle is stock code: the dense model's own outputs, and the wrapped one loaded by the Auto class as any user would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from wrapped_models import SMALL, auto_class, inputs_of, output_of, relative_error, small_model

import upcycle
import upcycle.models
from upcycle.errors import UsageError, VerificationError
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.moe_shape import Part
from upcycle.models.load import load_model
from upcycle.models.own.moe_block import MoeBlock
from upcycle.publishing.model_card import make_card
from upcycle.registry import load
from upcycle.report.write_report import write_report
from upcycle.verification import verify_experts

pytestmark = pytest.mark.one_in(20)  # the other cases are long

OTHERS = [name for name, (_, kind, _) in SMALL.items() if kind != "CausalLM"]
IN_PARTS = [name for name in OTHERS if load("described", SMALL[name][0]).parts and name != "t5-encoder"]
WRITING = [name for name in OTHERS if SMALL[name][1] in ("Seq2SeqLM", "SpeechSeq2Seq")]
QUICK = {"tokenizer": "none", "verification": {"tokens": 64}}
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, **QUICK}
SHARED: dict[str, Any] = {"method": "random_split", "experts": 6, "top_k": 6, "shared": 2, **QUICK}
SPARSE: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 3, **QUICK}
ROUNDING = 2e-6  # fp32, some layers: a few roundings of 6e-8 each
# Both models round as often, at other places: two independent errors of one size differ by less than their sum.
ALIKE = 2.0


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved("t5")`` is a folder with that model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            small_model(name).save_pretrained(made[name])
        return made[name]

    return get


def loaded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    model, report = auto_class(name).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def outputs(name: str, model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    given = {k: value.to(dtype) if value.is_floating_point() else value for k, value in inputs_of(name).items()}
    return output_of(model, given).float()


def moe_blocks(model: Any) -> list[MoeBlock]:
    return [each for each in model.modules() if isinstance(each, MoeBlock)]


@pytest.mark.one_in(16)
@pytest.mark.parametrize("keys", [COPIES, SHARED], ids=["copies", "shared"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_described_model_converts_exactly(
    name: str, keys: dict[str, Any], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(saved(name)), tmp_path / "out", **keys).verification
    assert result is not None
    assert result.verdict == "exact"
    assert result.compared == ("logits" if name in WRITING else "hidden states")
    assert result.layer_errors is not None
    assert 0 <= max(result.layer_errors) < ROUNDING
    model = loaded(name, tmp_path / "out")
    assert len(moe_blocks(model)) == len(result.layer_errors)
    expected = outputs(name, loaded(name, saved(name)))
    assert relative_error(outputs(name, model), expected) < ROUNDING
    model.save_pretrained(tmp_path / "again")
    again = loaded(name, tmp_path / "again")
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())
    assert relative_error(outputs(name, again), expected) < ROUNDING


@pytest.mark.one_in(24)
@pytest.mark.parametrize("name", OTHERS)
def test_sparse_splits_add_up_and_streaming_reads_the_same(
    name: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    result = upcycle.convert(str(saved(name)), tmp_path / "out", **SPARSE).verification
    assert result is not None
    assert result.streamed
    assert result.verdict == "approximate"
    assert result.all_experts_error is not None
    assert result.all_experts_error < ROUNDING


@pytest.mark.one_in(24)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "deberta"])  # which stock code runs in fp32 alone
def test_half_precision_loses_no_more_than_the_dense_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small_model(name).to(dtype).save_pretrained(tmp_path / "dense")
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES).verification
    assert result is not None
    assert result.verdict == "exact"
    expected = outputs(name, loaded(name, tmp_path / "dense"))
    dense, own = (outputs(name, loaded(name, tmp_path / folder, dtype), dtype) for folder in ("dense", "out"))
    assert relative_error(own, expected) < ALIKE * relative_error(dense, expected)


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_t5_keeps_its_second_projections_in_fp32_where_the_dense_model_does(name: str, tmp_path: Path) -> None:
    """In fp16 their outputs overflow, and the dense model's do not."""
    dense = small_model(name).half()
    dense.save_pretrained(tmp_path / "plain")
    upcycle.convert(str(tmp_path / "plain"), tmp_path / "shared", **SHARED)
    blocks = moe_blocks(loaded(name, tmp_path / "shared", torch.float16))
    assert {block.shared_down.weight.dtype for block in blocks} == {torch.float32}
    assert {block.router.weight.dtype for block in blocks} == {torch.float16}
    for key, weight in dense.named_parameters():
        if key.endswith(".wo.weight"):
            weight.data = weight.sign() * 6e4
    dense.save_pretrained(tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)
    model = loaded(name, tmp_path / "out", torch.float16)
    seen: list[float] = []
    moe_blocks(model)[0].register_forward_hook(lambda _, __, output: seen.append(float(output.abs().max())))
    found = outputs(name, model, torch.float16)
    assert seen[0] > torch.finfo(torch.float16).max
    half, whole = (
        outputs(name, loaded(name, tmp_path / "dense", kind), kind) for kind in (torch.float16, torch.float32)
    )
    assert relative_error(found, whole) < ALIKE * relative_error(half, whole)


@pytest.mark.parametrize("name", WRITING)
def test_text_is_generated_with_caches(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    upcycle.convert(str(saved(name)), tmp_path / "out", **SHARED)
    given = {key: value for key, value in inputs_of(name).items() if not key.startswith("decoder")}
    wanted = {"max_new_tokens": 8, "do_sample": False}
    model = loaded(name, tmp_path / "out")
    tokens = model.generate(**given, **wanted)
    assert torch.equal(tokens, loaded(name, saved(name)).generate(**given, **wanted))
    assert torch.equal(tokens, model.generate(**given, **wanted, use_cache=False))


@pytest.mark.parametrize("name", IN_PARTS)
def test_one_part_can_be_converted_alone(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    converted = set()
    for part, begins in load("described", SMALL[name][0]).parts:
        result = upcycle.convert(str(saved(name)), tmp_path / part, part=part, **COPIES).verification
        assert result is not None
        assert result.verdict == "exact"
        entries = json.loads((tmp_path / part / "config.json").read_text())["replaced_ffns"]
        paths = [modules[0] for entry in entries for modules in entry["paths"]]
        assert len(paths) == 2
        assert all(path.startswith(begins) for path in paths)
        converted |= set(paths)
        last = upcycle.convert(str(saved(name)), tmp_path / f"{part}-last", part=part, layers="last-half", **COPIES)
        assert last.verification is not None
        assert last.verification.verdict == "exact"
        (entry,) = json.loads((tmp_path / f"{part}-last" / "config.json").read_text())["replaced_ffns"]
        assert entry["paths"][0][0] == paths[1]
    assert len(converted) == 4
    with pytest.raises(UsageError, match=f"a {SMALL[name][0]} model has no part 'connector'"):
        upcycle.convert(str(saved(name)), tmp_path / "out", part="connector", **COPIES)


@pytest.mark.parametrize("name", ["swin", "convnext", "dinov3-convnext"])
def test_stages_have_as_many_experts_of_their_own_widths(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(saved(name)), tmp_path / "out", **SPARSE)
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["replaced_ffns"]
    assert [entry["experts"] for entry in entries] == [8, 8]
    assert [entry["hidden_size"] for entry in entries] == [32, 64]
    assert entries[1]["width"] == 2 * entries[0]["width"]
    assert [len(entry["paths"]) for entry in entries] == [1, 2]
    written = loaded(name, tmp_path / "out")
    idle = [5 * 2 * entry["width"] * entry["hidden_size"] * len(entry["paths"]) for entry in entries]
    assert result.plan.parameters_total == sum(weight.numel() for weight in written.state_dict().values())
    assert result.plan.parameters_active == result.plan.parameters_total - sum(idle)


@pytest.mark.parametrize("name", ["t5", "whisper", "clip", "swin", "hubert"])
def test_a_wrong_weight_is_found(
    name: str, saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ExpertTensors.part

    def wrong(self: ExpertTensors, part: Part) -> torch.Tensor:
        made = right(self, part)
        return -made if (part.kind, part.expert) == ("down_rows", 1) else made

    monkeypatch.setattr(ExpertTensors, "part", wrong)
    with pytest.raises(VerificationError, match="relative"):
        upcycle.convert(str(saved(name)), tmp_path / "out", **COPIES)


def test_an_encoder_of_t5_is_converted_without_its_decoder(saved: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(saved("t5-encoder")), tmp_path / "out", **COPIES).verification
    assert result is not None
    assert (result.verdict, result.compared, len(result.layer_errors)) == ("exact", "hidden states", 2)
    assert upcycle.verify(tmp_path / "out").verdict == "exact"


@pytest.mark.parametrize(
    ("name", "model", "reader", "task"),
    [
        ("t5", "AutoModelForSeq2SeqLM", "AutoTokenizer", "text2text-generation"),
        ("t5-encoder", "AutoModelForTextEncoding", "AutoTokenizer", "feature-extraction"),
        ("whisper", "AutoModelForSpeechSeq2Seq", "AutoProcessor", "automatic-speech-recognition"),
        ("clip", "AutoModel", "AutoProcessor", "zero-shot-image-classification"),
        ("swin", "AutoModelForImageClassification", "AutoImageProcessor", "image-classification"),
        ("hubert", "AutoModel", "AutoFeatureExtractor", "feature-extraction"),
    ],
)
def test_the_card_says_how_a_model_is_loaded_and_how_many_layers_it_has(
    name: str, model: str, reader: str, task: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(saved(name)), tmp_path / "out", layers="last-half", **COPIES)
    card = make_card(tmp_path / "out", "out")
    assert f"from transformers import {model}, {reader}\n\nimport upcycle.models" in card
    assert f"pipeline_tag: {task}\n" in card
    count = len(result.verification.layer_errors)
    assert f"networks of {count // 2} of {count} layers became 4 routed experts" in card.replace("\n", " ")
    write_report(tmp_path / "out")
    if name in WRITING:
        with pytest.raises(UsageError, match="has an encoder and a decoder"):
            load_model(str(tmp_path / "out"))
