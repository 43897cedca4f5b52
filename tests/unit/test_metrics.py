"""Metrics, compared with tables worked by hand and with brute force.

pytest.approx compares with its relative default, 1e-6. Both sides are sums in fp64 of some dozen
terms, which agree to about 1e-14.
"""

import itertools
import math

import numpy as np
import pytest

from igd_ds.errors import UsageError
from igd_ds.evaluation import metrics
from igd_ds.items.trie import TokenTrie

LISTS = np.array([[7, 3, 5], [4, 9, -1], [6, 2, 8], [-1, -1, -1]])
TARGET = np.array([3, 4, 1, 5])  # rank 2, rank 1, not in the list, an empty list


def popular_first(count):
    """Return all rankings of the items by count: every order of the tied ones."""
    return [
        order
        for order in itertools.permutations(range(len(count)))
        if all(np.diff(count[list(order)]) <= 0)
    ]


def test_hr_and_ndcg_of_a_table_worked_by_hand():
    ahead = metrics.items_ahead(LISTS, TARGET)
    assert ahead.tolist() == [1, 0, math.inf, math.inf]

    sums = metrics.ranking_sums(ahead, [1, 3])
    expected = {"hr@1": 1, "ndcg@1": 1, "hr@3": 2, "ndcg@3": 1 + 1 / math.log2(3)}
    assert sums == pytest.approx(expected)
    assert metrics.means(sums, 4)["hr@3"] == 0.5
    assert metrics.means(sums, 0) == dict.fromkeys(sums)


def test_item_match_counts_the_share_of_the_leaf():
    ahead = metrics.items_ahead(LISTS, TARGET)
    sums = metrics.ranking_sums(ahead, [3], credit=np.array([1 / 4, 1, 1 / 2, 1]))
    assert sums == pytest.approx({"hr@3": 1.25, "ndcg@3": 1 + 0.25 / math.log2(3)})


def test_popularity_is_the_expectation_over_random_orders_of_ties():
    count = np.array([3, 1, 0, 1, 1, 5])
    targets = np.array([1, 5, 2, 0, 3])
    ahead, tied = metrics.popularity_ranking(count, targets)
    assert ahead.tolist() == [2, 0, 5, 1, 2]
    assert tied.tolist() == [3, 1, 1, 1, 3]

    sums = metrics.ranking_sums(ahead, [1, 3, 5], tied)
    orders = popular_first(count)
    ranks = np.array([[order.index(target) + 1 for target in targets] for order in orders])
    for k in (1, 3, 5):
        hits = ranks <= k
        assert sums[f"hr@{k}"] == pytest.approx(hits.sum() / len(orders))
        assert sums[f"ndcg@{k}"] == pytest.approx((hits / np.log2(ranks + 1)).sum() / len(orders))


def test_head_and_tail_are_the_expectation_over_random_orders_of_ties():
    # Five items occur. The three tied ones share half a place of the head.
    frequency = np.array([0, 3, 1, 1, 1, 2, 0])
    target = np.repeat(np.arange(7), frequency)
    head = metrics.head_share(frequency, target)
    ahead = np.array([0, 1, math.inf, 0, math.inf, 2, 0, 1])
    sums = metrics.ranking_sums(ahead, [1, 3], credit=head)

    counts, hits, gains = [], [], []
    for order in popular_first(frequency):
        in_head = np.clip(2.5 - np.array([order.index(item) for item in target]), 0, 1)
        counts.append(in_head.sum())
        hits.append(in_head @ (ahead < 1))
        gains.append(in_head @ np.where(ahead < 3, 1 / np.log2(ahead + 2), 0))

    # The number of rows is the same in every order, so the quotient of the expectations is the
    # expectation of the quotient.
    assert set(counts) == {head.sum()}
    assert sums["hr@1"] == pytest.approx(np.mean(hits))
    assert sums["ndcg@3"] == pytest.approx(np.mean(gains))


