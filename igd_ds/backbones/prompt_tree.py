"""One prompt, many hypotheses: a prompt is cached once, the searched tokens are a tree behind it.

Letters in shapes: B users, P prompt tokens, Q runs, T tokens of one pass, S slots (cached tokens)
of a user, L longest path, R the most tokens that one user has in a pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from igd_ds.backbones.output_rows import OutputRows
from igd_ds.backbones.tree_attention import (
    ATTENTION,
    SharedTokens,
    TreeCache,
    TreePass,
    attention_by,
)
from igd_ds.errors import UsageError
from igd_ds.items.prefix_tree import PrefixTree
from igd_ds.items.ragged import ragged_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_prompts(prompts: Sequence[np.ndarray]) -> list[int]:
    """Return the lengths of the prompts.

    Raises:
        UsageError: a prompt has no tokens.
    """
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise UsageError(
            f"prompt {lengths.index(0)} of the batch has no tokens: give it at least the frame of "
            "its template"
        )
    return lengths


class CausalPromptTree:
    """The trees of tokens behind B prompts, over a causal LM. It implements `contracts.PromptTree`.

    A token sees its user's prompt, its own ancestors and itself, within the window of each layer.
    The tree does this by masks and positions: hypotheses share prompt and prefixes, and
    log-probabilities equal those of a full forward pass over each path. A pass packs runs of any
    users and depths into (1, T) tokens without padding.

    Which token goes where is computed on the CPU. A pass uploads the result as one array and makes
    its mask from that on the device, which is never read.

    Args:
        model: A causal LM in eval mode whose `Capabilities.tree_search` is true. It may be wrapped
            by PEFT or quantised.
        output_tokens: int64 (V,), ascending: the tokens whose logits are computed; None: all.
    """

    def __init__(self, model: PreTrainedModel, output_tokens: np.ndarray | None = None) -> None:
        assert not model.training, "call model.eval() before searching"
        self.model: Any = model
        self.output_tokens = output_tokens
        self.output_rows = OutputRows(model, output_tokens)
        self.device: torch.device = model.device
        self.prompt_logits: torch.Tensor
        self.cache: TreeCache
        self.longest_prompt: int
        self.slot_position: torch.Tensor | None = (
            None  # int64 (B, ≥ S) on the device; only for models with windows
        )

        # On the CPU.
        self.prompt_length: torch.Tensor  # int64 (B,)
        self.used: torch.Tensor  # int64 (B,), slots in use, by row of the cache
        self.column_of_user: torch.Tensor  # int64 (B,), the user's row of the cache; −1: retired
        self.run_user: torch.Tensor  # int64 (runs,)
        self.run_path: (
            torch.Tensor
        )  # int64 (runs, L), slots from the prompt to the run's end, then −1

    @torch.no_grad()
    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Start new trees: read each prompt (integer token ids, (P,)) once.

        Beginnings that prompts have in common, such as the frame of a template, go through the
        model once for all of them.

        Returns:
            Logits of the first token behind each prompt, (B, V) in the model's dtype.

        Raises:
            UsageError: a prompt has no tokens.
        """
        self._start(check_prompts(prompts))
        self.prompt_logits = self._prompt_pass(PrefixTree.build(prompts))
        return self.prompt_logits

    def _start(self, lengths: list[int]) -> None:
        """Forget all earlier trees; there is one run per prompt."""
        num_users = len(lengths)
        self.cache = TreeCache(num_users)
        self.longest_prompt = max(lengths)
        self.prompt_length = torch.tensor(lengths)
        self.used = self.prompt_length.clone()
        self.column_of_user = torch.arange(num_users)
        self.run_user = self.column_of_user.clone()
        self.run_path = torch.full((num_users, 0), -1)
        self.slot_position = None

    def _prompt_pass(self, tree: PrefixTree) -> torch.Tensor:
        """Send the prompts' N different tokens through the model, packed; return logits (B, V)."""
        column, place = ragged_rows(torch.zeros_like(self.prompt_length), self.prompt_length)
        node_at = tree.node[tree.filled]  # place by place, user by user
        first_place = np.unique(node_at, return_index=True)[1]
        last_node = node_at[self.prompt_length.cumsum(0).numpy() - 1]

        def upload(*arrays: np.ndarray) -> tuple[torch.Tensor, ...]:
            return torch.from_numpy(np.stack(arrays)).to(self.device).unbind(0)

        node, column, place = upload(node_at, column.numpy(), place.numpy())
        token, position, first = upload(tree.token, tree.position, first_place)
        longest, shared = self.longest_prompt, SharedTokens(node, first)
        step = TreePass(
            column, place, place, position, longest, longest, longest, mask=None, shared=shared
        )
        logits = self._forward(token, step, *upload(last_node))

        if step.windows:
            positions = torch.arange(longest, device=self.device)
            self.slot_position = positions.repeat(len(self.prompt_length), 1)
        return logits

    @torch.no_grad()
    def extend(
        self,
        parent: torch.Tensor,
        length: torch.Tensor,
        tokens: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append Q runs and send their T tokens through the model in one pass.

        With Q = 0 the model still makes its pass, whose result is thrown away: under ZeRO-3 every
        rank has to take part.

        Args:
            parent: (Q,) int64, the earlier run under whose last token each new run begins.
            length: (Q,) int64, tokens per run, at least 1.
            tokens: (T,) int64, the runs' tokens one after the other.
            keep: (n,) int64, the places in `tokens` behind which logits are wanted; None: all T.

        Returns:
            Logits behind each of these tokens, (n, V), and the new runs' numbers, (Q,).
        """
        if not len(parent):
            idle = (self.column_of_user >= 0).nonzero()[:1, 0]
            logits, run = self.extend(idle, torch.ones_like(idle), torch.zeros_like(idle))
            return logits[:0], run[:0]

        tokens, step, numbers = self._append(parent, length, tokens)
        places = slice(None) if keep is None else keep.to(self.device)
        return self._forward(tokens, step, places), numbers

    def _append(
        self, parent: torch.Tensor, length: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, TreePass, torch.Tensor]:
        """Give T new tokens slots and positions.

        Returns:
            The tokens on the device, their pass, and the new runs' numbers.
        """
        run, offset = ragged_rows(torch.zeros_like(length), length)
        column = self.column_of_user[self.run_user[parent]][run]

        # Slots: a user's new tokens follow each other, in the order of `tokens`.
        order = column.argsort(stable=True)
        count = torch.bincount(column, minlength=len(self.used))
        place = torch.empty_like(order)
        place[order] = torch.arange(len(tokens)) - (count.cumsum(0) - count)[column[order]]
        slot = self.used[column] + place
        prompt = self.prompt_length[column]
        above = self.run_path[parent]
        depth = (above >= 0).sum(1)
        position = prompt + depth[run] + offset
        self.used += count
        num_slots, num_places = int(self.used.max()), int(count.max())

        # The runs and the slots of their paths.
        numbers = torch.arange(len(parent)) + len(self.run_user)
        self.run_user = torch.cat([self.run_user, self.run_user[parent]])
        width = int((depth + length).max())
        self.run_path = F.pad(self.run_path, (0, max(0, width - self.run_path.shape[1])), value=-1)
        new_path = self.run_path[parent]
        new_path[run, depth[run] + offset] = slot
        self.run_path = torch.cat([self.run_path, new_path])

        # One array goes to the device. Where a path above a run is shorter, it is filled up with
        # the token's own slot.
        path = above[run].T
        path = torch.where(path >= 0, path, slot)
        columns = torch.stack([tokens, column, place, slot, position, slot - offset, prompt])
        uploaded = torch.cat([columns, path]).to(self.device)
        tokens, column, place, slot, position, first, prompt = uploaded[:7].unbind(0)

        # A token sees its user's prompt, its ancestors in earlier runs, and its own run up to
        # itself.
        slots = torch.arange(num_slots, device=self.device)
        own = (slots >= first[:, None]) & (slots <= slot[:, None])
        seen = own | (slots < prompt[:, None])
        seen.scatter_(1, uploaded[7:].T, True)
        mask = seen.new_zeros((len(self.used), 1, num_places, num_slots))
        mask[..., 0] = True  # rows that nobody reads still need something to see
        mask[column, 0, place] = seen

        if self.slot_position is not None:
            self._note_positions(column, slot, position, num_slots)
        reach = self.longest_prompt + width
        step = TreePass(
            column, place, slot, position, num_slots, num_places, reach, mask, self.slot_position
        )
        return tokens, step, numbers

    def _note_positions(
        self, column: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, num_slots: int
    ) -> None:
        """Store the positions of new tokens, for masks of windows."""
        assert self.slot_position is not None
        room = max(0, num_slots - self.slot_position.shape[1])
        self.slot_position = F.pad(self.slot_position, (0, room))
        self.slot_position[column, slot] = position

    def _forward(
        self, tokens: torch.Tensor, step: TreePass, keep: torch.Tensor | slice
    ) -> torch.Tensor:
        """Run one pass; `keep` are the packed places whose logits are returned."""
        self.cache.next = step
        with attention_by(self.model.config, ATTENTION), self.output_rows.alone():
            output = self.model(
                input_ids=tokens[None],
                position_ids=step.position[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep if isinstance(keep, torch.Tensor) else 0,
                tree=step,
            )
        return self.output_rows.of(output.logits[0])

    def retain(self, users: torch.Tensor) -> None:
        """Free the caches of all users but these (ascending). The others get no more tokens."""
        columns = self.column_of_user[users]
        self.prompt_length = self.prompt_length[columns]
        self.used = self.used[columns]
        self.column_of_user = torch.full_like(self.column_of_user, -1)
        self.column_of_user[users] = torch.arange(len(users))

        columns = columns.to(self.device)
        self.cache.retain(columns)
        if self.slot_position is not None:
            self.slot_position = self.slot_position[columns]
