"""What the wrapper promises: described models convert, load by the stock Auto class and give the dense logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from wrapped_models import SMALL, relative_error, small_model

import upcycle
import upcycle.models
from upcycle.errors import CheckpointError, RefusalError
from upcycle.files.locate import DEMO_FOLDER
from upcycle.inference.generate import Writer
from upcycle.models.load import load_model
from upcycle.registry import load
from upcycle.report.collect import Wanted
from upcycle.trainers.routing.stock_routers import moe_layers
from upcycle.verification import verify_experts

pytestmark = pytest.mark.one_in(16)  # the other cases are long

CAUSAL = [name for name, (_, kind, _) in SMALL.items() if kind == "CausalLM"]
NORMED = ["gemma2", "gemma3_text", "olmo3", "glm4", "exaone4", "hyperclovax"]
QUICK = {"tokenizer": "none", "verification": {"tokens": 64}}
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, **QUICK}
SPLIT: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 8, **QUICK}
SHARED: dict[str, Any] = {"method": "random_split", "experts": 6, "top_k": 6, "shared": 2, **QUICK}
SPARSE: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 3, **QUICK}
ROUNDING = 2e-6  # fp32, two or three layers: a few roundings of 6e-8 each


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``small("gpt2")`` is a folder with that model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            small_model(name).save_pretrained(made[name])
        return made[name]

    return get


def with_tokenizer(folder: Path, name: str) -> Path:
    """A small model with the demo's tokenizer and vocabulary."""
    small_model(name, vocab_size=4096).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO_FOLDER / "model" / file, folder / file)
    return folder


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of a folder loaded as any user would."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def wrapped(name: str) -> dict[str, str]:
    """The target to ask for where a stock MoE holds the model, too."""
    return {"target": "upcycle_moe"} if name == "gpt_neox-sequential" else {}


