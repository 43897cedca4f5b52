"""Metrics against tables worked by hand and against brute force."""

import itertools
import math

import numpy as np
import pytest

from igd_ds import metrics

LISTS = np.array([[7, 3, 5], [4, 9, -1], [6, 2, 8], [-1, -1, -1]])
TARGET = np.array([3, 4, 1, 5])  # rank 2, rank 1, absent, empty list


def test_hr_and_ndcg_of_a_table_worked_by_hand():
    ahead = metrics.items_ahead(LISTS, TARGET)
    assert ahead.tolist() == [1, 0, math.inf, math.inf]
    sums = metrics.ranking_sums(ahead, [1, 3])
    assert sums == pytest.approx({"hr@1": 1, "ndcg@1": 1, "hr@3": 2, "ndcg@3": 1 + 1 / math.log2(3)})
    assert metrics.means(sums, 4)["hr@3"] == 0.5
    assert metrics.means(sums, 0) == dict.fromkeys(sums)


def test_item_match_counts_the_share_of_the_leaf():
    sums = metrics.ranking_sums(metrics.items_ahead(LISTS, TARGET), [3], credit=np.array([1 / 4, 1, 1 / 2, 1]))
    assert sums == pytest.approx({"hr@3": 1.25, "ndcg@3": 1 + 0.25 / math.log2(3)})


def test_popularity_is_the_expectation_over_random_orders_of_ties():
    count = np.array([3, 1, 0, 1, 1, 5])
    targets = np.array([1, 5, 2, 0, 3])
    ahead, tied = metrics.popularity_ranking(count, targets)
    assert ahead.tolist() == [2, 0, 5, 1, 2] and tied.tolist() == [3, 1, 1, 1, 3]
    sums = metrics.ranking_sums(ahead, [1, 3, 5], tied)
    orders = [order for order in itertools.permutations(range(6)) if all(np.diff(count[list(order)]) <= 0)]
    for k in (1, 3, 5):
        ranks = np.array([[order.index(target) + 1 for target in targets] for order in orders])
        assert sums[f"hr@{k}"] == pytest.approx((ranks <= k).sum() / len(orders))
        assert sums[f"ndcg@{k}"] == pytest.approx(((ranks <= k) / np.log2(ranks + 1)).sum() / len(orders))


def test_cutoffs_beyond_the_list_are_omitted_with_a_warning():
    with pytest.warns(UserWarning, match="at 20 are omitted"):
        assert metrics.usable_cutoffs(10) == [1, 3, 5, 10]


def test_first_token_repetition():
    tokens = np.array([[3, 1, 2], [2, 4, -1], [3, 1, 3], [-1, -1, -1]])  # the empty list does not count
    total, rows = metrics.first_token_repetition(tokens)
    assert total == pytest.approx(1 / 3 + 1 / 2 + 2 / 3) and rows == 3
    assert metrics.first_token_repetition(tokens, top=1) == (3.0, 3)


def test_score_entropy_in_bits():
    scores = np.array([[0.0] * 10, [0.0] + [-np.inf] * 9, [math.log(3), 0.0] + [-np.inf] * 8, [-np.inf] * 10])
    total, rows = metrics.score_entropy(scores)
    assert total == pytest.approx(math.log2(10) + 0 - (0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))) and rows == 3
    assert metrics.score_entropy(scores - 5000)[0] == pytest.approx(total)


def test_prefix_entropy_per_step():
    #     0 -> 1 -> 3 (leaf);  0 -> 2 -> 4 -> 5 (leaf)
    parent, depth = np.array([-1, 0, 0, 1, 2, 4]), np.array([0, 1, 1, 2, 2, 3], np.uint16)
    nodes = metrics.path_nodes(np.array([3, 5]), parent, depth)
    assert nodes.tolist() == [[1, 3, -1], [2, 4, 5]]
    sums, counts = metrics.prefix_entropy(nodes, np.array([2, 1]), np.array([9.0, 2.0, 3.0, 0.5, 1.0, 0.25]))
    assert sums.tolist() == [7.0, 2.0, 0.25] and counts.tolist() == [3, 3, 1]


def test_an_exact_list_beside_a_beams():
    leaves = np.array([[5, 6, 7], [8, 9, -1], [5, 9, 6]])
    certified = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)  # the last list ran out of budget
    beam = np.array([[6, 5, 2], [9, -1, -1], [9, 6, 5]])
    found = metrics.compare_with_beam(leaves, certified, beam, np.array([5, 8, 3]), [1, 3])
    assert found["proof_share"] == pytest.approx(2 / 3)
    assert found["beam"]["missed_of_true_top"] == {"1": pytest.approx(1 / 3), "3": 1.0}
    assert found["beam"]["token_match"]["hr@3"] == pytest.approx(1 / 3) and found["beam"]["token_match"]["hr@1"] == 0
    none = metrics.compare_with_beam(leaves[2:], np.zeros((1, 3), bool), beam[2:], np.array([5]), [1])
    assert none["proof_share"] == 0 and none["beam"]["missed_of_true_top"] == {"1": None, "3": None}
