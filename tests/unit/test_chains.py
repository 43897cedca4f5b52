"""Chains of rows, and batches of whole chains, against definitions that are written out."""

import dataclasses

import numpy as np
import pytest
from small_catalogue import stored_catalogue

from igd_ds.contracts import MASKED_ROW
from igd_ds.data.batches import Collator, TokenColumns
from igd_ds.data.chains import OPEN_BINS, RowChains, linked_rows, packed, written_alike
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder

NUM_ITEMS = 30
EOS = 0


def world(
    seed: int, max_history: int = 6, budget: int = 1000, as_list: bool = False, num_users: int = 25
):
    """Return a split with users of 1 to 12 rows, its prompts, and the catalogue's columns.

    Rows are shuffled. Behind `max_history` items, histories are truncated. Item i has 1 to 4 tokens
    and EOS; the history writes it with one more token in front, or, as a list, as the target.
    """
    random = np.random.default_rng(seed)
    paths = [[*random.integers(10, 90, random.integers(1, 5)), EOS] for _ in range(NUM_ITEMS)]
    users, histories, targets = [], [], []
    for user in range(num_users):
        items = random.integers(0, NUM_ITEMS, random.integers(2, 14))
        for end in range(1, len(items)):
            users.append(user)
            histories.append(items[max(0, end - max_history) : end])
            targets.append(items[end])
    order = random.permutation(len(users))
    split = Split(
        "train",
        np.array(users)[order],
        np.concatenate([histories[row] for row in order]).astype(np.int32),
        np.cumsum([0, *(len(histories[row]) for row in order)]),
        np.array(targets, np.int32)[order],
        None,
    )

    columns = TokenColumns.build(
        stored_catalogue(paths, np.ones(NUM_ITEMS, np.int64)),
        np.ones((sum(map(len, paths)), 1), np.float32),
    )
    written = paths if as_list else [[5, *path[:-1]] for path in paths]
    nothing = np.array([], np.int32)
    prompts = PromptBuilder(
        begin=np.array([1, 2], np.int32),
        separator=nothing if as_list else np.array([3], np.int32),
        end=nothing if as_list else np.array([4, 4], np.int32),
        item_tokens=np.concatenate(written).astype(np.int32),
        item_offsets=np.cumsum([0, *map(len, written)]),
        budget=budget,
        null=np.array([1, 2], np.int32),
    )
    return split, prompts, columns


def chains_of(rows: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(rows, offsets[1:-1])]


def goes_on(split: Split, before: int, after: int) -> bool:
    """Whether `after` follows `before` by the definition."""
    expected = [*split.history(before), split.targets[before]]
    same_user = split.user_ids[before] == split.user_ids[after]
    return bool(same_user and split.history(after).tolist() == expected)


@pytest.mark.parametrize("seed", range(3))
def test_linked_rows(seed):
    split, _, _ = world(seed)
    chains = chains_of(*linked_rows(split))
    assert sorted(sum(chains, [])) == list(range(len(split)))
    for chain in chains:
        assert all(goes_on(split, *pair) for pair in zip(chain, chain[1:], strict=False))
    # A row that starts a chain follows no row, unless a twin of that row has a follower already.
    assert max(map(len, chains)) == 6
    assert all(len(chain) == 1 for chain in chains if len(split.history(chain[0])) == 6)


def test_a_cut_prompt_ends_the_chain():
    split, prompts, columns = world(0, budget=20)
    chains = RowChains.build(split, prompts, columns)
    cut = prompts.rows_kept(split) < np.diff(split.history_offsets)
    assert 20 < cut.sum() < len(split) - 20
    for chain in chains_of(chains.rows, chains.offsets):
        assert not cut[chain].any() or len(chain) == 1
    in_chains = [c for c in chains_of(chains.rows, chains.offsets) if len(c) > 1]
    assert in_chains
    for chain in in_chains:
        assert chains.before[chain].tolist() == [MASKED_ROW, *chain[:-1]]


def test_items_that_are_written_alike():
    _, prompts, columns = world(0)
    assert not written_alike(prompts, columns).any()
    _, prompts, columns = world(0, as_list=True)
    assert np.array_equal(written_alike(prompts, columns), np.diff(columns.offsets))
    half = dataclasses.replace(
        prompts, item_tokens=np.where(prompts.item_tokens == EOS, 7, prompts.item_tokens)
    )
    assert np.array_equal(written_alike(half, columns), np.diff(columns.offsets) - 1)


