"""Codes that hold equally many items: assignment with capacities, and k-means by it.

The assignment is a transportation problem: every row takes one code, every code takes at most C
rows, and the sum of the costs is to be small. It is solved by an auction (Bertsekas and Castañon
1989, The auction algorithm for the transportation problem). Rows bid for their best code, and a
code keeps the C highest bids. A row bids so much that the code is then as good for it as its second
choice, and ε more. When every row holds a code, each row's code is its best one at the final prices
but for ε, so the sum is within (number of rows)·ε of the least possible.

Exact solvers do not suit our sizes: scipy's linear_sum_assignment needs a matrix of n² costs, and a
min-cost flow (k-means-constrained) a network of n·K arcs. The auction needs the n·K costs alone.
For 100,000 rows and 256 codes it takes about 10 seconds on a CPU.

Letters in shapes: n rows, K codes, C capacity of a code, d width of a row, L levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.semantic_ids.kmeans import CHUNK, squared_distances, sums_and_counts

TOLERANCE = 0.01
"""Final ε, in mean differences between a row's two lowest costs. On clustered random rows the sum
of the costs was then within 1e-4 of the optimum."""
EPSILON_STEP = 5.0
"""ε begins at the mean range of a row's costs and is divided by this (Bertsekas: 4 to 10)."""
ITERATIONS = 10
"""Of balanced k-means, at most. It starts from centroids that k-means found (assumed)."""
LEAST_GAIN = 1e-3
"""Balanced k-means stops when the squared error falls by a smaller share (assumed)."""


@dataclass(frozen=True)
class Assignment:
    """Rows given to codes with capacities."""

    codes: np.ndarray
    """int64 (n,)."""
    prices: np.ndarray
    """float64 (K,), in units of the costs: what the scarcity of each code adds to its cost."""
    epsilon: float
    """codes[i] minimises cost[i] + prices but for at most this."""


def balanced_assignment(cost: np.ndarray, capacity: int) -> Assignment:
    """Give every row a code at low cost, so that no code has more than `capacity` rows.

    The result is a function of the arguments alone: nothing is drawn at random.

    Args:
        cost: (n, K) float, the cost of each code for each row. n must be at most K·C.
        capacity: C.

    Returns:
        An assignment whose total cost is within K·C·epsilon of the least possible.

    Example:
        >>> cost = np.array([[0.0, 5.0], [1.0, 2.0], [0.0, 9.0], [0.0, 9.0]])
        >>> balanced_assignment(cost, capacity=2).codes.tolist()
        [1, 1, 0, 0]
    """
    num_rows, num_codes = cost.shape
    assert num_rows <= num_codes * capacity, "more rows than the codes have room for"

    # Rows without cost fill the places that stay free. With as many rows as places the bound above
    # holds whatever the prices are that an auction begins with.
    free = np.zeros((num_codes * capacity - num_rows, num_codes), cost.dtype)
    final, epsilon = _epsilons(cost)
    cost = np.concatenate([cost, free])

    # Large steps find rough prices soon, and small ones then need few bids. Prices of a similar
    # problem do not help: to correct them in small steps takes longer than to begin again.
    prices = np.zeros(num_codes)
    while True:
        epsilon = max(epsilon, final)
        codes = _auction(cost, capacity, prices, epsilon)
        if epsilon == final:
            return Assignment(codes[:num_rows], prices, epsilon)
        epsilon /= EPSILON_STEP


def _epsilons(cost: np.ndarray) -> tuple[float, float]:
    """Return the final ε and the first one. Both are above 0, also for costs that are all equal."""
    gaps, ranges = 0.0, 0.0
    for start in range(0, len(cost), CHUNK):
        part = cost[start : start + CHUNK].astype(np.float64)
        two = np.partition(part, 1, axis=1)[:, :2]
        gaps += float((two[:, 1] - two[:, 0]).sum())
        ranges += float((part.max(1) - two[:, 0]).sum())

    first = ranges / len(cost) or 1.0
    return max(TOLERANCE * gaps / len(cost), 1e-6 * first), first


