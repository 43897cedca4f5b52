"""The project's own search on the model that is being trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from igd_ds import distributed
from igd_ds.config.search import Limits, ScoringOptions
from igd_ds.data.batches import Collator, batches_of
from igd_ds.items.search_trie import SearchTrie
from igd_ds.preference.start import Start
from igd_ds.search.engine import SearchResult, search
from igd_ds.search.scoring import Scoring

SEARCH_ROWS = 64
"""Rows that are searched at once: their passes through the model are shared. Assumed."""


@dataclass(frozen=True)
class LiveSearch:
    """Beam search on the model in training, under the training's softmax, at any ZeRO stage."""

    start: Start
    collator: Collator
    trie: SearchTrie
    """On the CPU."""
    scoring: Scoring

    @classmethod
    def build(cls, start: Start, collator: Collator) -> LiveSearch:
        """Score paths by their log-probability alone."""
        stored = start.stored
        scoring = Scoring.build(stored.trie, stored.gain, ScoringOptions(), start.likelihood)
        return cls(start, collator, SearchTrie.build(stored.trie), scoring)

    def leaves(self, engine: Any, rows: np.ndarray, num_beams: int) -> np.ndarray:
        """Return the best leaves of training rows (R,), best first, int64 (R, num_beams).

        Under ZeRO-3 every rank must call it, with the same number of rows.
        """
        found = [
            self.search(engine, batch, num_beams).leaves[0]
            for batch in batches_of(rows, SEARCH_ROWS)
        ]
        return torch.cat(found).long().numpy()

    @torch.no_grad()
    def search(self, engine: Any, rows: np.ndarray, num_beams: int) -> SearchResult:
        """Search for training rows (B,) at α = 0; a masked row stands for row 0.

        Under ZeRO-3 every rank must call it.
        """
        split, prompts = self.collator.split, self.collator.prompts
        # Under ZeRO-3 every forward pass is a collective: ranks go on until the last search ends.
        any_rank = distributed.any_rank if engine.zero_optimization_stage() == 3 else bool
        limits = Limits(pass_positions=max(Limits.pass_positions, num_beams))

        engine.eval()
        output_tokens = self.scoring.output_tokens(self.trie)
        tree = self.start.inputs.backbone.prompt_tree(engine.module, output_tokens)
        tree.prefill([prompts.encode(split.history(row)) for row in np.maximum(rows, 0)])
        found = search(tree, self.trie, self.scoring, num_beams, limits=limits, any_rank=any_rank)
        engine.train()
        return found
