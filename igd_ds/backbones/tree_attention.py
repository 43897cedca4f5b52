"""Attention over a tree of tokens: one pass of packed tokens, each of which sees its own ancestors.

Letters in shapes: B users, T packed tokens of a pass, S slots (cached tokens) of a user, R the most
tokens that one user has in a pass, H query heads, K key heads, G = H / K, D head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Cache

ATTENTION = "igd_tree"
GROWTH = 1.5
"""Factor by which the slots of a cache grow when they run out (an assumption, not tuned)."""


@dataclass(frozen=True)
class SharedTokens:
    """How N tokens of a prompt pass stand for the T tokens of all prompts.

    The tokens of equal prefixes have equal keys, values and outputs. Linear layers compute them
    once; the cache has them for each user, so that whatever follows knows nothing of this.
    """

    node: torch.Tensor
    """int64 (T,), the computed token that stands at each place."""
    first: torch.Tensor
    """int64 (N,), one of the places where each computed token stands."""


@dataclass
class TreePass:
    """Where the T packed tokens of one model pass belong, and what each of them may see.

    A layer asks for the mask of its window. Each distinct mask is made once per pass, not per
    layer.
    """

    column: torch.Tensor
    """int64 (T,), the row of the token's user in the cache."""
    place: torch.Tensor
    """int64 (T,), the token's rank among its user's tokens of this pass, 0 … R − 1."""
    slot: torch.Tensor
    """int64 (T,), where its key and value are stored."""
    position: torch.Tensor
    """int64 (T,), its position behind the beginning of the prompt. With `shared`: (N,)."""
    num_slots: int
    """S."""
    num_places: int
    """R."""
    reach: int
    """Tokens of a user are less than `reach` positions apart: a window of `reach` hides none."""
    mask: torch.Tensor | None
    """bool (B, 1, R, S), whether a token sees a slot; None in the prompt pass, which is causal."""
    slot_position: torch.Tensor | None = None
    """int64 (B, ≥ S), the position of each stored token; needed where `mask` is given."""
    bias: torch.Tensor | None = None
    """(B, H, R, S), T5's relative position bias, −∞ where masked."""
    cross_mask: torch.Tensor | None = None
    """bool (B, 1, 1, encoder tokens), T5 only."""
    shared: SharedTokens | None = None
    """Given in the prompt pass, where N ≤ T tokens are computed."""
    masks: dict[tuple[int | None, int], torch.Tensor] = field(default_factory=dict)
    """The masks made so far, by window and G."""
    windows: set[int] = field(default_factory=set)
    """The windows that layers have asked for in this pass."""

    def at_places(self, computed: torch.Tensor) -> torch.Tensor:
        """Return what was computed for the tokens, (T or N, …), at each of the T places."""
        return computed if self.shared is None else computed[self.shared.node]

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the tokens' part of what is laid out by user, (B, R, …) → (T or N, …)."""
        if self.shared is None:
            return rows[self.column, self.place]
        return rows[self.column[self.shared.first], self.place[self.shared.first]]

    def hides(self, window: int | None) -> bool:
        """Whether a window of this many positions hides a token that full attention would see."""
        return window is not None and window < self.reach

    def mask_of(self, window: int | None, group: int) -> torch.Tensor:
        """Return the mask for layers with this window, bool (B or 1, 1, G·R, S).

        The G query heads that share a key head are rows of one attention: row g·R + r is token r.
        """
        key = (window if self.hides(window) else None, group)
        if key not in self.masks:
            mask = self._seen() if key[0] is None else self._seen() & self._within(key[0])
            self.masks[key] = mask.repeat(1, 1, group, 1) if group > 1 else mask
        return self.masks[key]

    def _seen(self) -> torch.Tensor:
        """Return the mask of full attention, bool (B or 1, 1, R, S)."""
        if self.mask is not None:
            return self.mask
        ones = self.place.new_ones((1, 1, self.num_places, self.num_slots), dtype=torch.bool)
        return ones.tril()

    def _within(self, window: int) -> torch.Tensor:
        """Return which slots are less than `window` positions before, bool (B or 1, 1, R, S)."""
        if self.slot_position is None:
            places = torch.arange(self.num_places, device=self.place.device)
            slots = torch.arange(self.num_slots, device=self.place.device)
            return (places[:, None] - slots < window)[None, None]
        query = self.slot_position.new_zeros((len(self.slot_position), self.num_places))
        query[self.column, self.place] = self.position
        keys = self.slot_position[:, None, : self.num_slots]
        return (query[:, :, None] - keys < window)[:, None]


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    tree: TreePass,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from packed tokens (1, H, T, D) to the keys (B, K, S, D) of their users.

    Linear layers see the packed tokens, so users with few new tokens cost little. Only here are the
    tokens laid out by user, (B, R). Registered with transformers, which calls it in each layer.

    Args:
        module: The attention layer.
        query: Packed queries.
        key: All keys of the users, as TreeCache returns them.
        value: All values, (B, K, S, D').
        attention_mask: Always None: transformers makes no mask for this kernel.
        scaling: Factor of q·k; None: 1 / √D.
        sliding_window: A token sees the tokens less than this many positions before it; None: all.
        softcap: Scores x become softcap · tanh(x / softcap) (Gemma 2).
        s_aux: (H,), a score per head that takes part in the softmax and has no value (gpt-oss).
        tree: Where the tokens belong.
        options: Settings of transformers that mean nothing here.
    """
    (num_users, num_keys), heads, width = key.shape[:2], query.shape[1], query.shape[3]
    group = heads // num_keys
    rows = query.new_zeros((num_users, tree.num_places, heads, width))
    rows[tree.column, tree.place] = tree.at_places(query[0].transpose(0, 1))

    if sliding_window is not None:
        tree.windows.add(sliding_window)
    is_plain = softcap is None and s_aux is None
    if tree.mask is None and is_plain and not tree.hides(sliding_window):
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        seen = F.scaled_dot_product_attention(
            rows.transpose(1, 2), key, value, is_causal=True, scale=scaling
        )
        return tree.packed(seen.transpose(1, 2))[None], None

    # The G query heads of a key head become rows of one attention, so that no key is copied.
    rows = (
        rows.view(num_users, tree.num_places, num_keys, group, width)
        .permute(0, 2, 3, 1, 4)
        .flatten(2, 3)
    )
    if tree.cross_mask is not None and not module.is_causal:
        mask = tree.cross_mask
    elif tree.bias is not None:
        mask = tree.bias
    else:
        mask = tree.mask_of(sliding_window, group)

    if is_plain:
        seen = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
    else:
        seen = attend_eagerly(rows, key, value, mask, scaling, softcap, s_aux)
    seen = seen.unflatten(2, (group, tree.num_places)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return tree.packed(seen)[None], None


def attend_eagerly(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend with soft-capped scores or sinks, which torch's kernels do not have; softmax in fp32.

    Args:
        rows: (B, K, G·R, D), queries.
        key: (B, K, S, D).
        value: (B, K, S, D').
        mask: bool, broadcasts to (B, K, G·R, S).
        scaling: Factor of q·k; None: 1 / √D.
        softcap: Bound of the scores.
        sinks: (H,), scores without a value.
        dropout: Of the attention weights.
    """
    scores = rows @ key.transpose(2, 3) * (rows.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float().masked_fill(~mask, -torch.inf)

    if sinks is not None:
        num_keys, num_rows = rows.shape[1], rows.shape[2]
        per_key = sinks.float().view(num_keys, -1)
        per_row = per_key.repeat_interleave(num_rows // per_key.shape[1], dim=1)
        scores = torch.cat([scores, per_row[None, :, :, None].expand(len(rows), -1, -1, 1)], dim=3)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights.to(value.dtype) @ value


AttentionInterface.register(ATTENTION, tree_attention)


class TreeCache(Cache):
    """Keys and values of B users, (B, S, K, D) per layer. New ones are written in place.

    Nothing is ever re-ordered: hypotheses that share a prefix share its slots.
    """

    def __init__(self, num_users: int) -> None:
        super().__init__(layers=[])
        self.num_users = num_users
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.next: TreePass | None = None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: object,
        **__: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store those of the packed tokens, (1, K, T, D), where the pass `next` says.

        Returns:
            Views of all keys and values, (B, K, S, D).
        """
        return (
            self._store(self.keys, key_states, layer_idx),
            self._store(self.values, value_states, layer_idx),
        )

    def _store(
        self, all_layers: list[torch.Tensor], new: torch.Tensor, layer_idx: int
    ) -> torch.Tensor:
        step = self.next
        assert step is not None, "set `next` before each pass"
        if layer_idx == len(all_layers):
            shape = (self.num_users, step.num_slots, new.shape[1], new.shape[3])
            all_layers.append(new.new_zeros(shape))

        layer = all_layers[layer_idx]
        if step.num_slots > layer.shape[1]:
            room = max(step.num_slots, int(GROWTH * layer.shape[1])) - layer.shape[1]
            layer = all_layers[layer_idx] = F.pad(layer, (0, 0, 0, 0, 0, room))
        layer[step.column, step.slot] = step.at_places(new[0].transpose(0, 1))
        return layer[:, : step.num_slots].transpose(1, 2)

    def get_seq_length(self, *_: object) -> int:
        """Return 0: positions are given to the model, so nothing depends on the answer."""
        return 0

    def retain(self, columns: torch.Tensor) -> None:
        """Keep only the users of these rows."""
        self.num_users = len(columns)
        for all_layers in (self.keys, self.values):
            all_layers[:] = [layer[columns] for layer in all_layers]


@contextlib.contextmanager
def attention_by(config: Any, kernel: str) -> Iterator[None]:
    """Let a model with this configuration attend by a registered kernel for a while.

    Transformers looks the kernel's name up in the configuration at each call.
    """
    usual = config._attn_implementation
    config._attn_implementation = kernel
    try:
        yield
    finally:
        config._attn_implementation = usual


def attention_in_recomputation(config: Any) -> tuple[Any, Any]:
    """Return the contexts of a checkpointed layer's two passes (torch's `context_fn`).

    The backward pass runs after `attention_by` has ended, and must recompute the layer with the
    kernel of the forward pass.
    """
    return contextlib.nullcontext(), attention_by(config, config._attn_implementation)
