"""Semantic-ID items, on real data: the same trainer, weights, trie and search as for titles."""

import json
import sys
from pathlib import Path

import ranks

TOOLS = str(Path(__file__).parents[2] / "tools")


def prepare(source: Path, folder: Path) -> None:
    sys.path.insert(0, TOOLS)
    import prepare_data
    import train_tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    flags = ["--source", "sequences", "--input", source, "--protocol", "leave-one-out", "--num_users", 150, "--max_history", 5]
    assert prepare_data.main([str(f) for f in [*flags, "--output", folder / "data"]]) == 0
    flags = ["--dataset", folder / "data", "--vocab_size", 300, "--semantic_ids", "--output", folder / "tokenizer"]
    assert train_tokenizer.main([str(f) for f in flags]) == 0
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2Config(vocab_size=vocabulary, **sizes).to_json_file(folder / "model.json")


def test_train_and_evaluate(world, shared, tmp_path):
    from igd_ds import eval as evaluator
    from igd_ds import train

    ranks.run(1, tmp_path / "log", prepare, shared / "data" / "instruments", tmp_path)
    own = {"dataset": tmp_path / "data", "tokenizer": tmp_path / "tokenizer", "model_config": tmp_path / "model.json"}
    run = tmp_path / "run"
    ranks.run(2, tmp_path / "log", ranks.entry, train.main, world.train_flags(run, 2, **own, max_steps=4, validate_every=4))
    catalogue = json.loads((run / "catalogue" / "catalogue.json").read_text())
    assert catalogue["kind"] == "semantic-id" and catalogue["num_items"] == 9922
    flags = ["--model", run / "model", "--dataset", tmp_path / "data", "--num_beams", 20, "--num_rows", 30, "--alpha", 0, 0.2]
    flags += ["--output_dir", run / "eval" / "test"]
    ranks.run(2, tmp_path / "log", ranks.entry, evaluator.main, [str(f) for f in flags])
    results = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    items = (shared / "data" / "instruments" / "items.jsonl").read_text().splitlines()
    different = {tuple(json.loads(line)["semantic_id"]) for line in items}
    assert results["rows"] == 30 and results["leaves"] == len(different) < 9922  # some items share an ID, and a leaf
    assert set(results["alpha"]) == {"0.0", "0.2"} and "ndcg@20" in results["alpha"]["0.2"]["token_match"]
