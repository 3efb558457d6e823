"""Conversions as a whole: determinism, dtypes, shards, blueprints, companions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import upcycle
from upcycle.errors import CheckpointError, UsageError, VerificationError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.files.formats.tensor_files import INDEX, SafetensorsFolder
from upcycle.planning.expert_job import ExpertJob

Pico = Callable[[str], Path]
QUICK = {"verification": {"tokens": 64}}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.long
def test_same_inputs_and_seed_give_byte_equal_files(pico: Pico, tmp_path: Path) -> None:
    keys = {"method": "random_split", "top_k": 4, "max_shard_size": "300KB", **QUICK}
    for name in ("one", "two"):
        upcycle.convert(str(pico("llama")), tmp_path / name, seed=5, **keys)
    upcycle.convert(str(pico("llama")), tmp_path / "other", seed=6, **keys)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["blueprint.safetensors"] != other["blueprint.safetensors"]


def test_recorded_hashes_are_those_of_the_files(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", experts=2, max_shard_size="300KB", **QUICK)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    files = contents(tmp_path / "out")
    assert set(record["files"]) == set(files) - {"upcycle.json", "verification.json", ".upcycle-local.json"}
    assert all(hashlib.sha256(files[name]).hexdigest() == digest for name, digest in record["files"].items())
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.long
def test_the_written_recipe_repeats_the_conversion(pico: Pico, tmp_path: Path) -> None:
    from upcycle.conversion.convert import run_recipe
    from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe

    upcycle.convert(str(pico("llama")), tmp_path / "out", method="random_split", top_k=8, shared=4, **QUICK)
    run_recipe(parse_recipe(read_recipe(tmp_path / "out" / "recipe.yaml"), "recipe"), tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_all_experts_of_a_layer_share_a_shard_below_the_wanted_size(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", experts=8, max_shard_size="700KB", **QUICK)
    where = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert len(set(where.values())) > 3
    for layer in range(3):
        assert len({file for name, file in where.items() if f"layers.{layer}." in name}) == 1
    assert all(f"-of-{len(set(where.values())):05d}." in file for file in where.values())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_written_and_named(pico: Pico, tmp_path: Path, dtype: str) -> None:
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", experts=2, dtype=dtype, **QUICK)
    assert {spec.dtype for spec in SafetensorsFolder(tmp_path / "out").specs.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    # The yardstick is the dense model rounded to the same dtype, so copies stay exact.
    assert result.verification is not None
    assert result.verification.verdict == "exact"


def test_experts_hold_the_scaled_dense_neurons(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", method="contiguous_split", top_k=4, scale=3.0, **QUICK)
    dense, moe = SafetensorsFolder(pico("llama")), load_file(tmp_path / "out" / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(moe[f"{expert}.w1.weight"], dense.read("model.layers.1.mlp.gate_proj.weight")[24:36])
    assert torch.equal(moe[f"{expert}.w3.weight"], dense.read("model.layers.1.mlp.up_proj.weight")[24:36])
    assert torch.equal(moe[f"{expert}.w2.weight"], dense.read("model.layers.1.mlp.down_proj.weight")[:, 24:36] * 3)


@pytest.mark.long
def test_a_saved_blueprint_builds_the_same_model_and_can_be_changed(pico: Pico, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    upcycle.convert(str(pico("llama")), first, method="random_split", top_k=4, seed=9, **QUICK)
    upcycle.convert(str(pico("llama")), again, blueprint=first / "blueprint.safetensors", **QUICK)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    saved = BlueprintFile(again / "blueprint.safetensors")
    assert saved.layers == [0, 1, 2]
    assert torch.equal(torch.cat([e.neurons for e in saved.layer(0).routed]).sort().values, torch.arange(96))
    with pytest.raises(UsageError, match="layer 0 has"):
        upcycle.convert(
            str(pico("llama")), tmp_path / "no", blueprint=first / "blueprint.safetensors", experts=4, top_k=2
        )


def test_companions_are_copied_and_remote_code_is_not_referenced(dense: Path, tmp_path: Path) -> None:
    (dense / "LICENSE").write_text("do what you want")
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    (dense / "modeling_evil.py").write_text("raise SystemExit")
    (dense / "generation_config.json").write_text('{"temperature": 0.5}')
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((dense / name).read_text()) | {"auto_map": {"AutoModel": "modeling_evil.X"}}
        (dense / name).write_text(json.dumps(content))
    upcycle.convert(str(dense), tmp_path / "out", experts=2, **QUICK)
    files = contents(tmp_path / "out")
    assert files["LICENSE"] == b"do what you want"
    assert files["chat_template.jinja"] == b"{{ messages }}"
    assert json.loads(files["generation_config.json"]) == {"temperature": 0.5}
    assert "modeling_evil.py" not in files
    assert b"auto_map" not in files["config.json"] + files["tokenizer_config.json"]


def test_a_broken_promise_ends_in_failed_and_raises(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertJob, "promise", property(lambda job: ("exact", "so it claims")))
    with pytest.raises(VerificationError, match="did not keep its promise") as caught:
        upcycle.convert(str(pico("llama")), tmp_path / "out", method="random_split", top_k=2, **QUICK)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.failed" / "verification.json").read_text())["verdict"] == "broken"


def test_sparse_split_is_approximate_with_numbers(pico: Pico, tmp_path: Path) -> None:
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", method="random_split", experts=8, top_k=4, **QUICK)
    checked = result.verification
    assert checked is not None
    assert checked.verdict == "approximate"
    assert checked.relative_logit_error > 0.01
    assert checked.kl > 0
    assert checked.all_experts_error is not None
    assert checked.all_experts_error < 1e-6
    assert any("healed" in warning for warning in result.plan.warnings)


def test_flags_can_keep_a_zero_router_for_inference(pico: Pico, tmp_path: Path) -> None:
    keys = {"method": "random_split", "top_k": 4, **QUICK}
    with pytest.raises(UsageError, match="without noise on its logits the others never learn"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", router="zero", **keys)
    router = {"name": "zero", "parameters": {"inference_only": True}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", router=router, **keys)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["router"] == router


def test_a_source_that_changes_meanwhile_is_noticed(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.conversion import convert

    write = convert.write_index

    def touch(*arguments: object) -> None:
        (dense / "model.safetensors").touch()
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(convert, "write_index", touch)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        upcycle.convert(str(dense), tmp_path / "out", experts=2, **QUICK)
    assert not (tmp_path / "out").exists()
