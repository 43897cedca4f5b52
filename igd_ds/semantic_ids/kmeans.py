"""k-means: codewords for rows, nearest codes, and residuals level by level.

Letters in shapes: n rows, d width of a row, K codewords, L levels.
"""

from __future__ import annotations

import torch
from torch.nn import functional

CHUNK = 16_384  # rows that pass through memory at a time (assumed)
ITERATIONS = 50  # an upper bound; k-means stops when no row changes its code


def kmeans(rows: torch.Tensor, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """Return the centroids (K, d) of rows (n, d), by Lloyd's algorithm from a k-means++ start.

    A cluster that runs empty takes the row that lies farthest from its centroid. If there are fewer
    different rows than codes, some centroids coincide and stay unused.
    """
    centroids = _plus_plus(rows, num_codes, generator)
    codes = None
    for _ in range(ITERATIONS):
        before, codes = codes, nearest(rows, centroids)
        if before is not None and torch.equal(before, codes):
            break

        sums, counts = sums_and_counts(rows, codes, num_codes)
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            distance = (rows - centroids[codes]).square().sum(1)
            farthest = distance.argsort(descending=True, stable=True)
            sums[empty] = rows[farthest[: len(empty)]]
        centroids = sums / counts.clamp_min(1)[:, None]
    return centroids


def sums_and_counts(
    rows: torch.Tensor, codes: torch.Tensor, num_codes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum (K, d) and the number (K,) of the rows (n, d) that have each code.

    A product with the one-hot codes sums in the same order on every device; scattered additions on
    a GPU would not.
    """
    sums = rows.new_zeros(num_codes, rows.shape[1])
    counts = torch.zeros(num_codes, device=rows.device)
    for part, code in zip(rows.split(CHUNK), codes.split(CHUNK), strict=True):
        chosen = functional.one_hot(code, num_codes).to(rows.dtype)
        sums += chosen.T @ part
        counts += chosen.sum(0)
    return sums, counts


def _plus_plus(rows: torch.Tensor, num_codes: int, generator: torch.Generator) -> torch.Tensor:
    """Return the first centroids (K, d) for k-means (k-means++, Arthur and Vassilvitskii 2007).

    Each is a row, drawn with a probability proportional to its squared distance to the nearest of
    the centroids before.
    """
    norms = rows.square().sum(1)
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    distance = torch.full_like(norms, torch.inf)
    while len(chosen) < num_codes:
        latest = rows[chosen[-1]]
        to_latest = (norms - 2 * (rows @ latest) + latest.square().sum()).clamp_min(0)
        distance = torch.minimum(distance, to_latest)
        distance[chosen[-1]] = 0

        cumulative = distance.cumsum(0, dtype=torch.float64)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(rows.device)
        at = int(torch.searchsorted(cumulative, drawn * cumulative[-1], right=True))
        chosen.append(min(at, len(rows) - 1))
    return rows[chosen]


def nearest(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return the index int64 (n,) of the codeword nearest to each row; of equals the lowest index.

    Args:
        rows: (n, d).
        book: (K, d), the codewords.
    """
    return torch.cat([squared_distances(part, book).argmin(1) for part in rows.split(CHUNK)])


def nearest_residual(rows: torch.Tensor, codebooks: torch.Tensor) -> torch.Tensor:
    """Return the codes int64 (n, L) of rows (n, d) under codebooks (L, K, d).

    Each level's code is the codeword nearest to the residual of the levels before.
    """
    codes = []
    for book in codebooks:
        codes.append(nearest(rows, book))
        rows = rows - book[codes[-1]]
    return torch.stack(codes, 1)


def squared_distances(rows: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return |r − e|² − |r|², (n, K). The missing |r|² is the same for all codes of a row."""
    return torch.addmm(book.square().sum(1), rows, book.T, alpha=-2)
