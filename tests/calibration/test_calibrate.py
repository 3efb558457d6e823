"""Calibration against stock transformers: what a layer sees, what it is fitted to, resuming, and bad text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, silu

import upcycle
from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.calibration.calibrate import Calibration
from upcycle.errors import CheckpointError, EnvironmentFault, UsageError
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.recipe.recipe_parts import CalibrationRecipe
from upcycle.text.mixture import read_parts
from upcycle.text.windows import demo_parts, encode

E, S, K, WINDOW, TOKENS = 8, 4, 2, 64, 1024
SPLIT: dict[str, Any] = {
    "method": "random_split",
    "experts": E,
    "shared": S,
    "top_k": K,
    "calibration": {"text": "demo", "tokens": TOKENS, "window": WINDOW},
    "verification": {"tokens": 64},
}
Pico = Callable[[str], Path]


def windows(folder: Path) -> torch.Tensor:
    """The calibration windows, chosen again: evenly spread over each text, texts in turns."""
    tokenizer = load_tokenizer(folder)
    pieces = []
    for name in ("code", "prose"):
        ids = encode(tokenizer, demo_parts(name)[0])
        whole = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        pieces.append(whole[torch.linspace(0, len(whole) - 1, TOKENS // WINDOW // 2).long()])
    return torch.stack(pieces, dim=1).flatten(0, 1)


class Seen:
    """FFN inputs, layer outputs and what FFN outputs are added to, of a stock model."""

    def __init__(self, folder: Path, ids: torch.Tensor) -> None:
        model = load_stock_model(folder)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        self.x: list[torch.Tensor] = []
        self.output: list[torch.Tensor] = []
        ffn_outputs: list[torch.Tensor] = []

        def keep(_: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            self.x.append(flat(args[0]))
            ffn_outputs.append(flat(output))

        for layer in model.model.layers:
            layer.mlp.register_forward_hook(keep)
            layer.register_forward_hook(lambda _, args, output: self.output.append(flat(output)))
        with torch.no_grad():
            model(ids)
        self.residual = [whole - ffn for whole, ffn in zip(self.output, ffn_outputs, strict=True)]


def flat(states: Any) -> torch.Tensor:
    states = states[0] if isinstance(states, tuple) else states
    return states.double().flatten(0, 1)


class Layer:
    """One converted layer in fp64: its blueprint, and the activations of its experts' neurons on tokens ``x``."""

    def __init__(self, out: Path, dense: Path, index: int, x: torch.Tensor) -> None:
        self.blueprint = BlueprintFile(out / "blueprint.safetensors").layer(index)
        weights = load_file(dense / "model.safetensors")
        names = ("gate", "up", "down")
        gate, up, down = (weights[f"model.layers.{index}.mlp.{name}_proj.weight"].double() for name in names)
        hidden = silu(linear(x, gate)) * linear(x, up)
        assert self.blueprint.router is not None
        chosen = linear(x, self.blueprint.router.double()).topk(K, dim=1).indices
        on = torch.zeros(len(x), E, dtype=torch.float64).scatter_(1, chosen, 1.0)
        m = self.blueprint.intermediate_size
        mask = torch.cat([torch.ones(len(x), S * m, dtype=torch.float64), on.repeat_interleave(m, dim=1)], dim=1)
        self.active = (hidden[:, self.blueprint.neurons] * mask).numpy()
        self.columns = down[:, self.blueprint.neurons].numpy()
        self.always = S * m


