"""Rows as one tree of tokens, against a trie of dictionaries that is walked token by token."""

import dataclasses
import functools
import types

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from label_batch import label_batch
from test_backbone_trees import TREES, VOCABULARY, tiny
from test_batches import collator

from igd_ds.backbones import CausalLM, backbone_of, row_tree_attention
from igd_ds.backbones.tree_attention import attention_in_recomputation
from igd_ds.contracts import IGNORED, MASKED_ROW, Batch
from igd_ds.data.prompts import Template
from igd_ds.data.row_trees import build_row_tree
from igd_ds.errors import UsageError
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import batching_of, content_of, packing_of


class Naive:
    """The tree by its definition: a node per different prefix, in the order of the prefixes."""

    def __init__(self, rows: list[list[int]]):
        prefixes = {tuple(row[: end + 1]) for row in rows for end in range(len(row))}
        self.prefixes = sorted(prefixes)
        self.number = {prefix: node for node, prefix in enumerate(self.prefixes)}

    def sees(self, q: int, k: int) -> bool:
        """Whether node k is node q or one of its ancestors."""
        above, own = self.prefixes[k], self.prefixes[q]
        return own[: len(above)] == above


def random_rows(seed: int, num_rows: int, length: int, vocabulary: int) -> list[list[int]]:
    """Return rows that share prefixes often: few tokens, and rows that go on from other rows."""
    random = np.random.default_rng(seed)
    rows: list[list[int]] = []
    for _ in range(num_rows):
        begin = rows[random.integers(len(rows))] if rows and random.random() < 0.5 else []
        more = random.integers(0, vocabulary, random.integers(1, length)).tolist()
        rows.append([*begin[: random.integers(len(begin) + 1)], *more])
    return rows


ROWS = {
    "one row": [[5, 6, 7]],
    "one token": [[0]],
    "equal rows": [[5, 6, 7], [5, 6, 7], [5, 6, 7]],
    "a row that is a prefix of another": [[5, 6, 7, 8], [5, 6], [5, 6, 7]],
    "two users without a common token": [[5, 6], [9, 1, 1], [5, 7], [9, 1]],
    "token 0 and large tokens": [[0, 0], [0], [70_000, 0], [256, 1], [1, 256], [70_000, 255]],
    "random 1": random_rows(1, 20, 6, 3),
    "random 2": random_rows(2, 64, 30, 2),
    "random 3": random_rows(3, 7, 4, 300),
}


def test_the_largest_token_of_a_small_integer_type():
    tree = build_row_tree([np.array([7, 65_535], np.uint16)], np.array([1]))
    assert tree.token.tolist() == [7, 65_535]


@pytest.mark.parametrize("name", ROWS)
def test_nodes_are_the_different_prefixes(name):
    rows, naive = ROWS[name], Naive(ROWS[name])
    num_labels = np.array([1 + (i % len(row)) for i, row in enumerate(rows)])
    tree = build_row_tree([np.array(row, np.int32) for row in rows], num_labels)

    assert tree.token.tolist() == [prefix[-1] for prefix in naive.prefixes]
    assert tree.position.tolist() == [len(prefix) - 1 for prefix in naive.prefixes]
    nodes = range(len(naive.prefixes))
    for q in nodes:
        seen = [k for k in nodes if k <= q < tree.end[k]]
        assert seen == [k for k in nodes if naive.sees(q, k)]

    # The labelled tokens in the order of the rows.
    expected = [
        naive.number[tuple(row[: end + 1])]
        for row, count in zip(rows, num_labels, strict=True)
        for end in range(len(row) - count, len(row))
    ]
    assert tree.predicting[tree.label_place].tolist() == expected
    assert tree.predicting.tolist() == sorted(set(expected))


def test_every_array_is_int64():
    tree = build_row_tree([np.array([5, 6], np.int32)], np.array([1]))
    assert {value.dtype for value in vars(tree).values()} == {torch.int64}


