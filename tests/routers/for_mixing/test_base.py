"""Routers that tell mixed models apart: prompts and sample texts, at the vector that the router reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import upcycle
from upcycle.calibration.decide_layer import generator
from upcycle.calibration.source_samples import from_prompts, in_turns
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import BlueprintFile, ExpertSpec, LayerBlueprint
from upcycle.ffn.feed_forward import FeedForward
from upcycle.ffn.source_samples import Samples
from upcycle.files.locate import DEMO_FOLDER
from upcycle.progress import Progress
from upcycle.registry import load
from upcycle.routers.for_mixing.base import condition

Branches = Callable[..., list[Path]]
MIX: dict[str, Any] = {"method": "branch_train_mix", "verification": {"enabled": False}}
PROMPTS = [
    {
        "positive_prompts": ["def main():", "import os, sys\nprint(os.getcwd())"],
        "negative_prompts": ["Once upon a time"],
    },
    {
        "positive_prompts": ["She said nothing.", "The sea was calm that night, and"],
        "negative_prompts": ["for i in range(3):"],
    },
]


def listed(sources: list[Path], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": str(source), **what} for source, what in zip(sources, told, strict=True)]


class Notes(Progress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def prompt_rows(base: Path, layer: int, name: str, last: bool) -> np.ndarray:
    """The formula again, prompt by prompt on the stock model: no padding, one forward pass each."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen: list[torch.Tensor] = []
    model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    rows = []
    for told in PROMPTS:
        kinds = []
        for key in ("positive_prompts", "negative_prompts"):
            means = []
            for prompt in told[key]:
                ids = tokenizer(prompt)["input_ids"]
                with torch.no_grad():
                    model(torch.tensor([ids]))
                states = model.model.embed_tokens.weight[ids].detach() if name == "cheap_embed" else seen[-1]
                keep = [i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids]
                keep = keep[-1:] if last else keep
                means.append(states[keep].double().numpy().mean(axis=0))
            kinds.append(np.mean(means, axis=0))
        difference = kinds[0] - kinds[1]
        rows.append(difference / np.linalg.norm(difference))
    return np.stack(rows)


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("name", "parameters"), [("hidden", {}), ("hidden", {"tokens": "last"}), ("cheap_embed", {})])
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_rows_are_the_prompts_means_where_the_router_reads(
    name: str, parameters: dict[str, str], family: str, branches: Branches, tmp_path: Path
) -> None:
    sources, router = branches(2, 0.3, family), {"name": name, "parameters": parameters}
    result = upcycle.convert(None, tmp_path / "out", sources=listed(sources, PROMPTS), router=router, **MIX)
    saved = BlueprintFile(tmp_path / "out" / "blueprint.safetensors")
    for layer in range(3):
        rows, expected = saved.layer(layer).router, prompt_rows(sources[0], layer, name, bool(parameters))
        assert rows is not None
        # Three fp32 layers, padded and in other batches: rounding errors of a few 2^-24 grow with every layer.
        assert np.linalg.norm(rows.double().numpy() - expected) < 1e-4
    assert all(layer["router_condition"] >= 1 for layer in result.layers)
    assert ("own_expert" in result.layers[0]) == (name == "hidden")


def test_chunks_of_a_source_share_its_row(branches: Branches, tmp_path: Path) -> None:
    keys = {**MIX, "parameters": {"chunks": 2}, "router": {"name": "hidden", "parameters": {"sharpness": 3.0}}}
    upcycle.convert(None, tmp_path / "out", sources=listed(branches(2), PROMPTS), **keys)
    rows = BlueprintFile(tmp_path / "out" / "blueprint.safetensors").layer(2).router
    assert rows is not None
    assert torch.equal(rows, rows[[0, 0, 2, 2]])
    assert rows.norm(dim=1).tolist() == pytest.approx([3.0] * 4, rel=1e-6)


@pytest.mark.long
def test_the_model_loads_verifies_and_repeats(branches: Branches, tmp_path: Path) -> None:
    keys = {"method": "branch_train_mix", "router": "hidden", "top_k": 1, "verification": {"tokens": 128}}
    for out in ("one", "two"):
        result = upcycle.convert(None, tmp_path / out, sources=listed(branches(2), PROMPTS), **keys)
    assert result.verification is not None
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < 1e-6
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    record = json.loads((tmp_path / "one" / "upcycle.json").read_text())
    assert record["calibration"]["text"] == [f"prompts of {source}" for source in branches(2)]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "one").config.num_experts_per_tok == 1


def test_domain_ridge_solves_the_normal_equations_and_finds_the_domain() -> None:
    rng = torch.Generator().manual_seed(0)
    owner = torch.randint(3, (1024,), generator=rng)
    x = torch.randn(1024, 16, generator=rng) + 2 * torch.eye(16)[owner] + 1
    share = 1 / owner.bincount()[owner]
    ffn = FeedForward(0, torch.randn(8, 16), torch.randn(8, 16), torch.randn(16, 8), torch.ones(16), "silu")
    blueprint = LayerBlueprint(0, tuple(ExpertSpec(torch.arange(8), source=i) for i in range(3)), 1, 1.0)
    activations = Activations.of(ffn, x, batch=64, samples=Samples(owner.view(1, -1), owner, share))
    cls = load("router", "domain_ridge")
    rows = cls(cls.Parameters()).rows(blueprint, ffn, generator(0, 0, "router"), activations).double().numpy()
    y, w = np.eye(3)[owner.numpy()] - 1 / 3, share.double().numpy() * 1024 / 3
    wide = x.double().numpy()
    gram, cross = (wide * w[:, None]).T @ wide, (wide * w[:, None]).T @ y
    # Some strength s with (gram + s I) rows.T = cross; s is read off one equation, all others must agree.
    residual = cross - gram @ rows.T
    strength = (residual * rows.T).sum() / (rows.T**2).sum()
    assert strength >= 0
    # Rows are rounded to fp32: 2^-24 of them, times the norm of the Gram matrix.
    assert np.abs(residual - strength * rows.T).max() < 2.0**-22 * np.abs(gram).sum(axis=0).max() * np.abs(rows).max()
    assert ((wide @ rows.T).argmax(axis=1) == owner.numpy()).mean() > 0.8


