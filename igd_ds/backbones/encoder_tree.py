"""The tree of tokens over a T5: the encoder reads a history once, the decoder grows the tree.

Letters in shapes: B users, P prompt tokens, T tokens of one pass, S slots (cached tokens) of a
user, R the most tokens that one user has in a pass, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import DynamicCache, EncoderDecoderCache

from igd_ds.backbones.prompt_tree import CausalPromptTree, check_prompts
from igd_ds.backbones.tree_attention import ATTENTION, TreePass, attention_by
from igd_ds.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EncoderPromptTree(CausalPromptTree):
    """The trees of decoder tokens behind B prompts of a T5. It implements `contracts.PromptTree`.

    Encoder output and cross-attention keys are kept once per user. For the tree, a prompt is the
    decoder's start token. T5 derives its position bias from places in the cache, which are no
    positions in a tree, so the bias is made here from each token's depth.

    Raises:
        UsageError: the model is no T5.
    """

    def __init__(self, model: PreTrainedModel, output_tokens: np.ndarray | None = None) -> None:
        if model.config.model_type != "t5":
            raise UsageError(
                f"tree search over an encoder-decoder knows T5, found {model.config.model_type}"
            )
        super().__init__(model, output_tokens)
        self.encoded: Any  # the encoder's output, last_hidden_state (B, P, width)
        self.cross_mask: torch.Tensor  # bool (B, 1, 1, P)
        self.cross_cache: DynamicCache

    @torch.no_grad()
    def prefill(self, prompts: Sequence[np.ndarray]) -> torch.Tensor:
        """Encode each prompt (integer token ids, (P,)) once; return the first logits, (B, V).

        Raises:
            UsageError: a prompt has no tokens.
        """
        lengths = check_prompts(prompts)
        self._start([1] * len(prompts))
        self._encode(prompts, lengths)

        start = torch.full(
            (len(prompts),), self.model.config.decoder_start_token_id, device=self.device
        )
        column = torch.arange(len(prompts), device=self.device)
        place = torch.zeros_like(column)
        seen = torch.ones((len(prompts), 1, 1, 1), dtype=torch.bool, device=self.device)
        self.slot_position = place[:, None].clone()
        step = TreePass(column, place, place, place, 1, 1, 1, seen, self.slot_position)
        self.prompt_logits = self._forward(start, step, slice(None))
        return self.prompt_logits

    def _encode(self, prompts: Sequence[np.ndarray], lengths: list[int]) -> None:
        """Run the encoder over right-padded prompts and start an empty cross-attention cache."""
        ids = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.from_numpy(np.asarray(prompt, np.int64))
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(self.device)

        self.encoded = self.model.get_encoder()(
            input_ids=ids.to(self.device), attention_mask=mask.long()
        )
        self.cross_mask = mask[:, None, None, :]
        self.cross_cache = DynamicCache()

    def _forward(
        self, tokens: torch.Tensor, step: TreePass, keep: torch.Tensor | slice
    ) -> torch.Tensor:
        step.bias = self._bias(step)
        step.cross_mask = self.cross_mask
        self.cache.next = step
        with attention_by(self.model.decoder.config, ATTENTION), self.output_rows.alone():
            output = self.model(
                decoder_input_ids=tokens[None],
                encoder_outputs=self.encoded,
                past_key_values=EncoderDecoderCache(self.cache, self.cross_cache),
                use_cache=True,
                tree=step,
            )
        return self.output_rows.of(output.logits[0, keep])

    def _bias(self, step: TreePass) -> torch.Tensor:
        """Return T5's position bias by depth in the tree, (B, H, R, S), −∞ where masked."""
        assert step.mask is not None and self.slot_position is not None
        query = self.slot_position.new_zeros((len(self.used), step.num_places))
        query[step.column, step.place] = step.position
        attention = self.model.decoder.block[0].layer[0].SelfAttention
        bucket = attention._relative_position_bucket(
            self.slot_position[:, None, : step.num_slots] - query[:, :, None],
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        bias: torch.Tensor = attention.relative_attention_bias(bucket).permute(0, 3, 1, 2)
        return bias.masked_fill(~step.mask, -torch.inf)

    def retain(self, users: torch.Tensor) -> None:
        """Free the caches of all users but these (ascending). The others get no more tokens."""
        columns = self.column_of_user[users]
        for layer in self.cross_cache.layers:
            layer.keys, layer.values = layer.keys[columns], layer.values[columns]
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[columns]
        self.cross_mask = self.cross_mask[columns]
        super().retain(users)
