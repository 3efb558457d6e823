"""The fixed dictionary of the codec: 16-bit codes that stand for runs of trits of different lengths, few of them unlikely.

A trit is -1, 0 or 1. The dictionary is Tunstall's: beginning with the empty word, the likeliest word is replaced by the three words
that are one trit longer, until there would be more than 2^16 of them. No word is the beginning of another, and every sequence of
trits begins with exactly one word, or is the beginning of some. Likelihoods are counted in whole numbers, so that every machine
makes the same dictionary.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

DICTIONARY_VERSION = "tunstall-885-64"  # trits are zero with probability 0.885, as QMoE takes it; words have at most 64
LONGEST_WORD = 64
_MOST_WORDS = 1 << 16
# Thousandths of bits: 1000 * -log2 of 0.885, and of 0.0575 for either of the others.
_ZERO_COST, _OTHER_COST = 176, 4120


@dataclass(frozen=True)
class Dictionary:
    """Holds W words of at most L = 64 trits.

    Attributes:
        words: int8 ``[W, L]``, the trits of each word, zeros behind its end.
        planes: uint64 ``[W, 2]``: bit i says whether trit i of a word is 1, and whether it is -1.
        lengths: uint8 ``[W]``.
        steps: int32 ``[N, 3]``, the tree of N beginnings of words: where a beginning leads with trit -1, 0 and 1. A number of 0 or
            more is another beginning; -1 - w is the end of word w. The empty beginning is number 0.
        ends: int32 ``[N]``, a word that begins so.
    """

    words: npt.NDArray[np.int8]
    planes: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int32]


@lru_cache(maxsize=1)
def dictionary() -> Dictionary:
    """Return the dictionary of :data:`DICTIONARY_VERSION`; made once per process, in about half a second."""
    steps: list[list[int]] = []
    words: list[bytes] = []
    # Cost, number of creation (the first of equals is replaced first), word, the beginning that leads to it, and by which trit.
    waiting: list[tuple[int, int, bytes, int, int]] = [(0, 0, b"", -1, 0)]
    made, total = 1, 1
    while waiting:
        cost, _, word, parent, trit = heapq.heappop(waiting)
        if len(word) == LONGEST_WORD or total + 2 > _MOST_WORDS:
            steps[parent][trit] = -1 - len(words)
            words.append(word)
            continue
        node = len(steps)
        steps.append([0, 0, 0])
        if parent >= 0:
            steps[parent][trit] = node
        total += 2
        for other, more in enumerate((_OTHER_COST, _ZERO_COST, _OTHER_COST)):
            heapq.heappush(waiting, (cost + more, made, word + bytes([other]), node, other))
            made += 1
    lengths = np.array([len(word) for word in words], np.uint8)
    table: npt.NDArray[np.int8] = np.zeros((len(words), LONGEST_WORD), np.int8)
    filled = np.arange(LONGEST_WORD) < lengths[:, None]
    table[filled] = np.frombuffer(b"".join(words), np.uint8).astype(np.int8) - 1
    tree = np.array(steps, np.int32)
    ends: npt.NDArray[np.int32] = np.zeros(len(tree), np.int32)
    for node in range(len(tree) - 1, -1, -1):  # a beginning is made before those that are longer
        after = tree[node, 1]
        ends[node] = -1 - after if after < 0 else ends[after]
    planes = np.stack([np.packbits(table == sign, axis=1, bitorder="little").view("<u8")[:, 0] for sign in (1, -1)], 1)
    return Dictionary(table, planes, lengths, tree, ends)
