"""Balanced assignment against scipy's exact one, balanced k-means, and swaps of equal IDs."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from igd_ds.semantic_ids.balanced import (
    balanced_assignment,
    balanced_codes,
    balanced_kmeans,
    swap_equal_ids,
)


def least_cost(cost, capacity):
    """Return the least total cost, with each code written `capacity` times."""
    rows, places = linear_sum_assignment(np.repeat(cost, capacity, axis=1))
    return np.repeat(cost, capacity, axis=1)[rows, places].sum()


def total(cost, codes):
    return cost[np.arange(len(cost)), codes].sum()


@pytest.mark.parametrize(
    ("num_rows", "num_codes"), [(60, 8), (50, 7), (13, 5), (40, 40), (300, 10), (2, 2)]
)
def test_assignment_is_as_good_as_it_promises(num_rows, num_codes):
    random = np.random.default_rng(num_rows)
    cost = random.random((num_rows, num_codes))
    cost[:, :2] *= 0.2  # everyone wants two codes
    capacity = -(-num_rows // num_codes)

    found = balanced_assignment(cost, capacity)
    assert np.bincount(found.codes, minlength=num_codes).max() <= capacity
    bound = num_codes * capacity * found.epsilon
    assert total(cost, found.codes) <= least_cost(cost, capacity) + bound
    # At the final prices every row has its best code, but for epsilon.
    net = cost + found.prices
    assert (net[np.arange(num_rows), found.codes] <= net.min(1) + found.epsilon * (1 + 1e-9)).all()

    np.testing.assert_array_equal(found.codes, balanced_assignment(cost, capacity).codes)


def test_assignment_of_equal_costs_and_of_equal_rows():
    codes = balanced_assignment(np.zeros((50, 7)), 8).codes
    assert np.bincount(codes, minlength=7).max() <= 8
    cost = np.tile([0.0, 1.0, 3.0], (9, 1))  # three rows have to go to each code
    assert np.bincount(balanced_assignment(cost, 3).codes).tolist() == [3, 3, 3]
    # Scarce codes go to the rows that would lose most.
    cost = np.array([[0.0, 5.0], [1.0, 2.0], [0.0, 9.0], [0.0, 9.0]])
    assert balanced_assignment(cost, capacity=2).codes.tolist() == [1, 1, 0, 0]
    # Large costs, as of embeddings that were not scaled.
    np.testing.assert_array_equal(balanced_assignment(cost * 1e6, 2).codes, [1, 1, 0, 0])


def test_balanced_kmeans_lowers_the_error_and_keeps_the_capacity():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 5
    sizes = torch.tensor([200, 20, 20, 20, 20, 20])
    rows = centres.repeat_interleave(sizes, 0)
    rows = rows + 0.3 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)

    first = balanced_codes(rows, centres)
    centroids, codes = balanced_kmeans(rows, centres)
    for found in (first, codes):
        assert found.bincount(minlength=6).max() <= 50
    error = (rows - centroids[codes]).square().sum()
    assert error < 0.8 * (rows - centres[first]).square().sum()
    means = torch.stack([rows[codes == code].mean(0) for code in range(6)])
    torch.testing.assert_close(centroids, means)


def test_swaps_are_the_cheapest_and_keep_the_counts():
    random = np.random.default_rng(1)
    codes = np.stack([random.integers(0, 10, 60), random.integers(0, 20, 60)], axis=1)
    cost = random.random((60, 20)).astype(np.float32)
    swapped = swap_equal_ids(codes, cost)

    assert len(np.unique(codes, axis=0)) < 55 and len(np.unique(swapped, axis=0)) == 60
    np.testing.assert_array_equal(swapped[:, 0], codes[:, 0])
    np.testing.assert_array_equal(
        np.bincount(swapped[:, 1], minlength=20), np.bincount(codes[:, 1], minlength=20)
    )

    # One pair is equal. Of the swaps that leave no equal IDs, brute force finds the same one.
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 2], [2, 2], [2, 3]])
    cost = random.random((7, 4))
    found = swap_equal_ids(codes, cost)
    best = None
    for other in range(7):
        trial = codes.copy()
        trial[[1, other], 1] = trial[[other, 1], 1]
        if len(np.unique(trial, axis=0)) == 7 and (
            best is None or total(cost, trial[:, 1]) < total(cost, best[:, 1])
        ):
            best = trial
    np.testing.assert_array_equal(found, best)

    # A full prefix has no free ID, and other prefixes do not exist: nothing can be done.
    full = np.array([[0, 0], [0, 1], [0, 1]])
    np.testing.assert_array_equal(swap_equal_ids(full, random.random((3, 2))), full)