def test_the_collator_leaves_masked_rows_out():
    padded = collator()
    trees = dataclasses.replace(padded, as_tree=True)
    rows = np.array([2, MASKED_ROW, 1])
    batch, expected = trees(rows), padded(rows)
    assert batch.inputs.token.tolist() == [54, 10, 55, 56, 57, 58, 59, 20, 21, 22]
    assert batch.inputs.end.tolist() == [2, 2, *[10] * 8]
    assert batch.inputs.predicting[batch.inputs.label_place].tolist() == [6, 7, 8, 9, 0, 1]
    assert batch.inputs.num_tokens() == 10 and expected.inputs.num_tokens() == 9 + 5 + 3

    # All but the inputs is as without a tree.
    for entry in dataclasses.fields(batch):
        if entry.name not in ("inputs", "null", "null_index"):
            assert torch.equal(getattr(batch, entry.name), getattr(expected, entry.name))


def test_a_batch_of_masked_rows_still_has_a_token_to_read():
    batch = dataclasses.replace(collator(), as_tree=True)(np.full(2, MASKED_ROW))
    tree = batch.inputs
    assert len(tree.token) == 1 and len(tree.predicting) == len(tree.label_place) == 0
    assert len(batch.targets) == 0


def test_null_rows_are_a_tree_behind_one_prompt():
    null_prompt = np.array([7, 7], np.int32)
    trees = dataclasses.replace(collator(), as_tree=True, null_prompt=null_prompt)
    batch = trees(np.array([2, 1, 2, 0]))
    null = batch.null
    assert null.inputs.token.tolist() == [7, 7, 10, 20, 21, 22, 30]
    assert null.inputs.predicting[null.inputs.label_place].tolist() == [1, 2, 1, 3, 4, 5, 1, 6]
    assert torch.equal(null.targets[batch.null_index], batch.targets)


# Sums of fp32 run in another order: with weights of this size, gradients differ by 2 to 6e-7.
# A wrong mask or position changes them by 1e-2 and more.
GRADIENT = 1e-6

ARCHITECTURES = ["qwen2", "qwen2 with windows", "llama", "gemma2", "gemma3", "gpt-oss", "phi3",
                 "gpt2", "opt (learned positions with an offset)"]  # fmt: skip
WITH_LORA = ["qwen2", "llama", "gemma3"]


FEWER_LAYERS = {
    "gemma3": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
    }
}


def small(name: str):
    """Return a small model of an architecture of test_backbone_trees, with milder logits."""
    kind, settings = TREES[name]
    scale = {key: 0.1 for key in ("initializer_range", "init_std") if key in settings}
    return tiny(kind, settings | scale | FEWER_LAYERS.get(name, {}))


