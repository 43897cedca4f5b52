"""The flat trie against a trie of plain dicts, on random catalogues with all special cases."""

import numpy as np
import pytest
import torch

from igd_ds.errors import UsageError
from igd_ds.items.ragged import index_within, ragged_arange, ragged_rows
from igd_ds.items.search_trie import SearchTrie
from igd_ds.items.trie import TokenTrie

EOS = 0


def ragged(paths):
    """Return token_ids (int32) and offsets (int64) of a list of token lists."""
    return np.array([t for p in paths for t in p], np.int32), np.cumsum([0, *map(len, paths)])


def random_paths(seed, vocabulary=4, items=60):
    """Short paths over few tokens: equal paths, beginnings of other paths, single tokens."""
    rng = np.random.default_rng(seed)
    paths = [[*rng.integers(1, vocabulary, rng.integers(0, 7)).tolist(), EOS] for _ in range(items)]
    counts = rng.integers(0, 6, items) * (rng.random(items) < 0.7)  # cold items among them
    return paths, counts


def random_semantic_ids(seed, items=80):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 4, (items, 3)) + [1, 5, 9]
    return [[*row, EOS] for row in codes.tolist()], rng.integers(0, 5, items) * (
        rng.random(items) < 0.6
    )


CASES = {
    **{f"random-{seed}": random_paths(seed) for seed in range(8)},
    "large-ids": (
        [[150_000, 151_935, 9, EOS], [151_935, EOS], [150_000, 151_935, EOS]],
        np.array([1, 0, 2**33]),
    ),
    **{f"semantic-{seed}": random_semantic_ids(seed) for seed in range(3)},
    "one-item": ([[3, 1, EOS]], np.array([5])),
    "one-token-items": ([[EOS], [EOS], [2, EOS]], np.array([1, 2, 0])),
    "all-cold": ([[1, 2, EOS], [1, 3, EOS], [2, EOS]], np.zeros(3, np.int64)),
    "all-equal": ([[1, 2, EOS]] * 4, np.array([1, 0, 0, 2])),
    "one-warm": ([[1, 2, EOS], [1, 3, EOS], [2, EOS]], np.array([7, 0, 0])),
}


def brute_force(paths):
    """Return prefixes (tuples) in breadth-first, lexicographic order, and the items under each."""
    items = {}
    for item, path in enumerate(paths):
        for depth in range(len(path) + 1):
            items.setdefault(tuple(path[:depth]), []).append(item)
    return sorted(items, key=lambda prefix: (len(prefix), prefix)), items


@pytest.fixture(params=CASES)
def case(request):
    paths, counts = CASES[request.param]
    token_ids, offsets = ragged(paths)
    return paths, counts, TokenTrie.build(token_ids, offsets, counts)


def test_structure_equals_brute_force(case):
    paths, counts, trie = case
    prefixes, items = brute_force(paths)
    number = {prefix: n for n, prefix in enumerate(prefixes)}
    assert trie.num_nodes == len(prefixes)

    for n, prefix in enumerate(prefixes):
        assert trie.token[n] == (prefix[-1] if prefix else -1)
        assert trie.parent[n] == (number[prefix[:-1]] if prefix else -1)
        assert trie.depth[n] == len(prefix)
        children = [number[p] for p in prefixes if len(p) == len(prefix) + 1 and p[:-1] == prefix]
        assert list(range(trie.child_begin[n], trie.child_begin[n + 1])) == children
        assert trie.is_leaf[n] == (not children)
        assert trie.num_items[n] == len(items[prefix])
        assert trie.train_count[n] == sum(int(counts[i]) for i in items[prefix])

        first = trie.first_item[n]
        under = trie.item_order[first : first + trie.num_items[n]]
        assert sorted(under) == items[prefix]
        if not children:
            assert list(under) == items[prefix]  # equal paths by item id
            assert all(trie.leaf_of_item[i] == n for i in under)

    levels = trie.level_begin()
    assert [trie.depth[b] for b in levels[:-1]] == list(range(len(levels) - 1))
    assert levels[-1] == trie.num_nodes


