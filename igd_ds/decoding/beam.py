"""Beam search over the trie of catalogue items with decisiveness-weighted scores (IGD Eq. 3, 8, 9).

Letters in shapes: B users, K beams, M trie nodes, R rows (live beams of all users), E candidate edges, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class BeamResult:
    """Ranked lists of B users, best first.

    leaves: (B, K) int32, trie nodes that end an item's path; −1 where the catalogue has fewer leaves than K.
    scores: (B, K) float32, S / n^p in nats (n tokens with EOS); −inf where `leaves` is −1.
    """

    leaves: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class SearchTrie:
    """The arrays of a TokenTrie that a search reads, on the search's device; int32, indexed by node.

    token (M,); child_begin (M + 1,): children of n are child_begin[n] … child_begin[n + 1] − 1; depth (M,): tokens on the path;
    longest (M,): tokens of the longest item under the node, which bounds what an open prefix can still become.
    """

    token: torch.Tensor
    child_begin: torch.Tensor
    depth: torch.Tensor
    longest: torch.Tensor

    @classmethod
    def build(cls, trie, device: torch.device | str = "cpu") -> "SearchTrie":
        """Copy what the search needs of a TokenTrie of numpy arrays to `device`."""
        arrays = (trie.token, trie.child_begin, trie.depth, longest_item(trie))
        return cls(*(torch.from_numpy(np.array(array, dtype=np.int32)).to(device) for array in arrays))

    def to(self, device: torch.device | str) -> "SearchTrie":
        """Copy to another device."""
        return SearchTrie(*(array.to(device) for array in (self.token, self.child_begin, self.depth, self.longest)))

    def children(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the child edges of `nodes` (R,): (row in `nodes`, child node), each (E,) int64, in order of row and token."""
        begin = self.child_begin[nodes].long()
        count = self.child_begin[nodes + 1].long() - begin
        row = torch.repeat_interleave(count)
        first_edge = count.cumsum(0) - count
        return row, (begin - first_edge)[row] + torch.arange(len(row), device=nodes.device)


def longest_item(trie) -> np.ndarray:
    """Return the length in tokens (EOS included) of the longest item under each node, int32 (M,); one pass per level."""
    longest = np.array(trie.depth, dtype=np.int32)
    levels = trie.level_begin()
    for begin, end in zip(levels[-3::-1], levels[-2:0:-1], strict=True):
        first = np.asarray(trie.child_begin[begin : end + 1], dtype=np.int64)
        inner = np.flatnonzero(np.diff(first))
        if len(inner):
            longest[begin + inner] = np.maximum.reduceat(longest[first[0] : first[-1]], first[inner] - first[0])
    return longest


