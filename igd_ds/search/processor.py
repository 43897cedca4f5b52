"""The decoding rule as a `LogitsProcessor`, for the `generate` of any Hugging Face model."""

import numpy as np
import torch
from transformers import LogitsProcessor

from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.trie import TokenTrie


class IGDLogitsProcessor(LogitsProcessor):
    """Constrains generation to the catalogue and weights log-probabilities (IGD Eq. 8, 9).

    A token that does not continue a catalogue item gets −inf. The others get w_d·log p, with log p
    over the full vocabulary. Call it like this:

        model.generate(
            **prompts, num_beams=10, num_return_sequences=10, length_penalty=0.0, do_sample=False,
            renormalize_logits=False, max_new_tokens=trie.depth.max(), eos_token_id=eos,
            early_stopping="never", return_dict_in_generate=True, output_scores=True,
            logits_processor=[IGDLogitsProcessor(trie, weights, prompts["input_ids"].shape[1])],
        )

    Here `eos` is the catalogue's EOS. `renormalize_logits=True` would undo the weights. The scores
    are not meant for sampling. With `early_stopping="never"` the rule that ends the search is
    provably right at every length penalty. With False it is the rule of the published code, which
    is the same at penalty 0. Sequences with a score of −1e9 or less are no items: they fill up a
    list that is longer than the catalogue.

    The object keeps no state between calls. It finds each row's trie node again from the tokens
    behind the prompt.

    Args:
        trie: the catalogue's trie, M nodes.
        edge_weights: w_d per edge, float32 (M,), as `scoring.edge_weights` returns it.
        prompt_length: number of tokens of the padded prompts in `input_ids`; 1 for encoder-decoder
            models.
    """

    def __init__(self, trie: TokenTrie, edge_weights: np.ndarray, prompt_length: int):
        self.trie = SearchTrie.build(trie)
        self.edge_weights = torch.from_numpy(np.array(edge_weights, dtype=np.float32))
        self.prompt_length = prompt_length
        # (parent, token) as one number. The numbers ascend, because the children of a node are
        # neighbours and ordered by token.
        self.stride = int(self.trie.token.max()) + 1
        self.keys = torch.from_numpy(
            np.asarray(trie.parent[1:], np.int64) * self.stride
            + np.asarray(trie.token[1:], np.int64)
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return w_d·log p of the tokens that continue a catalogue item, and −inf elsewhere.

        Args:
            input_ids: (R, length), prompts with the tokens generated so far; R = batch × beams.
            scores: (R, V), logits or log-probabilities; log p is taken over all V in both cases.
        """
        if self.keys.device != scores.device:
            self.trie = self.trie.to(scores.device)
            self.edge_weights = self.edge_weights.to(scores.device)
            self.keys = self.keys.to(scores.device)

        # The children of each row's node; rows that left the trie have none.
        node = self._nodes(input_ids[:, self.prompt_length :])
        inside = (node >= 0).nonzero()[:, 0]
        row, child = self.trie.children(node[inside])
        row, token = inside[row], self.trie.token[child].long()

        logprob = torch.log_softmax(scores, dim=-1, dtype=torch.float32)[row, token]
        calibrated = torch.full_like(scores, -torch.inf)
        calibrated[row, token] = (self.edge_weights[child] * logprob).to(scores.dtype)
        return calibrated

    def _nodes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the trie node (R,) to which each row of tokens (R, t) leads; −1: none."""
        node = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        for token in tokens.unbind(1):
            # A token of `stride` or more is in no item, and its key would be that of another
            # node's child.
            known = (node >= 0) & (token < self.stride)
            wanted = torch.where(known, node * self.stride + token, -1)
            edge = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
            node = torch.where(self.keys[edge] == wanted, edge + 1, -1)
        return node
