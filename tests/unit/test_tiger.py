"""TIGER: a run with only codes, from the tokenizer to ranked lists, against full T5 passes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_run
import tokenizers
import torch
import transformers
import yaml
from label_batch import label_batch
from oracle import assert_same_lists, weight_by_path

from igd_ds.backbones import T5, CausalLM, backbone_of, read_model_config
from igd_ds.backbones.saved import DESCRIPTION_FILE
from igd_ds.backbones.tokenizer import load_tokenizer
from igd_ds.commands import export as export_command
from igd_ds.commands import tokenizer as tokenizer_command
from igd_ds.config.model import ModelOptions
from igd_ds.contracts import IGNORED, Batch
from igd_ds.data.dataset import InteractionDataset, item_table, user_table, write_dataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.errors import UsageError
from igd_ds.evaluation.recommender import Recommender
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.store import save_catalogue
from igd_ds.objectives.weighted import token_nll
from igd_ds.search.scoring import edge_weights
from igd_ds.train_config import TrainConfig
from igd_ds.training_inputs import load_inputs

ROOT = Path(__file__).parents[2]
SEMANTIC_IDS = [
    [f"<a_{i % 3}>", f"<b_{i % 5 % 3}>", f"<c_{i % 4}>", *["<d_1>"] * (i % 2)] for i in range(20)
]
SEMANTIC_IDS[7] = SEMANTIC_IDS[11]  # share a leaf
HISTORIES = [[1, 2], [0], [7, 7, 3, 9, 4, 12, 19], [5, 6], [8, 13]]
SIZES = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 1.5,
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def options_of(folder: Path, **changes) -> ModelOptions:
    settings = {
        "model_config": str(folder / "model.json"),
        "tokenizer": str(folder / "tokenizer"),
    } | changes
    return ModelOptions(**settings)


def build(options: ModelOptions, tokenizer):
    """The model as train.py builds it."""
    model_config = read_model_config(options.model_config or options.model_name_or_path)
    backbone = backbone_of(model_config)
    backbone.fit_model_config(model_config, options, tokenizer, range(0))
    torch.manual_seed(0)
    model = backbone.build(options, model_config, torch.float32, torch.device("cpu"))
    assert backbone.num_trained_parameters(model_config, options) == sum(
        p.numel() for p in model.parameters()
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/, tokenizer/, model.json and run/ as the commands leave them, with random weights."""
    folder = tmp_path_factory.mktemp("tiger")
    targets = [i % 15 for i in range(40)]  # items 15 to 19 are cold
    splits = {
        name: tiny_run.rows(range(40), [[1]] * 40, targets) for name in ("train", "valid", "test")
    }
    items = item_table([None] * 20, SEMANTIC_IDS, pa.array(range(20)))
    write_dataset(folder / "data", items, user_table(splits, None), splits, tiny_run.INFO)
    assert (
        tokenizer_command.main(
            [
                "--dataset",
                str(folder / "data"),
                "--codes_only",
                "--output",
                str(folder / "tokenizer"),
            ]
        )
        == 0
    )

    (folder / "model.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 9, **SIZES}))
    tokenizer, dataset = (
        load_tokenizer(str(folder / "tokenizer")),
        InteractionDataset.load(folder / "data"),
    )

    out = folder / "run" / "model"
    build(options_of(folder), tokenizer).save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_catalogue(out / "catalogue", tiny_run.store(Catalogue.build(dataset, tokenizer)))

    description = {
        "prompt": Template.load("codes").as_dict(),
        "max_length": 5 + 20,
        "load_in_4bit": False,
    }
    (out / DESCRIPTION_FILE).write_text(json.dumps(description))
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"dataset": str(folder / "data")}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder / "tokenizer"))


@pytest.fixture(scope="module")
def model(folder):
    """The saved model, loaded by transformers alone."""
    return transformers.T5ForConditionalGeneration.from_pretrained(folder / "run" / "model").eval()


@torch.no_grad()
def ranking(model, prompt: list[int], paths, weight) -> list[tuple[float, tuple[int, ...]]]:
    """[(score, path)] of all paths, best first, each from a pass of its own with labels."""
    scores = []
    for path in paths:
        logprobs = (
            model(input_ids=torch.tensor([prompt]), labels=torch.tensor([path]))
            .logits[0]
            .log_softmax(-1)
        )
        scores.append(
            sum(weight[path[: t + 1]] * logprobs[t, token].item() for t, token in enumerate(path))
        )
    return sorted(zip(scores, paths, strict=True), reverse=True)


