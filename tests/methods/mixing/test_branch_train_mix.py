"""Branch-Train-MiX: experts of several models, their average around them, chunks, the generalist, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.errors import UsageError
from upcycle.ffn.blueprint import BlueprintFile

Branches = Callable[..., list[Path]]
QUICK: dict[str, Any] = {"method": "branch_train_mix", "verification": {"tokens": 128}}
NO_CHECK: dict[str, Any] = {**QUICK, "verification": {"enabled": False}}
MLP, MOE = "model.layers.{}.mlp.{}_proj.weight", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
STORED = {"gate": "w1", "up": "w3", "down": "w2"}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def mix(out: Path, sources: list[Path], **keys: Any) -> upcycle.Conversion:
    return upcycle.convert(None, out, sources=list(map(str, sources)), **{**QUICK, **keys})


def test_experts_are_the_sources_ffns_and_the_rest_is_their_mean(branches: Branches, tmp_path: Path) -> None:
    sources = branches(3)
    mix(tmp_path / "out", sources)
    made, parents = weights(tmp_path / "out"), [weights(source) for source in sources]
    for layer in range(3):
        for part, stored in STORED.items():
            for e, parent in enumerate(parents):
                assert np.array_equal(made[MOE.format(layer, e, stored)], parent[MLP.format(layer, part)])
    rest = [name for name in parents[0] if ".mlp." not in name]
    assert set(rest) <= set(made)
    for name in rest:
        mean = sum(parent[name].astype(np.float64) for parent in parents) / 3
        # Both sums are fp64 and differ by 2^-52 at most; rounding to fp32 may then fall to either side once.
        assert np.allclose(made[name], mean, rtol=2.0**-23, atol=0)
        assert (made[name] == mean.astype(np.float32)).mean() > 0.99


def test_weights_count_in_the_average_alone(branches: Branches, tmp_path: Path) -> None:
    sources = branches(2)
    listed = [{"name": str(sources[0]), "weight": 3.0}, {"name": str(sources[1])}]
    upcycle.convert(None, tmp_path / "out", sources=listed, **NO_CHECK)
    made, one, two = (weights(folder) for folder in (tmp_path / "out", *sources))
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = 0.75 * one[name].astype(np.float64) + 0.25 * two[name].astype(np.float64)
    assert np.allclose(made[name], expected, rtol=2.0**-23, atol=0)
    assert np.array_equal(made[MOE.format(1, 1, "w2")], two[MLP.format(1, "down")])


def test_the_rest_of_the_base_and_a_base_outside(
    branches: Branches, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    sources, base = branches(2), pico("llama")
    upcycle.convert(
        str(base), tmp_path / "out", sources=list(map(str, sources)), parameters={"rest": "base"}, **NO_CHECK
    )
    made, parent = weights(tmp_path / "out"), weights(base)
    for name, tensor in parent.items():
        if ".mlp." not in name:
            assert np.array_equal(made[name], tensor)
    assert np.array_equal(made[MOE.format(0, 0, "w1")], weights(sources[0])[MLP.format(0, "gate")])


def test_the_generalist_is_one_expert_more_and_joins_the_mean(
    branches: Branches, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    sources, base = branches(2), pico("llama")
    keys = {**NO_CHECK, "parameters": {"generalist": True}}
    result = upcycle.convert(str(base), tmp_path / "out", sources=list(map(str, sources)), **keys)
    made, parents = weights(tmp_path / "out"), [weights(folder) for folder in (*sources, base)]
    assert np.array_equal(made[MOE.format(2, 2, "w2")], parents[2][MLP.format(2, "down")])
    mean = sum(parent["model.norm.weight"].astype(np.float64) for parent in parents) / 3
    assert np.allclose(made["model.norm.weight"], mean, rtol=2.0**-23, atol=0)
    assert [source["name"] for source in result.plan.sources] == list(map(str, sources))


def test_chunks_are_runs_of_neurons_and_top_k_takes_two_sources(branches: Branches, tmp_path: Path) -> None:
    sources = branches(2)
    result = mix(tmp_path / "out", sources, parameters={"chunks": 4})
    made, parents = weights(tmp_path / "out"), [weights(source) for source in sources]
    for e in range(8):
        parent, piece = parents[e // 4], slice(24 * (e % 4), 24 * (e % 4 + 1))
        assert np.array_equal(made[MOE.format(0, e, "w1")], parent[MLP.format(0, "gate")][piece])
        assert np.array_equal(made[MOE.format(0, e, "w2")], 4 * parent[MLP.format(0, "down")][:, piece])
    rows = made["model.layers.0.block_sparse_moe.gate.weight"]
    assert np.array_equal(rows, rows[[0, 0, 0, 0, 4, 4, 4, 4]])
    assert BlueprintFile(tmp_path / "out" / "blueprint.safetensors").layer(0).routed[5].source == 1
    assert "8 copies" not in " ".join(result.plan.warnings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (8, 8)


def silu(z: np.ndarray) -> np.ndarray:
    return z / (1 + np.exp(-z))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("count", "parameters", "top_k"), [(3, {}, 2), (3, {"chunks": 2}, 4), (4, {}, 1), (2, {}, 2)])
def test_the_layer_is_the_papers_formula(
    count: int, parameters: dict[str, Any], top_k: int, branches: Branches, tmp_path: Path
) -> None:
    sources = branches(count)
    router = {"name": "random", "parameters": {"std": 0.3}}
    mix(tmp_path / "out", sources, parameters=parameters, top_k=top_k, router=router, verification={"enabled": False})
    parents = [weights(source) for source in sources]
    block = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).model.layers[1].mlp
    x = np.random.default_rng(0).standard_normal((16, 32))
    with torch.no_grad():
        actual = block(torch.from_numpy(x).float()[None])[0].double().numpy()
    rows = weights(tmp_path / "out")["model.layers.1.block_sparse_moe.gate.weight"].astype(np.float64)
    chunks = parameters.get("chunks", 1)
    expected = np.zeros_like(x)
    for t, token in enumerate(x):
        logits = (rows @ token)[::chunks]  # one row per source
        chosen = np.argsort(-logits)[: top_k // chunks]
        g = np.exp(logits[chosen] - logits[chosen].max())
        for weight, source in zip(g / g.sum(), chosen, strict=True):
            gate, up, down = (parents[source][MLP.format(1, part)].astype(np.float64) for part in STORED)
            expected[t] += weight * (down @ (silu(gate @ token) * (up @ token)))
    # fp32 sums of 96 and 32 products: a few dozen roundings of 2^-24 each.
    assert np.linalg.norm(actual - expected) < 64 * 2.0**-24 * np.linalg.norm(expected)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("parameters", [{}, {"chunks": 4}, {"rest": "base"}])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_sources_that_are_the_same_are_exact(
    parameters: dict[str, Any], dtype: str, branches: Branches, tmp_path: Path
) -> None:
    result = mix(tmp_path / "out", branches(3, 0.0), parameters=parameters, dtype=dtype)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    # What is left is what rounding the source's weights to the dtype does to the source itself.
    rounding = result.verification.rounding_error or 0.0
    assert abs(result.verification.relative_logit_error - rounding) < 1e-5
    assert bool(rounding) == (dtype == "bfloat16")


def test_copies_of_one_model_and_a_generalist_are_exact(
    pico: Callable[[str], Path], branches: Branches, tmp_path: Path
) -> None:
    keys = {**QUICK, "parameters": {"generalist": True}}
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", sources=list(map(str, branches(3, 0.0))), **keys)
    assert result.verification is not None
    assert result.verification.verdict == "exact"


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gemma", "granite"])
def test_other_families(name: str, branches: Branches, tmp_path: Path) -> None:
    mixed = mix(tmp_path / "out", branches(2, 0.3, name))
    assert mixed.verification is not None
    assert mixed.verification.all_experts_error is not None
    assert mixed.verification.all_experts_error < 1e-6
    same = mix(tmp_path / "same", branches(2, 0.0, name))
    assert same.verification is not None
    assert same.verification.verdict == "exact"


@pytest.mark.long
def test_a_real_mix_says_what_it_was_compared_with(branches: Branches, tmp_path: Path) -> None:
    checked = mix(tmp_path / "out", branches(3)).verification
    assert checked is not None
    assert checked.verdict == "approximate"
    assert "experts of 3 different models, their average around them" in checked.explanation
    assert "with all experts at equal weight a layer is the mean of the sources' FFNs" in checked.explanation
    assert checked.all_experts_error is not None
    assert checked.all_experts_error < 1e-6
    assert upcycle.verify(tmp_path / "out", tokens=128).all_experts_error == checked.all_experts_error


@pytest.mark.long
def test_an_expert_of_the_wrong_source_is_broken(
    branches: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from upcycle.checkpoints.mixed_checkpoint import MixedCheckpoint
    from upcycle.errors import VerificationError

    right = MixedCheckpoint.expert_matrices

    def wrong(self: MixedCheckpoint, layer: int, dtype: str = "keep") -> Any:
        read = right(self, layer, dtype)
        assert read is not None
        return lambda source, part: read(0, part)

    monkeypatch.setattr(MixedCheckpoint, "expert_matrices", wrong)
    with pytest.raises(VerificationError, match="it must equal the mean of the sources' FFNs"):
        mix(tmp_path / "out", branches(3))


@pytest.mark.long
def test_untied_chunks_are_not_promised(branches: Branches) -> None:
    plan = upcycle.plan(
        None,
        sources=list(map(str, branches(2, 0.0))),
        parameters={"chunks": 2, "tied": False},
        top_k=3,
        method="branch_train_mix",
    )
    assert plan.promise == "approximate"
    assert "tied=false: 3 of 4 chunks run" in plan.promise_reason


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 4}, "makes 3 experts of 3 models, or a multiple of that, not 4"),
        ({"parameters": {"chunks": 2}, "top_k": 3}, "top-k 3 is not a multiple of chunks 2"),
        ({"parameters": {"chunks": 5}}, "96 neurons do not divide into 5 equal chunks"),
        ({"parameters": {"generalist": True}}, "it is one of the sources already"),
        ({"shared": 1}, "no shared experts"),
        ({"method": "sparse_upcycling"}, "converts one source, and there are 3 sources"),
        ({"parameters": {"rest": "mean"}}, "key 'rest'"),
        ({"sources": [{"name": "x", "weight": 0}]}, "key 'sources"),
        ({"sources": [{"nme": "x"}]}, "unknown key 'sources"),
    ],
)
def test_bad_input(keys: dict[str, Any], message: str, branches: Branches) -> None:
    content = {"sources": list(map(str, branches(3))), "method": "branch_train_mix", **keys}
    with pytest.raises(UsageError, match=message):
        upcycle.plan(None, **content)


def test_one_source_is_refused(pico: Callable[[str], Path]) -> None:
    for keys in ({}, {"sources": [str(pico("llama"))]}):
        with pytest.raises(UsageError, match="mixes several sources, and there is one") as caught:
            upcycle.plan(str(pico("llama")), method="branch_train_mix", **keys)
        assert "sparse_upcycling" in str(caught.value.hint)
