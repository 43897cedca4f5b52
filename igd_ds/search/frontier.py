"""What a batch's searches know so far: the trie nodes whose next-token log-probabilities the model has given, per user.

Every search of a batch (each user at each α, and the exact search after the beam) reads and grows this one tree, so no model row
is ever computed twice.

Letters in shapes: B users, D expanded rows, E edges below them, Q wanted edges, T tokens of a pass, V vocabulary.
"""

import itertools
from dataclasses import dataclass

import torch

from igd_ds.errors import UsageError
from igd_ds.items.search_trie import SearchTrie, ragged
from igd_ds.search.filters import Guidance, ItemFilter
from igd_ds.search.scoring import Scoring

# Forced tokens sent ahead of need: more save passes and cost positions, for beams that die on the way (measured: docs/search.md).
LOOKAHEAD = 12
BLOCK = (
    2**20
)  # logits per block of the softmax: 4 MiB of fp32, which malloc keeps where 16 MiB go back to the system (measured)


@dataclass(frozen=True)
class PerUser:
    """What differs between the users of a batch besides their prompts: which items they may get, and a second scorer.

    With both, the guide should give nothing to items that the filter leaves out: a beam would follow their mass.
    """

    item_filter: ItemFilter | None = None
    guidance: Guidance | None = None


class Growing:
    """A one-dimensional tensor that is appended to; its memory doubles when it is full."""

    def __init__(self, dtype: torch.dtype, device):
        self.memory, self.size = torch.empty(1024, dtype=dtype, device=device), 0

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
        """A view of what is there."""
        return self.memory[: self.size]


