"""Static pruning against the formulas: which neurons are kept, what is fitted, what is written, and what users read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ffn_forms import FORMS, arrays, ffn_of, neurons, output, rounding
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
from upcycle.architectures.stock import load_stock_model, load_tokenizer
from upcycle.calibration.calibrate import Calibration
from upcycle.cli.main import cli
from upcycle.errors import UsageError
from upcycle.ffn.activations import Activations, most_contributing
from upcycle.ffn.blueprint import BlueprintFile
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.form import FfnForm
from upcycle.ffn.moe_shape import MoeShape, Part
from upcycle.methods.compressing.inside.static_prune import StaticPrune
from upcycle.plugins import PluginParameters
from upcycle.report.collect import Wanted, collect
from upcycle.text.windows import demo_parts, encode

WINDOW, TOKENS, F, D, KEPT = 64, 1024, 96, 32, 48
PRUNE: dict[str, Any] = {
    "method": "static_prune",
    "active": 0.5,
    "calibration": {"text": "demo", "tokens": TOKENS, "window": WINDOW},
    "verification": {"tokens": 64},
}
Pico = Callable[[str], Path]


def windows(folder: Path) -> torch.Tensor:
    """The calibration windows, chosen again: evenly spread over each text, texts in turns."""
    tokenizer, pieces = load_tokenizer(folder), []
    for name in ("code", "prose"):
        ids = encode(tokenizer, demo_parts(name)[0])
        whole = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
        pieces.append(whole[torch.linspace(0, len(whole) - 1, TOKENS // WINDOW // 2).long()])
    return torch.stack(pieces, dim=1).flatten(0, 1)


class Seen:
    """FFN inputs and outputs, and what the outputs are added to, of a stock model, fp64 arrays of every layer."""

    def __init__(self, folder: Path, ids: torch.Tensor) -> None:
        model = load_stock_model(folder)
        self.x: list[np.ndarray] = []
        self.ffn: list[np.ndarray] = []
        self.residual: list[np.ndarray] = []

        def keep(_: Any, args: Any, out: torch.Tensor) -> None:
            self.x.append(flat(args[0]))
            self.ffn.append(flat(out))

        for layer in model.model.layers:
            layer.mlp.register_forward_hook(keep)
            layer.register_forward_hook(lambda _, args, out: self.residual.append(flat(out) - self.ffn[-1]))
        with torch.no_grad():
            model(ids)

    @property
    def stream(self) -> list[np.ndarray]:
        """What every layer puts out."""
        return [before + added for before, added in zip(self.residual, self.ffn, strict=True)]


def flat(states: Any) -> np.ndarray:
    states = states[0] if isinstance(states, tuple) else states
    found: np.ndarray = states.double().flatten(0, 1).numpy()
    return found


def weights_of(folder: Path, layer: int) -> dict[str, np.ndarray]:
    """The stored projections and biases of one FFN, fp64."""
    tensors, prefix = load_file(folder / "model.safetensors"), f"model.layers.{layer}.mlp."
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    found = {}
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name, _, kind = key.removeprefix(prefix).partition(".")
            found[names[name] + ("_bias" if kind == "bias" else "")] = tensor.double().numpy()
    return found


def strongest(hidden: np.ndarray, down: np.ndarray, count: int) -> list[int]:
    """The neurons with the largest mean square of ``h_j * ||down_j||``, from one formula for each neuron."""
    energy = [np.mean((hidden[:, j] * np.sqrt(np.sum(down[:, j] ** 2))) ** 2) for j in range(hidden.shape[1])]
    return sorted(sorted(range(len(energy)), key=lambda j: -energy[j])[:count])


def held_out(tokens: int) -> np.ndarray:
    """Every eighth batch of two windows."""
    kept: np.ndarray = np.arange(tokens) // (2 * WINDOW) % 8 == 7
    return kept


@pytest.fixture(scope="module")
def biased(dense_maker: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with biases in its FFNs, which no MoE here could hold."""
    return dense_maker(tmp_path_factory.mktemp("biased"), "llama", mlp_bias=True)


