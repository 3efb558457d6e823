"""Packs integers of 1 to 8 bits into words of 32, as compressed-tensors' format ``pack-quantized`` does.

Value i of a row is at bit ``i * bits`` of the row, plus ``2 ** (bits - 1)``, which makes it positive; the first is at the lowest bit
of the first word. Rows begin with a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_WORD = 32


def words_of(columns: int, bits: int) -> int:
    """Return how many words a row takes."""
    return -(-columns * bits // _WORD)


def pack_rows(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return integers ``[rows, columns]`` between ``-2 ** (bits - 1)`` and ``2 ** (bits - 1) - 1`` as int32 ``[rows, words]``."""
    import torch

    rows, columns = values.shape
    blocks = -(-columns // _WORD)
    # Padding is zero bits, not zeros.
    positive = torch.zeros(rows, blocks * _WORD, dtype=torch.int64)
    positive[:, :columns] = values.long() + (1 << (bits - 1))
    positive = positive.view(rows, blocks, _WORD)
    words = torch.zeros(rows, blocks, bits, dtype=torch.int64)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        words[..., word] |= positive[..., place] << shift & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[..., word + 1] |= positive[..., place] >> (_WORD - shift)
    whole = words.view(rows, blocks * bits)[:, : words_of(columns, bits)]
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).to(torch.int32)


def unpack_rows(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return what :func:`pack_rows` packed, int8 ``[rows, columns]``."""
    import torch

    rows, stored = packed.shape
    blocks = -(-columns // _WORD)
    words = torch.zeros(rows, blocks * bits, dtype=torch.int64)
    words[:, :stored] = packed.long() & 0xFFFFFFFF
    words = words.view(rows, blocks, bits)
    values = torch.empty(rows, blocks, _WORD, dtype=torch.int8)
    for place in range(_WORD):
        word, shift = divmod(place * bits, _WORD)
        own = words[..., word] >> shift
        if shift + bits > _WORD:
            own = own | words[..., word + 1] << (_WORD - shift)
        values[..., place] = ((own & (1 << bits) - 1) - (1 << (bits - 1))).to(torch.int8)
    return values.view(rows, blocks * _WORD)[:, :columns]
