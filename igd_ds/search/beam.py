"""Beam search over the trie of items, with scores weighted by decisiveness (IGD Eq. 3, 8, 9).

Letters in shapes: A pairs (a pair is one user at one α), K beams, E candidate edges.
"""

import torch

from igd_ds.search.frontier import Frontier
from igd_ds.search.ranking import best_per_group, merge_ranked


class Beam:
    """The hypotheses of A pairs: S(y_≤t) = S(y_<t) + w_d·log p(y_t) + prior + guidance, in fp32.

    **Rule.** The rule is that of Hugging Face's beam search. A step looks at the best 2K of the
    children of all hypotheses. A finished item among them counts only if it is one of the first K,
    and it does not use up one of the K hypotheses. The best K unfinished ones are the next
    hypotheses. A pair's search ends when no hypothesis can beat its K-th finished item. The bound
    of a hypothesis is S / longest^p, because no later token can raise S. (Hugging Face divides by
    the present length instead of the longest, so it can stop too early if p > 0.)

    **Order.** Hypotheses are compared token by token, whatever the model has computed ahead. A pair
    makes a step when the nodes of all its hypotheses are expanded; otherwise it waits until the
    nodes of `wanted` are.
    Pairs do not wait for each other.

    **Length of the list.** Every list has min(K, number of leaves the user may get) entries.
    Candidates of one step are different nodes of one level, each with a leaf of its own below.
    While there are K or fewer of them, all finish or live on. From the first time that there are
    more, there are never fewer than K finished items and hypotheses together.

    **Ties.** Candidates of equal score keep the order (rank of their hypothesis, token id), and an
    item that finished earlier stays ahead. The order is the same on every run and device. It does
    not depend on item ids or on the other users of the batch. Items of a shared leaf are not
    ranked.

    Args:
        frontier: the batch's frontier.
        pair_user: int64 (A,), the user of each pair.
        pair_alpha: float32 (A,), the α of each pair.
        num_beams: K.

    Attributes:
        leaves: int64 (A, K), finished items, best first; −1 where there is none.
        scores: float32 (A, K), their S / n^p in nats; −inf where there is none.
        token_steps: int64 (A,), passes that a search of one token per step would have made.
        positions: int64 (A,), tokens that such a search would have sent.
    """

    def __init__(
        self,
        frontier: Frontier,
        pair_user: torch.Tensor,
        pair_alpha: torch.Tensor,
        num_beams: int,
    ):
        self.frontier, self.num_beams = frontier, num_beams
        self.pair_user, self.pair_alpha = pair_user, pair_alpha
        shape, device = (len(pair_user), num_beams), pair_user.device

        # Hypotheses: the edge that each ends with, its score, and whether the entry holds one at
        # all. The first one of each pair is the edge to the user's root.
        self.edge = torch.zeros(shape, dtype=torch.int64, device=device)
        self.edge[:, 0] = pair_user
        self.score = torch.zeros(shape, device=device)
        self.live = torch.zeros(shape, dtype=torch.bool, device=device)
        self.live[:, 0] = True

        self.leaves = torch.full(shape, -1, dtype=torch.int64, device=device)
        self.scores = torch.full(shape, -torch.inf, device=device)
        self.token_steps = torch.zeros_like(pair_user)
        self.positions = torch.zeros_like(pair_user)

    def advance(self) -> None:
        """Make all steps for which the frontier holds what they need."""
        while True:
            waits = self.live & ~self.frontier.is_expanded(self.edge)
            ready = (self.live.any(1) & ~waits.any(1)).nonzero()[:, 0]
            if not len(ready):
                return
            self._step(ready)

    def wanted(self) -> torch.Tensor:
        """Return the edges (Q,) whose children must be expanded before a waiting pair can go on."""
        edges = self.edge[self.live]
        return edges[~self.frontier.is_expanded(edges)].unique()

    def open_users(self) -> torch.Tensor:
        """Return the users (ascending) whose search has not ended."""
        return self.pair_user[self.live.any(1)].unique()

    def _step(self, pairs: torch.Tensor) -> None:
        """Replace the hypotheses of `pairs` (A',) by their best children."""
        frontier, trie, width = self.frontier, self.frontier.trie, self.num_beams
        edge, score = self._best_candidates(pairs, 2 * width)
        node = frontier.node_below(edge.clamp(min=0))
        finished = (edge >= 0) & trie.is_leaf(node)

        # Finished items among the first K enter the list.
        final = frontier.per_length(score[:, :width], trie.depth[node[:, :width]])
        self.leaves[pairs], self.scores[pairs] = merge_ranked(
            self.leaves[pairs],
            self.scores[pairs],
            node[:, :width],
            final.where(finished[:, :width], -torch.inf),
        )

        # The best K unfinished candidates live on, unless none of them can enter the list any more.
        live = (edge >= 0) & ~finished
        order = live.long().sort(dim=1, descending=True, stable=True).indices[:, :width]
        edge, score, node, live = (t.gather(1, order) for t in (edge, score, node, live))
        bound = frontier.per_length(score, trie.longest[node]).where(live, -torch.inf)
        live &= (bound > self.scores[pairs][:, -1:]).any(1, keepdim=True)

        self.edge[pairs], self.score[pairs], self.live[pairs] = edge.clamp(min=0), score, live
        self.token_steps[pairs] += live.any(1)
        self.positions[pairs] += live.sum(1)

    def _best_candidates(
        self, pairs: torch.Tensor, limit: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the edges and scores of the best children of all hypotheses of each pair.

        Args:
            pairs: int64 (A',).
            limit: how many to return per pair.

        Returns:
            Edges, int64, and scores, float32, each (A', limit), best first; −1 and −inf: no more.
        """
        frontier, scoring = self.frontier, self.frontier.scoring
        pair, beam = self.live[pairs].nonzero().T
        index, edge = frontier.children(self.edge[pairs][pair, beam])
        pair, parent_score = pair[index], self.score[pairs][pair, beam][index]

        # Score every child.
        alpha, child = self.pair_alpha[pairs][pair], frontier.node_below(edge)
        if scoring.pooled:
            weights = scoring.pooled_weights(alpha, child, pair, len(pairs))
        else:
            weights = scoring.weights(alpha, child)
        score = parent_score + frontier.increments(edge, weights)

        best = best_per_group(pair, score, len(pairs), limit)
        if not len(edge):
            return best, torch.full_like(best, -torch.inf, dtype=torch.float32)
        found = best >= 0
        return edge[best].where(found, -1), score[best].where(found, -torch.inf)