@pytest.fixture
def source(pico: Pico, biased: Path) -> Callable[[str], Path]:
    return lambda name: biased if name == "biased" else pico(name)


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_ffns_of_every_form_keep_their_strongest_neurons_and_their_biases(form: FfnForm) -> None:
    dense = ffn_of(form, F, D)
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(1))
    given = Activations.of(dense, x, batch=64)
    shape = MoeShape(0, 0, 1, KEPT, (3,), form=form)
    blueprint = StaticPrune(PluginParameters()).blueprint(dense, shape, 1.0, torch.Generator(), given)
    own = arrays(dense)
    kept = strongest(neurons(own, form.activation, x.double().numpy()), own["down"], KEPT)
    assert blueprint.routed == ()
    assert blueprint.neurons.tolist() == kept == most_contributing(given, KEPT).tolist()
    names = [*form.matrices, *(f"{matrix}_bias" for matrix in form.matrices if matrix in form.biases)]
    tensors = ExpertTensors(dense, blueprint)
    built = {name: tensors.part(Part(f"shared_{name}")).numpy() for name in names}  # type: ignore[arg-type]
    smaller = {name: w if name == "down_bias" else w[:, kept] if name == "down" else w[kept] for name, w in own.items()}
    tokens = x[:5].double().numpy()
    expected = output(smaller, form.activation, tokens)
    allowed = rounding(smaller, form.activation, tokens, terms=1)
    assert (np.abs(output(built, form.activation, tokens) - expected) <= allowed).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "mode"), [("biased", "sequential"), ("llama", "parallel"), ("llama", "sequential")])
def test_the_refit_is_the_least_squares_solution_on_what_stock_models_see(
    name: str, mode: str, source: Callable[[str], Path], tmp_path: Path
) -> None:
    """The neurons are the strongest there, too: in sequence, on the states of the pruned layers below."""
    dense, recipe = source(name), {**PRUNE, "calibration": {**PRUNE["calibration"], "mode": mode}}
    result = upcycle.convert(str(dense), tmp_path / "out", **recipe)
    ids = windows(dense)
    stock, pruned = Seen(dense, ids), Seen(tmp_path / "out", ids)
    below = pruned if mode == "sequential" else stock
    saved = BlueprintFile(tmp_path / "out" / "blueprint.safetensors")
    assert len(result.layers) == 3
    for index, report in enumerate(result.layers):
        blueprint, own = saved.layer(index), weights_of(dense, index)
        hidden = neurons(own, "silu", below.x[index])
        kept = strongest(hidden, own["down"], KEPT)
        assert blueprint.neurons.tolist() == kept
        active, columns = hidden[:, kept], own["down"][:, kept]
        target = stock.stream[index] - below.residual[index] - own.get("down_bias", 0.0)
        gram = active.T @ active
        ridge = report["strength"] * gram.diagonal().mean() * np.eye(len(gram))
        error = target - active @ columns.T
        expected = columns + np.linalg.solve(gram + ridge, active.T @ error).T
        assert blueprint.down is not None
        found = blueprint.down.double().numpy()
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected - columns)
        there = held_out(len(target))
        before = np.square(error)[there].sum() / np.square(target)[there].sum()
        assert report["error_before"] == pytest.approx(before, rel=1e-3)
        assert report["error_after"] < report["error_before"]
        written = weights_of(tmp_path / "out", index)
        np.testing.assert_array_equal(written["down"], found)
        for part in set(own) - {"down"}:
            np.testing.assert_array_equal(written[part], own[part] if part == "down_bias" else own[part][kept])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["biased", "llama"])
def test_trained_layers_are_what_the_stock_model_runs(name: str, source: Callable[[str], Path], tmp_path: Path) -> None:
    dense, recipe = source(name), {**PRUNE, "dtype": "float32", "refit": "blocks"}
    recipe |= {"reconstruction": {"passes": 4, "batch": 64, "rate": 0.005}}
    result = upcycle.convert(str(dense), tmp_path / "out", **recipe)
    ids = windows(dense)
    stock, pruned = Seen(dense, ids), Seen(tmp_path / "out", ids)
    saved = BlueprintFile(tmp_path / "out" / "blueprint.safetensors")
    for index, report in enumerate(result.layers):
        blueprint, own, written = saved.layer(index), weights_of(dense, index), weights_of(tmp_path / "out", index)
        for part in ("gate", "up", "down"):
            fitted = blueprint.fitted(part)
            assert fitted is not None
            np.testing.assert_array_equal(written[part], fitted.double().numpy())
        kept, made = blueprint.neurons.numpy(), output(written, "silu", pruned.x[index])
        assert np.abs(made - pruned.ffn[index]).max() <= 1e-5 * np.abs(made).max()
        assert not np.array_equal(written["gate"], own["gate"][kept])
        target = stock.stream[index] - pruned.residual[index] - own.get("down_bias", 0.0)
        error = target - made + own.get("down_bias", 0.0)
        there = held_out(len(target))
        measured = np.square(error)[there].sum() / np.square(target)[there].sum()
        assert report["error_trained"] == pytest.approx(measured, rel=1e-3)
        assert report["error_trained"] < report["error_after"] < report["error_before"]


