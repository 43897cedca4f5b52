"""Attention over a row tree in training: node q sees node k exactly if k <= q < end[k].

On a CPU, blocks of nodes that follow each other attend to the ancestors of their first node and to
themselves: the cost grows with N · (depth + block) and not with N². On CUDA, FlexAttention skips
blocks that see nothing of each other.

Letters in shapes: N nodes, C blocks, Q nodes of a block, P the most ancestors that a block's first
node has, H query heads, K key heads, G = H / K, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from igd_ds.backbones.tree_attention import attend_eagerly
from igd_ds.contracts import RowTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ROW_TREE_ATTENTION = "igd_row_tree"
BLOCK = 64
"""Nodes of a block on a CPU. Measured there (665 nodes, 9 query and 3 key heads of width 64,
float32, forward and backward): 29 ms with 64, 39 with 128, 41 with 256, 69 without blocks."""

FLEX_BLOCK = 128
"""Nodes of a block of FlexAttention, its own default."""


@dataclass(frozen=True)
class NodeBlocks:
    """The nodes of a tree in blocks, and the nodes that each block has to look at."""

    query: torch.Tensor
    """int64 (C, Q), the nodes; the last block is filled with its last node."""
    key: torch.Tensor
    """int64 (C, P + Q): the ancestors of the first node, then the block; N is padding."""

    @classmethod
    def build(cls, tree: RowTree, size: int) -> NodeBlocks:
        """Cut the nodes into blocks of `size`; a small tree is one block."""
        device, num_nodes = tree.end.device, len(tree.end)
        size = min(size, num_nodes)
        first = torch.arange(0, num_nodes, size, device=device)
        own = first[:, None] + torch.arange(size, device=device)

        # The ancestor of depth d stands in column d. They are all before their descendant.
        nodes = torch.arange(num_nodes, device=device)
        is_above = (nodes < first[:, None]) & (tree.end > first[:, None])
        block, above = is_above.nonzero(as_tuple=True)
        depth = int(tree.position[first].max())
        ancestors = torch.full((len(first), depth), num_nodes, device=device)
        ancestors[block, tree.position[above]] = above
        inside = own.clamp(max=num_nodes - 1)
        return cls(inside, torch.cat([ancestors, own.clamp(max=num_nodes)], dim=1))

    def mask(self, tree: RowTree, window: int | None) -> torch.Tensor:
        """Return which keys a node sees, bool (C, 1, Q, P + Q).

        Args:
            tree: the tree that the blocks were made of.
            window: a node sees its ancestors less than this many positions before it; None: all.
        """
        query, key = self.query[:, :, None], self.key[:, None, :]
        end = F.pad(tree.end, (0, 1))[key]
        seen = (key <= query) & (query < end)
        if window is not None:
            position = F.pad(tree.position, (0, 1))
            seen &= position[query] - position[key] < window
        return seen[:, None]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """Return the keys or values (1, K, N, D) that each block looks at, (C, K, P + Q, D)."""
        num_nodes = states.shape[2]
        place = self.key.clamp(max=num_nodes - 1).flatten()
        return states[0].index_select(1, place).unflatten(1, self.key.shape).transpose(0, 1)


@dataclass
class RowTreePass:
    """One forward pass over a row tree. Masks are made once per window, not once per layer."""

    tree: RowTree
    blocks: NodeBlocks | None = None
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    """Masks of the blocks by window and by query heads of a key head."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """FlexAttention's masks by window."""

    def node_blocks(self) -> NodeBlocks:
        """Return the blocks of the tree."""
        if self.blocks is None:
            self.blocks = NodeBlocks.build(self.tree, BLOCK)
        return self.blocks

    def mask_of(self, window: int | None, group: int) -> torch.Tensor:
        """Return the mask of the blocks for layers with this window, bool (C, 1, G·Q, P + Q).

        The G query heads that share a key head are rows of one attention: row g·Q + q is node q.
        """
        if (window, group) not in self.masks:
            mask = self.node_blocks().mask(self.tree, window)
            self.masks[window, group] = mask.repeat(1, 1, group, 1)
        return self.masks[window, group]

    def block_mask_of(self, window: int | None) -> BlockMask:
        """Return FlexAttention's mask for layers with this window."""
        if window not in self.block_masks:
            self.block_masks[window] = flex_block_mask(self.tree, window)
        return self.block_masks[window]


