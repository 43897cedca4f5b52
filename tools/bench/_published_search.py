"""What tools/bench/search.py compares with: `model.generate` with a mask over the vocabulary, in three ways.

* `DictTrieProcessor`, as the published code does it: a trie of dicts, walked row by row in Python, a dense mask. Written so that
  it costs less than the original, which normalises the gains of a node's children at every visit: here nodes keep their weights.
* `IGDLogitsProcessor` of this repository: the same rule without a loop over rows.
* `CsrMaskProcessor`, after STATIC: items of one length, the children of all rows read as one block. No weights.

`generate` keeps the scores of every step if it is asked for scores (`output_scores=True`, which the published code sets: 97 MB a
step at 160 rows of 151,936 tokens). Here they are read from its beams instead, so that it need not.
"""

from unittest import mock

import numpy as np
import torch
from transformers import LogitsProcessor

FILLER = -1e9  # `generate` fills up short lists with scores of this and below


def left_padded(prompts: list[np.ndarray], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, attention_mask), int64 (B, P), of prompts padded on the left, as `generate` takes them."""
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        attention_mask[i, width - len(prompt) :] = 1
    return input_ids, attention_mask


class DictTrieProcessor(LogitsProcessor):
    """w_d·log p on the tokens that continue an item, −inf elsewhere (IGD Eq. 8, 9).

    Args:
        trie: TokenTrie of M nodes (numpy arrays).
        edge_weights: w_d per edge, float32 (M,).
        prompt_length: of the padded prompts in `input_ids`.
    """

    def __init__(self, trie, edge_weights: np.ndarray, prompt_length: int):
        self.prompt_length = prompt_length
        nodes = [{} for _ in range(trie.num_nodes)]
        self.root = {"children": nodes[0]}
        for node in range(1, trie.num_nodes):
            nodes[trie.parent[node]][int(trie.token[node])] = {"children": nodes[node]}
        begin = trie.child_begin.tolist()
        stack = [(0, self.root)]
        while stack:
            number, node = stack.pop()
            edges = slice(begin[number], begin[number + 1])
            node["tokens"] = torch.tensor(trie.token[edges], dtype=torch.int64)
            node["weights"] = torch.tensor(edge_weights[edges])
            stack += enumerate(node["children"].values(), edges.start)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Walk each row's generated tokens, weight its children's log-probabilities, mask all the other tokens."""
        logprob = torch.log_softmax(scores, dim=-1)
        mask = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(input_ids[:, self.prompt_length :].tolist()):
            node = self.root
            for token in tokens:
                node = node["children"].get(token)
                if node is None:  # a beam that has ended
                    break
            else:
                mask[row, node["tokens"]] = 0
                logprob[row, node["tokens"]] *= node["weights"]
        return logprob + mask


class CsrMaskProcessor(LogitsProcessor):
    """log p on the tokens that continue an item, −inf elsewhere, for items of one length.

    A row's state is its trie node. On each level as many slots are read for every row as the level's widest node has children.
    `generate` re-orders its beams without telling: the states are found again from the tokens, at most one read per level.

    Args:
        trie: TokenTrie (numpy arrays) whose items are all of one length.
        prompt_length: of the padded prompts in `input_ids`; 1 for encoder-decoder models.
    """

    def __init__(self, trie, prompt_length: int):
        assert np.all(np.diff(trie.depth[trie.is_leaf].astype(int)) == 0), (
            "a CSR mask of this kind takes items of one length"
        )
        self.prompt_length = prompt_length
        self.row_begin = torch.tensor(trie.child_begin, dtype=torch.int64)
        self.token = torch.tensor(trie.token, dtype=torch.int64)
        levels = trie.level_begin()
        widest = [
            np.diff(trie.child_begin[begin : end + 1]).max()
            for begin, end in zip(levels[:-2], levels[1:-1], strict=True)
        ]
        self.slots = [torch.arange(int(width)) for width in widest]

    def children(
        self, state: torch.Tensor, level: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (child, token, whether there is one), each (R, slots of the level)."""
        child = self.row_begin[state][:, None] + self.slots[level]
        inside = (child < self.row_begin[state + 1][:, None]) & (state >= 0)[:, None]
        child = child.where(inside, 0)
        return child, self.token[child], inside

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Find each row's state, read its children, mask all the other tokens."""
        state = torch.zeros(len(input_ids), dtype=torch.int64)
        generated = input_ids[:, self.prompt_length :]
        for level, chosen in enumerate(generated.unbind(1)):
            child, token, inside = self.children(state, level)
            hit = inside & (token == chosen[:, None])
            state = child.gather(1, hit.int().argmax(1, keepdim=True))[:, 0].where(hit.any(1), -1)
        _, token, inside = self.children(state, generated.shape[1])
        masked = torch.full_like(scores, -torch.inf)
        row, slot = inside.nonzero(as_tuple=True)
        masked[row, token[row, slot]] = scores[row, token[row, slot]]
        return masked


class Generate:
    """`model.generate` with a logits processor.

    Args:
        model: a causal LM or an encoder-decoder model in eval mode.
        trie: TokenTrie (numpy arrays).
        make_processor: from the length of the padded prompt to a processor.
        num_beams: K.
        length_penalty: p in score / n^p.
    """

    def __init__(self, model, trie, make_processor, num_beams: int, length_penalty: float):
        self.model, self.trie, self.make_processor = model, trie, make_processor
        self.processors = {}
        self.eos = int(trie.token[np.argmax(trie.is_leaf)])
        self.settings = {
            "num_beams": num_beams,
            "num_return_sequences": num_beams,
            "length_penalty": length_penalty,
            "max_new_tokens": int(trie.depth.max()),
            "do_sample": False,
            "early_stopping": "never",  # stops as soon as it safely can; at penalty 0 the same as False
            "eos_token_id": self.eos,
            "pad_token_id": self.eos,
        }

    def warm_up(self, prompts: list[np.ndarray]) -> None:
        """Touch everything once, and build the trie."""
        self(prompts)

    def __call__(self, prompts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Search for one batch: generated tokens int64 (B·K, length), scores float32 (B, K), best first."""
        input_ids, attention_mask = left_padded(prompts, self.eos)
        start = 1 if self.model.config.is_encoder_decoder else input_ids.shape[1]
        if start not in self.processors:  # the trie is built once, not per batch
            self.processors = {start: self.make_processor(start)}
        update, scores = self.model._update_finished_beams, None

        def update_and_keep(**beams):
            nonlocal scores
            updated = update(**beams)
            scores = updated[1]
            return updated

        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with mock.patch.object(self.model, "_update_finished_beams", update_and_keep):
            sequences = self.model.generate(
                **inputs, logits_processor=[self.processors[start]], **self.settings
            )
        return sequences[:, start:], scores

    def lists(self, found: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return what a call found as our search does: leaves int64 and scores float32, (1, B, K), −1 and −inf where none is."""
        sequences, scores = found
        listed = scores.numpy() > FILLER
        leaves = np.array(
            [leaf_of(self.trie, tokens, self.eos) for tokens in sequences.tolist()]
        ).reshape(listed.shape)
        return np.where(listed, leaves, -1)[None], np.where(listed, scores.numpy(), -np.inf)[None]


def leaf_of(trie, tokens: list[int], eos: int) -> int:
    """Return the leaf that generated tokens lead to; −1 if they end in none (a filler)."""
    node = 0
    for token in tokens:
        begin, end = trie.child_begin[node : node + 2]
        node = int(begin + np.searchsorted(trie.token[begin:end], token))
        if node == end or trie.token[node] != token:
            return -1
        if token == eos:
            return node
    return -1