def test_path_nodes_follow_every_item(case):
    paths, _, trie = case
    prefixes, _ = brute_force(paths)
    number = {prefix: n for n, prefix in enumerate(prefixes)}
    _, offsets = ragged(paths)
    nodes = trie.path_nodes(offsets)
    assert nodes.dtype == np.int32
    assert nodes.tolist() == [
        number[tuple(path[: t + 1])] for path in paths for t in range(len(path))
    ]


def test_path_nodes_refuse_another_catalogue():
    token_ids, offsets = ragged([[1, 2, EOS], [3, EOS]])
    trie = TokenTrie.build(token_ids, offsets, np.ones(2, np.int64))
    with pytest.raises(UsageError, match="different catalogues"):
        trie.path_nodes(np.array([0, 2, 5]))


def test_dtypes(case):
    trie = case[2]
    expected = {"depth": np.uint16, "item_count": trie.item_count.dtype}
    expected["train_count"] = np.int64 if trie.train_count[0] >= 2**31 else np.int32
    for name, array in vars(trie).items():
        assert array.dtype == expected.get(name, np.int32), name


def test_the_device_view_has_the_same_nodes(case):
    trie = case[2]
    search_trie = SearchTrie.build(trie)
    assert search_trie.num_nodes == trie.num_nodes
    for name in ("token", "parent"):
        assert getattr(search_trie, name).tolist() == np.maximum(getattr(trie, name), 0).tolist()
    for name in ("child_begin", "depth"):
        assert getattr(search_trie, name).tolist() == getattr(trie, name).tolist(), name
    nodes = torch.arange(trie.num_nodes)
    assert search_trie.is_leaf(nodes).tolist() == trie.is_leaf.tolist()
    row, child = search_trie.children(nodes)  # all nodes but the root, in their own order
    assert child.tolist() == list(range(1, trie.num_nodes))
    assert row.tolist() == trie.parent[1:].tolist()


def test_many_rounds_of_ties_sort_right():
    """Paths that differ late, so that several rounds of sorting decide their order."""
    rng = np.random.default_rng(0)
    paths = [[7] * 30 + rng.integers(1, 3, 12).tolist() + [EOS] for _ in range(300)]
    trie = TokenTrie.build(*ragged(paths), np.ones(300, np.int64))
    assert trie.item_order.tolist() == sorted(range(300), key=lambda i: (paths[i], i))


@pytest.mark.parametrize("seed", range(5))
def test_ragged_ranges(seed):
    rng = np.random.default_rng(seed)
    begin, count = rng.integers(0, 50, 20), rng.integers(0, 4, 20)
    expected = [
        (row, value) for row in range(20) for value in range(begin[row], begin[row] + count[row])
    ]
    row, value = ragged_rows(torch.from_numpy(begin), torch.from_numpy(count))
    assert list(zip(row.tolist(), value.tolist(), strict=True)) == expected
    assert ragged_arange(begin, count).tolist() == value.tolist()
    assert len(ragged_arange(begin[:0], count[:0])) == 0

    offsets = np.append(0, np.cumsum(count))
    assert index_within(offsets).tolist() == [i for n in count.tolist() for i in range(n)]


@pytest.mark.parametrize(
    ("paths", "counts", "message"),
    [
        ([], [], "at least one item"),
        ([[1, 0], [2, 3]], [1, 1], "item 0 ends in 0, item 1 in 3"),
        ([[1, 0], [2, 0, 3, 0]], [1, 1], "item 1 holds the EOS token 0"),
        ([[1, 0], [], [2, 0]], [1, 1, 1], "item 1 has no token"),
        ([[1, 0]], [-1], "counts must be"),
        ([[1, 0]], [1, 2], "counts must be"),
        ([[-5, 0]], [1], "token ids must be"),
        ([[1] * 65_535 + [0]], [1], "65,535"),
    ],
)
def test_bad_input_is_refused(paths, counts, message):
    with pytest.raises(UsageError, match=message):
        TokenTrie.build(*ragged(paths), np.array(counts))
