"""Exact search: best first over the trie, until finished items beat every open prefix.

Letters in shapes: A pairs (a pair is one user at one α), K length of a list, E open edges.
"""

from dataclasses import dataclass

import numpy as np

from igd_ds.search.frontier import Frontier
from igd_ds.search.ranking import best_per_group, merge_ranked

# Open prefixes of one pair that go into a batch of expansions (measured: docs/search.md).
PREFIXES_PER_BATCH = 16


class BestFirst:
    """The provably best K items of A pairs.

    No increment of a score is positive: w_d·log p ≤ 0, and so are prior and guidance. So no item
    under an open prefix can score above S / longest^p, for every p ≥ 0. A pair is done when its
    K-th finished item is at least as good as the best such bound. Scores are computed as in the
    beam search, with the same fp32 sums in the same order, so they are equal to the bit.

    Args:
        frontier: the batch's frontier. Nodes that another search has expanded cost nothing here.
        pair_user: int64 (A,), the user of each pair.
        pair_alpha: float32 (A,), the α of each pair.
        leaves, scores: (A, K), lists that are known already (those of the beam search); −1 and −inf
            where there is none. Their K-th score is the first bound.
        row_positions: most tokens per user, in this search and before it. When a user has sent that
            many, the search sends no more for the user and returns the ranks proven so far. (The
            last batch of expansions may exceed the limit.)

    Attributes:
        leaves, scores: int64 and float32 (A, K), the best items found so far; −1 and −inf where
            there is none.
        missing_bound: float32 (A,), valid once the search has ended: no item outside `lists` scores
            above it. −inf where the list is proven.
    """

    def __init__(
        self,
        frontier: Frontier,
        pair_user: np.ndarray,
        pair_alpha: np.ndarray,
        leaves: np.ndarray,
        scores: np.ndarray,
        row_positions: int,
    ):
        self.frontier, self.row_positions = frontier, row_positions
        self.pair_user, self.pair_alpha = pair_user, pair_alpha
        self.known_leaves, self.known_scores = leaves, scores
        self.leaves = np.full_like(leaves, -1)
        self.scores = np.full_like(scores, -np.inf)
        num_pairs = len(pair_user)
        self.missing_bound = np.full(num_pairs, -np.inf, np.float32)

        # The open edges of all pairs. At the start these are the edges to the users' roots.
        self.pair = np.arange(num_pairs)
        self.edge = pair_user.copy()
        self.score = np.zeros(num_pairs, np.float32)
        self.bound = np.full(num_pairs, np.inf, np.float32)

    def advance(self) -> None:
        """Open all expanded edges, until only unexpanded edges that may still win are left."""
        while True:
            expanded = self.frontier.is_expanded(self.edge)
            if not expanded.any():
                return
            pair, edge, score = self.pair[expanded], self.edge[expanded], self.score[expanded]
            self._keep(~expanded)
            self._open(pair, edge, score)

    def wanted(self) -> np.ndarray:
        """Return the edges (Q,) to expand next: the PREFIXES_PER_BATCH best-bounded of each pair.

        The best edge of each pair comes first, then the second best of each, and so on.
        """
        sent = self.frontier.positions[self.pair_user[self.pair]]
        self._give_up(sent >= self.row_positions)

        order = self.pair.argsort(kind="stable")
        best = best_per_group(
            self.pair[order], self.bound[order], len(self.pair_user), PREFIXES_PER_BATCH
        )
        best = best.T[best.T >= 0]

        # Pairs of one user can want the same edge: its best rank counts.
        edges = self.edge[order[best]]
        _, first = np.unique(edges, return_index=True)
        return edges[np.sort(first)]

    def open_users(self) -> np.ndarray:
        """Return the users (ascending) whose search has not ended."""
        return np.unique(self.pair_user[self.pair])

    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the best K of the items found and those known before: leaves, scores, (A, K)."""
        again = (self.known_leaves[:, :, None] == self.leaves[:, None, :]).any(2)
        known_scores = np.where(again, -np.inf, self.known_scores)
        return merge_ranked(self.leaves, self.scores, self.known_leaves, known_scores)

    def _give_up(self, lost: np.ndarray) -> None:
        """Drop open edges, bool (E,), of users at the limit; keep the best bound of each pair."""
        np.maximum.at(self.missing_bound, self.pair[lost], self.bound[lost])
        self._keep(~lost)

    def _keep(self, kept: np.ndarray) -> None:
        """Keep these open edges, bool (E,), and drop the others."""
        self.pair, self.edge = self.pair[kept], self.edge[kept]
        self.score, self.bound = self.score[kept], self.bound[kept]

    def _open(self, pair: np.ndarray, edge: np.ndarray, score: np.ndarray) -> None:
        """Sort the children of expanded edges (E,) into finished items and open edges."""
        frontier = self.frontier
        index, edge = frontier.children(edge)
        pair, child = pair[index], frontier.child.values[edge]
        weights = frontier.scoring.weights(self.pair_alpha[pair], child)
        score = score[index] + frontier.increments(edge, weights)

        # The bound of a leaf is its score, because its longest item is the leaf itself.
        bound = frontier.per_length(score, frontier.longest[child])
        finished = frontier.is_leaf(child)
        self._finish(pair[finished], child[finished], bound[finished])

        open_ = ~finished & self._may_win(pair, bound)
        self.pair = np.concatenate([self.pair, pair[open_]])
        self.edge = np.concatenate([self.edge, edge[open_]])
        self.score = np.concatenate([self.score, score[open_]])
        self.bound = np.concatenate([self.bound, bound[open_]])
        self._keep(self._may_win(self.pair, self.bound))

    def _finish(self, pair: np.ndarray, leaf: np.ndarray, score: np.ndarray) -> None:
        """Merge finished items (E,) into their pairs' lists."""
        if not len(pair):
            return
        order = pair.argsort(kind="stable")
        best = best_per_group(pair[order], score[order], len(self.pair_user), self.leaves.shape[1])
        found, index = best >= 0, order[np.maximum(best, 0)]
        new_score = np.where(found, score[index], -np.inf)
        self.leaves, self.scores = merge_ranked(self.leaves, self.scores, leaf[index], new_score)

    def _may_win(self, pair: np.ndarray, bound: np.ndarray) -> np.ndarray:
        """Return whether an item under an open prefix can still enter the list, bool (E,).

        Its bound must be as good as the known K-th score and better than the found K-th score.
        """
        return (bound >= self.known_scores[pair, -1]) & (bound > self.scores[pair, -1])


