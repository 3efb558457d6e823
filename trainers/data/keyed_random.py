"""Random numbers that are a function of a key, the same on every machine and in every NumPy."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def random_words(count: int, *key: object) -> NDArray[np.uint64]:
    """``[count]`` raw 64-bit outputs of Philox; NumPy keeps those of a bit generator as they are, unlike its distributions."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    return np.asarray(generator.random_raw(count), np.uint64)


def permutation(count: int, *key: object) -> NDArray[np.int64]:
    """A random order of ``count`` things."""
    return np.argsort(random_words(count, *key), kind="stable").astype(np.int64)


def uniform(count: int, *key: object) -> NDArray[np.float64]:
    """``[count]`` numbers in [0, 1), multiples of 2^-53."""
    words = random_words(count, *key) >> np.uint64(11)
    return np.asarray(words.astype(np.float64) * 2.0**-53)
