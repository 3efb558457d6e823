"""MoDeGPT's three formulas, written down again with NumPy and SciPy in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from upcycle.methods.compressing.inside.heads import pair_scores, value_directions
from upcycle.methods.compressing.leverage import least_missed, nystrom_down, ridge_leverage

# A few hundred products of fp64 numbers, and inverses of matrices of condition numbers below 1e4.
SAME = 1e-9


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def activations(tokens: int, neurons: int) -> np.ndarray:
    """Neurons that differ in size, and depend on one another."""
    return (
        drawn(tokens, neurons)
        @ (np.eye(neurons) + 0.3 * drawn(neurons, neurons, seed=1))
        * np.linspace(0.2, 2, neurons)
    )


def test_ridge_leverage() -> None:
    h, ridge = activations(200, 12), 1e-2
    gram = h.T @ h
    absolute = ridge * gram.trace() / 12
    expected = np.diag(gram @ np.linalg.inv(gram + absolute * np.eye(12)))
    np.testing.assert_allclose(ridge_leverage(torch.tensor(gram), ridge).numpy(), expected, rtol=SAME)


def test_nystrom_is_the_regularised_fit_of_the_whole_output() -> None:
    h, down, kept, ridge = activations(200, 12), drawn(5, 12, seed=2), [0, 3, 4, 7, 11], 1e-2
    mine = h[:, kept]
    absolute = ridge * (mine**2).sum() / 5
    # Ridge regression as a plain one, with rows of the root of the ridge below.
    features = np.vstack([mine, np.sqrt(absolute) * np.eye(5)])
    targets = np.vstack([h @ down.T, np.zeros((5, 5))])
    expected = np.linalg.lstsq(features, targets, rcond=None)[0].T
    found = nystrom_down(torch.tensor(h.T @ h), torch.tensor(kept), torch.tensor(down), ridge)
    np.testing.assert_allclose(found.numpy(), expected, rtol=SAME, atol=SAME)


def test_nystrom_without_a_ridge_is_the_papers_pseudo_inverse() -> None:
    h, down, kept = activations(200, 12), drawn(5, 12, seed=2), [1, 2, 5]
    gram = h.T @ h
    select = np.eye(12)[:, kept]
    expected = np.linalg.pinv(select.T @ gram @ select) @ select.T @ gram @ down.T
    found = nystrom_down(torch.tensor(gram), torch.tensor(kept), torch.tensor(down), 1e-14)
    np.testing.assert_allclose(found.numpy().T, expected, rtol=SAME, atol=SAME)


def test_activations_that_are_all_zero_are_no_reason_to_stop() -> None:
    zero = torch.zeros(4, 4)
    assert not ridge_leverage(zero, 1e-4).any()
    assert not nystrom_down(zero, torch.tensor([0, 1]), torch.ones(3, 4), 1e-4).any()


@pytest.mark.parametrize("heads", [2, 4])
def test_pair_scores_are_those_of_the_columns_of_roots_and_no_rotation_changes_them(heads: int) -> None:
    size, groups, tokens = 8, 2, 50
    q, k = drawn(tokens, heads, size), drawn(tokens, groups, size, seed=1)
    angles = drawn(tokens, size // 2, seed=3)

    def turned(x: np.ndarray) -> np.ndarray:
        one, two = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    def root(x: np.ndarray) -> np.ndarray:
        return np.real(sqrtm(x.T @ x))

    expected = np.zeros(size // 2)
    for head in range(heads):
        own = root(turned(q)[:, head]), root(turned(k)[:, head * groups // heads])
        for pair in range(size // 2):
            columns = [pair, pair + size // 2]
            expected[pair] += np.linalg.norm(own[0][:, columns]) * np.linalg.norm(own[1][:, columns])
    found = pair_scores(torch.tensor((q**2).sum(0)), torch.tensor((k**2).sum(0)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=SAME)


@pytest.mark.parametrize("readers", [1, 3])
def test_value_directions_are_the_papers_two_decompositions(readers: int) -> None:
    """C^(1/2) W_V = U S V^T; S V^T W_O = U' S' V'^T; the new ones are C^(-1/2) U U'_r and S'_r V'^T_r."""
    d, size, rank = 10, 6, 4
    x, values, outputs = activations(100, d), drawn(d, size, seed=4), drawn(size, readers * d, seed=5)
    root = np.real(sqrtm(x.T @ x))
    u, s, vt = np.linalg.svd(root @ values, full_matrices=False)
    u2, s2, vt2 = np.linalg.svd(np.diag(s) @ vt @ outputs, full_matrices=False)
    theirs = np.linalg.inv(root) @ u @ u2[:, :rank] @ np.diag(s2[:rank]) @ vt2[:rank]
    made = x @ values
    inward, outward = value_directions(torch.tensor(made.T @ made), torch.tensor(outputs), rank)
    ours = values @ inward.numpy() @ outward.numpy() @ outputs
    np.testing.assert_allclose(ours, theirs, rtol=SAME, atol=SAME * np.abs(theirs).max())
    # No product of that rank is nearer: what is left are the other singular values.
    left = np.linalg.norm(x @ values @ outputs - x @ ours)
    assert left == pytest.approx(np.linalg.norm(s2[rank:]), rel=1e-7)


def test_all_directions_are_the_values_themselves() -> None:
    made = drawn(50, 6)
    inward, outward = value_directions(torch.tensor(made.T @ made), torch.tensor(drawn(6, 9, seed=1)), 6)
    np.testing.assert_allclose((inward @ outward).numpy(), np.eye(6), atol=SAME)


def test_what_the_others_miss_is_the_rise_of_the_best_fits_error() -> None:
    """One neuron goes: the one without which the least-squares fit of the whole output, with the ridge, is nearest to it."""
    h, down, ridge = activations(200, 8), drawn(5, 8, seed=2), 1e-2
    features = np.vstack([h, np.sqrt(ridge * (h**2).sum() / 8) * np.eye(8)])
    wanted = features @ down.T
    errors = []
    for gone in range(8):
        left = np.delete(features, gone, 1)
        errors.append(np.linalg.norm(wanted - left @ np.linalg.lstsq(left, wanted, rcond=None)[0]))
    found = least_missed(torch.tensor(h.T @ h), torch.tensor(down), 7, ridge)
    assert sorted(set(range(8)) - set(found.tolist())) == [int(np.argmin(errors))]


def test_neurons_go_in_rounds_each_judged_by_the_fit_before_it() -> None:
    h, down, ridge = activations(300, 12), drawn(5, 12, seed=2), 1e-6
    rows = np.vstack([h, np.sqrt(ridge * (h**2).sum() / 12) * np.eye(12)])
    wanted, left = rows @ down.T, list(range(12))

    def error(gone: int) -> float:
        own = rows[:, [neuron for neuron in left if neuron != gone]]
        return float(np.linalg.norm(wanted - own @ np.linalg.lstsq(own, wanted, rcond=None)[0]))

    for _ in range(6):  # as many rounds as neurons go: there are fewer than ROUNDS of them
        left.remove(min(left, key=error))
    assert least_missed(torch.tensor(h.T @ h), torch.tensor(down), 6, ridge).tolist() == left
