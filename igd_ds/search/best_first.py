"""Exact top-K search: best first over the trie, until K finished items beat every open prefix.

Letters in shapes: A pairs (a pair is one user at one α), K length of a list, E open edges.
"""

import torch

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
        pair_user: torch.Tensor,
        pair_alpha: torch.Tensor,
        leaves: torch.Tensor,
        scores: torch.Tensor,
        row_positions: int,
    ):
        self.frontier, self.row_positions = frontier, row_positions
        self.pair_user, self.pair_alpha = pair_user, pair_alpha
        self.known_leaves, self.known_scores = leaves, scores
        self.leaves = torch.full_like(leaves, -1)
        self.scores = torch.full_like(scores, -torch.inf)
        num_pairs, device = len(pair_user), pair_user.device
        self.missing_bound = torch.full((num_pairs,), -torch.inf, device=device)

        # The open edges of all pairs. At the start these are the edges to the users' roots.
        self.pair = torch.arange(num_pairs, device=device)
        self.edge = pair_user.clone()
        self.score = torch.zeros(num_pairs, device=device)
        self.bound = torch.full((num_pairs,), torch.inf, device=device)

    def advance(self) -> None:
        """Open all expanded edges, until only unexpanded edges that may still win are left."""
        while True:
            expanded = self.frontier.is_expanded(self.edge)
            if not expanded.any():
                return
            pair, edge, score = self.pair[expanded], self.edge[expanded], self.score[expanded]
            self._keep(~expanded)
            self._open(pair, edge, score)

    def wanted(self) -> torch.Tensor:
        """Return the edges (Q,) to expand next: the PREFIXES_PER_BATCH best-bounded of each pair.

        The best edge of each pair comes first, then the second best of each, and so on.
        """
        sent = self.frontier.positions[self.pair_user[self.pair]]
        self._give_up(sent >= self.row_positions)

        order = self.pair.argsort(stable=True)
        best = best_per_group(
            self.pair[order], self.bound[order], len(self.pair_user), PREFIXES_PER_BATCH
        )
        best = best.T[best.T >= 0]

        # Pairs of one user can want the same edge: its best rank counts.
        edges, index = self.edge[order[best]].unique(return_inverse=True)
        rank = torch.arange(len(best), device=edges.device)
        first = torch.full_like(edges, len(best)).scatter_reduce(0, index, rank, "amin")
        return edges[first.argsort()]

    def open_users(self) -> torch.Tensor:
        """Return the users (ascending) whose search has not ended."""
        return self.pair_user[self.pair].unique()

    def lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best K of the items found and those known before: leaves, scores, (A, K)."""
        again = (self.known_leaves[:, :, None] == self.leaves[:, None, :]).any(2)
        return merge_ranked(
            self.leaves, self.scores, self.known_leaves, self.known_scores.where(~again, -torch.inf)
        )

    def _give_up(self, lost: torch.Tensor) -> None:
        """Drop open edges, bool (E,), of users at the limit; keep the best bound of each pair."""
        self.missing_bound.scatter_reduce_(0, self.pair[lost], self.bound[lost], "amax")
        self._keep(~lost)

    def _keep(self, kept: torch.Tensor) -> None:
        """Keep these open edges, bool (E,), and drop the others."""
        self.pair, self.edge = self.pair[kept], self.edge[kept]
        self.score, self.bound = self.score[kept], self.bound[kept]

    def _open(self, pair: torch.Tensor, edge: torch.Tensor, score: torch.Tensor) -> None:
        """Sort the children of expanded edges (E,) into finished items and open edges."""
        frontier, trie = self.frontier, self.frontier.trie
        index, edge = frontier.children(edge)
        pair, child = pair[index], frontier.node_below(edge)
        weights = frontier.scoring.weights(self.pair_alpha[pair], child)
        score = score[index] + frontier.increments(edge, weights)

        # The bound of a leaf is its score, because its longest item is the leaf itself.
        bound = frontier.per_length(score, trie.longest[child])
        finished = trie.is_leaf(child)
        self._finish(pair[finished], child[finished], bound[finished])

        open_ = ~finished & self._may_win(pair, bound)
        self.pair = torch.cat([self.pair, pair[open_]])
        self.edge = torch.cat([self.edge, edge[open_]])
        self.score = torch.cat([self.score, score[open_]])
        self.bound = torch.cat([self.bound, bound[open_]])
        self._keep(self._may_win(self.pair, self.bound))

    def _finish(self, pair: torch.Tensor, leaf: torch.Tensor, score: torch.Tensor) -> None:
        """Merge finished items (E,) into their pairs' lists."""
        if not len(pair):
            return
        order = pair.argsort(stable=True)
        best = best_per_group(pair[order], score[order], len(self.pair_user), self.leaves.shape[1])
        found, index = best >= 0, order[best.clamp(min=0)]
        new_leaf, new_score = leaf[index].where(found, -1), score[index].where(found, -torch.inf)
        self.leaves, self.scores = merge_ranked(self.leaves, self.scores, new_leaf, new_score)

    def _may_win(self, pair: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
        """Return whether an item under an open prefix can still enter the list, bool (E,).

        Its bound must be as good as the known K-th score and better than the found K-th score.
        """
        return (bound >= self.known_scores[pair, -1]) & (bound > self.scores[pair, -1])