def _auction(cost: np.ndarray, capacity: int, prices: np.ndarray, epsilon: float) -> np.ndarray:
    """Run one auction with a fixed ε, and return the code int64 of each row.

    Args:
        cost: (K·C, K), as many rows as places.
        capacity: C.
        prices: (K,), changed in place. A full code costs its lowest bid.
        epsilon: what a bid adds beyond the second choice.
    """
    num_codes = cost.shape[1]
    rows_of = [np.empty(0, np.int64) for _ in range(num_codes)]
    bids_of = [np.empty(0) for _ in range(num_codes)]
    bidders = np.arange(len(cost))

    while len(bidders):
        wanted, bids = _bid(cost, prices, bidders, epsilon)

        # Codes sort their bids, one after the other, and turn the lowest away.
        by_code = np.argsort(wanted, kind="stable")
        codes, begin = np.unique(wanted[by_code], return_index=True)
        outbid = []
        for code, group in zip(codes, np.split(by_code, begin[1:]), strict=True):
            rows = np.concatenate([rows_of[code], bidders[group]])
            offers = np.concatenate([bids_of[code], bids[group]])
            if len(rows) > capacity:
                order = np.argsort(-offers, kind="stable")
                outbid.append(rows[order[capacity:]])
                rows, offers = rows[order[:capacity]], offers[order[:capacity]]
            rows_of[code], bids_of[code] = rows, offers
            if len(rows) == capacity:
                prices[code] = offers.min()
        bidders = np.concatenate(outbid) if outbid else bidders[:0]

    assigned = np.empty(len(cost), np.int64)
    for code, rows in enumerate(rows_of):
        assigned[rows] = code
    return assigned


def _bid(
    cost: np.ndarray, prices: np.ndarray, bidders: np.ndarray, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return each bidder's best code at the present prices, and its bid in units of the costs."""
    wanted = np.empty(len(bidders), np.int64)
    bids = np.empty(len(bidders))
    for start in range(0, len(bidders), CHUNK):
        part = slice(start, start + CHUNK)
        total = cost[bidders[part]] + prices
        every = np.arange(len(total))
        best = total.argmin(1)

        lowest = total[every, best]
        total[every, best] = math.inf
        wanted[part] = best
        bids[part] = prices[best] + (total.min(1) - lowest) + epsilon
    return wanted, bids


def costs(rows: torch.Tensor, book: torch.Tensor) -> np.ndarray:
    """Return the squared distances (n, K) from rows (n, d) to codewords (K, d), as float32.

    The distance to the nearest codeword is subtracted in each row: it does not change which
    assignment is best, and small numbers keep their digits.
    """
    distances = torch.cat([squared_distances(part, book) for part in rows.split(CHUNK)])
    return (distances - distances.amin(1, keepdim=True)).cpu().numpy()


def balanced_codes(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return the codes int64 (n,) of rows (n, d); each codeword of (K, d) has at most ⌈n/K⌉."""
    codes = balanced_assignment(costs(rows, book), capacity_of(len(rows), len(book))).codes
    return torch.from_numpy(codes).to(rows.device)


def capacity_of(num_rows: int, num_codes: int) -> int:
    """Return ⌈n/K⌉, the most rows that a code may have."""
    return -(-num_rows // num_codes)


def balanced_kmeans(
    rows: torch.Tensor, centroids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move centroids so that the squared error of a balanced assignment falls.

    Assignments and means alternate, as in k-means. Each lowers the squared error, except for what
    the ε of the auction allows.

    Args:
        rows: (n, d), n >= K.
        centroids: (K, d), to begin with.

    Returns:
        The centroids (K, d), and the codes int64 (n,) of the rows: at most ⌈n/K⌉ have the same.
    """
    error = math.inf
    for _ in range(ITERATIONS):
        codes = balanced_codes(rows, centroids)

        # A code may have no row if n is below K·C; its centroid stays.
        sums, counts = sums_and_counts(rows, codes, len(centroids))
        means = sums / counts.clamp_min(1)[:, None]
        centroids = torch.where(counts[:, None] > 0, means, centroids)

        before, error = error, float((rows - centroids[codes]).square().sum())
        if error >= (1 - LEAST_GAIN) * before:
            break
    return centroids, codes


def swap_equal_ids(codes: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Return codes in which items with equal IDs have swapped their last code with other items.

    A swap leaves the number of items of every code as it is. Of the swaps after which both items
    have an ID of their own, the cheapest is made. An item for which there is none keeps its ID.

    Args:
        codes: integers (n, L).
        cost: (n, K), the cost of each last code for each item.
    """
    last = codes[:, -1].copy()
    prefix = np.unique(codes[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
    num_codes, every = cost.shape[1], np.arange(len(codes))
    own = cost[every, last]

    _, first = np.unique(prefix * num_codes + last, return_index=True)
    for item in np.setdiff1d(every, first):
        # An earlier swap may have moved the other item of the group.
        if ((prefix == prefix[item]) & (last == last[item])).sum() == 1:
            continue
        taken = np.zeros(num_codes, bool)
        taken[last[prefix == prefix[item]]] = True
        has_code = np.zeros(prefix.max() + 1, bool)
        has_code[prefix[last == last[item]]] = True

        added = cost[item, last] - own[item] + cost[:, last[item]] - own
        added[taken[last] | has_code[prefix]] = math.inf
        other = int(added.argmin())
        if math.isinf(added[other]):
            continue
        last[[item, other]] = last[[other, item]]
        own[[item, other]] = cost[[item, other], last[[item, other]]]

    return np.concatenate([codes[:, :-1], last[:, None]], axis=1)
