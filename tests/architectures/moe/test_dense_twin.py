"""Which dense model a MoE is but for its FFNs: proven by the logits of both stock models where the FFNs put out nothing."""

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

from upcycle.architectures.moe.dense_twin import DenseTwin, dense_twin, width_beside
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import RefusalError, UsageError

pytestmark = pytest.mark.one_in(5)  # the other cases are long

Models = Callable[..., Path]
FAMILY = {
    "mixtral": "llama",
    "qwen2_moe": "qwen2",
    "qwen2_moe-softmax": "qwen2",
    "qwen3_moe": "qwen3",
    "qwen3_5_moe_text": "qwen3_5_text",
    "flex_olmo": "olmo2",
    "cohere2_moe": "cohere2",
    "cohere2_moe-sigmoid": "cohere2",
    "granitemoe": "granite",
    "granitemoeshared": "granite",
    "granitemoe_swa": "granite_swa",
    "hunyuan_v1_moe": "hunyuan_v1_dense",
    "lfm2_moe": "lfm2",
    "dots1": "qwen3",
    "solar_open": "llama",
    "deepseek_v3": "youtu",
    "ernie4_5_moe": "ernie4_5",
    "ernie4_5_moe-alone": "ernie4_5",
}
NONE = {
    "olmoe": "no dense architecture known here has the block of this 'olmoe' model",
    "mellum": "'rope_parameters' differ per layer type",
    "glm4_moe": "'partial_rotary_factor' is 0.5",  # and of glm, which rotates parts, too, gate and up are one tensor
    "glm4_moe-sigmoid": "'partial_rotary_factor' is 0.5",
    **{
        name: f"no dense architecture known here has the block of this '{name}' model"
        for name in ("deepseek_v2", "glm4_moe_lite", "exaone_moe", "minimax_m2", "qwen3_next", "granitemoehybrid")
    },
    **{
        name: f"a '{name}' model has other parts beside its text model, and dense models and upcycle_moe are made of text"
        for name in ("qwen3_vl_moe", "qwen3_5_moe")
    },
    "gpt_oss": "the experts of a 'gpt_oss' model have biases and a clamped activation",
    "phimoe": "stablelm: 'rope_parameters' is",  # which turns a quarter of each head, and is written with other numbers
    "phimoe-constant": "stablelm: 'rope_parameters' is",
}


def twin(folder: Path, width: int = 16, wanted: str = "auto", made_of: str = "") -> DenseTwin:
    return dense_twin(MoeCheckpoint.open(str(folder)).model, width, wanted, made_of)


def changed(folder: Path, to: Path, **keys: Any) -> Path:
    """The same tensors with other keys in config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({k: v for k, v in {**config, **keys}.items() if v != "gone"}))
    return to


def test_every_architecture_is_here() -> None:
    assert {*FAMILY, *NONE} == set(PICO_MOE)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_without_ffns_both_stock_models_compute_the_same(
    name: str, fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    source = shutil.copytree(pico_moe(name, fused), tmp_path / "moe")
    ends = ("down_proj", "down_proj.weight", "w2.weight", "output_linear.weight")
    tensors = {n: t * 0 if n.endswith(ends) else t for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = MoeCheckpoint.open(str(source)).model
    width = width_beside(model, 0) or 16
    found = twin(source, width)
    assert found.family.name == FAMILY[name]
    outside = {new: tensors[old.name] for layer in found.outside.values() for new, old in layer.items()}
    ffns = {}
    for layer in range(found.dense.num_hidden_layers):
        for new, shape in found.family.ffn_specs(found.dense, layer).items():
            down = new == found.family.ffn_names(layer)["down"]
            ffns[new] = torch.zeros(shape) if down else torch.randn(shape)
    (tmp_path / "dense").mkdir()
    save_file(outside | ffns, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    (tmp_path / "dense" / "config.json").write_text(json.dumps(found.config))
    ids = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(1))
    logits = []
    for folder in (source, tmp_path / "dense"):
        loaded, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), loading
        loaded.set_experts_implementation("eager")
        with torch.no_grad():
            logits.append(loaded.eval()(ids).logits)
    # The same operations in the same order; fp32 buffers and norms inside stock classes may be computed in other blocks.
    assert torch.dist(*logits) < 1e-6 * torch.linalg.norm(logits[0])
    assert logits[0].std() > 0.01


@pytest.mark.parametrize("name", NONE)
def test_where_no_dense_family_fits_the_reason_is_given(name: str, pico_moe: Models) -> None:
    with pytest.raises(RefusalError, match=NONE[name]) as caught:
        twin(pico_moe(name))
    assert "naee" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("name", "keys", "family"),
    [
        ("mixtral", {"sliding_window": 16}, "mistral"),  # Llama has none
        ("dots1", {"sliding_window": 16, "layer_types": ["full_attention"] * 2}, "qwen3"),  # no layer has it
        ("granitemoe", {"attention_multiplier": 8**-0.5}, "llama"),  # nothing is multiplied
    ],
)
def test_settings_decide(name: str, keys: dict[str, Any], family: str, pico_moe: Models, tmp_path: Path) -> None:
    assert twin(changed(pico_moe(name), tmp_path / "other", **keys)).family.name == family


def test_a_setting_that_the_family_lacks_is_named_with_both_values(pico_moe: Models, tmp_path: Path) -> None:
    keys = {"attention_multiplier": 8**-0.5, "embedding_multiplier": 3.0}
    other = changed(pico_moe("granitemoe"), tmp_path / "other", **keys)
    assert twin(other).family.name == "granite"
    with pytest.raises(RefusalError, match=r"llama: 'embedding_multiplier' is 3.0 here, and would be 1.0"):
        twin(other, wanted="llama")


def test_what_it_was_made_of_comes_first_and_the_user_before_that(pico_moe: Models) -> None:
    source = pico_moe("mixtral")
    assert twin(source, made_of="mistral").family.name == "mistral"
    assert twin(source, made_of="mistral", wanted="llama").family.name == "llama"
    assert twin(source, made_of="gemma").family.name == "llama"  # whose norms are stored otherwise


@pytest.mark.parametrize(
    ("wanted", "error", "message", "hint"),
    [
        ("lama", UsageError, "unknown dense family 'lama'", "did you mean 'llama'"),
        ("qwen3", RefusalError, "without its experts is no 'qwen3' model", "llama, mistral"),
        ("gemma", RefusalError, "gemma: .* is stored in another form", "naee"),
    ],
)
def test_a_target_that_is_none_is_refused(
    wanted: str, error: type[Exception], message: str, hint: str, pico_moe: Models
) -> None:
    with pytest.raises(error, match=message) as caught:
        twin(pico_moe("mixtral"), wanted=wanted)
    assert hint in str(caught.value.hint)  # type: ignore[attr-defined]
