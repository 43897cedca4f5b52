"""Items written as semantic IDs, on real data, by a causal LM and by TIGER.

Training, weights, trie and search are the same as for titles.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from safetensors.torch import load_file

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
TIGER = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout_rate": 0.1,
}
OBJECTIVES = {
    "uniform": {},
    "igd": {"igd_beta": 0.2},
    "igd-linear": {"igd_beta": 0.2},
    "position": {"position_floor": 0.3},
    "cft": {"position_floor": 0.3, "cft_lambda": 0.5},
    "rank": {"rank_tau": 0.8},
    "front-greater": {"item_embeddings": True},
    "frequency": {"frequency_beta": 0.99},
    "multi-target": {"item_embeddings": True, "frequency_beta": 0.99, "curriculum_cT": 2},
    "msl": {"msl_tau": "adaptive", "igd_beta": 0.2},
}


def prepare(source: Path, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    from igd_ds.commands import prepare as igd_prepare
    from igd_ds.commands import tokenizer as igd_tokenizer

    def run(command, *flags):
        assert command.main([str(flag) for flag in flags]) == 0

    flags = [
        "--source",
        "sequences",
        "--input",
        source,
        "--protocol",
        "leave-one-out",
        "--num_users",
        150,
        "--max_history",
        5,
    ]
    run(igd_prepare, *flags, "--output", folder / "data")
    data = ["--dataset", folder / "data", "--output"]
    run(igd_tokenizer, *data, folder / "tokenizer", "--vocab_size", 300, "--semantic_ids")
    run(igd_tokenizer, *data, folder / "codes", "--codes_only")
    vocabulary = len(PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"))
    Qwen2Config(vocab_size=vocabulary, **SIZES).to_json_file(folder / "model.json")
    (folder / "tiger.json").write_text(json.dumps(TIGER))
    np.save(
        folder / "vectors.npy", np.random.default_rng(0).normal(size=(9922, 8)).astype(np.float32)
    )


@pytest.fixture(scope="module")
def semantic(shared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("semantic")
    ranks.run(1, folder / "log", prepare, shared / "data" / "instruments", folder)
    return folder


def tiger_flags(world, semantic, run, objective, stage=1, **settings):
    options = dict(OBJECTIVES[objective])
    if "item_embeddings" in options:
        options["item_embeddings"] = semantic / "vectors.npy"
    own = {
        "dataset": semantic / "data",
        "tokenizer": semantic / "codes",
        "model_config": semantic / "tiger.json",
        "prompt": "codes",
    }
    return world.train_flags(
        run, stage, **({"igd_beta": None, "objective": objective} | own | options | settings)
    )


def test_train_and_evaluate(world, shared, semantic, tmp_path):
    from igd_ds import eval as evaluator
    from igd_ds import train

    own = {
        "dataset": semantic / "data",
        "tokenizer": semantic / "tokenizer",
        "model_config": semantic / "model.json",
    }
    run = tmp_path / "run"
    ranks.run(
        2,
        tmp_path / "log",
        ranks.entry,
        train.main,
        world.train_flags(run, 2, **own, max_steps=4, validate_every=4),
    )
    catalogue = json.loads((run / "catalogue" / "catalogue.json").read_text())
    assert catalogue["kind"] == "semantic-id" and catalogue["num_items"] == 9922
    flags = [
        "--model",
        run / "model",
        "--dataset",
        semantic / "data",
        "--num_beams",
        20,
        "--num_rows",
        30,
        "--alpha",
        0,
        0.2,
    ]
    flags += ["--output_dir", run / "eval" / "test"]
    ranks.run(2, tmp_path / "log", ranks.entry, evaluator.main, [str(f) for f in flags])
    results = json.loads((run / "eval" / "test" / "metrics.json").read_text())
    items = (shared / "data" / "instruments" / "items.jsonl").read_text().splitlines()
    different = {tuple(json.loads(line)["semantic_id"]) for line in items}
    assert (
        results["rows"] == 30 and results["leaves"] == len(different) < 9922
    )  # some items share an ID, and a leaf
    assert (
        set(results["alpha"]) == {"0.0", "0.2"}
        and "ndcg@20" in results["alpha"]["0.2"]["token_match"]
    )
    assert set(results["alpha"]["0.0"]["relaxed_match"]) == {"1", "2", "3"}
    check_export(run, tmp_path / "export")


def check_export(run, output):
    """FlashRec finds an item's tokens from range, sizes and the numbers of the codes."""
    from igd_ds.backbones.tokenizer import load_tokenizer
    from igd_ds.commands import export

    assert export.main([str(run), "--output", str(output)]) == 0
    page = (output / "README.md").read_text()
    start, end = re.search(r"--sid-token-range (\d+):(\d+)", page).groups()
    (sizes,) = re.search(r"--sid-codebook-sizes ([\d,]+)", page).groups()
    begin = int(start) + np.cumsum([0, *map(int, sizes.split(","))])
    assert begin[-1] == int(end) + 1

    tokenizer = load_tokenizer(str(output / "model"))
    index = json.loads((output / "index.json").read_text())
    items_of = json.loads((output / "sid2item.json").read_text())
    assert sum(map(len, items_of.values())) == len(index) == 9922
    for key, items in items_of.items():
        tokens = begin[:-1] + np.array([int(code) for code in key.split(",")])
        codes = tokenizer.convert_ids_to_tokens(tokens.tolist())
        assert all(codes == index[item] for item in items)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_a_tiger(world, semantic, tmp_path, objective):
    from igd_ds import train

    flags = tiger_flags(world, semantic, tmp_path / "run", objective, max_steps=2, validate_every=2)
    ranks.run(1, tmp_path / "log", ranks.entry, train.main, flags)
    entries = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [entry["step"] for entry in entries if "train/loss" in entry] == [
        1,
        2,
    ] and "valid/nll" in entries[-1]


