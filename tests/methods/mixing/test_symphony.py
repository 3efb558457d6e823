"""Symphony: attention on the sphere, neurons in the anchor's order, from every source's own states."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_tokenizer
from upcycle.calibration.calibrate import Calibration
from upcycle.cli.verbs.convert import calibration_facts
from upcycle.conversion.jobs import job_for
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.ffn.feed_forward import FeedForward
from upcycle.methods.mixing.symphony import matched, similarity
from upcycle.planning.cost import CALIBRATION_BATCH_TOKENS
from upcycle.planning.expert_job import calibration_memory
from upcycle.planning.job import method_of
from upcycle.planning.open_sources import open_sources
from upcycle.recipe.conversion_recipe import parse_recipe
from upcycle.text.held_out import by_position
from upcycle.text.reading.plain_text import read_text
from upcycle.text.windows import encode

Branches = Callable[..., list[Path]]
TOKENS, WINDOW = 512, 64
TEXT: dict[str, Any] = {"calibration": {"text": "demo", "tokens": TOKENS, "window": WINDOW}}
QUICK: dict[str, Any] = {"method": "symphony", "verification": {"tokens": 128}, **TEXT}
NO_CHECK: dict[str, Any] = {**QUICK, "verification": {"enabled": False}}
MLP, MOE = "model.layers.{}.mlp.{}_proj.weight", "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
STORED = {"gate": "w1", "up": "w3", "down": "w2"}
LAYERS, D, F = 3, 32, 96


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def mix(out: Path, sources: list[Path], **keys: Any) -> upcycle.Conversion:
    return upcycle.convert(None, out, sources=list(map(str, sources)), **{**QUICK, **keys})


def orders(out: Path, layer: int, members: int) -> np.ndarray:
    """``[members, F]``: the neurons of every source, in their new order."""
    routed = BlueprintFile(out / "blueprint.safetensors").layer(layer).routed
    return torch.cat([expert.neurons for expert in routed]).view(members, F).numpy()


def shuffled(source: Path, folder: Path, seed: int) -> Path:
    """The same model with the neurons of every FFN in another order."""
    shutil.copytree(source, folder)
    tensors, rng = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(seed)
    for layer in range(LAYERS):
        order = torch.randperm(F, generator=rng)
        for part in ("gate", "up"):
            tensors[MLP.format(layer, part)] = tensors[MLP.format(layer, part)][order].contiguous()
        tensors[MLP.format(layer, "down")] = tensors[MLP.format(layer, "down")][:, order].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def on_the_sphere(one: np.ndarray, two: np.ndarray, t: float) -> np.ndarray:
    """Two matrices as long vectors, by the formula."""
    a, b = one.astype(np.float64).ravel(), two.astype(np.float64).ravel()
    lengths = np.sqrt(a @ a), np.sqrt(b @ b)
    theta = math.acos(a @ b / lengths[0] / lengths[1])
    unit = (math.sin((1 - t) * theta) * a / lengths[0] + math.sin(t * theta) * b / lengths[1]) / math.sin(theta)
    return (((1 - t) * lengths[0] + t * lengths[1]) * unit).reshape(one.shape)


def test_attention_is_joined_on_the_sphere_and_the_rest_averaged(branches: Branches, tmp_path: Path) -> None:
    sources = branches(3)
    given = [{"name": str(source), "weight": weight} for source, weight in zip(sources, (2.0, 1.0, 3.0), strict=True)]
    upcycle.convert(None, tmp_path / "out", sources=given, **NO_CHECK)
    made, (one, two, three) = weights(tmp_path / "out"), [weights(source) for source in sources]
    rest = [name for name in one if ".mlp." not in name]
    assert sum(".self_attn." in name for name in rest) == 4 * LAYERS
    for name in rest:
        if ".self_attn." in name:
            expected = on_the_sphere(on_the_sphere(one[name], two[name], 1 / 3), three[name], 1 / 2)
            mean = (2 * one[name].astype(np.float64) + two[name] + 3 * three[name].astype(np.float64)) / 6
            assert np.linalg.norm(expected - mean) > 1e-3 * np.linalg.norm(mean)  # so that it matters
        else:
            expected = (2 * one[name].astype(np.float64) + two[name] + 3 * three[name].astype(np.float64)) / 6
        # Rounded once to fp32; fp64's own errors are of the terms, which can be larger than their sum.
        bound = 2.0**-24 * abs(expected) + 2.0**-44 * sum(abs(m[name].astype(np.float64)) for m in (one, two, three))
        assert (abs(made[name] - expected) <= bound).all(), name


def test_fusion_by_averages_is_that_of_branch_train_mix(branches: Branches, tmp_path: Path) -> None:
    sources = list(map(str, branches(2)))
    upcycle.convert(None, tmp_path / "out", sources=sources, **NO_CHECK, parameters={"fusion": "average"})
    keys = {"method": "branch_train_mix", "verification": {"enabled": False}}
    upcycle.convert(None, tmp_path / "plain", sources=sources, **keys)
    made, plain = weights(tmp_path / "out"), weights(tmp_path / "plain")
    assert all(np.array_equal(made[name], plain[name]) for name in plain if ".experts." not in name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("anchor", "chunks"), [(0, 1), (1, 4)])
def test_shuffled_copies_are_put_into_the_anchors_order(
    anchor: int, chunks: int, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    sources = [pico("llama"), *(shuffled(pico("llama"), tmp_path / str(i), i) for i in (1, 2))]
    result = mix(tmp_path / "out", sources, parameters={"anchor": anchor, "chunks": chunks})
    made, wanted = weights(tmp_path / "out"), weights(sources[anchor])
    for layer, part, member, c in itertools.product(range(LAYERS), STORED, range(3), range(chunks)):
        matrix, piece = wanted[MLP.format(layer, part)], slice(F // chunks * c, F // chunks * (c + 1))
        expected = chunks * matrix[:, piece] if part == "down" else matrix[piece]
        assert np.array_equal(made[MOE.format(layer, member * chunks + c, STORED[part])], expected)
    for layer in result.layers:
        assert layer["similarity_aligned"] == pytest.approx(1, abs=1e-5)
        assert abs(layer["similarity_stored"]) < 0.2
    assert dict(calibration_facts(result.layers))["neurons"].endswith("as stored, 1.00 to 1.00 once aligned")
    assert result.verification is not None
    assert result.verification.all_experts_error is not None
    assert result.verification.all_experts_error < 1e-6


def own_activations(folder: Path, ids: torch.Tensor, layer: int) -> np.ndarray:
    """``[T, F]`` of one model on its own states, as the stock model computes them."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    return seen[0].reshape(-1, F).double().numpy()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dense_layer", [False, True])
