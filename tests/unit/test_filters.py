"""Item filters and guidance against the items' paths, at every node of small tries."""

import math

import numpy as np
import pytest
import torch
from oracle import EOS, build_trie, node_paths, random_items

from igd_ds.errors import UsageError
from igd_ds.search.filters import Guidance, ItemFilter, ItemRanges


def shared_leaves(seed: int = 0) -> list[tuple[int, ...]]:
    """60 items in random order; 20 of them have the path of another one."""
    items = random_items(40, seed)
    random = np.random.default_rng(seed)
    return [(items + items[:20])[i] for i in random.permutation(60)]


def items_below(trie, items) -> list[set[int]]:
    """The item ids under every node, from the paths alone."""
    return [
        {i for i, item in enumerate(items) if item[: len(path)] == path}
        for path in node_paths(trie)
    ]


def every_pair(num_users: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of user and node (or item), shuffled: questions come in any order."""
    pairs = torch.cartesian_prod(torch.arange(num_users), torch.arange(count))
    return pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))].unbind(1)


def assert_open_nodes(trie, items, item_filter, allowed: list[set[int]]):
    below = items_below(trie, items)
    user, node = every_pair(len(allowed), trie.num_nodes)
    expected = [
        bool(below[n] & allowed[u]) for u, n in zip(user.tolist(), node.tolist(), strict=True)
    ]
    found = item_filter.allows(user, node)
    assert found.dtype == torch.bool and found.tolist() == expected
    user, item = every_pair(len(allowed), len(items))
    expected = [i in allowed[u] for u, i in zip(user.tolist(), item.tolist(), strict=True)]
    assert item_filter.allows_items(user, item).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_every_kind_of_list_against_the_paths(seed):
    items = shared_leaves(seed)
    trie, everything = build_trie(items), set(range(len(items)))
    random = np.random.default_rng(seed)

    # With repetitions.
    few, many, other = (random.integers(0, len(items), size=n) for n in (3, 100, 20))
    last = int(random.integers(len(items)))
    allow = [None, few, None, [*many.tolist(), last], None, [last], everything, None]
    deny = [
        None,
        None,
        few.tolist(),
        [i for i in other.tolist() if i != last],
        [],
        None,
        few,
        everything - {last},
    ]

    item_filter = ItemFilter.build(ItemRanges.build(trie), len(allow), allow, deny)
    only = [everything if ids is None else {int(i) for i in ids} for ids in allow]
    without = [set() if ids is None else {int(i) for i in ids} for ids in deny]
    allowed = [a - d for a, d in zip(only, without, strict=True)]
    assert_open_nodes(trie, items, item_filter, allowed)


def test_one_kind_of_list_or_none_at_all():
    items = shared_leaves()
    trie, everything = build_trie(items), set(range(len(items)))
    ranges = ItemRanges.build(trie)
    assert_open_nodes(trie, items, ItemFilter.build(ranges, 2), [everything, everything])
    assert_open_nodes(
        trie, items, ItemFilter.build(ranges, 2, allow=[[5, 5, 0], None]), [{0, 5}, everything]
    )
    assert_open_nodes(
        trie,
        items,
        ItemFilter.build(ranges, 2, deny=[None, {7, 3}]),
        [everything, everything - {3, 7}],
    )
    assert ItemFilter.build(ranges, 0).allow.tolist() == []


def test_a_shared_leaf_is_open_while_any_of_its_items_is_allowed():
    items = [(1, EOS), (2, EOS), (1, EOS)]
    trie = build_trie(items)
    leaf = int(trie.leaf_of_item[0])
    assert leaf == trie.leaf_of_item[2]
    item_filter = ItemFilter.build(
        ItemRanges.build(trie), 3, allow=[[2], None, None], deny=[None, [0], [0, 2]]
    )
    assert item_filter.allows(torch.arange(3), torch.tensor([leaf] * 3)).tolist() == [
        True,
        True,
        False,
    ]
    user, item = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 0, 2], dtype=torch.int32)
    assert item_filter.allows_items(user, item).tolist() == [False, True, False, True]


def test_thousands_of_ids_on_a_large_trie():
    """5,000 ids per user, 100,000 items; open nodes are found by a walk up from allowed leaves."""
    random = np.random.default_rng(0)
    codes = random.integers(1, 257, size=(100_000, 4))
    trie = build_trie(np.concatenate([codes, np.full((len(codes), 1), EOS)], axis=1))
    lists = [random.integers(0, len(codes), size=5_000) for _ in range(4)]

    # Two users may get nothing under one first token, so that whole subtrees close.
    branch = np.flatnonzero(codes[:, 0] == 7)
    allow = [lists[0], None, lists[2], None]
    deny = [None, np.concatenate([lists[1], branch]), branch, lists[3]]
    item_filter = ItemFilter.build(ItemRanges.build(trie), 4, allow, deny)

    nodes = torch.arange(trie.num_nodes)
    for user in range(4):
        allowed = np.zeros(len(codes), bool)
        allowed[... if allow[user] is None else allow[user]] = True
        allowed[[] if deny[user] is None else deny[user]] = False

        is_open = np.zeros(trie.num_nodes, bool)
        node = np.unique(trie.leaf_of_item[allowed])
        while len(node):
            is_open[node] = True
            node = np.unique(trie.parent[node[node > 0]])

        found = item_filter.allows(torch.full_like(nodes, user), nodes).numpy()
        np.testing.assert_array_equal(found, is_open)
        assert 0 < is_open.sum() < trie.num_nodes

    listed = sum(len(np.unique(ids)) for ids in (*allow, *deny) if ids is not None)
    assert len(item_filter.keys) <= listed + 1


@pytest.mark.parametrize(
    ("allow", "deny", "message"),
    [
        (
            [None, [60]],
            None,
            r"user 1 of the batch \(ann\): item 60 of the allow list is not in the catalogue; "
            "ids are 0 to 59",
        ),
        ([[0, -1], None], None, r"user 0 of the batch \(bob\): item -1 of the allow list"),
        (None, [None, [3, 99]], r"\(ann\): item 99 of the deny list"),
        ([None, []], None, r"\(ann\): nothing is left of the 60 items"),
        (None, [range(60), None], r"\(bob\): nothing is left"),
        ([None, [4, 4]], [None, [4]], r"\(ann\): nothing is left"),
        ([None, [0.5]], None, r"\(ann\): the allow list must be a flat list of item ids"),
        # A mask, not ids.
        (None, [np.zeros(60, bool), None], r"\(bob\): the deny list must be a flat list"),
        ([None, [[1], [2]]], None, r"\(ann\): the allow list must be a flat list"),
        ([[1]], None, "one allow list .* per user is needed: found 1 for 2 users"),
    ],
)
def test_bad_lists_name_the_user(allow, deny, message):
    ranges = ItemRanges.build(build_trie(shared_leaves()))
    with pytest.raises(UsageError, match=message):
        ItemFilter.build(ranges, 2, allow, deny, names=["bob", "ann"])


def test_users_without_labels_are_numbered():
    with pytest.raises(UsageError, match="^user 1 of the batch: item 77"):
        ItemFilter.build(ItemRanges.build(build_trie(shared_leaves())), 2, allow=[None, [77]])


def edges_of(trie, num_users: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    user, edge = every_pair(num_users, trie.num_nodes - 1)
    return user, torch.from_numpy(np.asarray(trie.parent[1:], np.int64))[edge], edge + 1


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weight", [0.3, 1.0, 2.5])
def test_guidance_of_every_edge(weight, as_tensor):
    items = shared_leaves()
    trie = build_trie(items)
    below = items_below(trie, items)
    q = np.random.default_rng(0).gamma(0.3, size=(3, len(items))).astype(np.float32)
    q[:, ::7] = 0
    q[2] *= 1e6  # scores, not probabilities

    guidance = Guidance.build(
        ItemRanges.build(trie), torch.from_numpy(q) if as_tensor else q, weight
    )
    user, parent, child = edges_of(trie, 3)
    found = guidance.increments(user, parent, child)
    assert found.dtype == torch.float32 and not found.isnan().any()

    kinds = set()
    for u, v, c, increment in zip(*(t.tolist() for t in (user, parent, child, found)), strict=True):
        of_child, of_parent = (math.fsum(float(q[u, i]) for i in below[node]) for node in (c, v))
        expected = weight * math.log(of_child / of_parent) if of_child else -math.inf
        assert increment == pytest.approx(expected, rel=1e-5, abs=1e-6)
        kinds.add((of_child > 0, of_parent > 0))

    # Children of parents without mass were asked about, too.
    assert kinds == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_guidance_never_raises_a_score_and_adds_up_to_the_leaf(weight):
    """The exact search needs increments ≤ 0, here with masses over 20 orders of magnitude."""
    items = shared_leaves()
    trie = build_trie(items)
    below = items_below(trie, items)
    q = 10 ** np.random.default_rng(0).uniform(-20, 0, size=(20, len(items)))

    guidance = Guidance.build(ItemRanges.build(trie), q, weight)
    user, parent, child = edges_of(trie, 20)
    found = guidance.increments(user, parent, child)
    assert (found <= 0).all()
    assert found.isfinite().all()  # every item has mass, however small: none may be forbidden

    forced = torch.from_numpy(np.diff(trie.child_begin) == 1)[parent]
    assert forced.any() and (found[forced] == 0).all()

    table = torch.zeros(20, trie.num_nodes, dtype=torch.float64)
    table[user, child] = found.double()
    for leaf in np.flatnonzero(trie.is_leaf):
        node, total = leaf, torch.zeros(20, dtype=torch.float64)
        while node:
            total, node = total + table[:, node], trie.parent[node]
        share = q[:, sorted(below[leaf])].sum(1) / q.sum(1)
        exact = share > 1e-14  # below, the unit of 4e-19 shows
        np.testing.assert_allclose(
            total[exact], weight * np.log(share[exact]), rtol=1e-4, atol=1e-4
        )
        assert (total[~exact] < weight * math.log(2e-14)).all()


def test_guidance_of_no_weight_forbids_nothing():
    trie = build_trie(shared_leaves())
    q = np.zeros((1, 60))
    q[0, 3] = 1
    guidance = Guidance.build(ItemRanges.build(trie), q, 0.0)
    assert (guidance.increments(*edges_of(trie, 1)) == 0).all()


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, 0.0])
def test_bad_guidance_names_the_user(value):
    message = "every item a score of 0" if value == 0 else "negative, NaN or infinite"
    q = np.ones((2, 60))
    q[1] = 0
    q[1, 5] = value
    with pytest.raises(UsageError, match=rf"user 1 of the batch \(ann\): --guidance .*{message}"):
        Guidance.build(ItemRanges.build(build_trie(shared_leaves())), q, 1.0, names=["bob", "ann"])


def test_bad_shapes_and_weights():
    ranges = ItemRanges.build(build_trie(shared_leaves()))
    with pytest.raises(
        UsageError, match=r"one row per user of 60 item scores, found shape \(2, 61\)"
    ):
        Guidance.build(ranges, np.ones((2, 61)), 1.0)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="--guidance_weight must not be negative"):
            Guidance.build(ranges, np.ones((2, 60)), weight)
