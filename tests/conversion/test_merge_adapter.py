"""``upcycle merge`` against peft: the merged folder computes what stock transformers does with peft's adapter beside the base."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_folders import change_settings, change_tensors, logits, relative, stock, unmerged, write_lora
from safetensors.torch import load_file

import upcycle
from upcycle.adapters import adapted_store
from upcycle.conversion import merge_adapter, merge_check
from upcycle.conversion.merge_adapter import merge
from upcycle.conversion.verify import verify
from upcycle.errors import CheckpointError, RefusalError, UpcycleError, UsageError, VerificationError
from upcycle.publishing.model_card import make_card

Maker = Callable[[str], Path]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
DENSE: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 3},
        "alpha_pattern": {"down_proj": 5},
        "use_rslora": True,
    },
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "whole": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"], "bias": "all"},
}
MOES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "modules_to_save": ["gate"]}),
    "one of two": (
        "mixtral",
        {"target_modules": [], "target_parameters": [EXPERTS[1], "gate.weight"], "rank_pattern": {"down_proj": 2}},
    ),
    "shared": (
        "qwen2_moe",
        {
            "target_modules": ["v_proj", "shared_expert.down_proj"],
            "target_parameters": EXPERTS,
            "modules_to_save": ["gate"],
        },
    ),
    "whole experts": ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}),
    "a buffer of the router": ("glm4_moe", {"target_modules": ["o_proj"], "modules_to_save": ["gate"]}),
    "fused in files": ("granitemoe", {"target_modules": ["o_proj"], "target_parameters": EXPERTS}),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("settings", DENSE.values(), ids=DENSE)
def test_a_dense_model(settings: dict[str, Any], pico: Maker, tmp_path: Path) -> None:
    base = pico("llama")
    adapter = write_lora(base, tmp_path / "lora", **settings)
    result = merge(adapter, tmp_path / "out")
    wanted = unmerged(base, adapter)
    assert relative(logits(stock(base)), wanted) > 0.1
    assert relative(logits(stock(tmp_path / "out")), wanted) < 1e-5
    assert result.check is not None
    assert result.check.error < 1e-5
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "settings"), MOES.values(), ids=MOES)
def test_a_moe(name: str, settings: dict[str, Any], pico_moe: Maker, tmp_path: Path) -> None:
    base = pico_moe(name)
    adapter = write_lora(base, tmp_path / "lora", **settings)
    merge(adapter, tmp_path / "out")
    wanted = unmerged(base, adapter)
    assert relative(logits(stock(base)), wanted) > 0.1
    assert relative(logits(stock(tmp_path / "out")), wanted) < 1e-5
    assert load_file(base / "model.safetensors").keys() == load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.long
def test_conv1d_and_the_packed_experts_of_upcycle_moe(dense_maker: Any, tmp_path: Path) -> None:
    """GPT-2 stores its matrices ``[in, out]``."""
    dense = dense_maker(tmp_path / "gpt2", "gpt2")
    attention = write_lora(dense, tmp_path / "one", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    merge(attention, tmp_path / "dense")
    assert relative(logits(stock(tmp_path / "dense")), unmerged(dense, attention)) < 1e-5
    upcycle.convert(str(dense), tmp_path / "moe", experts=4, top_k=2, verification={"enabled": False})
    experts = write_lora(
        tmp_path / "moe", tmp_path / "two", target_modules=[], target_parameters=["experts.up", "experts.down"]
    )
    merge(experts, tmp_path / "merged")
    assert relative(logits(stock(tmp_path / "merged")), unmerged(tmp_path / "moe", experts)) < 1e-5
    record = json.loads((tmp_path / "merged" / "upcycle.json").read_text())
    assert record["adapters"][0]["name"] == "two"
    found = verify(tmp_path / "merged", tokens=64)
    assert found.promise == "trained"
    assert "given an adapter (two), since it was converted" in found.explanation
    assert "A LoRA adapter, two, was merged into its weights." in make_card(tmp_path / "merged", "merged")


def one_by_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank-4 matrices of single experts, named as transformers 4 did."""
    made, generator = {}, torch.Generator().manual_seed(3)
    for layer in (0, 1):
        for expert in range(4):
            for leaf, (rows, columns) in {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items():
                name = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                made[f"{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.2
                made[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.2
    return made


def test_experts_that_an_older_folder_names_one_by_one(pico_moe: Maker, tmp_path: Path) -> None:
    """Against the formula itself, in fp64."""
    base = pico_moe("mixtral")
    adapter = write_lora(base, tmp_path / "lora", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    change_tensors(adapter, one_by_one)
    merge(adapter, tmp_path / "out")
    made, added = load_file(tmp_path / "out" / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, weight in tensors.items():
        pair = [f"base_model.model.{name.removesuffix('weight')}lora_{half}.weight" for half in "AB"]
        if pair[0] in added:
            a, b = (added[half].double() for half in pair)
            wanted = (weight.double() + 12 / 4 * b @ a).float()
            assert torch.equal(made[name], wanted), name
        else:
            assert torch.equal(made[name], weight), name


def test_bfloat16_is_rounded_once_and_judged_by_rounding(dense_maker: Any, tmp_path: Path) -> None:
    base = dense_maker(tmp_path / "base", "llama", "bfloat16")
    adapter = write_lora(base, tmp_path / "lora", target_modules=["q_proj"])
    check = merge(adapter, tmp_path / "out").check
    assert check is not None
    assert check.error < 1e-5 < check.rounding_error
    name = "model.layers.0.self_attn.q_proj"
    added = load_file(adapter / "adapter_model.safetensors")
    a, b = (added[f"base_model.model.{name}.lora_{half}.weight"].double() for half in "AB")
    weight = load_file(base / "model.safetensors")[f"{name}.weight"].double()
    made = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(made, (weight + 3 * b @ a).to(torch.bfloat16))


def test_the_check_holds_one_changed_weight_at_a_time(
    pico: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the model, which is what a machine is asked to have memory for."""
    adapter = write_lora(pico("llama"), tmp_path / "lora", target_modules=["q_proj", "up_proj"])
    exact, seen, alive = merge_check._change, [], []

    def watched(weight: torch.Tensor, *others: Any) -> None:
        seen.append(weakref.ref(weight))
        alive.append(len([found for found in seen if found() is not None]))
        exact(weight, *others)

    monkeypatch.setattr(merge_check, "_change", watched)
    check = merge(adapter, tmp_path / "out", dtype="bfloat16").check  # of fp32: what does not change is rounded, too
    assert check is not None and check.error < 1e-5 < check.rounding_error
    assert len(alive) > 2
    assert set(alive) == {1}


def test_the_bits_do_not_depend_on_blocks(pico: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_lora(pico("llama"), tmp_path / "lora", target_modules="all-linear")
    monkeypatch.setattr(adapted_store, "GRID_BYTES", 7 * 32 * 8)
    made = []
    for block in (1 << 24, 500):
        monkeypatch.setattr(merge_adapter, "COPY_BLOCK_BYTES", block)
        merge(adapter, tmp_path / str(block), verify=False)
        made.append((tmp_path / str(block) / "model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_a_wrong_sum_is_found(pico: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_lora(pico("llama"), tmp_path / "lora", target_modules=["q_proj"])
    exact = adapted_store.AdaptedStore._factors
    monkeypatch.setattr(adapted_store.AdaptedStore, "_factors", lambda *a: tuple(1.001 * f for f in exact(*a)))
    with pytest.raises(VerificationError, match="is not the base with the adapter"):
        merge(adapter, tmp_path / "out")
    assert (tmp_path / "out.failed").is_dir()
    assert not (tmp_path / "out").exists()


def test_merging_twice_into_one_model_and_over_a_folder_is_refused(pico: Maker, tmp_path: Path) -> None:
    base = pico("llama")
    adapter = write_lora(base, tmp_path / "lora", target_modules=["q_proj"])
    merge(adapter, tmp_path / "out", verify=False)
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["adapters"][0]["name"] == "lora"
    assert str(tmp_path) not in json.dumps(record)
    with pytest.raises(UsageError, match="merged into this model already"):
        merge(adapter, tmp_path / "again", base=str(tmp_path / "out"))
    with pytest.raises(UsageError, match="not empty"):
        merge(adapter, tmp_path / "out")
    other = write_lora(base, tmp_path / "other", seed=2, target_modules=["q_proj"])
    notes: list[str] = []
    progress = merge_adapter.Progress()
    progress.note = notes.append  # type: ignore[method-assign]
    merge(other, tmp_path / "both", base=str(tmp_path / "out"), verify=False, progress=progress)
    assert [e["name"] for e in json.loads((tmp_path / "both" / "training.json").read_text())["adapters"]] == [
        "lora",
        "other",
    ]
    assert any("was trained on" in note for note in notes)


def shorter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:3].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}


def poisoned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.fill_(float("nan")) for name, tensor in tensors.items()}


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "lora_A" in name}


def lengthened(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = {
        n.replace("lora_B.weight", "lora_magnitude_vector"): t[:, 0].clone()
        for n, t in tensors.items()
        if "lora_B" in n
    }
    return {**tensors, **lengths}


FAULTS: dict[str, tuple[Callable[[Path], Any], type[UpcycleError], str]] = {
    "rank": (lambda f: change_settings(f, r=8), CheckpointError, r"rank 8 on \[32, 32\]"),
    "shape": (lambda f: change_tensors(f, shorter), CheckpointError, r"\[3, 32\]"),
    "absent": (lambda f: change_tensors(f, renamed), CheckpointError, "which .* does not have"),
    "half": (lambda f: change_tensors(f, halved), CheckpointError, "a pair of matrices"),
    "nan": (lambda f: change_tensors(f, poisoned), CheckpointError, "q_proj.* holds NaN or Inf"),
    "kind": (lambda f: change_settings(f, peft_type="IA3"), RefusalError, "'peft_type' is IA3"),
    "pissa": (lambda f: change_settings(f, init_lora_weights="pissa"), RefusalError, "changes the base"),
    "unknown": (lambda f: change_settings(f, layer_replication=[[0, 2]]), RefusalError, "layer_replication"),
    "pattern": (lambda f: change_settings(f, rank_pattern={"(": 3}), CheckpointError, "regular expression"),
    "alpha": (lambda f: change_settings(f, lora_alpha="many"), CheckpointError, "'lora_alpha' must be a number"),
    "dora without lengths": (
        lambda f: change_settings(f, use_dora=True),
        CheckpointError,
        "has no lora_magnitude_vector, and 'use_dora' .* is true",
    ),
    "lengths without dora": (
        lambda f: change_tensors(f, lengthened),
        CheckpointError,
        "has a lora_magnitude_vector, and 'use_dora' .* is false",
    ),
    "a switch in words": (
        lambda f: change_settings(f, use_rslora="false"),
        CheckpointError,
        "'use_rslora' must be true or false, got false",
    ),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        CheckpointError,
        "only adapter_model.bin",
    ),
    "no base": (lambda f: change_settings(f, base_model_name_or_path=None), UsageError, "does not say what model"),
    "gone base": (lambda f: change_settings(f, base_model_name_or_path="/nowhere"), UsageError, "no such file"),
}


@pytest.fixture(scope="module")
def sound(pico: Maker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(pico("llama"), tmp_path_factory.mktemp("sound"), target_modules=["q_proj"])


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("fault", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_fit_is_refused(
    fault: Callable[[Path], Any], error: type[UpcycleError], message: str, sound: Path, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(sound, tmp_path / "lora"))
    fault(adapter)
    with pytest.raises(error, match=message) as caught:
        merge(adapter, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_tied_embedding_is_refused(pico: Maker, tmp_path: Path) -> None:
    adapter = write_lora(pico("qwen2"), tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(RefusalError, match="one matrix"):
        merge(adapter, tmp_path / "out")