def held_out(tokens: int) -> np.ndarray:
    """Every eighth batch of two windows."""
    kept: np.ndarray = np.arange(tokens) // (2 * WINDOW) % 8 == 7
    return kept


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_refit_is_the_least_squares_solution_on_what_stock_models_see(pico: Pico, tmp_path: Path, mode: str) -> None:
    dense = pico("llama")
    recipe = {**SPLIT, "calibration": {**SPLIT["calibration"], "mode": mode}}
    result = upcycle.convert(str(dense), tmp_path / "out", **recipe)
    ids = windows(dense)
    stock, moe = Seen(dense, ids), Seen(tmp_path / "out", ids)
    below = moe if mode == "sequential" else stock
    for index, report in enumerate(result.layers):
        layer = Layer(tmp_path / "out", dense, index, below.x[index])
        target = (stock.output[index] - below.residual[index]).numpy()
        gram = layer.active.T @ layer.active
        ridge = report["strength"] * gram.diagonal().mean() * np.eye(len(gram))
        error = target - layer.active @ layer.columns.T
        expected = layer.columns + np.linalg.solve(gram + ridge, layer.active.T @ error).T
        assert layer.blueprint.down is not None
        found = layer.blueprint.down.double().numpy()
        # The stock model weighs chosen experts by softmax, the fit by exactly 1/k: 1% apart by the router's tolerance.
        assert np.linalg.norm(found - expected) <= 1e-2 * np.linalg.norm(expected - layer.columns)
        kept = held_out(len(target))
        before = np.square(error)[kept].sum() / np.square(target)[kept].sum()
        assert report["error_before"] == pytest.approx(before, rel=1e-3)
        assert report["error_after"] < report["error_before"]
        assert report["captured"] > report["random"]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_trained_layer_is_what_the_stock_model_runs_and_is_nearer_to_the_dense_one(
    pico: Pico, tmp_path: Path, mode: str
) -> None:
    dense = pico("llama")
    recipe = {**SPLIT, "calibration": {**SPLIT["calibration"], "mode": mode}, "dtype": "float32"}
    recipe |= {"refit": "blocks", "reconstruction": {"passes": 4, "batch": 64, "rate": 0.005}}
    result = upcycle.convert(str(dense), tmp_path / "out", **recipe)
    ids = windows(dense)
    stock, moe = Seen(dense, ids), Seen(tmp_path / "out", ids)
    below = moe if mode == "sequential" else stock
    for index, report in enumerate(result.layers):
        blueprint = BlueprintFile(tmp_path / "out" / "blueprint.safetensors").layer(index)
        gate, up, down, rows = (getattr(blueprint, name).double() for name in ("gate", "up", "down", "router"))
        x, m = moe.x[index], blueprint.intermediate_size
        logits = linear(x, rows)
        top = logits.topk(K, dim=1)
        weights = torch.zeros_like(logits).scatter_(1, top.indices, K * top.values.softmax(1))
        factors = torch.cat([torch.ones(len(x), S * m).double(), weights.repeat_interleave(m, dim=1)], dim=1)
        made = linear(silu(linear(x, gate)) * linear(x, up) * factors, down)
        found = moe.output[index] - moe.residual[index]
        # The stock model adds the FFN's output to its stream in fp32, from which it is taken back here.
        assert (made - found).abs().max() <= 2.0**-20 * moe.output[index].abs().max()
        if mode == "sequential":
            target = (stock.output[index] - below.residual[index]).numpy()
            kept = held_out(len(target))
            error = np.square(target - found.numpy())[kept].sum() / np.square(target)[kept].sum()
            # The fit counts chosen experts alike, the stock model weighs them by softmax: 1% apart.
            assert report["error_trained"] == pytest.approx(error, rel=0.05)
        assert report["error_trained"] < report["error_after"] < report["error_before"]
        assert "not_trained" not in report


@pytest.mark.long
def test_all_experts_on_stays_exact_and_refit_touches_nothing(pico: Pico, tmp_path: Path) -> None:
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, "top_k": E})
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert BlueprintFile(tmp_path / "out" / "blueprint.safetensors").layer(0).down is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("mode", "near"), [("parallel", 1e-4), ("sequential", 1e-2)])
def test_the_factor_of_a_layer_is_its_least_squares_solution(
    mode: str, near: float, pico: Pico, tmp_path: Path
) -> None:
    """In sequence on what the layers below give with their factors: stock weighs experts by softmax, 1% apart."""
    dense = pico("llama")
    recipe = {**SPLIT, "refit": "scale", "calibration": {**SPLIT["calibration"], "mode": mode}}
    result = upcycle.convert(str(dense), tmp_path / "out", **recipe)
    stock = Seen(dense, windows(dense))
    below = Seen(tmp_path / "out", windows(dense)) if mode == "sequential" else stock
    for index, report in enumerate(result.layers):
        layer = Layer(tmp_path / "out", dense, index, below.x[index])
        shared = layer.active[:, : layer.always] @ layer.columns[:, : layer.always].T
        routed = layer.active[:, layer.always :] @ layer.columns[:, layer.always :].T
        target = (stock.output[index] - below.residual[index]).numpy()
        expected = np.sum((target - shared) * routed) / np.sum(routed**2)
        assert report["factor"] == pytest.approx(expected, rel=near)
        assert layer.blueprint.scale == pytest.approx(K * report["factor"])
        kept = held_out(len(target))
        left = np.square(target - shared - expected * routed)[kept].sum() / np.square(target)[kept].sum()
        assert report["error_after"] == pytest.approx(left, rel=near)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("kind", ["qwen2-windows", "qwen3-bias", "mistral-window", "llama-rope"])
