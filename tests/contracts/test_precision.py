"""What every stock MoE that is stored in few bits promises: its own loader reads what was rounded, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import auto_class_of
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from pico_models import PICO_MOE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.conversion.convert import run_recipe
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.files.formats.packed_folder import PackedFolder
from upcycle.files.formats.tensor_files import read_config
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.models.load import load_model
from upcycle.models.stock_layers import FolderLayers
from upcycle.models.stock_model import folder_model
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
JOINED = (
    *("granitemoe", "granitemoeshared", "granitemoe_swa", "granitemoehybrid"),
    *("qwen3_vl_moe", "gpt_oss"),
)  # stock transformers reads their experts from one tensor
TAKEN = [name for name in PICO_MOE if name not in JOINED]
IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
NEAREST = {"rounding": "nearest"}


def quantized(source: Path, out: Path, bits: str, **precision: Any) -> Any:
    text = {} if precision.get("rounding") == "nearest" else {"calibration": TEXT}
    return upcycle.convert(
        str(source), out, method="quantize", precision={"bits": bits, **precision}, verification={"tokens": 64}, **text
    )


def stock_logits(folder: Path) -> torch.Tensor:
    model, loading = auto_class_of(folder).from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    model.set_experts_implementation("eager")
    written = model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (2, 8)
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits.double())


def unpacked(folder: Path) -> dict[str, torch.Tensor]:
    """All weights, by the package whose format this is, matrix by matrix, as config.json says."""
    stored, made = load_file(folder / "model.safetensors"), {}
    groups = QuantizationConfig.model_validate(read_config(folder)["quantization_config"]).config_groups.values()
    for name, tensor in stored.items():
        base = name.removesuffix("_packed") if name.endswith("weight_packed") else name
        if base + "_scale" not in stored:
            if not name.endswith(("_scale", "_shape")):
                made[name] = tensor
            continue
        module = base.removesuffix(".weight")
        (scheme,) = [g for g in groups if any(re.match(target[3:], module) for target in g.targets)]
        parts = {
            part: stored[base + part.removeprefix("weight")]
            for part in ("weight_packed", "weight_scale", "weight_shape")
            if base + part.removeprefix("weight") in stored
        }
        parts |= {"weight": tensor} if base == name else {}
        if "weight_packed" in parts and "weight_shape" not in parts:
            parts["weight_shape"] = torch.tensor(
                [len(tensor), parts["weight_scale"].shape[1] * scheme.weights.group_size]
            )
        made[base] = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
    return made


@pytest.mark.one_in(96)
@pytest.mark.parametrize(("name", "bits"), [(name, bits) for bits in ("4", "8", "fp8", "3") for name in TAKEN])
def test_stock_transformers_loads_it_and_computes_what_the_rounded_weights_say(
    name: str, bits: str, pico_moe: Models, tmp_path: Path
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    result = quantized(pico_moe(name), out, bits, **NEAREST)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert f"experts are stored in {'FP8' if bits == 'fp8' else bits + ' bits'}" in result.verification.explanation
    meant = unpacked(out)
    store = PackedFolder(out, read_config(out))
    assert set(store.specs) == set(meant)
    assert all(torch.equal(store.read(key).float(), tensor.float()) for key, tensor in meant.items())
    shutil.copytree(out, plain)
    config = {k: v for k, v in read_config(out).items() if k != "quantization_config"}
    (plain / "config.json").write_text(json.dumps(config))
    save_file(
        {key: tensor.contiguous() for key, tensor in meant.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    found, expected = stock_logits(out), stock_logits(plain)
    assert torch.equal(found, expected)
    assert not torch.equal(found, stock_logits(pico_moe(name)))
    for streamed in (False, True):
        ours = folder_model(out, streamed).logits(IDS).double()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.one_in(64)
@pytest.mark.parametrize("name", TAKEN)
def test_routers_norms_and_embeddings_are_not_rounded(name: str, pico_moe: Models, tmp_path: Path) -> None:
    """Of a source whose experts are stored joined, too: they are written one by one."""
    source, out = pico_moe(name, True), tmp_path / "out"
    quantized(source, out, "4", **NEAREST)
    before = auto_class_of(source).from_pretrained(source, dtype=torch.float32).state_dict()
    store = PackedFolder(out, read_config(out))
    after = folder_model(out, streamed=False).model.state_dict()
    same = {key for key in before if key in after and torch.equal(before[key], after[key])}
    rounded = set(before) - same
    assert not any(word in key for key in rounded for word in ("norm", "embed", "lm_head", "router", "gate.w", "bias"))
    assert {key for key in before if ".experts." in key or re.search(r"self_attn\.\w+_proj\.weight", key)} <= rounded
    assert sum(".experts." in key for key in store.rounded) == sum(
        (2 if "gate_up" in key else 1) * len(tensor) for key, tensor in before.items() if ".experts." in key
    )


@pytest.mark.long
@pytest.mark.one_in(16)
@pytest.mark.parametrize("bits", ["4", "mixed:2.5"])
def test_same_inputs_give_the_same_bytes_as_planned(bits: str, pico_moe: Models, tmp_path: Path) -> None:
    source = str(wide(pico_moe("qwen3_moe"), tmp_path)) if "mixed" in bits else str(pico_moe("qwen3_moe"))
    keys: dict[str, Any] = {
        "method": "quantize",
        "precision": {"bits": bits},
        "calibration": TEXT,
        "verification": {"tokens": 64},
    }
    plan = upcycle.plan(source, **keys)
    result = upcycle.convert(source, tmp_path / "one", **keys)
    run_recipe(parse_recipe(read_recipe(tmp_path / "one" / "recipe.yaml"), "recipe"), tmp_path / "again")
    one, again = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("one", "again"))
    assert one == again
    assert (result.plan, plan.promise) == (plan, "approximate")
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert plan.bytes_output < size < plan.bytes_output + 40_000  # and the header
    assert plan.parameters_total == plan.parameters_dense
    assert upcycle.verify(tmp_path / "one", tokens=64) == result.verification
    assert not (tmp_path / "one" / LAYER_BLUEPRINTS).exists()
    reports = [layer["precision"] for layer in result.layers]
    assert all(report["gptq"] > 0 and report["error"] > 0 for report in reports)


def wide(source: Path, folder: Path) -> Path:
    """A model of the same architecture whose experts are wide enough for several widths."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    config.moe_intermediate_size = 32
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / "wide" / name)
    return folder / "wide"


