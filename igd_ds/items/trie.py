"""The token trie of a catalogue, as flat arrays (IGD 3.1).

Letters in shapes: N items, T tokens of all paths together, M nodes (the root included).

Building sorts the paths once; everything else is one pass per level over the items whose paths
reach that level. The work is O(T). The memory is the arrays themselves and a few arrays of length
N: there is no Python object per node. (`a.take(i)` equals `a[i]` and was measured to be two to
three times as fast on int32.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from igd_ds.errors import UsageError


@dataclass(frozen=True)
class TokenTrie:
    """All item paths as a prefix tree, cold items included; items with equal paths share a leaf.

    A cold item is not the target of any training row. Nodes are numbered breadth-first, every
    level in the lexicographic order of the paths; node 0 is the root. Edge e leads into node e, so
    every array over edges is indexed by the child node, and its entry 0 has no meaning.

    Example:
        Paths 3 1 and 3 2 1 (1 is EOS): node 1 is "3", node 2 is "3 1" (a leaf), node 3 is "3 2".

        >>> trie = TokenTrie.build(token_ids, offsets, counts=np.array([4, 6]))
        >>> trie.parent.tolist(), trie.train_count.tolist()
        ([-1, 0, 1, 1, 3], [10, 10, 4, 6, 6])
    """

    token: np.ndarray
    """int32 (M,): the token on the edge into the node; −1 at the root."""
    parent: np.ndarray
    """int32 (M,): −1 at the root."""
    child_begin: np.ndarray
    """int32 (M+1,): the children of node n are child_begin[n] … child_begin[n+1] − 1, in ascending
    order of their tokens."""
    depth: np.ndarray
    """uint16 (M,): number of tokens on the path from the root; 0 at the root."""
    num_items: np.ndarray
    """int32 (M,): number of items under the node. Each item of a shared leaf is counted."""
    train_count: np.ndarray
    """int32 (M,), int64 where the total needs it: number of training targets under the node."""
    first_item: np.ndarray
    """int32 (M,): items under node n: item_order[first_item[n] : first_item[n] + num_items[n]]."""
    item_order: np.ndarray
    """int32 (N,): item ids in the lexicographic order of their paths, equal paths in id order."""
    leaf_of_item: np.ndarray
    """int32 (N,): the node in which an item's path ends."""
    item_count: np.ndarray
    """int64 (N,): training targets of each item, as given to `build`. (A shared leaf has only the
    sum.)"""

    @property
    def num_nodes(self) -> int:
        """M, the root included."""
        return len(self.token)

    @property
    def is_leaf(self) -> np.ndarray:
        """Bool (M,): whether the node ends an item.

        Leaves have no children, because EOS is the last token of every path and occurs nowhere
        else.
        """
        return self.child_begin[1:] == self.child_begin[:-1]

    def level_begin(self) -> np.ndarray:
        """Return int64 (levels+1,): depth d has the nodes level_begin[d] … level_begin[d+1] − 1."""
        begin = [0]
        while begin[-1] < self.num_nodes:
            # The next level begins with the first child of this level's first node.
            begin.append(int(self.child_begin[begin[-1]]))
        return np.array(begin)

    @classmethod
    def build(cls, token_ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> TokenTrie:
        """Build the trie of N paths.

        Args:
            token_ids: int32 (T,), the paths one after the other. Each path ends in EOS, which
                occurs nowhere else.
            offsets: int64 (N+1,), the path of item i is token_ids[offsets[i] : offsets[i+1]].
            counts: integers (N,), how often item i is a training target. Counts of equal paths add
                up.

        Raises:
            UsageError: no items, an empty path, ragged arrays that do not fit each other, negative
                counts, EOS inside a path, a path of more than 65,535 tokens, or 2^31 nodes or more.
        """
        _check_paths(token_ids, offsets, counts)

        # Sort the paths. A path adds a node for each token that it does not share with the path
        # before it.
        order = _lexicographic_order(token_ids, offsets)
        begin = offsets[:-1][order]
        length = (offsets[1:][order] - begin).astype(np.int32)
        shared = _shared_prefix(token_ids, begin, length)
        num_nodes = 1 + int(length.sum(dtype=np.int64)) - int(shared.sum(dtype=np.int64))
        if num_nodes >= 2**31:
            raise UsageError(
                f"the trie would have {num_nodes:,} nodes; int32 node ids end at 2^31: split the "
                "catalogue"
            )

        # The count under a node is a difference of this running sum. Integers, so it is exact.
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
        trie.num_items[0] = num_items
        trie.train_count[0] = total
        trie.child_begin[0] = 1
        trie._fill_levels(token_ids, begin, length, shared, running)
        return trie

    def _fill_levels(
        self,
        token_ids: np.ndarray,
        begin: np.ndarray,
        length: np.ndarray,
        shared: np.ndarray,
        running: np.ndarray,
    ) -> None:
        """Write the nodes of depth 1, 2, … from the sorted paths.

        Args:
            token_ids: (T,) tokens of all paths.
            begin, length, shared: (N,) in the order of `item_order`: where each path begins, its
                number of tokens, and how many first tokens it shares with the path before it.
            running: int64 (N+1,), training counts summed up in the same order.
        """
        alive = np.arange(len(length))  # positions in `item_order` of items that reach this depth
        node = np.zeros(len(length), np.int32)  # their nodes one level up
        above, first_node = 0, 1  # where the level above and this level begin

        for depth in range(1, int(length.max()) + 1):
            # An item opens a new node where it leaves the path of the item before it. If that path
            # has already ended, the two share less than its length, so no further look back is
            # needed.
            opens = shared.take(alive) < depth
            opener = np.flatnonzero(opens)
            position = alive.take(opener)
            items = np.diff(opener, append=alive.size)

            # Write this level's nodes, and the children of the level above.
            level = slice(first_node, first_node + opener.size)
            self.token[level] = token_ids.take(begin.take(position) + (depth - 1))
            self.parent[level] = node.take(opener)
            self.depth[level] = depth
            self.first_item[level] = position
            self.num_items[level] = items
            self.train_count[level] = running.take(position + items) - running.take(position)
            children = np.bincount(self.parent[level] - above, minlength=first_node - above)
            self.child_begin[above + 1 : first_node + 1] = first_node + np.cumsum(children)

            # Items whose path ends here get their leaf; the others go on.
            node = np.cumsum(opens, dtype=np.int32)
            node += first_node - 1
            goes_on = length.take(alive) > depth
            ended = np.flatnonzero(~goes_on)
            self.leaf_of_item[self.item_order[alive.take(ended)]] = node.take(ended)
            going = np.flatnonzero(goes_on)
            alive, node = alive.take(going), node.take(going)
            above, first_node = first_node, level.stop

        self.child_begin[above + 1 :] = self.num_nodes

    def path_nodes(self, offsets: np.ndarray) -> np.ndarray:
        """Return the node that each catalogue token leads to, int32 (T,).

        Raises:
            UsageError: `offsets`, int64 (N+1,), is not the array from which the trie was built.
        """
        if len(offsets) != len(self.leaf_of_item) + 1 or np.any(
            np.diff(offsets) != self.depth[self.leaf_of_item].astype(np.int64)
        ):
            raise UsageError("offsets and trie belong to different catalogues: path lengths differ")

        nodes = np.empty(int(offsets[-1]), np.int32)
        at, node = offsets[1:] - 1, self.leaf_of_item
        while node.size:  # from the leaves upwards, one token per turn
            nodes[at] = node
            node = self.parent[node]
            below_root = node > 0
            at, node = at[below_root] - 1, node[below_root]
        return nodes


def _check_paths(token_ids: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> None:
    """Raise UsageError if the arrays are not N paths that end in one EOS, with their counts."""
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
    _check_eos(token_ids, offsets)


def _check_eos(token_ids: np.ndarray, offsets: np.ndarray) -> None:
    """Raise UsageError unless all paths end in the same token, which occurs nowhere else."""
    last = token_ids[offsets[1:] - 1]
    eos = last[0]
    if np.any(last != eos):
        item = int(np.argmax(last != eos))
        raise UsageError(
            f"every path must end in the same EOS token: item 0 ends in {eos}, item {item} in "
            f"{last[item]}"
        )

    is_eos = token_ids == eos
    if np.count_nonzero(is_eos) != len(last):
        is_eos[offsets[1:] - 1] = False
        item = int(np.searchsorted(offsets, np.argmax(is_eos), side="right")) - 1
        raise UsageError(
            f"item {item} holds the EOS token {eos} before its end; EOS may only end a path"
        )


def _lexicographic_order(token_ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the item ids, int64 (N,), sorted by path; equal paths in order of id.

    A round sorts by one int64 key per item: the number of the item's group of ties, followed by as
    many tokens as fit. Only items that are still tied go into the next round. Few real titles are
    still tied after three or four tokens.
    """
    width = int(token_ids.max() + 1).bit_length()
    order = np.arange(len(offsets) - 1)
    tied = order.copy()  # sorted positions that are still tied; a group of ties is contiguous
    group = np.zeros(len(order), np.int64)
    depth = 0

    while tied.size:
        # Build the keys of the tied items.
        items = order[tied]
        at, end = offsets[items], offsets[items + 1]
        at += depth
        key = group
        tokens_per_round = (63 - int(group[-1]).bit_length()) // width
        for _ in range(tokens_per_round):
            key = key << width
            inside = np.flatnonzero(at < end)
            # 0 means that the path has ended. Only equal paths are tied at their end.
            key[inside] += token_ids[at[inside]] + 1
            at += 1

        # Sort them, and keep those whose key equals a neighbour's and whose path goes on.
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
    """Return int32 (N,): how many first tokens each sorted path shares with the path before it."""
    shared = np.zeros(len(begin), np.int32)
    at = np.arange(1, len(begin))
    depth = 0
    while at.size:
        same = token_ids.take(begin.take(at) + depth) == token_ids.take(begin.take(at - 1) + depth)
        at = at[same]
        depth += 1
        shared[at] = depth
        at = at[length[at] > depth]  # paths that are equal up to EOS have both ended
    return shared
