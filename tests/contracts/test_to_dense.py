"""What a dense model made of a MoE promises, on every stock MoE that a dense family is the block of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO_MOE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.moe.dense_twin import width_beside
from upcycle.calibration.compressing import refit_dense
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.conversion.convert import run_recipe
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files import hashing, records
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.methods.compressing.to_dense import ToDense
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe

pytestmark = pytest.mark.one_in(32)  # the other cases are long

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
QUICK: dict[str, Any] = {"method": "to_dense", "calibration": TEXT, "verification": {"tokens": 64}}
WITHOUT = (  # no dense family has their block
    *("olmoe", "mellum", "glm4_moe", "glm4_moe-sigmoid", "glm4_moe_lite", "deepseek_v2", "exaone_moe", "minimax_m2"),
    *("qwen3_next", "granitemoehybrid", "phimoe", "phimoe-constant", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe"),
)
# One expert's weight is a mean over tokens of fp32 numbers, and a sum of eight: a few roundings of 6e-8 each.
SAME = 1e-6


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return torch.as_tensor(model(torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))).logits)


def apart(one: Path, two: Path) -> float:
    return float(torch.dist(logits(one), logits(two)) / torch.linalg.norm(logits(two)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.one_in(24)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [name for name in PICO_MOE if name not in WITHOUT])
def test_it_loads_in_stock_transformers_and_writes(name: str, fused: bool, pico_moe: Models, tmp_path: Path) -> None:
    source, out = pico_moe(name, fused), tmp_path / "out"
    model = MoeCheckpoint.open(str(source)).model
    width = width_beside(model, 0) if 0 not in model.moe_layers else 32  # a dense layer below has its own
    before = contents(source)
    result = upcycle.convert(str(source), out, width=width, **QUICK)
    assert contents(source) == before
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    dense, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    assert not any("experts" in name or "router" in name for name, _ in dense.named_modules())
    assert dense.config.intermediate_size == width
    written = dense.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)
    plan = result.plan
    assert (plan.kind, plan.family, plan.target) == ("compression", model.family.name, dense.config.model_type)
    elements = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert elements == plan.parameters_total == plan.parameters_active
    for report in json.loads((out / "compression.json").read_text())["refit"].values():
        assert report["missing_after"] <= report["missing_before"]


@pytest.mark.long
@pytest.mark.parametrize("shared", [0, 2])
def test_a_split_whose_experts_all_run_goes_back_to_the_dense_function(
    shared: int, pico: Models, tmp_path: Path
) -> None:
    dense, moe, out = pico("qwen2"), tmp_path / "moe", tmp_path / "out"
    split = {"method": "random_split", "experts": 8 - shared, "top_k": 8 - shared, "shared": shared, "router": "zero"}
    upcycle.convert(str(dense), moe, **split, verification={"tokens": 64})
    assert apart(moe, dense) < SAME
    result = upcycle.convert(str(moe), out, width=96, refit="none", **QUICK)
    assert result.plan.target == "qwen2"
    assert apart(out, dense) < SAME
    one, two = load_file(dense / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    gate = "model.layers.1.mlp.gate_proj.weight"  # the same neurons, in another order
    assert torch.equal(one[gate].sort(0).values, two[gate].sort(0).values)


@pytest.mark.long
def test_the_average_of_copies_is_the_model_that_was_copied(pico: Models, tmp_path: Path) -> None:
    dense, moe, out = pico("mistral"), tmp_path / "moe", tmp_path / "out"
    upcycle.convert(str(dense), moe, method="sparse_upcycling", experts=4, top_k=2, verification={"tokens": 64})
    result = upcycle.convert(str(moe), out, parameters={"gather": "average"}, refit="none", **QUICK)
    assert result.plan.target == "mistral"  # upcycle.json says so; without it, Llama comes first
    assert apart(out, dense) < SAME
    (moe / records.FILE).unlink()
    assert upcycle.plan(str(moe), width=96, **QUICK).target == "llama"
    assert upcycle.plan(str(moe), width=96, target="mistral", **QUICK).target == "mistral"


@pytest.mark.long
def test_the_refit_makes_up_for_what_is_gone(pico_moe: Models, tmp_path: Path) -> None:
    errors = {}
    for refit in ("none", "down"):
        keys = {**QUICK, "calibration": {**TEXT, "tokens": 4096}, "width": 64, "refit": refit}
        result = upcycle.convert(str(pico_moe("dots1")), tmp_path / refit, **keys)
        assert result.verification is not None
        errors[refit] = result.verification.relative_logit_error
    assert errors["down"] < errors["none"]
    first = json.loads((tmp_path / "down" / "compression.json").read_text())["refit"]["0"]
    assert first["missing_after"] < 0.8 * first["missing_before"]


@pytest.mark.long
def test_same_inputs_give_the_same_bytes_as_planned(pico_moe: Models, tmp_path: Path) -> None:
    keys, source = {**QUICK, "keep": 0.5, "max_shard_size": "60KB"}, str(pico_moe("qwen3_moe"))
    plan = upcycle.plan(source, **keys)
    results = [upcycle.convert(source, tmp_path / folder, **keys) for folder in ("one", "two")]
    run_recipe(parse_recipe(read_recipe(tmp_path / "one" / "recipe.yaml"), "recipe"), tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "again")
    assert results[0].plan == plan
    assert plan.summary == "qwen3, FFNs of 32 neurons from 4 experts of 16 (50%)"
    assert plan.refit == "down"
    assert upcycle.verify(tmp_path / "one", tokens=64) == results[0].verification
    assert not (tmp_path / "one" / LAYER_BLUEPRINTS).exists()


@pytest.mark.long
@pytest.mark.parametrize("gather", ["neurons", "svd_kg"])
def test_a_stopped_run_continues_byte_equal(
    gather: str, pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keys = str(pico_moe("mixtral")), {**QUICK, "width": 64, "parameters": {"gather": gather}}

    def interrupt(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(refit_dense.FfnFit, "solve", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(source, tmp_path / "out", **keys)
    monkeypatch.undo()
    monkeypatch.setattr(ToDense, "cut", interrupt)  # what was decided is not decided again
    upcycle.convert(source, tmp_path / "out", **keys)
    monkeypatch.undo()
    upcycle.convert(source, tmp_path / "whole", **keys)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("part", ["gate_proj", "input_layernorm"])
def test_a_changed_tensor_is_found_by_name(part: str, pico_moe: Models, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upcycle.convert(str(pico_moe("mixtral")), out, width=64, **QUICK)
    path = out / "model.safetensors"
    tensors = load_file(path)
    victim = next(name for name in tensors if "layers.1" in name and part in name)
    save_file({**tensors, victim: -tensors[victim]}, path, {"format": "pt"})
    record = records.read_record(out)
    record["files"][path.name] = hashing.hash_file(path)
    (out / records.FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"tensor '{victim}' is not"):
        upcycle.verify(out, tokens=64)


@pytest.mark.long
def test_observations_decide_the_same(pico_moe: Models, tmp_path: Path) -> None:
    source, seen = str(pico_moe("qwen2_moe-softmax")), tmp_path / "seen.safetensors"
    text = {"text": "demo", "tokens": 512}
    upcycle.observe(source, seen, "demo", 512)
    keys = {**QUICK, "width": 64, "refit": "none"}
    upcycle.convert(source, tmp_path / "one", **{**keys, "calibration": text})
    keys.pop("calibration")
    result = upcycle.convert(source, tmp_path / "two", observations=str(seen), **keys)
    assert result.plan.calibration_tokens == 0
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_half_precision_is_kept(pico_moe: Models, tmp_path: Path) -> None:
    source = shutil.copytree(pico_moe("mixtral"), tmp_path / "half")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    upcycle.convert(str(source), tmp_path / "out", width=64, **QUICK)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_dense_layer_below_decides_the_width(pico_moe: Models, tmp_path: Path) -> None:
    with pytest.raises(RefusalError, match="layer 0 has no experts, and an FFN of 48 neurons") as caught:
        upcycle.plan(str(pico_moe("qwen2_moe")), width=64, **QUICK)
    assert caught.value.hint == "--width 48"


def test_another_block_is_found_on_the_first_tokens(
    pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that the description takes for the same, and whose layers compute something else."""
    load = refit_dense.ResultLayers.load

    def other(self: Any, index: int) -> None:
        load(self, index)
        self._layers[index].self_attn.o_proj.weight.data *= 1.01

    monkeypatch.setattr(refit_dense.ResultLayers, "load", other)
    with pytest.raises(CheckpointError, match="layer 0 computes another input of its experts than a 'llama' model"):
        upcycle.convert(str(pico_moe("mixtral")), tmp_path / "out", width=64, **QUICK)
