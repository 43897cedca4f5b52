"""Exact search: best first over the trie, until finished items beat every open prefix.

Letters in shapes: A pairs (a pair is one user at one α), K length of a list, E open edges.
"""

from dataclasses import dataclass

import numpy as np

from igd_ds.config.search import Limits
from igd_ds.search.frontier import Frontier
from igd_ds.search.ranking import best_per_group, merge_ranked

# Open prefixes of one pair that go into a batch of expansions (measured: docs/search.md).
PREFIXES_PER_BATCH = 16

# Where masses tell what a proof needs, prefixes with a little less mass are read at once too: at
# 0.5 a search takes half of the passes, and hardly more positions (measured: docs/search.md).
EARLY = 0.5


class BestFirst:
    """The provably best K items of A pairs.

    No increment of a score is positive: w_d·log p ≤ 0, and so are prior and guidance. So no item
    under an open prefix can score above S / longest^p, for every p ≥ 0. A pair is done when its
    K-th finished item is at least as good as the best such bound. Scores are computed as in the
    beam search, with the same fp32 sums in the same order, so they are equal to the bit.

    **Probabilities.** Where scores are log-probabilities (`Frontier.is_probability`), an open
    prefix holds the probabilities of all items under it, its *mass*. Let t be the K-th largest of
    {mass / j : open prefixes, j = 1 … K} and the found items' probabilities. K items above t would
    need more mass than there is, so the K-th best item has at most t, and a prefix with more than t
    must be read for the proof, whatever else is read. If only such prefixes were read, no order of
    reading would prove the list with fewer. Those with more than EARLY · t are read too.

    Args:
        frontier: the batch's frontier. Nodes that another search has expanded cost nothing here.
        pair_user: int64 (A,), the user of each pair.
        pair_alpha: float32 (A,), the α of each pair.
        leaves, scores: (A, K), lists that are known already (those of the beam search); −1 and −inf
            where there is none. Their K-th score is the first bound.
        limits: `row_positions` is the most tokens per user, in this search and before it. When a
            user has sent that many, the search sends no more for the user and returns the ranks
            proven so far. (The last batch of expansions may exceed the limit.) A list that has free
            places is filled first, from the K best prefixes. The search also ends when the list's
            probabilities add up to `coverage`.

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
        limits: Limits,
    ):
        self.frontier, self.limits = frontier, limits
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
        """Return the edges (Q,) to expand next.

        These are the edges of each pair that a proof needs in any case, where masses tell, else the
        PREFIXES_PER_BATCH best-bounded ones. The best edge of each pair comes first, then the
        second best of each, and so on.
        """
        self._narrow_at_limit()
        by_mass = self.frontier.is_probability
        if by_mass and self.limits.coverage < 1:
            covered = np.exp(self.scores.astype(np.float64)).sum(1) >= self.limits.coverage
            self._give_up(covered[self.pair])

        order = self.pair.argsort(kind="stable")
        width = self._places() if by_mass else PREFIXES_PER_BATCH
        best = best_per_group(self.pair[order], self.bound[order], len(self.pair_user), width)
        wanted = best >= 0
        if by_mass and len(order):
            score = np.where(wanted, self.score[order[best]], -np.inf)
            wanted &= score >= self._highest_possible(score)[:, None] + np.log(EARLY)
        best = best.T[wanted.T]

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

    def _places(self) -> int:
        """Return how many places of the lists are to be proven."""
        places: int = self.leaves.shape[1]
        return places

    def _highest_possible(self, mass: np.ndarray) -> np.ndarray:
        """Return the log of t, which the last of the places cannot exceed, float32 (A,).

        Args:
            mass: float32 (A, places), the best open prefixes of each pair, in log; −inf: no more.
        """
        places = mass.shape[1]
        parts = mass[:, :, None] - np.log(np.arange(1, places + 1, dtype=np.float32))
        possible = np.concatenate([parts.reshape(len(mass), -1), self.scores[:, :places]], axis=1)
        highest: np.ndarray = -np.partition(-possible, places - 1, axis=1)[:, places - 1]
        return highest

    def _narrow_at_limit(self) -> None:
        """Drop the open edges of users at the limit, but for the K best if a list has free places.

        Each prefix leads to an item, so K of them fill the list.
        """
        at_limit = self.frontier.positions[self.pair_user[self.pair]] >= self.limits.row_positions
        if not at_limit.any():
            return
        order = self.pair.argsort(kind="stable")
        best = best_per_group(
            self.pair[order], self.bound[order], len(self.pair_user), self.leaves.shape[1]
        )
        best = best[self._has_free_places()]
        at_limit[order[best[best >= 0]]] = False
        self._give_up(at_limit)

    def _has_free_places(self) -> np.ndarray:
        """Return whether no other search has a list and this one's is not full, bool (A,)."""
        free: np.ndarray = (self.known_leaves[:, 0] < 0) & (self.leaves[:, -1] < 0)
        return free

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

        # Where a leaf is found, the bound is its score: no other item is under the edge.
        bound = frontier.per_length(score, frontier.longest[child])
        leaf = frontier.found_leaf(child)
        finished = leaf > 0
        self._finish(pair[finished], leaf[finished], bound[finished])

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
        limits: see BestFirst; then the stream ends with what is proven.
    """

    def __init__(self, frontier: Frontier, alpha: float, limits: Limits):
        self.taken = 0
        leaves, scores = np.full((1, 1), -1), np.full((1, 1), -np.inf, np.float32)
        pair_alpha = np.array([alpha], np.float32)
        super().__init__(frontier, np.zeros(1, np.int64), pair_alpha, leaves, scores, limits)

    def take_proven(self) -> list[ProvenLeaf]:
        """Take the leaves out of the list that are proven by now; best first."""
        open_bound = max(self.bound.max(initial=-np.inf), self.missing_bound[0])
        scores = self.scores[0]
        count = int(np.count_nonzero((self.leaves[0] >= 0) & (scores >= open_bound)))
        bounds = np.maximum(scores[1 : count + 1], open_bound)
        proven = [
            ProvenLeaf(int(leaf), float(score), float(bound))
            for leaf, score, bound in zip(self.leaves[0, :count], scores, bounds, strict=False)
        ]
        self.leaves, self.scores = self.leaves[:, count:], self.scores[:, count:]
        self.taken += count
        return proven

    def _places(self) -> int:
        """Return how many places behind those taken are to be proven.

        These are the ones that are proven already, then as many as have been taken, and one.
        """
        proven = int(np.count_nonzero(self.scores[0] >= self.bound.max(initial=-np.inf)))
        return proven + self.taken + 1

    def _has_free_places(self) -> np.ndarray:
        """Return False: at the limit the stream ends."""
        return np.zeros(1, bool)

    def _finish(self, pair: np.ndarray, leaf: np.ndarray, score: np.ndarray) -> None:
        """Merge finished items (E,) into the list; at least its last place stays free."""
        room = (0, 0), (0, len(pair))
        self.leaves = np.pad(self.leaves, room, constant_values=-1)
        self.scores = np.pad(self.scores, room, constant_values=-np.inf)
        super()._finish(pair, leaf, score)
