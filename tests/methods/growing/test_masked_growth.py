"""Masked growth: with its new parts masked, a wider and deeper model is the smaller one, whatever was drawn; unmasked, a stock one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, recipe_for, run
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.dense.widened import WIDENED, new_parts
from upcycle.errors import RefusalError, UpcycleError, UsageError
from upcycle.files.formats.tensor_files import SafetensorsFolder
from upcycle.models.growth_masks import GrowthMasks

Pico = Callable[[str], Path]
UNCHECKED: dict[str, Any] = {"tokenizer": "none", "verification": {"enabled": False}}
# Pico models have a hidden size of 32, FFNs of 96 neurons, 4 heads (2 of keys and values) and 3 layers.
ALL = {"hidden": 48, "intermediate": 128, "heads": 6, "layers": 5, "std": 0.5}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", ALL),
    ("qwen3-bias", ALL),
    ("llama", {"hidden": 40}),
    ("llama-mlp-bias", ALL),
    ("mistral-window", {**ALL, "placement": "top"}),
    ("qwen2-windows", {"layers": 7}),
    ("llama-rope", {"heads": 8, "intermediate": 97}),
]


def grown(source: Path, out: Path, **parameters: Any) -> Path:
    upcycle.convert(str(source), out, method="masked_growth", parameters=parameters, **UNCHECKED)
    return out


def in_fp64(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4096, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def test_the_families_are_tried() -> None:
    assert {name.partition("-")[0] for name, _ in CASES} == set(WIDENED)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=[name for name, _ in CASES])
def test_masked_it_is_the_source_and_unmasked_the_stock_model(
    name: str, parameters: dict[str, Any], pico: Pico, tmp_path: Path
) -> None:
    out = grown(pico(name), tmp_path / "out", **parameters)
    wide, parts = in_fp64(out), new_parts(out)
    assert parts is not None
    wanted, stock = logits(in_fp64(pico(name))), logits(wide)
    masks = GrowthMasks(wide, parts)
    # Stock norms compute in fp32: their factors are rounded once before and once behind.
    assert (logits(wide) - wanted).norm() < 1e-5 * wanted.norm()
    masks.value = 0.5
    assert (logits(wide) - wanted).norm() > 1e-3 * wanted.norm()
    masks.value = 1.0
    assert torch.equal(logits(wide), stock)
    masks.value = 0.0
    masks.remove()
    assert torch.equal(logits(wide), stock)


def test_a_norm_takes_its_statistics_over_the_masked_width() -> None:
    """The formula of the mean of squares, ``sum(x^2 m) / sum(m)``, and the mask on what comes out, written out in fp64."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    sizes = {
        "hidden_size": 12,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "vocab_size": 9,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=0.1))
    norm: Any = model.model.norm
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = GrowthMasks(model, new := new_parts_of(hidden=8))
    assert new.hidden == 8
    for value in (0.0, 0.3):
        masks.value = value
        m = torch.tensor([1.0] * 8 + [value] * 4, dtype=torch.float64)
        mean = (x.square() * m).sum(-1, keepdim=True) / m.sum()
        wanted = x * m / (mean + 0.1).sqrt() * norm.weight.double()
        torch.testing.assert_close(norm(x.float()).double(), wanted, rtol=2e-6, atol=1e-6)


def new_parts_of(**parts: Any) -> Any:
    from upcycle.architectures.dense.widened import NewParts

    return NewParts(**parts)


def test_every_tensor_begins_with_the_sources(pico: Pico, tmp_path: Path) -> None:
    out = grown(pico("qwen2"), tmp_path / "out", **ALL)
    old, new = SafetensorsFolder(pico("qwen2")), SafetensorsFolder(out)
    taken = json.loads((out / "growth.json").read_text())["layers"]
    assert taken == [0, 0, 1, 1, 2]
    assert new_parts(out) == new_parts_of(hidden=32, intermediate=96, heads=4, layers=(1, 3))
    for name in new.specs:
        layer = name.split(".")[2] if ".layers." in name else ""
        source = name.replace(f"layers.{layer}.", f"layers.{taken[int(layer)]}.") if layer else name
        was, value = old.read(source), new.read(name)
        assert torch.equal(value[tuple(slice(0, size) for size in was.shape)], was)
        if value.dim() == 1 and value.shape != was.shape:
            assert (value[len(was) :] == (1 if "norm" in name else 0)).all()
    drawn = new.read("model.layers.1.mlp.up_proj.weight")[96:]
    assert 0.4 < drawn.std() < 0.6
    assert not torch.equal(drawn, new.read("model.layers.0.mlp.up_proj.weight")[96:])


