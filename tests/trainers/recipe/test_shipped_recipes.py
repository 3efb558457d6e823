"""Every recipe in configs/train trains, from the conversion that its own header names, and that conversion is its paper's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from named_conversions import converted, named_conversion
from training_runs import run, steps, write_text

import upcycle
from upcycle.architectures.stock import load_stock_model
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.models.experts import use_eager_experts
from upcycle.recipe.shipped_recipes import shipped
from upcycle.trainers.recipe.training_recipe import parse_train_recipe
from upcycle.trainers.routing.stock_routers import moe_layers
from upcycle.trainers.run.step_reports import read_log

Pico = Callable[[str], Path]
RECIPES = shipped("train")
SMALL = {"length": 32, "global_batch": 4, "micro_batch": 2, "dtype": "float32", "zero": {}}
D = 32  # of the pico models
OF_IMAGES = {"cumo_visual", "llava_mod_sparse"}  # test_vision_language_recipes.py trains these


def trained(name: str, model: Path, folder: Path, **changes: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Two steps of every stage of a recipe, small, otherwise as it is shipped."""
    content = yaml.safe_load(RECIPES[name].read_text()) | SMALL
    content["log"] = {**content.get("log", {}), "peak_tflops": 0.05}
    content["saving"] = {"export": True}
    for stage in content["stages"]:
        stage.pop("tokens", None)
        stage["steps"] = 2
        if "masks" in stage:
            stage["masks"]["steps"] = 1
        for schedule in (stage.get("schedule"), stage.get("preset")):
            if schedule:
                schedule["warmup"] = 0
    folder.mkdir(exist_ok=True)
    data = {"domains": {"cats": write_text(folder / "text.jsonl")}, "cache": str(folder / "cache")}
    data["validation"] = {"fraction": 0.1, "tokens": 64}
    content |= {"model": str(model), "output": str(folder / "run"), "data": data, **changes}
    recipe = parse_train_recipe(content, name)
    result, said = run(recipe)
    assert not [line for line in said if "is lost at once" in line]
    return recipe, result, steps(recipe)


def moe_of(folder: Path) -> Any:
    return use_eager_experts(load_stock_model(folder, "float32"))


def ffns(dense: Path) -> list[Any]:
    checkpoint = DenseCheckpoint.open(str(dense))
    return [checkpoint.feed_forward(layer, "float32") for layer in range(3)]


def tokens(layer: int, ffn: Any) -> torch.Tensor:
    """Inputs as an RMSNorm gives them, ``[6, D]``."""
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(layer))
    return x / x.square().mean(-1, keepdim=True).sqrt() * ffn.norm


def act(name: str, z: torch.Tensor) -> torch.Tensor:
    return {"silu": lambda: z * z.sigmoid(), "relu": lambda: z.clamp(min=0)}[name]()


def part(ffn: Any, neurons: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What some neurons of a dense FFN add, ``[6, D]``."""
    hidden = act(ffn.activation, x @ ffn.gate[neurons].T) * (x @ ffn.up[neurons].T)
    return hidden @ ffn.down[:, neurons].T


def compare(model: Any, dense: Path, expected: Callable[..., torch.Tensor], tolerance: float) -> None:
    """Every MoE layer against the paper's formula of it, ``expected(ffn, x, logits, layer)``."""
    of_dense = ffns(dense)
    for layer in moe_layers(model):
        ffn = of_dense[layer.index]
        x = tokens(layer.index, ffn)
        with torch.no_grad():
            block: Any = layer.block
            found, logits = block(x[None]), layer.router(x)[0]
            found = (found[0] if isinstance(found, tuple) else found)[0]
        wanted = expected(ffn, x, logits, layer)
        assert torch.linalg.norm(found - wanted) < tolerance * torch.linalg.norm(wanted)


def summed(folder: Path, factor: float, top_k: int) -> Callable[..., torch.Tensor]:
    """``factor`` times the sum of the chosen experts, each with weight one."""
    blueprints = BlueprintFile(folder / "blueprint.safetensors")

    def expected(ffn: Any, x: torch.Tensor, logits: torch.Tensor, layer: Any) -> torch.Tensor:
        rows = []
        for token, chosen in zip(x, logits.topk(top_k).indices.tolist(), strict=True):
            routed = blueprints.layer(layer.index).routed
            rows.append(factor * sum(part(ffn, routed[e].neurons, token[None])[0] for e in chosen))
        return torch.stack(rows)

    return expected


# Weights of cool and taught routers are equal within one percent, and so is the sum.
EQUAL = 0.011
# fp32, a few hundred products.
ROUNDING = 1e-5


def test_every_recipe_names_its_conversion_or_is_for_dense_models() -> None:
    dense = {name for name in RECIPES if named_conversion(name) is None}
    assert dense == {"d2dmoe_sparsify", "distill_dense", "moe_tuning_dense", "cumo_dense", "llava_mod_dense"}
    assert {words[1] for name in RECIPES if (words := named_conversion(name))} <= set(shipped("convert"))


@pytest.mark.long
def test_d2dmoe_is_a_plain_sum_of_experts_before_and_after_its_routers_are_taught(pico: Pico, tmp_path: Path) -> None:
    """Its stages one after another, each from what the one before wrote, as the headers say."""
    _, result, lines = trained("d2dmoe_sparsify", pico("llama"), tmp_path / "sparsified")
    assert {key for key in lines[0] if key.startswith("loss/")} == {"loss/hoyer"}
    dense = Path(str(result.model))
    assert load_stock_model(dense).config.hidden_act == "relu"
    split = converted("d2dmoe_router", dense, tmp_path / "split")
    compare(moe_of(split), dense, summed(split, 1.0, 8), EQUAL)
    _, result, lines = trained("d2dmoe_router", split, tmp_path / "taught")
    assert {key for key in lines[0] if key.startswith("loss/")} == {"loss/output_norms"}
    taught = moe_of(Path(str(result.model)))
    compare(taught, dense, summed(split, 1.0, 8), EQUAL)
    before, after = moe_of(split).state_dict(), taught.state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}


