"""One prompt, many beams: a cache that holds each user's prompt once and the searched tokens as a tree behind it.

Letters in shapes: B users, P prompt tokens, Q runs, T tokens of one pass, S slots (cached tokens) of a user, L longest path,
H heads, G query heads per key head, D head width, R the most tokens that one user has in a pass, V vocabulary.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Cache, DynamicCache, EncoderDecoderCache

from igd_ds.errors import UsageError

ATTENTION = "igd_tree"
GROWTH = 1.5  # of the cache's slots when they run out (assumed)


@dataclass
class TreePass:
    """Where the T packed tokens of one model pass belong, and what each may see.

    column (T,): row of its user in the cache. place (T,): its rank among its user's tokens of this pass, 0 … R − 1. slot (T,):
    where its key and value go. num_slots: S. mask (B, 1, R, S) bool, None in a prompt pass, which is
    plainly causal; the first layer with grouped heads makes it (B, 1, G·R, S) for all.
    bias (B, H, R, S), T5's relative position bias, −inf where masked; cross_mask (B, 1, 1, encoder tokens) bool: T5 alone.
    """

    column: torch.Tensor
    place: torch.Tensor
    slot: torch.Tensor
    num_slots: int
    num_places: int
    mask: torch.Tensor | None
    bias: torch.Tensor | None = None
    cross_mask: torch.Tensor | None = None


def tree_attention(
    module, query, key, value, attention_mask, scaling=None, tree: TreePass | None = None, **options
):
    """Attend from packed tokens (1, H, T, D) to the keys (B, H/G, S, D) of their users; registered with transformers.

    Linear layers see the packed tokens, so that users with few new tokens cost nothing; here alone they are laid out by user,
    (B, R). The G query heads of a key head become rows of one attention, so that no key is copied.
    """
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        raise UsageError(
            f"tree search has no soft-capped logits or attention sinks, which {type(module).__name__} needs"
        )
    (num_users, num_keys), heads, width = key.shape[:2], query.shape[1], query.shape[3]
    rows = query.new_zeros((num_users, tree.num_places, heads, width))
    rows[tree.column, tree.place] = query[0].transpose(0, 1)
    if tree.mask is None:
        key, value = (t.repeat_interleave(heads // num_keys, dim=1) for t in (key, value))
        seen = F.scaled_dot_product_attention(
            rows.transpose(1, 2), key, value, is_causal=True, scale=scaling
        ).transpose(1, 2)
    else:
        mask = tree.mask if tree.bias is None else tree.bias
        if tree.cross_mask is not None and not module.is_causal:
            mask = tree.cross_mask
        group = heads // num_keys
        if group > 1 and mask.shape[2] == tree.num_places:
            mask = tree.mask = mask.repeat(1, 1, group, 1)  # once for all layers
        rows = (
            rows.view(num_users, tree.num_places, num_keys, group, width)
            .permute(0, 2, 3, 1, 4)
            .flatten(2, 3)
        )
        seen = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scaling)
        seen = seen.unflatten(2, (group, tree.num_places)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return seen[tree.column, tree.place][None], None


AttentionInterface.register(ATTENTION, tree_attention)


class TreeCache(Cache):
    """Keys and values of B users, (B, S, H/G, D) per layer; new ones are written in place, never re-ordered."""

    def __init__(self):
        super().__init__(layers=[])
        self.keys, self.values = [], []

    def update(self, key_states, value_states, layer_idx, *_, **__):
        """Store those of the packed tokens (1, H/G, T, D) where `self.next` says; return all users', (B, H/G, S, D) views."""
        step, stored = self.next, []
        for all_layers, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx == len(all_layers):
                shape = (self.num_users, step.num_slots, new.shape[1], new.shape[3])
                all_layers.append(new.new_zeros(shape))
            layer = all_layers[layer_idx]
            if step.num_slots > layer.shape[1]:
                room = max(step.num_slots, int(GROWTH * layer.shape[1])) - layer.shape[1]
                layer = all_layers[layer_idx] = F.pad(layer, (0, 0, 0, 0, 0, room))
            layer[step.column, step.slot] = new[0].transpose(0, 1)
            stored.append(layer[:, : step.num_slots].transpose(1, 2))
        return tuple(stored)

    def get_seq_length(self, *_) -> int:
        """Transformers asks; positions are given to the model, so nobody uses the answer."""
        return 0

    def retain(self, columns: torch.Tensor) -> None:
        """Keep the users of these rows only."""
        self.num_users = len(columns)
        for all_layers in (self.keys, self.values):
            all_layers[:] = [layer[columns] for layer in all_layers]