def batches(rows: list[list[int]], num_labels: list[int], masked: int = 0) -> tuple[Batch, Batch]:
    """Return token sequences as a padded batch and as a tree, with `masked` masked rows behind."""
    width = max(map(len, rows))
    shape = (len(rows) + masked, width)
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for i, (row, count) in enumerate(zip(rows, num_labels, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(row) - count : len(row)] = torch.tensor(row[len(row) - count :])
    mask[len(rows) :, 0] = 1
    padded = label_batch(ids, mask, labels)
    tree = build_row_tree([np.array(row[:-1]) for row in rows], np.array(num_labels))
    return padded, dataclasses.replace(padded, inputs=tree)


def users_rows(seed: int, num_users: int = 4, num_rows: int = 5) -> tuple[list[list[int]], list]:
    """Return rows of several users behind one frame: histories that grow, items of 1 to 4 tokens.

    They include equal rows, a row that is a prefix of another, and one row alone.
    """
    random = np.random.default_rng(seed)
    rows, num_labels = [], []
    for _ in range(num_users):
        history = [1, 2, 3]
        for _ in range(num_rows):
            item = random.integers(4, VOCABULARY, random.integers(1, 5)).tolist()
            rows.append([*history, 2, *item, 0])
            num_labels.append(len(item) + 1)
            history = [*history, *item]
    rows += [rows[0], rows[1][:-1], [9, 8, 0]]
    num_labels += [num_labels[0], num_labels[1] - 1, 2]
    return rows, num_labels


def loss_and_gradients(model, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return Σ w · NLL over the labelled tokens, with weights that differ, and its gradients."""
    model.zero_grad(set_to_none=True)
    losses = F.cross_entropy(
        CausalLM().label_logits(model, batch).float(), batch.targets, reduction="none"
    )
    loss = (torch.arange(1, len(losses) + 1) * losses).sum() / len(losses)
    loss.backward()
    named = model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return loss.item(), gradients


def relative_error(found: dict, expected: dict) -> float:
    """Return the relative L2 distance over all parameters."""
    assert found.keys() == expected.keys() and found
    squares = sum(((found[n] - expected[n]) ** 2).sum() for n in expected)
    return float((squares / sum((expected[n] ** 2).sum() for n in expected)).sqrt())


def assert_trees_equal_rows(model, rows, num_labels, masked: int = 0) -> None:
    padded, tree = batches(rows, num_labels, masked)
    usual = model.config._attn_implementation
    loss, gradients = loss_and_gradients(model, tree)
    assert model.config._attn_implementation == usual
    expected_loss, expected = loss_and_gradients(model, padded)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative_error(gradients, expected) <= GRADIENT


@pytest.mark.isa
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_equal_those_of_rows(name, size, monkeypatch):
    """With blocks of 8 nodes, blocks look at ancestors in earlier blocks."""
    monkeypatch.setattr(row_tree_attention, "BLOCK", size)
    assert_trees_equal_rows(small(name), *users_rows(0))


def test_one_row_alone_equals_itself():
    model = small("qwen2").train()
    assert_trees_equal_rows(model, [[5, 6, 7, 0]], [2])
    assert_trees_equal_rows(model, [[5, 0]], [1], masked=3)


def with_lora(model, checkpointing: bool = False):
    """Return the model with LoRA adapters whose matrices are all random."""
    if checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(1)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", WITH_LORA)
def test_with_lora(name):
    assert_trees_equal_rows(with_lora(small(name).train()), *users_rows(1))


@pytest.mark.parametrize("lora", [False, True])
def test_a_recomputed_layer_sees_the_tree_again(lora):
    """The backward pass recomputes the layers after the kernel has been taken back."""
    model = small("gemma3").train()
    rows, num_labels = users_rows(2)
    model = with_lora(model, checkpointing=True) if lora else model
    _, expected = loss_and_gradients(model, batches(rows, num_labels)[0])

    contexts = functools.partial(attention_in_recomputation, model.config)
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    for batch in batches(rows, num_labels):
        assert relative_error(loss_and_gradients(model, batch)[1], expected) <= GRADIENT


def test_a_tree_that_predicts_nothing_has_gradients_of_zero():
    model = small("qwen2").train()
    tree = build_row_tree([np.array([5])], np.zeros(1, np.int64))
    batch = dataclasses.replace(batches([[5, 0]], [1])[0], inputs=tree)
    logits = CausalLM().label_logits(model, batch)
    assert logits.shape == (0, VOCABULARY)
    logits.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("window", [None, 5])
def test_masks_of_blocks_and_of_flex_attention(window):
    """Both are the rule of the tree, written out node by node."""
    rows, num_labels = users_rows(3, num_users=20)
    tree = batches(rows, num_labels)[1].inputs
    nodes = torch.arange(len(tree.token))
    q, k = nodes[:, None], nodes[None, :]
    expected = (k <= q) & (q < tree.end[k])
    if window:
        expected &= tree.position[q] - tree.position[k] < window

    blocks = row_tree_attention.NodeBlocks.build(tree, size=32)
    mask = blocks.mask(tree, window)[:, 0]
    assert blocks.key.shape[1] <= 32 + int(tree.position.max()) + 1
    found = torch.zeros_like(expected)
    for query, key, seen in zip(blocks.query, blocks.key, mask, strict=True):
        row, column = seen.nonzero(as_tuple=True)
        found[query[row], key[column]] = True
    assert torch.equal(found, expected)

    # FlexAttention reads a block either through the rule or, where it is listed as full, without.
    flex = row_tree_attention.flex_block_mask(tree, window)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(flex.mask_mod(zero, zero, q, k), expected)
    size = row_tree_attention.FLEX_BLOCK
    num_blocks = -(-len(nodes) // size)
    assert num_blocks >= 3 or window
    full = blocks_of(flex.full_kv_num_blocks, flex.full_kv_indices)
    partly = blocks_of(flex.kv_num_blocks, flex.kv_indices)
    for i in range(num_blocks):
        for j in range(num_blocks):
            block = expected[i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert not block.any() or (i, j) in full | partly
            assert block.all() or (i, j) not in full
            assert block.any() or window or (i, j) not in partly


def blocks_of(counts: torch.Tensor, indices: torch.Tensor) -> set[tuple[int, int]]:
    """Return the pairs of blocks that a BlockMask lists."""
    rows = zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)
    return {(i, j) for i, (count, listed) in enumerate(rows) for j in listed[:count]}


def config_of(**settings) -> TrainConfig:
    required = {"ds_config": "x", "dataset": "x", "output_dir": "x", "model_config": "x"}
    return TrainConfig(**required | {"tokenizer": "x", "objective": "uniform"} | settings)


@pytest.mark.parametrize(
    ("kind", "settings", "packing", "expected"),
    [
        ("qwen2", {}, "auto", "tree"),
        ("qwen2", {"attn_implementation": "sdpa"}, "auto", "tree"),
        ("qwen2", {"attn_implementation": "eager"}, "auto", "rows"),
        ("qwen2", {}, "rows", "rows"),
        ("qwen2", {}, "tree", "tree"),
        ("bloom", {}, "auto", "rows"),
        ("t5", {}, "auto", "rows"),
    ],
)
def test_trees_are_the_default_where_the_model_reads_them(kind, settings, packing, expected):
    model_config = transformers.AutoConfig.for_model(kind)
    config = config_of(packing=packing, **settings)
    config.check()
    assert packing_of(config, backbone_of(model_config), model_config) == expected


@pytest.mark.parametrize("kind", ["bloom", "t5"])
def test_a_model_that_cannot_read_trees_is_named(kind):
    model_config = transformers.AutoConfig.for_model(kind)
    with pytest.raises(UsageError, match=f"--packing tree: models of type {kind} .*LLaMA, Qwen2"):
        packing_of(config_of(packing="tree"), backbone_of(model_config), model_config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": "tree", "attn_implementation": "eager"}, "eager cannot read row trees"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(UsageError, match=message):
        config_of(**settings).check()


def test_what_the_files_of_some_settings_hold(tmp_path):
    """A shape by its name, a file, a folder as transformers writes it, a name on the hub."""
    inputs = types.SimpleNamespace(template=Template.load("short"))
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "shape.json", tmp_path / "folder" / "config.json"):
        path.write_text("{}")
    named = {
        name: content_of(dataclasses.replace(config_of(), model_config=name), inputs)
        for name in ("qwen2-1m", str(tmp_path / "shape.json"), str(tmp_path / "folder"), "org/name")
    }
    hashes = [content.get("model_config") for content in named.values()]
    assert hashes[0] and hashes[1] == hashes[2] != hashes[0] and hashes[3] is None
    assert named["org/name"]["prompt"]["separator"] == Template.load("short").separator

    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.zeros((2, 2)))
    config = config_of(objective="front-greater", item_embeddings=str(vectors))
    before = content_of(config, inputs)["item_embeddings"]
    np.save(vectors, np.ones((2, 2)))
    assert content_of(config, inputs)["item_embeddings"] != before


def test_shuffled_rows_alone_may_be_mixed_in_length():
    """Whoever asks for plain shuffling does not get chains by default."""
    assert [batching_of(config_of(), packing) for packing in ("tree", "rows")] == ["chains", "rows"]
    mixed = config_of(length_grouping=False, batching="rows")
    assert batching_of(mixed, "tree") == "rows"
    assert batching_of(config_of(length_grouping=False), "rows") == "rows"
    for batching in ("auto", "chains"):
        with pytest.raises(UsageError, match="--no-length_grouping has no effect"):
            batching_of(config_of(length_grouping=False, batching=batching), "tree")


@pytest.mark.parametrize("sinks", [False, True])
def test_half_precision_attends_as_float32_does(sinks):
    """Of rounded inputs, the result is that of float32, rounded."""
    torch.manual_seed(0)
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 5]), np.array([1, 2, 3, 6, 7])]
    tree = row_tree_attention.RowTreePass(build_row_tree(rows, np.ones(3, np.int64)))
    num_nodes = len(tree.tree.token)
    query, key, value = (torch.randn(1, heads, num_nodes, 8).bfloat16() for heads in (4, 2, 2))
    more = {"s_aux": torch.randn(4)} if sinks else {}

    attend = functools.partial(row_tree_attention.row_tree_attention, None, tree=tree, **more)
    found, _ = attend(query, key, value, None)
    exact, _ = attend(query.float(), key.float(), value.float(), None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
