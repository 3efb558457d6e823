"""Importance against autograd over the whole stock model, text by text, and the clusters of texts that it is told apart by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from upcycle.architectures.stock import load_stock_model
from upcycle.calibration.neuron_importance import _text_clusters, measure_importance, read_importance, write_importance
from upcycle.checkpoints.checkpoint import DenseCheckpoint
from upcycle.conversion.jobs import job_of
from upcycle.files.formats.token_files import TokenFile
from upcycle.models.layer_runner import LayerRunner
from upcycle.progress import SILENT
from upcycle.recipe.conversion_recipe import parse_recipe

WINDOWS, W, D = 16, 64, 32


def is_settled(points: torch.Tensor, labels: torch.Tensor, clusters: int) -> bool:
    """What k-means ends with: no cluster is empty, and every point is nearest to its own cluster's mean."""
    if labels.unique().tolist() != list(range(clusters)):
        return False
    means = torch.stack([points[labels == c].mean(0) for c in range(clusters)])
    return torch.equal(torch.cdist(points, means).argmin(1), labels)


@pytest.mark.long
@pytest.mark.parametrize("batch", [W, 4 * W])
@pytest.mark.parametrize("piece", [W, W // 2])
def test_texts_of_one_direction_are_one_cluster_whatever_their_length(batch: int, piece: int, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(5)
    kinds = torch.randint(3, (WINDOWS * W // piece,), generator=rng)
    directions = normalize(torch.randn(3, D, generator=rng), dim=1)
    sizes = 0.1 + 10 * torch.rand(len(kinds), 1, 1, generator=rng)
    tokens = sizes * (directions[kinds][:, None] + 0.3 * torch.randn(len(kinds), piece, D, generator=rng))
    file = TokenFile(tmp_path / "final", D)
    file.write(tokens.flatten(0, 1).split(batch))
    labels = _text_clusters(file, piece, batch, 3, seed=0)
    names = {(int(kind), int(label)) for kind, label in zip(kinds, labels, strict=True)}
    assert len(names) == 3  # one label to a kind, one kind to a label
    assert {kind for kind, _ in names} == {label for _, label in names} == {0, 1, 2}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("clusters", "piece"), [(1, W), (3, W), (9, W // 2)])
def test_importance_is_what_autograd_says_of_the_whole_model(
    clusters: int, piece: int, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    """Of every cluster's texts: the mean over their tokens; nine clusters need halves of windows."""
    dense = pico("llama")
    job = job_of(parse_recipe({"source": str(dense), "method": "importance", "calibration": "demo"}, "test"))
    checkpoint = DenseCheckpoint.open(str(dense), None)
    ids = torch.randint(4096, (WINDOWS, W), generator=torch.Generator().manual_seed(2))
    runner = LayerRunner(checkpoint, "keep", W)
    write_importance(tmp_path / "importance.safetensors", runner, checkpoint, ids, clusters, job, SILENT)
    found = read_importance(tmp_path / "importance.safetensors")

    model = load_stock_model(dense).double()
    hidden: list[torch.Tensor] = []
    final: list[torch.Tensor] = []

    def keep(_: Any, args: tuple[torch.Tensor]) -> None:
        args[0].retain_grad()
        hidden.append(args[0])

    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(keep)
    model.model.layers[-1].register_forward_hook(
        lambda _, __, output: final.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = model(ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    states = final[0].detach().float().flatten(0, 1)
    file = TokenFile(tmp_path / "final", D)
    file.write([states])
    labels = _text_clusters(file, piece, len(states), clusters, seed=0)
    assert is_settled(normalize(states.view(-1, piece, D).mean(1), dim=1), labels, clusters)
    for index, h in enumerate(hidden):
        assert h.grad is not None
        effect = (h * h.grad).abs().flatten(0, 1)
        for cluster in range(clusters):
            mine = (labels == cluster).repeat_interleave(piece)
            expected = effect[mine].mean(0)
            assert torch.linalg.norm(found[index][cluster] - expected) <= 1e-4 * torch.linalg.norm(expected)


def test_several_clusterings_are_measured_by_the_passes_of_one(
    pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same numbers, bit for bit, where pieces of text are windows (three clusters) and where halves (nine)."""
    dense = pico("llama")
    job = job_of(parse_recipe({"source": str(dense), "method": "importance", "calibration": "demo"}, "test"))
    checkpoint = DenseCheckpoint.open(str(dense), None)
    ids = torch.randint(4096, (WINDOWS, W), generator=torch.Generator().manual_seed(2))
    runner, passes = LayerRunner(checkpoint, "keep", W), []
    monkeypatch.setattr(runner, "forward", lambda *args, own=runner.forward: passes.append(args[0]) or own(*args))

    def measured(*clusters: int) -> dict[int, dict[int, torch.Tensor]]:
        passes.clear()
        return measure_importance(tmp_path, runner, checkpoint, ids, clusters, job, SILENT)

    together, several = measured(9, 3), list(passes)
    assert list(together) == [9, 3]
    for count in (3, 9):
        alone = measured(count)[count]
        assert passes == several
        assert sorted(alone) == sorted(together[count]) == [0, 1, 2]
        for index, importance in alone.items():
            assert importance.shape == (count, 96)
            assert torch.equal(importance, together[count][index])
