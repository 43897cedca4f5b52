"""Statistics of a catalogue and its trie: Table 1 of IGD and of MTC, and more."""

from typing import Any

import numpy as np

from igd_ds.data.dataset import InteractionDataset
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.decisiveness import (
    entropy,
    filtering_ratio,
    information_gain,
    mean_by_token,
    purity_gain,
    zero_gain,
)
from igd_ds.items.trie import TokenTrie

KEYS = {
    "dataset": "name of the dataset",
    "kind": "items are titles (text) or codes (semantic-id)",
    "items": "items of the catalogue",
    "train_rows": "training rows",
    "valid_rows": "validation rows",
    "test_rows": "test rows",
    "target_tokens": "tokens of all training targets, EOS included",
    "zero_ig_tokens": "target tokens that rule out no training target (IG = 0)",
    "zero_ig_share": "zero_ig_tokens / target_tokens (IGD Table 1)",
    "forced_tokens": "target tokens whose prefix has one continuation in the catalogue",
    "forced_share": "forced_tokens / target_tokens",
    "negative_ig_tokens": "target tokens that raise the entropy (`conditional` only)",
    "catalogue_tokens": "tokens of all items, each item once, EOS included",
    "catalogue_zero_ig_tokens": "catalogue tokens with IG = 0",
    "catalogue_zero_ig_share": "catalogue_zero_ig_tokens / catalogue_tokens",
    "catalogue_forced_share": "forced catalogue tokens / catalogue_tokens",
    "entropy": "definition of the entropy in root_entropy and mean_ig",
    "root_entropy": "entropy before the first token, nats",
    "mean_ig": "mean information gain of a target token, nats",
    "nodes": "trie nodes, root included",
    "mean_length": "mean tokens of an item",
    "median_length": "median tokens of an item",
    "max_length": "tokens of the longest item, which is the depth of the trie",
    "root_children": "different first tokens",
    "branching_nodes": "prefixes with two or more continuations",
    "mean_branching": "mean number of continuations of the branching nodes",
    "duplicate_paths": "token paths that belong to more than one item",
    "duplicate_items": "items on a duplicate path",
    "cold_items": "items that are the target of no training row",
    "cold_item_share": "cold_items / items",
    "test_unseen_share": "test rows whose target is a cold item",
    "test_unseen_anywhere_share": "test rows whose target is in no training history either",
    "filtering_ratio": "share of the remaining items that token 1, 2, … rules out, mean over edges "
    "(MTC Table 1); a level of EOS alone is left out",
    "token_purity_gain": "quantiles 0.5, 0.9, 0.99 and 1, over tokens, of the mean purity gain "
    "(MTC Figure 1)",
}
"""Every statistic with its meaning."""


def catalogue_statistics(
    dataset: InteractionDataset, catalogue: Catalogue, trie: TokenTrie, entropy_name: str = "prior"
) -> dict[str, Any]:
    """Return all of `KEYS` as JSON values.

    A token of the training set is an edge of the trie, which counts `train_count` times. A token of
    the catalogue is an edge that counts `num_items` times.

    Args:
        dataset: the dataset of the catalogue.
        catalogue: the items as token paths.
        trie: the trie of these paths.
        entropy_name: "prior" or "conditional". Only entropies and gains depend on it; which tokens
            have zero gain does not.
    """
    train, test = dataset.splits["train"], dataset.splits["test"]

    # Tokens, as edges with their numbers of occurrences.
    in_training = trie.train_count[1:].astype(np.int64)
    in_catalogue = trie.num_items[1:].astype(np.int64)
    target_tokens, catalogue_tokens = int(in_training.sum()), len(catalogue.token_ids)
    children = np.diff(trie.child_begin)
    branching = children[children > 1]
    forced = (children == 1)[trie.parent[1:]]
    zero = zero_gain(trie)[1:]
    gain = information_gain(trie, entropy_name)[1:]

    # Items.
    lengths = np.diff(catalogue.offsets)
    items_on_path = trie.num_items[trie.is_leaf]
    cold = catalogue.counts == 0
    in_a_row = np.zeros(catalogue.num_items, bool)
    in_a_row[train.targets] = True
    in_a_row[train.history_items] = True

    # Levels and tokens of semantic IDs.
    level_begin = trie.level_begin()[1:]
    code_levels = ~np.logical_and.reduceat(trie.is_leaf, level_begin[:-1])
    purity_gain_of_token = mean_by_token(trie, purity_gain(trie))[1]

    numbers = {
        "dataset": dataset.info["name"],
        "kind": catalogue.kind,
        "items": catalogue.num_items,
        "train_rows": len(train),
        "valid_rows": len(dataset.splits["valid"]),
        "test_rows": len(test),
        "target_tokens": target_tokens,
        "zero_ig_tokens": in_training[zero].sum(),
        "zero_ig_share": in_training[zero].sum() / target_tokens,
        "forced_tokens": in_training[forced].sum(),
        "forced_share": in_training[forced].sum() / target_tokens,
        "negative_ig_tokens": in_training[gain < 0].sum(),
        "catalogue_tokens": catalogue_tokens,
        "catalogue_zero_ig_tokens": in_catalogue[zero].sum(),
        "catalogue_zero_ig_share": in_catalogue[zero].sum() / catalogue_tokens,
        "catalogue_forced_share": in_catalogue[forced].sum() / catalogue_tokens,
        "entropy": entropy_name,
        "root_entropy": entropy(trie, entropy_name)[0],
        "mean_ig": in_training @ gain / target_tokens,
        "nodes": trie.num_nodes,
        "mean_length": lengths.mean(),
        "median_length": np.median(lengths),
        "max_length": catalogue.max_length,
        "root_children": children[0],
        "branching_nodes": len(branching),
        "mean_branching": branching.mean() if len(branching) else 0.0,
        "duplicate_paths": np.count_nonzero(items_on_path > 1),
        "duplicate_items": items_on_path[items_on_path > 1].sum(),
        "cold_items": np.count_nonzero(cold),
        "cold_item_share": cold.mean(),
        "test_unseen_share": cold[test.targets].mean(),
        "test_unseen_anywhere_share": np.mean(~in_a_row[test.targets]),
        "filtering_ratio": filtering_ratio(trie)[code_levels],
        "token_purity_gain": np.quantile(purity_gain_of_token, [0.5, 0.9, 0.99, 1.0]),
    }
    return {
        key: value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        for key, value in numbers.items()
    }