def test_bins_are_full_and_chains_are_cut_only_to_fill_them():
    random = np.random.default_rng(0)
    ends = np.cumsum(random.integers(1, 9, 400))
    chains = np.split(np.arange(ends[-1]), ends[:-1])
    sizes = [16] * (ends[-1] // 16) + [ends[-1] % 16]
    bins = packed(chains, sizes)
    assert [len(content) for content in bins] == sizes
    assert sorted(np.concatenate(bins).tolist()) == list(range(ends[-1]))

    whole = {tuple(chain) for chain in chains}
    cut = 0
    for chain in chains:
        places = {b for b, content in enumerate(bins) if set(chain) & set(content)}
        cut += len(places) > 1
    assert len(whole) == 400 and cut < 400 / 16
    assert packed([np.arange(5)], [2, 2, 1])[1].tolist() == [2, 3]
    assert [len(b) for b in packed([np.arange(9)], [0, 4, 0, 5])] == [0, 4, 0, 5]
    assert len(packed([np.arange(1)] * 100, [1] * 100)) > OPEN_BINS


@pytest.mark.parametrize("global_batch", [8, 16, 64, 1000])
def test_an_epoch_has_every_row_once_and_masks_only_its_last_batch(global_batch):
    split, prompts, columns = world(1)
    chains = RowChains.build(split, prompts, columns)
    batches = chains.epoch(global_batch, seed=1, epoch=0)
    assert batches.shape == (-(-len(split) // global_batch), global_batch)
    assert (batches[:-1] != MASKED_ROW).all()
    assert np.array_equal(np.sort(batches[batches != MASKED_ROW]), np.arange(len(split)))
    assert np.array_equal(batches, chains.epoch(global_batch, seed=1, epoch=0))
    if global_batch < 1000:
        assert not np.array_equal(batches, chains.epoch(global_batch, seed=1, epoch=1))
        assert not np.array_equal(batches, chains.epoch(global_batch, seed=2, epoch=0))


def test_most_chains_stay_whole():
    split, prompts, columns = world(1)
    chains = RowChains.build(split, prompts, columns)
    batches = chains.epoch(32, seed=1, epoch=0)
    num_chains = len(chains.offsets) - 1
    whole = sum(
        any(set(chain) <= set(batch) for batch in batches.tolist())
        for chain in chains_of(chains.rows, chains.offsets)
    )
    assert num_chains - len(batches) <= whole <= num_chains


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_the_deal_does_not_depend_on_the_ranks(micro_batch):
    split, prompts, columns = world(2)
    chains = RowChains.build(split, prompts, columns)
    for batch in chains.epoch(32, seed=1, epoch=0)[[0, 1, -1]]:
        found = []
        for world_size in (1, 2, 4):
            dealt = [
                chains.deal(batch, rank, world_size, micro_batch) for rank in range(world_size)
            ]
            steps = 32 // (micro_batch * world_size)
            assert all(len(parts) == steps for parts in dealt)
            parts = [part for parts in dealt for part in parts]
            assert all(len(part) == micro_batch for part in parts)
            assert np.array_equal(np.sort(np.concatenate(parts)), np.sort(batch))
            found.append(sorted(part.tolist() for part in parts))
        assert found[0] == found[1] == found[2]


def test_a_long_chain_is_cut_and_the_masked_rows_are_together():
    chains = RowChains(
        rows=np.arange(7),
        offsets=np.array([0, 6, 7]),
        before=np.array([-1, 0, 1, 2, 3, 4, -1]),
        tokens=np.full(7, 10),
        new_tokens=np.full(7, 2),
    )
    batch = np.array([0, 1, 2, 3, 4, 5, 6, *[MASKED_ROW] * 5])
    parts = chains.deal(batch, 0, 1, 4)
    assert [part.tolist() for part in parts] == [[4, 5, 6, -1], [0, 1, 2, 3], [-1] * 4]
    assert [chains.num_nodes(part) for part in parts] == [22, 16, 0]


@pytest.mark.parametrize("as_list", [False, True])
def test_ranks_get_about_equal_numbers_of_nodes(as_list):
    """The estimate is close to the trees that the collator builds."""
    split, prompts, columns = world(3, as_list=as_list, num_users=200)
    chains = RowChains.build(split, prompts, columns)
    collate = Collator(split, prompts, columns, EOS, as_tree=True)

    def nodes_by_rank(batch, deal) -> np.ndarray:
        parts = [deal(batch, rank, 4, 8) for rank in range(4)]
        nodes = [[int(collate(part).inputs.num_tokens()) for part in own] for own in parts]
        for own, numbers in zip(parts, nodes, strict=True):
            for part, number in zip(own, numbers, strict=True):
                assert 0.6 * chains.num_nodes(part) <= number <= chains.num_nodes(part)
        return np.sum(nodes, axis=1)

    batches = chains.epoch(128, seed=0, epoch=0)[:-1]
    balanced = np.array([nodes_by_rank(batch, chains.deal) for batch in batches])
    assert (balanced.max(1) / balanced.mean(1)).mean() < 1.06
