"""What early stopping watches: the unweighted NLL per item, or NDCG@10 of a beam search. Sums over all ranks' batches."""

import numpy as np
import torch

from igd_ds import distributed, metrics
from igd_ds.data.collate import MASKED_ROW, Collator
from igd_ds.decoding.cache import prompt_tree
from igd_ds.decoding.rules import Scoring, ScoringOptions
from igd_ds.decoding.search import search
from igd_ds.decoding.trie import SearchTrie
from igd_ds.items.store import StoredCatalogue
from igd_ds.loss import at_labels, token_nll


def validation_nll(engine, adapter, valid: Collator, stored: StoredCatalogue, batches: list[np.ndarray]) -> dict[str, float]:
    """Return the unweighted NLL per item and per token, in nats."""
    sums = torch.zeros(3, dtype=torch.float64, device=distributed.device())
    for rows in batches:
        batch = valid(rows).to(distributed.device())
        logits = adapter.label_logits(engine, batch.input_ids, batch.attention_mask, batch.labels)
        nll = token_nll(logits, at_labels(batch.labels, batch.labels))
        sums += torch.stack([nll.double().sum(), (batch.row_ids != MASKED_ROW).sum().double(), sums.new_tensor(len(nll))])
    nll, items, tokens = distributed.all_reduce_sum(sums).tolist()
    return {"valid/nll": nll / items, "valid/nll_per_token": nll / tokens}


def validation_ndcg(engine, adapter, valid: Collator, stored: StoredCatalogue, batches: list[np.ndarray]) -> dict[str, float]:
    """Return NDCG@10 (token match) of a beam search with 10 beams, α = 0."""
    device, trie = distributed.device(), stored.trie
    search_trie, scoring = SearchTrie.build(trie, device), Scoring.build(trie, stored.gain, ScoringOptions(), device)
    # Under ZeRO-3 every forward pass is a collective: ranks go on together until the last one's search ends.
    any_rank = distributed.any_rank if engine.zero_optimization_stage() == 3 else bool
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in batches:
        tree = prompt_tree(engine.module)
        tree.prefill([valid.prompts.encode(valid.split.history(max(row, 0))) for row in rows])
        leaves = search(tree, search_trie, scoring, num_beams=10, any_rank=any_rank).leaves[0].cpu().numpy()
        real = rows != MASKED_ROW
        targets = trie.leaf_of_item[valid.split.targets[rows[real]]]
        ndcg = metrics.ranking_sums(metrics.items_ahead(leaves[real], targets), [10])["ndcg@10"]
        sums += torch.tensor([ndcg, real.sum()], dtype=torch.float64, device=device)
    total, count = distributed.all_reduce_sum(sums).tolist()
    return {"valid/ndcg@10": total / count}


VALIDATIONS = {"nll": validation_nll, "ndcg@10": validation_ndcg}
