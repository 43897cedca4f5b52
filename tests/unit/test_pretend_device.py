"""How often search and training wait for an accelerator, and how many operations they launch."""

import concurrent.futures
import copy
import dataclasses
import multiprocessing
import types
from unittest import mock

import numpy as np
import pytest
import torch
from label_batch import label_batch
from oracle import (
    EOS,
    VOCABULARY,
    build_trie,
    random_items,
    random_prompts,
    random_weights,
    run_search,
    scoring_of,
    tiny_model,
    tiny_t5,
)
from pretend_device import pretend_device
from small_catalogue import batch_of_items, context_of

from igd_ds import distributed
from igd_ds.backbones import CausalLM, backbone_of
from igd_ds.contracts import IGNORED
from igd_ds.engine.step import optimizer_step
from igd_ds.generative_training import TokenLoss
from igd_ds.items.search_trie import SearchTrie
from igd_ds.objectives import OBJECTIVES
from igd_ds.search import frontier
from igd_ds.search.engine import search

# What a pass may do beside the model. It reads the device once. Operations were counted (37; masked
# softmax 47, T5 62), with room for a few more.
READS_PER_PASS, OPERATIONS_PER_PASS = 1, 45


def test_values_are_those_of_the_cpu_and_devices_do_not_mix():
    with pretend_device():
        x = torch.arange(6, device="pretend").view(2, 3)
        assert x.device.type == "pretend"
        x[0] += 10
        assert (x * 2).sum(1).cpu().tolist() == [66, 24]
        assert x.to(torch.float64).cpu().dtype == torch.float64
        with pytest.raises(RuntimeError, match="tensors on the pretend device and the CPU"):
            x + torch.ones(3, dtype=torch.int64)
        with pytest.raises(TypeError, match="copy it to the CPU"):
            x.numpy()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: int(x.max()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool((x > 1).all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: x.unique(),
        lambda x: x.bincount(),
        lambda x: torch.repeat_interleave(x),
        lambda x: x[torch.tensor([0])],
    ],
)
def test_what_waits_is_counted(wait):
    with pretend_device() as counts:
        x = torch.tensor([0, 1, 2], device="pretend")
        (x + 1).topk(2)
        assert counts.ours.operations.total() > 1 and not counts.ours.reads
        wait(x)
        assert counts.ours.reads.total() == 1


def titles(tail: int) -> list[tuple[int, ...]]:
    """Return items that end in `tail` tokens without an alternative."""
    random = np.random.default_rng(0)
    return [
        (*item[:-1], *(int(token) for token in random.integers(8, VOCABULARY, tail)), EOS)
        for item in random_items(120)
    ]


def counted_search(
    trie, users=2, beams=10, alphas=(0.5,), method="beam", model=None, **scoring_options
):
    """Return passes, reads and operations of a search, whose lists are those of the CPU."""
    model, prompts = model or tiny_model(), random_prompts(users)
    scoring = scoring_of(random_weights(trie), alphas=alphas, **scoring_options)
    with mock.patch.object(frontier, "CPU_LOOKAHEAD", frontier.DEVICE_LOOKAHEAD):
        expected = run_search(model, prompts, trie, scoring, beams, method=method)

    with pretend_device() as counts:
        model = copy.deepcopy(model).to("pretend")
        tree = backbone_of(model.config).prompt_tree(model)
        tree.prefill([np.array(prompt) for prompt in prompts])
        counts.clear()
        counts.watch(model)
        found = search(tree, SearchTrie.build(trie), scoring, beams, method)
        assert torch.equal(found.leaves, expected.leaves)
        for name, values in expected.counts.items():
            assert torch.equal(found.counts[name], values)
        return counts.passes, counts.ours.reads.total(), counts.ours.operations.total()


@pytest.mark.parametrize("method", ["beam", "exact"])
@pytest.mark.parametrize(
    "setting", [{}, {"users": 9}, {"beams": 40}, {"alphas": (0.0, 0.2, 1.0)}], ids=str
)
def test_a_pass_reads_once_whatever_it_holds(setting, method):
    trie = build_trie(titles(3))
    passes, reads, operations = counted_search(trie, method=method, **setting)
    assert passes > 3
    # One read more: that of the prompts' logits.
    assert reads <= READS_PER_PASS * (passes + 1)
    assert operations <= OPERATIONS_PER_PASS * (passes + 1)


@pytest.mark.parametrize(
    "setting",
    [
        {"masked_softmax": True},
        {"temperature": 2.0},
        {"model": tiny_model("mistral", sliding_window=5)},
        {"model": tiny_t5()},
    ],
    ids=["masked softmax", "temperature", "windows", "T5"],
)
def test_other_softmaxes_and_models_read_once_too(setting):
    passes, reads, operations = counted_search(build_trie(titles(3)), **setting)
    assert reads <= READS_PER_PASS * (passes + 1)
    assert operations <= 80 * (passes + 1)


