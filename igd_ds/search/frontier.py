"""The frontier of a batch: the trie nodes that the model has read, and the edges below them.

All searches of a batch (each user at each α, and the exact search after the beam search) read and
extend the same frontier, so no token is sent through the model twice for one user.

Under the softmax masked to the trie's next tokens, a forced token has probability 1. So chains end
where a choice is, logits are computed only there, and a forced tail, which leads to the one item
that is left, is never sent.

Everything but the logits lies on the CPU. On an accelerator the search thus waits once per pass,
for the log-probabilities of the edges that the pass has found, and launches few operations there.

Letters in shapes: B users, X expanded nodes, E edges, Q edges to expand, T tokens of a pass,
V vocabulary. A *chain* is a row of tokens, each the child of the one before, that go through the
model together (see `contracts.PromptTree`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from igd_ds.contracts import PromptTree
from igd_ds.errors import UsageError
from igd_ds.items.ragged import index_within, ragged_arange
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.filters import Guidance, ItemFilter
from igd_ds.search.scoring import Scoring

# How many forced tokens a chain may hold beyond its first token: they are sent before they are
# needed. A larger number saves passes, which is what counts on an accelerator, and costs positions
# for hypotheses that are dropped before they get that far, which is what counts on a CPU
# (measured: docs/search.md).
CPU_LOOKAHEAD, DEVICE_LOOKAHEAD = 4, 12

# Logits per block of the softmax. On a CPU 4 MiB of fp32: malloc keeps such blocks for the next use
# and gives blocks of 16 MiB back to the system (measured). An accelerator keeps freed memory
# anyway: there a block only bounds the memory, at 1 GiB.
CPU_BLOCK, DEVICE_BLOCK = 2**20, 2**28


@dataclass(frozen=True)
class PerUser:
    """What differs between the users of a batch besides their prompts.

    If both are given, the guidance should give probability 0 to items that the filter leaves out.
    Otherwise hypotheses would follow the mass of these items.
    """

    item_filter: ItemFilter | None = None
    """The items that each user may get."""
    guidance: Guidance | None = None
    """A second scorer's probabilities."""


class GrowableArray:
    """A one-dimensional array to which values are appended; its memory doubles when it is full."""

    def __init__(self, dtype: type):
        self.memory: np.ndarray = np.empty(1024, dtype)
        self.size = 0

    def append(self, values: np.ndarray) -> None:
        """Add `values` (n,) at the end."""
        end = self.size + len(values)
        if end > len(self.memory):
            larger = np.empty(max(end, 2 * len(self.memory)), self.memory.dtype)
            larger[: self.size] = self.values
            self.memory = larger
        self.memory[self.size : end] = values
        self.size = end

    @property
    def values(self) -> np.ndarray:
        """A view of the values so far."""
        return self.memory[: self.size]


@dataclass(frozen=True)
class Chains:
    """Q rows of tokens, each the only child of the one before; T tokens in all."""

    edges: np.ndarray
    """int64 (Q,), the edges that lead to their first nodes."""
    length: np.ndarray
    """int64 (Q,)."""
    owner: np.ndarray
    """int64 (T,), the chain of each token."""
    ahead: np.ndarray
    """int64 (T,), how many tokens of the chain follow."""
    node: np.ndarray
    """int64 (T,), trie nodes."""

    @classmethod
    def build(cls, frontier: Frontier, edges: np.ndarray, length: np.ndarray) -> Chains:
        """Follow the trie from the ends of `edges` (Q,), for `length` (Q,) tokens."""
        # Step by step, for all chains as if they were equally long.
        node = np.empty((length.max(initial=0), len(edges)), np.int64)
        for step in range(len(node)):
            above = frontier.child_begin[node[step - 1]] if step else frontier.child.values[edges]
            node[step] = above

        owner = np.repeat(np.arange(len(edges)), length)
        offset = index_within(np.append(0, length.cumsum()))
        return cls(edges, length, owner, length[owner] - 1 - offset, node[offset, owner])


