"""Experts of attention's projections (D2DMoE, arXiv 2310.04361): what imitates them, and what is written, against plain fp64."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_cases import text_encoder
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from wrapped_models import relative_error

import upcycle
import upcycle.models
from upcycle.calibration.imitate import Mlp, _examples, hoyer_share, imitation
from upcycle.errors import CheckpointError, RefusalError, UsageError
from upcycle.files.formats.token_files import TokenFile
from upcycle.models.own.moe_block import MoeBlock
from upcycle.planning.projections import imitating_width
from upcycle.recipe.projections_recipe import ProjectionsRecipe
from upcycle.trainers.routing.stock_routers import find_routers
from upcycle.verification.neurons_run import NeuronsRun

E = 4
TEXT: dict[str, Any] = {"text": "prose", "tokens": 1024, "window": 32}
CONVERTED: dict[str, Any] = {
    **{
        "method": "d2d",
        "experts": 4,
        "target": "upcycle_moe",
        "refit": "none",
        "calibration": TEXT,
        "dtype": "float32",
    },
    **{"routing": {"rule": "dynamic_k", "tau": 0}, "router": {"name": "d2d_norms", "parameters": {"epochs": 2}}},
    **{"projections": {"experts": E, "epochs": 3}, "verification": {"tokens": 64}},
}
ROUNDING = 2e-6  # fp32: a few roundings of 6e-8 each, in sums of some dozens of numbers


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def learnt(x: torch.Tensor, y: torch.Tensor, width: int = 12, **asked: Any) -> Mlp:
    return imitation(x, y, width, ProjectionsRecipe(experts=2, **asked), torch.Generator().manual_seed(3))


def test_width_has_as_many_multiplications_as_the_projection() -> None:
    """The paper's formula: (d^2 + d) / (2 d + 1) for square ones, about d / 2."""
    assert imitating_width(192, 192, 1.0, 1) == round((192**2 + 192) / (2 * 192 + 1)) == 96
    for inputs, outputs, flops in ((300, 300, 1.0), (128, 512, 2.0), (512, 64, 0.5)):
        width = imitating_width(inputs, outputs, flops, 1)
        one_neuron = inputs + 1 + outputs
        assert abs(width * one_neuron - flops * (inputs * outputs + outputs)) <= one_neuron / 2
        assert imitating_width(inputs, outputs, flops, 8) % 8 == 0
    assert imitating_width(4, 4, 0.1, 8) == 8


def test_second_layer_is_least_squares_of_what_the_first_puts_out() -> None:
    """By numpy's solver of the augmented system, which knows nothing of means and normal equations."""
    import numpy as np

    x, y = drawn(400, 6), drawn(400, 3, seed=1) + 5
    made = learnt(x, y, epochs=2)
    hidden = (x.double() @ made.up.double().T + made.up_bias.double()).clamp(min=0)
    centred = hidden - hidden.mean(0)
    scale = float((y - y.mean(0)).double().square().mean().sqrt())
    ridge = 1e-4 * float(centred.square().sum(0).mean())
    rows = np.concatenate([centred.numpy(), np.sqrt(ridge) * np.eye(12)])
    wanted = np.concatenate([((y - y.mean(0)).double() / scale).numpy(), np.zeros((12, 3))])
    solved, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    expected = torch.from_numpy(scale * solved.T)
    assert relative_error(made.down.double(), expected) < 1e-5
    offset = y.double().mean(0) - expected @ hidden.mean(0)
    assert relative_error(made.down_bias.double(), offset) < 1e-5