def test_long_forced_runs_cost_nothing_more_per_pass():
    per_pass = []
    for tail in (0, 12, 40):
        passes, reads, operations = counted_search(build_trie(titles(tail)))
        assert reads <= passes + 1
        per_pass.append(operations / passes)
    assert max(per_pass) == per_pass[0]


class Engine(torch.nn.Module):
    """What `optimizer_step` asks of DeepSpeed's engine, without an update."""

    def __init__(self, model):
        super().__init__()
        self.module = model
        self.optimizer = types.SimpleNamespace(_global_grad_norm=1.0)

    def forward(self, **arguments):
        return self.module(**arguments)

    def backward(self, loss, scale_wrt_gas):
        loss.backward()

    def step(self):
        pass

    def fp16_enabled(self):
        return False

    def get_global_grad_norm(self):
        return 1.0


def training_batch(context, objective, items, seed):
    """Return a batch of prompts of one length, each with an item behind it; all weights are 1."""
    prompts = np.random.default_rng(seed).integers(1, VOCABULARY, (len(items), 6))
    offsets, tokens = context.stored.catalogue.offsets, context.stored.catalogue.token_ids
    length = np.diff(offsets)[items]
    shape = len(items), 6 + max(length)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
    for row, (prompt, item) in enumerate(zip(prompts, items, strict=True)):
        path = tokens[offsets[item] : offsets[item + 1]]
        ids[row, :6], ids[row, 6 : 6 + len(path)] = prompt, path
        labels[row, 6 : 6 + len(path)] = path
    mask = (np.arange(shape[1]) < 6 + length[:, None]).astype(np.int64)

    batch = label_batch(*map(torch.from_numpy, (ids, mask, labels)))
    weights = np.ones((len(tokens), len(objective.targets)), np.float32)
    of_items = batch_of_items(context, weights, items)
    batch = dataclasses.replace(batch, weights=of_items.weights, node=of_items.node)
    if objective.needs_null:
        index = torch.arange(len(batch.targets))
        batch = dataclasses.replace(batch, null=batch, null_index=index)
    return batch


OPTIONS = {
    "igd_beta": 0.2,
    "cft_lambda": 0.7,
    "position_floor": 0.3,
    "rank_tau": 0.6,
    "frequency_beta": 0.9,
    "msl_tau": "adaptive",
    "item_embeddings": "none.npy",
}


def training_step(name, device, num_batches):
    """Make a step of micro-batches of three rows.

    Returns:
        The loss's numerators, the gradient, and the reads outside of the model's forward passes.
    """
    own = {field.name for field in dataclasses.fields(OBJECTIVES[name].Options)}
    options = OBJECTIVES[name].Options(**{k: v for k, v in OPTIONS.items() if k in own})
    objective = OBJECTIVES[name](options, 10)
    paths = random_items(30)
    context = context_of(paths, np.ones(len(paths), np.int64))
    batches = [
        training_batch(context, objective, range(3 * i, 3 * i + 3), i) for i in range(num_batches)
    ]

    with (
        pretend_device() as counts,
        mock.patch.object(distributed, "device", lambda: torch.device(device)),
    ):
        model = tiny_model().to(device).train()
        context = dataclasses.replace(context, trie=context.trie.to(device))
        loss = TokenLoss(CausalLM(), objective, context)
        counts.watch(model)
        counts.clear()
        sums, _ = optimizer_step(Engine(model), batches, loss, step=0)
        reads = counts.ours.reads.copy()
        gradient = torch.cat([p.grad.cpu().flatten() for p in model.parameters()])
    return sums.numerators, gradient.numpy(), reads


@pytest.fixture(scope="module")
def process():
    """A process for backward passes on the pretend device.

    Autograd fixes its devices at a process's first backward pass, which other tests have made here.
    """
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as executor:
        yield executor


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_micro_batch_of_training_reads_at_most_twice(name, process):
    steps = [("cpu", 1), ("pretend", 1), ("pretend", 3)]
    results = [process.submit(training_step, name, device, count) for device, count in steps]
    (expected, expected_gradient, _), (found, gradient, once), (_, _, thrice) = (
        result.result() for result in results
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # fp32 sums in another order, relative to the whole gradient.
    error = np.linalg.norm(gradient - expected_gradient)
    assert error <= 1e-5 * np.linalg.norm(expected_gradient)
    assert thrice.total() - once.total() <= 2 * 2, thrice - once
