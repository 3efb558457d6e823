"""What every registered growth step promises: copies of whole tensors, each the one it is declared to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO, PICO_MOE
from safetensors.torch import load_file

import upcycle
from upcycle.architectures.moe_families import MOES
from upcycle.checkpoints.shard_writer import ShardWriter
from upcycle.conversion.convert import run_recipe
from upcycle.conversion.jobs import job_of
from upcycle.errors import CheckpointError, UsageError
from upcycle.files import hashing, records
from upcycle.recipe.conversion_recipe import parse_recipe, read_recipe
from upcycle.registry import FAMILIES, METHODS, load
from upcycle.verification import verify_growth

Models = Callable[..., Path]
NAMES = [name for name in METHODS if load("method", name).kind == "growth"]
QUICK: dict[str, Any] = {"tokenizer": "none", "verification": {"tokens": 64}}
# a source each, with recipe keys
SOURCE: dict[str, tuple[str, dict[str, Any]]] = {
    "branch_train_merge": ("qwen3-windows", {}),
    "depth_stack": ("qwen3-windows", {"parameters": {"growth": 2}}),
    "masked_growth": ("qwen2-windows", {"parameters": {"hidden": 48, "heads": 6, "layers": 5}}),
    "expert_upcycling": ("qwen3_moe", {"parameters": {"utility": "norm"}, "experts": 7}),
}
CELLS = [
    *(("depth_stack", name, False) for name in PICO),
    *(("expert_upcycling", name, fused) for name in PICO_MOE for fused in (False, True)),
]


@pytest.fixture
def source(pico: Models, pico_moe: Models) -> Callable[..., str]:
    """The folder of a pico model that a step takes."""

    def get(method: str, name: str | None = None, fused: bool = False) -> str:
        name = name or SOURCE[method][0]
        return str(pico_moe(name, fused) if load("method", method).takes == "moe" else pico(name))

    return get


@pytest.fixture
def keys_of(branches: Callable[..., list[Path]]) -> Callable[[str], dict[str, Any]]:
    """A step's recipe keys, with sources where it takes several."""

    def get(method: str) -> dict[str, Any]:
        name, keys = SOURCE[method]
        several = {"sources": list(map(str, branches(2, 0.3, name)))} if load("method", method).takes_sources else {}
        return {"method": method, **keys, **several}

    return get


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_step_has_a_source_here_and_every_architecture_a_cell() -> None:
    assert set(SOURCE) == set(NAMES)
    assert {PICO[name][0] for method, name, _ in CELLS if method == "depth_stack"} == set(FAMILIES)
    assert {PICO_MOE[name][0] for method, name, _ in CELLS if method == "expert_upcycling"} == set(MOES)


