"""Rows of attention heads in halves and in pairs: each order undoes the other, block by block too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from upcycle.architectures.rope import partly_turned
from upcycle.architectures.tensor_origin import Origin, halves, is_rotated, pairs
from upcycle.files.formats.tensor_files import SafetensorsFile


def test_pairs_and_halves_by_hand() -> None:
    rows = torch.arange(8)
    assert Origin("q").ordered(pairs(4)).apply(rows).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = torch.arange(6)
    assert Origin("q").ordered(pairs(6)).apply(rows).tolist() == [0, 3, 1, 4, 2, 5]
    assert Origin("q").ordered(halves(6)).apply(rows).tolist() == [0, 2, 4, 1, 3, 5]


def test_dimensions_that_are_not_turned_stay_behind_or_go_between_by_hand() -> None:
    rows = torch.arange(8)
    assert Origin("q").ordered(halves(8, 4)).apply(rows).tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert Origin("q").ordered(pairs(8, 6)).apply(rows).tolist() == [0, 3, 1, 4, 2, 5, 6, 7]
    apart = partly_turned({"partial_rotary_factor": 0.5}, 8)
    assert Origin("q").ordered(apart).apply(rows).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert Origin("q").ordered(halves(8, 4)).ordered(apart).apply(rows).tolist() == [0, 2, 4, 5, 1, 3, 6, 7]


@pytest.mark.parametrize("rotated", [None, 8])
def test_one_order_undoes_the_other(rotated: int | None) -> None:
    weight = torch.randn(24, 5)
    paired = Origin("q").ordered(pairs(12, rotated)).apply(weight)
    assert torch.equal(Origin("q").ordered(halves(12, rotated)).apply(paired), weight)
    assert Origin("q").ordered(halves(12, rotated)).ordered(pairs(12, rotated)) == Origin("q")


def test_a_sum_is_kept_in_fp32() -> None:
    norm = Origin("norm", add=1.0)
    weight = torch.tensor([2.0**-10], dtype=torch.bfloat16)
    assert norm.dtype("bfloat16") == "float32"
    assert norm.apply(weight).item() == 1 + 2.0**-10
    assert Origin("norm").dtype("bfloat16") == "bfloat16"


def test_a_product_of_half_precision_is_kept_in_fp32() -> None:
    embeddings = Origin("embeddings", times=5.5)
    weight = torch.tensor([1 + 2.0**-7], dtype=torch.bfloat16)
    assert embeddings.dtype("bfloat16") == embeddings.dtype("float16") == "float32"
    assert embeddings.apply(weight).item() == 5.5 * (1 + 2.0**-7)


@pytest.mark.parametrize("most_bytes", [1, 100, 1 << 20])
def test_parts_are_read_in_blocks_of_whole_heads(most_bytes: int, tmp_path: Path) -> None:
    whole = torch.randn(30, 3)
    save_file({"a": whole}, tmp_path / "a.safetensors")
    blocks = list(SafetensorsFile(tmp_path / "a.safetensors").chunks("a", most_bytes, (6, 18), 6))
    assert torch.equal(torch.cat(blocks), whole[6:24])
    assert all(len(block) % 6 == 0 for block in blocks)


def test_which_tensors_are_rotated() -> None:
    assert is_rotated("model.layers.0.self_attn.q_proj.weight")
    assert is_rotated("model.layers.0.self_attn.k_proj.bias")
    assert not is_rotated("model.layers.0.self_attn.v_proj.weight")
    assert not is_rotated("lm_head.weight")


def test_rows_of_every_group_are_taken_in_order() -> None:
    rows = torch.arange(12.0)
    taken = Origin("qkv", head=6, order=(2, 3))
    assert taken.apply(rows).tolist() == [2, 3, 8, 9]
    assert taken.apply(rows[:, None].expand(12, 5)).shape == (4, 5)
    assert taken.ordered((1, 0)).apply(rows).tolist() == [3, 2, 9, 8]
    assert Origin("q").ordered((2, 0, 1)).apply(rows[:6]).tolist() == [2, 0, 1, 5, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_taken_off_rows_or_columns(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 2.0, 6.0], [4.0, 5.0, 0.0]], dtype=dtype)
    rows, columns = (Origin("a", centred="rows"), Origin("a", centred="columns", head=2))
    assert rows.apply(weight).tolist() == [[-2, -1, 3], [1, 2, -3]]
    assert columns.apply(weight).tolist() == [[-1.5, -1.5, 3], [1.5, 1.5, -3]]
    assert columns.apply(weight[:, 0]).tolist() == [-1.5, 1.5]
    assert rows.dtype("bfloat16") == columns.dtype("bfloat16") == "float32"