@pytest.mark.one_in(16)
@pytest.mark.parametrize("allocation", ["even", "mc_moe"])
def test_mixed_widths_are_read_by_upcycle_and_refused_by_stock_transformers(
    allocation: str, pico_moe: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    precision = {"allocation": allocation, **(NEAREST if allocation == "even" else {})}
    quantized(wide(pico_moe("qwen3_moe"), tmp_path), out, "mixed:2.5", **precision)
    decided = json.loads((out / "compression.json").read_text())["precision"]["bits"]
    assert sum(sum(own) for own in decided.values()) <= 2.5 * 8
    assert len({bits for own in decided.values() for bits in own}) > 1
    meant, store = unpacked(out), PackedFolder(out, read_config(out))
    assert all(torch.equal(store.read(key).float(), tensor.float()) for key, tensor in meant.items())
    logits = [folder_model(out, streamed).logits(IDS) for streamed in (False, True)]
    torch.testing.assert_close(*logits)
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):  # and loads no garbage
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.long
def test_a_cut_and_refitted_model_is_rounded_behind_that(pico_moe: Models, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "reap", "keep": 0.75, "calibration": TEXT, "verification": {"tokens": 64}}
    source = str(pico_moe("mixtral"))
    upcycle.convert(source, tmp_path / "cut", **keys)
    upcycle.convert(source, tmp_path / "both", **keys, precision={"bits": 8, "rounding": "nearest"})
    cut, both = FolderLayers(tmp_path / "cut").model, FolderLayers(tmp_path / "both")
    whole = load_file(tmp_path / "cut" / "model.safetensors")
    store = PackedFolder(tmp_path / "both", read_config(tmp_path / "both"))
    assert set(store.specs) == set(whole)
    for key, tensor in whole.items():
        assert (store.read(key).float() - tensor.float()).abs().max() <= tensor.float().abs().max() / 120
    assert cut.config.num_local_experts == both.model.config.num_local_experts == 3