@pytest.mark.one_in(16)
@pytest.mark.parametrize(("method", "name", "fused"), CELLS)
def test_every_tensor_is_the_one_it_is_declared_to_be(
    method: str, name: str, fused: bool, source: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock class loads the result without a missing or unexpected key (convert checks that), whole and streamed."""
    if fused:
        monkeypatch.setattr(verify_growth, "available_memory", lambda: 0)
    folder = source(method, name, fused)
    keys: dict[str, Any] = {"method": method, "parameters": {"growth": 2}}
    if method == "expert_upcycling":
        keys = {"method": method, "experts": 8, "parameters": {"noise": 0.0}}
    before = contents(Path(folder))
    result = upcycle.convert(folder, tmp_path / "out", **keys, **QUICK)
    assert contents(Path(folder)) == before
    assert result.verification is not None
    assert (result.verification.verdict, result.verification.streamed) == ("approximate", fused)
    assert result.verification.relative_logit_error > 1e-4  # something was changed: the comparison sees it
    written, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(Path(folder) / "model.safetensors")
    assert result.verification.compared_tensors == len(written)
    experts = json.loads((tmp_path / "out" / "growth.json").read_text()).get("experts", {})
    job = job_of(parse_recipe({"source": folder, **keys, **QUICK}, "test"))
    declared = {entry.name: entry.origin for unit in job.units for entry in unit.entries}
    assert set(written) == set(declared)
    for key, tensor in written.items():
        origin = stored[declared[key].name]  # type: ignore[union-attr]
        if tensor.shape != origin.shape:  # a tensor of all experts, which grows along its first dimension
            layer = key.partition(".layers.")[2].partition(".")[0]
            origin = origin[:, experts[layer]] if len(origin) == 1 else origin[experts[layer]]
        assert torch.equal(tensor, origin), key


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", NAMES)
def test_same_inputs_give_the_same_bytes_as_planned(
    name: str, source: Callable[..., str], keys_of: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    keys = {**keys_of(name), **QUICK, "max_shard_size": "60KB"}
    plan = upcycle.plan(source(name), **keys)
    results = [upcycle.convert(source(name), tmp_path / folder, **keys) for folder in ("one", "two")]
    run_recipe(parse_recipe(read_recipe(tmp_path / "one" / "recipe.yaml"), "recipe"), tmp_path / "again")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "again")
    assert results[0].plan == plan
    assert plan.kind == "growth"
    assert len(plan.shards) > 2
    sizes = [(tmp_path / "one" / shard["file"]).stat().st_size for shard in plan.shards]
    assert plan.bytes_output < sum(sizes) < 1.3 * plan.bytes_output  # and headers
    assert upcycle.verify(tmp_path / "one", tokens=64) == results[0].verification


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_step_continues_byte_equal(
    name: str,
    source: Callable[..., str],
    keys_of: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {**keys_of(name), **QUICK}
    finish, finished = ShardWriter.finish, []

    def stop(writer: ShardWriter, unit: Any) -> None:
        finish(writer, unit)
        finished.append(unit.name)
        if len(finished) == 2:
            writer._wait_for_oldest()
            raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(source(name), tmp_path / "out", **keys)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    if hasattr(load("method", name), "chosen"):  # what was decided is not decided again
        monkeypatch.setattr(load("method", name), "choose", None)
    assert upcycle.convert(source(name), tmp_path / "out", **keys).resumed
    monkeypatch.undo()
    upcycle.convert(source(name), tmp_path / "whole", **keys)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_tensor_is_found_by_name(
    name: str, source: Callable[..., str], keys_of: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upcycle.convert(source(name), out, **keys_of(name), **QUICK)
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    victim = next(key for key in header if "layers.1.self_attn.k_proj.weight" in key)
    content[8 + int.from_bytes(content[:8], "little") + header[victim]["data_offsets"][1] - 1] ^= 0x80  # a sign
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not the file that was written"):
        upcycle.verify(out, tokens=64)
    record = records.read_record(out)
    record["files"][path.name] = hashing.hash_file(path)
    (out / records.FILE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"tensor '{victim}' is not"):
        upcycle.verify(out, tokens=64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["layers", "router", "shared", "scale", "target", "refit", "pad", "layout"])
def test_keys_that_mean_nothing_are_refused(
    name: str, key: str, source: Callable[..., str], keys_of: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    value = {"layers": "all", "router": "cool", "shared": 1, "scale": 1.0, "target": "mixtral", "refit": "none"}
    keys = {key: value.get(key, {"pad": True, "layout": "fused"}.get(key))}
    with pytest.raises(UsageError, match=f"does not read the key '{key}'") as caught:
        upcycle.convert(source(name), tmp_path / "out", **keys_of(name), **keys)
    assert "seed" in (caught.value.hint or "")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", NAMES)
def test_blueprints_are_refused(name: str, source: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="makes no blueprints"):
        upcycle.convert(source(name), tmp_path / "out", method=name, blueprint=_blueprint(source, tmp_path))


@pytest.mark.parametrize("name", [name for name in NAMES if not load("method", name).takes_sources])
def test_several_sources_are_refused(name: str, source: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"converts one source|does not read the key 'sources'"):
        upcycle.convert(None, tmp_path / "out", method=name, sources=[source(name), source(name)])


def _blueprint(source: Callable[..., str], folder: Path) -> Path:
    upcycle.convert(source("depth_stack", "llama"), folder / "dense", experts=2, **QUICK)
    return folder / "dense" / "blueprint.safetensors"