class ExpandedTree:
    """Rows (expanded trie nodes of a user) and the edges to their children, as growing flat arrays.

    Row d: `node`, `user`, `run` (of the prompt tree), its edges first_edge[d] … first_edge[d] + num_edges[d] − 1. Edge e:
    `child` node, `logprob` (float32, nats), `owner` row, and `row`, the row of the child or −1 while that is not expanded.
    Children that the user may not get are left out. Edges 0 … B − 1 lead into the roots.
    """

    def __init__(self, tree, trie: SearchTrie, scoring: Scoring, per_user: PerUser):
        self.tree, self.trie, self.scoring, self.per_user = tree, trie, scoring, per_user
        device = tree.prompt_logits.device
        num_users = len(tree.prompt_logits)
        self.node, self.user, self.run, self.first_edge, self.num_edges = (
            Growing(torch.int64, device) for _ in range(5)
        )
        self.child, self.owner, self.row = (Growing(torch.int32, device) for _ in range(3))
        self.logprob, self.bonus = (Growing(torch.float32, device) for _ in range(2))
        # n^p of every length: one table, so that a score is the same wherever it is computed, to the bit.
        lengths = torch.arange(int(trie.longest[0]) + 1, dtype=torch.float64)
        self.length_power = (lengths**scoring.length_penalty).float().to(device)
        self.passes, self.positions = (
            torch.zeros(num_users, dtype=torch.int64, device=device) for _ in range(2)
        )
        users = torch.arange(num_users, device=device)
        nothing = torch.zeros(num_users, device=device)
        self._append_edges(torch.zeros_like(users), users, nothing, nothing)
        self._append_rows(torch.zeros_like(users), users, users, tree.prompt_logits)
        self.row.values[users] = users.int()

    def children(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (index in `rows`, edge), each (E,) int64, of all edges below `rows` (R,), in order of row and token."""
        return ragged(self.first_edge.values[rows], self.num_edges.values[rows])

    def expand(self, edges: torch.Tensor, pass_positions: int) -> None:
        """Send the children of `edges` (Q,) and their forced runs through the model, as many as `pass_positions` tokens allow.

        What does not fit is left unexpanded: earlier edges go first. With Q = 0 an idle pass is made.
        """
        child = self.child.values[edges].long()
        length = (1 + self.trie.forced[child].long().clamp(max=LOOKAHEAD)).clamp(max=pass_positions)
        fits = length.cumsum(0) <= pass_positions
        edges, child, length = edges[fits], child[fits], length[fits]
        run, _ = ragged(torch.zeros_like(length), length)
        first = length.cumsum(0) - length
        node = torch.empty_like(run)
        for step in range(int(length.max()) if len(length) else 0):
            going = length > step
            child, first, length = child[going], first[going], length[going]
            node[first + step] = child
            child = self.trie.child_begin[child].long()
        owner = self.owner.values[edges].long()
        parent = self.run.values[owner]
        lengths = torch.bincount(run, minlength=len(edges))
        logits, number = self.tree.extend(parent, lengths, self.trie.token[node].long())
        if not len(edges):
            return
        user = self.user.values[owner]
        self.passes[user.unique()] += 1
        self.positions += torch.bincount(
            user, weights=lengths.double(), minlength=len(self.positions)
        ).long()
        first_row, first = self.node.size, lengths.cumsum(0) - lengths
        self.row.values[edges] = (first_row + first).int()
        self._append_rows(node, user[run], number[run], logits)
        inside = torch.ones_like(run, dtype=torch.bool)
        inside[first + lengths - 1] = False
        rows = first_row + inside.nonzero()[:, 0]
        self.row.values[self.first_edge.values[rows]] = (rows + 1).int()

    def per_length(self, score: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Return S / n^p, float32, of scores and lengths (any integer type) of one shape."""
        return score / self.length_power[length.long()]

    def increments(self, edges: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return w_d·log p and what prior and guidance add, float32 (E,), of `edges` with these `weights` (E,) (IGD Eq. 8)."""
        return weights * self.logprob.values[edges] + self.bonus.values[edges]

    def _append_rows(self, node, user, run, logits) -> None:
        """Add rows with their edges; logits (D, V) of the token behind each."""
        row, child = self.trie.children(node)
        if self.per_user.item_filter is not None:
            allowed = self.per_user.item_filter.allows(user[row], child)
            row, child = row[allowed], child[allowed]
        logprob = self._logprob(logits, row, self.trie.token[child].long())
        if not torch.isfinite(logprob).all():
            raise UsageError(
                "the model's logits are NaN or infinite: check its weights, or run it in float32"
            )
        bonus = torch.zeros_like(logprob)
        if self.scoring.prior is not None:
            bonus += self.scoring.prior[child]
        if self.per_user.guidance is not None:
            bonus += self.per_user.guidance.increments(user[row], node[row], child)
            possible = bonus > -torch.inf
            row, child, logprob, bonus = (
                row[possible],
                child[possible],
                logprob[possible],
                bonus[possible],
            )
        count = torch.bincount(row, minlength=len(node))
        self.first_edge.append(self.child.size + count.cumsum(0) - count)
        self.num_edges.append(count)
        self._append_edges(child, row + self.node.size, logprob, bonus)
        self.node.append(node)
        self.user.append(user)
        self.run.append(run)

    def _append_edges(self, child, owner, logprob, bonus) -> None:
        self.child.append(child)
        self.owner.append(owner)
        self.row.append(torch.full_like(child, -1))
        self.logprob.append(logprob)
        self.bonus.append(bonus)

    def _logprob(self, logits, row, token) -> torch.Tensor:
        """Return log p, float32 (E,), of `token` (E,) behind `row` (E,), over the full vocabulary or the row's tokens alone."""
        temperature = self.scoring.temperature
        if self.scoring.masked_softmax:
            wanted = logits[row, token].float() / temperature
            highest = wanted.new_full((len(logits),), -torch.inf).scatter_reduce(
                0, row, wanted, "amax"
            )
            mass = wanted.new_zeros(len(logits)).scatter_add(0, row, (wanted - highest[row]).exp())
            return wanted - highest[row] - mass.log()[row]
        # log_softmax rather than logit − logsumexp: one fused pass, and rounded like Hugging Face's scores. In blocks of rows
        # whose memory is used again: fresh memory for all rows at once costs more than the arithmetic.
        rows = max(1, BLOCK // logits.shape[1])
        cuts = torch.searchsorted(
            row, torch.arange(0, len(logits) + rows, rows, device=row.device)
        ).tolist()
        logprob = []
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            block = logits[number * rows : (number + 1) * rows]
            if temperature != 1:
                block = block.float() / temperature
            block = torch.log_softmax(block, dim=-1, dtype=torch.float32)
            logprob.append(block[row[begin:end] - number * rows, token[begin:end]])
        return torch.cat(logprob)
