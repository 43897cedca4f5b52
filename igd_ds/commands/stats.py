"""Statistics of a catalogue and its trie: Table 1 of both papers, and what decides how a run can go.

    igd stats --dataset DATASET --tokenizer PATH [--json] [--kind text|semantic-id] [--entropy prior|conditional]

Every key of the `--json` object is explained in `KEYS`; the table prints the same.
"""

import argparse
import json

import numpy as np

from igd_ds import distributed
from igd_ds.backbones.causal_lm import load_tokenizer
from igd_ds.data.dataset import InteractionDataset
from igd_ds.items.catalogue import KINDS, Catalogue
from igd_ds.items.decisiveness import (
    ENTROPIES,
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
    "zero_ig_tokens": "of these, tokens that drop no training mass (IG = 0)",
    "zero_ig_share": "zero_ig_tokens / target_tokens (IGD Table 1)",
    "forced_tokens": "target tokens whose prefix has one continuation in the catalogue",
    "forced_share": "forced_tokens / target_tokens",
    "negative_ig_tokens": "target tokens that raise the entropy (`conditional` only)",
    "catalogue_tokens": "tokens of all items, each once, EOS included",
    "catalogue_zero_ig_tokens": "of these, tokens with IG = 0",
    "catalogue_zero_ig_share": "catalogue_zero_ig_tokens / catalogue_tokens",
    "catalogue_forced_share": "forced tokens / catalogue_tokens",
    "entropy": "definition of the entropy behind the next two",
    "root_entropy": "entropy before the first token, nats",
    "mean_ig": "mean information gain of a target token, nats",
    "nodes": "trie nodes, root included",
    "mean_length": "mean tokens of an item",
    "median_length": "median tokens of an item",
    "max_length": "tokens of the longest item = depth of the trie",
    "root_children": "different first tokens",
    "branching_nodes": "prefixes with two or more continuations",
    "mean_branching": "their mean number of continuations",
    "duplicate_paths": "token paths that belong to more than one item",
    "duplicate_items": "items on such a path",
    "cold_items": "items that are no training row's target",
    "cold_item_share": "cold_items / items",
    "test_unseen_share": "test rows whose target is a cold item",
    "test_unseen_anywhere_share": "test rows whose target is in no training history either",
    "filtering_ratio": "share of the items left that token 1, 2, ... rules out, mean over edges (MTC Table 1); no EOS-only level",
    "token_purity_gain": "quantiles 0.5, 0.9, 0.99, 1 over tokens of the mean purity gain (MTC Figure 1)",
}


def catalogue_statistics(
    dataset, catalogue: Catalogue, trie: TokenTrie, entropy_name: str = "prior"
) -> dict:
    """All of `KEYS`. A token of the training set is an edge met `train_count` times, one of the catalogue `num_items` times.

    Args:
        dataset: has `info["name"]`, and `splits` with `targets`, `history_items` and a length.
        entropy_name: "prior" or "conditional"; only entropies and gains depend on it, zero-IG does not.
    """
    train, test = dataset.splits["train"], dataset.splits["test"]
    in_training, in_catalogue = (
        trie.train_count[1:].astype(np.int64),
        trie.num_items[1:].astype(np.int64),
    )
    zero = zero_gain(trie)[1:]
    gain = information_gain(trie, entropy_name)[1:]
    children = np.diff(trie.child_begin)
    forced = (children == 1)[trie.parent[1:]]
    lengths = np.diff(catalogue.offsets)
    cold = catalogue.counts == 0
    anywhere = np.zeros(catalogue.num_items, bool)
    anywhere[train.targets] = anywhere[train.history_items] = True
    shared = trie.num_items[trie.is_leaf]
    level_begin = trie.level_begin()[1:]
    code_levels = ~np.logical_and.reduceat(trie.is_leaf, level_begin[:-1])
    target_tokens, catalogue_tokens = int(in_training.sum()), len(catalogue.token_ids)
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
        "branching_nodes": np.count_nonzero(children > 1),
        "mean_branching": children[children > 1].mean() if np.any(children > 1) else 0.0,
        "duplicate_paths": np.count_nonzero(shared > 1),
        "duplicate_items": shared[shared > 1].sum(),
        "cold_items": np.count_nonzero(cold),
        "cold_item_share": cold.mean(),
        "test_unseen_share": cold[test.targets].mean(),
        "test_unseen_anywhere_share": np.mean(~anywhere[test.targets]),
        "filtering_ratio": filtering_ratio(trie)[code_levels],
        "token_purity_gain": np.quantile(
            mean_by_token(trie, purity_gain(trie))[1], [0.5, 0.9, 0.99, 1.0]
        ),
    }
    return {
        key: value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        for key, value in numbers.items()
    }


def print_table(statistics: dict) -> None:
    """Print key, value and meaning, one line each."""
    for key, value in statistics.items():
        if isinstance(value, list):
            shown = " ".join(f"{number:.4f}" for number in value[:4]) + (
                " ..." if len(value) > 4 else ""
            )
        elif key.endswith("_share"):
            shown = f"{value:.2%}"
        else:
            shown = (
                f"{value:,.4g}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else str(value)
            )
        print(f"{key:<28}{shown:>31}  {KEYS[key]}")


def main(argv: list[str] | None = None) -> int:
    """Parse, build the catalogue and its trie, print."""
    parser = argparse.ArgumentParser(
        prog="igd stats", description="Statistics of a catalogue and its trie."
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="canonical dataset folder (igd prepare makes one)",
    )
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder or hub name")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="titles or codes, where a dataset has both; default: titles if any",
    )
    parser.add_argument(
        "--entropy", choices=ENTROPIES, default="prior", help="definition of the entropy"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the table"
    )
    arguments = parser.parse_args(argv)
    dataset = InteractionDataset.load(arguments.dataset)
    catalogue = Catalogue.build(dataset, load_tokenizer(arguments.tokenizer), arguments.kind)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    statistics = catalogue_statistics(dataset, catalogue, trie, arguments.entropy)
    if arguments.json:
        print(json.dumps(statistics))
    else:
        print_table(statistics)
    return 0


if __name__ == "__main__":
    distributed.run(main)
