"""Random numbers that depend on a key alone, and are the same on every machine and with every version of NumPy."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def random_words(count: int, *key: object) -> NDArray[np.uint64]:
    """``[count]`` raw 64-bit outputs of Philox. NumPy promises that these stay the same, unlike its distributions."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.asarray(generator.random_raw(count), np.uint64)


def permutation(count: int, *key: object) -> NDArray[np.int64]:
    """A random permutation of ``0 ... count - 1``: ``[count]``."""
    return np.argsort(random_words(count, *key), kind="stable").astype(np.int64)


def uniform(count: int, *key: object) -> NDArray[np.float64]:
    """``[count]`` random numbers in [0, 1), multiples of 2^-53."""
    words = random_words(count, *key) >> np.uint64(11)
    return np.asarray(words.astype(np.float64) * 2.0**-53)
