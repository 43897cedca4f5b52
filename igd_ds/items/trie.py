"""The token trie of a catalogue, as flat arrays (IGD 3.1).

Letters in shapes: N items, T tokens of all paths, M nodes (the root included).

Building sorts the paths once; everything else is a pass per level over the items that are still that long. The work
is O(T), the memory is the arrays themselves plus a few of length N: no Python object per node. (`a.take(i)` is `a[i]`,
measured two to three times as fast on int32.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from igd_ds.errors import UsageError


@dataclass(frozen=True)
class TokenTrie:
    """All item paths as a prefix tree; cold items (no training target) are in, equal paths share one leaf.

    Nodes are numbered breadth-first, every level in the lexicographic order of the paths; node 0 is the root. Edge e IS
    its child node e, so every per-edge array is indexed by the child and its entry 0 means nothing.
    The arrays are numpy, or torch tensors after `to`.
    """

    token: np.ndarray
    """int32 (M,): the token on the edge into the node; -1 at the root."""
    parent: np.ndarray
    """int32 (M,): -1 at the root."""
    child_begin: np.ndarray
    """int32 (M+1,): the children of n are the nodes child_begin[n] … child_begin[n+1]-1, their tokens ascending."""
    depth: np.ndarray
    """uint16 (M,), int32 as a tensor: tokens on the path; 0 at the root."""
    num_items: np.ndarray
    """int32 (M,): items under the node, each item of a shared leaf counted."""
    train_count: np.ndarray
    """int32 (M,), int64 where the total needs it: training targets under the node."""
    first_item: np.ndarray
    """int32 (M,): the items under n are item_order[first_item[n] : first_item[n] + num_items[n]]."""
    item_order: np.ndarray
    """int32 (N,): item ids in the lexicographic order of their paths, equal paths by id."""
    leaf_of_item: np.ndarray
    """int32 (N,): the node an item's path ends in."""
    item_count: np.ndarray
    """int64 (N,): training targets of each item, as given to `build` (a shared leaf knows only the sum)."""

    @property
    def num_nodes(self) -> int:
        """M, the root included."""
        return len(self.token)

    @property
    def is_leaf(self) -> np.ndarray:
        """Bool (M,): the node ends an item (EOS is a path's last token and only that, so leaves have no children)."""
        return self.child_begin[1:] == self.child_begin[:-1]

    def level_begin(self) -> np.ndarray:
        """int64 (levels+1,): the nodes of depth d are level_begin[d] … level_begin[d+1]-1; level 0 is the root."""
        begin = [0]
        while begin[-1] < self.num_nodes:
            begin.append(
                int(self.child_begin[begin[-1]])
            )  # a level begins where its upper neighbour's children do
        return np.array(begin)

    @classmethod
    def build(cls, token_ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> TokenTrie:
        """Build the trie of N paths.

        Args:
            token_ids: int32 (T,), the paths one after the other; each ends in EOS, which stands nowhere else.
            offsets: int64 (N+1,), item i is token_ids[offsets[i] : offsets[i+1]].
            counts: integers (N,), how often item i is a training target; counts of equal paths add.

        Raises:
            ValueError: no items, an empty path, ragged arrays that do not fit, negative counts, EOS inside a path,
                a path of more than 65,535 tokens, 2^31 nodes or more.
        """
        _check_paths(token_ids, offsets, counts)
        order = _lexicographic_order(token_ids, offsets)
        begin = offsets[:-1][order]
        length = (offsets[1:][order] - begin).astype(np.int32)
        shared = _shared_prefix(token_ids, begin, length)
        num_nodes = 1 + int(length.sum(dtype=np.int64)) - int(shared.sum(dtype=np.int64))
        if num_nodes >= 2**31:
            raise UsageError(
                f"the trie would have {num_nodes:,} nodes; int32 node ids end at 2^31: split the catalogue"
            )
        # Counts under a node are a difference of this running sum: integers, so exact.
        running = np.concatenate(
            [np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64)[order])]
        )
        total, num_items = int(running[-1]), len(order)
        trie = cls(
            token=np.empty(num_nodes, np.int32),
            parent=np.empty(num_nodes, np.int32),
            child_begin=np.empty(num_nodes + 1, np.int32),
            depth=np.empty(num_nodes, np.uint16),
            num_items=np.empty(num_nodes, np.int32),
            train_count=np.empty(num_nodes, np.int32 if total < 2**31 else np.int64),
            first_item=np.empty(num_nodes, np.int32),
            item_order=order.astype(np.int32),
            leaf_of_item=np.empty(num_items, np.int32),
            item_count=np.asarray(counts),
        )
        trie.token[0] = trie.parent[0] = -1
        trie.depth[0] = trie.first_item[0] = 0
        trie.num_items[0], trie.train_count[0], trie.child_begin[0] = num_items, total, 1
        trie._fill_levels(token_ids, begin, length, shared, running)
        return trie

    def _fill_levels(self, token_ids, begin, length, shared, running) -> None:
        """Write the nodes of depth 1, 2, … from the sorted paths (arrays of length N in `item_order`'s order)."""
        alive = np.arange(len(length))  # sorted positions of the items that reach this depth
        node = np.zeros(len(length), np.int32)  # and their node one level up
        above, first_node = 0, 1
        for depth in range(1, int(length.max()) + 1):
            # An item opens a node where it leaves the path of the item before it. If that one has already ended, the
            # two share less than its length, so the comparison needs no look further back.
            opens = shared.take(alive) < depth
            run = np.flatnonzero(opens)
            position = alive.take(run)
            items = np.diff(run, append=alive.size)
            level = slice(first_node, first_node + run.size)
            self.token[level] = token_ids.take(begin.take(position) + (depth - 1))
            self.parent[level] = node.take(run)
            self.depth[level] = depth
            self.first_item[level] = position
            self.num_items[level] = items
            self.train_count[level] = running.take(position + items) - running.take(position)
            children = np.bincount(self.parent[level] - above, minlength=first_node - above)
            self.child_begin[above + 1 : first_node + 1] = first_node + np.cumsum(children)
            node = np.cumsum(opens, dtype=np.int32)
            node += first_node - 1
            more = length.take(alive) > depth
            ended = np.flatnonzero(~more)
            self.leaf_of_item[self.item_order[alive.take(ended)]] = node.take(ended)
            more = np.flatnonzero(more)
            alive, node = alive.take(more), node.take(more)
            above, first_node = first_node, level.stop
        self.child_begin[above + 1 :] = self.num_nodes

    def path_nodes(self, offsets: np.ndarray) -> np.ndarray:
        """Node of every catalogue token: int32 (T,), laid out like the catalogue's token_ids.

        Raises:
            ValueError: `offsets` (int64 (N+1,)) is not the one the trie was built from.
        """
        if len(offsets) != len(self.leaf_of_item) + 1 or np.any(
            np.diff(offsets) != self.depth[self.leaf_of_item].astype(np.int64)
        ):
            raise UsageError("offsets and trie belong to different catalogues: path lengths differ")
        nodes = np.empty(int(offsets[-1]), np.int32)
        at, node = offsets[1:] - 1, self.leaf_of_item
        while node.size:  # from the leaves up, one token a turn
            nodes[at] = node
            node = self.parent[node]
            below_root = node > 0
            at, node = at[below_root] - 1, node[below_root]
        return nodes

    def to(self, device) -> TokenTrie:
        """Return the same trie with torch tensors on `device` (depth as int32: few kernels take uint16)."""
        import torch  # here, so that building and reading tries needs numpy alone

        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays["depth"] = arrays["depth"].astype(np.int32)
        # np.array copies: a tensor over a read-only memory map would be undefined to write.
        return replace(
            self, **{name: torch.from_numpy(np.array(a)).to(device) for name, a in arrays.items()}
        )


