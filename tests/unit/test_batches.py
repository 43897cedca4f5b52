"""Rows to batches: the same global batches on any ranks, and tensors of prompt + target."""

import dataclasses

import numpy as np
import pytest
import torch
from small_catalogue import stored_catalogue

from igd_ds.backbones.causal_lm import predicting_positions
from igd_ds.contracts import IGNORED, MASKED_ROW
from igd_ds.data.batches import (
    Collator,
    ShuffledRows,
    TokenColumns,
    deal,
    epoch_batches,
    refuse_empty,
    sample_rows,
    steps_per_epoch,
)
from igd_ds.data.dataset import Split
from igd_ds.data.prompts import PromptBuilder
from igd_ds.errors import UsageError


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize(("rows", "batch"), [(100, 8), (64, 64), (5, 8), (3000, 4)])
def test_an_epoch_has_every_row_once(rows, batch, group):
    lengths = np.random.default_rng(0).integers(1, 300, rows)
    batches = epoch_batches(lengths, batch, seed=1, epoch=0, group=group)
    assert batches.shape == (-(-rows // batch), batch)
    real = batches[batches != MASKED_ROW]
    assert np.array_equal(np.sort(real), np.arange(rows))
    again = epoch_batches(lengths, batch, seed=1, epoch=0, group=group)
    assert np.array_equal(batches, again)
    if rows > batch:
        assert not np.array_equal(
            batches, epoch_batches(lengths, batch, seed=1, epoch=1, group=group)
        )
        assert not np.array_equal(
            batches, epoch_batches(lengths, batch, seed=2, epoch=0, group=group)
        )


def test_grouping_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 300, 5000)

    def padding(group):
        batches = epoch_batches(lengths, 16, seed=0, epoch=0, group=group)
        padded = [lengths[b[b != MASKED_ROW]] for b in batches]
        return sum(len(p) * p.max() - p.sum() for p in padded) / lengths.sum()

    assert padding(True) < 0.05 < 0.5 < padding(False)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 2), (4, 2), (8, 1), (2, 4)])
