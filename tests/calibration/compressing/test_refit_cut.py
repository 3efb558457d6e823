"""The refit of a compressed MoE against least squares in fp64 (numpy), layer by layer, on whole stock models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_oracle import Seen, block_of, layers_of, neurons, some_windows, stock, watch, without_experts
from safetensors.torch import load_file

from upcycle.architectures.expert_terms import LayerCut, Term
from upcycle.calibration.compressing import moe_walk, refit_cut
from upcycle.calibration.compressing.refit_cut import down_file, refit_cuts
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.ffn.ridge_sums import UNJUDGED_STRENGTH
from upcycle.progress import SILENT

Models = Callable[..., Path]
PRUNED = LayerCut.keeping([0, 2, 3])
ORDER = (3, 1, 0, 2, 5, 4, 7, 6, 8, 15, 10, 11, 12, 13, 14, 9)
MERGED = LayerCut(((Term(0, 0.3), Term(1, 0.7, ORDER)), (Term(2),), (Term(3),)), (1, 2, 3))
STRENGTH = 0.3


def cut_model(model: Any, folder: Path, cut: LayerCut) -> Any:
    """The stock model of a cut, its merged experts summed here."""
    smaller = without_experts(model, folder, dict.fromkeys(range(8), cut.rows))
    for whole, layer in zip(layers_of(model), layers_of(smaller), strict=True):
        if (block := block_of(layer)) is None:
            continue
        for place, terms in enumerate(cut.experts):
            for part in ("gate_up_proj", "down_proj"):
                total = 0
                for term in terms:
                    matrix = getattr(block_of(whole).experts, part)[term.expert].detach()
                    if term.order:
                        order = torch.tensor(term.order)
                        width = len(order)
                        matrix = matrix[:, order] if part == "down_proj" else matrix[torch.cat([order, order + width])]
                    total = total + term.weight * matrix
                getattr(block.experts, part).data[place] = total
    return smaller


def ridge(a: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    scale = strength * np.square(a).sum(0).mean()
    augmented = np.vstack([a, np.sqrt(scale) * np.eye(a.shape[1])])
    return np.linalg.lstsq(augmented, np.vstack([y, np.zeros((a.shape[1], y.shape[1]))]), rcond=None)[0]


def fitted(made: Seen, experts: Any, missing: np.ndarray, width: int, joint: bool, strength: float) -> np.ndarray:
    """The new down projections ``[E', d, F]``; all at once, or expert by expert, those of most tokens first."""
    count = len(experts.down_proj)
    held = np.arange(len(missing)) // width % 8 == 7
    down, left = experts.down_proj.detach().numpy().copy(), missing.copy()
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
        old = experts.down_proj.detach().clone()
        made = watch(smaller, windows)[index]
        new = torch.from_numpy(fitted(made, experts, before.numpy(), 32, joint, strength))
        found = load_file(down_file(tmp_path, index))["down"].double()
        step = torch.linalg.norm(new - old)
        changed += bool(step > 0)
        assert torch.linalg.norm(found - new) <= 1e-3 * step + 1e-6 * torch.linalg.norm(old)
        experts.down_proj.data = found
        added = whole[index].routed[judged].square().sum()
        told = reports[index]
        assert told["missing_before"] == pytest.approx(float(before[judged].square().sum() / added), rel=1e-3)
        assert told["missing_after"] == pytest.approx(float(missing()[judged].square().sum() / added), rel=1e-3)
        assert told["missing_after"] <= told["missing_before"]
    assert changed


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
