"""Titles that go wrong: missing values, control tokens, merged and very long ones; templates.

The inputs of `shared/faults/make_inputs.py` and further members of each kind.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast, T5Config

from igd_ds import training_inputs
from igd_ds.backbones import backbone_of
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.commands import prepare as prepare_command
from igd_ds.data.cut_titles import cut_titles, with_cut_titles
from igd_ds.data.dataset import InteractionDataset, Split
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.errors import UsageError
from igd_ds.evaluation.results import final_metrics
from igd_ds.items.as_text import control_tokens, encode
from igd_ds.items.catalogue import Catalogue, item_paths, tokenizer_fingerprint
from igd_ds.items.shared_paths import SharedPaths
from igd_ds.items.trie import TokenTrie
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import Inputs

CONTROL = ["<s>", "</s>", "<pad>", "<|im_start|>"]


@pytest.fixture(scope="session")
def faults(shared) -> ModuleType:
    """Return make_inputs.py as a module."""
    path = shared / "faults" / "make_inputs.py"
    spec = importlib.util.spec_from_file_location("make_inputs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(source: Path, output: Path, *more: str) -> InteractionDataset:
    """Run igd prepare on a folder of `sequences`."""
    flags = ["--source", "sequences", "--input", source, "--protocol", "leave-one-out"]
    assert prepare_command.main([*map(str, flags), "--output", str(output), *more]) == 0
    return InteractionDataset.load(output)


def dataset_of(titles, histories=((0,),)) -> InteractionDataset:
    """Return a dataset in memory whose splits have these histories, all with target 0."""
    lengths = [len(history) for history in histories]
    rows = Split(
        name="train",
        user_ids=np.arange(len(histories)),
        history_items=np.concatenate([np.array(h, dtype=np.int32) for h in histories]),
        history_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        targets=np.zeros(len(histories), np.int32),
        timestamps=None,
    )
    return InteractionDataset(
        folder=Path("in memory"),
        info={"domain": "books"},
        titles=list(titles),
        semantic_ids=None,
        splits={"train": rows},
        fingerprint="",
    )


def byte_tokenizer(begin: str = "", chat_template: str | None = None, added=()):
    """Return a tokenizer with a token per byte, and CONTROL as special tokens.

    Args:
        begin: special tokens that it puts before a text, such as "<s>".
        chat_template: its chat template.
        added: further special tokens.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*CONTROL, *added])
    if begin:
        pairs = [(name, backend.token_to_id(name)) for name in begin.split()]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=pairs
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def unigram_tokenizer(text: str):
    """Return a Unigram tokenizer, whose vocabulary holds the special tokens too (as T5's does)."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([text] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def prompt_of(template: Template, tokenizer, titles, history, budget=1000) -> list[int]:
    """Return the token ids of the prompt of a history."""
    prompts = PromptBuilder.build(template, tokenizer, dataset_of(titles), "text", budget)
    return prompts.encode(np.array(history)).tolist()


# ---- missing values


def test_titles_that_are_missing_values(faults, tmp_path, capsys):
    faults.titles_that_are_missing_values(tmp_path / "source")
    dataset = prepared(tmp_path / "source", tmp_path / "data")
    assert len(set(dataset.titles)) == 40 and "nan" not in dataset.titles
    assert dataset.info["hygiene"]["missing_values"]["count"] == 14
    assert "warning" not in capsys.readouterr().err

    # As they are, they are one title of many items.
    prepared(tmp_path / "source", tmp_path / "verbatim", "--titles", "verbatim")
    warning = capsys.readouterr().err
    assert "1 with more than 5 items (14 items in all" in warning and "'nan'" in warning


def test_jsons_nan_is_no_title(tmp_path):
    lines = ['{"item_id": 0, "title": NaN}', '{"item_id": 1, "title": "A"}']
    (tmp_path / "items.jsonl").write_text("\n".join(lines) + "\n")
    users = [json.dumps({"user_id": user, "items": [0, 1, 0, 1]}) for user in range(3)]
    (tmp_path / "sequences.jsonl").write_text("\n".join(users) + "\n")
    titles = prepared(tmp_path, tmp_path / "data").titles
    assert titles[0].startswith("Untitled item ") and titles[1] == "A"


# ---- what one path holds


def test_paths_of_many_items_and_of_different_texts_are_reported():
    texts = ["a", "b", "B", "c"] + ["nan"] * 6
    shared = SharedPaths.find(np.array([3, 1, 1, 2] + [7] * 6), texts)
    assert [group.tolist() for group in shared.crowded] == [[4, 5, 6, 7, 8, 9]]
    assert [group.tolist() for group in shared.merged] == [[1, 2]]
    assert "1 with different texts (such as 1 'b', 2 'B')" in shared.warning()
    assert "the largest has 6: 4 'nan', 5 'nan', 6 'nan'" in shared.warning()

    # Five items of one title, and items without a title, need no word.
    assert SharedPaths.of_texts(["x"] * 5 + [None] * 9).warning() == ""
    assert "more than 5" in SharedPaths.of_texts(["x"] * 6).warning()


def test_titles_a_tokenizer_cannot_write(faults, tmp_path, capsys):
    faults.titles_a_tokenizer_cannot_write(tmp_path)
    dataset = prepared(tmp_path / "source", tmp_path / "data")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    config = TrainConfig(
        ds_config="x", dataset="x", output_dir="x", model_config="x", tokenizer="x", igd_beta=0.1
    )
    model_config = T5Config(vocab_size=120, d_model=8)
    inputs = Inputs(
        template=Template.load("short"),
        dataset=dataset,
        tokenizer=tokenizer,
        added_ids=range(0),
        model_config=model_config,
        backbone=backbone_of(model_config),
    )

    with pytest.raises(
        UsageError, match="4 items with different texts share 2 token paths"
    ) as told:
        training_inputs.build_catalogue(tmp_path / "catalogue", config, inputs)
    assert "日本語アルバム" in str(told.value) and "--allow_merged_titles" in str(told.value)
    assert not (tmp_path / "catalogue").exists()

    config = dataclasses.replace(config, allow_merged_titles=True)
    capsys.readouterr()
    training_inputs.build_catalogue(tmp_path / "catalogue", config, inputs)
    assert "2 with different texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("titles", "is_refused"),
    [
        (["Blue Moon", "Blue Moon"], False),  # two items of one title
        (["Blue Moon ①", "Blue Moon 1"], False),  # merged by the tokenizer's normaliser
        (["Blue 日", "Blue 月"], True),
        (["Blue Moon", "Red Sun"], False),
    ],
)
def test_what_counts_as_merged(titles, is_refused):
    tokenizer = unigram_tokenizer("Blue Moon Red Sun 1 2 3")
    _, offsets = item_paths(dataset_of(titles), tokenizer, "text")
    catalogue = Catalogue.build(dataset_of(titles), tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, offsets, catalogue.counts)
    shared = SharedPaths.find(trie.leaf_of_item, titles)
    if is_refused:
        with pytest.raises(UsageError, match="cannot write"):
            shared.refuse_merged(tokenizer)
    else:
        shared.refuse_merged(tokenizer)
    assert bool(shared.warning()) == ("①" in titles[0] or is_refused)


def test_item_match_is_the_headline():
    entry = {
        "item_match": {"hr@5": 0.1, "ndcg@5": 0.05},
        "token_match": {"hr@5": 0.9, "ndcg@5": 0.8},
    }
    found = final_metrics("test", {"alpha": {"0.0": entry}}, "0.0", 5)
    assert found["test/hr@5"] == 0.1 and found["test/token_match_hr@5"] == 0.9
    assert found["test/ndcg@5 at chosen alpha"] == 0.05


# ---- control tokens


@pytest.mark.parametrize("title", ["<s>$20 mug", "a</s>", "<pad>", "<|im_start|>user", "x<s></s>"])
def test_special_tokens_in_titles_are_text(title):
    tokenizer = byte_tokenizer()
    control = set(control_tokens(tokenizer).values())
    assert len(control) == len(CONTROL)
    before = tokenizer_fingerprint(tokenizer)

    ids, _ = item_paths(dataset_of([title]), tokenizer, "text")
    assert control.isdisjoint(ids[:-1].tolist()) and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == title + "\n"

    # In prompts too, where the template's own control tokens stay.
    template = Template("<s>I bought:", "<|im_start|>{item}</s>", ",", "<pad>")
    prompt = prompt_of(template, tokenizer, [title, "b"], [0, 1])
    expected = f"<s>I bought:<|im_start|>{title}</s>,<|im_start|>b</s><pad>"
    assert tokenizer.decode(prompt) == expected
    named = [token for token in tokenizer.convert_ids_to_tokens(prompt) if token in CONTROL]
    assert named == ["<s>", "<|im_start|>", "</s>", "<|im_start|>", "</s>", "<pad>"]
    assert tokenizer_fingerprint(tokenizer) == before


@pytest.mark.parametrize("title", ["Blue </s> Moon", "<pad>", "a<unk>b</s></s>"])
def test_a_vocabulary_that_holds_the_special_tokens(title):
    tokenizer = unigram_tokenizer("Blue Moon a b < / > s p d u n k")
    (ids,) = encode([title], tokenizer, as_text=True)
    assert control_tokens(tokenizer) == {"<pad>": 0, "</s>": 1}
    assert not {0, 1} & set(ids)
    Catalogue.build(dataset_of([title]), tokenizer)


def test_added_tokens_that_are_not_special_stay_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a_1>"])
    (ids,) = encode(["<a_1><s>"], tokenizer, as_text=True)
    assert ids[0] == tokenizer.convert_tokens_to_ids("<a_1>") and len(ids) == 4
    assert encode(["<a_1><s>"], tokenizer, as_text=False)[0][1] == tokenizer.bos_token_id


def test_titles_with_markup(faults, tmp_path):
    faults.titles_with_markup(tmp_path / "source")
    dataset = prepared(tmp_path / "source", tmp_path / "data")
    assert dataset.titles[:4] == [
        "Was $20 now $10",
        "$20 mug",
        "#1 Dad {Funny: Gift}",
        "Book.Title {Vol: 1}",
    ]
    raw = prepared(tmp_path / "source", tmp_path / "verbatim", "--titles", "verbatim")
    tokenizer = byte_tokenizer()
    ids, offsets = item_paths(raw, tokenizer, "text")
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids[offsets[1] : offsets[2] - 1]) == "<s>$20 mug\n"

    # The long title takes the room of the histories, unless it is cut.
    longest = int(np.diff(offsets).max())
    prompts = PromptBuilder.build(Template.load("short"), tokenizer, raw, "text", 40 + longest)
    cut = with_cut_titles(raw, tokenizer, 30)
    assert cut.titles[4] == "long long long long long long" and cut.fingerprint == raw.fingerprint
    assert cut.titles[:4] == raw.titles[:4] and cut.titles[5:] == raw.titles[5:]
    shorter = PromptBuilder.build(Template.load("short"), tokenizer, cut, "text", 40 + longest)
    rows = raw.splits["train"]
    assert shorter.rows_kept(rows).sum() > prompts.rows_kept(rows).sum()


# ---- long titles


def test_cut_titles_end_at_a_word_and_stay_different():
    tokenizer = byte_tokenizer()
    titles = [
        "A Very Long Title, Volume 1",
        "A Very Long Title, Volume 2",
        "A Very Long",  # what the first one would be cut to
        "A Very Long Title, Volume 1",
        None,
        "Dune",
        "Donaudampfschifffahrtsgesellschaft",
        "日本語アルバム",
    ]
    found = cut_titles(titles, tokenizer, 13)
    assert found == [
        "A Very (2)",
        "A Very (3)",
        "A Very Long",
        "A Very (2)",
        None,
        "Dune",
        "Donaudampfsc",
        "日本語ア",
    ]
    lengths = [len(ids) for ids in encode([f"{title}\n" for title in found], tokenizer, True)]
    assert max(lengths) <= 13
    assert cut_titles(titles, tokenizer, 100) == titles
    with pytest.raises(UsageError, match="--max_title_tokens 2 is too small.*日本語"):
        cut_titles(["日本語"], tokenizer, 2)


def test_many_titles_with_one_beginning_stay_different():
    titles = [f"The complete collection of everything, part {i}" for i in range(300)]
    found = cut_titles(titles, byte_tokenizer(), 24)
    assert len(set(found)) == 300
    assert found[0] == "The complete collection"
    assert found[299] == "The complete (300)"


def test_rows_that_are_cut_are_counted():
    histories = [[0], [0, 1, 2], [2] * 9, [], [1, 0, 1, 0, 2]]
    dataset = dataset_of(["a", "bb bb", "c" * 30], histories)
    rows = dataset.splits["train"]
    for budget in range(60, 200, 7):
        prompts = PromptBuilder.build(
            Template.load("short"), byte_tokenizer("<s>"), dataset, "text", budget
        )
        expected = [prompts.num_kept(rows.history(row)) for row in range(len(rows))]
        assert prompts.rows_kept(rows).tolist() == expected
        num_cut = sum(len(h) > kept for h, kept in zip(histories, expected, strict=True))
        line = prompts.describe_cuts(rows, 32)
        assert line.startswith(f"{num_cut} of 5 rows of train cut to {budget} tokens")
        assert f"mean items kept {np.mean(expected):.2f} of 3.60" in line
        assert ("--max_title_tokens" in line) == bool(num_cut)


def test_cutting_titles_needs_titles():
    settings = {"ds_config": "x", "dataset": "x", "output_dir": "x", "model_name_or_path": "x"}
    config = TrainConfig(**settings, igd_beta=0.1, max_title_tokens=9, item_kind="semantic-id")
    with pytest.raises(UsageError, match="--max_title_tokens has no effect"):
        config.check()
    with pytest.raises(UsageError, match="max_title_tokens"):
        TrainConfig(**settings, igd_beta=0.1, max_title_tokens=-1).check()


# ---- templates


def test_prompts_with_two_beginnings(faults, tmp_path):
    faults.prompts_with_two_beginnings(tmp_path)
    with pytest.raises(UsageError, match=r"chat.yaml: 'prefix' holds \{history\}.*\{domain\}"):
        Template.load(str(tmp_path / "chat.yaml"))

    mended = (tmp_path / "chat.yaml").read_text().replace(" {history}", "")
    (tmp_path / "mended.yaml").write_text(mended)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    template = Template.load(str(tmp_path / "mended.yaml"))
    prompt = prompt_of(template, tokenizer, ["Item 1", "Item 2"], [0, 1])
    expected = "<s>user\nI bought: Item 1, Item 2</s>\n<s>assistant\n"
    text = "".join(tokenizer.convert_ids_to_tokens(prompt)).replace("Ġ", " ").replace("Ċ", "\n")
    assert text == expected
    assert prompt.count(tokenizer.bos_token_id) == 2  # the user's and the assistant's


@pytest.mark.parametrize("text", ["{items}", "{Item}", "{domain}"])
def test_words_that_nothing_replaces_are_named(text, tmp_path):
    file = tmp_path / "mine.yaml"
    values = {"prefix": "", "item": "{item} " + text, "separator": "{ } {}", "suffix": "{domain}"}
    file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=rf"'item' holds \{text}.*known there: \{{item\}}"):
        Template.load(str(file))

    file.write_text(json.dumps(values | {"item": '{"title": "{item}"}'}))
    assert Template.load(str(file)).separator == "{ } {}"


@pytest.mark.parametrize("begin", ["", "<s>", "[gMASK] <sop>"])
@pytest.mark.parametrize("prefix", ["", "Hi ", "<s>Hi ", "<sop>Hi ", "[gMASK]<sop>Hi ", "<s><s>"])
def test_the_beginning_stands_once(begin, prefix):
    tokenizer = byte_tokenizer(begin, added=["[gMASK]", "<sop>"])
    prompt = prompt_of(Template(prefix, "{item}", ",", ""), tokenizer, ["a", "b"], [0, 1])

    own = begin.replace(" ", "")
    overlap = max(i for i in range(len(own) + 1) if prefix.startswith(own[len(own) - i :]))
    assert tokenizer.decode(prompt) == own + prefix[overlap:] + "a,b"


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }} "
    "{{ message.content | trim }}</s>\n{% endfor %}Today is {{ strftime_now('%Y') }}.\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.mark.parametrize("begin", ["", "<s>"])
def test_the_tokenizers_own_chat_template(begin):
    tokenizer = byte_tokenizer(begin, CHAT_TEMPLATE)
    template = Template.load("chat", tokenizer)
    assert Template.from_dict(json.loads(json.dumps(template.as_dict())), "saved") == template

    prompt = prompt_of(template, tokenizer, ["a", "<s>b"], [0, 1])
    turn = [{"role": "user", "content": "Recent books:\na\n<s>b\nNext:"}]
    text = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert tokenizer.decode(prompt).split("Today is")[0] == text.split("Today is")[0]
    assert tokenizer.decode(prompt).endswith(
        "Today is 2024.\n<|im_start|>assistant\n<think></think>"
    )
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_chat_needs_a_chat_template():
    with pytest.raises(UsageError, match="--prompt chat: the tokenizer has no chat template"):
        Template.load("chat", byte_tokenizer())
    with pytest.raises(UsageError, match="does not show the user's turn once"):
        Template.load("chat", byte_tokenizer(chat_template="nothing"))
