"""Training adapters: only they move, runs continue bit for bit, and peft computes what the run computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_folders import logits, relative, stock, unmerged
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn
from training_runs import losses, on_ranks, recipe_for, run, steps, two_ranks

from upcycle.adapters.live import LowRankPair, attach
from upcycle.conversion.merge_adapter import merge
from upcycle.errors import UsageError
from upcycle.models.load import load_model
from upcycle.trainers.adapting.targets import adaptable, add_adapter
from upcycle.trainers.checkpoints.export import export
from upcycle.trainers.checkpoints.read import latest, open_checkpoint
from upcycle.trainers.optimizing.parameter_groups import groups, parts, select
from upcycle.trainers.recipe.adapter_recipe import AdapterRecipe
from upcycle.trainers.recipe.part_recipes import GroupParameters

Model = Callable[[str], Path]
EVERYTHING = {"rank": 3, "alpha": 6, "targets": ["all", "router"]}
LARGE = {"learning_rate": 0.1, "steps": 4}


def test_products_are_those_of_the_formula_in_fp64() -> None:
    """``W + scale B A`` of a linear layer, of fused experts, and of such that are stored ``[in, out]``; and their gradients."""
    generator = torch.Generator().manual_seed(0)
    for shape, turned in (((5, 7), False), ((3, 5, 7), False), ((3, 7, 5), True)):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        pair = LowRankPair(weight, 2, 0.75, turned)
        pair.reset(generator)
        assert not pair.product().any()
        with torch.no_grad():
            pair.b.copy_(torch.randn(pair.b.shape, generator=generator))
        wanted = torch.zeros_like(weight)
        for expert in range(shape[0] if len(shape) == 3 else 1):
            a, b = (pair.a, pair.b) if len(shape) == 2 else (pair.a[expert], pair.b[expert])
            delta = 0.75 * sum(torch.outer(b[:, r], a[r]) for r in range(2))
            wanted[expert if len(shape) == 3 else ...] = delta.T if turned else delta
        assert torch.allclose(pair.product(), wanted, rtol=1e-14, atol=1e-15)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fused = nn.Linear(7, 5, dtype=torch.float64), nn.Parameter(torch.randn(3, 4, 5).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("eoi,ti->teo", self.fused, self.first(x))

    holder, x = Holder().requires_grad_(False), torch.randn(6, 7, generator=generator, dtype=torch.float64)
    outer = nn.Module()
    outer.inner = holder
    pairs = {name: LowRankPair(holder.get_parameter(name), 2, 0.5) for name in ("first.weight", "fused")}
    for pair in pairs.values():
        nn.init.normal_(pair.a, generator=generator)
        nn.init.normal_(pair.b, generator=generator)
    attach(outer, {f"inner.{name}": pair for name, pair in pairs.items()})
    linear = holder.first.weight + pairs["first.weight"].product()
    fused = holder._parameters["fused"] + pairs["fused"].product()
    wanted = torch.einsum("eoi,ti->teo", fused, x @ linear.T + holder.first.bias)
    given = outer.inner(x)
    assert torch.allclose(given, wanted, rtol=1e-12)
    parameters = [p for p in outer.parameters() if p.requires_grad]
    assert len(parameters) == 4
    for one, two in zip(
        torch.autograd.grad(given.square().sum(), parameters),
        torch.autograd.grad(wanted.square().sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(one, two, rtol=1e-10)


def test_what_is_adapted_and_what_is_kept_of_it(pico_moe: Model) -> None:
    model = load_model(pico_moe("qwen2_moe"), experts="auto", training=True)
    kinds = adaptable(model)
    named = {kind: sorted(n for n, k in kinds.items() if k == kind) for kind in sorted(set(kinds.values()))}
    assert sorted(named) == ["attention", "ffn", "routed", "router", "shared"]
    assert "model.layers.0.mlp.up_proj.weight" in named["ffn"]
    assert named["routed"] == ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]
    assert named["router"] == ["model.layers.1.mlp.gate.weight"]
    assert all("shared_expert." in name for name in named["shared"])
    add_adapter(model, AdapterRecipe(rank=2, targets=["attention", "routed", "router"]), 0)
    belongs = select(model, ["all"])
    assert set(belongs.values()) == {"rest", "experts", "router"}
    held = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith("adapter.") or name.endswith("mlp.gate.weight") for name in held)
    optimized = [p for group in groups(model, GroupParameters(learning_rate=1.0)) for p in group["params"]]
    assert sum(p.numel() for p in optimized) == sum(model.get_parameter(name).numel() for name in held)
    assert parts(model)["adapter.model/layers/1/mlp/experts/down_proj.a"] == "experts"
    assert set(select(model, ["experts"])) == {name for name in held if "/experts/" in name}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "granitemoe", "llama"])
def test_peft_computes_what_the_run_computed_and_a_merge_too(
    name: str, pico: Model, pico_moe: Model, tmp_path: Path
) -> None:
    base = pico(name) if name == "llama" else pico_moe(name)
    adapter = EVERYTHING if name != "llama" else {"rank": 3, "targets": ["all"]}
    stage = {**LARGE, **({"losses": {}} if name == "llama" else {})}
    recipe = recipe_for(base, tmp_path, stage=stage, adapter=adapter, saving={"every": 2, "export": True})
    result, _ = run(recipe)
    assert result.model == str(tmp_path / "run" / "adapter")
    saved = latest(tmp_path / "run")
    assert saved
    model = load_model(base, experts="eager", training=True)
    assert recipe.adapter
    add_adapter(model, recipe.adapter, 1)
    saved.load_into({each: model.get_parameter(each) for each in model.adapter.names})
    ours = logits(model.eval())
    assert relative(logits(stock(base)), ours) > 0.05
    assert relative(unmerged(base, Path(result.model)), ours) < 1e-5
    merged = merge(result.model, tmp_path / "merged")
    assert merged.check
    assert relative(logits(stock(tmp_path / "merged")), ours) < 1e-5
    record = json.loads((tmp_path / "merged" / "training.json").read_text())
    assert record["adapters"][0]["training"]["step"] == 4


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"zero": {"stage": 0}},
        {"zero": {"stage": 2}},
        pytest.param({"dtype": "bfloat16", "activation_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(
    settings: dict[str, Any], pico_moe: Model, tmp_path: Path
) -> None:
    base, keys = pico_moe("mixtral"), {"adapter": EVERYTHING, **settings}
    stage = {**LARGE, "schedule": {"kind": "constant"}}
    whole = recipe_for(base, tmp_path / "whole", stage=stage, **keys)
    run(whole)
    first, longer = (recipe_for(base, tmp_path / "parts", stage={**stage, "steps": count}, **keys) for count in (2, 4))
    for each in (first, longer):
        run(each.model_copy(update={"data": whole.data}))
    assert steps(longer) == steps(whole)
    one, two = latest(Path(whole.output)), latest(Path(longer.output))
    assert one
    assert two
    assert one.state["files"] == two.state["files"]
    names = {name for file in one.state["files"] for name in load_file(one.folder / file)}
    assert not [name for name in names if "adapter." not in name and ".gate.weight" not in name], (
        "frozen weights are kept"
    )
    assert one.state["adapter"] == two.state["adapter"]


@pytest.mark.slow
def test_two_ranks_train_as_one(pico_moe: Model, tmp_path: Path) -> None:
    one = recipe_for(pico_moe("mixtral"), tmp_path / "one", stage={**LARGE, "learning_rate": 0.01}, adapter=EVERYTHING)
    run(one)
    two = two_ranks(one, tmp_path / "two")
    on_ranks(two, 2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_the_base_stays_and_an_adapter_is_no_model(pico_moe: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico_moe("mixtral"), tmp_path, stage={"steps": 1}, adapter={"rank": 2, "targets": ["routed"]})
    run(recipe)
    saved = latest(tmp_path / "run")
    assert saved
    with pytest.raises(UsageError, match="holds an adapter") as caught:
        export(saved.folder, tmp_path / "out")
    assert "upcycle merge" in str(caught.value.hint)
    changed = recipe.model_copy(update={"adapter": AdapterRecipe(rank=3, targets=["routed"])})
    with pytest.raises(UsageError, match=r"adapter.rank was 2 and is now 3"):
        run(changed)
    assert open_checkpoint(saved.folder).state["adapter"]["settings"]["r"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero": {"stage": 3}}, "zero.stage: 3 does not go with adapter"),
        ({"expert_parallel": 2}, "expert_parallel does not go with adapter"),
        ({"dense_states": "run"}, "dense_states does not go with adapter"),
        ({"stage": {"balance": {}}}, "balance does not go with adapter"),
        ({"stage": {"control": {"noise": "learned"}}}, "control.noise learned does not go"),
        ({"adapter": {"targets": ["atention"]}}, "unknown target 'atention'"),
        ({"adapter": {"rank": 0}}, "adapter.rank"),
    ],
)
def test_what_does_not_go_with_an_adapter(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, ValidationError), match=message):
        recipe_for(tmp_path / "moe", tmp_path, **{"adapter": {"rank": 2}, **changes})


def test_a_word_that_means_nothing_is_refused(pico: Model, tmp_path: Path) -> None:
    recipe = recipe_for(pico("llama"), tmp_path, stage={"losses": {}}, adapter={"rank": 2, "targets": ["routed"]})
    with pytest.raises(UsageError, match="'routed' matches nothing in this llama model"):
        run(recipe)


def test_a_plan_counts_gradients_and_states_of_the_adapter_alone(pico_moe: Model) -> None:
    from upcycle.trainers.forecast.model_counts import count_model

    raw = json.loads((pico_moe("mixtral") / "config.json").read_text())
    whole = count_model(raw, "mixtral", 32)
    counts = count_model(raw, "mixtral", 32, adapter=AdapterRecipe(rank=2, targets=["routed"]))
    trained = [weight for weight in counts.weights if weight.trained]
    # Two layers of 4 experts, 48 wide, of a model 32 wide: gate_up [96, 32] and down [32, 48] each.
    assert sum(weight.elements for weight in trained) == 2 * 4 * 2 * ((96 + 32) + (32 + 48))
    assert counts.elements == whole.elements + sum(weight.elements for weight in trained)
    assert counts.flops.total < whole.flops.total
