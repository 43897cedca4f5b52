"""The frontier of a batch: the trie nodes that the model has read, and the edges below them.

All searches of a batch (each user at each α, and the exact search after the beam search) read and
extend the same frontier, so no token is sent through the model twice for one user.

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
# needed. A larger number saves passes, and costs positions for hypotheses that are dropped before
# they get that far (measured: docs/search.md).
LOOKAHEAD = 12

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


class Frontier:
    """Expanded nodes and the edges below them, as growable flat arrays.

    A trie node of one user is *expanded* when the model has given the logits behind it. Expanded
    node x has the arrays `user`, `chain` (in the prompt tree), `ahead`, `first_edge` and
    `num_edges`. Its edges are first_edge[x] … first_edge[x] + num_edges[x] − 1. The expanded nodes
    x + 1 … x + ahead[x] follow it in its chain; each of them is the only child of the one before.

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
        self.child_begin = trie.child_begin.numpy()

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
        self.passes = np.zeros(num_users, np.int64)
        self.positions = np.zeros(num_users, np.int64)

        # The users' roots are expanded: the prompts have been read.
        users, nothing = np.arange(num_users), np.zeros(num_users, np.int64)
        self._append_edges(nothing, users, nothing, nothing)
        self._append_expanded(nothing, users, users, nothing, tree.prompt_logits)
        self.below.values[users] = users

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

    def expand(self, edges: np.ndarray, pass_positions: int) -> None:
        """Send the children of `edges` and their forced tokens through the model, in one pass.

        Edges for which `pass_positions` tokens are not enough stay unexpanded; earlier edges go
        first. Without edges the model makes an idle pass.

        Args:
            edges: int64 (Q,), whose children are not expanded.
            pass_positions: the most tokens of the pass.
        """
        # A chain is a child and up to LOOKAHEAD forced tokens below it. Take as many chains as fit.
        child = self.child.values[edges]
        length = 1 + np.minimum(self.forced[child], LOOKAHEAD).astype(np.int64)
        length = np.minimum(length, pass_positions)
        fitting = np.count_nonzero(length.cumsum() <= pass_positions)
        edges, child, length = edges[:fitting], child[:fitting], length[:fitting]
        chain = np.repeat(np.arange(fitting), length)
        offset = index_within(np.append(0, length.cumsum()))
        node = self._chain_nodes(child, length)[offset, chain]

        above = self.above.values[edges]
        arguments = self.chain.values[above], length, self.token[node].astype(np.int64)
        logits, number = self.tree.extend(*(torch.from_numpy(array) for array in arguments))
        if not len(edges):
            return

        user = self.user.values[above]
        self.passes[np.unique(user)] += 1
        user = user[chain]
        self.positions += np.bincount(user, minlength=len(self.positions))

        # Append the expanded nodes and store their numbers at the edges that lead to them.
        begin, ahead = len(self.user.values), length[chain] - 1 - offset
        self.below.values[edges] = begin + length.cumsum() - length
        self._append_expanded(node, user, number.numpy()[chain], ahead, logits)
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

    def _chain_nodes(self, child: np.ndarray, length: np.ndarray) -> np.ndarray:
        """Return the trie nodes of chains, int64 (longest chain, Q); only lengths of them count.

        Args:
            child: (Q,), the first node of each chain; the others are only children below it.
            length: int64 (Q,), tokens per chain.
        """
        node = np.empty((length.max(initial=0), len(child)), np.int64)
        for step in range(len(node)):
            node[step] = child if step == 0 else self.child_begin[node[step - 1]]
        return node

    def _append_expanded(
        self,
        node: np.ndarray,
        user: np.ndarray,
        chain: np.ndarray,
        ahead: np.ndarray,
        logits: torch.Tensor,
    ) -> None:
        """Add expanded nodes and the edges below them.

        Args:
            node, user, chain, ahead: int64 (X,).
            logits: (X, V), behind the token of each node.
        """
        # The children that the user may get, with their log-probabilities.
        first = self.child_begin[node].astype(np.int64)
        count = self.child_begin[node + 1] - first
        row, child = np.repeat(np.arange(len(node)), count), ragged_arange(first, count)
        if self.per_user.item_filter is not None:
            allowed = self.per_user.item_filter.allows(
                torch.from_numpy(user[row]), torch.from_numpy(child)
            ).numpy()
            row, child = row[allowed], child[allowed]
        logprob = self._logprob(logits, row, self.token[child].astype(np.int64))
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

    def _logprob(self, logits: torch.Tensor, row: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Return log p of `token` (E,) behind row `row` (E,) of `logits` (X, V), float32 (E,).

        This is the pass's only read of the device.
        """
        softmax = masked_logprob if self.scoring.masked_softmax else full_logprob
        rows, tokens = torch.from_numpy(row), torch.from_numpy(token)
        return softmax(logits, rows, tokens, self.scoring.temperature).cpu().numpy()


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
