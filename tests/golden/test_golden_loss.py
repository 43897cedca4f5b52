"""The reference implementation's weighted losses and gradient norms (fp32, one thread)."""

import json

import numpy as np
import pytest
import torch

from igd_ds.backbones.causal_lm import label_logits
from igd_ds.data.batches import Batch
from igd_ds.items import decisiveness
from igd_ds.items.trie import TokenTrie
from igd_ds.loss import IGNORED, at_labels, token_nll, weighted_sums


@pytest.fixture(scope="module")
def golden(shared):
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    folder = shared / "golden" / "books"
    eos = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token=eos, pad_token=eos
    )
    frequency = json.loads((folder / "frequency.json").read_text())
    encoded = tokenizer([f"{title}\n" for title in frequency], add_special_tokens=False)[
        "input_ids"
    ]
    paths = [ids + [tokenizer.eos_token_id] for ids in encoded]
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in paths])])
    token_ids = np.concatenate(paths).astype(np.int32)
    trie = TokenTrie.build(token_ids, offsets, np.array(list(frequency.values())))
    zero = decisiveness.zero_gain(trie)[trie.path_nodes(offsets)]
    zero_of = {
        tuple(path): zero[start : start + len(path)]
        for path, start in zip(paths, offsets, strict=False)
    }
    model = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return json.loads((folder / "loss.json").read_text()), zero_of, model


def batch_of(samples, zero_of, beta: float) -> Batch:
    """The golden samples as a right-padded Batch; an item outside the trie gets β on every token, as the reference does."""
    width = max(len(s["input_ids"]) for s in samples)
    input_ids = torch.zeros((len(samples), width), dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORED)
    weights = torch.zeros(input_ids.shape)
    mask = torch.zeros_like(input_ids)
    for i, sample in enumerate(samples):
        ids, target = sample["input_ids"], [t for t in sample["labels"] if t != IGNORED]
        zero = zero_of.get(tuple(target), np.ones(len(target), dtype=bool))
        where = slice(len(ids) - len(target), len(ids))
        input_ids[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
        labels[i, where] = torch.tensor(target)
        weights[i, where] = torch.where(torch.from_numpy(zero.copy()), beta, 1.0)
    rows = torch.arange(len(samples))
    return Batch(input_ids, mask, labels, weights[:, :, None], weights != 1, rows, rows)


@pytest.mark.parametrize("index", range(4))
def test_loss_and_gradient_norm(golden, index):
    recorded, zero_of, model = golden
    expected = recorded["results"][index]
    batch = batch_of(recorded["samples"], zero_of, expected["beta"])
    model.train()
    model.zero_grad()
    logits = label_logits(model, batch.input_ids, batch.attention_mask, batch.labels)
    nll = token_nll(logits, at_labels(batch.labels, batch.labels))
    weighted, omega = weighted_sums(nll, at_labels(batch.token_weights, batch.labels))
    loss = weighted / omega
    loss.backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    # fp32 in another order of summation; the recorded loss itself is 1e-6 off its independent fp64 value.
    assert loss.item() == pytest.approx(expected["loss"], abs=3e-6)
    assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-5)
