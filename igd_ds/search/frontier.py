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

import torch

from igd_ds.contracts import PromptTree
from igd_ds.errors import UsageError
from igd_ds.items.ragged import ragged_rows
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
    """A one-dimensional tensor to which values are appended; its memory doubles when it is full."""

    def __init__(self, dtype: torch.dtype):
        self.memory = torch.empty(1024, dtype=dtype)
        self.size = 0

    def append(self, values: torch.Tensor) -> None:
        """Add `values` (n,) at the end."""
        end = self.size + len(values)
        if end > len(self.memory):
            larger = self.memory.new_empty(max(end, 2 * len(self.memory)))
            larger[: self.size] = self.values
            self.memory = larger
        self.memory[self.size : end] = values
        self.size = end

    @property
    def values(self) -> torch.Tensor:
        """A view of the values so far."""
        return self.memory[: self.size]


class Frontier:
    """Expanded nodes and the edges below them, as growable flat arrays.

    A trie node of one user is *expanded* when the model has given the logits behind it. Expanded
    node x has the arrays `node` (in the trie), `user`, `chain` (in the prompt tree), `first_edge`
    and `num_edges`: its edges are first_edge[x] … first_edge[x] + num_edges[x] − 1.

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
        passes: int64 (B,), passes through the model in which the user had tokens; the prompt's pass
            is not counted.
        positions: int64 (B,), tokens of the user in these passes.
    """

    def __init__(self, tree: PromptTree, trie: SearchTrie, scoring: Scoring, per_user: PerUser):
        self.tree, self.trie, self.scoring, self.per_user = tree, trie, scoring, per_user
        num_users = len(tree.prompt_logits)

        self.node = GrowableArray(torch.int64)
        self.user = GrowableArray(torch.int64)
        self.chain = GrowableArray(torch.int64)
        self.first_edge = GrowableArray(torch.int64)
        self.num_edges = GrowableArray(torch.int64)

        self.child = GrowableArray(torch.int32)
        self.above = GrowableArray(torch.int32)
        self.below = GrowableArray(torch.int32)
        self.logprob = GrowableArray(torch.float32)
        self.bonus = GrowableArray(torch.float32)

        # n^p of every length comes from one table, so that a score is the same to the bit wherever
        # it is computed.
        lengths = torch.arange(int(trie.longest[0]) + 1, dtype=torch.float64)
        self.length_power = (lengths**scoring.length_penalty).float()
        self.passes = torch.zeros(num_users, dtype=torch.int64)
        self.positions = torch.zeros(num_users, dtype=torch.int64)

        # The users' roots are expanded: the prompts have been read.
        users = torch.arange(num_users)
        nothing = torch.zeros(num_users)
        self._append_edges(torch.zeros_like(users), users, nothing, nothing)
        self._append_expanded(torch.zeros_like(users), users, users, tree.prompt_logits)
        self.below.values[users] = users.int()

    def is_expanded(self, edges: torch.Tensor) -> torch.Tensor:
        """Return whether the child of each edge is expanded, bool, of the shape of `edges`."""
        return self.below.values[edges] >= 0

    def children(self, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the edges that begin where `edges` (R,) end; all of these must be expanded.

        Returns:
            The index in `edges` of each, and the edge, each int64 (E,), in order of index and
            token.
        """
        expanded = self.below.values[edges].long()
        return ragged_rows(self.first_edge.values[expanded], self.num_edges.values[expanded])

    def node_below(self, edges: torch.Tensor) -> torch.Tensor:
        """Return the trie node that each edge leads to, int64, of the shape of `edges`."""
        return self.child.values[edges].long()

    def expand(self, edges: torch.Tensor, pass_positions: int) -> None:
        """Send the children of `edges` and their forced tokens through the model, in one pass.

        Edges for which `pass_positions` tokens are not enough stay unexpanded; earlier edges go
        first. Without edges the model makes an idle pass.

        Args:
            edges: int64 (Q,), whose children are not expanded.
            pass_positions: the most tokens of the pass.
        """
        # A chain is a child and up to LOOKAHEAD forced tokens below it. Take as many chains as fit.
        child = self.node_below(edges)
        length = (1 + self.trie.forced[child].long().clamp(max=LOOKAHEAD)).clamp(max=pass_positions)
        fits = length.cumsum(0) <= pass_positions
        edges, child, length = edges[fits], child[fits], length[fits]
        chain, node = self._chain_nodes(child, length)

        above = self.above.values[edges].long()
        lengths = torch.bincount(chain, minlength=len(edges))
        logits, number = self.tree.extend(
            self.chain.values[above], lengths, self.trie.token[node].long()
        )
        if not len(edges):
            return

        user = self.user.values[above]
        self.passes[user.unique()] += 1
        self.positions += torch.bincount(
            user, weights=lengths.double(), minlength=len(self.positions)
        ).long()

        # Append the expanded nodes and store their numbers at the edges that lead to them.
        begin, first = self.node.size, lengths.cumsum(0) - lengths
        self.below.values[edges] = (begin + first).int()
        self._append_expanded(node, user[chain], number[chain], logits)
        inside = torch.ones_like(chain, dtype=torch.bool)
        inside[first + lengths - 1] = False  # the edges below the last node of a chain stay open
        expanded = begin + inside.nonzero()[:, 0]
        self.below.values[self.first_edge.values[expanded]] = (expanded + 1).int()

    def per_length(self, score: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Return S / n^p, float32, of scores and lengths (any integer type) of one shape."""
        return score / self.length_power[length.long()]

    def increments(self, edges: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return w_d·log p and what prior and guidance add, float32 (E,) (IGD Eq. 8).

        Args:
            edges: int64 (E,).
            weights: float32 (E,), w_d of each.
        """
        return weights * self.logprob.values[edges] + self.bonus.values[edges]

    def _chain_nodes(
        self, child: torch.Tensor, length: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chain and the trie node of each of T tokens, int64 (T,).

        Args:
            child: int64 (Q,), the first node of each chain; the others are only children below it.
            length: int64 (Q,), tokens per chain.
        """
        chain, _ = ragged_rows(torch.zeros_like(length), length)
        node = torch.empty_like(chain)
        first = length.cumsum(0) - length
        for step in range(int(length.max()) if len(length) else 0):
            going = length > step
            child, first, length = child[going], first[going], length[going]
            node[first + step] = child
            child = self.trie.child_begin[child].long()
        return chain, node

    def _append_expanded(
        self, node: torch.Tensor, user: torch.Tensor, chain: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Add expanded nodes and the edges below them.

        Args:
            node, user, chain: int64 (X,).
            logits: (X, V), behind the token of each node.
        """
        # The children that the user may get, with their log-probabilities.
        row, child = self.trie.children(node)
        if self.per_user.item_filter is not None:
            allowed = self.per_user.item_filter.allows(user[row], child)
            row, child = row[allowed], child[allowed]
        logprob = self._logprob(logits, row, self.trie.token[child].long())
        if not torch.isfinite(logprob).all():
            raise UsageError(
                "the model's logits are NaN or infinite: check its weights, or run it in float32"
            )

        # What prior and guidance add; a child without guidance mass is no candidate.
        bonus = torch.zeros_like(logprob)
        if self.scoring.prior is not None:
            bonus += self.scoring.prior[child]
        if self.per_user.guidance is not None:
            bonus += self.per_user.guidance.increments(user[row], node[row], child)
            possible = bonus > -torch.inf
            row, child = row[possible], child[possible]
            logprob, bonus = logprob[possible], bonus[possible]

        count = torch.bincount(row, minlength=len(node))
        self.first_edge.append(self.child.size + count.cumsum(0) - count)
        self.num_edges.append(count)
        self._append_edges(child, row + self.node.size, logprob, bonus)
        self.node.append(node)
        self.user.append(user)
        self.chain.append(chain)

    def _append_edges(
        self, child: torch.Tensor, above: torch.Tensor, logprob: torch.Tensor, bonus: torch.Tensor
    ) -> None:
        """Add edges whose children are not expanded; all arguments (E,)."""
        self.child.append(child)
        self.above.append(above)
        self.below.append(torch.full_like(child, -1))
        self.logprob.append(logprob)
        self.bonus.append(bonus)

    def _logprob(
        self, logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Return log p of `token` (E,) behind row `row` (E,) of `logits` (X, V), float32 (E,)."""
        softmax = masked_logprob if self.scoring.masked_softmax else full_logprob
        return softmax(logits, row, token, self.scoring.temperature).cpu()


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