def row_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    tree: RowTreePass,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within a tree; registered with transformers, which calls it in each layer.

    Args:
        module: The attention layer.
        query: (1, H, N, D).
        key: (1, K, N, D).
        value: (1, K, N, D').
        attention_mask: Always None: transformers makes no mask for this kernel.
        dropout: Of the attention weights.
        scaling: Factor of q·k; None: 1 / √D.
        sliding_window: A node sees its ancestors less than this many positions before it; None:
            all.
        softcap: Scores x become softcap · tanh(x / softcap) (Gemma 2).
        s_aux: (H,), a score per head that takes part in the softmax and has no value (gpt-oss).
        tree: The tree.
        options: Settings of transformers that mean nothing here.

    Returns:
        (1, N, H, D'), and None in place of attention weights.
    """
    if query.is_cuda and not dropout and has_flex_attention():
        from transformers.integrations.flex_attention import flex_attention_forward

        block_mask = tree.block_mask_of(sliding_window)
        settings = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux}
        return flex_attention_forward(module, query, key, value, block_mask, **settings)[0], None

    num_nodes, num_keys, dtype = query.shape[2], key.shape[1], query.dtype
    blocks, group = tree.node_blocks(), query.shape[1] // num_keys
    seen = tree.mask_of(sliding_window, group)
    if query.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        # torch's CPU kernel is slower in half precision, above all backwards (torch 2.13, a Xeon
        # with AMX).
        query, key, value = query.float(), key.float(), value.float()

    # Each block of queries, and what it looks at.
    query = query[0].index_select(1, blocks.query.flatten())
    query = query.unflatten(1, blocks.query.shape).transpose(0, 1)
    key, value = blocks.gather(key), blocks.gather(value)

    # The G query heads that share a key head are rows of one attention.
    size = query.shape[2]
    rows = query.unflatten(1, (num_keys, group)).flatten(2, 3)
    if softcap is None and s_aux is None:
        result = F.scaled_dot_product_attention(rows, key, value, seen, dropout, scale=scaling)
    else:
        result = attend_eagerly(rows, key, value, seen, scaling, softcap, s_aux, dropout)
    result = result.unflatten(2, (group, size)).flatten(1, 2).transpose(1, 2)
    return result.flatten(0, 1)[None, :num_nodes].to(dtype), None


AttentionInterface.register(ROW_TREE_ATTENTION, row_tree_attention)


def has_flex_attention() -> bool:
    """Whether this torch has FlexAttention for training (torch ≥ 2.6)."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


def flex_block_mask(tree: RowTree, window: int | None) -> BlockMask:
    """Return FlexAttention's mask of a tree, without ever making an (N, N) mask.

    A block of queries sees something of an earlier block of keys exactly if one of these subtrees
    ends behind the first query. It sees everything if all of them end behind the last query, and no
    window hides a key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_nodes = len(tree.end)
    num_blocks = -(-num_nodes // FLEX_BLOCK)
    fill = (0, num_blocks * FLEX_BLOCK - num_nodes)
    # Where the last block is filled up, nothing is seen: filler nodes end before they begin.
    end, position = F.pad(tree.end, fill), F.pad(tree.position, fill)
    by_block = end.view(num_blocks, FLEX_BLOCK)

    block = torch.arange(num_blocks, device=end.device)
    begin = block * FLEX_BLOCK
    is_before = block[None, :] < block[:, None]
    sees_some = is_before & (by_block.amax(1)[None, :] > begin[:, None])
    sees_all = is_before & (by_block.amin(1)[None, :] >= begin[:, None] + FLEX_BLOCK)
    if window is not None:
        sees_all = torch.zeros_like(sees_all)
    partly = (sees_some & ~sees_all) | torch.eye(num_blocks, dtype=torch.bool, device=end.device)

    def mask_mod(
        batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        seen = (k <= q) & (q < end[k])
        if window is not None:
            seen = seen & (position[q] - position[k] < window)
        return seen

    return BlockMask.from_kv_blocks(
        *_listed(partly),
        *_listed(sees_all),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(num_nodes, num_nodes),
    )


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many entries of each row are True, and their columns before the others.

    That is the form of BlockMask: int32 (1, 1, C) and (1, 1, C, C), for one batch and all heads.
    """
    count = blocks.sum(1).int()
    index = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return count[None, None], index[None, None]