def test_the_order_is_the_best_by_each_models_own_activations(
    dense_layer: bool, branches: Branches, tmp_path: Path
) -> None:
    sources, text = branches(2, 0.6, "qwen2" if dense_layer else "llama"), tmp_path / "text.txt"
    text.write_text(read_text("code")[:4000])
    ids = encode(load_tokenizer(sources[0]), by_position(text.read_text()).read)
    ids = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    calibration = {"text": str(text), "tokens": ids.numel(), "window": WINDOW}
    keys = {**NO_CHECK, "calibration": calibration, "layers": [0, 2] if dense_layer else "all"}
    result = upcycle.convert(None, tmp_path / "out", sources=list(map(str, sources)), **keys)
    for report in result.layers:
        one, two = (own_activations(source, ids, report["layer"]) for source in sources)
        cosine = np.zeros((F, F))
        for j, k in itertools.product(range(F), range(F)):
            cosine[j, k] = one[:, j] @ two[:, k] / np.sqrt((one[:, j] @ one[:, j]) * (two[:, k] @ two[:, k]))
        best = cosine[np.arange(F), linear_sum_assignment(cosine, maximize=True)[1]].mean()
        stored, order = orders(tmp_path / "out", report["layer"], 2)
        assert np.array_equal(stored, np.arange(F))
        # Two fp32 layers in other batches; the sums of products over tokens are fp32 too.
        assert report["similarity_aligned"] == pytest.approx(best, abs=1e-4)
        assert cosine[np.arange(F), order].mean() == pytest.approx(best, abs=1e-4)
        assert report["similarity_stored"] == pytest.approx(np.trace(cosine) / F, abs=1e-4)