def _check_paths(token_ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> None:
    num_items = len(offsets) - 1
    if num_items < 1:
        raise UsageError("a trie needs at least one item")
    if offsets[0] != 0 or offsets[-1] != len(token_ids):
        raise UsageError(
            f"offsets run from {offsets[0]} to {offsets[-1]}, expected 0 to {len(token_ids)} tokens"
        )
    length = np.diff(offsets)
    if length.min() < 1:
        raise UsageError(f"item {int(length.argmin())} has no token; every path ends in EOS")
    if length.max() > 65_535:
        raise UsageError(
            f"item {int(length.argmax())} has {length.max():,} tokens; at most 65,535 are supported"
        )
    if len(counts) != num_items or np.min(counts) < 0:
        raise UsageError(
            f"counts must be {num_items} numbers >= 0, found {len(counts)}, least {np.min(counts)}"
        )
    if token_ids.min() < 0:
        raise UsageError(f"token ids must be >= 0, found {token_ids.min()}")
    last = token_ids[offsets[1:] - 1]
    eos = last[0]
    if np.any(last != eos):
        item = int(np.argmax(last != eos))
        raise UsageError(
            f"every path must end in the same EOS token: item 0 ends in {eos}, item {item} in {last[item]}"
        )
    if np.count_nonzero(token_ids == eos) != num_items:
        is_eos = token_ids == eos
        is_eos[offsets[1:] - 1] = False
        item = int(np.searchsorted(offsets, np.argmax(is_eos), side="right")) - 1
        raise UsageError(
            f"item {item} holds the EOS token {eos} before its end; EOS may only end a path"
        )


def _lexicographic_order(token_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Item ids (int64 (N,)) sorted by path, equal paths by id.

    Each round sorts by as many tokens as fit into an int64 beside the number of the item's group of ties, and only the
    items that are still tied go into the next: of real titles few are after three or four tokens.
    """
    width = int(token_ids.max() + 1).bit_length()
    order = np.arange(len(offsets) - 1)
    tied = order.copy()  # sorted positions still tied; a group of ties is contiguous
    group = np.zeros(len(order), np.int64)
    depth = 0
    while tied.size:
        items = order[tied]
        at, end = offsets[items], offsets[items + 1]
        at += depth
        key = group
        tokens_per_round = (63 - int(group[-1]).bit_length()) // width
        for _ in range(tokens_per_round):
            key = key << width
            inside = np.flatnonzero(at < end)
            key[inside] += token_ids[at[inside]] + 1  # 0 is "ended"; only equal paths end in a tie
            at += 1
        rank = np.argsort(key, kind="stable")
        order[tied] = items[rank]
        key = key[rank]
        same = key[1:] == key[:-1]
        again = np.zeros(len(key), bool)
        again[1:] = same
        again[:-1] |= same
        again &= (key & ((1 << width) - 1)) != 0
        group = np.zeros(len(key), np.int64)
        np.cumsum(~same, out=group[1:])
        tied, group = tied[again], group[again]
        depth += tokens_per_round
    return order


def _shared_prefix(token_ids: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int32 (N,): how many first tokens each sorted path shares with the one before it; 0 for the first."""
    shared = np.zeros(len(begin), np.int32)
    at = np.arange(1, len(begin))
    depth = 0
    while at.size:
        same = token_ids.take(begin.take(at) + depth) == token_ids.take(begin.take(at - 1) + depth)
        at = at[same]
        depth += 1
        shared[at] = depth
        at = at[length[at] > depth]  # equal up to EOS: both end here
    return shared