def test_a_cut_and_refitted_model_is_rounded_by_what_its_experts_read(pico_moe: Models, tmp_path: Path) -> None:
    """Rounding the result of a cut alone, in a second step and on the same text, gives the same bytes."""
    cutting: dict[str, Any] = {"method": "reap", "keep": 0.75, "calibration": TEXT, "verification": {"enabled": False}}
    rounding = {"precision": {"bits": 4}, "calibration": TEXT, "verification": {"enabled": False}}
    source = str(pico_moe("mixtral"))
    upcycle.convert(source, tmp_path / "both", **cutting, precision={"bits": 4})
    upcycle.convert(source, tmp_path / "cut", **cutting)
    upcycle.convert(str(tmp_path / "cut"), tmp_path / "then", method="quantize", **rounding)
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("both", "then"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    reports = json.loads((tmp_path / "both" / "compression.json").read_text())["precision"]["layers"]
    assert all(report["gptq"] > 0 for report in reports.values()), reports


@pytest.mark.parametrize("name", JOINED)
def test_architectures_whose_experts_stock_transformers_reads_joined_are_refused(name: str, pico_moe: Models) -> None:
    with pytest.raises(RefusalError, match="from one tensor per layer"):
        upcycle.plan(str(pico_moe(name)), method="quantize", precision={"bits": 8})


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"precision": {"bits": 9}}, "'9' is no precision: write 2 to 8, fp8, or mixed:2.5"),
        ({"precision": {"bits": "mixed:1"}}, "'mixed:1' is no precision"),
        ({"precision": {"bits": 4, "attention_bits": 12}}, "12 bits are no width"),
        ({"precision": {"bits": 4}}, "rounding by GPTQ, .* needs calibration text"),
        ({}, "quantize needs to know in how many bits"),
        ({"precision": {"attention_bits": 4}}, "quantize needs to know in how many bits"),
        ({"precision": {"bits": 8}, "keep": 0.5}, "quantize leaves out no experts, and keep is 0.5"),
        ({"precision": {"bits": "mixed:2.5"}, "calibration": TEXT}, "matrices of 16 columns, too few"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(keys: dict[str, Any], said: str, pico_moe: Models) -> None:
    with pytest.raises(UsageError, match=said):
        upcycle.plan(str(pico_moe("qwen3_moe")), method="quantize", **keys)


def test_precision_without_bits_and_of_a_dense_result_is_refused(pico_moe: Models) -> None:
    source, cut = str(pico_moe("mixtral")), {"keep": 0.5, "calibration": TEXT}
    with pytest.raises(UsageError, match="precision: 'rounding' says nothing without bits"):
        upcycle.plan(source, method="reap", precision=NEAREST, **cut)
    with pytest.raises(RefusalError, match="to_dense makes a dense model"):
        upcycle.plan(source, method="to_dense", precision=4, **cut)


def test_a_model_in_few_bits_is_not_rounded_again_and_damage_is_named(pico_moe: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized(pico_moe("olmoe"), out, "4", **NEAREST)
    with pytest.raises(RefusalError, match="is in few bits") as caught:
        upcycle.convert(str(out), tmp_path / "again", method="reap", keep=0.5, calibration=TEXT)
    assert "a second rounding adds to the first" in str(caught.value.hint)
    tensors = load_file(out / "model.safetensors")
    name = next(key for key in tensors if key.endswith("experts.0.up_proj.weight_scale"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="do not fit"):
        PackedFolder(out, read_config(out))


def test_what_cannot_be_done_with_few_bits_is_said(pico_moe: Models, tmp_path: Path) -> None:
    keys = {"method": "quantize", "precision": {"bits": 8}, "verification": {"enabled": False}}
    upcycle.convert(str(pico_moe("mixtral")), tmp_path / "bits", **keys)
    with pytest.raises(RefusalError, match="is stored in few bits, and its experts cannot stay"):
        upcycle.offload(tmp_path / "bits", memory=2**30)
    with pytest.raises(UsageError, match="in few bits, which no gradient can change"):
        load_model(tmp_path / "bits", training=True)
