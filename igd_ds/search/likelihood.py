"""The log-probability of a given item: what the model thinks of the target of a row.

Letters in shapes: B users, n tokens of all their paths, T tokens sent, E edges, V vocabulary.
"""

import numpy as np
import torch

from igd_ds.contracts import PromptTree
from igd_ds.items.ragged import index_within
from igd_ds.items.search_trie import SearchTrie
from igd_ds.search.frontier import full_logprob, masked_logprob
from igd_ds.search.scoring import Scoring


def leaf_logprobs(
    tree: PromptTree,
    trie: SearchTrie,
    scoring: Scoring,
    leaves: np.ndarray,
    pass_positions: int,
) -> torch.Tensor:
    """Return Σ_t log p(y_t) of one leaf per prompt, in nats, float32 (B,) on the CPU.

    Softmax and temperature are those of `scoring`; α, length penalty and prior do not count. The
    paths of as many users as fit go through the model in one pass.

    Args:
        tree: a prompt tree after `prefill` of B prompts. It may be searched afterwards.
        trie: the catalogue's trie, on the CPU.
        scoring: which softmax, at which temperature.
        leaves: int (B,), leaves of the trie.
        pass_positions: the most tokens of a pass, which bounds its memory; one path fits always.
    """
    depth = trie.depth.numpy().astype(np.int64)[leaves]
    begin = depth.cumsum() - depth
    group = begin // max(1, pass_positions - int(depth.max(initial=0)) + 1)
    users = np.split(np.arange(len(leaves)), np.flatnonzero(np.diff(group)) + 1)
    return torch.cat([_in_one_pass(tree, trie, scoring, some, leaves[some]) for some in users])


def _in_one_pass(
    tree: PromptTree, trie: SearchTrie, scoring: Scoring, users: np.ndarray, leaves: np.ndarray
) -> torch.Tensor:
    """Return the log-probabilities of `leaves` (G,) behind the prompts of `users` (G,)."""
    # The nodes of all paths, one path after the other, each from its first token to its leaf.
    depth = trie.depth.numpy().astype(np.int64)[leaves]
    owner = np.repeat(np.arange(len(leaves)), depth)
    offset = index_within(np.append(0, depth.cumsum()))
    above = depth[owner] - 1 - offset
    node = leaves.astype(np.int64)[owner]
    parent = trie.parent.numpy()
    for step in range(depth.max(initial=0)):
        climbing = above > step
        node[climbing] = parent[node[climbing]]

    # Every token but the last of a path is sent; the logits behind a prompt are known.
    sent, length = above > 0, depth - 1
    longer = length > 0
    tokens = trie.token.numpy()[node[sent]].astype(np.int64)
    logits, _ = tree.extend(*map(torch.from_numpy, (users[longer], length[longer], tokens)))
    logits = torch.cat([tree.prompt_logits[users[0] : users[-1] + 1], logits])

    # The row of logits before each token: its prompt's, or that of the token before it.
    row = np.where(offset == 0, owner, len(leaves) + np.cumsum(sent) - sent - 1)
    token_logprobs = _logprobs(logits, row, node, tree, trie, scoring)
    return torch.zeros(len(leaves)).index_add(0, torch.from_numpy(owner), token_logprobs)


def _logprobs(
    logits: torch.Tensor,
    row: np.ndarray,
    node: np.ndarray,
    tree: PromptTree,
    trie: SearchTrie,
    scoring: Scoring,
) -> torch.Tensor:
    """Return log p of the edges into `node` (n,), given the row (n,) of `logits` before each."""
    order = row.argsort()
    row, node = row[order], node[order]
    token = trie.token.numpy()
    if scoring.masked_softmax:
        place, child = trie.children(trie.parent[torch.from_numpy(node)].long())
        column = token[child.numpy()]
        if tree.output_tokens is not None:
            column = np.searchsorted(tree.output_tokens, column)
        columns = torch.from_numpy(column.astype(np.int64))
        rows = torch.from_numpy(row)[place]
        found = masked_logprob(logits, rows, columns, scoring.temperature).cpu()
        found = found[child == torch.from_numpy(node)[place]]
    else:
        rows, columns = torch.from_numpy(row), torch.from_numpy(token[node].astype(np.int64))
        found = full_logprob(logits, rows, columns, scoring.temperature).cpu()
    logprobs = torch.empty_like(found)
    logprobs[torch.from_numpy(order)] = found
    return logprobs