def test_a_dense_model_learns_from_the_moe_that_it_was_made_of(pico: Pico, tmp_path: Path) -> None:
    """Experts that are copies: their average is the same function, and its teacher has nothing to say; another one has."""
    quiet: dict[str, Any] = {"verification": {"enabled": False}}
    moe = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, "target": "mixtral"}
    upcycle.convert(str(pico("llama")), tmp_path / "moe", **moe, **quiet)
    upcycle.convert(str(pico("llama")), tmp_path / "other", method="random_split", experts=4, top_k=2, **quiet)
    keys: dict[str, Any] = {"method": "to_dense", "parameters": {"gather": "average"}, "refit": "none"}
    text = {"text": "demo", "tokens": 256, "window": 32}
    upcycle.convert(str(tmp_path / "moe"), tmp_path / "dense", **keys, calibration=text, **quiet)
    _, _, lines = trained("distill_dense", tmp_path / "dense", tmp_path / "run")
    assert {key for key in lines[0] if key.startswith("loss/")} == {"loss/kl", "loss/ffn"}
    assert abs(lines[0]["loss/kl"]) < 1e-6  # before the first step, up to roundings
    assert 0 <= lines[0]["loss/ffn"] < 1e-6
    stage = {"steps": 2, "learning_rate": 1e-3, "distillation": {"parent": str(tmp_path / "other"), "ffn": 1.0}}
    _, _, lines = trained("distill_dense", tmp_path / "dense", tmp_path / "again", stages=[stage])
    assert lines[0]["loss/kl"] > 1e-3


@pytest.mark.long
def test_factorllm_is_a_sum_times_e_over_k_and_learns_by_its_own_losses(pico: Pico, tmp_path: Path) -> None:
    split = converted("factorllm", pico("llama"), tmp_path / "split")
    compare(moe_of(split), pico("llama"), summed(split, 4 / 2, 2), EQUAL)
    routed = BlueprintFile(split / "blueprint.safetensors").layer(0).routed
    assert [expert.neurons.tolist() for expert in routed] == torch.arange(96).view(4, 24).tolist()  # contiguous slices
    _, _, lines = trained("factorllm", split, tmp_path / "run")
    named = {key for key in lines[0] if key.startswith("loss/")}
    assert named == {"loss/prior_approximate", "loss/prior_balance"}
    # Before anything trained, the chosen 2 of 4 have about half of the probability: 0.01 * 3 layers * 0.5 / 4 experts, and more
    # where the router prefers them, to twice that.
    assert 0.01 * 3 * 0.5 / 4 <= lines[0]["loss/prior_balance"] <= 0.01 * 3 / 4


def weighted_copies(normalized: bool, factor: float = 1.0) -> Callable[..., torch.Tensor]:
    """Copies of the dense FFN: it is multiplied by what the chosen ones weigh together."""

    def expected(ffn: Any, x: torch.Tensor, logits: torch.Tensor, layer: Any) -> torch.Tensor:
        kept = logits.softmax(-1).topk(2).values.sum(-1, keepdim=True)
        return factor * (1.0 if normalized else kept) * part(ffn, torch.arange(len(ffn.gate)), x)

    return expected


