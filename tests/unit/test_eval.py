"""The evaluator in one process: lists and metrics against a plain search, resuming, guards. Many ranks: tests/dist."""

import json
import math

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import transformers
from test_beam import assert_same_lists, plain_search

from igd_ds import distributed, eval
from igd_ds.data.dataset import InteractionDataset, item_table, write_dataset
from igd_ds.data.prompts import PromptBuilder, Template
from igd_ds.decoding.rules import edge_weights
from igd_ds.items import decisiveness
from igd_ds.items.catalogue import Catalogue
from igd_ds.items.store import save_catalogue
from igd_ds.items.trie import TokenTrie
from igd_ds.models import causal_lm

TITLES = ["ab", "abc", "ba", "ba", "bcc", "cab", "caba", "c", "aa", "acb"]  # items 2 and 3 share a leaf
INFO = {"name": "toy", "domain": "items", "protocol": "none", "parameters": {}, "counts": {}, "sources": [], "hygiene": {}}
TRAIN_TARGETS = [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 6, 7]  # 8 and 9 are cold
NUM_TEST = 11
EOS = 256


def rows(users, histories, targets):
    columns = [pa.array(users, pa.int64()), pa.array(histories, pa.list_(pa.int32())), pa.array(targets, pa.int32()),
               pa.nulls(len(users), pa.int64())]  # fmt: skip
    return pa.table(columns, names=["user_id", "history", "target", "timestamp"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(model folder, dataset folder) as prepare_data.py and train.py leave them, with random weights."""
    folder = tmp_path_factory.mktemp("trained")
    random = np.random.default_rng(0)
    histories = [[int(i) for i in random.integers(0, len(TITLES), random.integers(1, 5))] for _ in range(NUM_TEST)]
    test = rows(
        [7, 7, 7, 8, 9, 9, 10, 11, 12, 12, 13], histories, [int(t) for t in random.integers(0, 10, NUM_TEST - 2)] + [8, 3]
    )
    train = rows(range(12), [[1]] * 12, TRAIN_TARGETS)
    write_dataset(folder / "data", item_table(TITLES, None, np.arange(10)), {"train": train, "valid": test, "test": test}, INFO)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=EOS + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    dataset = InteractionDataset.load(folder / "data")
    catalogue = Catalogue.build(dataset, tokenizer)
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    save_catalogue(folder / "model" / "catalogue", catalogue, trie, decisiveness.information_gain(trie, "prior"), "prior")
    description = {"prompt": Template.load("short").as_dict(), "max_length": 160, "load_in_4bit": False}
    (folder / "model" / causal_lm.DESCRIPTION_FILE).write_text(json.dumps(description))
    return folder / "model", folder / "data"


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch):
    """Run the entry point with flags added to the usual ones; returns (exit code, output folder)."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(distributed, "init", lambda: None)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))

    def run(*flags, output="out"):
        usual = ["--model", trained[0], "--dataset", trained[1], "--output_dir", tmp_path / output, "--batch_size", 3]
        monkeypatch.setattr("sys.argv", ["eval.py", *map(str, (*usual, *flags))])
        return eval.main(), tmp_path / output

    return run


def test_lists_and_metrics_equal_a_plain_search(evaluate, trained):
    code, output = evaluate("--alpha", 0, 0.3, "--num_beams", 5)
    assert code == 0 and not (output / "parts").exists()
    found = json.loads((output / "metrics.json").read_text())
    dataset, tokenizer = InteractionDataset.load(trained[1]), causal_lm.load_tokenizer(str(trained[0]))
    catalogue, model = Catalogue.build(dataset, tokenizer), transformers.AutoModelForCausalLM.from_pretrained(trained[0]).eval()
    trie = TokenTrie.build(catalogue.token_ids, catalogue.offsets, catalogue.counts)
    prompts = PromptBuilder.build(Template.load("short"), tokenizer, dataset, "text", 160 - catalogue.max_length)
    paths = [tuple(catalogue.path(item).tolist()) for item in range(10)]
    node_of = {paths[item][: t + 1]: node for item in range(10) for t, node in
               enumerate(trie.path_nodes(catalogue.offsets)[catalogue.offsets[item] : catalogue.offsets[item + 1]])}  # fmt: skip
    test = dataset.splits["test"]
    for alpha in (0.0, 0.3):
        weights = edge_weights(trie, decisiveness.information_gain(trie, "prior"), "per-node", alpha)
        lists = pq.read_table(output / f"predictions-alpha{alpha}.parquet").to_pylist()
        assert [(line["row_id"], line["rank"]) for line in lists] == [(r, k) for r in range(NUM_TEST) for k in range(1, 6)]
        hits, gains, item_hits = 0, 0, 0
        for row in range(NUM_TEST):
            mine = lists[5 * row : 5 * row + 5]
            weight = {path: float(weights[node]) for path, node in node_of.items()}
            expected = plain_search(model, prompts.encode(test.history(row)).tolist(), sorted(set(paths)), weight, 5, 0.0)
            assert_same_lists([(line["score"], paths[line["item_ids"][0]]) for line in mine], expected)
            assert all(line["user_id"] == test.user_ids[row] and line["alpha"] == alpha for line in mine)
            assert all(len({paths[item] for item in line["item_ids"]}) == 1 for line in mine)
            for line in mine:
                if test.targets[row] in line["item_ids"]:
                    hits, gains = hits + 1, gains + 1 / math.log2(line["rank"] + 1)
                    item_hits += 1 / len(line["item_ids"])
        values = found["alpha"][str(alpha)]
        assert values["token_match"]["hr@5"] == pytest.approx(hits / NUM_TEST)
        assert values["token_match"]["ndcg@5"] == pytest.approx(gains / NUM_TEST)
        assert values["item_match"]["hr@5"] == pytest.approx(item_hits / NUM_TEST)
        assert set(values["token_match"]) == {f"{name}@{k}" for name in ("hr", "ndcg") for k in (1, 3, 5)}
        warm, cold = values["token_match_warm_targets"]["hr@5"], values["token_match_cold_targets"]["hr@5"]
        assert warm * (NUM_TEST - found["cold_targets"]) + cold * found["cold_targets"] == pytest.approx(hits)
    assert found["rows"] == NUM_TEST and found["cold_targets"] == sum(t in (8, 9) for t in test.targets)
    assert found["leaves"] == 9
    entropy = decisiveness.entropy(trie, "prior")
    first = np.mean([entropy[node_of[paths[target][:1]]] for target in test.targets])
    assert found["target_prefix_entropy"]["nats"][0] == pytest.approx(first)


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bytes(evaluate, monkeypatch):
    _, whole = evaluate("--alpha", 0, 0.2, "--num_beams", 4, output="whole")
    search, calls = eval.beam_search, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 4:  # two values of α per batch: in the middle of the second batch
            raise KeyboardInterrupt
        return search(*arguments)

    monkeypatch.setattr(eval, "beam_search", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("--alpha", 0, 0.2, "--num_beams", 4)
    _, resumed = evaluate("--alpha", 0, 0.2, "--num_beams", 4)
    assert len(calls) == 4 + 2 * 3  # the other three of four batches
    names = ["metrics.json", "request.json", "predictions-alpha0.0.parquet", "predictions-alpha0.2.parquet"]
    for name in names:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    assert sorted(path.name for path in resumed.iterdir()) == sorted([*names, "timing.json", "metrics.jsonl", "tensorboard"])
    assert json.loads((resumed / "timing.json").read_text())["rows_already_there"] == 3


def test_a_finished_evaluation_is_not_repeated_and_another_one_is_refused(evaluate, monkeypatch, capsys):
    evaluate()
    monkeypatch.setattr(causal_lm, "load_trained", lambda *_: pytest.fail("weights are loaded"))
    assert evaluate()[0] == 0
    assert "finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="these differ: alpha, num_beams"):
        evaluate("--alpha", 0.1, "--num_beams", 3)


def test_a_beam_wider_than_the_catalogue_lists_every_leaf(evaluate, capsys):
    with pytest.warns(UserWarning, match="at 10, 20 are omitted"):
        _, output = evaluate("--num_beams", 12)
    assert "9 different items" in capsys.readouterr().out
    assert json.loads((output / "metrics.json").read_text())["alpha"]["0.0"]["token_match"].keys() >= {"hr@5"}
    lists = pq.read_table(output / "predictions-alpha0.0.parquet")
    assert lists.num_rows == 9 * NUM_TEST
    assert sorted(item for items in lists["item_ids"].to_pylist()[:9] for item in items) == list(range(10))


def test_a_sample_of_rows_is_seeded(evaluate):
    row_ids = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        _, output = evaluate("--num_rows", 5, "--seed", seed, "--num_beams", 1, output=name)
        row_ids.append(pq.read_table(output / "predictions-alpha0.0.parquet")["row_id"].to_pylist())
        assert json.loads((output / "metrics.json").read_text())["rows"] == 5
    assert row_ids[0] == row_ids[1] == sorted(set(row_ids[0])) != row_ids[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha", 1.5], r"--alpha must lie in \[0, 1\]"),
        (["--decoding_rule", "pernode"], "per-node"),
        (["--max_length", 500], "--max_length 500 exceeds the 160"),
        (["--max_length", 20], "--max_length leaves"),
        (["--model", "nowhere"], "no igd_ds.json"),
        (["--length_penalty", -1], "--length_penalty"),
    ],
)
def test_bad_input_is_refused_before_the_weights_are_loaded(evaluate, monkeypatch, flags, message):
    monkeypatch.setattr(causal_lm, "load_trained", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ValueError, match=message):
        evaluate(*flags)


def test_a_foreign_folder_is_never_written_to(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        evaluate()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
