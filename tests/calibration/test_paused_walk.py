"""Calibration of models that pause at their layers, against stock transformers: what a layer sees, and what it is fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoder_cases import image_encoder, image_folder, text_encoder, weighing_alike
from media_cases import captioned_images, pair_file, sound_folder, sound_model, two_towers
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers.activations import ACT2FN
from wrapped_models import SMALL, auto_class, ffn_weights

import upcycle
import upcycle.models
from upcycle.architectures.described.find_ffns import FoundFfn, find_ffns
from upcycle.calibration import paused_walk
from upcycle.errors import RefusalError, UsageError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.inputs.reader import InputBatch
from upcycle.registry import load

pytestmark = pytest.mark.one_in(34)  # the other cases are long

E, K = 8, 3
SPLIT: dict[str, Any] = {
    "method": "random_split",
    "experts": E,
    "top_k": K,
    "router": {"name": "ridge"},
    "verification": {"tokens": 64},
}
# What the layers of a model add to the stream is what the FFN makes; those of the others scale it.
ADDS = ["t5", "bart", "whisper", "clip", "siglip", "wav2vec2", "wav2vec2-stable", "deberta", "swin", "embedding_gemma"]
ADDS += ["mbart", "flan-t5", "hubert", "deberta-v2"]
SCALES = ["dinov2", "dinov3-gated", "convnext"]
NORMS = ["embedding_gemma"]  # behind the FFN
TEXTS = ["deberta", "deberta-v2", "embedding_gemma"]


def prepared(name: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model in ``folder/dense``, and the recipe's calibration on what it reads."""
    dense = folder / "dense"
    match load("described", SMALL[name][0]).reads:
        case "pairs":
            pairs = {"column": "question", "target": "answer", "tokens": 2048, "window": 32}
            return text_encoder(name, dense), {"text": str(pair_file(folder / "pairs.jsonl")), **pairs}
        case "speech":
            return sound_model(name, dense), {"text": str(sound_folder(folder / "sounds", 100)), "tokens": 1600}
        case "sounds":
            sounds = sound_folder(folder / "sounds", 100, spoken=False)
            return sound_model(name, dense), {"text": str(sounds), "tokens": 1600, "window": 32}
        case "images and text":
            return two_towers(name, dense), {"text": str(captioned_images(folder / "images", 60)), "tokens": 1024}
        case "images":
            return image_encoder(name, dense), {"text": str(image_folder(folder / "images", 2, 60)), "tokens": 2048}
        case _:
            return text_encoder(name, dense), {"text": "prose", "tokens": 2048, "window": 32}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[InputBatch]:
    """What a conversion calibrates on, once it has run."""
    found: list[InputBatch] = []

    class Watched(paused_walk.PausedCalibration):
        def __init__(self, *args: Any) -> None:
            found.extend(args[2])
            super().__init__(*args)

    monkeypatch.setattr(paused_walk, "PausedCalibration", Watched)
    return found


