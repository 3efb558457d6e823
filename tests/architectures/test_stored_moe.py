"""MoEs as sources: what is refused, and faults of a checkpoint, each by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from upcycle.architectures.moe_families import MOES, moe_family
from upcycle.architectures.stored_moe import MoeModel
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.errors import CheckpointError, RefusalError, UpcycleError
from upcycle.methods.growing.base import refuse_groups

Models = Callable[..., Path]
Weights = dict[str, torch.Tensor]
EXPERT = "model.layers.1.mlp.experts"


@pytest.fixture
def moe(pico_moe: Models, tmp_path: Path) -> Path:
    """A private copy, to be damaged."""
    return Path(shutil.copytree(pico_moe("qwen3_moe"), tmp_path / "moe"))


def config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"model_type": "jamba"}, RefusalError, "cannot grow the experts of a 'jamba' model"),
        ({"model_type": "llama"}, RefusalError, "is a dense 'llama' model"),
        ({"num_local_experts": 0, "num_experts": 0}, CheckpointError, "must be a positive integer, got 0"),
        ({"num_hidden_layers": "many"}, CheckpointError, "'num_hidden_layers' must be a positive integer"),
        ({"num_hidden_layers": 10**9}, CheckpointError, "'num_hidden_layers' must be a positive integer"),
        ({"rms_norm_eps": "x"}, CheckpointError, "transformers cannot read config.json"),
        ({"model_type": ["qwen3_moe"]}, CheckpointError, "'model_type' must be text"),
        ({"num_local_experts": 8, "num_experts": 8}, CheckpointError, "and there are 8 such; config.json asks for"),
        ({"moe_intermediate_size": 24}, CheckpointError, r"has shape \[16, 32\]"),
        ({"num_hidden_layers": 3}, CheckpointError, "'num_hidden_layers' is 3, the weights have 2 layers"),
        ({"num_hidden_layers": 1}, CheckpointError, "'num_hidden_layers' is 1, the weights have 2 layers"),
    ],
)
def test_configurations(changes: dict[str, Any], kind: type[UpcycleError], message: str, moe: Path) -> None:
    config(moe, **changes)
    with pytest.raises(kind, match=message):
        MoeCheckpoint.open(str(moe))


def test_a_missing_expert_is_found(moe: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    del tensors[f"{EXPERT}.3.up_proj.weight"]
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"there are 7 such; config.json asks for \[4, 32, 32\]"):
        MoeCheckpoint.open(str(moe))


def test_groups_of_experts_are_refused_where_they_would_change() -> None:
    model = MoeModel.read({"model_type": "glm4_moe", "n_group": 2}, {}, "here")
    with pytest.raises(RefusalError, match=r"some method does not take .* choose among 2 groups of experts first"):
        refuse_groups(model, "some method")
    refuse_groups(MoeModel.read({"model_type": "glm4_moe", "n_group": 1}, {}, "here"), "some method")
    greedy = {
        "model_type": "deepseek_v2",
        "n_group": 2,
        "topk_method": "greedy",
        "num_experts_per_tok": 2,
    }  # which reads no groups
    assert MoeModel.read(greedy, {}, "here").groups == 1


def test_a_dense_model_is_told_what_makes_a_moe_of_it() -> None:
    with pytest.raises(RefusalError) as caught:
        moe_family({"model_type": "qwen3"}, "here")
    assert "--method sparse_upcycling" in (caught.value.hint or "")


def test_unknown_moes_are_told_the_known_ones() -> None:
    with pytest.raises(RefusalError) as caught:
        moe_family({"model_type": "jamba"}, "here")
    assert all(name in (caught.value.hint or "") for name in MOES)
