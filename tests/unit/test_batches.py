"""Rows to batches: the same global batches whatever the ranks, and tensors that hold exactly prompt + target."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from igd_ds.data.batches import MASKED_ROW, Collator, deal, epoch_batches
from igd_ds.loss import IGNORED, at_labels, predicting_positions


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


class Prompts:
    def encode(self, history):
        return np.asarray(history, dtype=np.int32) + 50


def collator():
    histories = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6, 7, 8, 9])]
    split = SimpleNamespace(
        history=lambda r: histories[r], targets=np.array([2, 0, 1], dtype=np.int32)
    )
    token_ids = np.array(
        [10, 0, 20, 21, 22, 0, 30, 0], dtype=np.int32
    )  # items of 2, 4 and 2 tokens; EOS = PAD = 0
    weights = np.array([1, 0.5, 1, 0.25, 0.25, 0.25, 0.125, 0.75], dtype=np.float32)
    return Collator(
        split,
        Prompts(),
        token_ids,
        np.array([0, 2, 6, 8]),
        weights[:, None],
        weights != 1,
        pad_token_id=0,
    )


def test_a_batch_by_hand():
    batch = collator()(np.array([2, 1, MASKED_ROW]))
    assert batch.input_ids.shape == (3, 16) and batch.input_ids.shape[1] % 8 == 0
    assert batch.input_ids[0, :9].tolist() == [55, 56, 57, 58, 59, 20, 21, 22, 0]
    assert batch.labels[0].tolist() == [IGNORED] * 5 + [20, 21, 22, 0] + [IGNORED] * 7
    assert batch.token_weights[0, :, 0].tolist() == [0] * 5 + [1, 0.25, 0.25, 0.25] + [0] * 7
    assert batch.labels[1, :4].tolist() == [
        IGNORED,
        10,
        0,
        IGNORED,
    ]  # EOS is a label, PAD is not, though they are one token
    assert batch.attention_mask.sum(1).tolist() == [9, 3, 5]
    assert (
        (batch.labels[2] == IGNORED).all()
        and batch.token_weights[2].sum() == 0
        and batch.attention_mask[2].sum() > 0
    )
    assert batch.row_ids.tolist() == [2, 1, MASKED_ROW] and batch.item_ids.tolist() == [
        1,
        0,
        MASKED_ROW,
    ]
    assert batch.token_weights.dtype == torch.float32 and batch.labels.dtype == torch.int64


def test_labels_weights_and_logits_line_up():
    batch = collator()(np.array([0, 2, 1]))
    mask = predicting_positions(batch.labels)
    targets, weights = (
        at_labels(batch.labels, batch.labels),
        at_labels(batch.token_weights, batch.labels),
    )
    assert mask.sum() == len(targets) == len(weights) == 8
    # The token after each predicting position is its target.
    assert torch.equal(batch.input_ids[:, 1:][mask[:, :-1]], targets)
    assert weights[:, 0].tolist() == [0.125, 0.75, 1, 0.25, 0.25, 0.25, 1, 0.5]


def test_an_encoder_decoder_batch_and_the_null_prompt():
    """The prompt goes to the encoder, the item to the labels; CFT's null batch has each item once."""
    plain = collator()
    both = dataclasses.replace(
        plain, encoder_decoder=True, null_prompt=np.array([7, 7], dtype=np.int32)
    )
    batch = both(np.array([2, 1, MASKED_ROW, 2]))
    assert batch.input_ids[:, :5].tolist() == [
        [55, 56, 57, 58, 59],
        [54, 0, 0, 0, 0],
        [51, 52, 53, 0, 0],
        [55, 56, 57, 58, 59],
    ]
    assert batch.attention_mask.sum(1).tolist() == [5, 1, 3, 5] and batch.input_ids.shape == (4, 8)
    assert batch.labels.tolist() == [
        [20, 21, 22, 0],
        [10, 0, IGNORED, IGNORED],
        [IGNORED] * 4,
        [20, 21, 22, 0],
    ]
    assert batch.token_weights[..., 0].tolist() == [
        [1, 0.25, 0.25, 0.25],
        [1, 0.5, 0, 0],
        [0] * 4,
        [1, 0.25, 0.25, 0.25],
    ]
    assert (
        batch.null_input_ids[:, :2].tolist() == [[7, 7]] * 3
        and (batch.null_attention_mask.sum(1) == 2).all()
    )
    assert batch.null_labels.tolist() == [
        [10, 0, IGNORED, IGNORED],
        [20, 21, 22, 0],
        [30, 0, IGNORED, IGNORED],
    ]
    targets, null_targets = (
        at_labels(batch.labels, batch.labels),
        at_labels(batch.null_labels, batch.null_labels),
    )
    assert torch.equal(null_targets[batch.null_index], targets)
    causal = dataclasses.replace(plain, null_prompt=np.array([7, 7], dtype=np.int32))(
        np.array([2, 1])
    )
    assert causal.null_input_ids[:, :6].tolist() == [[7, 7, 10, 0, 0, 0], [7, 7, 20, 21, 22, 0]]
    null_targets = at_labels(causal.null_labels, causal.null_labels)
    assert torch.equal(null_targets[causal.null_index], at_labels(causal.labels, causal.labels))
    empty = both(np.array([MASKED_ROW]))
    assert len(empty.null_index) == 0 and at_labels(empty.labels, empty.labels).numel() == 0
