"""Recipes of mergekit-moe: what they map to, what is said, and what has no counterpart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from upcycle.cli.main import main
from upcycle.errors import UsageError
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.recipe.mergekit_recipe import is_mergekit, translate

Branches = Callable[..., list[Path]]
PROMPTS = {"positive_prompts": ["def main():"], "negative_prompts": ["Once upon a time"]}


def test_the_documented_example_maps_to_a_recipe() -> None:
    content = {
        "base_model": "org/base@v1",
        "gate_mode": "hidden",
        "dtype": "bfloat16",
        "experts_per_token": 1,
        "experts": [
            {"source_model": "org/code", **PROMPTS},
            {"source_model": "org/prose@main", "positive_prompts": ["She said"]},
        ],
    }
    assert is_mergekit(content)
    found, notes = translate(content, "moe.yaml")
    recipe = parse_recipe(found, "moe.yaml")
    assert (recipe.source, recipe.revision, recipe.method) == ("org/base", "v1", "branch_train_mix")
    assert [(s.name, s.revision) for s in recipe.sources] == [("org/code", None), ("org/prose", "main")]
    assert recipe.sources[0].positive_prompts == ["def main():"]
    assert recipe.sources[0].negative_prompts == ["Once upon a time"]
    assert (recipe.parameters, recipe.top_k, recipe.dtype, recipe.router.name) == (
        {"rest": "base"},
        1,
        "bfloat16",
        "hidden",
    )
    assert "branch_train_mix with rest=base, router hidden, 2 experts, top-1" in notes[0]
    assert "after the norm before the FFN" in notes[1]
    # mergekit's hidden is the last token's state, whatever its name suggests; hidden_avg is the mean.
    for mode, tokens in (("hidden", "last"), ("hidden_last", "last"), ("hidden_avg", "mean")):
        found, _ = translate({**content, "gate_mode": mode}, "moe.yaml")
        assert parse_recipe(found, "moe.yaml").router.parameters == {"tokens": tokens}


def test_our_own_recipes_are_not_mergekits() -> None:
    assert not is_mergekit({"source": "demo", "experts": 4})
    assert not is_mergekit({"sources": ["a", "b"], "method": "branch_train_mix"})


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("mode", "name"), [("hidden", "hidden"), ("cheap_embed", "cheap_embed"), ("random", "random")])
def test_gate_modes_end_to_end(
    mode: str,
    name: str,
    branches: Branches,
    pico: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sources, path = branches(2), tmp_path / "moe.yaml"
    other = {"positive_prompts": ["She said"]}
    experts = [{"source_model": str(source), **told} for source, told in zip(sources, (PROMPTS, other), strict=True)]
    path.write_text(yaml.safe_dump({"base_model": str(pico("llama")), "gate_mode": mode, "experts": experts}))
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(path), str(tmp_path / "out"), "--no-verify"])
    assert not caught.value.code
    said = capsys.readouterr().err
    assert f"note: {path} is a recipe of mergekit-moe" in said
    made, base, two = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", pico("llama"), sources[1])
    )
    attention, expert = "model.layers.0.self_attn.q_proj.weight", "model.layers.2.block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(made[attention], base[attention])
    assert torch.equal(made[expert], two["model.layers.2.mlp.down_proj.weight"])
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["router"]["name"] == name


def test_noise_scales_and_shared_experts_are_those_of_the_recipe(branches: Branches, tmp_path: Path) -> None:
    import upcycle

    one, two, three = map(str, branches(3))
    experts = [{"source_model": one, "noise_scale": 0.1}, {"source_model": two, "residual_scale": 0.5}]
    shared = [{"source_model": three, "residual_scale": 0.25, "positive_prompts": ["anything"]}]
    content = {"base_model": one, "gate_mode": "uniform_random", "experts": experts, "shared_experts": shared}
    found, notes = translate(content, "moe.yaml")
    assert "router random, 2 experts, top-2, 1 shared" in notes[0]
    assert any("always on at full weight, times residual_scale" in note for note in notes)
    assert "as large as mergekit's" in notes[-1]
    result = upcycle.convert(found.pop("source"), tmp_path / "out", **found, verification={"tokens": 64})
    assert result.plan.target == "qwen2_moe"
    made = load_file(tmp_path / "out" / "model.safetensors")
    parents = [load_file(Path(name) / "model.safetensors") for name in (one, two, three)]
    gate, down = "model.layers.0.mlp.experts.{}.gate_proj.weight", "model.layers.0.mlp.experts.{}.down_proj.weight"
    dense = "model.layers.0.mlp.{}_proj.weight"
    # 3072 normal numbers: the sample deviation is within four standard errors.
    noise = (made[gate.format(0)] - parents[0][dense.format("gate")]).double().std().item()
    assert noise == pytest.approx(0.1, rel=4 / (2 * 3072) ** 0.5)
    assert torch.equal(made[down.format(1)], parents[1][dense.format("down")] * 0.5)
    # The sigmoid of the shared expert's gate is a half: twice the down projection makes that full weight.
    assert torch.equal(
        made["model.layers.0.mlp.shared_expert.down_proj.weight"], parents[2][dense.format("down")] * 0.5
    )
    assert made["model.layers.0.mlp.shared_expert_gate.weight"].abs().max() < 2**-59
    rows = made["model.layers.0.mlp.gate.weight"].double()
    assert rows.abs().max() <= 32**-0.5
    # A uniform's variance is a third of its bound's square; 64 numbers: within four standard errors, sqrt(4/5 / n) of it.
    assert rows.square().mean().item() == pytest.approx(1 / 32 / 3, rel=4 * (0.8 / rows.numel()) ** 0.5)


def test_an_expert_may_be_a_model_with_an_adapter() -> None:
    content = {"base_model": "a", "experts": [{"source_model": "org/a@rev+org/lora"}, {"source_model": "b"}]}
    found, _ = translate(content, "moe.yaml")
    first = found["sources"][0]
    assert (first["name"], first["revision"]) == ("org/a+org/lora", "rev")


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"gate_mod": "hidden"}, "unknown key 'gate_mod'", "did you mean 'gate_mode'"),
        ({"experts": [{"source_model": "a", "prompts": []}]}, "unknown key 'experts.0.prompts'", "positive_prompts"),
        ({"experts": [{"positive_prompts": []}]}, "key 'experts.0.source_model' is missing", "add"),
        ({"experts": []}, "key 'experts'", None),
        ({"gate_mode": "mlp"}, "key 'gate_mode'", None),
        ({"architecture": "deepseek"}, "'architecture' has no counterpart", "mixtral"),
        ({"experts": [{"source_model": "a", "residual_scale": 0}]}, "key 'experts.residual_scale'", None),
        ({"shared_experts": [{"source_model": "a", "noise_scale": -1}]}, "key 'shared_experts.noise_scale'", None),
        ({"base_model": "org/a+org/lora"}, "'org/a\\+org/lora' adds an adapter", "upcycle merge"),
        ({"experts": [{"source_model": "org/a+org/lora@main"}]}, "names a revision of an adapter", "its folder"),
        ({"dtype": "int8"}, "key 'dtype'", None),
        ({"experts_per_token": 0}, "key 'experts_per_token'", None),
    ],
)
def test_what_has_no_counterpart(changes: dict[str, Any], message: str, hint: str | None) -> None:
    content = {"base_model": "base", "experts": [{"source_model": "a"}, {"source_model": "b"}], **changes}
    with pytest.raises(UsageError, match=message) as caught:
        translate(content, "moe.yaml")
    assert caught.value.message.startswith("moe.yaml (mergekit-moe): ")
    assert hint is None or hint in str(caught.value.hint)