@pytest.mark.parametrize("stage", [1, 3])
def test_tiger_with_multi_target_resumes_and_is_evaluated(world, semantic, tmp_path, stage):
    from igd_ds import eval as evaluator
    from igd_ds import train

    curriculum = {"curriculum_cT": None, "curriculum_c": 0.3, "lambda_lr": 0.1}
    settings = {"max_steps": 6, "resume": "auto", "validation_metric": "ndcg@10"} | curriculum
    log = tmp_path / "log"
    for name in ("whole", "stopped"):
        flags = tiger_flags(world, semantic, tmp_path / name, "multi-target", stage, **settings)
        if name == "stopped":
            processes = ranks.start(2, log, stopping_at, 3, train.main, flags)
            assert ranks.wait(processes) == [85, 85]
        ranks.run(2, log, ranks.entry, train.main, flags)
    whole, stopped = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    states = [
        (tmp_path / name / "model" / "objective.json").read_text() for name in ("whole", "stopped")
    ]
    assert states[0] == states[1] and min(map(abs, json.loads(states[0])["s"])) > 0.01
    entries = [
        json.loads(line)
        for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()
    ]
    alpha = [
        [entry[f"train/alpha_{name}"] for name in ("fg", "fr", "or")]
        for entry in entries
        if "train/loss" in entry
    ]
    assert len(alpha) == 6 and alpha[0] == [0.5, 0, 0.5] and alpha[-1][1] > alpha[1][1] > 0
    flags = [
        "--model",
        tmp_path / "stopped" / "model",
        "--dataset",
        semantic / "data",
        "--num_beams",
        20,
        "--num_rows",
        10,
    ]
    ranks.run(
        2,
        tmp_path / "log",
        ranks.entry,
        evaluator.main,
        [str(f) for f in [*flags, "--output_dir", tmp_path / "eval"]],
    )
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["rows"] == 10


def stopping_at(step: int, main, flags: list[str]) -> None:
    """Run an entry that is asked to stop, as by SLURM, while it makes its `step`-th step."""
    from igd_ds import loop

    optimizer_step = loop.optimizer_step

    def stop_there(engine, window, loss, number, normalization, stop):
        return optimizer_step(engine, window, loss, number, normalization, number + 1 == step)

    loop.optimizer_step = stop_there
    ranks.entry(main, flags)
