"""The decoding rule as a `LogitsProcessor`, for anyone's `model.generate`."""

import numpy as np
import torch
from transformers import LogitsProcessor

from igd_ds.items.search_trie import SearchTrie


class IGDLogitsProcessor(LogitsProcessor):
    """Constrain generation to the catalogue and weight log-probabilities by decisiveness (IGD Eq. 8, 9).

    Every token that does not continue a catalogue item gets −inf; the others get w_d·log p, with log p over the full vocabulary.
    Call it as

        model.generate(**prompts, num_beams=10, num_return_sequences=10, length_penalty=0.0, do_sample=False,
                       renormalize_logits=False, max_new_tokens=longest item, eos_token_id=the catalogue's EOS,
                       early_stopping="never", return_dict_in_generate=True, output_scores=True,
                       logits_processor=[IGDLogitsProcessor(trie, weights, prompts["input_ids"].shape[1])])

    `renormalize_logits=True` would undo the weights, and sampling is not what the scores are made for. With
    `early_stopping="never"` the ending rule is provably right at every length penalty; with False it is the published code's,
    which is the same at penalty 0. Sequences with scores of −1e9 or below fill up a list longer than the catalogue: no items.

    The object keeps nothing between calls: each row's trie node is found again from the tokens behind the prompt.

    Args:
        trie: TokenTrie of M nodes (numpy arrays).
        edge_weights: w_d per edge, float32 (M,), as `rules.edge_weights` returns it.
        prompt_length: length of the padded prompts in `input_ids`; 1 for encoder-decoder models.
    """

    def __init__(self, trie, edge_weights: np.ndarray, prompt_length: int):
        self.search = SearchTrie.build(trie)
        self.edge_weights = torch.from_numpy(np.array(edge_weights, dtype=np.float32))
        self.prompt_length = prompt_length
        # (parent, token) as one number is sorted, because children are contiguous per node and ordered by token.
        self.stride = int(self.search.token.max()) + 1
        self.keys = torch.from_numpy(
            np.asarray(trie.parent[1:], np.int64) * self.stride
            + np.asarray(trie.token[1:], np.int64)
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return w_d·log p of the tokens that continue a catalogue item and −inf elsewhere.

        Args:
            input_ids: (R, length) prompts with the tokens generated so far, R = batch × beams.
            scores: (R, V) logits or log-probabilities; log p is taken over all V either way.
        """
        if self.keys.device != scores.device:
            self.search = self.search.to(scores.device)
            self.edge_weights, self.keys = (
                self.edge_weights.to(scores.device),
                self.keys.to(scores.device),
            )
        node = self._nodes(input_ids[:, self.prompt_length :])
        inside = (node >= 0).nonzero()[:, 0]
        row, child = self.search.children(node[inside])
        row, token = inside[row], self.search.token[child].long()
        logprob = torch.log_softmax(scores, dim=-1, dtype=torch.float32)[row, token]
        calibrated = torch.full_like(scores, -torch.inf)
        calibrated[row, token] = (self.edge_weights[child] * logprob).to(scores.dtype)
        return calibrated

    def _nodes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the trie node (R,) that each row of generated tokens (R, t) leads to; −1 where it leaves the trie."""
        node = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
        for token in tokens.unbind(1):
            # A token beyond the stride would alias another node's child: it is in no item.
            wanted = torch.where(
                (node >= 0) & (token < self.stride), node * self.stride + token, -1
            )
            edge = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
            node = torch.where(self.keys[edge] == wanted, edge + 1, -1)
        return node