def ids_below(most: int) -> torch.Tensor:
    return torch.randint(5, most, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.one_in(20)
@pytest.mark.parametrize("keys", [COPIES, SPLIT, SHARED], ids=["copies", "split", "shared"])
@pytest.mark.parametrize("name", CAUSAL)
def test_every_described_model_converts_exactly(
    name: str, keys: dict[str, Any], small: Callable[[str], Path], tmp_path: Path
) -> None:
    result = upcycle.convert(str(small(name)), tmp_path / "out", **keys, **wrapped(name))
    assert result.plan.target == "upcycle_moe"
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert result.verification.layer_errors is not None
    assert 0 <= max(result.verification.layer_errors) < ROUNDING
    ids = ids_below(94)
    assert relative_error(logits(tmp_path / "out", ids), logits(small(name), ids)) < ROUNDING


@pytest.mark.one_in(16)
@pytest.mark.parametrize("name", CAUSAL)
def test_sparse_splits_add_up_with_every_expert_active(name: str, small: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(small(name)), tmp_path / "out", **SPARSE, **wrapped(name)).verification
    assert result is not None
    assert result.verdict == "approximate"
    assert result.all_experts_error is not None
    assert result.all_experts_error < ROUNDING


@pytest.mark.one_in(12)
@pytest.mark.parametrize("name", [name for name in CAUSAL if load("described", SMALL[name][0]).uncalibrated is None])
def test_splits_are_calibrated(name: str, tmp_path: Path) -> None:
    """The refit must help: on held-out tokens, fitted logits are nearer to the dense ones than plain ones are."""
    source = with_tokenizer(tmp_path / "dense", name)
    keys = {"method": "random_split", "experts": 8, "top_k": 4, "calibration": {"text": "prose", "tokens": 2048}}
    keys |= wrapped(name)
    result = upcycle.convert(str(source), tmp_path / "out", verification={"tokens": 256}, **keys)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    plain = upcycle.convert(str(source), tmp_path / "plain", refit="none", verification={"tokens": 256}, **keys)
    assert plain.verification is not None
    assert result.verification.relative_logit_error < plain.verification.relative_logit_error


@pytest.mark.long
@pytest.mark.parametrize("name", NORMED)
def test_what_goes_through_a_norm_is_fitted_before_it(name: str, tmp_path: Path) -> None:
    """On the dense model's own states, every layer's output before the norm is nearer to the dense FFN's for the fit."""
    source = with_tokenizer(tmp_path / "dense", name)
    keys = {"method": "random_split", "experts": 8, "top_k": 4, "target": "upcycle_moe"}
    keys |= {"calibration": {"text": "prose", "tokens": 8192, "mode": "parallel"}, "verification": {"tokens": 1024}}
    fitted, plain = (
        upcycle.convert(str(source), tmp_path / refit, refit=refit, **keys).verification for refit in ("down", "none")
    )
    assert fitted is not None
    assert plain is not None
    ratios = [a / b for a, b in zip(fitted.layer_errors, plain.layer_errors, strict=True)]
    assert max(ratios) < 0.98, ratios


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_splits_are_reported(name: str, tmp_path: Path) -> None:
    """BLOOM's layers call the parts of their FFN themselves: no module is the dense FFN that experts are compared with."""
    source = with_tokenizer(tmp_path / "dense", name)
    keys = {"method": "random_split", "experts": 4, "top_k": 2, "verification": {"enabled": False}}
    upcycle.convert(str(source), tmp_path / "out", **keys)
    report = upcycle.write_report(tmp_path / "out", wanted=Wanted(["prose"], 64, ["def"])).data
    layers = report["experts"]["layers"]
    assert len(layers) == 2
    assert [layer["to_dense"] is None for layer in layers] == [name == "bloom"] * 2


@pytest.mark.long
def test_text_is_written_and_measured_and_routers_are_read(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "dense", "gpt2")
    upcycle.convert(str(source), tmp_path / "out", **{**COPIES, "tokenizer": "copy"})
    model = load_model(str(tmp_path / "out"))
    assert [(layer.index, layer.rule.top_k, layer.rule.experts) for layer in moe_layers(model)] == [
        (0, 2, 4),
        (1, 2, 4),
    ]
    assert all(layer.rule.score == "softmax" and layer.rule.normalized for layer in moe_layers(model))
    writer = Writer(str(tmp_path / "out"))
    tokens = list(writer.write(writer.encode("hello"), 4))
    assert writer.kernels == "upcycle"
    assert all(len(token.experts) == 2 for token in tokens[:-1])
    assert upcycle.verify(tmp_path / "out").verdict == "exact"
    report = upcycle.write_report(tmp_path / "out", wanted=Wanted(["prose"], 64, ["def"])).data
    assert [layer["layer"] for layer in report["experts"]["layers"]] == [0, 1]
    assert min(min(layer["to_dense"]) for layer in report["experts"]["layers"]) > 0.999  # copies


@pytest.mark.one_in(20)
@pytest.mark.parametrize("name", PICO)
def test_models_with_a_stock_target_can_be_wrapped_too(name: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", target="upcycle_moe", **SPLIT)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    ids = ids_below(4000)
    assert relative_error(logits(tmp_path / "out", ids), logits(pico(name), ids)) < ROUNDING


@pytest.mark.one_in(16)
@pytest.mark.parametrize("name", CAUSAL)
def test_streamed_verification_reads_the_same(
    name: str, small: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_experts, "available_memory", lambda: 0)
    result = upcycle.convert(str(small(name)), tmp_path / "out", **COPIES).verification
    assert result is not None
    assert result.streamed
    assert result.verdict == "exact"


def test_older_names_are_found_by_transformers_own_rules(small: Callable[[str], Path], tmp_path: Path) -> None:
    """GPT-2's files have no prefix and hold masks; GPT-NeoX's head has another name in them."""
    for name, rename in (
        ("gpt2", lambda key: key.removeprefix("transformer.")),
        ("gpt_neox", lambda key: key.replace("lm_head.", "embed_out.")),
    ):
        old = tmp_path / name
        old.mkdir()
        tensors = load_file(small(name) / "model.safetensors")
        renamed = {rename(key): value for key, value in tensors.items()}
        if name == "gpt2":
            renamed["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
        save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
        (old / "config.json").write_text((small(name) / "config.json").read_text())
        upcycle.convert(str(old), tmp_path / f"{name}-out", **COPIES)
        ids = ids_below(94)
        assert relative_error(logits(tmp_path / f"{name}-out", ids), logits(small(name), ids)) < ROUNDING


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "tensor 'transformer.h.1.ln_2.bias' is missing"),
        (lambda t: t.update({"transformer.h.0.extra": torch.ones(2)}), "'transformer.h.0.extra' is not part of a gpt2"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(3, 32)}),
            r"'transformer.wpe.weight' has shape \[3, 32\], config.json says \[64, 32\]",
        ),
    ],
)
def test_damaged_sources_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, small: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(small("gpt2") / "model.safetensors")
    change(tensors)
    (tmp_path / "dense").mkdir()
    save_file(tensors, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "dense" / "config.json").write_text((small("gpt2") / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)
    assert not (tmp_path / "out").exists()


def test_what_a_described_model_cannot_do_is_refused(small: Callable[[str], Path], tmp_path: Path) -> None:
    for keys in (
        {"method": "static_prune", "active": 0.5},
        {"method": "depth_stack"},
    ):
        with pytest.raises(RefusalError, match="knows only its FFNs"):
            upcycle.convert(str(small("gpt2")), tmp_path / "out", **keys, **QUICK)
    with pytest.raises(RefusalError, match="mixtral"):
        upcycle.convert(str(small("gpt2")), tmp_path / "out", target="mixtral", **COPIES)
    with pytest.raises(
        RefusalError, match=r"gemma3_text to mixtral is not a conversion .* also norms values"
    ) as caught:
        upcycle.convert(str(small("gemma3_text")), tmp_path / "out", target="mixtral", **COPIES)
    assert "--target upcycle_moe" in (caught.value.hint or "")


def test_config_says_what_was_replaced(small: Callable[[str], Path], tmp_path: Path) -> None:
    upcycle.convert(str(small("bloom")), tmp_path / "out", layers="last-half", **SHARED)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"]) == ("upcycle_moe", "bloom")
    (entry,) = config["replaced_ffns"]
    assert entry["paths"] == [["h.1.mlp.dense_h_to_4h", "h.1.mlp.gelu_impl", "h.1.mlp.dense_4h_to_h"]]
    assert (entry["experts"], entry["width"], entry["shared_width"]) == (6, 16, 32)
    assert "auto_map" not in config