def test_a_tiny_case_by_trying_all_permutations() -> None:
    rng = torch.Generator().manual_seed(4)
    layers = [
        FeedForward(0, *(torch.randn(shape, generator=rng) for shape in ((6, 4), (6, 4), (4, 6), (4,))), "silu")
        for _ in range(2)
    ]
    layers[1].up[2] = 0  # a silent neuron is like none
    x = torch.randn(40, 4, generator=rng)
    likeness = similarity(*(Activations.of(ffn, x, batch=16) for ffn in layers))
    cosine = np.zeros((6, 6))
    hidden = []
    for ffn in layers:
        gate, up = ((x.double() @ matrix.double().T).numpy() for matrix in (ffn.gate, ffn.up))
        hidden.append(gate / (1 + np.exp(-gate)) * up)
    for j, k in itertools.product(range(6), range(6)):
        lengths = [math.sqrt(sum(h * h for h in hidden[i][:, n])) for i, n in ((0, j), (1, k))]
        dot = sum(a * b for a, b in zip(hidden[0][:, j], hidden[1][:, k], strict=True))
        cosine[j, k] = dot / (lengths[0] * lengths[1]) if lengths[1] else 0.0
    # fp32 activations of four products, summed over forty tokens.
    assert np.allclose(likeness.numpy(), cosine, rtol=0, atol=64 * 2.0**-24)
    best = max(itertools.permutations(range(6)), key=lambda p: sum(cosine[j, k] for j, k in enumerate(p)))
    assert matched(likeness).tolist() == list(best)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("parameters", [{}, {"chunks": 4}, {"rest": "base"}])
@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_sources_that_are_the_same_are_exact(
    parameters: dict[str, Any], dtype: str, branches: Branches, tmp_path: Path
) -> None:
    sources = branches(3, 0.0)
    result = mix(tmp_path / "out", sources, parameters=parameters, dtype=dtype)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    made, dense = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", sources[0]))
    for name in (name for name in dense if ".mlp." not in name):
        assert torch.equal(made[name], dense[name].to(made[name].dtype)), name


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen3-bias", "phi3", "gemma", "granite", "lfm2", "qwen3.5"])
def test_other_families(name: str, branches: Branches, tmp_path: Path) -> None:
    mixed = mix(tmp_path / "out", branches(2, 0.3, name), parameters={"chunks": 2})
    assert mixed.verification is not None
    assert mixed.verification.all_experts_error is not None
    assert mixed.verification.all_experts_error < 1e-6
    same = mix(tmp_path / "same", branches(2, 0.0, name))
    assert same.verification is not None
    assert same.verification.verdict == "exact"


def test_fused_projections_are_joined_one_by_one(branches: Branches, tmp_path: Path) -> None:
    sources = branches(2, 0.3, "phi3")
    mix(tmp_path / "out", sources, verification={"enabled": False})
    made, (one, two) = weights(tmp_path / "out"), [weights(source) for source in sources]
    fused, rows = "model.layers.1.self_attn.qkv_proj.weight", {"q": (0, 32), "k": (32, 48), "v": (48, 64)}
    for part, (first, last) in rows.items():
        expected = on_the_sphere(one[fused][first:last], two[fused][first:last], 1 / 2)
        actual = made[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert np.linalg.norm(actual - expected) < 2.0**-23 * np.linalg.norm(expected)


PROMPTS = [
    {"positive_prompts": ["def main():", "import os"], "text": "code"},
    {"positive_prompts": ["She said nothing.", "The sea was calm"], "text": "prose"},
]


@pytest.mark.long
@pytest.mark.parametrize("router", ["hidden", "cheap_embed", "domain_ridge"])
def test_routers_read_their_samples_and_neurons_the_text(router: str, branches: Branches, tmp_path: Path) -> None:
    sources = [{"name": str(source), **told} for source, told in zip(branches(2), PROMPTS, strict=True)]
    keys = {**NO_CHECK, "sources": sources, "router": router, "parameters": {"chunks": 2}}
    result = upcycle.convert(None, tmp_path / "out", **keys)
    mixed = upcycle.convert(None, tmp_path / "plain", **{**keys, "method": "branch_train_mix"})
    upcycle.convert(None, tmp_path / "random", **{**keys, "router": "random"})
    for layer in range(LAYERS):
        ours, plain = (
            BlueprintFile(tmp_path / name / "blueprint.safetensors").layer(layer).router for name in ("out", "plain")
        )
        assert ours is not None
        assert plain is not None
        assert torch.equal(ours, plain)
        assert np.array_equal(orders(tmp_path / "out", layer, 2), orders(tmp_path / "random", layer, 2))
    assert {"layer", "similarity_stored", "similarity_aligned"} | set(mixed.layers[0]) == set(result.layers[0])
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())["calibration"]
    assert record["sources"]["text"] == ["demo"]
    assert record["sources"]["tokens"] == TOKENS
    assert record["sources"]["token_ids_sha256"] != record["token_ids_sha256"]
    alone = json.loads((tmp_path / "random" / "upcycle.json").read_text())["calibration"]
    traces = {key: alone.pop(key) for key in ("held_out", "lines")}
    assert alone == {**record["sources"], "mode": "parallel"}
    assert traces == {key: record[key] for key in traces}, "of the text that was read, not of the prompts"


