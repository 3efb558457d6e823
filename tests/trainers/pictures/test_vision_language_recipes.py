"""The shipped recipes for vision-language models, one after another as their headers say, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from picture_chats import chats, pictured_llava
from training_runs import run, steps

import upcycle
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.recipe.shipped_recipes import shipped
from upcycle.trainers.recipe.training_recipe import parse_train_recipe

pytestmark = [pytest.mark.long, pytest.mark.one_in(3)]

BALANCES = {f"loss/{part}.{name}" for part in ("vision", "connector") for name in ("switch_balance", "router_z")}
# recipe of the dense stages, of the conversion, of the sparse stages, and for every stage what its step reports and what changes
PAPERS: dict[str, tuple[str, str, str, dict[str, tuple[set[str], set[str]]]]] = {
    "MoE-LLaVA": (
        "moe_tuning_dense",
        "moe_tuning",
        "moe_tuning",
        {
            "align": (set(), {"connector"}),
            "tune": (set(), {"connector", "language"}),
            "moe": ({"loss/switch_balance"}, {"language"}),
        },
    ),
    "CuMo": (
        "cumo_dense",
        "cumo_visual",
        "cumo_visual",
        {
            "pre-align": (set(), {"connector"}),
            "pre-finetune": (set(), {"connector", "language", "vision"}),
            "visual-instruction": (BALANCES, {"connector", "language", "vision"}),
        },
    ),
    "LLaVA-MoD": (
        "llava_mod_dense",
        "moe_tuning",
        "llava_mod_sparse",
        {
            "align": (set(), {"connector"}),
            "mimic": ({"loss/kl"}, {"connector", "language"}),
            "mimic ": ({"loss/kl", "loss/switch_balance"}, {"language"}),
            "prefer": ({"loss/preference", "loss/switch_balance"}, {"language"}),
        },
    ),
}


def data_of(folder: Path) -> dict[str, Any]:
    return {
        "domains": {"chat": str(folder / "chats.jsonl")},
        "chat_template": "turns",
        "validation": {"fraction": 0.0},
        "cache": str(folder / "cache"),
    }


def trained(name: str, model: Path, out: Path, data: Path, teacher: Path, only: str) -> tuple[Path, dict[str, Any]]:
    """One stage of a recipe, alone and small; returns the exported model and its first step."""
    content = yaml.safe_load(shipped("train")[name].read_text())
    content |= {
        "length": 64,
        "global_batch": 4,
        "micro_batch": 2,
        "dtype": "float32",
        "zero": {},
        "data": data_of(data),
    }
    content |= {"model": str(model), "output": str(out), "log": {"peak_tflops": 0.05}}
    content["stages"] = [stage for stage in content["stages"] if stage["name"] == only]
    for stage in content["stages"]:
        stage |= {"steps": 1, "learning_rate": 1e-3}
        stage["schedule"]["warmup"] = 0
        if "distillation" in stage:
            stage["distillation"]["parent"] = str(teacher)
        if "data" in stage:
            pairs = {**stage["data"]["domains"]["pairs"], "text": str(data / "pairs.jsonl")}
            stage["data"] = data_of(data) | {"domains": {"pairs": pairs}}
            content["length"] = 128
    recipe = parse_train_recipe(content, name)
    result, _ = run(recipe)
    assert result.model
    return Path(result.model), steps(recipe)[0]


def changed_parts(before: Path, after: Path) -> set[str]:
    old, new = SafetensorsFolder(before), SafetensorsFolder(after)
    assert set(old.specs) == set(new.specs)
    names = [name for name in old.specs if not torch.equal(old.read(name), new.read(name))]
    return {"connector" if "projector" in name else "vision" if "vision" in name else "language" for name in names}


@pytest.mark.parametrize("paper", PAPERS)
def test_stages_train_what_the_paper_trains_by_its_losses(paper: str, tmp_path: Path) -> None:
    llava, data = pictured_llava(tmp_path / "llava"), tmp_path / "data"
    chats(data)
    rows = [json.loads(line) for line in (data / "chats.jsonl").open()]
    pairs = [
        {
            "image": row["image"],
            "prompt": row["conversations"][0]["value"],
            "chosen": "It is red.",
            "rejected": "It is not.",
        }
        for row in rows
    ]
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    dense, conversion, sparse, stages = PAPERS[paper]
    model = llava
    for number, (stage, (losses, parts)) in enumerate(stages.items()):
        first_sparse = stage in ("moe", "visual-instruction", "mimic ")
        if first_sparse:
            keys = yaml.safe_load(shipped("convert")[conversion].read_text())
            upcycle.convert(str(model), tmp_path / "moe", **keys, verification={"tokens": 32})
            assert json.loads((tmp_path / "moe" / "verification.json").read_text())["verdict"] == "exact"
            model = tmp_path / "moe"
        recipe, name = sparse if (tmp_path / "moe").exists() else dense, stage.strip()
        made, line = trained(recipe, model, tmp_path / str(number), data, llava, name)
        assert {key for key in line if key.startswith("loss/")} == losses, stage
        assert changed_parts(model, made) == parts, stage
        model = made