class Seen:
    """Of every FFN: its input, its output, and the sum of its output and the stream before it; flat, without padding, fp64."""

    def __init__(self, model: Any, ffns: list[FoundFfn], name: str, batches: list[InputBatch], dense: bool) -> None:
        self.x: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(ffns))}
        self.made: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(ffns))}
        self.sums: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(ffns))}
        base, described = model.base_model, load("described", SMALL[name][0])
        self._kept: dict[str, torch.Tensor] = {}
        for i, ffn in enumerate(ffns):
            part = next((part for part, begin in described.parts if ffn.layer.startswith(begin)), "")
            first = base.get_submodule(ffn.replaced[0])
            last = base.get_submodule(ffn.replaced[-1]) if dense else first
            layer = base.get_submodule(ffn.layer)
            closing = ffn.place.closing or (described.paths.closing if described.paths else None)
            first.register_forward_pre_hook(lambda _, args, i=i, part=part: self.x[i].append(self._flat(args[0], part)))
            last.register_forward_hook(lambda _, __, y, i=i, part=part: self.made[i].append(self._flat(y, part)))
            if closing is not None:
                norm = layer.get_submodule(closing)
                norm.register_forward_pre_hook(
                    lambda _, args, i=i, part=part: self.sums[i].append(self._flat(args[0], part))
                )
            elif name in ADDS:
                layer.register_forward_hook(
                    lambda _, __, y, i=i, part=part: self.sums[i].append(
                        self._flat(y[0] if isinstance(y, tuple) else y, part)
                    )
                )
        for batch in batches:
            self._kept = batch.kept
            with torch.no_grad():
                model(**batch.arguments)

    def _flat(self, states: torch.Tensor, part: str) -> torch.Tensor:
        mask = self._kept.get(part)
        return (states.flatten(0, -2) if mask is None else states[mask]).double().clone()

    def residual(self, index: int) -> torch.Tensor:
        """The stream before an FFN."""
        return torch.cat(self.sums[index]) - torch.cat(self.made[index])


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("name", [*ADDS, *SCALES])
def test_refit_is_the_least_squares_solution_on_what_stock_models_see(
    name: str, mode: str, tmp_path: Path, batches: list[InputBatch]
) -> None:
    (model, calibration), out = prepared(name, tmp_path), tmp_path / "out"
    result = upcycle.convert(str(tmp_path / "dense"), out, **SPLIT, calibration={**calibration, "mode": mode})
    ffns = find_ffns(model, load("described", SMALL[name][0]))
    stock = Seen(model, ffns, name, batches, dense=True)
    moe = Seen(weighing_alike(auto_class(name).from_pretrained(out).eval()), ffns, name, batches, dense=False)
    below = moe if mode == "sequential" else stock
    assert len(result.layers) == len(ffns)
    for index, report in enumerate(result.layers):
        blueprint, ffn = BlueprintFile(out / "blueprint.safetensors").layer(index), ffns[index]
        weights = {part: value.double() for part, value in ffn_weights(model.base_model, ffn).items()}
        x, act = torch.cat(below.x[index]), ACT2FN[ffn.activation]
        up = linear(x, weights["up"], weights.get("up_bias"))
        hidden = act(linear(x, weights["gate"], weights.get("gate_bias"))) * up if ffn.place.gated else act(up)
        assert blueprint.router is not None
        assert blueprint.down is not None
        chosen = linear(x, blueprint.router.double()).topk(K, dim=1).indices
        on = torch.zeros(len(x), E, dtype=torch.float64).scatter_(1, chosen, 1.0)
        active = hidden[:, blueprint.neurons] * on.repeat_interleave(blueprint.intermediate_size, dim=1)
        columns = weights["down"][:, blueprint.neurons].numpy()
        made = torch.cat(stock.made[index])
        goal = torch.cat(stock.sums[index]) - below.residual(index) if name in ADDS and name not in NORMS else made
        goal = goal - weights.get("down_bias", torch.zeros(1, dtype=torch.float64))
        counts = (
            1 / (made.square().mean(1, keepdim=True) + model.config.rms_norm_eps)
            if name in NORMS
            else torch.ones(len(x), 1)
        )
        counts = (counts / counts.mean()).double()
        pulled, gram = (counts * active).numpy(), (active.T @ (counts * active)).numpy()
        ridge = report["strength"] * gram.diagonal().mean() * np.eye(len(gram))
        # At the least-squares solution the gradient vanishes. In sequence, a token that is near a tie in a layer below has another
        # expert in fp64.
        pull = (goal.numpy() - active.numpy() @ columns.T).T @ pulled
        found = blueprint.down.double().numpy()
        left = np.linalg.norm(pull - (found - columns) @ (gram + ridge)) / np.linalg.norm(pull)
        assert left <= (1e-4 if mode == "parallel" or index == 0 else 2e-2), (index, left)
        assert report["error_after"] < report["error_before"]
        assert report["captured"] > report["random"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["t5", "clip"])
def test_a_calibration_that_was_stopped_continues_to_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, calibration = prepared(name, tmp_path)
    recipe = {**SPLIT, "calibration": calibration}
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "once", **recipe)
    plain, calls = paused_walk.decide_layer, list[int]()

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(paused_walk, "decide_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **recipe)
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **recipe)
    assert result.resumed
    assert len(calls) == 5  # two layers, the one that was stopped, and the two that were left
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("once", "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.long
@pytest.mark.parametrize(("part", "layers"), [("decoder", [2, 3]), ("encoder", [0, 1])])
def test_one_part_is_calibrated_alone(part: str, layers: list[int], tmp_path: Path) -> None:
    _, calibration = prepared("bart", tmp_path)
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **SPLIT, part=part, calibration=calibration)
    assert [report["layer"] for report in result.layers] == layers
    assert all(report["error_after"] < report["error_before"] for report in result.layers)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("t5", {"calibration": {"text": "self"}}, UsageError, "a model that reads pairs continues none"),
        ("bart", {"method": "importance"}, RefusalError, "those of a bart model are no single row"),
        ("albert", {"calibration": {"text": "prose"}}, RefusalError, "several of its layers share one FFN"),
    ],
)
def test_what_needs_a_row_of_layers_is_refused(
    name: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    text_encoder(name, tmp_path / "dense")
    with pytest.raises(error, match=message):
        upcycle.convert(
            str(tmp_path / "dense"), tmp_path / "out", **{**SPLIT, "calibration": {"text": "prose"}, **changes}
        )