def batch(tokenizer, rows) -> Batch:
    """The batch of (history, item) rows; an item of None is a row without labels."""
    codes = [
        tokenizer("".join(sum((SEMANTIC_IDS[i] for i in history), [])))["input_ids"]
        for history, _ in rows
    ]
    paths = [
        [] if item is None else tokenizer("".join(SEMANTIC_IDS[item]))["input_ids"] + [1]
        for _, item in rows
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = (
        pad([torch.tensor(c) * s + 1 - s for c in codes], batch_first=True) for s in (1, 0)
    )
    width = torch.full((5,), IGNORED)
    labels = torch.stack(
        [torch.cat([torch.tensor(path, dtype=torch.int64), width[len(path) :]]) for path in paths]
    )
    return label_batch(ids, mask, labels)


def test_prompts_are_the_codes_and_nothing_else(folder, tokenizer):
    dataset = InteractionDataset.load(folder / "data")
    prompts = PromptBuilder.build(
        Template.load("codes"), tokenizer, dataset, "semantic-id", budget=20
    )
    for history in HISTORIES:
        codes = sum(
            (SEMANTIC_IDS[i] for i in history[-5:]), []
        )  # 5 items of 3 or 4 codes are what 20 tokens have room for
        assert tokenizer.convert_ids_to_tokens(prompts.encode(np.array(history)).tolist()) == codes

    assert prompts.null.tolist() == [tokenizer.unk_token_id] == [2]
    with pytest.raises(
        ValueError, match=r"--prompt: the tokenizer has no token for the template's '.*items:\\n'"
    ):
        PromptBuilder.build(Template.load("short"), tokenizer, dataset, "semantic-id", budget=20)
    with pytest.raises(
        ValueError, match=r"""no token for the template's '"": '; with codes alone"""
    ):
        PromptBuilder.build(
            Template("", '"{item}": ', "", ""), tokenizer, dataset, "semantic-id", budget=20
        )


def test_the_vocabulary_is_the_tokenizers(folder, tokenizer, model):
    codes = sorted({code for codes in SEMANTIC_IDS for code in codes})
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [
        "<pad>",
        "<|endoftext|>",
        "<unk>",
        *codes,
    ]
    assert tuple(model.lm_head.weight.shape) == (len(tokenizer), 32)
    config = model.config
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert isinstance(backbone_of(config), T5) and isinstance(
        backbone_of(transformers.Qwen2Config()), CausalLM
    )


def test_the_papers_size(folder, tokenizer):
    paper = build(
        options_of(folder, model_config=str(ROOT / "tools" / "models" / "tiger.json")), tokenizer
    )
    config = paper.config
    assert (len(paper.encoder.block), len(paper.decoder.block), config.d_model, config.d_ff) == (
        4,
        4,
        128,
        1024,
    )
    assert (config.num_heads, config.d_kv, config.dropout_rate, config.dense_act_fn) == (
        6,
        64,
        0.1,
        "relu",
    )
    assert config.vocab_size == len(tokenizer) and config.is_encoder_decoder


@pytest.mark.parametrize("search", ["beam", "exact"])
def test_lists_equal_a_ranking_of_every_item(folder, model, search):
    recommender = Recommender.load(folder / "run", device="cpu")
    trie = recommender.stored.trie
    weight = weight_by_path(trie, edge_weights(trie, recommender.stored.gain, "per-node", 0.3))
    path_of = [tuple(recommender.stored.catalogue.path(item).tolist()) for item in range(20)]
    paths = sorted(set(path_of))
    k = len(paths) if search == "beam" else 5
    for history, ranked in zip(
        HISTORIES, recommender.recommend(HISTORIES, k=k, alpha=0.3, search=search), strict=True
    ):
        prompt = recommender.prompts.encode(np.array(history)).tolist()
        assert_same_lists(
            [(r.score, path_of[r.item_ids[0]]) for r in ranked],
            ranking(model, prompt, paths, weight)[:k],
        )
        assert not ranked.short and all(r.certified == (search == "exact") for r in ranked)
    assert (7, 11) in [r.item_ids for r in recommender.recommend([[1]], k=20)[0]]


def test_label_logits_give_transformers_own_loss_and_gradient(folder, tokenizer):
    found = batch(tokenizer, [([1, 2, 3], 4), ([5], 6), ([0, 2], None), ([9, 9], 13)])
    gradients = []
    for checkpointing in (False, True):
        ours = build(options_of(folder, gradient_checkpointing=checkpointing), tokenizer)
        for module in ours.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0  # of the attention weights

        ours.train()
        logits = T5().label_logits(ours, found)
        assert logits.shape == (len(found.targets), len(tokenizer))
        loss = token_nll(logits, found.targets).mean()
        theirs = ours(
            input_ids=found.inputs.input_ids,
            attention_mask=found.inputs.attention_mask,
            labels=found.inputs.labels,
            use_cache=False,
        ).loss
        torch.testing.assert_close(loss, theirs)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters()})
        ours.zero_grad()
        theirs.backward()
        gradients.append({name: p.grad.clone() for name, p in ours.named_parameters()})

    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_a_batch_without_labels_has_a_graph(folder, tokenizer):
    model = build(options_of(folder), tokenizer)
    found = batch(tokenizer, [([1, 2], None), ([3], None)])
    logits = T5().label_logits(model, found)
    assert logits.shape == (0, len(tokenizer))
    token_nll(logits, found.targets).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_trained_t5_goes_on_as_it_is(folder, tokenizer, model):
    config = options_of(folder, model_config="", model_name_or_path=str(folder / "run" / "model"))
    again = build(config, tokenizer)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8}, "--lora_r adapts causal LMs"),
        ({"attn_implementation": "flash_attention_2"}, "no position bias, which T5 needs"),
        ({"type": "bart"}, "is a model of type bart: the encoder-decoder known here is t5"),
        ({"type": "qwen2"}, "is a model of type qwen2"),
        ({"added": 4}, "has 4 tokens that the pretrained T5 at '.*' does not know"),
        ({"vocabulary": 10}, "has 4 tokens that the pretrained T5 at '.*' does not know"),
    ],
)
def test_what_no_t5_can_do_is_refused(folder, tokenizer, changes, message):
    settings = {
        key: value for key, value in changes.items() if key in {"lora_r", "attn_implementation"}
    }
    if {"added", "vocabulary"} & set(changes):
        settings |= {"model_config": "", "model_name_or_path": str(folder / "run" / "model")}
    config = options_of(folder, **settings)
    model_config = transformers.AutoConfig.for_model(changes.get("type", "t5"))
    model_config.vocab_size = changes.get("vocabulary", 32128)
    with pytest.raises(ValueError, match=message):
        T5().fit_model_config(model_config, config, tokenizer, range(changes.get("added", 0)))