@pytest.mark.long
def test_without_a_refit_the_dense_weights_stay_and_stock_transformers_loads_them(biased: Path, tmp_path: Path) -> None:
    upcycle.convert(str(biased), tmp_path / "out", **{**PRUNE, "active": None, "width": 40}, refit="none")
    for index in range(3):
        kept = BlueprintFile(tmp_path / "out" / "blueprint.safetensors").layer(index).neurons.numpy()
        assert len(kept) == 40
        own, written = weights_of(biased, index), weights_of(tmp_path / "out", index)
        assert set(own) == set(written)
        for part, tensor in own.items():
            taken = tensor if part == "down_bias" else tensor[:, kept] if part == "down" else tensor[kept]
            np.testing.assert_array_equal(written[part], taken)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values())
    assert model.config.intermediate_size == 40
    assert model.model.layers[0].mlp.down_proj.bias is not None


@pytest.mark.long
@pytest.mark.parametrize("refit", ["down", "blocks"])
def test_a_stopped_pruning_continues_and_a_saved_blueprint_builds_to_the_same_bytes(
    refit: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, recipe = str(pico("llama")), {**PRUNE, "refit": refit}
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
    assert upcycle.convert(dense, tmp_path / "stopped", **recipe).resumed
    assert seen == [0, 1, 1, 2]
    built = tmp_path / "built"
    upcycle.convert(dense, built, blueprint=tmp_path / "whole" / "blueprint.safetensors", verification={"tokens": 64})
    assert seen == [0, 1, 1, 2]  # nothing was calibrated
    again = tmp_path / "again"
    monkeypatch.undo()
    arguments = ["convert", str(tmp_path / "whole" / "recipe.yaml"), str(again), "-q"]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    for folder in (tmp_path / "stopped", again):
        assert names == {path.name for path in folder.iterdir()}
        for name in names - {"verification.json"}:
            assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes(), name
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (built / name).read_bytes(), name


def test_a_blueprint_of_another_width_or_kind_is_refused(pico: Pico, tmp_path: Path) -> None:
    dense = str(pico("llama"))
    upcycle.convert(dense, tmp_path / "half", **PRUNE)
    saved = tmp_path / "half" / "blueprint.safetensors"
    with pytest.raises(UsageError, match=r"\(0, 1, 48\), the recipe needs \(0, 1, 32\)") as caught:
        upcycle.convert(dense, tmp_path / "out", blueprint=saved, width=32)
    assert "leave --active and --width out" in str(caught.value.hint)
    upcycle.convert(dense, tmp_path / "moe", experts=2, verification={"enabled": False})
    with pytest.raises(UsageError, match="static_prune makes a smaller dense model without experts"):
        upcycle.convert(dense, tmp_path / "out", blueprint=tmp_path / "moe" / "blueprint.safetensors", **PRUNE)


def test_messages_card_and_report_speak_of_neurons_and_not_of_experts(pico: Pico, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ["--method", "static_prune", "--active", "0.5", "--calibration", "demo"]
    planned = CliRunner().invoke(cli, ["plan", str(pico("llama")), *options])
    assert planned.exit_code == 0, planned.output
    assert "llama by static_prune: 48 of 96 neurons are kept in every layer" in planned.output
    assert "down projections refitted" in planned.output
    assert "x dense; attention" in planned.output
    sizes = ["--calibration-tokens", "512", "--verify-tokens", "64"]
    done = CliRunner().invoke(cli, ["convert", str(pico("llama")), str(out), *options, *sizes])
    assert done.exit_code == 0, done.output
    assert "48 of 96 neurons are kept in every layer" in done.output
    assert "approximate: a pruned FFN is smaller" in done.output
    assert "of the dense parameters are left" in done.output
    card = upcycle.write_card(out).read_text()
    body = card.partition("<details>")[0]
    assert "A smaller dense model made from" in body
    assert "48 of 96 neurons are kept in every layer, those that contributed most" in body
    _, report = collect(str(out), Wanted(run=False))
    assert report["made"]["kind"] == "pruning"
    assert [(layer["kind"], layer["neurons"]) for layer in report["made"]["layers"]] == [("dense", KEPT)] * 3
    assert report["cost"]["names"] == ["dense", "pruned"]
    for text in (planned.output, done.output, body, json.dumps(report["summary"])):
        for word in ("experts", "Mixture", "router", "MoE", "moe\n"):
            assert word not in text.replace(str(tmp_path), ""), word
