"""Models that nobody described: their FFNs are found by numbers, or refused with what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from encoder_cases import character_tokenizer
from torch import nn
from undescribed_models import REFUSED, WRAPPED, undescribed
from wrapped_models import SMALL, relative_error, small_model

import upcycle
from upcycle.architectures.described.auto_wrap import found_family
from upcycle.architectures.described.ffn_place import DescribedModel
from upcycle.architectures.described.find_ffns import find_ffns
from upcycle.architectures.described.finder import describe
from upcycle.architectures.described.recorded_calls import recorded_calls
from upcycle.cli.main import cli
from upcycle.errors import EnvironmentFault, RefusalError, UsageError, VerificationError
from upcycle.models.model_inputs import ModelRun
from upcycle.models.own.moe_block import MoeBlock
from upcycle.planning import open_sources
from upcycle.registry import DESCRIBED, FOUND, load
from upcycle.trainers.routing.stock_routers import moe_layers

pytestmark = pytest.mark.one_in(15)  # the other cases are long

QUICK: dict[str, Any] = {"family": "auto-wrap", "tokenizer": "none", "verification": {"tokens": 64}}
COPIES: dict[str, Any] = {"method": "sparse_upcycling", "experts": 4, "top_k": 2, **QUICK}
SPLIT: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 8, **QUICK}
SPARSE: dict[str, Any] = {"method": "random_split", "experts": 8, "top_k": 3, **QUICK}
ROUNDING = 2e-6
UNTRIED = (
    "apertus",
    "clip",
    "siglip",
)  # an activation with weights; two towers, which read what one class does not say
PLENTY = 1 << 34  # bytes


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """What one test finds out, no other one knows."""
    FOUND.clear()
    yield
    FOUND.clear()


@pytest.mark.one_in(12)
@pytest.mark.parametrize("keys", [COPIES, SPLIT], ids=["copies", "split"])
@pytest.mark.parametrize("name", WRAPPED)
def test_models_without_a_description_are_wrapped_exactly(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    dense = undescribed(name, tmp_path / "dense")
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **keys)
    assert result.plan.target == "upcycle_moe"
    assert result.plan.warnings[0].startswith(f"found in a {name} model, by one pass with random weights: 2 FFNs at ")
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    assert 0 <= max(result.verification.layer_errors) < ROUNDING
    FOUND.clear()  # as in another process
    kind = next(
        getattr(transformers, auto)
        for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageClassification",
                     "AutoModelForObjectDetection", "AutoModelForSeq2SeqLM")
        if type(dense) in getattr(transformers, auto)._model_mapping.values()
    )  # fmt: skip
    model, report = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert sum(isinstance(each, MoeBlock) for each in model.modules()) == len(result.verification.layer_errors)
    ids = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    given = (
        {"pixel_values": torch.randn(2, 3, 32, 32)} if dense.main_input_name == "pixel_values" else {"input_ids": ids}
    )
    with torch.no_grad():
        found, expected = (
            each.eval()(**given, **({"decoder_input_ids": ids} if name == "m2m_100" else {})) for each in (model, dense)
        )
    assert relative_error(found.logits, expected.logits) < ROUNDING
    assert upcycle.verify(tmp_path / "out").verdict == "exact"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_wrapped_is_refused_with_what_was_found(name: str, tmp_path: Path) -> None:
    undescribed(name, tmp_path / "dense")
    with pytest.raises(RefusalError, match=REFUSED[name][2]):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)
    assert not (tmp_path / "out").exists()
    assert name not in FOUND


@pytest.mark.one_in(12)
@pytest.mark.parametrize("name", [name for name in SMALL if name not in UNTRIED])
def test_the_finder_agrees_with_every_description(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(name)
    described = load("described", SMALL[name][0])
    expected = find_ffns(model, described)
    monkeypatch.delitem(DESCRIBED, described.name)
    model.config.architectures = [type(model).__name__]
    raw = model.config.to_dict()
    family = found_family(raw, "config.json", lambda model, ids: ModelRun(model).inputs(ids), PLENTY)
    found = find_ffns(model, family.described)
    assert len(found) == len(expected)
    for one, other in zip(sorted(found, key=str), sorted(expected, key=str), strict=True):
        assert (one.replaced, one.hidden, one.width, one.biases) == (
            other.replaced,
            other.hidden,
            other.width,
            other.biases,
        )
        assert [one.path(part) for part in ("up", "down", "gate")] == [
            other.path(part) for part in ("up", "down", "gate")
        ]
        assert (one.place.fused, one.place.columns, one.dropout) == (
            other.place.fused,
            other.place.columns,
            other.dropout,
        )
        z = torch.linspace(-3, 3, 50)
        acts = (transformers.activations.ACT2FN[each.activation](z) for each in (one, other))
        assert relative_error(next(acts), next(acts)) < 1e-6
        assert other.norm is None or one.norm == other.norm
    if name not in ("t5-encoder", "embedding_gemma"):  # whose configurations say what they are
        assert (family.described.encoder, family.described.reads) == (described.encoder, described.reads)


def test_layers_that_share_an_ffn_get_one_set_of_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small_model("albert").save_pretrained(tmp_path / "dense")
    monkeypatch.delitem(DESCRIBED, "albert")
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)
    assert "layers share FFNs, which run up to 2 times: one set of experts for all" in result.plan.warnings[0]
    assert result.verification is not None
    assert result.verification.verdict == "exact"


class _Layer(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(8), ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm(x))


class _Model(nn.Module):
    def __init__(self, *ffns: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(_Layer, ffns))

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _ffn(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 24), *between, nn.Linear(24, 8))


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = _ffn(nn.ReLU()), _ffn(nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(self.one(x))
        return y


def _found(*ffns: nn.Module) -> tuple[DescribedModel, int, str]:
    model = _Model(*ffns).eval()
    calls = recorded_calls(model, {"x": torch.randn(2, 5, 8)})
    return describe(DescribedModel("planted", "planted", ()), calls, [])


def test_planted_ffns_are_told_apart() -> None:
    described, count, said = _found(_ffn(nn.GELU()), _ffn(nn.GELU()))
    assert (count, described.ffns[0].layer, described.ffns[0].activation) == (2, "layers.{}", "=gelu")
    assert (described.ffns[0].whole, described.ffns[0].norm) == ("ffn", "norm")
    described, _, _ = _found(_ffn(nn.GELU(approximate="tanh")))
    assert described.ffns[0].activation in (
        "=gelu_new",
        "=gelu_pytorch_tanh",
        "=gelu_fast",
        "=gelu_python_tanh",
        "=gelu_accurate",
    )
    _, _, said = _found(_ffn(nn.ReLU(), nn.Dropout(0.2)))
    assert "the dropout inside (0.2) goes" in said
    with pytest.raises(RefusalError, match="a norm, or another function, is between"):
        _found(_ffn(nn.GELU(), nn.LayerNorm(24)))
    with pytest.raises(RefusalError, match="a norm, or another function, is between"):
        _found(_ffn(nn.Softplus()))
    normed = nn.Sequential(nn.LayerNorm(8), *_ffn(nn.ReLU()))
    described, _, _ = _found(normed)  # the norm is outside what experts replace
    assert described.ffns[0].whole is None
    with pytest.raises(
        RefusalError, match=r"two FFNs were found in 'layers\.0' of a planted model: 'ffn\.one' and 'ffn\.two'"
    ):
        _found(_Two())
    with pytest.raises(RefusalError, match="no numbered layer has two projections"):
        _found(nn.Linear(8, 8))


def test_one_ffn_under_several_names_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers.models.mpt.modeling_mpt import MptModel

    right = MptModel.__init__

    def shared(self: Any, config: Any) -> None:
        right(self, config)
        self.blocks[1].ffn = self.blocks[0].ffn

    undescribed("mpt", tmp_path / "dense")
    monkeypatch.setattr(MptModel, "__init__", shared)
    with pytest.raises(RefusalError, match="one FFN under several names"):
        upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **COPIES)


def test_a_place_that_is_none_is_found_before_anything_is_put_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An FFN that is another function when the real weights are run: the trial with random weights cannot know."""
    from transformers.models.codegen.modeling_codegen import CodeGenMLP

    undescribed("codegen", tmp_path / "dense")
    right, calls = CodeGenMLP.forward, []

    def later(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        made: torch.Tensor = right(self, x)
        return made if len(calls) <= 2 else 2 * made

    monkeypatch.setattr(CodeGenMLP, "forward", later)
    for keys, number in ((COPIES, 1), (SPARSE, 2)):
        calls.clear()
        with pytest.raises(VerificationError):
            upcycle.convert(str(tmp_path / "dense"), tmp_path / f"out{number}", **keys)
        assert not (tmp_path / f"out{number}").exists()


@pytest.mark.one_in(11)
@pytest.mark.parametrize("name", [name for name in WRAPPED if name not in ("data2vec-vision", "beit", "yolos")])
def test_splits_of_models_without_a_description_are_calibrated(name: str, tmp_path: Path) -> None:
    undescribed(name, tmp_path / "dense")
    character_tokenizer(tmp_path / "dense")
    keys = {**SPARSE, "tokenizer": "copy", "calibration": {"text": "prose", "tokens": 2048, "window": 32}}
    result = upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", **keys)
    assert len(result.layers) == len(result.verification.layer_errors)
    for report in result.layers:
        assert report["error_after"] < 0.95 * report["error_before"]
        assert report["captured"] > report["random"]


def test_what_it_needs_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    undescribed("mpt", tmp_path / "dense")
    source = str(tmp_path / "dense")
    with pytest.raises(RefusalError, match="this version has no family for it") as refused:
        upcycle.convert(source, tmp_path / "out", **{**COPIES, "family": "auto"})
    assert "--family auto-wrap" in str(refused.value.hint)
    with pytest.raises(UsageError, match="only the verification tells"):
        upcycle.convert(source, tmp_path / "out", **{**COPIES, "verification": {"enabled": False}})
    monkeypatch.setattr(
        open_sources, "found_family", lambda raw, where, inputs, _: found_family(raw, where, inputs, 1000)
    )
    with pytest.raises(EnvironmentFault, match="is tried as a whole in fp32"):
        upcycle.convert(source, tmp_path / "out", **COPIES)
    monkeypatch.undo()
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "architectures": ["MyModel"]}))
    with pytest.raises(RefusalError, match=r"'architectures' in config\.json names MyModel"):
        upcycle.convert(source, tmp_path / "out", **COPIES)


def test_the_plan_shows_what_was_found(tmp_path: Path) -> None:
    undescribed("ctrl", tmp_path / "dense")
    shown = CliRunner().invoke(cli, ["plan", str(tmp_path / "dense"), "--family", "auto-wrap", "--tokenizer", "none"])
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert "2 FFNs at h.{}.ffn, down(act(up x)) with relu" in said


def test_routers_of_a_model_that_was_found_are_read_in_another_process(tmp_path: Path) -> None:
    undescribed("biogpt", tmp_path / "dense")
    upcycle.convert(str(tmp_path / "dense"), tmp_path / "out", layers="last-half", **COPIES)
    FOUND.clear()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [(layer.rule.top_k, layer.rule.experts) for layer in moe_layers(model)] == [(2, 4)]