def test_error_and_active_share_are_what_they_say() -> None:
    x, y = drawn(50, 6), drawn(50, 3, seed=1)
    made = learnt(x, y, epochs=1)
    squares = spread = active = 0.0
    mean = y.double().mean(0)
    for token, wanted in zip(x.double(), y.double(), strict=True):
        z = made.up.double() @ token + made.up_bias.double()
        out = made.down.double() @ z.clamp(min=0) + made.down_bias.double()
        squares += float((out - wanted).square().sum())
        spread += float((wanted - mean).square().sum())
        active += float((z > 0).sum()) / (50 * 12)
    error, share = made.judged(x, y)
    assert error == pytest.approx((squares / spread) ** 0.5, rel=1e-5)
    assert share == pytest.approx(active)


def test_imitations_learn_and_hoyer_makes_them_sparse() -> None:
    x = drawn(2000, 12)
    y = x @ drawn(12, 12, seed=1).T + 1
    held = drawn(500, 12, seed=2)
    wanted = held @ drawn(12, 12, seed=1).T + 1
    short, long, sparse = (
        learnt(x, y, 24, batch=100, **asked) for asked in ({"epochs": 1}, {"epochs": 20}, {"epochs": 20, "hoyer": 1.0})
    )
    errors, active = zip(*(mlp.judged(held, wanted) for mlp in (short, long, sparse)), strict=True)
    assert errors[1] < 0.5 * errors[0] < 0.5
    assert active[2] < 0.8 * active[1]
    rows = drawn(5, 7).relu()
    for row, found in zip(rows.double(), hoyer_share(rows), strict=True):
        assert float(found) == pytest.approx(float(row.sum() ** 2 / row.square().sum() / 7), rel=1e-5)


def test_as_many_tokens_are_learnt_as_are_asked_for_evenly_spread(tmp_path: Path) -> None:
    rows = torch.arange(64.0)[:, None].expand(64, 3).contiguous()
    file = TokenFile(tmp_path / "x", 3)
    file.write(rows.split(4))
    for asked, found in ((33, 33), (56, 56), (500, 56), (1, 1)):
        learned, judged = _examples(file, 4, asked)
        assert judged[:, 0].tolist() == [28, 29, 30, 31, 60, 61, 62, 63]
        assert len(learned) == found
        places = [int(row) - 4 * (row > 31) for row in learned[:, 0]]  # among those that are not held out
        gaps = {b - a for a, b in itertools.pairwise(places)}
        assert not gaps or max(gaps) - min(gaps) <= 1


def source(name: str, pico: Callable[[str], Path], folder: Path) -> Path:
    """Llama has grouped queries and no biases, GPT-2 one transposed matrix for q, k and v, BERT a module for each of them."""
    if name == "llama":
        return pico(name)
    text_encoder(name, folder / "dense")  # with a tokenizer
    return folder / "dense"


