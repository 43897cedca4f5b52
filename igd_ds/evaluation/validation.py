"""What early stopping watches: the unweighted NLL per item, or NDCG@10 of lists of ten.

Both use the objective's own likelihood: the softmax that it trains. Sums are over all ranks'
batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from igd_ds import distributed
from igd_ds.config.search import ScoringOptions
from igd_ds.contracts import MASKED_ROW, Backbone, Batch, Likelihood, ObjectiveContext
from igd_ds.data.batches import Collator
from igd_ds.evaluation import metrics
from igd_ds.items.store import StoredCatalogue
from igd_ds.memory import return_freed_memory
from igd_ds.search.engine import search
from igd_ds.search.scoring import Scoring

GAIN_GROUPS = ("zero", *range(10))
"""Tokens without information gain, then the deciles of the others' gain."""

NUM_BEAMS = 10


class Measure(Protocol):
    """The token probabilities that a validation measures; an Objective has them."""

    def nll(self, batch: Batch, logits: torch.Tensor, context: ObjectiveContext) -> torch.Tensor:
        """Return the unweighted NLL of the labelled tokens in nats, float32 (n,)."""

    def likelihood(self) -> Likelihood:
        """Return how the model is searched."""


@dataclass(frozen=True)
class ValidationTask:
    """What a validation measures with."""

    backbone: Backbone
    objective: Measure
    context: ObjectiveContext
    rows: Collator
    """Collates rows of the validation split."""


def validation_nll(
    engine: Any, task: ValidationTask, batches: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return the unweighted NLL in nats: per item, per token, and per token of each gain group.

    Args:
        engine: DeepSpeed engine in eval mode.
        task: what is measured.
        batches: this rank's micro-batches, row ids int64 (B,).
    """
    device = distributed.device()
    num_groups = len(GAIN_GROUPS)
    nll_by_group, tokens_by_group = torch.zeros(2, num_groups, dtype=torch.float64, device=device)
    items = torch.zeros((), dtype=torch.float64, device=device)

    for rows in batches:
        batch = task.rows(rows)
        member = F.one_hot(gain_group(batch, task.context.stored), num_groups).double().to(device)
        batch = batch.to(device)
        logits = task.backbone.label_logits(engine, batch)
        nll = task.objective.nll(batch, logits, task.context).double()
        nll_by_group += nll @ member
        tokens_by_group += member.sum(0)
        items += (batch.row_ids != MASKED_ROW).sum()
        return_freed_memory()

    sums = distributed.all_reduce_sum(torch.cat([nll_by_group, tokens_by_group, items[None]]))
    nll, tokens, (num_items,) = (part.tolist() for part in sums.split([num_groups, num_groups, 1]))
    values = {
        "valid/nll": sum(nll) / num_items,
        "valid/nll_per_token": sum(nll) / sum(tokens),
    }
    for name, total, count in zip(GAIN_GROUPS, nll, tokens, strict=True):
        if count:
            values[f"valid/nll_gain_{name}"] = total / count
    return values


def gain_group(batch: Batch, stored: StoredCatalogue) -> torch.Tensor:
    """Return the index in GAIN_GROUPS of each labelled token of a batch on the CPU, int64 (n,)."""
    decile = np.searchsorted(stored.gain_deciles, stored.gain[batch.node.numpy()])
    return torch.where(batch.zero_gain, 0, torch.from_numpy(1 + decile))


def validation_ndcg(
    engine: Any, task: ValidationTask, batches: Sequence[np.ndarray]
) -> dict[str, float]:
    """Return NDCG@10 (item match) of lists of ten, see `validation_nll`.

    The search is that of `igd eval` at α = 0: exact where scores are probabilities, else a beam
    search. Unlike there, items that the user has met stay in the lists.
    """
    device, stored, split = distributed.device(), task.context.stored, task.rows.split
    likelihood = task.objective.likelihood()
    scoring = Scoring.build(stored.trie, stored.gain, ScoringOptions(), likelihood)
    trie = task.context.trie.to("cpu")
    # Under ZeRO-3 every forward pass is a collective: ranks go on until the last one's search ends.
    any_rank = distributed.any_rank if engine.zero_optimization_stage() == 3 else bool

    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for rows in batches:
        tree = task.backbone.prompt_tree(engine.module, scoring.output_tokens(trie))
        tree.prefill([task.rows.prompts.encode(split.history(max(row, 0))) for row in rows])
        found = search(tree, trie, scoring, NUM_BEAMS, scoring.method("auto"), any_rank=any_rank)

        leaves = found.leaves[0].numpy()
        real = rows != MASKED_ROW
        targets = stored.trie.leaf_of_item[split.targets[rows[real]]]
        ahead = metrics.items_ahead(leaves[real], targets)
        credit = 1 / stored.trie.num_items[targets]
        ndcg = metrics.ranking_sums(ahead, [10], credit=credit)["ndcg@10"]
        sums += torch.tensor([ndcg, real.sum()], dtype=torch.float64, device=device)
        return_freed_memory()

    total, count = distributed.all_reduce_sum(sums).tolist()
    return {"valid/ndcg@10": total / count}


Validation = Callable[[Any, ValidationTask, Sequence[np.ndarray]], dict[str, float]]
VALIDATIONS: dict[str, Validation] = {"nll": validation_nll, "ndcg@10": validation_ndcg}