class PromptTree:
    """Keys and values of B prompts and of the trees of tokens that grow behind them, over any Hugging Face causal LM.

    Tokens come in *runs*: chains of tokens that go through the model together. A run hangs under the last token of an earlier
    run; runs 0 … B − 1 are the prompts. A token sees its user's prompt, its own ancestors and itself, by mask and position. So
    beams share prompt and prefixes, and log-probabilities equal those of a full forward pass over each path. A pass packs runs
    of any users and depths, (1, T) tokens without padding.

    Args:
        model: causal LM in eval mode (PEFT-wrapped or quantised too) whose layers attend through transformers'
            AttentionInterface over full (not sliding) windows: Qwen2, Qwen3, LLaMA and most others.

    Raises:
        ValueError: sliding windows (in `prefill` and `extend`, where one window holds for all layers and a path exceeds it), or a
            model class that does not use the interface.
    """

    def __init__(self, model):
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UsageError(
                f"tree search needs full attention in every layer, found {sorted(kinds)}"
            )
        if not getattr(model, "_supports_attention_backend", True):
            raise UsageError(
                f"tree search needs a model that attends through AttentionInterface; {type(model).__name__} does not"
            )
        assert not model.training, "call model.eval() before searching"
        self.model = model
        # Models without layer_types (Mistral) have one window for all layers, and Qwen2 one that is off by default.
        window = (
            getattr(model.config, "sliding_window", None)
            if getattr(model.config, "use_sliding_window", True)
            else None
        )
        self.window = None if hasattr(model.config, "layer_types") else window

    @torch.no_grad()
    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Start new trees: read each prompt (integer token ids, (P,)) once.

        Returns:
            Logits of the first token behind each prompt, (B, V) in the model's dtype.

        Raises:
            ValueError: a prompt without tokens.
        """
        self._start([len(prompt) for prompt in prompts])
        tokens = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).to(self.device)
        self.prompt_logits = self._prompt_pass(tokens)
        return self.prompt_logits

    def _start(self, lengths: list[int]) -> None:
        if 0 in lengths:
            raise UsageError(
                f"prompt {lengths.index(0)} of the batch has no tokens: give it at least the frame of its template"
            )
        self.device = self.model.device
        num_users = len(lengths)
        self.cache = TreeCache()
        self.cache.num_users = num_users
        self.prompt_length = torch.tensor(lengths, device=self.device)
        self.used = self.prompt_length.clone()  # slots, per row of the cache
        self.column_of_user = torch.arange(num_users, device=self.device)  # −1: retired
        self.run_user = self.column_of_user.clone()
        self.run_path = torch.full(
            (num_users, 0), -1, device=self.device
        )  # slots from the prompt to each run's end, then −1

    def _prompt_pass(self, tokens: torch.Tensor) -> torch.Tensor:
        column = torch.repeat_interleave(self.prompt_length)
        ends = self.prompt_length.cumsum(0)
        place = torch.arange(len(tokens), device=self.device) - (ends - self.prompt_length)[column]
        longest = int(self.prompt_length.max())
        self._check_window(longest)
        step = TreePass(column, place, place, longest, longest, mask=None)
        return self._forward(tokens, place, step, ends - 1)

    @torch.no_grad()
    def extend(
        self, parent: torch.Tensor, length: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append Q runs and send their T tokens through the model in one pass.

        With Q = 0 the model still makes its pass (ZeRO-3: every rank has to), and nothing comes of it.

        Args:
            parent: (Q,) int64, the earlier run under whose last token each new run begins.
            length: (Q,) int64, tokens per run, ≥ 1.
            tokens: (T,) int64, the runs' tokens one after the other.

        Returns:
            Logits after each token, (T, V), and the new runs' numbers, (Q,).
        """
        if not len(parent):
            idle = (self.column_of_user >= 0).nonzero()[:1, 0]
            logits, run = self.extend(idle, torch.ones_like(idle), torch.zeros_like(idle))
            return logits[:0], run[:0]
        run, column = torch.repeat_interleave(length), self.column_of_user[self.run_user[parent]]
        column, first = column[run], (length.cumsum(0) - length)
        offset = torch.arange(len(tokens), device=self.device) - first[run]
        order = column.argsort(stable=True)
        count = torch.bincount(column, minlength=len(self.used))
        place = torch.empty_like(order)
        place[order] = (
            torch.arange(len(order), device=self.device) - (count.cumsum(0) - count)[column[order]]
        )
        slot = self.used[column] + place
        above = self.run_path[parent]
        depth = (above >= 0).sum(1)

        self.used += count
        num_slots, num_places = int(self.used.max()), int(count.max())
        slots = torch.arange(num_slots, device=self.device)
        own = (slots >= slot[first][run][:, None]) & (slots <= slot[:, None])
        seen = own | (slots < self.prompt_length[column][:, None])
        path = above[run]
        seen.scatter_(1, torch.where(path >= 0, path, slot[:, None]), True)
        mask = seen.new_zeros((len(self.used), 1, num_places, num_slots))
        mask[..., 0] = True  # rows nobody reads still need something to see
        mask[column, 0, place] = seen

        numbers = torch.arange(len(parent), device=self.device) + len(self.run_user)
        self.run_user = torch.cat([self.run_user, self.run_user[parent]])
        width = int((depth + length).max())
        self._check_window(int(self.prompt_length.max()) + width)
        self.run_path = F.pad(self.run_path, (0, max(0, width - self.run_path.shape[1])), value=-1)
        new_path = self.run_path[parent]
        new_path[run, depth[run] + offset] = slot
        self.run_path = torch.cat([self.run_path, new_path])
        position = self.prompt_length[column] + depth[run] + offset
        step = TreePass(column, place, slot, num_slots, num_places, mask)
        return self._forward(tokens, position, step, slice(None)), numbers

    def _check_window(self, length: int) -> None:
        if self.window is not None and length > self.window:
            raise UsageError(
                f"{length} tokens of prompt and item exceed the model's attention window of {self.window}, and a tree search "
                f"would attend beyond it: lower --max_length"
            )

    def _forward(
        self, tokens: torch.Tensor, position: torch.Tensor, step: TreePass, keep
    ) -> torch.Tensor:
        """Run one pass; `keep` are the packed positions whose logits are wanted."""
        self.cache.next = step
        with tree_attention_in(self.model):
            output = self.model(
                input_ids=tokens[None],
                position_ids=position[None],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=keep if isinstance(keep, torch.Tensor) else 0,
                tree=step,
            )
        return output.logits[0]

    def retain(self, users: torch.Tensor) -> None:
        """Free the caches of all users but these (ascending); nothing may be appended to the others any more."""
        columns = self.column_of_user[users]
        self.cache.retain(columns)
        self.prompt_length, self.used = self.prompt_length[columns], self.used[columns]
        self.column_of_user = torch.full_like(self.column_of_user, -1)
        self.column_of_user[users] = torch.arange(len(users), device=self.device)


