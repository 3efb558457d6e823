"""The codec loses nothing, decodes rows alone, and names damage."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.errors import CheckpointError
from upcycle.methods.compressing.qmoe_codec import codes
from upcycle.methods.compressing.qmoe_codec.codes import Coded, decode_ternary, encode_ternary
from upcycle.methods.compressing.qmoe_codec.dictionary import DICTIONARY_VERSION, LONGEST_WORD, dictionary


def matrix_of(zeros: float, rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (rows, columns), generator=draw) * 2 - 1
    kept = torch.rand(rows, columns, generator=draw) >= zeros
    scales = torch.where(signs > 0, torch.rand(rows, 1, generator=draw) + 0.1, torch.rand(rows, 1, generator=draw) + 2)
    return torch.where(kept, signs * scales, torch.zeros(())).to(dtype)


def coded(matrix: torch.Tensor) -> Coded:
    found = encode_ternary(matrix)
    assert found is not None
    return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    )


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(codes, "decode_natively", lambda *_: None)
        monkeypatch.setattr(codes, "_STEP", 50)  # several steps
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_ternary_matrix_comes_back(way: str, dtype: torch.dtype) -> None:
    @settings(max_examples=15, deadline=None)
    @given(st.floats(0, 1), st.integers(1, 7), st.integers(1, 300), st.integers(0, 99))
    def check(zeros: float, rows: int, columns: int, seed: int) -> None:
        matrix = matrix_of(zeros, rows, columns, dtype, seed)
        packed = coded(matrix)
        assert same(decode_ternary(packed), matrix)
        for row in range(rows):
            assert same(decode_ternary(packed, row, 1), matrix[row : row + 1])
            own = packed.codes[int(packed.counts[:row].long().sum()) :][: int(packed.counts[row])]
            alone = Coded(own, packed.counts[row : row + 1], packed.scales[row : row + 1], columns)
            assert same(decode_ternary(alone), matrix[row : row + 1])

    check()


@pytest.mark.parametrize(
    "odd",
    [[1.0, 2.0, 0.0], [-1.0, -2.0, 1.0], [-0.0, 1.0, -1.0], [float("nan"), 0.0, 1.0], [float("inf"), 1.0, 0.0]],
)
def test_what_is_not_ternary_is_not_coded(odd: list[float]) -> None:
    matrix = torch.zeros(4, 3)
    assert encode_ternary(matrix) is not None
    matrix[2] = torch.tensor(odd)
    assert encode_ternary(matrix) is None
    assert encode_ternary(torch.zeros(0, 3)) is None


def test_fewer_bits_than_one_where_most_are_zeros() -> None:
    for zeros, most in ((0.85, 0.83), (0.9, 0.63), (0.95, 0.44)):
        assert coded(matrix_of(zeros, 64, 2048, torch.bfloat16)).bits_per_weight < most


def test_damage_is_an_error(way: str) -> None:
    whole = coded(matrix_of(0.8, 6, 100, torch.bfloat16))

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(CheckpointError, match=words):
            decode_ternary(replace(whole, **changes))

    beyond = whole.codes.clone()
    beyond[int(whole.counts[:2].long().sum())] = (1 << 16) - 1  # no such word, in row 2
    refused("row 2 do not fill", codes=beyond)
    refused("there are", codes=whole.codes[:-1])
    longer, shorter = whole.counts.clone(), whole.counts.clone()
    longer[0], longer[1] = int(whole.counts[0]) + 1, int(whole.counts[1]) - 1
    refused("row 0 do not fill", counts=longer)
    shorter[0], shorter[1] = int(whole.counts[0]) - 1, int(whole.counts[1]) + 1
    refused("row 0 do not fill", counts=shorter)
    refused("do not fill its 200 columns", columns=200)
    refused("no row has enough", columns=1 << 60)


def test_the_dictionary_is_the_one_of_its_version() -> None:
    book = dictionary()
    digest = hashlib.sha256(book.words.tobytes() + book.lengths.tobytes()).hexdigest()
    assert (DICTIONARY_VERSION, digest[:16]) == ("tunstall-885-64", "54570d2b13df98ae")
    assert len(book.words) <= 1 << 16
    # Every word is a leaf of a complete tree: the shares of the sequences that begin with each sum to 1.
    assert sum(3.0 ** -int(length) for length in book.lengths) == pytest.approx(1.0, abs=1e-12)
    assert len({word[:length].tobytes() for word, length in zip(book.words, book.lengths, strict=True)}) == len(
        book.words
    )
    assert int(book.lengths.max()) == LONGEST_WORD
