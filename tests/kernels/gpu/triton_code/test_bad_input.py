"""What does not fit together is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from guards import guarded
from kernel_cases import Case, make

from upcycle.errors import UsageError
from upcycle.kernels.gpu.backend import backward, forward
from upcycle.kernels.gpu.tile_table import TileTable
from upcycle.kernels.layout.dispatch import route
from upcycle.kernels.layout.expert_weights import Gradients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, r, s: (x.double(), w, r, s), "x is torch.float64"),
        (lambda x, w, r, s: (x[:, :-1], w, r, s), r"x has the shape \(5, 31\), not \(5, 32\)"),
        (lambda x, w, r, s: (x[:-1], w, r, s), r"x has the shape \(4, 32\), not \(5, 32\)"),
        (lambda x, w, r, s: (x[0], w, r, s), r"x has the shape \(32,\)"),
        (lambda x, w, r, s: (x.half(), w, r, s), "x is torch.float16 on .*, the experts are torch.float32"),
        (
            lambda x, w, r, s: (x, w, route(r.row_token.view(5, 2) % 3, 3), s),
            "routing is to 3 experts, and there are 4",
        ),
        (lambda x, w, r, s: (x, w, r, s.bfloat16()), "router weights are bfloat16"),
        (lambda x, w, r, s: (x, w, r, s.view(5, 2)), r"router weights are float32 \[5, 2\] on .*, not float32 \[10\]"),
        (lambda x, w, r, s: (x.to("meta"), w, r, s), "x is torch.float32 on meta"),
    ],
)
def test_inputs(change: object, message: str, device: torch.device, table: TileTable) -> None:
    arguments = make(Case(tokens=5), device).arguments
    with pytest.raises(UsageError, match=message):
        forward(*change(*arguments), True, table)  # type: ignore[operator]


def test_gradients(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=5), device)
    _, z = forward(*made.arguments, True, table)
    with pytest.raises(UsageError, match=r"the gradient is float16 \[5, 32\] on"):
        backward(made.problem.grad.half(), *made.arguments, z, made.gradients(), table=table)
    buffers = Gradients(up=torch.zeros(3, 3, device=device))
    with pytest.raises(UsageError, match=r"gradients of up cannot be added to float32 \[3, 3\]"):
        backward(made.problem.grad, *made.arguments, z, made.gradients(), into=buffers, table=table)


def test_a_table_without_the_tile(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=5), device)
    short = replace(table, entries={key: tile for key, tile in table.entries.items() if key[2] != "combine"})
    with pytest.raises(UsageError, match="no tile for combine"):
        forward(*made.arguments, True, short)


def test_a_table_whose_families_have_other_buckets(device: torch.device, table: TileTable) -> None:
    made = make(Case(tokens=5), device)
    wide = {key: replace(tile, m=32) if key[2] == "up/interleaved" else tile for key, tile in table.entries.items()}
    with pytest.raises(UsageError, match="tile of up/interleaved has 32 rows, the list of row tiles 16"):
        forward(*made.arguments, True, TileTable(wide))


def test_guards_see_what_is_written_outside() -> None:
    with guarded() as guards:
        made = torch.zeros(3).new_empty(4)
        made.as_strided((5,), (1,)).fill_(1.0)
    with pytest.raises(AssertionError, match="outside"):
        guards.check()
