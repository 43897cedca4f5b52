"""What early stopping watches: the unweighted NLL per item, or NDCG@10 of a beam search. Sums over all ranks' batches."""

import numpy as np
import torch
import torch.nn.functional as F

from igd_ds import distributed
from igd_ds.backbones.prompt_tree import prompt_tree
from igd_ds.data.batches import MASKED_ROW, Batch, Collator
from igd_ds.evaluation import metrics
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.store import StoredCatalogue
from igd_ds.loss import at_labels, token_nll
from igd_ds.search.engine import search
from igd_ds.search.scoring import Scoring, ScoringOptions

GAIN_GROUPS = ("zero", *range(10))  # tokens without information gain, then deciles of the others'


def validation_nll(
    engine, adapter, valid: Collator, stored: StoredCatalogue, batches: list[np.ndarray]
) -> dict[str, float]:
    """Return the unweighted NLL per item, per token, and per token of each gain group that has any, in nats."""
    device = distributed.device()
    sums = torch.zeros(
        2, len(GAIN_GROUPS) + 1, dtype=torch.float64, device=device
    )  # Σ NLL and tokens by group; Σ NLL and items
    for rows in batches:
        batch = valid(rows)
        member = F.one_hot(gain_group(batch, stored), len(GAIN_GROUPS)).double().to(device)
        batch = batch.to(device)
        logits = adapter.label_logits(engine, batch.input_ids, batch.attention_mask, batch.labels)
        nll = token_nll(logits, at_labels(batch.labels, batch.labels)).double()
        sums[:, :-1] += torch.stack([nll @ member, member.sum(0)])
        sums[:, -1] += torch.stack([nll.sum(), (batch.row_ids != MASKED_ROW).sum()])
    totals, counts = distributed.all_reduce_sum(sums).tolist()
    values = {
        "valid/nll": totals[-1] / counts[-1],
        "valid/nll_per_token": totals[-1] / sum(counts[:-1]),
    }
    by_group = zip(GAIN_GROUPS, totals, counts)  # noqa: B905  what is left over is the items'
    return values | {
        f"valid/nll_gain_{name}": total / count for name, total, count in by_group if count
    }


def gain_group(batch: Batch, stored: StoredCatalogue) -> torch.Tensor:
    """Return the index in GAIN_GROUPS of each labelled token of a batch, int64 (n,), in the order of the logits."""
    trie, items = stored.trie, batch.item_ids[batch.row_ids != MASKED_ROW].numpy()
    nodes = metrics.path_nodes(trie.leaf_of_item[items], trie.parent, trie.depth)
    decile = np.searchsorted(stored.gain_deciles, stored.gain[nodes[nodes >= 0]])
    return torch.where(at_labels(batch.zero_gain, batch.labels), 0, torch.from_numpy(1 + decile))


def validation_ndcg(
    engine, adapter, valid: Collator, stored: StoredCatalogue, batches: list[np.ndarray]
) -> dict[str, float]:
    """Return NDCG@10 (token match) of a beam search with 10 beams, α = 0."""
    device, trie = distributed.device(), stored.trie
    search_trie, scoring = (
        SearchTrie.build(trie, device),
        Scoring.build(trie, stored.gain, ScoringOptions(), device),
    )
    # Under ZeRO-3 every forward pass is a collective: ranks go on together until the last one's search ends.
    any_rank = distributed.any_rank if engine.zero_optimization_stage() == 3 else bool
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in batches:
        tree = prompt_tree(engine.module)
        tree.prefill([valid.prompts.encode(valid.split.history(max(row, 0))) for row in rows])
        leaves = (
            search(tree, search_trie, scoring, num_beams=10, any_rank=any_rank)
            .leaves[0]
            .cpu()
            .numpy()
        )
        real = rows != MASKED_ROW
        targets = trie.leaf_of_item[valid.split.targets[rows[real]]]
        ndcg = metrics.ranking_sums(metrics.items_ahead(leaves[real], targets), [10])["ndcg@10"]
        sums += torch.tensor([ndcg, real.sum()], dtype=torch.float64, device=device)
    total, count = distributed.all_reduce_sum(sums).tolist()
    return {"valid/ndcg@10": total / count}


VALIDATIONS = {"nll": validation_nll, "ndcg@10": validation_ndcg}
