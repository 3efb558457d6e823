"""How tokens are stored: the id, whether it is learned, and whether another text begins with it within the document, in 32 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from upcycle.trainers.data.packing import Int64

_BEGINS = (
    1 << 30
)  # no vocabulary is that large; what is not learned is stored as -1 - code, so that plain text is stored as its ids


def coded(ids: Int64, learned: NDArray[np.bool_], begins: int | None = None) -> list[int]:
    """Codes of the tokens of one document.

    Args:
        ids: ``[T]``.
        learned: ``[T]``, which of them are learned.
        begins: the token with which a second text begins, such as the worse one of two.
    """
    codes = ids.astype(np.int64)
    if begins is not None:
        codes[begins] |= _BEGINS
    found: list[int] = np.where(learned, codes, ~codes).tolist()
    return found


def decoded(codes: Int64) -> tuple[Int64, NDArray[np.bool_], NDArray[np.bool_]]:
    """Ids, which tokens are learned, and with which a second text begins; ``[T]`` each."""
    learned = codes >= 0
    plain = np.where(learned, codes, ~codes)
    return plain & (_BEGINS - 1), learned, plain >= _BEGINS
