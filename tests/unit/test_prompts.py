"""Prompts: their segments, and histories that are cut by whole items from the oldest on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.errors import UsageError
from igd_ds.items.catalogue import item_paths

TITLES = ["a", "bb", "cccc", "dd dd", "e{item}"]


def tokenizer(bos: bool = False):
    """Return a tokenizer of characters; with `bos` it puts BOS before a text, as LLaMA-3 does."""
    characters = sorted({*"abcde {}itm\n\"'s,.:;#/RNxtkopf", *map(chr, range(33, 127))})
    core = Tokenizer(
        models.WordLevel(
            {t: i for i, t in enumerate(["<eos>", "<bos>", *characters])}, unk_token="<eos>"
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<eos>"
    )


def dataset_of(titles):
    """Return a dataset of items alone, with the domain "books"."""
    return InteractionDataset(
        folder=Path("none"),
        info={"domain": "books"},
        titles=titles,
        semantic_ids=None,
        splits={},
        fingerprint="",
    )


def builder(budget=1000, bos=False, template="short", titles=TITLES):
    dataset = dataset_of(titles)
    return PromptBuilder.build(Template.load(template), tokenizer(bos), dataset, "text", budget)


def text(prompts: PromptBuilder, history) -> str:
    return "".join(
        tokenizer().convert_ids_to_tokens(prompts.encode(np.array(history, dtype=np.int32)))
    )


def test_the_short_template():
    assert text(builder(), [0, 1, 4]) == "Recent books:\na\nbb\ne{item}\nNext:\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'prefix: "{\n', "line 2: while scanning a quoted scalar"),
        (b"prefix: a\nitem: '{item}'\nsuffix: \xff\n", "line 3: byte 0xff is not UTF-8"),
        (b"prefix: a\nsuffix: \x00\n", "line 2: character #x0000 is not allowed"),
        (b"prefix: a\nprefix: b\n", "line 2: key 'prefix' occurs twice, first on line 1"),
    ],
)
def test_a_damaged_template_is_told_in_one_line(tmp_path, content, why):
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        Template.load(str(path))
    assert str(caught.value).startswith(f"{path} is not valid YAML ({why}")
    assert "\n" not in str(caught.value)


def test_the_alpaca_template_quotes_titles():
    found = text(builder(template="alpaca"), [1, 2])
    assert found.endswith('the following books before: "bb", "cccc"\n\n\n### Response:\n')
    assert found.startswith("Below is an instruction")


def test_the_list_template_writes_items_as_targets():
    """A prompt with its target is the next prompt."""
    assert text(builder(template="list"), [0, 1, 4]) == "<eos>a\n<eos>bb\n<eos>e{item}\n<eos>"
    assert text(builder(template="list"), []) == "<eos>"
    prompts = builder(template="list", bos=True)
    paths, offsets = item_paths(dataset_of(TITLES), tokenizer(), "text")
    for history in ([], [3], [3, 0, 2]):
        target = paths[offsets[1] : offsets[2]]
        both = np.concatenate([prompts.encode(np.array(history, np.int64)), target])
        assert both.tolist() == prompts.encode(np.array([*history, 1])).tolist()
        assert both[:2].tolist() == [1, 0] and both.dtype == np.int32
    null = "".join(tokenizer().convert_ids_to_tokens(prompts.null))
    assert null == "<bos><eos>unknown<eos>" and prompts.null.dtype == np.int32


def test_bos_once_where_the_tokenizer_adds_one():
    ids = builder(bos=True).encode(np.array([0, 1]))
    assert ids[0] == 1 and (ids == 1).sum() == 1
    assert 1 not in builder().encode(np.array([0, 1]))


def test_empty_history():
    assert text(builder(), []) == "Recent books:\n\nNext:\n"


def test_a_prompt_without_a_token_is_refused():
    rows, nothing = np.arange(2), np.zeros(0, np.int32)
    split = Split("train", rows, nothing, np.zeros(3, np.int64), np.zeros(2, np.int32), None)
    builder().refuse_empty_prompts(split)
    bare = dataclasses.replace(builder(), begin=nothing, end=nothing)
    with pytest.raises(UsageError, match=r"row 0 of train \(2 in all\) has no history"):
        bare.refuse_empty_prompts(split)


def test_the_null_prompt_says_unknown_for_the_history():
    null = builder(template="alpaca", bos=True).null
    assert null[0] == 1 and null.dtype == np.int32
    found = "".join(tokenizer().convert_ids_to_tokens(null))
    assert found.endswith('the following books before: "unknown"\n\n\n### Response:\n')


@pytest.mark.parametrize("budget", range(28, 60))
def test_whole_items_are_cut_oldest_first(budget):
    prompts, history = builder(budget), np.array([2, 3, 1, 0, 2, 1])
    ids = prompts.encode(history)
    assert len(ids) <= budget
    kept = prompts.num_kept(history)
    newest = "\n".join(TITLES[i] for i in history[len(history) - kept :])
    assert text(prompts, history) == f"Recent books:\n{newest}\nNext:\n"
    if kept < len(history):
        one_more = builder().encode(history[len(history) - kept - 1 :])
        assert len(one_more) > budget


def test_lengths_without_building_the_prompts():
    histories = [[0], [0, 1, 2], [2, 2, 2, 2], [], [4, 3, 1]]
    split = Split(
        name="test",
        user_ids=np.arange(len(histories)),
        history_items=np.concatenate([np.array(h, dtype=np.int32) for h in histories]),
        history_offsets=np.concatenate([[0], np.cumsum([len(h) for h in histories])]),
        targets=np.zeros(len(histories), dtype=np.int32),
        timestamps=None,
    )
    for budget in (1000, 33):
        prompts = builder(budget)
        built = [len(prompts.encode(np.array(h, dtype=np.int32))) for h in histories]
        found = prompts.lengths(split)
        for length, exact in zip(found, built, strict=True):
            if exact < budget and length < budget:
                assert length == exact
            else:
                assert exact <= length <= budget


def test_items_without_the_texts_that_are_asked_for_are_named():
    with pytest.raises(UsageError, match="some items have no title"):
        builder(titles=["a", None])
    with pytest.raises(UsageError, match="the dataset has no semantic IDs"):
        PromptBuilder.build(
            Template.load("short"), tokenizer(), dataset_of(TITLES), "semantic-id", 100
        )


def test_a_title_longer_than_the_context_is_named():
    with pytest.raises(UsageError, match="--max_length leaves 30 tokens.*item 1 .*100 tokens"):
        builder(30, titles=["a", "b" * 100])


def test_templates_are_checked(tmp_path):
    with pytest.raises(
        UsageError, match="no template 'shrt'; known names: alpaca, chat, codes, list, short"
    ):
        Template.load("shrt")
    file = tmp_path / "mine.yaml"
    file.write_text("prefix: a\nitem: '{item}'\nseparator: ','\nsuffix: b\n")
    assert Template.load(str(file)).as_dict() == {
        "prefix": "a",
        "item": "{item}",
        "separator": ",",
        "suffix": "b",
    }
    file.write_text("prefix: a\nitem: title\nseparator: ','\nsuffix: b\n")
    with pytest.raises(UsageError, match="mine.yaml: 'item' must contain"):
        Template.load(str(file))
    file.write_text("prefix: a\nitem: '{target},'\nseparator: ''\nsuffix: b\n")
    with pytest.raises(UsageError, match="mine.yaml: 'item' must contain .* or be {target} alone"):
        Template.load(str(file))
    file.write_text("prefix: a\nitem: '{item} {target}'\nseparator: ''\nsuffix: b\n")
    with pytest.raises(UsageError, match="mine.yaml: {target} in 'item' .* stands alone"):
        Template.load(str(file))
    file.write_text("prefix: a\n")
    with pytest.raises(UsageError, match="mine.yaml: a prompt template has exactly the texts"):
        Template.load(str(file))
