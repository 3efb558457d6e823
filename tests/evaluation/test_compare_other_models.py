"""``upcycle compare`` with times on what is no plain Llama: models of parts, and models whose keys have other names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from wrapped_models import small_model

from upcycle.evaluation.compare import compare
from upcycle.evaluation.shape_speed import first_layers
from upcycle.files.locate import DEMO_FOLDER


def test_layers_are_cut_by_the_models_own_keys() -> None:
    gpt2 = {"model_type": "gpt2", "n_layer": 4, "n_embd": 8}
    assert first_layers(gpt2, 2) == {**gpt2, "n_layer": 2}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    text = {"model_type": "qwen2", "num_hidden_layers": 3, "layer_types": kinds}
    parts = {"model_type": "llava", "text_config": text, "vision_config": {"num_hidden_layers": 3}}
    cut = first_layers(parts, 2)
    assert cut["text_config"] == {**text, "num_hidden_layers": 2, "layer_types": kinds[:2]}
    assert cut["vision_config"] == parts["vision_config"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["llava", "gpt2"])
def test_other_models_are_timed(name: str, tower: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "dense"
    if name == "llava":
        shutil.copytree(tower("llava", "llama"), source)
    else:
        small_model(name, vocab_size=4096, n_embd=128, n_inner=512).save_pretrained(source)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO_FOLDER / "model" / file, source / file)
    sizes = {"calibration_tokens": 1024, "tokens": 512, "window": 32, "pieces": 4}
    found = compare(str(source), methods=["importance"], routers=["ridge"], active=[0.75], **sizes).as_dict()
    assert found["timing"]["prefill_seconds"] > 0
    assert all(row["time"] > 0 and set(row["times"]) == {"grouped_mm", "upcycle"} for row in found["results"])
