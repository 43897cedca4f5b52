"""What tools/bench/search.py compares with: `model.generate` with a mask over the vocabulary.

The mask is made in one of three ways:

* `DictTrieProcessor` does it as the published code: it walks a trie of dicts row by row in Python
  and makes a dense mask. It costs less than the original, which normalises the gains of a node's
  children at every visit; here the nodes keep their weights.
* `IGDLogitsProcessor` of this repository follows the same rule without a loop over rows.
* `CsrMaskProcessor` follows STATIC: items have one length, the children of all rows are read as one
  block, and there are no weights.

If `generate` is asked for scores (`output_scores=True`, which the published code sets), it keeps
the scores of every step: 97 MB per step at 160 rows of 151,936 tokens. Here the scores are read
from its beams instead.
"""

from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel

from igd_ds.items.trie import TokenTrie

# `generate` fills up short lists with entries that have this score or less.
FILLER = -1e9


def left_padded(prompts: list[np.ndarray], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, attention_mask), int64 (B, P), of prompts padded on the left."""
    width = max(len(p) for p in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        attention_mask[i, width - len(prompt) :] = 1
    return input_ids, attention_mask


class DictTrieProcessor(LogitsProcessor):
    """Gives w_d·log p to tokens that continue an item and −inf to the others (IGD Eq. 8, 9).

    Args:
        trie: the catalogue's trie, M nodes.
        edge_weights: w_d per edge, float32 (M,).
        prompt_length: number of tokens of the padded prompts in `input_ids`.
    """

    def __init__(self, trie: TokenTrie, edge_weights: np.ndarray, prompt_length: int):
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
        """Walk each row's generated tokens; weight the log p of its children, mask the rest."""
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
    """Gives log p to tokens that continue an item and −inf to the others; items have one length.

    A row's state is its trie node. On each level as many slots are read for every row as the
    level's widest node has children. `generate` does not tell a processor how it re-orders its
    beams, so the states are found again from the tokens, with at most one read per level.

    Args:
        trie: the catalogue's trie, all of whose items have one length.
        prompt_length: number of tokens of the padded prompts in `input_ids`; 1 for encoder-decoder
            models.
    """

    def __init__(self, trie: TokenTrie, prompt_length: int):
        assert np.all(np.diff(trie.depth[trie.is_leaf].astype(int)) == 0), (
            "a CSR mask of this kind needs items of one length"
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
        """Find each row's state, read its children, mask all other tokens."""
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
        trie: the catalogue's trie.
        make_processor: function of the length of the padded prompts that returns a processor.
        num_beams: K.
        length_penalty: p in score / n^p.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trie: TokenTrie,
        make_processor: Callable[[int], LogitsProcessor],
        num_beams: int,
        length_penalty: float,
    ):
        self.model, self.trie, self.make_processor = model, trie, make_processor
        self.processors: dict[int, LogitsProcessor] = {}
        self.eos = int(trie.token[np.argmax(trie.is_leaf)])
        self.settings = {
            "num_beams": num_beams,
            "num_return_sequences": num_beams,
            "length_penalty": length_penalty,
            "max_new_tokens": int(trie.depth.max()),
            "do_sample": False,
            "early_stopping": "never",  # stops as soon as it is right to; at penalty 0 as False
            "eos_token_id": self.eos,
            "pad_token_id": self.eos,
        }

    def warm_up(self, prompts: list[np.ndarray]) -> None:
        """Search once, so that trie and memory are there before the time is taken."""
        self(prompts)

    def __call__(self, prompts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Search for one batch.

        Returns:
            Generated tokens, int64 (B·K, length), and scores, float32 (B, K), best first.
        """
        input_ids, attention_mask = left_padded(prompts, self.eos)
        start = 1 if self.model.config.is_encoder_decoder else input_ids.shape[1]
        if start not in self.processors:  # the trie is built once, not per batch
            self.processors = {start: self.make_processor(start)}

        # Keep the scores of the finished beams, which `generate` updates at every step.
        update, scores = self.model._update_finished_beams, None

        def update_and_keep(**beams):
            nonlocal scores
            updated = update(**beams)
            scores = updated[1]
            return updated

        with mock.patch.object(self.model, "_update_finished_beams", update_and_keep):
            sequences = self.model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=[self.processors[start]],
                **self.settings,
            )
        return sequences[:, start:], scores

    def lists(self, found: tuple[torch.Tensor, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Return the lists of a call as our search does: leaves int64, scores float32, (1, B, K).

        Where there is no item, they are −1 and −inf.
        """
        sequences, scores = found
        listed = scores.numpy() > FILLER
        leaves = np.array(
            [leaf_of(self.trie, tokens, self.eos) for tokens in sequences.tolist()]
        ).reshape(listed.shape)
        return np.where(listed, leaves, -1)[None], np.where(listed, scores.numpy(), -np.inf)[None]


def leaf_of(trie: TokenTrie, tokens: list[int], eos: int) -> int:
    """Return the leaf to which generated tokens lead; −1 if they lead to none (a filler)."""
    node = 0
    for token in tokens:
        begin, end = trie.child_begin[node : node + 2]
        node = int(begin + np.searchsorted(trie.token[begin:end], token))
        if node == end or trie.token[node] != token:
            return -1
        if token == eos:
            return node
    return -1