def test_head_and_tail_depend_neither_on_item_ids_nor_on_the_sample():
    frequency = np.array([0, 3, 1, 1, 1, 2, 0])
    target = np.repeat(np.arange(7), frequency)
    head = metrics.head_share(frequency, target)
    assert metrics.head_share(frequency[::-1], 6 - target).tolist() == head.tolist()
    assert metrics.head_share(frequency, target[[7, 0]]).tolist() == head[[7, 0]].tolist()


@pytest.mark.parametrize("count", [[3, 1, 0, 1, 0, 0, 7], [0] * 7, [6, 5, 4, 3, 2, 1, 0]])
def test_popularity_deciles_are_the_expectation_over_random_orders_of_ties(count):
    count, items, times = np.array(count), np.array([0, 2, 3, 6]), np.array([2, 5, 1, 4])
    orders, shares = popular_first(count), np.zeros(10)
    for order in orders:
        for item, often in zip(items, times, strict=True):
            # Each item takes a seventh of the ranking.
            begin = np.maximum(order.index(item) / 7, np.arange(10) / 10)
            end = np.minimum((order.index(item) + 1) / 7, np.arange(1, 11) / 10)
            shares += 7 * often * np.maximum(end - begin, 0) / times.sum() / len(orders)

    found = metrics.popularity_deciles(count, items, times)
    assert found == pytest.approx(shares)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    assert metrics.popularity_deciles(count, np.arange(7), np.ones(7)) == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("listed", [[1], [4, 4, 4], [1, 9, 2, 2], [3, 1, 4, 1, 5, 9]])
def test_gini_index_is_half_the_relative_mean_difference(listed):
    every = np.array([*listed, *[0] * (6 - len(listed))])
    expected = np.abs(every[:, None] - every).mean() / (2 * every.mean())
    assert metrics.gini_index(np.array(listed), 6) == pytest.approx(expected)


def test_extreme_gini_indices():
    assert metrics.gini_index(np.full(6, 2), 6) == 0
    assert metrics.gini_index(np.array([8]), 6) == pytest.approx(5 / 6)


def test_relaxed_match_compares_the_first_codes():
    # Paths of up to four codes, many of them shared.
    random = np.random.default_rng(0)
    paths = [[*map(int, random.integers(0, 3, random.integers(1, 5)))] for _ in range(40)]
    tokens = np.array([token for path in paths for token in (*path, 3)], np.int32)
    offsets = np.cumsum([0, *(len(path) + 1 for path in paths)])
    trie = TokenTrie.build(tokens, offsets, np.ones(40, int))
    codes = {int(leaf): path for leaf, path in zip(trie.leaf_of_item, paths, strict=True)}

    # Lists, some of them short and one empty.
    target = trie.leaf_of_item[:30]
    leaves = np.array([random.permutation(list(codes))[:8] for _ in target])
    leaves[:5, 3:] = leaves[5, :] = -1

    found = metrics.relaxed_match(trie, target, leaves, [1, 5])
    assert set(found) == {"1", "2", "3"}
    for k in (1, 2, 3):
        hits, gain = 0, 0.0
        for wanted, row in zip(target, leaves, strict=True):
            for rank, leaf in enumerate(row[:5], 1):
                if leaf >= 0 and codes[leaf][:k] == codes[wanted][:k]:
                    hits += 1
                    gain += 1 / math.log2(rank + 1)
                    break
        assert 0 < hits < 30
        assert found[str(k)]["hr@5"] == pytest.approx(hits / 30)
        assert found[str(k)]["ndcg@5"] == pytest.approx(gain / 30)


def test_cutoffs_beyond_the_list_are_omitted_with_a_warning():
    with pytest.warns(UserWarning, match="at 20 are omitted"):
        assert metrics.usable_cutoffs(10) == [1, 3, 5, 10]