def test_layers_see_what_the_stock_model_feeds_them(pico: Pico, tmp_path: Path, kind: str) -> None:
    """Masks, windows and rotary embeddings of every family: sequential calibration ends where the stock model does."""
    dense = pico(kind)
    recipe = {**SPLIT, "shared": 0, "layers": [1, 2] if kind.startswith("qwen") else "all"}
    result = upcycle.convert(str(dense), tmp_path / "out", **recipe)
    ids = windows(dense)
    stock, moe = Seen(dense, ids), Seen(tmp_path / "out", ids)
    kept = torch.from_numpy(held_out(ids.numel()))
    for report in result.layers:
        index = report["layer"]
        target = stock.output[index] - moe.residual[index]
        error = (stock.output[index] - moe.output[index])[kept].square().sum() / target[kept].square().sum()
        # The report is of a fit without these tokens, the written weights of one with them.
        assert error.item() <= 1.05 * report["error_after"]
        assert error.item() >= 0.3 * report["error_after"]


@pytest.mark.long
@pytest.mark.parametrize("refit", ["down", "blocks"])
def test_a_stopped_calibration_continues_to_the_same_bytes(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refit: str
) -> None:
    dense, recipe = str(pico("llama")), {**SPLIT, "refit": refit}
    upcycle.convert(dense, tmp_path / "whole", **recipe)
    original, seen = Calibration._moe_layer, []

    def stopping(self: Calibration, index: int, importance: torch.Tensor | None) -> None:
        seen.append(index)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        original(self, index, importance)

    monkeypatch.setattr(Calibration, "_moe_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(dense, tmp_path / "stopped", **recipe)
    resumed = upcycle.convert(dense, tmp_path / "stopped", **recipe)
    assert resumed.resumed
    assert seen == [0, 1, 1, 2]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "stopped").iterdir()}
    for name in names - {"verification.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes(), name


@pytest.mark.long
def test_a_stopped_calibration_is_not_continued_on_another_text(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, recipe = tmp_path / "text.txt", {**SPLIT, "calibration": {"tokens": 512, "window": WINDOW}}
    recipe["calibration"]["text"] = str(text)
    text.write_text(demo_parts("prose")[0])
    original = Calibration._moe_layer

    def stopping(self: Calibration, index: int, importance: torch.Tensor | None) -> None:
        original(self, index, importance)
        raise KeyboardInterrupt

    monkeypatch.setattr(Calibration, "_moe_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **recipe)
    monkeypatch.undo()
    text.write_text(demo_parts("code")[0])
    with pytest.raises(UsageError, match="unfinished conversion of another recipe"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **recipe)


@pytest.mark.long
def test_states_cut_short_by_a_crash_are_computed_again(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, original, seen = str(pico("llama")), Calibration._moe_layer, []
    upcycle.convert(dense, tmp_path / "whole", **SPLIT)

    def stopping(self: Calibration, index: int, importance: torch.Tensor | None) -> None:
        seen.append(index)
        if seen == [0, 1]:
            for path in self._tokens_folder.iterdir():
                path.write_bytes(b"")
            raise KeyboardInterrupt
        original(self, index, importance)

    monkeypatch.setattr(Calibration, "_moe_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(dense, tmp_path / "out", **SPLIT)
    upcycle.convert(dense, tmp_path / "out", **SPLIT)
    assert seen == [0, 1, 0, 1, 2]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


class FakeDatasets:
    """What the datasets package answers, without a network."""

    exceptions = SimpleNamespace(DatasetsError=LookupError)

    @staticmethod
    def load_dataset(
        name: str, config: str | None, *, split: str, streaming: bool, revision: str | None
    ) -> list[dict[str, Any]]:
        if name == "org/gone":
            raise FileNotFoundError("Dataset 'org/gone' doesn't exist on the Hub")
        assert (name, config, split, streaming, revision) == ("org/data", "en", "validation", True, None)
        return [{"body": demo_parts("prose")[0][i : i + 400], "id": i} for i in range(0, 20_000, 400)]


@pytest.mark.long
def test_hub_datasets(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    calibration = {"text": "org/data:en:validation", "tokens": 512, "window": WINDOW}
    with pytest.raises(UsageError, match=r"no text in column 'text'; the columns are \['body', 'id'\]"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, "calibration": calibration})
    with pytest.raises(EnvironmentFault, match="org/gone cannot be read"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, "calibration": "org/gone"})
    calibration["column"] = "body"
    result = upcycle.convert(str(pico("llama")), tmp_path / "out", **{**SPLIT, "calibration": calibration})
    assert len(result.layers) == 3


@pytest.mark.long
@pytest.mark.parametrize("refit", ["down", "blocks"])
def test_a_blueprint_repeats_a_calibrated_conversion_without_its_text(pico: Pico, tmp_path: Path, refit: str) -> None:
    dense = str(pico("llama"))
    first = upcycle.convert(dense, tmp_path / "first", **{**SPLIT, "refit": refit})
    again = upcycle.convert(dense, tmp_path / "again", blueprint=tmp_path / "first" / "blueprint.safetensors")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    assert len(first.layers) == 3
    assert again.verification is not None


@pytest.mark.long
def test_provenance_names_the_text_and_its_tokens(pico: Pico, tmp_path: Path) -> None:
    upcycle.convert(str(pico("llama")), tmp_path / "out", **SPLIT)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["refit"] == "down"
    assert record["calibration"]["tokens"] == TOKENS
    assert record["calibration"]["mode"] == "sequential"
    assert len(record["calibration"]["token_ids_sha256"]) == 64


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"calibration": {"text": "nowhere.txt"}}, UsageError, "no such calibration text"),
    ({"calibration": "{folder}"}, UsageError, "is a folder, and this model reads text files"),
    ({"calibration": {"text": "demo", "window": 512, "tokens": 8}}, UsageError, "calibration.tokens"),
    ({"calibration": None, "refit": "down"}, UsageError, "needs calibration text"),
    ({"calibration": None, "router": "ridge"}, UsageError, "router ridge looks at activations"),
    ({"scale": "exact"}, UsageError, "plain sum"),
    ({"tokenizer": "none"}, UsageError, "leaves no tokenizer"),
    ({"calibration": "{short}"}, UsageError, "fewer than one window"),
    ({"calibration": {"text": "{rows}", "column": "body"}}, UsageError, "the columns are id, text"),
    ({"calibration": "{broken}"}, UsageError, "line 2 is not JSON"),
    ({"method": "importance", "calibration": {"text": "demo", "tokens": 128, "window": 64}}, UsageError, "there are 4"),
]


@pytest.mark.one_in(6)
@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input(pico: Pico, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "rows.jsonl").write_text('{"text": "abc", "id": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "abc"}\n{"text"\n')
    (tmp_path / "folder").mkdir()
    files = {"short": "short.txt", "rows": "rows.jsonl", "broken": "broken.jsonl", "folder": "folder"}
    text = json.dumps(changes)
    for word, name in files.items():
        text = text.replace(f"{{{word}}}", str(tmp_path / name))
    recipe = {key: value for key, value in {**SPLIT, **json.loads(text)}.items() if value is not None}
    with pytest.raises(kind, match=message):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **recipe)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()  # the corrected command must not ask for --restart