@pytest.mark.parametrize(("name", "layers"), [("moe_tuning", [0, 2]), ("cumo", [0, 1, 2])])
def test_copies_of_4_with_top_2_where_the_paper_has_them(
    name: str, layers: list[int], pico: Pico, tmp_path: Path
) -> None:
    moe = converted(name, pico("llama"), tmp_path / "moe")
    model = moe_of(moe)
    assert [layer.index for layer in moe_layers(model)] == layers
    assert {(layer.rule.experts, layer.rule.top_k, layer.rule.normalized) for layer in moe_layers(model)} == {
        (4, 2, True)
    }
    compare(model, pico("llama"), weighted_copies(True), ROUNDING)


@pytest.mark.long
def test_skyworks_logits_are_normalised_before_training_and_in_the_exported_model(pico: Pico, tmp_path: Path) -> None:
    moe = converted("skywork_moe", pico("llama"), tmp_path / "moe")
    compare(moe_of(moe), pico("llama"), weighted_copies(True), ROUNDING)  # weights sum to 1: the dense model
    _, result, lines = trained("skywork_moe", moe, tmp_path / "run")
    assert {key for key in lines[0] if key.startswith("loss/")} == {"loss/skywork_balance"}
    for layer in moe_layers(moe_of(Path(str(result.model)))):
        assert (layer.rule.experts, layer.rule.top_k, layer.rule.spread) == (16, 2, 1.0)
        with torch.no_grad():
            logits, weights, experts = layer.router(tokens(layer.index, ffns(pico("llama"))[layer.index]))
        for row, own, chosen in zip(logits.double(), weights, experts, strict=True):
            gates = ((row - row.mean()) / (row.std(correction=0) + 1e-6)).softmax(-1)
            best = gates.topk(2)
            assert sorted(best.indices.tolist()) == sorted(chosen.tolist())
            expected = gates[chosen] / best.values.sum()
            torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)
            assert float(abs(own.double() - row.softmax(-1)[chosen] / row.softmax(-1)[chosen].sum()).max()) > 1e-4


def test_nvidias_upcycling_spreads_its_scale_over_three_matrices_and_weighs_by_the_softmax_over_all(
    pico: Pico, tmp_path: Path
) -> None:
    """E8G8T8: 64 experts of F / 8, E G^2 / T = 64, so that gate, up and down are each multiplied by 4."""
    moe = converted("upcycle_cpt", pico("llama"), tmp_path / "moe")

    def expected(ffn: Any, x: torch.Tensor, logits: torch.Tensor, layer: Any) -> torch.Tensor:
        chances, rows = logits.double().softmax(-1), []
        assert logits.shape == (6, 64)
        for token, own in zip(x.double(), chances, strict=True):
            total = torch.zeros(D, dtype=torch.float64)
            for e in own.topk(8).indices.tolist():
                shard = slice(12 * (e % 8), 12 * (e % 8) + 12)
                gate, up, down = (
                    4 * matrix.double() for matrix in (ffn.gate[shard], ffn.up[shard], ffn.down[:, shard])
                )
                total += own[e] * (down @ (act("silu", gate @ token) * (up @ token)))
            rows.append(total)
        return torch.stack(rows).float()

    model = moe_of(moe)
    compare(model, pico("llama"), expected, ROUNDING)
    for layer in moe_layers(model):
        rows: Any = layer.router.weight
        groups = rows.view(8, 8, D)
        assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert len(groups[:, 0].unique(dim=0)) == 8


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in RECIPES
        if named_conversion(name)
        and name not in OF_IMAGES
        and not name.startswith(("d2dmoe", "factorllm", "preference"))  # trained by tests of their own
    ],
)
def test_every_shipped_recipe_trains(name: str, pico: Pico, tmp_path: Path) -> None:
    model = converted(name, pico("llama"), tmp_path / "moe")
    recipe, result, found = trained(name, model, tmp_path / "run")
    assert len(found) == 2 * len(recipe.stages)
    assert all(line["applied"] and line["gradient_norm"] > 0 for line in found)
    assert math.isfinite(result.validation["cats"])
    for stage in recipe.stages:
        lines = [line for line in found if line["stage"] == stage.name]
        assert {key for key in lines[0] if key.startswith("loss/")} == {f"loss/{loss}" for loss in named_losses(stage)}
    if name == "moe_tuning":
        assert unchanged(model, Path(str(result.model)), "mlp.experts", "mlp.gate.")


