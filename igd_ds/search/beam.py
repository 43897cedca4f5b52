"""Beam search over the trie of catalogue items with decisiveness-weighted scores (IGD Eq. 3, 8, 9).

Letters in shapes: A lanes (a user at one α), K beams, E candidate edges.
"""

import torch

from igd_ds.search.frontier import ExpandedTree


class Beam:
    """The beams of A lanes: S(y_≤t) = S(y_<t) + w_d·log p(y_t) + what prior and guidance add, in fp32.

    The rule is that of Hugging Face's beam search: of all beams' children the best 2K are looked at; a finished item among them
    counts only if it is one of the first K, and it takes no live slot; the best K unfinished ones live on. A lane ends when no
    live beam can beat its K-th finished item: an open prefix is bounded by S / longest^p, because no later token can raise S.
    (Hugging Face takes the present length in place of the longest, so it can stop too early when p > 0.)

    Hypotheses are compared token by token, whatever the model has computed ahead: a lane makes a step when all of its live
    beams' nodes are expanded, and waits for `wanted` otherwise. Lanes do not wait for each other.

    Every list has min(K, number of leaves the user may get) entries. Candidates of one step are different nodes of one level,
    each with a leaf of its own below. While they number K or fewer, all of them finish or live on; from the first time they are
    more, finished and live ones together are never fewer than K.

    Ties: candidates of equal score keep the order (rank of their parent beam, token id), and an item that finished earlier
    stays ahead. The order is the same on every run and device and does not depend on item ids or on who else is in the
    batch; item ids within a leaf are not ranked at all.

    Args:
        expanded: the batch's ExpandedTree.
        lane_user, lane_alpha: (A,) int64 and float32.
        num_beams: K.

    Attributes:
        leaves, scores: finished items, best first, (A, K) int64, −1 where there is none, and float32 in nats, S / n^p.
        token_steps, positions: (A,) int64, the passes and positions that a search of one token a step would have made.
    """

    def __init__(
        self,
        expanded: ExpandedTree,
        lane_user: torch.Tensor,
        lane_alpha: torch.Tensor,
        num_beams: int,
    ):
        self.expanded, self.lane_user, self.lane_alpha, self.num_beams = (
            expanded,
            lane_user,
            lane_alpha,
            num_beams,
        )
        num_lanes, device = len(lane_user), lane_user.device
        self.edge = torch.zeros((num_lanes, num_beams), dtype=torch.int64, device=device)
        self.edge[:, 0] = lane_user  # the edges into the roots
        self.score = torch.zeros((num_lanes, num_beams), device=device)
        self.live = torch.zeros((num_lanes, num_beams), dtype=torch.bool, device=device)
        self.live[:, 0] = True
        self.leaves = torch.full((num_lanes, num_beams), -1, dtype=torch.int64, device=device)
        self.scores = torch.full((num_lanes, num_beams), -torch.inf, device=device)
        self.token_steps, self.positions = torch.zeros_like(lane_user), torch.zeros_like(lane_user)

    def advance(self) -> None:
        """Make all steps for which the model has given what they need."""
        while True:
            waits = self.live & (self.expanded.row.values[self.edge] < 0)
            ready = (self.live.any(1) & ~waits.any(1)).nonzero()[:, 0]
            if not len(ready):
                return
            self._step(ready)

    def wanted(self) -> torch.Tensor:
        """Return the edges (Q,) whose children must be expanded before any waiting lane can go on."""
        edges = self.edge[self.live]
        return edges[self.expanded.row.values[edges] < 0].unique()

    def open_users(self) -> torch.Tensor:
        """Return the users (ascending) that still search."""
        return self.lane_user[self.live.any(1)].unique()

    def _step(self, lanes: torch.Tensor) -> None:
        """Replace the live beams of `lanes` (A',) by their best children."""
        trie, width = self.expanded.trie, self.num_beams
        edge, score = self._best_candidates(lanes, 2 * width)
        node = self.expanded.child.values[edge.clamp(min=0)].long()
        finished = (edge >= 0) & trie.is_leaf(node)
        final = self.expanded.per_length(score[:, :width], trie.depth[node[:, :width]])
        self.leaves[lanes], self.scores[lanes] = merge_ranked(
            self.leaves[lanes],
            self.scores[lanes],
            node[:, :width],
            final.where(finished[:, :width], -torch.inf),
        )
        live = (edge >= 0) & ~finished
        order = live.long().sort(dim=1, descending=True, stable=True).indices[:, :width]
        edge, score, node, live = (t.gather(1, order) for t in (edge, score, node, live))
        bound = self.expanded.per_length(score, trie.longest[node]).where(live, -torch.inf)
        live &= (bound > self.scores[lanes][:, -1:]).any(1, keepdim=True)
        self.edge[lanes], self.score[lanes], self.live[lanes] = edge.clamp(min=0), score, live
        self.token_steps[lanes] += live.any(1)
        self.positions[lanes] += live.sum(1)

    def _best_candidates(
        self, lanes: torch.Tensor, limit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (edge, score), each (A', limit), best first, of the live beams' children; edge −1 and score −inf: none."""
        expanded, scoring = self.expanded, self.expanded.scoring
        lane, beam = self.live[lanes].nonzero().T
        row, edge = expanded.children(expanded.row.values[self.edge[lanes][lane, beam]].long())
        lane, parent_score = lane[row], self.score[lanes][lane, beam][row]
        alpha, child = self.lane_alpha[lanes][lane], expanded.child.values[edge].long()
        pooled = scoring.pooled
        weights = (
            scoring.pooled_weights(alpha, child, lane, len(lanes))
            if pooled
            else scoring.weights(alpha, child)
        )
        score = parent_score + expanded.increments(edge, weights)
        best = best_per_lane(lane, score, len(lanes), limit)
        found = best >= 0
        if not len(edge):
            return best, torch.full_like(best, -torch.inf, dtype=torch.float32)
        return edge[best].where(found, -1), score[best].where(found, -torch.inf)


def best_per_lane(
    lane: torch.Tensor, score: torch.Tensor, num_lanes: int, limit: int
) -> torch.Tensor:
    """Return the indices of each lane's best scores, (num_lanes, limit) int64, best first, ties in order of index; −1: no more.

    `lane` (E,) int64 ascending, `score` (E,). Work and memory are O(E) and a sort of about `limit` per lane: lanes of similar
    width share a table in which their limit-th best score is found, so that one wide lane does not widen the others.
    """
    count = torch.bincount(lane, minlength=num_lanes)
    column = torch.arange(len(lane), device=lane.device) - (count.cumsum(0) - count)[lane]
    size = torch.where(
        count > limit, (count - 1).clamp(min=1).log2().floor().long() + 1, 0
    )  # table of 2^size columns; 0: none
    threshold = score.new_full((num_lanes,), -torch.inf)
    for power in size.unique().tolist():
        if power:
            members = (size == power).nonzero()[:, 0]
            member = torch.full_like(count, -1)
            member[members] = torch.arange(len(members), device=lane.device)
            inside = (member[lane] >= 0).nonzero()[:, 0]
            table = score.new_full((len(members), int(count[members].max())), -torch.inf)
            table[member[lane[inside]], column[inside]] = score[inside]
            threshold[members] = table.topk(limit, dim=1).values[:, -1]
    kept = (score >= threshold[lane]).nonzero()[:, 0]
    kept = kept[score[kept].argsort(descending=True, stable=True)]
    kept = kept[lane[kept].argsort(stable=True)]
    count = torch.bincount(lane[kept], minlength=num_lanes)
    rank = torch.arange(len(kept), device=lane.device) - (count.cumsum(0) - count)[lane[kept]]
    best = torch.full((num_lanes, limit), -1, dtype=torch.int64, device=lane.device)
    first = rank < limit
    best[lane[kept[first]], rank[first]] = kept[first]
    return best


def merge_ranked(leaf, score, new_leaf, new_score) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the best K of ranked items (A, K) and new ones (A, any); −inf scores mean none, and their leaves become −1."""
    scores, order = torch.cat([score, new_score], dim=1).sort(dim=1, descending=True, stable=True)
    leaves = torch.cat([leaf, new_leaf], dim=1).gather(1, order)
    width = score.shape[1]
    return leaves.where(scores > -torch.inf, -1)[:, :width], scores[:, :width]
