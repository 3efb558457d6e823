"""The refit of a model that lost layers: least squares in fp64 towards the stream behind the layers that are gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_oracle import block_of, layers_of, neurons, some_windows, stock, watch
from safetensors.torch import load_file

from upcycle.architectures.kept_layers import config_of_layers
from upcycle.calibration.compressing import moe_walk, refit_cut
from upcycle.calibration.compressing.refit_cut import down_file
from upcycle.calibration.compressing.refit_depth import refit_depth
from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
from upcycle.progress import SILENT

Models = Callable[..., Path]
STRENGTH = 0.3


def ridge(a: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = STRENGTH * np.square(a).sum(0).mean()
    augmented = np.vstack([a, np.sqrt(scale) * np.eye(a.shape[1])])
    return np.linalg.lstsq(augmented, np.vstack([y, np.zeros((a.shape[1], y.shape[1]))]), rcond=None)[0]


@pytest.mark.parametrize("kept", [[0], [1]])
def test_the_layer_that_stays_is_fitted_to_the_stream_behind_both(
    kept: list[int], pico_moe: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_walk, "WALK_TOKENS", 128)
    monkeypatch.setattr(refit_cut, "REFIT_STRENGTHS", (STRENGTH,))
    folder, windows = pico_moe("mixtral"), some_windows(48, 16)
    checkpoint, model = MoeCheckpoint.open(str(folder)), stock(folder)
    config = config_of_layers(checkpoint.model, kept)
    reports = refit_depth(checkpoint, config, kept, "keep", windows, tmp_path, SILENT)
    assert [*reports] == kept
    target = watch(model, windows)[1].after
    layers = layers_of(model)
    model.model.layers = torch.nn.ModuleList([layers[kept[0]]])
    model.config.num_hidden_layers = 1
    made = watch(model, windows)[0]
    experts, missing = block_of(layers[kept[0]]).experts, (target - made.after).numpy()
    features = np.hstack([(neurons(experts, made.x, e).detach() * made.weights[:, e, None]).numpy() for e in range(4)])
    held = np.arange(len(missing)) // 16 % 8 == 7
    update = ridge(features[~held], missing[~held])
    expected = experts.down_proj.detach().numpy() + np.stack([part.T for part in np.split(update, 4)])
    found = load_file(down_file(tmp_path, kept[0]))["down"].double().numpy()
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)  # a ridge system in fp32
    left = np.square(missing - features @ update)[held].sum() / np.square(missing)[held].sum()
    report = reports[kept[0]]
    assert report["missing_after"] / report["missing_before"] == pytest.approx(left, rel=1e-3)
    assert left < 1


def test_layers_with_nothing_to_make_up_for_stay_as_they_are(pico_moe: Models, tmp_path: Path) -> None:
    checkpoint = MoeCheckpoint.open(str(pico_moe("mixtral")))
    config = config_of_layers(checkpoint.model, [0, 1])
    assert refit_depth(checkpoint, config, [0, 1], "keep", some_windows(8), tmp_path, SILENT) == {}
