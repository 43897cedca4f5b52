"""Prompts: segments tokenized apart and joined; history cut oldest-first by whole items so that the target always fits."""

from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from igd_ds.data.prompts import PromptBuilder, Template

TITLES = ["a", "bb", "cccc", "dd dd", "e{item}"]


def tokenizer(bos: bool = False):
    """One token per character; with `bos`, a BOS is put before every text, as LLaMA-3 does."""
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


def builder(budget=1000, bos=False, template="short", titles=TITLES):
    dataset = SimpleNamespace(titles=titles, semantic_ids=None, info={"domain": "books"})
    return PromptBuilder.build(Template.load(template), tokenizer(bos), dataset, "text", budget)


def text(prompts: PromptBuilder, history) -> str:
    return "".join(
        tokenizer().convert_ids_to_tokens(prompts.encode(np.array(history, dtype=np.int32)))
    )


def test_the_short_template():
    assert text(builder(), [0, 1, 4]) == "Recent books:\na\nbb\ne{item}\nNext:\n"


def test_the_alpaca_template_quotes_titles():
    found = text(builder(template="alpaca"), [1, 2])
    assert found.endswith('the following books before: "bb", "cccc"\n\n\n### Response:\n')
    assert found.startswith("Below is an instruction")


def test_bos_once_where_the_tokenizer_adds_one():
    ids = builder(bos=True).encode(np.array([0, 1]))
    assert ids[0] == 1 and (ids == 1).sum() == 1
    assert 1 not in builder().encode(np.array([0, 1]))


def test_empty_history():
    assert text(builder(), []) == "Recent books:\n\nNext:\n"


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
    split = SimpleNamespace(
        history_items=np.concatenate([np.array(h, dtype=np.int32) for h in histories]).astype(
            np.int32
        ),
        history_offsets=np.concatenate([[0], np.cumsum([len(h) for h in histories])]),
    )
    for budget in (1000, 33):
        prompts = builder(budget)
        built = [len(prompts.encode(np.array(h, dtype=np.int32))) for h in histories]
        found = prompts.lengths(split)
        assert all(
            f == b if b < budget and f < budget else b <= f <= budget
            for f, b in zip(found, built, strict=True)
        )


def test_a_title_longer_than_the_context_is_named():
    with pytest.raises(ValueError, match="--max_length leaves 30 tokens.*item 1 .*100 tokens"):
        builder(30, titles=["a", "b" * 100])


def test_templates_are_checked(tmp_path):
    with pytest.raises(ValueError, match="no template 'shrt'; known names: alpaca, codes, short"):
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
    with pytest.raises(ValueError, match="mine.yaml: 'item' must contain"):
        Template.load(str(file))
    file.write_text("prefix: a\n")
    with pytest.raises(ValueError, match="mine.yaml: a prompt template has exactly the texts"):
        Template.load(str(file))