def test_a_tokenizer_without_the_codes_and_a_missing_configuration(folder, tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")
    )
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    )
    with pytest.raises(ValueError, match="code '<a_0>' of item 0 is the unknown token"):
        Catalogue.build(InteractionDataset.load(folder / "data"), bare)
    with pytest.raises(ValueError, match="no model configuration at"):
        read_model_config(str(tmp_path / "gone.json"))


def test_a_list_of_items_is_for_decoders(folder):
    config = TrainConfig(
        ds_config="x",
        dataset=str(folder / "data"),
        output_dir="x",
        model_config=str(folder / "model.json"),
        tokenizer=str(folder / "tokenizer"),
        objective="uniform",
        prompt="list",
    )
    with pytest.raises(UsageError, match="--prompt list .* an encoder-decoder does not read"):
        load_inputs(config)


def test_exported_semantic_ids_and_weights(folder, tmp_path):
    """The files of other toolkits, and transformers alone with the exported trie."""
    output = tmp_path / "export"
    assert export_command.main([str(folder / "run"), "--output", str(output)]) == 0
    index = json.loads((output / "index.json").read_text())
    assert index == {str(item): list(codes) for item, codes in enumerate(SEMANTIC_IDS)}
    lines = (output / "info.txt").read_text().splitlines()
    assert lines[3] == "".join(SEMANTIC_IDS[3]) + "\t\t3" and len(lines) == 20

    assert not (output / "sid2item.json").exists()  # FlashRec has no IDs of different lengths
    assert "FlashRec" not in (output / "README.md").read_text()

    tokenizer = load_tokenizer(str(output / "model"))
    trie = json.loads((output / "trie.json").read_text())

    def allowed(batch_id, tokens):
        node = trie
        for token in tokens[1:].tolist():
            node = node.get(str(token), {})
        return [int(token) for token in node] or [tokenizer.eos_token_id]

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(output / "model").eval()
    prompt = json.loads((output / "prompt.json").read_text())
    out = model.generate(
        torch.tensor([prompt["token_ids"]]), num_beams=4, num_return_sequences=4, max_new_tokens=6,
        length_penalty=0.0, early_stopping="never", prefix_allowed_tokens_fn=allowed,
        return_dict_in_generate=True, output_scores=True, do_sample=False,
    )  # fmt: skip
    items = json.loads((output / "items.json").read_text())
    lists = Recommender.load(folder / "run").recommend([prompt["history"]], k=4, alpha=0.0)[0]
    for sequence, place in zip(out.sequences, lists, strict=True):
        codes = [token for token in sequence[1:].tolist() if token != tokenizer.eos_token_id]
        codes = [token for token in codes if token != tokenizer.pad_token_id]
        found = items[" ".join(map(str, codes))]
        assert [entry["item"] for entry in found] == list(place.source_ids)
