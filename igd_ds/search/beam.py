"""Beam search over the trie of items, with scores weighted by decisiveness (IGD Eq. 3, 8, 9).

Letters in shapes: A pairs (a pair is one user at one α), K beams, E candidate edges, J steps along
chains.
"""

import numpy as np

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
    Pairs do not wait for each other. Steps in which no hypothesis has a choice are made at once,
    however many they are.

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
        pair_user: np.ndarray,
        pair_alpha: np.ndarray,
        num_beams: int,
    ):
        self.frontier, self.num_beams = frontier, num_beams
        self.pair_user, self.pair_alpha = pair_user, pair_alpha
        shape = len(pair_user), num_beams

        # Hypotheses: the edge that each ends with, its score, and whether the entry holds one at
        # all. The first one of each pair is the edge to the user's root.
        self.edge = np.zeros(shape, np.int64)
        self.edge[:, 0] = pair_user
        self.score = np.zeros(shape, np.float32)
        self.live = np.zeros(shape, bool)
        self.live[:, 0] = True

        self.leaves = np.full(shape, -1)
        self.scores = np.full(shape, -np.inf, np.float32)
        self.token_steps = np.zeros_like(pair_user)
        self.positions = np.zeros_like(pair_user)

    def advance(self) -> None:
        """Make all steps for which the frontier holds what they need."""
        while len(pairs := self._ready()):
            self._follow_chains(pairs)
            self._branch(self._ready())

    def wanted(self) -> np.ndarray:
        """Return the edges (Q,) whose children must be expanded before a waiting pair can go on."""
        edges = self.edge[self.live]
        return np.unique(edges[~self.frontier.is_expanded(edges)])

    def open_users(self) -> np.ndarray:
        """Return the users (ascending) whose search has not ended."""
        return np.unique(self.pair_user[self.live.any(1)])

    def _ready(self) -> np.ndarray:
        """Return the pairs (A',) whose hypotheses are all expanded."""
        self.frontier.expand_free(self.edge[self.live])
        waits = self.live & ~self.frontier.is_expanded(self.edge)
        return np.flatnonzero(self.live.any(1) & ~waits.any(1))

    def _follow_chains(self, pairs: np.ndarray) -> None:
        """Make the steps of `pairs` (A',) in which every hypothesis follows its chain.

        A pair stops before the step in which one of its hypotheses reaches the end of its chain and
        has a choice there, or needs another pass. An item may end at its chain's end: it leaves the
        beam and the others go on. In such steps all candidates are among the first K, so a step
        only adds to the scores, puts the hypotheses in order and asks whether the search has ended.
        """
        frontier = self.frontier
        live = self.live[pairs]
        node = np.where(live, frontier.below.values[self.edge[pairs]], 0)
        ahead = frontier.ahead.values[node]
        leaf = frontier.child.values[frontier.first_edge.values[node + ahead]]
        ends = frontier.is_leaf(leaf) & (frontier.num_edges.values[node + ahead] == 1)

        # How many steps each pair makes. Only pairs that make any are looked at below.
        to_choice = np.where(live & ~ends, ahead, ahead.max() + 1).min(1)
        to_last_end = np.where(live & ends, ahead + 1, 0).max(1)
        num_steps = np.where((live & ~ends).any(1), to_choice, to_last_end)
        moving = num_steps > 0
        if not moving.any():
            return
        pairs, num_steps = pairs[moving], num_steps[moving, None]
        live, node, ahead, leaf, ends = (array[moving] for array in (live, node, ahead, leaf, ends))

        # The edge and the score of each hypothesis after each step, (A', K, J); they stay what they
        # are behind the last step.
        step = np.arange(num_steps.max())
        count = np.minimum(num_steps, ahead + ends)[..., None]
        edge = frontier.first_edge.values[node[..., None] + np.minimum(step, count - 1)]
        made = live[..., None] & (step < count)
        added = np.where(made, self._increments(pairs, edge, made), 0)
        score = np.concatenate([self.score[pairs][..., None], added], axis=2)
        score = np.add.accumulate(score, axis=2)[..., 1:]

        # Items that end enter the list: earlier ones first, then in the order of their step.
        ended = live & ends & (ahead < num_steps)
        final = frontier.per_length(score[..., -1], frontier.depth[leaf])
        final = np.where(ended, final, -np.inf)
        kth_score = self._kth_scores(pairs, final, ahead, len(step))
        keys = -np.moveaxis(score, 2, 0)  # the last of them counts first
        order = np.lexsort((*keys, ahead))
        self.leaves[pairs], self.scores[pairs] = merge_ranked(
            self.leaves[pairs],
            self.scores[pairs],
            np.take_along_axis(leaf, order, 1),
            np.take_along_axis(final, order, 1),
        )

        # After which steps (A', J) an unfinished hypothesis can still enter the list.
        going = live[..., None] & ~(ends[..., None] & (step >= ahead[..., None]))
        bound = frontier.per_length(score, frontier.longest[frontier.child.values[edge]])
        is_open = (going & (bound > kth_score[:, None])).any(1) & (step < num_steps)
        self.token_steps[pairs] += is_open.sum(1)
        self.positions[pairs] += (is_open[:, None] & going).sum((1, 2))

        live = live & ~ended & np.take_along_axis(is_open, num_steps - 1, 1)
        order = np.lexsort((*keys, ~live))
        self.edge[pairs], self.score[pairs], self.live[pairs] = (
            np.take_along_axis(array, order, 1) for array in (edge[..., -1], score[..., -1], live)
        )

    def _increments(self, pairs: np.ndarray, edge: np.ndarray, made: np.ndarray) -> np.ndarray:
        """Return what the edges (A', K, J) of J steps add where `made`, float32 of their shape."""
        frontier, scoring = self.frontier, self.frontier.scoring
        alpha = np.broadcast_to(self.pair_alpha[pairs][:, None, None], edge.shape)
        child = frontier.child.values[edge]
        if not scoring.pooled:
            return frontier.increments(edge, scoring.weights(alpha, child))

        # Each step of each pair has a pool of its own.
        num_pairs, _, num_steps = edge.shape
        pool = np.arange(num_pairs)[:, None, None] * num_steps + np.arange(num_steps)
        pool = np.broadcast_to(pool, edge.shape)[made]
        weights = np.ones(edge.shape, np.float32)
        weights[made] = scoring.pooled_weights(
            alpha[made], child[made], pool, num_pairs * num_steps
        )
        return frontier.increments(edge, weights)

    def _kth_scores(
        self, pairs: np.ndarray, final: np.ndarray, ahead: np.ndarray, num_steps: int
    ) -> np.ndarray:
        """Return the K-th score of the lists of `pairs` after each step, (A', J or 1).

        Args:
            pairs: (A',).
            final: float32 (A', K), final scores of items that end; −inf: no item.
            ahead: int64 (A', K), the step at which they end.
            num_steps: J.
        """
        scores = self.scores[pairs]
        if not (final > -np.inf).any():
            return scores[:, -1:]
        by_now = ahead[:, None] <= np.arange(num_steps)[:, None]
        new = np.where(by_now, final[:, None], -np.inf)
        old = np.broadcast_to(scores[:, None], new.shape)
        width = self.num_beams
        worst_first = -np.concatenate([old, new], axis=2)
        return -np.partition(worst_first, width - 1, axis=2)[..., width - 1]

    def _branch(self, pairs: np.ndarray) -> None:
        """Make one step of `pairs` (A',): replace the hypotheses by their best children."""
        if not len(pairs):
            return
        frontier, width = self.frontier, self.num_beams
        edge, score = self._best_candidates(pairs, 2 * width)
        found = edge >= 0
        node = frontier.child.values[np.maximum(edge, 0)]
        finished = found & frontier.is_leaf(node)

        # Finished items among the first K enter the list.
        final = frontier.per_length(score[:, :width], frontier.depth[node[:, :width]])
        self.leaves[pairs], self.scores[pairs] = merge_ranked(
            self.leaves[pairs],
            self.scores[pairs],
            node[:, :width],
            np.where(finished[:, :width], final, -np.inf),
        )

        # The best K unfinished candidates live on, unless none of them can enter the list any more.
        live = found & ~finished
        order = np.argsort(~live, axis=1, kind="stable")[:, :width]
        edge, score, node, live = (
            np.take_along_axis(array, order, 1) for array in (edge, score, node, live)
        )
        bound = np.where(live, frontier.per_length(score, frontier.longest[node]), -np.inf)
        live &= (bound > self.scores[pairs][:, -1:]).any(1, keepdims=True)

        self.edge[pairs], self.score[pairs], self.live[pairs] = np.maximum(edge, 0), score, live
        self.token_steps[pairs] += live.any(1)
        self.positions[pairs] += live.sum(1)

    def _best_candidates(self, pairs: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges and scores of the best children of all hypotheses of each pair.

        Args:
            pairs: int64 (A',).
            limit: how many to return per pair.

        Returns:
            Edges, int64, and scores, float32, each (A', limit), best first; −1 and −inf: no more.
        """
        frontier, scoring = self.frontier, self.frontier.scoring
        pair, beam = self.live[pairs].nonzero()
        index, edge = frontier.children(self.edge[pairs][pair, beam])
        pair, parent_score = pair[index], self.score[pairs][pair, beam][index]

        # Score every child.
        alpha, child = self.pair_alpha[pairs][pair], frontier.child.values[edge]
        if scoring.pooled:
            weights = scoring.pooled_weights(alpha, child, pair, len(pairs))
        else:
            weights = scoring.weights(alpha, child)
        score = parent_score + frontier.increments(edge, weights)

        best = best_per_group(pair, score, len(pairs), limit)
        if not len(edge):
            return best, np.full(best.shape, -np.inf, np.float32)
        found = best >= 0
        return np.where(found, edge[best], -1), np.where(found, score[best], -np.inf)
