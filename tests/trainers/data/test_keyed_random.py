"""Keyed random numbers: the same for ever, different for different keys, and even."""

from __future__ import annotations

import hashlib

import numpy as np

from upcycle.trainers.data.keyed_random import permutation, random_words, uniform


def philox(key: int, words: int) -> list[int]:
    """Philox 4x64 with ten rounds in plain integers (Salmon et al., SC 2011, section 3.3), its counter starting at 1."""
    mask = 2**64 - 1
    found: list[int] = []
    for counter in range(1, 1 + -(-words // 4)):
        c, k = [counter, 0, 0, 0], [key & mask, key >> 64]
        for _ in range(10):
            high_0, low_0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
            high_1, low_1 = divmod(0xCA5A826395121157 * c[2], 2**64)
            c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        found += c
    return found[:words]


def test_random_words_are_philox_outputs() -> None:
    key = int.from_bytes(hashlib.sha256(b"('prose', 1)").digest()[:16], "little")
    assert random_words(11, "prose", 1).tolist() == philox(key, 11)


def test_a_permutation_has_every_index_once() -> None:
    assert sorted(permutation(1000, 1).tolist()) == list(range(1000))
    assert permutation(1000, 1).tolist() != permutation(1000, 2).tolist()
    assert permutation(0, 1).tolist() == []


def test_uniform_numbers_are_in_range_with_the_right_mean() -> None:
    found = uniform(100_000, 3)
    assert found.min() >= 0
    assert found.max() < 1
    # The mean of n has standard deviation 1 / sqrt(12 n): five of them.
    assert abs(found.mean() - 0.5) < 5 / np.sqrt(12 * len(found))
