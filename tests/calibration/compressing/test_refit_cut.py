"""The refit of a compressed MoE against least squares in fp64 (numpy), layer by layer, on whole stock models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_oracle import Seen, block_of, layers_of, neurons, some_windows, stock, watch, without_experts
from safetensors.torch import load_file

import upcycle
from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.calibration.compressing import moe_walk, refit_cut
from upcycle.calibration.compressing.refit_cut import down_file, refit_cuts
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.ffn.ridge_sums import UNJUDGED_STRENGTH
from upcycle.planning.compress_job import read_cuts
from upcycle.progress import SILENT

Models = Callable[..., Path]
PRUNED = LayerCut.keeping([0, 2, 3])
ORDER = (3, 1, 0, 2, 5, 4, 7, 6, 8, 15, 10, 11, 12, 13, 14, 9)
MERGED = LayerCut(((Term(0, 0.3), Term(1, 0.7, ORDER)), (Term(2),), (Term(3),)), (1, 2, 3))
WIDE = LayerCut(((Term(0, 0.3), Term(1, 0.7, (*ORDER, *range(23, 15, -1)))), (Term(2),), (Term(3),)), (1, 2, 3))
STRENGTH = 0.3


def plain(experts: Any, part: str, matrix: torch.Tensor) -> torch.Tensor:
    """One expert's matrix with outputs before inputs and gate before up, as all classes but GPT-OSS's hold it."""
    if not hasattr(experts, "down_proj_bias"):
        return matrix
    return matrix.T if part == "down_proj" else torch.cat([matrix[:, ::2].T, matrix[:, 1::2].T])


def as_held(experts: Any, part: str, matrix: torch.Tensor) -> torch.Tensor:
    if not hasattr(experts, "down_proj_bias"):
        return matrix
    return matrix.T if part == "down_proj" else torch.stack(matrix.chunk(2), 1).flatten(0, 1).T


def cut_model(model: Any, folder: Path, cut: LayerCut | dict[int, LayerCut]) -> Any:
    """The stock model of a cut, its merged experts summed here."""
    cuts = dict.fromkeys(range(8), cut) if isinstance(cut, LayerCut) else cut
    smaller = without_experts(model, folder, {index: own.rows for index, own in cuts.items()})
    for index, (whole, layer) in enumerate(zip(layers_of(model), layers_of(smaller), strict=True)):
        if (block := block_of(layer)) is None:
            continue
        for place, terms in enumerate(cuts[index].experts):
            for part in ("gate_up_proj", "down_proj"):
                total = 0
                for term in terms:
                    experts = block_of(whole).experts
                    matrix = plain(experts, part, getattr(experts, part)[term.expert].detach())
                    if term.order:
                        order = torch.tensor(term.order)
                        width = len(order)
                        matrix = matrix[:, order] if part == "down_proj" else matrix[torch.cat([order, order + width])]
                    total = total + term.weight * matrix
                getattr(block.experts, part).data[place] = as_held(block.experts, part, total)
                if hasattr(block.experts, "down_proj_bias"):
                    merge_biases(block_of(whole).experts, block.experts, place, terms)
    return smaller


def merge_biases(whole: Any, made: Any, place: int, terms: Sequence[Term]) -> None:
    made.down_proj_bias.data[place] = sum(t.weight * whole.down_proj_bias[t.expert].detach() for t in terms)
    total = 0
    for term in terms:
        own = whole.gate_up_proj_bias[term.expert].detach()
        order = torch.tensor(term.order or range(len(own) // 2))
        total = total + term.weight * torch.stack([own[::2][order], own[1::2][order]], 1).flatten()
    made.gate_up_proj_bias.data[place] = total


def ridge(a: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    scale = strength * np.square(a).sum(0).mean()
    augmented = np.vstack([a, np.sqrt(scale) * np.eye(a.shape[1])])
    return np.linalg.lstsq(augmented, np.vstack([y, np.zeros((a.shape[1], y.shape[1]))]), rcond=None)[0]


def fitted(made: Seen, experts: Any, missing: np.ndarray, width: int, joint: bool, strength: float) -> np.ndarray:
    """The new down projections ``[E', d, F]``; all at once, or expert by expert, those of most tokens first."""
    count = len(experts.down_proj)
    held = np.arange(len(missing)) // width % 8 == 7
    rows = [plain(experts, "down_proj", own) for own in experts.down_proj.detach()]
    down, left = torch.stack(rows).numpy().copy(), missing.copy()
    load = torch.bincount(made.ids.flatten(), minlength=count).tolist()
    groups = [[*range(count)]] if joint else [[e] for e in sorted(range(count), key=lambda e: -load[e])]
    for group in groups:
        features = np.hstack([(neurons(experts, made.x, e).detach() * made.weights[:, e, None]).numpy() for e in group])
        chosen = (made.weights[:, group] > 0).any(1).numpy()
        update = ridge(features[chosen & ~held], left[chosen & ~held], strength)
        judged = chosen & held if (chosen & held).any() else chosen
        after = left - features @ update
        if np.square(after[judged]).sum() < np.square(left[judged]).sum():
            left = after
            for expert, own in zip(group, np.split(update, len(group)), strict=True):
                down[expert] += own.T
    return down


@pytest.fixture
def scaled(pico_moe: Models, tmp_path: Path) -> Path:
    """A Granite whose blocks are multiplied before they are added."""
    folder = shutil.copytree(pico_moe("granitemoe"), tmp_path / "granite")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"residual_multiplier": 0.4}))
    return Path(folder)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    ("name", "cut", "count"),
    [
        ("mixtral", PRUNED, 64),
        ("dots1", MERGED, 64),  # shared experts; its hidden size is twice an expert's
        ("flex_olmo", PRUNED, 64),
        ("granite", PRUNED, 64),
        ("qwen2_moe", MERGED, 64),  # a dense layer below
        ("gpt_oss", WIDE, 64),  # biases and a clamp
        ("phimoe", PRUNED, 64),
        ("granitemoehybrid", PRUNED, 64),  # a Mamba layer, and shared experts beside the block
        ("qwen3_vl_moe", WIDE, 64),  # stored the other way round
        ("glm4_moe-sigmoid", PRUNED, 5),  # too few windows to hold any out
    ],
)
def test_down_projections_are_the_least_squares_solutions(
    name: str,
    cut: LayerCut,
    count: int,
    joint: bool,
    pico_moe: Models,
    scaled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 128)
    monkeypatch.setattr(refit_cut, "REFIT_STRENGTHS", (STRENGTH,))
    monkeypatch.setattr(refit_cut, "MOST_JOINT", 4096 if joint else 16)
    folder, windows = scaled if name == "granite" else pico_moe(name), some_windows(count, 32)
    checkpoint = MoeCheckpoint.open(str(folder))
    cuts = dict.fromkeys(checkpoint.model.moe_layers, cut)
    config = checkpoint.model.config_with(3, 2)
    reports = refit_cuts(checkpoint, config, cuts, "keep", windows, tmp_path, SILENT)
    model = stock(folder)
    smaller, whole = cut_model(model, folder, cut), watch(model, windows)
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    held = torch.arange(windows.numel()) // 32 % 8 == 7
    judged = held if held.any() else ~held
    strength = STRENGTH if held.any() else UNJUDGED_STRENGTH
    changed = 0
    for index in cuts:

        def missing(index: int = index) -> torch.Tensor:
            made, uncut = watch(smaller, windows)[index], whole[index]
            return uncut.block - made.block if name == "flex_olmo" else (uncut.after - made.after) / multiplier

        before, experts = missing(), block_of(layers_of(smaller)[index]).experts
        old = torch.stack([plain(experts, "down_proj", own) for own in experts.down_proj.detach()])
        made = watch(smaller, windows)[index]
        new = torch.from_numpy(fitted(made, experts, before.numpy(), 32, joint, strength))
        found = load_file(down_file(tmp_path, index))["down"].double()
        step = torch.linalg.norm(new - old)
        changed += bool(step > 0)
        assert torch.linalg.norm(found - new) <= 1e-3 * step + 1e-6 * torch.linalg.norm(old)
        experts.down_proj.data = torch.stack([as_held(experts, "down_proj", own) for own in found])
        added = whole[index].routed[judged].square().sum()
        told = reports[index]
        assert told["missing_before"] == pytest.approx(float(before[judged].square().sum() / added), rel=1e-3)
        assert told["missing_after"] == pytest.approx(float(missing()[judged].square().sum() / added), rel=1e-3)
        assert told["missing_after"] <= told["missing_before"]
    assert changed


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_vl_moe", "granitemoehybrid", "phimoe", "qwen3_5_moe"])
def test_merged_experts_are_written_as_these_sums(name: str, pico_moe: Models, tmp_path: Path) -> None:
    """Biases, interleaved rows and matrices the other way round included; neurons are aligned."""
    text = {"text": "demo", "tokens": 512, "window": 32}
    source, out = pico_moe(name), tmp_path / "out"
    upcycle.convert(str(source), out, method="m_smoe", keep=0.5, refit="none", calibration=text)
    cuts: Any = read_cuts(out)
    assert any(term.order for cut in cuts.values() for terms in cut.experts for term in terms)
    made, windows = cut_model(stock(source), source, cuts), some_windows(2, 24)
    with torch.no_grad():
        expected, found = (model(windows, use_cache=False).logits for model in (made, stock(out)))
    assert torch.dist(found, expected) < 1e-5 * torch.linalg.norm(expected)  # sums are rounded to fp32


def test_the_strength_is_the_one_that_leaves_least_on_held_out_windows(
    pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, windows = pico_moe("mixtral"), some_windows(64, 32)
    checkpoint, left = MoeCheckpoint.open(str(folder)), {}
    for strengths in ((0.001,), (0.1,), (1.0,), (0.001, 0.1, 1.0)):
        monkeypatch.setattr(refit_cut, "REFIT_STRENGTHS", strengths)
        config = checkpoint.model.config_with(3, 2)
        left[strengths] = refit_cuts(checkpoint, config, {0: PRUNED, 1: PRUNED}, "keep", windows, tmp_path, SILENT)[0]
    chosen = left.pop((0.001, 0.1, 1.0))
    assert chosen == min(left.values(), key=lambda report: report["missing_after"])
