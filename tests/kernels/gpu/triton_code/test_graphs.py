"""A pass is captured in a CUDA graph, routing included, and replayed with other tokens: nothing in it waits for the device."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import Case, make

from upcycle.kernels.gpu.backend import forward
from upcycle.kernels.gpu.tile_table import TileTable
from upcycle.kernels.layout.dispatch import route


def test_a_replayed_pass_is_the_same(device: torch.device, table: TileTable) -> None:
    if device.type != "cuda":
        pytest.skip("graphs are a GPU's")
    x, weights, _, scores = make(Case(tokens=16, dtype=torch.bfloat16), device).arguments
    rng = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.stack([torch.randperm(4, generator=rng)[:2] for _ in range(16)]).to(device)

    def run() -> torch.Tensor:
        return forward(x, weights, route(ids, 4), scores, False, table)[0]

    ids = draw()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    for _ in range(3):
        ids.copy_(draw())
        x.normal_()
        graph.replay()
        assert torch.equal(replayed, run())