def test_the_generalist_is_aligned_too(branches: Branches, pico: Callable[[str], Path], tmp_path: Path) -> None:
    sources = [shuffled(pico("llama"), tmp_path / str(i), i) for i in (1, 2)]
    keys = {**NO_CHECK, "parameters": {"generalist": True, "anchor": 1}}
    upcycle.convert(str(pico("llama")), tmp_path / "out", sources=list(map(str, sources)), **keys)
    made, anchor = weights(tmp_path / "out"), weights(sources[1])
    for e in range(3):
        assert np.array_equal(made[MOE.format(2, e, "w2")], anchor[MLP.format(2, "down")])


@pytest.mark.long
@pytest.mark.parametrize("router", ["random", "hidden", "cheap_embed"])
def test_a_stopped_calibration_continues_to_the_same_bytes(
    router: str, branches: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"name": str(source), **told} for source, told in zip(branches(2), PROMPTS, strict=True)]
    keys = {**NO_CHECK, "sources": sources, "router": router}
    upcycle.convert(None, tmp_path / "whole", **keys)
    original, seen = Calibration._of_sources, []

    def stopping(self: Calibration, index: int, inputs: Any) -> None:
        seen.append(index)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        original(self, index, inputs)

    monkeypatch.setattr(Calibration, "_of_sources", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(None, tmp_path / "stopped", **keys)
    assert upcycle.convert(None, tmp_path / "stopped", **keys).resumed
    assert seen == [0, 1, 1, 2]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes(), path.name


def test_a_blueprint_repeats_it_without_walking_again(
    branches: Branches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = list(map(str, branches(2)))
    upcycle.convert(None, tmp_path / "one", sources=sources, **NO_CHECK)
    monkeypatch.setattr(Calibration, "run", lambda self: pytest.fail("calibrated again"))
    saved = tmp_path / "one" / "blueprint.safetensors"
    upcycle.convert(None, tmp_path / "two", sources=sources, blueprint=saved, verification={"enabled": False})
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_the_plan_counts_what_comparing_neurons_takes(branches: Branches) -> None:
    sources = list(map(str, branches(2)))

    def job_of(method: str) -> Any:
        recipe = parse_recipe({**QUICK, "sources": sources, "method": method}, "test")
        chosen = method_of(recipe)
        return job_for(recipe, chosen, open_sources(recipe, chosen))

    plan = upcycle.plan(None, sources=sources, **QUICK)
    plain = upcycle.plan(None, sources=sources, method="branch_train_mix", calibration=TEXT["calibration"])
    assert (plan.calibration_tokens, plain.calibration_tokens) == (TOKENS, 0)
    # A tiny model's peak is where it is written; what comparing takes is in the forecast of the calibration.
    looking = [calibration_memory(job) for job in map(job_of, ("symphony", "branch_train_mix"))]
    pair = 2 * (3 * 4 + 2 * 4) * F * D  # two FFNs as stored and their gate and up in fp32
    assert looking[0] - looking[1] == pair + 4 * CALIBRATION_BATCH_TOKENS * (F + D) + (4 + 8) * F * F
    assert any("calibration text is not used" in warning for warning in plain.warnings)
    assert not any("calibration" in warning for warning in plan.warnings)
    assert plan.promise == "approximate"


@pytest.mark.parametrize(
    ("keys", "kind", "message", "hint"),
    [
        ({"calibration": None}, UsageError, "method symphony looks at activations and needs calibration text", "demo"),
        ({"sources": 1}, UsageError, "symphony mixes several sources, and there is one", "sparse_upcycling"),
        ({"parameters": {"anchor": 2}}, UsageError, "anchor 2 is none of the 2 sources", "anchor=1"),
        ({"parameters": {"anchor": -1}}, UsageError, "key 'anchor'", "counted from 0"),
        ({"parameters": {"fusion": "mean"}}, UsageError, "key 'fusion'", "on the sphere"),
        ({"tokenizer": "none"}, UsageError, "--tokenizer none leaves no tokenizer", "--tokenizer copy"),
    ],
)
def test_bad_input(
    keys: dict[str, Any], kind: type[Exception], message: str, hint: str, branches: Branches, tmp_path: Path
) -> None:
    sources = branches(keys.pop("sources", 2), 0.3, keys.pop("family", "llama"))
    given = {key: value for key, value in {**QUICK, **keys}.items() if value is not None}
    with pytest.raises(kind, match=message) as caught:
        upcycle.convert(None, tmp_path / "out", sources=list(map(str, sources)), **given)
    assert hint in (caught.value.hint or "")  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists()