def converted(dense: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> tuple[Any, dict[str, Any]]:
    """The conversion, and the imitating MLPs that it made, by the paths of their modules below the base model."""
    import upcycle.calibration.imitate as module

    mlps, split = dict[str, Any](), module._split

    def keeping(job: Any, one: Any, ffn: Any, *rest: Any) -> Any:
        mlps[one.module] = ffn
        return split(job, one, ffn, *rest)

    monkeypatch.setattr(module, "_split", keeping)
    return upcycle.convert(str(dense), out, **{**CONVERTED, **keys}), mlps


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gpt2", marks=pytest.mark.long), pytest.param("bert", marks=pytest.mark.long)]
)
def test_all_experts_are_the_imitating_mlp(
    name: str, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = source(name, pico, tmp_path)
    result, mlps = converted(dense, tmp_path / "out", monkeypatch)
    assert result.verification.verdict == "approximate"
    assert "imitated" in result.verification.explanation
    assert result.verification.all_experts_error < ROUNDING  # of FFNs: these are split as ever
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model, report = auto.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    each = {"llama": 4, "gpt2": 2, "bert": 4}[name]
    assert len(mlps) == each * model.config.num_hidden_layers
    for path, mlp in mlps.items():
        block: Any = model.base_model.get_submodule(path)
        assert isinstance(block, MoeBlock)
        assert block.projection
        assert block.experts.count == E
        x = drawn(2, 5, mlp.hidden_size, seed=len(path))
        hidden = (x.double() @ mlp.up.double().T + mlp.up_bias.double()).clamp(min=0)
        expected = hidden @ mlp.down.double().T + mlp.down_bias.double()
        with torch.no_grad():
            assert relative_error(block(x).double(), expected) < ROUNDING, path
    said = [one for layer in result.layers for one in layer["projections"]]
    assert len(said) == len(mlps)
    assert all(0 < one["error"] < 1.5 and 0 < one["active"] <= 1 for one in said)
    if name == "bert":
        return
    assert [place.index for place in find_routers(model)] == list(range(model.config.num_hidden_layers))  # FFNs' alone
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    texts = [
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


def test_few_experts_run_where_tau_is_large(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    projections = {**CONVERTED["projections"], "tau": 0.9}
    result, _ = converted(pico("llama"), tmp_path / "out", monkeypatch, projections=projections, layers=[0])
    assert result.verification.neurons_run == [1.0]  # of FFNs, which all run
    entries = json.loads((tmp_path / "out" / "config.json").read_text())["replaced_ffns"]
    assert [entry["routing"]["tau"] for entry in entries if entry.get("projection")] == [0.9] * (len(entries) - 1)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        names = {name for name in stored.keys() if ".layers.0.self_attn" in name}  # noqa: SIM118 - it is no mapping
    assert names == {
        f"model.layers.0.self_attn.{one}_proj.{part}"
        for one in "qkvo"
        for part in (
            "router.weight",
            "router.hidden.weight",
            "experts.up",
            "experts.up_bias",
            "experts.down",
            "output_bias",
        )
    }
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    shares = {}
    for tau in (0.9, 0.0):
        model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, routing={"tau": tau})
        running = NeuronsRun(model, None, projections=True)
        with running.counted(), torch.no_grad():
            model(ids)
        shares[tau] = running.shares
    assert shares[0.0] == [1.0] * 4
    assert all(0 < share < 1 for share in shares[0.9])


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"target": "mixtral", "routing": "top_k", "router": "cool"},
            RefusalError,
            "experts of upcycle_moe, and mixtral",
        ),
        ({"routing": "top_k", "router": "ridge"}, UsageError, "run by predicted norms"),
        ({"routing": "threshold", "router": "zero"}, UsageError, "run by predicted norms"),
        ({"method": "sparse_upcycling", "router": "random"}, UsageError, "sparse_upcycling is another kind of method"),
        ({"calibration": {}, "router": "random"}, UsageError, "projections"),
        ({"calibration": {**TEXT, "mode": "sequential"}}, UsageError, "calibration.mode is sequential"),
        ({"projections": {"experts": -1}}, UsageError, "projections.experts"),
    ],
)
def test_what_cannot_be_is_refused(
    keys: dict[str, Any], error: type[Exception], message: str, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        upcycle.convert(str(pico("llama")), tmp_path / "out", **{**CONVERTED, **keys})
    assert not (tmp_path / "out").exists()


def test_models_whose_passes_pause_are_refused_before_anything_is_calibrated(tmp_path: Path) -> None:
    """Nothing imitates their projections: the files of the experts would be missed when they are written."""
    text_encoder("deberta", tmp_path / "dense")
    with pytest.raises(RefusalError, match="those of a deberta model are no single row"):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **CONVERTED)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.long
def test_a_blueprint_does_not_hold_them_and_a_second_run_gives_the_same_bytes(
    pico: Callable[[str], Path], tmp_path: Path
) -> None:
    for name in ("out", "again"):
        upcycle.convert(str(pico("llama")), tmp_path / name, **{**CONVERTED, "verification": {"enabled": False}})
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    with pytest.raises(CheckpointError, match="attention became experts"):
        upcycle.convert(str(pico("llama")), tmp_path / "built", blueprint=tmp_path / "out" / "blueprint.safetensors")