def test_the_deal_covers_the_batch(world, micro):
    rows = np.arange(100, 108)
    windows = [deal(rows, rank, world, micro) for rank in range(world)]
    assert all(len(w) == 8 // (world * micro) and all(len(b) == micro for b in w) for w in windows)
    assert np.array_equal(np.sort(np.concatenate([np.concatenate(w) for w in windows])), rows)


def test_single_rows_keep_the_order_that_they_have_always_had():
    """Recorded before row trees: --packing rows --batching rows gives the numbers of before."""
    order = ShuffledRows(np.arange(1, 11) % 5, group=True)
    expected = [[5, 0, 9], [2, 6, 1], [8, 3, 7], [4, MASKED_ROW, MASKED_ROW]]
    assert order.epoch(3, seed=1, epoch=2).tolist() == expected
    assert [part.tolist() for part in order.deal(np.arange(12), 1, 2, 3)] == [[1, 3, 5], [7, 9, 11]]


PATHS = [[10, 0], [20, 21, 22, 0], [30, 0]]  # EOS = PAD = 0
WEIGHTS = np.array([1, 0.5, 1, 0.25, 0.25, 0.25, 0.125, 0.75], dtype=np.float32)


def split_of(histories, targets) -> Split:
    return Split(
        "train",
        np.arange(len(targets)),
        np.concatenate([np.array(history, np.int32) for history in histories]),
        np.cumsum([0, *map(len, histories)]),
        np.array(targets, dtype=np.int32),
        None,
    )


def collator() -> Collator:
    """Return a collator of three rows; item i of a history is written as the token 50 + i."""
    nothing = np.array([], dtype=np.int32)
    prompts = PromptBuilder(
        begin=nothing,
        separator=nothing,
        end=nothing,
        item_tokens=np.arange(50, 60, dtype=np.int32),
        item_offsets=np.arange(11),
        budget=100,
        null=np.array([7, 7], dtype=np.int32),
    )
    columns = TokenColumns.build(stored_catalogue(PATHS, np.ones(3, np.int64)), WEIGHTS[:, None])
    columns = dataclasses.replace(columns, zero_gain=WEIGHTS != 1)
    split = split_of([[1, 2, 3], [4], [5, 6, 7, 8, 9]], [2, 0, 1])
    return Collator(split, prompts, columns, pad_token_id=0)


def test_a_batch_by_hand():
    batch = collator()(np.array([2, 1, MASKED_ROW]))
    assert batch.inputs.input_ids.shape == (3, 16) and batch.inputs.input_ids.shape[1] % 8 == 0
    assert batch.inputs.input_ids[0, :9].tolist() == [55, 56, 57, 58, 59, 20, 21, 22, 0]
    assert batch.inputs.labels[0].tolist() == [IGNORED] * 5 + [20, 21, 22, 0] + [IGNORED] * 7
    # EOS is a label and PAD is not, though they are one token.
    assert batch.inputs.labels[1, :4].tolist() == [IGNORED, 10, 0, IGNORED]
    assert batch.inputs.attention_mask.sum(1).tolist() == [9, 3, 5]
    assert (batch.inputs.labels[2] == IGNORED).all() and batch.inputs.attention_mask[2].sum() > 0
    assert batch.row_ids.tolist() == [2, 1, MASKED_ROW]
    assert batch.item_ids.tolist() == [1, 0, MASKED_ROW]

    # The labelled tokens, row by row; the masked row has none.
    assert batch.targets.tolist() == [20, 21, 22, 0, 10, 0]
    assert batch.weights.tolist() == [[1], [0.25], [0.25], [0.25], [1], [0.5]]
    assert batch.zero_gain.tolist() == [False, True, True, True, False, True]
    assert batch.row.tolist() == [0, 0, 0, 0, 1, 1]
    assert batch.weights.dtype == torch.float32
    for integers in (batch.inputs.labels, batch.targets, batch.row, batch.node, batch.row_ids):
        assert integers.dtype == torch.int64
    assert batch.null is None and batch.null_index is None


def test_the_nodes_are_those_of_the_targets_in_the_trie():
    """Walking up from a token's node gives the item's tokens up to it."""
    stored = stored_catalogue(PATHS, np.ones(3, np.int64))
    batch = collator()(np.array([2, 1, 0]))
    paths = [PATHS[item] for item in (1, 0, 2)]
    prefixes = [path[: end + 1] for path in paths for end in range(len(path))]
    for node, prefix in zip(batch.node.tolist(), prefixes, strict=True):
        walked = []
        while node > 0:
            walked.insert(0, int(stored.trie.token[node]))
            node = int(stored.trie.parent[node])
        assert walked == prefix


def test_labels_weights_and_logits_line_up():
    batch = collator()(np.array([0, 2, 1]))
    mask = predicting_positions(batch.inputs.labels)
    assert mask.sum() == len(batch.targets) == len(batch.weights) == 8
    # The token after each predicting position is its target, and the rows follow each other.
    assert torch.equal(batch.inputs.input_ids[:, 1:][mask[:, :-1]], batch.targets)
    assert torch.equal(batch.inputs.labels[batch.inputs.labels != IGNORED], batch.targets)
    assert torch.equal((batch.inputs.labels != IGNORED).nonzero()[:, 0], batch.row)
    assert batch.weights[:, 0].tolist() == [0.125, 0.75, 1, 0.25, 0.25, 0.25, 1, 0.5]


def test_an_encoder_decoder_batch_and_the_null_prompt():
    """The encoder reads the prompt, the labels are the item; the null batch has items once."""
    plain = collator()
    null_prompt = plain.prompts.null
    both = dataclasses.replace(plain, encoder_decoder=True, null_prompt=null_prompt)
    batch = both(np.array([2, 1, MASKED_ROW, 2]))
    assert batch.inputs.input_ids[:, :5].tolist() == [
        [55, 56, 57, 58, 59],
        [54, 0, 0, 0, 0],
        [51, 52, 53, 0, 0],
        [55, 56, 57, 58, 59],
    ]
    assert batch.inputs.attention_mask.sum(1).tolist() == [
        5,
        1,
        3,
        5,
    ] and batch.inputs.input_ids.shape == (4, 8)
    assert batch.inputs.labels.tolist() == [
        [20, 21, 22, 0],
        [10, 0, IGNORED, IGNORED],
        [IGNORED] * 4,
        [20, 21, 22, 0],
    ]
    assert batch.weights[:, 0].tolist() == [1, 0.25, 0.25, 0.25, 1, 0.5, 1, 0.25, 0.25, 0.25]
    assert batch.row.tolist() == [0, 0, 0, 0, 1, 1, 3, 3, 3, 3]

    null = batch.null
    assert null.inputs.input_ids[:, :2].tolist() == [[7, 7]] * 3
    assert (null.inputs.attention_mask.sum(1) == 2).all()
    assert null.inputs.labels.tolist() == [
        [10, 0, IGNORED, IGNORED],
        [20, 21, 22, 0],
        [30, 0, IGNORED, IGNORED],
    ]
    assert torch.equal(null.targets[batch.null_index], batch.targets)

    causal = dataclasses.replace(plain, null_prompt=null_prompt)(np.array([2, 1]))
    assert causal.null.inputs.input_ids[:, :6].tolist() == [
        [7, 7, 10, 0, 0, 0],
        [7, 7, 20, 21, 22, 0],
    ]
    assert torch.equal(causal.null.targets[causal.null_index], causal.targets)
    empty = both(np.array([MASKED_ROW]))
    assert len(empty.null_index) == len(empty.targets) == len(empty.row) == 0
    assert empty.weights.shape == (0, 1)


def test_a_moved_batch_has_all_of_its_tensors_on_the_device():
    batch = dataclasses.replace(collator(), null_prompt=np.array([7, 7], np.int32))(np.array([2]))
    moved = batch.to(torch.device("meta"))
    for part in (moved, moved.inputs, moved.null, moved.null.inputs):
        tensors = [value for value in vars(part).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 3 and all(value.device.type == "meta" for value in tensors)


def test_padding_stays_within_the_longest_row_that_is_allowed():
    """A multiple of 8 can lie beyond a model's context."""
    narrow = collator()
    prompts = dataclasses.replace(narrow.prompts, budget=5)
    narrow = dataclasses.replace(narrow, prompts=prompts)
    longest = 5 + max(len(path) for path in PATHS)
    assert longest % 8 and narrow.max_length == longest
    assert narrow(np.array([2])).inputs.input_ids.shape[1] == longest
    assert collator()(np.array([2])).inputs.input_ids.shape[1] == 16


def test_a_sample_of_rows_is_ascending_and_follows_from_its_seed():
    assert sample_rows(5, 0, seed=1).tolist() == sample_rows(5, 9, seed=1).tolist() == [*range(5)]
    rows = sample_rows(100, 10, seed=1)
    assert len(set(rows.tolist())) == 10 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sample_rows(100, 10, seed=1))
    assert not np.array_equal(rows, sample_rows(100, 10, seed=2))
    assert [steps_per_epoch(rows, 8) for rows in (1, 8, 9)] == [1, 1, 2]


def test_rows_without_history_are_refused_where_they_are_asked_for():
    split = split_of([[1], [], [2]], [0, 1, 2])
    refuse_empty(split, np.array([0, 2]))
    with pytest.raises(UsageError, match="row 1 of train has an empty history"):
        refuse_empty(split, np.array([0, 1]))