class EncoderPromptTree(PromptTree):
    """The same over a T5: encoder output and cross-attention keys once per user, the decoder's tokens as a tree.

    The tree's prompt is the decoder's start token. T5 derives its position bias from places in the cache, which in a tree are
    not positions, so the bias is made here from each token's depth.
    """

    def __init__(self, model):
        if model.config.model_type != "t5":
            raise UsageError(
                f"tree search over an encoder-decoder knows T5, found {model.config.model_type}"
            )
        assert not model.training, "call model.eval() before searching"
        self.model, self.window = model, None

    @torch.no_grad()
    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Encode each prompt (integer token ids, (P,)) once and return the first token's logits, (B, V)."""
        lengths = [len(prompt) for prompt in prompts]
        self._start([min(1, length) for length in lengths])
        ids = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(self.device)
        self.encoded = self.model.get_encoder()(
            input_ids=ids.to(self.device), attention_mask=mask.long()
        )
        self.cross_mask = mask[:, None, None, :]
        self.cross_cache = DynamicCache()
        self.slot_position = torch.zeros((len(prompts), 1), dtype=torch.int64, device=self.device)
        start = torch.full(
            (len(prompts),), self.model.config.decoder_start_token_id, device=self.device
        )
        column = torch.arange(len(prompts), device=self.device)
        place = torch.zeros_like(column)
        seen = torch.ones((len(prompts), 1, 1, 1), dtype=torch.bool, device=self.device)
        self.prompt_logits = self._forward(
            start, place, TreePass(column, place, place, 1, 1, seen), slice(None)
        )
        return self.prompt_logits

    def _forward(
        self, tokens: torch.Tensor, position: torch.Tensor, step: TreePass, keep
    ) -> torch.Tensor:
        self.slot_position = F.pad(
            self.slot_position, (0, max(0, step.num_slots - self.slot_position.shape[1]))
        )
        self.slot_position[step.column, step.slot] = position
        query = self.slot_position.new_zeros((len(self.used), step.num_places))
        query[step.column, step.place] = position
        attention = self.model.decoder.block[0].layer[0].SelfAttention
        bucket = attention._relative_position_bucket(
            self.slot_position[:, None, : step.num_slots] - query[:, :, None],
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias = attention.relative_attention_bias(bucket).permute(0, 3, 1, 2)
        step.bias = bias.masked_fill(~step.mask, -torch.inf)
        step.cross_mask = self.cross_mask
        self.cache.next = step
        with tree_attention_in(self.model.decoder):
            output = self.model(
                decoder_input_ids=tokens[None],
                encoder_outputs=self.encoded,
                past_key_values=EncoderDecoderCache(self.cache, self.cross_cache),
                use_cache=True,
                tree=step,
            )
        return output.logits[0, keep]

    def retain(self, users: torch.Tensor) -> None:
        """Free the caches of all users but these."""
        columns = self.column_of_user[users]
        for layer in self.cross_cache.layers:
            layer.keys, layer.values = layer.keys[columns], layer.values[columns]
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[columns]
        self.cross_mask, self.slot_position = self.cross_mask[columns], self.slot_position[columns]
        super().retain(users)


def prompt_tree(model) -> PromptTree:
    """Return the tree for a model's searches: an EncoderPromptTree for encoder-decoders, else a PromptTree."""
    return EncoderPromptTree(model) if model.config.is_encoder_decoder else PromptTree(model)


@contextlib.contextmanager
def tree_attention_in(model):
    """Let the model attend by `tree_attention` for a while; transformers looks the name up in the config at each call."""
    config = model.config
    usual = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