@pytest.mark.parametrize("name", ["a.jsonl", "b.NDJSON", "c.json", "d.csv"])
def test_rows_are_read_by_column_whatever_the_ending(tmp_path: Path, name: str) -> None:
    texts = [f"text {number}, {chr(65 + number)}" for number in range(20)]
    lines = [json.dumps({"body": text, "id": 1}) for text in texts]
    whole = {"c.json": f"[{', '.join(lines)}]", "d.csv": "\n".join(["body,id", *(f'"{text}",1' for text in texts)])}
    (tmp_path / name).write_text(whole.get(name, "\n".join(lines)))
    wanted = CalibrationRecipe(text=[str(tmp_path / name)], column="body", tokens=512, window=WINDOW)
    (parts,) = read_parts(wanted).values()
    assert sorted([*parts.read.split("\n\n"), *parts.held_out.split("\n\n")]) == sorted(texts)


@pytest.mark.long
def test_an_activation_that_is_not_finite_names_layer_and_neuron(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][5] = 1e38
    tensors["model.layers.1.mlp.up_proj.weight"][5] = 1e38
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 1, neuron 5"):
        upcycle.convert(str(dense), tmp_path / "out", **SPLIT)


def test_too_little_memory_is_said_before_anything_is_read(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upcycle.planning.expert_job.available_memory", lambda: 1_000_000)
    with pytest.raises(EnvironmentFault, match="calibration needs about"):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **SPLIT)
    assert not (tmp_path / "out").exists()