def test_first_token_repetition():
    # The empty list does not count.
    tokens = np.array([[3, 1, 2], [2, 4, -1], [3, 1, 3], [-1, -1, -1]])
    total, rows = metrics.first_token_repetition(tokens)
    assert total == pytest.approx(1 / 3 + 1 / 2 + 2 / 3)
    assert rows == 3
    assert metrics.first_token_repetition(tokens, top=1) == (3.0, 3)


def test_score_entropy_in_bits():
    nothing = -np.inf
    scores = np.array(
        [
            [0.0] * 10,
            [0.0] + [nothing] * 9,
            [math.log(3), 0.0] + [nothing] * 8,
            [nothing] * 10,
        ]
    )
    total, rows = metrics.score_entropy(scores)
    of_two = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert total == pytest.approx(math.log2(10) + 0 + of_two)
    assert rows == 3
    assert metrics.score_entropy(scores - 5000)[0] == pytest.approx(total)


def test_prefix_entropy_per_step():
    #     0 -> 1 -> 3 (leaf);  0 -> 2 -> 4 -> 5 (leaf)
    parent, depth = np.array([-1, 0, 0, 1, 2, 4]), np.array([0, 1, 1, 2, 2, 3], np.uint16)
    nodes = metrics.path_nodes(np.array([3, 5]), parent, depth)
    assert nodes.tolist() == [[1, 3, -1], [2, 4, 5]]

    entropy = np.array([9.0, 2.0, 3.0, 0.5, 1.0, 0.25])
    sums, counts = metrics.prefix_entropy(nodes, np.array([2, 1]), entropy)
    assert sums.tolist() == [7.0, 2.0, 0.25]
    assert counts.tolist() == [3, 3, 1]


def test_exact_lists_compared_with_a_beam_search():
    leaves = np.array([[5, 6, 7], [8, 9, -1], [5, 9, 6]])
    certified = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)  # the last list ran out of budget
    beam = np.array([[6, 5, 2], [9, -1, -1], [9, 6, 5]])

    proven = metrics.proven_places(leaves, certified)
    assert proven.tolist() == [[True] * 3, [True] * 3, [True, False, False]]
    found = metrics.compare_with_beam(leaves, proven, beam, np.array([5, 8, 3]), [1, 3])
    assert found["missed_of_true_top"] == {"1": pytest.approx(1 / 3), "3": 1.0}
    assert found["token_match"]["hr@3"] == pytest.approx(1 / 3)
    assert found["token_match"]["hr@1"] == 0

    unproven = np.zeros((1, 3), bool)
    none = metrics.compare_with_beam(leaves[2:], unproven, beam[2:], np.array([5]), [1])
    assert none["missed_of_true_top"] == {"1": None, "3": None}


def test_calibration_bins_hold_equally_many_items():
    probability = np.array([0.9, 0.02, 0.5, 0.04, 0.3])
    hit = np.array([True, False, True, False, False])
    found = metrics.calibration(probability, hit, num_bins=2)
    low, high = found["bins"]
    assert (low["items"], high["items"]) == (3, 2)
    assert low["probability"] == pytest.approx(0.12) and low["hit_rate"] == 0
    assert high["probability"] == pytest.approx(0.7) and high["hit_rate"] == 1
    error = found["expected_calibration_error"]
    assert error == pytest.approx((3 * 0.12 + 2 * 0.3) / 5)
    assert len(metrics.calibration(probability, hit)["bins"]) == 5


def test_the_best_alpha_is_the_smallest_on_a_tie():
    values = {"0.0": 0.1, "0.3": 0.4, "0.2": 0.4, "1.0": 0.2}
    entries = {alpha: {"item_match": {"ndcg@10": value}} for alpha, value in values.items()}
    assert metrics.best_alpha({"alpha": entries, "num_beams": 10}) == "0.2"
    with pytest.raises(UsageError, match="cannot choose α by ndcg@20: .* its lists are shorter"):
        metrics.best_alpha({"alpha": entries, "num_beams": 10}, "ndcg@20")
