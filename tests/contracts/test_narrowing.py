"""What every method that makes a dense model narrower promises, on every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pico_models import PICO
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.dense.narrowed import pair_rows
from upcycle.checkpoints.shard_writer import ShardWriter
from upcycle.errors import RefusalError, UsageError
from upcycle.registry import FAMILIES, METHODS, load

Pico = Callable[[str], Path]
NAMES = [name for name in METHODS if load("method", name).kind == "narrowing"]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
QUICK: dict[str, Any] = {"keep": 0.5, "calibration": TEXT, "verification": {"tokens": 64}}
CELLS = [(method, name) for method in NAMES for name in PICO]
WITH_HEADS = ("llama", "llama-bias", "llama-rope", "mistral-window", "qwen2")
# fp64, but both stock classes round frequencies to fp32: 6e-8, times 24 positions.
SAME = 1e-5


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.as_tensor(model(ids).logits)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_family_is_here() -> None:
    assert NAMES
    assert {PICO[name][0] for _, name in CELLS} == set(FAMILIES)


@pytest.mark.one_in(96)
@pytest.mark.parametrize(("method", "name"), CELLS)
def test_a_narrower_model_loads_in_stock_transformers_and_writes(
    method: str, name: str, pico: Pico, tmp_path: Path
) -> None:
    source, out = pico(name), tmp_path / "out"
    before = contents(source)
    result = upcycle.convert(str(source), out, method=method, **QUICK)
    assert contents(source) == before
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert result.verification.relative_logit_error > 1e-3  # something is gone: the comparison sees it
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)
    elements = sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values())
    assert elements == result.plan.parameters_total < result.plan.parameters_dense
    layers = json.loads((out / "growth.json").read_text())["layers"]
    assert len(layers) == model.config.num_hidden_layers
    assert all(len(layer["neurons"]) == 48 for layer in layers.values())
    assert all(layer["ffn"]["missing_after"] <= layer["ffn"]["missing_before"] for layer in layers.values())


@pytest.mark.one_in(96)
@pytest.mark.parametrize(("method", "name"), CELLS)
def test_keeping_all_changes_nothing_bit_for_bit(method: str, name: str, pico: Pico, tmp_path: Path) -> None:
    result = upcycle.convert(str(pico(name)), tmp_path / "out", method=method, keep=1, verification={"tokens": 64})
    assert result.verification is not None
    assert (result.verification.verdict, result.verification.relative_logit_error) == ("exact", 0.0)
    before, after = load_file(pico(name) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


@pytest.mark.one_in(16)
@pytest.mark.parametrize("refit", ["none", "down"])
@pytest.mark.parametrize("name", WITH_HEADS)
def test_narrow_heads_are_whole_ones_with_zeros(name: str, refit: str, pico: Pico, tmp_path: Path) -> None:
    """The dense stock class, with the narrow projections in the places of the kept pairs, computes the same logits."""
    source, out = pico(name), tmp_path / "out"
    upcycle.convert(
        str(source), out, method="modegpt", **{**QUICK, "keep": 1, "refit": refit}, parameters={"heads": 0.5}
    )
    narrow, wide = stock(out), stock(source)
    pairs = json.loads((out / "growth.json").read_text())["pairs"]["pairs"]
    config, head = wide.config, narrow.config.head_dim
    old = wide.model.layers[0].self_attn.head_dim
    assert head == old // 2
    with torch.no_grad():
        for ours, theirs in zip(narrow.model.layers, wide.model.layers, strict=True):
            one, two = ours.self_attn, theirs.self_attn
            factor = one.scaling / two.scaling
            for part, count in (("q", config.num_attention_heads), ("k", config.num_key_value_heads), ("v", 0)):
                rows = pair_rows(count, old, pairs) if count else _first(config.num_key_value_heads, old, head)
                for leaf in ("weight", "bias"):
                    small, whole = (getattr(getattr(a, f"{part}_proj"), leaf) for a in (one, two))
                    if whole is not None:
                        whole.zero_()[rows] = small * (factor if part == "q" else 1)
            two.o_proj.weight.zero_()[:, _first(config.num_attention_heads, old, head)] = one.o_proj.weight
    found, expected = logits(narrow), logits(wide)
    assert torch.dist(found, expected) <= SAME * torch.linalg.norm(expected)
    assert torch.dist(found, logits(stock(source))) > 1e-3 * torch.linalg.norm(expected)


def _first(heads: int, old: int, head: int) -> list[int]:
    return [first * old + row for first in range(heads) for row in range(head)]


@pytest.mark.parametrize("name", ["qwen3", "cohere2", "glm", "olmo2", "smollm3"])
def test_heads_that_no_stock_class_holds_narrower_are_refused(name: str, pico: Pico) -> None:
    with pytest.raises(RefusalError, match="cannot be made narrower"):
        upcycle.plan(str(pico(name)), method="modegpt", **QUICK, parameters={"heads": 0.5})


@pytest.mark.long
@pytest.mark.parametrize("method", NAMES)
def test_same_inputs_give_the_same_bytes_and_a_stopped_run_continues(
    method: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pico("llama"), tmp_path / "dense")
    keys: dict[str, Any] = {"method": method, **QUICK, "parameters": {"heads": 0.5}}
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "one", **keys)
    finish, count = ShardWriter.finish, [0]

    def stops(self: ShardWriter, unit: Any) -> None:
        finish(self, unit)
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "finish", stops)
        with pytest.raises(KeyboardInterrupt):
            upcycle.convert(str(tmp_path / "dense"), tmp_path / "two", **keys)
    assert upcycle.convert(str(tmp_path / "dense"), tmp_path / "two", **keys).resumed
    for file in ("model.safetensors", "growth.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert upcycle.verify(tmp_path / "two", tokens=64).verdict == "approximate"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"keep": None}, "needs to know how many neurons"),
        ({"keep": 0.99}, "nothing would be smaller"),
        ({"parameters": {"heads": 0.99}}, "nothing would be smaller"),
        ({"refit": "scale"}, "refit: scale is of splits"),
        ({"calibration": {}}, "needs calibration text"),
        ({"experts": 4}, "makes a dense model narrower, and does not read the key 'experts'"),
    ],
)
def test_bad_input_is_one_clear_error(keys: dict[str, Any], said: str, pico: Pico) -> None:
    given = {key: value for key, value in {**QUICK, **keys}.items() if value is not None}
    with pytest.raises(UsageError, match=said) as caught:
        upcycle.plan(str(pico("llama")), method="modegpt", **given)
    assert caught.value.hint
