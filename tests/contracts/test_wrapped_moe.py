"""Stock MoEs as ``upcycle_moe``: the same function, and every compression of it the same as of the stock class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from permuted_experts import permuted
from pico_models import PICO_MOE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import upcycle
import upcycle.models
from upcycle.calibration.compressing import refit_cut
from upcycle.errors import RefusalError, UsageError
from upcycle.models.own.moe_block import MoeBlock
from upcycle.registry import METHODS, load

pytestmark = pytest.mark.one_in(48)  # the other cases are long

Models = Callable[..., Path]
TEXT: dict[str, Any] = {"text": "demo", "tokens": 512, "window": 32}
KEYS: dict[str, Any] = {"target": "upcycle_moe", "calibration": TEXT, "verification": {"tokens": 64}}
WITHOUT = (  # no dense family has their block
    *("olmoe", "mellum", "glm4_moe", "glm4_moe-sigmoid", "glm4_moe_lite", "deepseek_v2", "exaone_moe", "minimax_m2"),
    *("qwen3_next", "granitemoehybrid", "phimoe", "phimoe-constant", "gpt_oss", "qwen3_vl_moe", "qwen3_5_moe"),
)
NAMES = [name for name in PICO_MOE if name not in WITHOUT]
# Stock routers round scores to fp32 whatever the model is in, and the wrapper's do not: a few roundings of 6e-8 per layer.
ROUNDING = 1e-6


def loaded(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values()), report
    model.set_experts_implementation("eager")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))).logits)


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float(torch.dist(one, two) / torch.linalg.norm(two))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_stock_model_in_other_tensors(
    name: str, fused: bool, pico_moe: Models, tmp_path: Path
) -> None:
    source, out = pico_moe(name, fused), tmp_path / "out"
    result = upcycle.convert(str(source), out, method="naee", keep=1.0, **KEYS)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    stock, wrapped = loaded(source), loaded(out)
    assert apart(logits(wrapped), logits(stock)) < ROUNDING
    prompt = torch.tensor([[5, 6, 7]])
    one, two = (m.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None) for m in (stock, wrapped))
    assert torch.equal(one, two)
    elements = {path: sum(t.numel() for t in load_file(path / "model.safetensors").values()) for path in (source, out)}
    assert elements[source] == elements[out] == result.plan.parameters_total
    blocks = [module for module in wrapped.modules() if isinstance(module, MoeBlock)]
    assert len(blocks) == sum("router.weight" in name for name, _ in wrapped.named_parameters()) > 0


@pytest.mark.one_in(64)
@pytest.mark.parametrize("refit", ["none", "down"])
@pytest.mark.parametrize("method", ["naee", "hc_smoe", "slim", "lower_top_k"])
@pytest.mark.parametrize("name", ["mixtral", "dots1", "qwen2_moe", "lfm2_moe", "flex_olmo"])
def test_a_compression_is_that_of_the_stock_class(
    name: str, method: str, refit: str, pico_moe: Models, tmp_path: Path
) -> None:
    if method == "slim" and name == "dots1":
        pytest.skip("the stock class cannot be made narrower")
    keys = {**KEYS, "method": method, "keep": 0.5, "refit": refit, "verification": {"enabled": False}}
    upcycle.convert(str(pico_moe(name)), tmp_path / "wrapped", **keys)
    upcycle.convert(str(pico_moe(name)), tmp_path / "stock", **{**keys, "target": "auto"})
    # Least squares of activations that differ by a rounding.
    limit = ROUNDING if refit == "none" else 1e-4
    assert apart(logits(loaded(tmp_path / "wrapped")), logits(loaded(tmp_path / "stock"))) < limit
    assert upcycle.verify(tmp_path / "wrapped", tokens=64).verdict == "approximate"


@pytest.mark.parametrize(("name", "left", "shared"), [("dots1", 8, 16), ("hunyuan_v1_moe", 24, 48)])
def test_experts_that_a_stock_class_cannot_make_narrower(
    name: str, left: int, shared: int, pico_moe: Models, tmp_path: Path
) -> None:
    result = upcycle.convert(str(pico_moe(name)), tmp_path / "out", method="slim", keep=0.5, **KEYS)
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    (entry,) = json.loads((tmp_path / "out" / "config.json").read_text())["replaced_ffns"]
    assert (entry["experts"], entry["width"], entry["shared_width"]) == (4, left, shared)


@pytest.mark.parametrize("name", ["olmoe", "glm4_moe"])
def test_what_no_dense_family_is_the_block_of_is_refused(name: str, pico_moe: Models) -> None:
    with pytest.raises(RefusalError, match="no dense architecture known here has the block") as caught:
        upcycle.plan(str(pico_moe(name)), method="naee", keep=0.5, target="upcycle_moe")
    assert caught.value.hint == "leave --target out: the architecture stays as it is"


def test_another_target_is_refused(pico_moe: Models) -> None:
    with pytest.raises(UsageError, match="naee makes no 'qwen3_moe' model of a 'mixtral' one"):
        upcycle.plan(str(pico_moe("mixtral")), method="naee", keep=1.0, target="qwen3_moe")
    assert upcycle.plan(str(pico_moe("mixtral")), method="naee", keep=1.0, target="mixtral").target == "mixtral"


def test_a_choice_bias_stays_fp32_in_half_precision(pico_moe: Models, tmp_path: Path) -> None:
    upcycle.convert(str(pico_moe("dots1")), tmp_path / "out", method="naee", keep=1.0, **KEYS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    found = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    assert [(b.dtype, bool(b.any())) for b in found] == [(torch.float32, True)] * 2


def test_training_reads_these_routers(pico_moe: Models, tmp_path: Path) -> None:
    from upcycle.trainers.routing.stock_routers import moe_layers

    upcycle.convert(str(pico_moe("dots1")), tmp_path / "out", method="naee", keep=1.0, **KEYS)
    theirs, ours = moe_layers(loaded(pico_moe("dots1"))), moe_layers(loaded(tmp_path / "out"))
    drawn = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, two in zip(theirs, ours, strict=True):
        for a, b in zip(one.rule.route(drawn), two.rule.route(drawn), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.long
def test_a_copy_of_the_folder_is_compressed_with_the_family_it_came_from(pico: Models, tmp_path: Path) -> None:
    moe = tmp_path / "moe"
    upcycle.convert(
        str(pico("mistral")), moe, method="sparse_upcycling", experts=4, top_k=2, verification={"tokens": 64}
    )
    upcycle.convert(str(moe), tmp_path / "out", method="naee", keep=1.0, **KEYS)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["base_model_type"] == "mistral"
    shutil.rmtree(moe)


WRAPPED = [name for name in METHODS if load("method", name).kind == "compression" and load("method", name).wrapped]


@pytest.mark.long
@pytest.mark.parametrize("method", WRAPPED)
def test_what_no_stock_class_holds_keeps_all_exactly(method: str, pico_moe: Models, tmp_path: Path) -> None:
    result = upcycle.convert(str(pico_moe("dots1")), tmp_path / "out", method=method, keep=1.0, **KEYS)
    assert result.verification is not None
    assert result.verification.verdict == "exact"
    upcycle.convert(str(pico_moe("dots1")), tmp_path / "stock", method=method, keep=1.0, **{**KEYS, "target": "auto"})
    before, after = (load_file(folder / "model.safetensors") for folder in (pico_moe("dots1"), tmp_path / "stock"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    plain = tmp_path / "plain"
    upcycle.convert(str(pico_moe("dots1")), plain, method="naee", keep=1.0, **KEYS)
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(loaded(plain)))


@pytest.mark.parametrize("refit", ["none", "down"])
@pytest.mark.parametrize("method", WRAPPED)
def test_what_no_stock_class_holds_is_written_as_planned_and_writes(
    method: str, refit: str, pico_moe: Models, tmp_path: Path
) -> None:
    keys = {**KEYS, "method": method, "keep": 0.6, "refit": refit}
    plan = upcycle.plan(str(pico_moe("qwen3_moe")), **keys)
    result = upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / "out", **keys)
    upcycle.convert(str(pico_moe("qwen3_moe")), tmp_path / "again", **keys)
    files = [
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())} for name in ("out", "again")
    ]
    assert files[0] == files[1]
    assert result.plan == plan
    assert plan.flops_per_token < plan.flops_per_token_dense
    assert result.verification is not None
    assert result.verification.verdict == "approximate"
    assert upcycle.verify(tmp_path / "out", tokens=64) == result.verification
    written = loaded(tmp_path / "out").generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert written.shape == (1, 7)


@pytest.mark.long
@pytest.mark.parametrize("method", WRAPPED)
def test_the_order_of_experts_does_not_matter(method: str, pico_moe: Models, tmp_path: Path) -> None:
    other = permuted(pico_moe("dots1"), tmp_path / "permuted")
    keys = {**KEYS, "method": method, "keep": 0.6, "verification": {"enabled": False}}
    upcycle.convert(str(pico_moe("dots1")), tmp_path / "one", **keys)
    upcycle.convert(str(other), tmp_path / "two", **keys)
    # Least squares of the same numbers in another order.
    assert apart(logits(loaded(tmp_path / "one")), logits(loaded(tmp_path / "two"))) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("method", WRAPPED)
def test_a_stopped_compression_continues_byte_equal(
    method: str, pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, keys = str(pico_moe("mixtral")), {**KEYS, "method": method, "keep": 0.6, "verification": {"enabled": False}}

    def interrupt(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(refit_cut.LayerFit, "set", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upcycle.convert(source, tmp_path / "out", **keys)
    monkeypatch.undo()
    monkeypatch.setattr(load("method", method), "cut", interrupt)  # what was decided is not decided again
    upcycle.convert(source, tmp_path / "out", **keys)
    monkeypatch.undo()
    upcycle.convert(source, tmp_path / "whole", **keys)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("out", "whole"))
    assert one == two