def beam_search(
    tree,
    trie: SearchTrie,
    edge_weights: torch.Tensor,
    num_beams: int,
    length_penalty: float = 0.0,
    any_rank: Callable[[bool], bool] = bool,
) -> BeamResult:
    """Find K good items for each prompt of a prefilled tree: S(y_≤t) = S(y_<t) + w_d·log p(y_t), in fp32.

    log p is over the full vocabulary. The rule is that of Hugging Face's beam search: of all beams' children the best 2K are
    looked at; a finished item among them counts only if it is one of the first K, and it takes no live slot; the best K
    unfinished ones live on. A user's search ends when no live beam can beat the K-th finished item: an open prefix is bounded
    by S / longest^p, because no later token can raise S. (Hugging Face takes the present length in place of the longest, so it
    can stop too early when p > 0.)

    Every list has min(K, number of leaves) entries, and with K ≥ the number of leaves nothing is ever lost. Candidates of one
    step are different nodes of one level, each with a leaf of its own below. While they number K or fewer, all of them finish
    or live on; from the first time they are more, finished and live ones together are never fewer than K.

    Ties: candidates of equal score keep the order (rank of their parent beam, token id), and an item that finished earlier
    stays ahead. The order is the same on every run and device and does not depend on item ids or on who else is in the
    batch; item ids within a leaf are not ranked at all.

    Args:
        tree: PromptTree after `prefill`; on return it holds the searched nodes too (`rewind` drops them).
        trie: the catalogue's SearchTrie.
        edge_weights: w_d per edge, float32 (M,), ≥ 0.
        num_beams: K.
        length_penalty: p ≥ 0 in S / n^p.
        any_rank: tells whether any process must go on, given whether this one must; with ZeRO-3, where all ranks have to make
            the same number of forward passes, give it `distributed.any_rank`.

    Raises:
        ValueError: p < 0 (no bound on open prefixes), or logits that are NaN or infinite.
    """
    if length_penalty < 0:
        raise ValueError(f"length_penalty must not be negative, found {length_penalty}")
    assert len(edge_weights) == len(trie.token), "one weight per edge of this trie"
    logits = tree.prompt_logits
    num_users, device = len(logits), logits.device
    node = torch.zeros((num_users, 1), dtype=torch.int64, device=device)
    slot = torch.full_like(node, -1)
    score = torch.zeros((num_users, 1), device=device)
    live = torch.ones((num_users, 1), dtype=torch.bool, device=device)
    done_leaf = torch.full((num_users, num_beams), -1, dtype=torch.int64, device=device)
    done_score = torch.full((num_users, num_beams), -torch.inf, device=device)
    while True:
        edges = _score_edges(logits, node[live], score[live], trie, edge_weights)
        user, slot = live.nonzero()[:, 0], slot[live]
        node, score, slot = _best_candidates(edges, user, slot, num_users, 2 * num_beams)
        finished = (node >= 0) & (trie.child_begin[node + 1] == trie.child_begin[node])  # node −1 reads entries 0 and −1: masked
        counted = finished[:, :num_beams]
        final = score[:, :num_beams] / trie.depth[node[:, :num_beams]] ** length_penalty
        done_leaf, done_score = _merge(done_leaf, done_score, node[:, :num_beams], final.where(counted, -torch.inf))

        live = (node >= 0) & ~finished
        order = live.long().sort(dim=1, descending=True, stable=True).indices[:, :num_beams]
        node, score, slot, live = (t.gather(1, order) for t in (node, score, slot, live))
        bound = (score / trie.longest[node] ** length_penalty).where(live, -torch.inf)
        live &= (bound > done_score[:, -1:]).any(1, keepdim=True)
        if not any_rank(bool(live.any())):
            return BeamResult(done_leaf.int(), done_score)

        width = max(1, int(live.sum(1).max()))  # live beams come first, so the rest of the columns is padding
        node, score, slot, live = (t[:, :width] for t in (node, score, slot, live))
        num_slots = tree.num_slots
        logits = tree.extend(trie.token[node].long().where(live, 0), slot.where(live, -1), live)
        slot = torch.arange(num_slots, num_slots + width, device=device).expand_as(node)


def _score_edges(logits, nodes, scores, trie, edge_weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row, child, score), each (E,), of all children of `nodes` (R,); logits (R, V), scores (R,) of the nodes."""
    row, child = trie.children(nodes)
    # log_softmax rather than logit − logsumexp: one fused pass, and rounded like Hugging Face's scores.
    logprob = torch.log_softmax(logits, dim=-1, dtype=torch.float32)[row, trie.token[child].long()]
    if not torch.isfinite(logprob).all():
        raise ValueError("the model's logits are NaN or infinite: check its weights, or evaluate it with --dtype float32")
    return row, child, scores[row] + edge_weights[child] * logprob


def _best_candidates(edges, user, slot, num_users, limit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (node, score, parent's slot), each (B, ≤ limit), best first, of the edges of `user`'s (R,) beams; node −1: none."""
    row, child, score = edges
    owner = user[row]
    count = torch.bincount(owner, minlength=num_users)
    column = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[owner]
    width = max(1, int(count.max()))
    table_score = score.new_full((num_users, width), -torch.inf)
    table_edge = torch.full((num_users, width), -1, dtype=torch.int64, device=row.device)
    table_score[owner, column] = score
    table_edge[owner, column] = torch.arange(len(row), device=row.device)
    best_score, order = table_score.sort(dim=1, descending=True, stable=True)
    best_edge = table_edge.gather(1, order)[:, :limit]
    missing = best_edge < 0
    if not len(row):
        return best_edge, best_score, best_edge
    return child[best_edge].where(~missing, -1), best_score[:, :limit], slot[row[best_edge]].where(~missing, -1)


def _merge(leaf, score, new_leaf, new_score) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the best K of the finished items (B, K) and the newly finished ones (B, any); −inf scores mean none."""
    scores, order = torch.cat([score, new_score], dim=1).sort(dim=1, descending=True, stable=True)
    leaves = torch.cat([leaf, new_leaf], dim=1).gather(1, order)
    width = score.shape[1]
    return leaves.where(scores > -torch.inf, -1)[:, :width], scores[:, :width]