def test_domain_ridge_end_to_end(branches: Branches, tmp_path: Path) -> None:
    texts = [{"text": "code"}, {"text": "prose"}]
    keys = {**MIX, "router": "domain_ridge", "top_k": 1, "calibration": {"tokens": 4096, "window": 128}}
    result = upcycle.convert(None, tmp_path / "out", sources=listed(branches(2), texts), **keys)
    assert min(layer["own_expert"] for layer in result.layers) > 0.6  # a random row gives half
    assert json.loads((tmp_path / "out" / "upcycle.json").read_text())["calibration"]["text"] == ["code", "prose"]


def test_padding_and_special_tokens_count_nothing() -> None:
    from upcycle.recipe.recipe_parts import SourceRecipe

    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER / "model")
    sources = [
        SourceRecipe(name="a", positive_prompts=["a much longer prompt than that", "x"], negative_prompts=["y"]),
        SourceRecipe(name="b", positive_prompts=["z"]),
    ]
    found = from_prompts(tokenizer, sources, 512)
    assert found.share[(found.owner == 0) & (found.share > 0)].sum().item() == pytest.approx(1)
    assert found.share[(found.owner == 0) & (found.share < 0)].sum().item() == pytest.approx(-1)
    lengths = [len(tokenizer(prompt)["input_ids"]) for source in sources for prompt in source.positive_prompts]
    assert found.windows.shape == (4, max(lengths))
    assert int((found.share != 0).sum()) <= sum(lengths) + 1 + found.windows.shape[0]
    with pytest.raises(UsageError, match="a prompt of b has 0 tokens"):
        from_prompts(tokenizer, [*sources[:1], SourceRecipe(name="b", positive_prompts=[""])], 512)


def test_texts_take_turns_and_count_the_same() -> None:
    found = in_turns([torch.zeros(3, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)])
    assert found.windows[:, 0].tolist() == [0, 1, 0, 0]
    assert found.share.view(4, 4).sum(dim=1).tolist() == pytest.approx([1 / 3, 1, 1 / 3, 1 / 3])


def test_orthogonal_rows_are_orthonormal(branches: Branches, tmp_path: Path) -> None:
    keys = {**MIX, "router": {"name": "orthogonal", "parameters": {"length": 2.0}}}
    upcycle.convert(None, tmp_path / "out", sources=list(map(str, branches(3))), **keys)
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.block_sparse_moe.gate.weight"].double()
    assert torch.allclose(rows @ rows.T, 4 * torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert condition(rows) == pytest.approx(1, abs=1e-6)
    with pytest.raises(UsageError, match="33 rows of 32 numbers cannot all be orthogonal"):
        upcycle.convert(None, tmp_path / "no", sources=list(map(str, branches(3))), experts=33, **keys)


def test_degenerate_rows_are_warned_of(branches: Branches, tmp_path: Path) -> None:
    told = [{"positive_prompts": ["The sea was calm that night"]}, {"positive_prompts": ["The sea was calm that day"]}]
    notes = Notes()
    result = upcycle.convert(
        None, tmp_path / "out", sources=listed(branches(2), told), router="hidden", progress=notes, **MIX
    )
    worst = max(layer["router_condition"] for layer in result.layers)
    assert worst > 5
    assert any(f"condition number {worst:.3g}" in note for note in notes.said)


@pytest.mark.parametrize(
    ("told", "keys", "message"),
    [
        ([{}, PROMPTS[1]], {}, "branch-0.* has no 'positive_prompts'"),
        ([PROMPTS[0], PROMPTS[0]], {}, "have the same prompts: their experts would tie"),
        (PROMPTS, {"router": "domain_ridge"}, "has no 'text'"),
        ([{"text": "prose"}, {"text": "prose"}], {"router": "domain_ridge"}, "have the same text"),
        (PROMPTS, {"tokenizer": "none"}, "--tokenizer none leaves no tokenizer"),
        (PROMPTS, {"experts": 4}, "copies of an expert would tie"),
        (PROMPTS, {"router": "ridge", "calibration": "demo"}, "here are several models"),
        (PROMPTS, {"router": "centroid"}, "here are several models"),
    ],
)
def test_bad_input(told: list[dict[str, Any]], keys: dict[str, Any], message: str, branches: Branches) -> None:
    with pytest.raises(UsageError, match=message):
        upcycle.plan(None, sources=listed(branches(2), told), **{**MIX, "router": "hidden", **keys})


def test_one_model_and_the_generalist_have_no_prompts(branches: Branches, pico: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="tells apart several sources, and experts are of one"):
        upcycle.plan(str(pico("llama")), router="hidden")
    with pytest.raises(UsageError, match="no positive_prompts of the generalist"):
        keys = {**MIX, "router": "hidden", "parameters": {"generalist": True}}
        upcycle.plan(str(pico("llama")), sources=listed(branches(2), PROMPTS), **keys)
