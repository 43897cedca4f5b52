"""Exact top-K search: best-first over the trie until K finished items beat every open prefix, which is a proof.

Letters in shapes: A lanes (a user at one α), K list length, E open edges.
"""

import torch

from igd_ds.search.beam import best_per_lane, merge_ranked
from igd_ds.search.frontier import ExpandedTree

WAVE = 16  # open prefixes that one lane sends into a pass (measured: docs/search.md)


class BestFirst:
    """The provably best K items of A lanes.

    No increment is positive: w_d·log p ≤ 0, and so are prior and guidance. So no item under an open prefix can score above
    S / longest^p, for every p ≥ 0, and a lane is done when its K-th finished item is at least as good as the best such bound.
    Scores are the ones the beam search computes, bit for bit: the same fp32 sums in the same order.

    Args:
        expanded: the batch's ExpandedTree; what another search has expanded costs nothing here.
        lane_user, lane_alpha: (A,) int64 and float32.
        leaves, scores: (A, K) lists that are known already (the beam's); their K-th score is the first bound. −1 and −inf: none.
        row_positions: a user who has sent this many positions through the model, in this search and before it (a last wave may
            go over), gets no more; what is proven by then is told.

    Attributes:
        leaves, scores: (A, K) int64 and float32, the best items found so far; −1 and −inf where there is none.
        missing_bound: (A,) float32, once the search is over: no item outside `lists` scores above it; −inf: the lists are proven.
    """

    def __init__(
        self, expanded: ExpandedTree, lane_user, lane_alpha, leaves, scores, row_positions: int
    ):
        self.expanded, self.lane_user, self.lane_alpha = expanded, lane_user, lane_alpha
        self.row_positions = row_positions
        self.known_leaves, self.known_scores = leaves, scores
        self.leaves, self.scores = torch.full_like(leaves, -1), torch.full_like(scores, -torch.inf)
        num_lanes = len(lane_user)
        self.lane = torch.arange(num_lanes, device=lane_user.device)  # of each open edge
        self.edge = lane_user.clone()
        self.score = torch.zeros(num_lanes, device=lane_user.device)
        self.bound = torch.full((num_lanes,), torch.inf, device=lane_user.device)
        self.missing_bound = torch.full((num_lanes,), -torch.inf, device=lane_user.device)

    def advance(self) -> None:
        """Open what is expanded already, until nothing but unexpanded edges that may still win is left."""
        while True:
            expanded = self.expanded.row.values[self.edge] >= 0
            if not expanded.any():
                return
            lane, edge, score = self.lane[expanded], self.edge[expanded], self.score[expanded]
            self._keep(~expanded)
            self._open(lane, edge, score)

    def wanted(self) -> torch.Tensor:
        """Return the edges (Q,) to expand next: the WAVE best-bounded ones of each lane, all lanes' first ones first."""
        self._give_up(self.expanded.positions[self.lane_user[self.lane]] >= self.row_positions)
        order = self.lane.argsort(stable=True)
        best = best_per_lane(self.lane[order], self.bound[order], len(self.lane_user), WAVE)
        best = best.T[best.T >= 0]
        edges, index = self.edge[order[best]].unique(return_inverse=True)
        place = torch.arange(len(best), device=edges.device)
        first = torch.full_like(edges, len(best)).scatter_reduce(0, index, place, "amin")
        return edges[first.argsort()]

    def open_users(self) -> torch.Tensor:
        """Return the users (ascending) that still search."""
        return self.lane_user[self.lane].unique()

    def _give_up(self, lost) -> None:
        """Drop open edges (bool (E,)) for want of positions, and remember what they could have led to."""
        self.missing_bound.scatter_reduce_(0, self.lane[lost], self.bound[lost], "amax")
        self._keep(~lost)

    def _keep(self, kept) -> None:
        self.lane, self.edge, self.score, self.bound = (
            t[kept] for t in (self.lane, self.edge, self.score, self.bound)
        )

    def _open(self, lane, edge, score) -> None:
        """Put the children of expanded edges (E,) among the finished items or the open edges."""
        expanded, trie, scoring = self.expanded, self.expanded.trie, self.expanded.scoring
        row, edge = expanded.children(expanded.row.values[edge].long())
        lane, child = lane[row], expanded.child.values[edge].long()
        score = score[row] + expanded.increments(
            edge, scoring.weights(self.lane_alpha[lane], child)
        )
        bound = expanded.per_length(score, trie.longest[child])
        finished = trie.is_leaf(child)
        self._finish(
            lane[finished], child[finished], bound[finished]
        )  # of a leaf, `longest` is its depth
        open_ = ~finished & self._may_win(lane, bound)
        self.lane = torch.cat([self.lane, lane[open_]])
        self.edge = torch.cat([self.edge, edge[open_]])
        self.score = torch.cat([self.score, score[open_]])
        self.bound = torch.cat([self.bound, bound[open_]])
        self._keep(self._may_win(self.lane, self.bound))

    def _finish(self, lane, leaf, score) -> None:
        """Put finished items (E,) into their lanes' lists."""
        if not len(lane):
            return
        order = lane.argsort(stable=True)
        best = best_per_lane(lane[order], score[order], len(self.lane_user), self.leaves.shape[1])
        found, index = best >= 0, order[best.clamp(min=0)]
        new_leaf, new_score = leaf[index].where(found, -1), score[index].where(found, -torch.inf)
        self.leaves, self.scores = merge_ranked(self.leaves, self.scores, new_leaf, new_score)

    def lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best K of what was found and what was known before: leaves (A, K), scores (A, K)."""
        again = (self.known_leaves[:, :, None] == self.leaves[:, None, :]).any(2)
        return merge_ranked(
            self.leaves, self.scores, self.known_leaves, self.known_scores.where(~again, -torch.inf)
        )

    def _may_win(self, lane, bound) -> torch.Tensor:
        """Whether an open prefix can still get an item into the list: as good as the known K-th, better than the found K-th."""
        return (bound >= self.known_scores[lane, -1]) & (bound > self.scores[lane, -1])