@dataclass(frozen=True)
class ProvenLeaf:
    """The next best leaf of a user."""

    leaf: int
    """A leaf of the trie."""
    score: float
    """S / n^p in nats for n tokens with EOS."""
    bound: float
    """No leaf that follows scores above it; −inf if none follows."""


class BestFirstStream(BestFirst):
    """All leaves of one user at one α, in the order of their scores.

    A leaf is proven as soon as it scores at least as well as the best open prefix is bounded. No
    list ever fills up, so no prefix is dropped.

    Args:
        frontier: the frontier of one user.
        alpha: α.
        row_positions: see BestFirst; then the stream ends with what is proven.
    """

    def __init__(self, frontier: Frontier, alpha: float, row_positions: int):
        leaves, scores = np.full((1, 1), -1), np.full((1, 1), -np.inf, np.float32)
        pair_alpha = np.array([alpha], np.float32)
        super().__init__(frontier, np.zeros(1, np.int64), pair_alpha, leaves, scores, row_positions)

    def take_proven(self) -> list[ProvenLeaf]:
        """Take the leaves out of the list that are proven by now; best first."""
        open_bound = max(self.bound.max(initial=-np.inf), self.missing_bound[0])
        scores = self.scores[0]
        count = np.count_nonzero((self.leaves[0] >= 0) & (scores >= open_bound))
        bounds = np.maximum(scores[1 : count + 1], open_bound)
        proven = [
            ProvenLeaf(int(leaf), float(score), float(bound))
            for leaf, score, bound in zip(self.leaves[0, :count], scores, bounds, strict=False)
        ]
        self.leaves, self.scores = self.leaves[:, count:], self.scores[:, count:]
        return proven

    def _finish(self, pair: np.ndarray, leaf: np.ndarray, score: np.ndarray) -> None:
        """Merge finished items (E,) into the list; at least its last place stays free."""
        room = (0, 0), (0, len(pair))
        self.leaves = np.pad(self.leaves, room, constant_values=-1)
        self.scores = np.pad(self.scores, room, constant_values=-np.inf)
        super()._finish(pair, leaf, score)