def named_losses(stage: Any) -> set[str]:
    told = stage.distillation
    terms: Mapping[str, str] = {"logits": "kl", "ffn": "ffn", "hidden": "hidden"}
    return set(stage.losses) | {name for key, name in terms.items() if told and getattr(told, key)}


def unchanged(before: Path, after: Path, *but: str) -> bool:
    """Whether nothing else but some tensors was trained, and these were."""
    old, new = moe_of(before).state_dict(), moe_of(after).state_dict()
    changed = {key for key, value in old.items() if not torch.equal(value, new[key])}
    return changed == {key for key in old if any(f"{name}" in key for name in but)}


def test_moec_trains_clusters_of_which_half_drop_out(pico: Pico, tmp_path: Path) -> None:
    moe = converted("moec", pico("llama"), tmp_path / "moe")
    quick = {"dead_steps": 1, "collapse_steps": 1}
    recipe, _, lines = trained("moec", moe, tmp_path / "training", alarms=quick)
    assert all(line["loss/cluster_variance"] > 0 for line in lines)
    assert all(math.isfinite(line["loss"]) for line in lines)
    # Routers did not collapse onto the half that is left, nor is the other half dead.
    assert not [line for line in read_log(Path(recipe.output) / "log.jsonl") if line["kind"] == "alarm"]


@pytest.mark.parametrize("name", ["mocle", "pesc"])
def test_experts_of_low_rank_begin_as_the_dense_model_and_train_alone(name: str, pico: Pico, tmp_path: Path) -> None:
    dense = pico("llama")
    moe = converted(name, dense, tmp_path / "moe")
    model = moe_of(moe)
    compare(model, dense, lambda ffn, x, *_: part(ffn, torch.arange(len(ffn.gate)), x), ROUNDING)
    rules = {(layer.rule.experts, layer.rule.top_k, layer.rule.normalized) for layer in moe_layers(model)}
    assert rules == {(4, 1, False) if name == "mocle" else (8, 2, True)}
    _, result, _ = trained(name, moe, tmp_path / "run")
    assert unchanged(moe, Path(str(result.model)), "experts.pairs", "mlp.router.")


def test_preferences_begin_at_the_parent(pico: Pico, tmp_path: Path) -> None:
    """A converted model prefers as its parent does, so that the loss of a pair begins at log 2."""
    rows = [
        {
            side: [{"role": "user", "content": f"{n} and 1?"}, {"role": "assistant", "content": text}]
            for side, text in said
        }
        for n in range(30)
        for said in [(("chosen", f"{n + 1}."), ("rejected", "I do not know."))]
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = yaml.safe_load(RECIPES["preference"].read_text())["data"]
    data["domains"]["preferences"]["text"] = str(tmp_path / "pairs.jsonl")
    data |= {"chat_template": "turns", "validation": {"fraction": 0.2, "tokens": 64}, "cache": str(tmp_path / "cache")}
    moe = converted("preference", pico("llama"), tmp_path / "moe")
    _, _, lines = trained("preference", moe, tmp_path / "run", data=data, length=96)
    assert set(lines[0]) >= {"loss/preference", "loss/switch_balance"}
    assert lines[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-4)
    assert all(line["applied"] for line in lines)


GATES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "remoe": lambda logits: logits.clamp(min=0),
    "ds_moe": lambda logits: logits.shape[1] * logits.softmax(-1),  # as experts are pieces, times their number
}


@pytest.mark.parametrize("name", GATES)
def test_experts_of_varying_number_weigh_what_the_paper_says_and_begin_as_the_dense_model(
    name: str, pico: Pico, tmp_path: Path
) -> None:
    dense = pico("llama")
    moe = converted(name, dense, tmp_path / "moe")
    blueprints = BlueprintFile(moe / "blueprint.safetensors")
    model = moe_of(moe)
    compare(model, dense, lambda ffn, x, *_: part(ffn, torch.arange(len(ffn.gate)), x), ROUNDING)

    def expected(ffn: Any, x: torch.Tensor, logits: torch.Tensor, layer: Any) -> torch.Tensor:
        gates, routed = GATES[name](logits), blueprints.layer(layer.index).routed
        assert gates.shape == (6, len(routed))
        return sum((gates[:, e : e + 1] * part(ffn, one.neurons, x) for e, one in enumerate(routed)), torch.zeros(6, D))

    for layer in moe_layers(model):
        with torch.no_grad():
            layer.router.weight.normal_(generator=torch.Generator().manual_seed(layer.index))  # type: ignore[union-attr, operator]
    compare(model, dense, expected, ROUNDING)