def test_it_is_verified_planned_and_refused_until_it_was_trained(pico: Pico, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = upcycle.convert(
        str(pico("llama")), out, method="masked_growth", parameters=ALL, verification={"tokens": 64}
    )
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert "hidden size 48 from 32, neurons 128 from 96, heads 6 from 4, layers 5 from 3" in result.plan.summary
    with pytest.raises(UsageError, match="was grown by masked_growth, and its new parts are random"):
        upcycle.convert(str(out), tmp_path / "moe", experts=2, top_k=1, **UNCHECKED)
    with pytest.raises(UsageError, match="was grown by masked_growth"):
        upcycle.evaluate(str(out), text="prose", tokens=64)
    pytest.importorskip("deepspeed")
    from upcycle.branching.grow import look
    from upcycle.trainers.run.loop import train

    source = str(pico("llama"))
    taught = recipe_for(pico("llama"), tmp_path / "taught", stage={"losses": {}, "distillation": {"parent": str(out)}})
    with pytest.raises(UsageError, match="was grown by masked_growth"):
        train(taught)
    branches = {"output": source + "-forest", "domains": {"cats": "cats.txt"}, "rounds": 1}
    stages = [{"steps": 2, "learning_rate": 0.01, "masks": {"steps": 1}}]
    with pytest.raises(UsageError, match="was grown by masked_growth"):
        look({"source": str(out), **branches, "training": {"stages": stages}})


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("llama", {}, "nothing grows"),
        ("llama", {"hidden": 16, "layers": 5}, "hidden: 16 is less than the source's 32"),
        ("llama", {"heads": 5}, "heads: 5 is no multiple of 2"),
        ("llama", {"hidden": 42}, "'hidden_size' 42 is not a multiple of 'num_attention_heads' 4"),
        ("gemma", {"hidden": 48}, "does not take a 'gemma' model"),
    ],
)
def test_what_it_refuses(name: str, parameters: dict[str, Any], said: str, pico: Pico, tmp_path: Path) -> None:
    with pytest.raises((UsageError, RefusalError), match=said):
        grown(pico(name), tmp_path / "out", **parameters)


def test_training_begins_with_the_sources_loss_and_ends_with_a_stock_model(pico: Pico, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from upcycle.trainers.checkpoints.export import export
    from upcycle.trainers.checkpoints.read import latest

    source = pico("llama")
    out = grown(source, tmp_path / "out", **ALL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((source / name).read_bytes())
    keys: dict[str, Any] = {
        "saving": {"every": 2, "export": True, "keep": 5},
        "log": {"peak_tflops": 0.05, "validation": 1},
    }
    plain = recipe_for(source, tmp_path / "plain", **keys, stage={"losses": {}, "steps": 3})
    wide = recipe_for(out, tmp_path / "wide", **keys, stage={"losses": {}, "steps": 3, "masks": {"steps": 3}})
    run(plain)
    result, _ = run(wide)
    assert losses(wide)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    assert losses(wide)[1] != pytest.approx(losses(plain)[1], rel=1e-4)
    first = Path(wide.output) / "checkpoints" / "step-00000002"
    assert json.loads((first / "trainer.json").read_text())["unmasked"] == pytest.approx(2 / 3)
    with pytest.raises(UpcycleError, match="67% of the masks"):
        export(first, tmp_path / "half")
    found = latest(Path(wide.output))
    assert found is not None
    assert found.state["unmasked"] == 1
    model = Path(str(result.model))
    assert not (model / "growth.json").exists()
    assert AutoModelForCausalLM.from_pretrained(model).config.hidden_size == 48
    upcycle.evaluate(str(model), text="prose", tokens=64)  # it is refused no more


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{}], "what is new in it is masked until a stage unmasks it"),
        ([{"masks": {"steps": 4}}], "masks.steps is 4, and the stage has 3 steps"),
        ([{"masks": {"steps": 3}}, {"name": "more", "masks": {"steps": 1}}], "in the first stage alone"),
    ],
)
def test_masks_that_a_run_would_leave(stages: list[dict[str, Any]], said: str, pico: Pico, tmp_path: Path) -> None:
    from upcycle.trainers.recipe.training_recipe import StageRecipe
    from upcycle.trainers.run.unmasking import check_masks

    out = grown(pico("llama"), tmp_path / "out", intermediate=128)
    recipe = recipe_for(out, tmp_path)
    told = [StageRecipe(steps=3, learning_rate=0.01, **stage) for stage in stages]
    with pytest.raises(UsageError, match=said):
        check_masks(recipe.model_copy(update={"stages": told}), out)


def test_masks_for_a_model_that_has_none(pico: Pico, tmp_path: Path) -> None:
    from upcycle.trainers.run.unmasking import check_masks

    recipe = recipe_for(pico("llama"), tmp_path, stage={"masks": {"steps": 2}})
    with pytest.raises(UsageError, match="has none"):
        check_masks(recipe, pico("llama"))