class Frontier:
    """Expanded nodes and the edges below them, as growable flat arrays.

    A trie node of one user is *expanded* when the log-probabilities of its edges are known: the
    model has given the logits behind it, or none are needed. Expanded node x has the arrays `user`,
    `chain` (in the prompt tree), `ahead`, `first_edge` and `num_edges`. Its edges are first_edge[x]
    … first_edge[x] + num_edges[x] − 1. The expanded nodes x + 1 … x + ahead[x] follow it in its
    chain; each of them is the only child of the one before.

    Edge e has `child` (the trie node that it leads to), `logprob` (float32, nats), `bonus`
    (float32, nats: what prior and guidance add), `above` (the expanded node at which it begins) and
    `below` (the expanded node that it leads to, or −1 while its child is not expanded). Edges to
    items that the user may not get are left out. Edges 0 … B − 1 lead to the users' roots.

    Args:
        tree: a prefilled prompt tree of B users.
        trie: the catalogue's trie, on the CPU.
        scoring: how a path is scored.
        per_user: item filter and guidance of the users.

    Attributes:
        depth, longest: integers (M,), see SearchTrie.
        passes: int64 (B,), passes through the model in which the user had tokens; the prompt's pass
            is not counted.
        positions: int64 (B,), tokens of the user in these passes.
    """

    def __init__(self, tree: PromptTree, trie: SearchTrie, scoring: Scoring, per_user: PerUser):
        self.tree, self.scoring, self.per_user = tree, scoring, per_user
        self.token, self.forced = trie.token.numpy(), trie.forced.numpy()
        self.depth, self.longest = trie.depth.numpy(), trie.longest.numpy()
        self.child_begin, self.only_leaf = trie.child_begin.numpy(), trie.only_leaf.numpy()
        self.column = self.token  # of the logits, for the token on the edge into each node
        if tree.output_tokens is not None:
            assert scoring.masked_softmax, "a softmax over the vocabulary needs all logits"
            self.column = np.searchsorted(tree.output_tokens, self.token)

        self.user = GrowableArray(np.int64)
        self.chain = GrowableArray(np.int64)
        self.ahead = GrowableArray(np.int64)
        self.first_edge = GrowableArray(np.int64)
        self.num_edges = GrowableArray(np.int64)

        self.child = GrowableArray(np.int32)
        self.above = GrowableArray(np.int32)
        self.below = GrowableArray(np.int32)
        self.logprob = GrowableArray(np.float32)
        self.bonus = GrowableArray(np.float32)

        # n^p of every length comes from one table, so that a score is the same to the bit wherever
        # it is computed.
        lengths = np.arange(int(self.longest[0]) + 1, dtype=np.float64)
        self.length_power = (lengths**scoring.length_penalty).astype(np.float32)
        num_users = len(tree.prompt_logits)
        on_cpu = tree.prompt_logits.device.type == "cpu"
        self.lookahead = CPU_LOOKAHEAD if on_cpu else DEVICE_LOOKAHEAD
        self.passes = np.zeros(num_users, np.int64)
        self.positions = np.zeros(num_users, np.int64)

        # The users' roots are expanded: the prompts have been read.
        users, nothing = np.arange(num_users), np.zeros(num_users, np.int64)
        self._append_edges(nothing, users, nothing, nothing)
        self._append_expanded(nothing, users, users, nothing, tree.prompt_logits, users)
        self.below.values[users] = users

    @property
    def is_probability(self) -> bool:
        """Whether scores are log-probabilities of items, see Scoring."""
        return self.scoring.is_probability and self.per_user.guidance is None

    def is_expanded(self, edges: np.ndarray) -> np.ndarray:
        """Return whether the child of each edge is expanded, bool, of the shape of `edges`."""
        return self.below.values[edges] >= 0

    def children(self, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the edges that begin where `edges` (R,) end; all of these must be expanded.

        Returns:
            The index in `edges` of each, and the edge, each int64 (E,), in order of index and
            token.
        """
        expanded = self.below.values[edges]
        count = self.num_edges.values[expanded]
        index = np.repeat(np.arange(len(edges)), count)
        return index, ragged_arange(self.first_edge.values[expanded], count)

    def is_leaf(self, nodes: np.ndarray) -> np.ndarray:
        """Return whether each trie node ends an item, bool, of the shape of `nodes`."""
        return self.child_begin[nodes + 1] == self.child_begin[nodes]

    def found_leaf(self, nodes: np.ndarray) -> np.ndarray:
        """Return the leaf that a path to each trie node has found, of the shape of `nodes`.

        It is the node itself if that is a leaf. Under the masked softmax it also is the only leaf
        below the node, because the forced tokens up to there cost nothing. 0: no leaf is found yet.
        """
        if self.scoring.masked_softmax:
            return self.only_leaf[nodes]
        return np.where(self.is_leaf(nodes), nodes, 0)

    def expand_free(self, edges: np.ndarray) -> None:
        """Expand the children of `edges` (Q,) as far as that needs no pass.

        Under the masked softmax these are the children that lead to one leaf alone.
        """
        if not self.scoring.masked_softmax:
            return
        edges = np.unique(edges[~self.is_expanded(edges)])
        child = self.child.values[edges]
        free = (self.only_leaf[child] > 0) & ~self.is_leaf(child)
        if not free.any():
            return
        length = 1 + self.forced[child[free]].astype(np.int64)
        nothing = np.empty(0, np.int64)
        chains = Chains.build(self, edges[free], length)
        self._append_chains(chains, np.full(len(length), -1), self.tree.prompt_logits[:0], nothing)

    def expand(self, edges: np.ndarray, pass_positions: int) -> None:
        """Send the children of `edges` and their forced tokens through the model, in one pass.

        Edges for which `pass_positions` tokens are not enough stay unexpanded; earlier edges go
        first. Without edges the model makes an idle pass.

        Args:
            edges: int64 (Q,), whose children are not expanded.
            pass_positions: the most tokens of the pass.
        """
        # A chain is a child and forced tokens below it: under the masked softmax all of them, else
        # up to `lookahead` of them. Take as many chains as fit.
        length = 1 + self.forced[self.child.values[edges]].astype(np.int64)
        if not self.scoring.masked_softmax:
            length = np.minimum(length, 1 + self.lookahead)
        length = np.minimum(length, pass_positions)
        fitting = np.count_nonzero(length.cumsum() <= pass_positions)
        chains = Chains.build(self, edges[:fitting], length[:fitting])

        # Logits are wanted behind every token, or only where the softmax has a choice.
        read, keep = np.arange(len(chains.node)), None
        if self.scoring.masked_softmax:
            read = chains.length.cumsum() - 1
            keep = torch.from_numpy(read)
        above = self.above.values[chains.edges]
        arguments = self.chain.values[above], chains.length, self.token[chains.node]
        parent, lengths, tokens = (torch.from_numpy(array.astype(np.int64)) for array in arguments)
        logits, number = self.tree.extend(parent, lengths, tokens, keep)
        if not fitting:
            return

        user = self.user.values[above]
        self.passes[np.unique(user)] += 1
        self.positions += np.bincount(user[chains.owner], minlength=len(self.positions))
        self._append_chains(chains, number.numpy(), logits, read)

    def _append_chains(
        self, chains: Chains, number: np.ndarray, logits: torch.Tensor, read: np.ndarray
    ) -> None:
        """Append the nodes of Q chains of T tokens and note them at the edges that lead to them.

        Args:
            chains: the chains.
            number: int64 (Q,), of the chains in the prompt tree; −1: the model has not read it.
            logits, read: see `_append_expanded`.
        """
        begin, length = len(self.user.values), chains.length
        user = self.user.values[self.above.values[chains.edges]]
        self.below.values[chains.edges] = begin + length.cumsum() - length
        owner, ahead = chains.owner, chains.ahead
        self._append_expanded(chains.node, user[owner], number[owner], ahead, logits, read)
        inside = begin + np.flatnonzero(ahead)  # edges below the last node of a chain stay open
        self.below.values[self.first_edge.values[inside]] = inside + 1

    def per_length(self, score: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Return S / n^p, float32, of scores and lengths (any integer type)."""
        scores: np.ndarray = score / self.length_power[length]
        return scores

    def increments(self, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return w_d·log p and what prior and guidance add, float32 (IGD Eq. 8).

        Args:
            edges: int64, of any shape.
            weights: float32 of the same shape, w_d of each.
        """
        added: np.ndarray = weights * self.logprob.values[edges] + self.bonus.values[edges]
        return added

    def _append_expanded(
        self,
        node: np.ndarray,
        user: np.ndarray,
        chain: np.ndarray,
        ahead: np.ndarray,
        logits: torch.Tensor,
        read: np.ndarray,
    ) -> None:
        """Add expanded nodes and the edges below them.

        Args:
            node, user, chain, ahead: int64 (X,).
            logits: (n, V), behind the tokens of n of the nodes.
            read: int64 (n,), ascending: which nodes these are. The others have one child each.
        """
        # The children that the user may get, with their log-probabilities. Under the masked softmax
        # the children that he may not get still have their share.
        first = self.child_begin[node].astype(np.int64)
        count = self.child_begin[node + 1] - first
        row, child = np.repeat(np.arange(len(node)), count), ragged_arange(first, count)
        allowed = self._allowed(user[row], child)
        if self.scoring.masked_softmax and not self.scoring.renormalise:
            logprob = self._logprob(logits, read, row, child)[allowed]
            row, child = row[allowed], child[allowed]
        else:
            row, child = row[allowed], child[allowed]
            logprob = self._logprob(logits, read, row, child)
        if not np.isfinite(logprob).all():
            raise UsageError(
                "the model's logits are NaN or infinite: check its weights, or run it in float32"
            )

        # What prior and guidance add; a child without guidance mass is no candidate.
        bonus = np.zeros_like(logprob)
        if self.scoring.prior is not None:
            bonus += self.scoring.prior[child]
        if self.per_user.guidance is not None:
            edges = user[row], node[row], child
            bonus += self.per_user.guidance.increments(*map(torch.from_numpy, edges)).numpy()
            possible = bonus > -np.inf
            row, child = row[possible], child[possible]
            logprob, bonus = logprob[possible], bonus[possible]

        count = np.bincount(row, minlength=len(node))
        self.first_edge.append(self.child.size + count.cumsum() - count)
        self.num_edges.append(count)
        self._append_edges(child, row + self.user.size, logprob, bonus)
        self.user.append(user)
        self.chain.append(chain)
        self.ahead.append(ahead)

    def _append_edges(
        self, child: np.ndarray, above: np.ndarray, logprob: np.ndarray, bonus: np.ndarray
    ) -> None:
        """Add edges whose children are not expanded; all arguments (E,)."""
        self.child.append(child)
        self.above.append(above)
        self.below.append(np.full(len(child), -1))
        self.logprob.append(logprob)
        self.bonus.append(bonus)

    def _allowed(self, user: np.ndarray, child: np.ndarray) -> np.ndarray:
        """Return whether the users (E,) may get an item at or below the nodes (E,), bool (E,)."""
        if self.per_user.item_filter is None:
            return np.ones(len(child), bool)
        allowed: np.ndarray = self.per_user.item_filter.allows(
            torch.from_numpy(user), torch.from_numpy(child)
        ).numpy()
        return allowed

    def _logprob(
        self, logits: torch.Tensor, read: np.ndarray, row: np.ndarray, child: np.ndarray
    ) -> np.ndarray:
        """Return log p of the edges from node `row` (E,) to `child` (E,), float32 (E,).

        It is 0 behind a node without logits. This is the pass's only read of the device.

        Args:
            logits, read: see `_append_expanded`.
            row: int64 (E,), ascending, places among the nodes.
            child: int64 (E,), trie nodes.
        """
        logprob = np.zeros(len(row), np.float32)
        if not len(read):
            return logprob
        place = np.searchsorted(read, row)
        known = read[np.minimum(place, len(read) - 1)] == row
        softmax = masked_logprob if self.scoring.masked_softmax else full_logprob
        rows = torch.from_numpy(place[known])
        columns = torch.from_numpy(self.column[child[known]].astype(np.int64))
        found = softmax(logits, rows, columns, self.scoring.temperature)
        logprob[known] = found.cpu().numpy()
        return logprob


def full_logprob(
    logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log softmax(logits / T) over the vocabulary, at (row, token), float32 (E,).

    The function works on blocks of rows whose memory is used again: fresh memory for all rows at
    once costs more than the arithmetic. It calls log_softmax instead of computing logit −
    logsumexp, because that is one fused pass and is rounded like Hugging Face's scores.

    Args:
        logits: (X, V), in the model's dtype.
        row: int64 (E,), ascending, on the CPU.
        token: int64 (E,), on the CPU.
        temperature: T.
    """
    block = CPU_BLOCK if logits.device.type == "cpu" else DEVICE_BLOCK
    rows = max(1, block // logits.shape[1])
    cuts = torch.searchsorted(row, torch.arange(0, len(logits) + rows, rows)).tolist()
    row, token = torch.stack([row % rows, token]).to(logits.device).unbind(0)

    logprob = []
    for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
        part = logits[number * rows : (number + 1) * rows]
        if temperature != 1:
            part = part.float() / temperature
        part = torch.log_softmax(part, dim=-1, dtype=torch.float32)
        logprob.append(part[row[begin:end], token[begin:end]])
    return torch.cat(logprob)


def masked_logprob(
    logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return log softmax(logits / T) over the tokens of each row alone, float32 (E,) (MSL).

    The arguments are those of `full_logprob`.
    """
    row, token = torch.stack([row, token]).to(logits.device).unbind(0)
    wanted = logits[row, token].float() / temperature
    highest = wanted.new_full((len(logits),), -torch.inf)
    highest = highest.scatter_reduce(0, row, wanted, "amax")
    mass = wanted.new_zeros(len(logits)).scatter_add(0, row, (wanted - highest[row]).exp())
    return wanted - highest[row] - mass.log()[row]
