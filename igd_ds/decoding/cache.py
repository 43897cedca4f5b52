"""One prompt, many beams: a cache that holds each user's prompt once and the searched tokens as a tree behind it.

Letters in shapes: B users, P prompt positions (left-padded), N nodes in the tree so far, R new nodes per user, V vocabulary.
"""

import torch


class PromptTree:
    """Keys and values of B prompts and of the trees of tokens that grow behind them, over any Hugging Face causal LM.

    A node is one token after the prompt; it sees its user's unpadded prompt, its own ancestors and itself, by attention mask
    and position. So beams share their prompt and their prefixes, nodes are appended and never re-ordered, and the
    log-probabilities equal those of a full forward pass over each path. Slots number a user's nodes in the order in which they
    came, padding included; slot −1 is the prompt's end.

    Args:
        model: causal LM in eval mode (PEFT-wrapped or quantised too) that attends with SDPA, over full (not sliding) windows.

    Raises:
        ValueError: another attention implementation, or sliding windows, which the tree's mask would override.
    """

    def __init__(self, model):
        config = model.config
        if config._attn_implementation != "sdpa":
            raise ValueError(
                f"tree search needs attn_implementation 'sdpa', which takes a mask per token; the model was loaded with "
                f"'{config._attn_implementation}'"
            )
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ValueError(f"tree search needs full attention in every layer, found {sorted(set(config.layer_types))}")
        assert not model.training, "call model.eval() before searching"
        self.model = model

    @torch.no_grad()
    def prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Start new trees: read the prompts once.

        Args:
            input_ids: (B, P) int64, left-padded.
            attention_mask: (B, P), 1 on prompt tokens and 0 on padding.

        Returns:
            Logits of the first token after each prompt, (B, V) in the model's dtype; kept as `prompt_logits`.
        """
        from transformers import DynamicCache

        self.cache = DynamicCache()
        self.prompt_mask = attention_mask.bool()
        self.prompt_length = self.prompt_mask.sum(1)
        self.parents = torch.empty((len(input_ids), 0), dtype=torch.int64, device=input_ids.device)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=(self.prompt_mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.prompt_logits = output.logits[:, -1]
        return self.prompt_logits

    @torch.no_grad()
    def extend(self, tokens: torch.Tensor, parents: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Append R nodes per user and run them through the model in one pass.

        Args:
            tokens: (B, R) int64.
            parents: (B, R) int64, slot of each node's parent: an earlier one (of this call too, so that a whole chain can go
                in one pass), or −1 for the prompt.
            valid: (B, R) bool; False marks padding of users with fewer nodes, which occupies a slot nobody refers to.

        Returns:
            Logits after each valid node, (valid.sum(), V), in row-major order of `valid`. The new nodes' slots are
            N … N + R − 1, with N = `num_slots` before the call.
        """
        num_slots = self.num_slots + tokens.shape[1]
        slot = torch.arange(self.num_slots, num_slots, device=tokens.device).expand_as(tokens)
        self.parents = torch.cat([self.parents, parents], dim=1)
        # Climb from every new node to the prompt, all nodes at once; the last column of `seen` takes those that have arrived.
        seen = torch.zeros((*tokens.shape, num_slots + 1), dtype=torch.bool, device=tokens.device)
        depth = torch.zeros_like(tokens)
        while (climbing := slot >= 0).any():
            seen.scatter_(2, torch.where(climbing, slot, num_slots)[:, :, None], True)
            depth += climbing
            slot = torch.where(climbing, self.parents.gather(1, slot.clamp(min=0)), -1)
        prompt = self.prompt_mask[:, None, :].expand(-1, tokens.shape[1], -1)
        output = self.model(
            input_ids=tokens,
            # A bool mask suits SDPA whatever dtype a quantised or adapted model computes in.
            attention_mask=torch.cat([prompt, seen[:, :, :-1]], dim=2)[:, None],
            position_ids=self.prompt_length[:, None] + depth - 1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=valid,
        )
        return output.logits

    def rewind(self) -> None:
        """Drop all nodes and keep the prompts: the next search (another α) starts without a new prefill."""
        self.cache.crop(-self.num_slots)
        self.parents = self.parents[:, :0]

    @property
    def num_slots(self) -> int:
        """Nodes per user so far, padding included."""
        return self.parents.shape[1]
